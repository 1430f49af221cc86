"""Does a ring transform leave a residual of smaller rank (TLoRA's premise)? Fitted to what real fine-tuning did.

    make bench NAME=residual_rank     (one CPU minute; resumable, a file a matrix in work/residual_rank)

W* is the weight after every number of the embedded base's UNet was trained on one person (benchmarks/extract.py, which has MiniLM too):
eight of its attention matrices. T is fitted to W* by alternating least squares, alone or in turns with the residual. Shares are of
|W* - W|^2 over all matrices. The rank needed is the least r for which LoRA leaves a tenth of |W* - W|^2, mean over the matrices;
"fewer" is the share of matrices where T with a residual of nine tenths of that rank leaves no more. A second change was made here, W
times a Kronecker product and a residual of rank 4, to see that the fit finds a transform where there is one.
"""

import json
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import smidgen
from benchmarks import extract
from benchmarks._harness import write_result
from benchmarks.decompositions import linear_targets
from smidgen.adapters.atomic import replace_file
from smidgen.adapters.fit import fit
from smidgen.adapters.tuner.adapted_layer import adapted_layer
from smidgen.adapters.tuner.building import make_slot

ROOT = extract.ROOT
LEFT = 0.1  # of the squared change
SOME = 8  # matrices of the UNet, evenly over its default targets
MADE = 4  # matrices of the second change, and the rank of their residual
FEWER = 0.9  # of the rank needed
MODELS = ("unet", "made")
ONLY = {"rings_1": {"transform_rank": 1}, "rings_2": {"transform_rank": 2}}  # a transform alone
BOTH = {
    **{f"lora_{r}": ("lora", {"r": r}) for r in (1, 4)},
    **{f"tlora_star_1_{r}": (f"tlora*(1,{r})", {}) for r in (1, 4)},
    "tlora_1_4": ("tlora(1,4)", {}),
    "ring_4": ("", {"residual": "tensor_ring", "r": 4}),
}


