"""A row of group training counted on the meta device: the real UNet, adapter and loss with real shapes, and no numbers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

import smidgen
from smidgen.adapters.bank import Bank
from smidgen.bases.families import FAMILIES
from smidgen.bases.protocol import ImageBase, Prompts
from smidgen.tasks.diffusion.task import Encoded, PersonalizeTask
from smidgen.training.cost import Cost, checkpointed, cost

TOKENS = 77  # of an encoded caption


def group_step(
    family: str,
    unet: nn.Module,
    config: smidgen.SmidgenConfig,
    size: int,
    checkpointing: bool,
    precision: torch.dtype,
) -> Cost:
    """One row of group training or of the end-to-end stage: one latent of ``size`` x ``size`` through ``unet`` of a family (on the meta
    device, without an adapter) with an adapter of a bank, and back to the adapter. Rows of a batch cost the same each.
    """
    nn.Module.to(unet, precision).requires_grad_(False).train()  # diffusers would speak of layers kept in fp32
    unet.disable_gradient_checkpointing()  # type: ignore[operator]
    if checkpointing:
        unet.enable_gradient_checkpointing(checkpointed(precision))  # type: ignore[operator]
    from diffusers import DDPMScheduler

    adapted = smidgen.adapt(unet, config, "counted")
    try:
        bank = Bank(adapted, config, ["one"])
        bank.start()
        for parameter in bank.parameters():
            parameter.requires_grad_(True)
        base = FAMILIES[family].cls(
            "counted", SimpleNamespace(unet=unet, scheduler=DDPMScheduler(), vae_scale_factor=8)
        )
        batch = _batch(base, size, precision)
        task = PersonalizeTask(Encoded(torch.empty(1), torch.empty(1), batch["prompts"], ()), base, batch_size=1)
        with bank.rows(["one"]):
            return cost(lambda: task.errors(adapted, batch).sum(), precision=precision)
    finally:
        bank.remove()
        smidgen.adapters.api.remove(unet, "counted")


def numbers(unet: nn.Module, config: smidgen.SmidgenConfig) -> int:
    """Numbers of one adapter: the size of a zoo's row."""
    return smidgen.count(unet, config)


def _batch(base: ImageBase, size: int, precision: torch.dtype) -> dict[str, Any]:
    latents = torch.empty(1, base.model.config.in_channels, size, size, device="meta")
    shapes = base.prompt_shapes(base.model, TOKENS)
    prompts = Prompts({n: torch.empty(1, *shape, device="meta", dtype=precision) for n, shape in shapes.items()})
    level, weight = torch.zeros(1, device="meta"), torch.ones(1, device="meta")
    return {"latents": latents, "noise": latents, "prompts": prompts, "levels": level, "weights": weight}
