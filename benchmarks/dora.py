"""Is DoRA one of our scheme's instances? S (W + D) beside peft's DoRA, trained alike from equal starts.

    make bench NAME=dora     (a few CPU seconds)

A layer of width 64 with bias, r 4, alpha 8, AdamW at 1e-2 on a regression with random targets. The error is that of the outputs,
relative to peft's.
"""

import copy
from typing import Any

import peft
import torch
from torch import nn

import smidgen
from benchmarks._harness import write_result

STEPS, WIDTH = 20, 64


def main() -> int:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    theirs: Any = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=["0"])
    )
    ours: Any = smidgen.adapt(base, "dora", r=4, alpha=8, target_modules=["0"])
    own = {name.rpartition(".")[2]: p for name, p in ours.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, value in own.items():
            if name.endswith("_a"):
                value.copy_(theirs.base_model.model[0].lora_A["default"].weight)
    x, wanted = torch.randn(256, WIDTH), torch.randn(256, WIDTH)
    for model in (ours, theirs):
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, 1e-2, weight_decay=0)
        for _ in range(STEPS):
            optimizer.zero_grad()
            (model(x) - wanted).square().mean().backward()
            optimizer.step()
    with torch.no_grad():
        found, other = ours(x), theirs(x)
        error, moved = float((found - other).norm() / other.norm()), float((found - base_of(theirs, x)).norm())
    figures = {"output_error": error, "moved": moved / float(other.norm()), "steps": STEPS, "width": WIDTH}
    print(figures, write_result("dora", figures, "make bench NAME=dora"))
    return 0


def base_of(model: Any, x: torch.Tensor) -> torch.Tensor:
    """The base's outputs."""
    with model.disable_adapter():
        return model(x)  # type: ignore[no-any-return]


if __name__ == "__main__":
    raise SystemExit(main())
