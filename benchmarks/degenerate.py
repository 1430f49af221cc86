"""SVFit and LoLDU on weights that do not determine their factors: what another machine rebuilds.

python -m benchmarks.degenerate       (two minutes)

Each weight has equal, zero or repeated singular values. An adapter with random numbers is saved on it and loaded in a child
process on another BLAS path, with two threads, on weights that are off by one ulp, and on a bf16 copy. A cell is the error
of what the loaded adapter does, over the size of what the saved one does, or "refused" where load refuses it. Written:
benchmarks/results/degenerate.json and the table in docs/methods.md.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import smidgen
from benchmarks._harness import between, write_result
from smidgen.errors import BaseLockError

DOCS = Path(__file__).parent.parent / "docs" / "methods.md"
SIZE = 64
RANKS = (4, 15, 32, "full")
METHODS = ("svfit", "loldu")
# how the child differs -> (its environment, its threads, what happens to the weight)
WAYS: dict[str, tuple[dict[str, str], int, str]] = {
    "other BLAS path": ({"MKL_CBWR": "COMPATIBLE", "ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}, 1, ""),
    "2 threads": ({"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}, 2, ""),
    "one ulp": ({}, 1, "ulp"),
    "bf16 copy": ({}, 1, "bf16"),
}  # fmt: skip
REFUSED = -1.0


def weights(size: int = SIZE) -> dict[str, Tensor]:
    """Weights by kind, [size, size] but where the kind says otherwise."""
    g = torch.Generator().manual_seed(0)
    half = torch.randn(size // 2, size // 2, generator=g)
    v = torch.randn(size, generator=g)
    hadamard = torch.ones(1, 1)
    while len(hadamard) < size:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    orthogonal = torch.linalg.qr(torch.randn(size, size, generator=g))[0]
    low = torch.randn(size, 10, generator=g) @ torch.randn(10, size, generator=g) / size**0.5
    scales = torch.ones(size).index_fill(0, torch.arange(size // 4), 3.0)
    return {
        "block-diagonal twins": torch.block_diag(half, half) / size**0.5,
        "repeated rows": torch.randn(size // 2, size, generator=g).repeat_interleave(2, 0) / size**0.5,
        "rank 10": low,
        "Householder": torch.eye(size) - 2 * torch.outer(v, v) / v.square().sum(),
        "orthogonal": orthogonal,
        "identity": torch.eye(size),
        "Hadamard": hadamard / size**0.5,
        "two values": orthogonal * scales,
        "zeros": torch.zeros(size, size),
        "wide orthogonal": orthogonal[: size // 2],
        "tall orthogonal": orthogonal[:, : size // 2],
    }


def model(weight: Tensor) -> nn.Sequential:
    """One linear layer of this weight."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    with torch.no_grad():
        layer.weight.copy_(weight)
    return nn.Sequential(layer)


def disturbed(weight: Tensor, how: str) -> Tensor:
    """The weight off by one ulp at random, or rounded to bf16 and back."""
    if how == "ulp":
        up = torch.rand(weight.shape, generator=torch.Generator().manual_seed(3)) < 0.5
        return torch.nextafter(weight, torch.where(up, torch.inf, -torch.inf)) * (weight != 0)
    return weight.bfloat16().float() if how == "bf16" else weight


def inputs(weight: Tensor) -> Tensor:
    """[128, in] fixed inputs."""
    return torch.randn(128, weight.shape[1], generator=torch.Generator().manual_seed(1))


def saved(weight: Tensor, method: str, r: int | str, folder: Path) -> Tensor:
    """Saves an adapter with random numbers; returns what it adds to the outputs."""
    net = smidgen.adapt(model(weight), method, r=r, target_modules=["0"])
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in net.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=generator))
        smidgen.save(net, folder)
        return net(inputs(weight)) - model(weight)(inputs(weight))


@torch.no_grad()
def error(weight: Tensor, folder: Path, wanted: Tensor) -> float:
    """Relative error of what the adapter in a folder does on a base of this weight; REFUSED where load refuses."""
    base = model(weight)
    x = inputs(weight)
    before = base(x)
    try:
        found = smidgen.load(base, folder)(x) - before
    except BaseLockError:
        return REFUSED
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-6))


def cases(root: Path) -> list[tuple[str, str, str | int, Path]]:
    """(kind, method, r, folder) of every adapter."""
    kinds = weights()
    return [
        (kind, method, r, root / f"{at}-{method}-{r}")
        for at, kind in enumerate(kinds)
        for method in METHODS
        for r in RANKS
    ]


def child(root: Path, how: str) -> None:
    """Prints the errors of all adapters below ``root``, in their order."""
    kinds = torch.load(root / "weights.pt", weights_only=True)
    found = [
        error(disturbed(kinds[kind], how), folder, torch.load(folder / "wanted.pt", weights_only=True))
        for kind, _, _, folder in cases(root)
    ]
    print(json.dumps(found))


def measure() -> dict[str, dict[tuple[str, str, str | int], float]]:
    """Way -> (kind, method, r) -> error."""
    out: dict[str, dict[tuple[str, str, str | int], float]] = {}
    with tempfile.TemporaryDirectory() as name:
        root, kinds = Path(name), weights()
        torch.save(kinds, root / "weights.pt")
        for kind, method, r, folder in cases(root):
            torch.save(saved(kinds[kind], method, r, folder), folder / "wanted.pt")
        for way, (environment, threads, how) in WAYS.items():
            run = f"import torch; torch.set_num_threads({threads}); from benchmarks.degenerate import *; child(Path({name!r}), {how!r})"
            told = subprocess.run(
                [sys.executable, "-W", "ignore", "-c", run],
                capture_output=True,
                text=True,
                check=True,
                env=os.environ | {"SMIDGEN_CACHE": "off"} | environment,
            )
            errors = json.loads(told.stdout.strip().splitlines()[-1])
            out[way] = {case[:3]: e for case, e in zip(cases(root), errors, strict=True)}
    return out


def table(found: dict[str, dict[tuple[str, str, str | int], float]]) -> str:
    """Markdown: a row for each kind and method, the ranks of a way in one cell."""

    def cell(value: float) -> str:
        return "refused" if value == REFUSED else "0" if value == 0 else f"{value:.0e}"

    ranks = ", ".join(map(str, RANKS))
    rows = [f"| weight | method | {' | '.join(f'{way}: r {ranks}' for way in WAYS)} |"]
    rows.append("|" + "---|" * (2 + len(WAYS)))
    for kind in weights():
        for method in METHODS:
            cells = [", ".join(cell(found[way][kind, method, r]) for r in RANKS) for way in WAYS]
            rows.append(f"| {kind} | {method} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    """Writes benchmarks/results/degenerate.json and the table."""
    found = measure()
    figures = {f"{k}_{m}_r{r}_{way}".replace(" ", "_"): e for way, own in found.items() for (k, m, r), e in own.items()}
    cells = list(figures.values())
    figures |= {"cells": len(cells), "refused": cells.count(REFUSED), "largest_error": max(cells)}
    write_result("degenerate", figures, "python -m benchmarks.degenerate")
    between(DOCS, "degenerate", table(found))


if __name__ == "__main__":
    main()
