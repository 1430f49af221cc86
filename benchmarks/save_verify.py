"""Saving and verifying an adapter by the width of its matrices, beside LoRA r 8 and beside a dense T.

    python -m benchmarks.save_verify     (about half a processor minute, one thread)

One square matrix of each width, trained numbers moved by noise; processor seconds of ``smidgen.save`` and of ``smidgen.verify`` on the
model that carries the adapter. ``rows`` is what both do with a transform, W (T - I) by its structure, and ``dense`` the same by T as a
matrix, as it was before.
"""

import tempfile
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import smidgen
from benchmarks._harness import write_result
from smidgen.adapters.member import Transform
from smidgen.adapters.tuner.slot import Slot

WIDTHS = (512, 1024, 2048, 4096)
METHODS = {
    "lora_r8": ("lora", {"r": 8}),
    "tlora_1_2": ("tlora", {}),
    "tlora_2_2": ("tlora(2,2)", {}),
    "oft": ("oft", {}),
}
METHODS |= {"diagonal": ("diagonal", {}), "ia3": ("ia3", {}), "dora_r8": ("dora", {"r": 8})}


class One(nn.Module):
    """One linear layer under a name that targets can hit."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)  # type: ignore[no-any-return]


def seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def measure(method: str, options: dict[str, int], width: int) -> dict[str, float]:
    """Processor seconds of each part for one matrix."""
    torch.manual_seed(0)
    model = smidgen.adapt(One(width), smidgen.config(method, target_modules=["proj"], **options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.01 * torch.randn_like(parameter)
    with tempfile.TemporaryDirectory() as folder:
        smidgen.save(model, folder)  # the first call of anything loads kernels
        found = {"save": seconds(lambda: smidgen.save(model, folder))}
        found["verify"] = seconds(lambda: _on(model, folder))
    slot: Slot = model.proj.smidgen_slots["default"]  # type: ignore[union-attr,index,assignment]
    transform = slot.transform
    if transform is not None:
        with torch.no_grad():
            rows, own = model.proj.base_matrix(), slot.tensors("transform")  # type: ignore[union-attr,operator]
            found["rows"] = seconds(lambda: transform.row_shift(rows, own))
            found["dense"] = seconds(lambda: Transform.row_shift(transform, rows, own))
    return found


def _on(model: nn.Module, folder: str) -> None:
    report = smidgen.verify(model, folder)
    assert report.ok, report


def main() -> None:
    torch.set_num_threads(1)
    measure("lora", {"r": 8}, 64)
    figures: dict[str, float] = {}
    for width in WIDTHS:
        for name, (method, options) in METHODS.items():
            for part, value in measure(method, options, width).items():
                figures[f"w{width}_{name}_{part}_seconds"] = round(value, 4)
            print(width, name, {k: v for k, v in figures.items() if k.startswith(f"w{width}_{name}_")}, flush=True)
    write_result("save_verify", figures, "make bench NAME=save_verify")


if __name__ == "__main__":
    main()