def pairs(name: str) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(layer, W, W*) of a model's matrices."""
    if name == "made":
        yield from made()
        return
    from smidgen.bases.checkpoints import read_checkpoint

    layers = linear_targets(extract._person()[0].model)
    tuned = read_checkpoint(str(extract.tuned_unet()))[""].tensors
    for target in [list(layers)[at * len(layers) // SOME] for at in range(SOME)]:
        yield target, layers[target].weight.detach().float(), tuned[f"{target}.weight"].float()


def made() -> Iterator[tuple[str, Tensor, Tensor]]:
    """Weights of 384 x 384 and what one Kronecker product and a residual of rank 4 make of them, of equal size."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    for at in range(MADE):
        weight = drawn(384, 384) / 384**0.5
        parts = [torch.eye(n) + 0.2 * drawn(n, n) / n**0.5 for n in (6, 8, 8)]
        mixed = weight @ torch.kron(torch.kron(parts[0], parts[1]), parts[2]) - weight
        rest = drawn(384, MADE) @ drawn(MADE, 384)
        yield f"made {at}", weight, weight + mixed + rest * (mixed.norm() / rest.norm())


def fitted(name: str, weight: Tensor, wanted: Tensor, method: str, options: dict[str, Any]) -> tuple[Tensor, int, Any]:
    """(delta that is nearest to ``wanted - weight``, numbers, state) of a method, or of the members that the options name."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    adapted = adapted_layer(layer)
    adapted.add_slot("default", make_slot(smidgen.config(*([method] if method else []), **options), layer, name))
    fit(adapted, "default", wanted.double() - weight.double())
    slot = adapted.slot("default")
    return adapted.delta_matrix("default").detach().double(), sum(p.numel() for p in slot.parameters()), slot


def shape_of(slot: Any) -> dict[str, float]:
    """Of a fitted transform: its rank over the width, and the share of its entries that are not zero."""
    excess = slot.transform_excess().detach().double()
    dense = excess + torch.eye(len(excess), dtype=excess.dtype)
    return {
        "share_rank": float(torch.linalg.matrix_rank(dense)) / len(dense),
        "share_dense": float((dense.abs() > 1e-9 * dense.abs().max()).double().mean()),
    }


def rank_needed(rest: Tensor, allowed: float) -> int:
    """The least r for which the singular values behind the first r have a squared sum of at most ``allowed``.

    >>> rank_needed(torch.diag(torch.tensor([3.0, 1.0, 1.0])), 2.0)
    1
    """
    squares = torch.linalg.svdvals(rest).square()
    behind = squares.sum() - torch.cat([squares.new_zeros(1), squares.cumsum(0)])
    return int((behind > allowed + 1e-12 * squares.sum()).sum())


def of_matrix(name: str, weight: Tensor, wanted: Tensor) -> dict[str, float]:
    """Squared change, squared rest and numbers by method, and ranks needed."""
    change = wanted.double() - weight.double()
    size = float(change.square().sum())
    found = {"size": size, "rank_alone": rank_needed(change, LEFT * size), "full": min(change.shape)}
    for key, options in ONLY.items():
        delta, numbers, slot = fitted(name, weight, wanted, "", {"transform": "tensor_ring"} | options)
        rest = change - delta
        if key == "rings_1":
            found |= shape_of(slot)
        found |= {f"rank_{key}": rank_needed(rest, LEFT * size)}
        found |= {f"rest_{key}": float(rest.square().sum()), f"numbers_{key}": numbers}
    for key, (method, options) in BOTH.items():
        delta, numbers, _ = fitted(name, weight, wanted, method, options)
        found |= {f"rest_{key}": float((change - delta).square().sum()), f"numbers_{key}": numbers}
    return found


def makes_do(name: str, weight: Tensor, wanted: Tensor, rank: int) -> int:
    """1 where a ring of rank 1 and a residual of nine tenths of ``rank`` leave no more than that rank alone may."""
    delta, _, _ = fitted(name, weight, wanted, "tlora_star", {"r": max(1, int(FEWER * rank))})
    change = wanted.double() - weight.double()
    return int((change - delta).square().sum() <= LEFT * change.square().sum())


def of_model(name: str) -> dict[str, Any]:
    """Figures over the matrices of a model; each matrix is kept in a file."""
    rows = []
    for target, weight, wanted in pairs(name):
        path = ROOT / "work" / "residual_rank" / f"{name}-{target.replace(' ', '_')}.json"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, json.dumps(of_matrix(target, weight, wanted)))
        found = json.loads(path.read_text())
        if "fewer" not in found:
            found["fewer"] = makes_do(target, weight, wanted, found["rank_alone"])
            replace_file(path, json.dumps(found))
            print(path.name, path.read_text(), flush=True)
        rows.append(found)
    total = {key: sum(row[key] for row in rows) for key in rows[0]}
    figures: dict[str, Any] = {f"{name}_matrices": len(rows)}
    for key, value in total.items():
        part, _, of = key.partition("_")
        if part == "rest":
            figures[f"{name}_explained_{of}"] = 1 - value / total["size"]
        elif part in ("rank", "numbers", "full", "share", "fewer"):
            figures[f"{name}_{key}"] = value / len(rows) if part != "numbers" else value
    for rank in (1, 4):
        gain = figures[f"{name}_explained_tlora_star_1_{rank}"] - figures[f"{name}_explained_lora_{rank}"]
        figures[f"{name}_gain_tlora_star_1_{rank}"] = gain
    return figures


def main() -> int:
    torch.set_num_threads(1)
    figures: dict[str, Any] = {"left": LEFT, "unet_steps": extract.UNET_STEPS}
    for name in MODELS:
        figures |= of_model(name)
    print(write_result("residual_rank", figures, "make bench NAME=residual_rank"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
