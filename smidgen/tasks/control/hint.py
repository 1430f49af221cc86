"""The hint encoder: a small convolutional network that brings a control picture to a UNet's first features.

As in ControlNet and OFT's control experiments (Zhang et al. 2023; Qiu et al. 2023) its last layer starts at zero, so
that at the start the model is the base to the bit. It is a submodule ``hint`` of the UNet, trained and saved with the
adapter as any head is, and acts only within ``steering``: there a forward hook adds its features to the output of
``conv_in``; outside, nothing of the UNet is changed.

The encoder is not ControlNet's own (seven 3x3 convolutions without normalisation): with that one, and timesteps drawn
evenly, nothing was steered after 400 steps on the embedded base. This one unshuffles the picture to the latent's size
and normalises; see docs/control.md.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smidgen.errors import AdapterFileError, ConfigError, DataError
from smidgen.tasks.control.conditions import check
from smidgen.training.randomness import derive

FILE = "hint_config.json"
NAME = "hint"
GROUPS = 4  # of its normalisations


@dataclass(frozen=True)
class HintConfig:
    """A hint encoder. ``control`` says what its pictures show, ``factor`` is pixels to a latent, ``channels`` the
    UNet's first width, ``width`` the encoder's own."""

    control: str
    factor: int
    channels: int
    width: int = 64

    def __post_init__(self) -> None:
        check(self.control)
        if min(self.factor, self.channels, self.width) < 1 or self.width % GROUPS:
            raise ConfigError(f"A hint encoder's sizes are at least 1 and its width a multiple of {GROUPS}: {self}.")


class HintEncoder(nn.Sequential):
    """[n, 3, height, width] in 0..1 -> [n, channels, height / factor, width / factor], zero at the start.

    3 factor^2 w + w + 2 (2 w) + (9 w + 1) w + (9 w + 1) channels numbers for width w.
    """

    def __init__(self, config: HintConfig):
        width = config.width
        last = nn.Conv2d(width, config.channels, 3, padding=1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]
        super().__init__(
            nn.PixelUnshuffle(config.factor), nn.Conv2d(3 * config.factor**2, width, 1),
            nn.GroupNorm(GROUPS, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(GROUPS, width), nn.SiLU(), last,
        )  # fmt: skip
        self.factor = config.factor


def config_for(base: Any, control: str, width: int = 64) -> HintConfig:
    """The hint encoder that fits a loaded base.

    Raises:
        ConfigError: its denoiser has no first convolution to steer.
    """
    if not hasattr(base.model, "conv_in"):
        raise ConfigError(
            f"Control steers the first convolution of a UNet; {base.name!r} is of the family {base.family!r}, whose "
            f"{type(base.model).__name__} has none. Take an SD or SDXL base."
        )
    return HintConfig(control, base.factor, int(base.model.config.block_out_channels[0]), width)


def attach(unet: nn.Module, config: HintConfig, seed: int = 0) -> nn.Module:
    """Give ``unet`` a fresh hint encoder as its submodule ``hint``; its start follows from ``seed`` alone."""
    if hasattr(unet, NAME):
        raise ConfigError("This UNet has a hint encoder already; load the base anew for another one.")
    if config.channels != unet.config.block_out_channels[0]:  # type: ignore[union-attr,index]
        raise AdapterFileError(
            f"The hint encoder feeds {config.channels} channels, but this UNet's first features have "
            f"{unet.config.block_out_channels[0]}: it belongs to another base."  # type: ignore[union-attr,index]
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, NAME))
        encoder = HintEncoder(config)
    unet.add_module(NAME, encoder.requires_grad_(False).to(next(unet.parameters()).device))
    return encoder


@contextmanager
def steering(model: nn.Module, pictures: Tensor, scale: float = 1.0) -> Iterator[nn.Module]:
    """Within, ``model`` (a UNet, wrapped or not) follows control ``pictures`` [n, 3, height, width] in 0..1.

    A batch of the UNet is n or, under classifier-free guidance, a multiple of it: then the pictures repeat. Without
    gradients they are encoded once. ``scale`` 0 leaves the control out.
    """
    encoder, conv = _named(model, NAME), _named(model, "conv_in")
    kept: list[Tensor] = []

    def add(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        features = kept[0] if kept else encoder(pictures.to(_weight(encoder)))
        if features.shape[1:] != output.shape[1:] or len(output) % len(features):
            raise DataError(
                f"{len(pictures)} control picture(s) of {tuple(pictures.shape[2:])} pixels do not fit what is drawn: "
                f"their features are {tuple(features.shape)}, the UNet's {tuple(output.shape)}. Both need one size."
            )
        if not kept and not torch.is_grad_enabled():
            kept.append(features)
        return output + scale * features.repeat(len(output) // len(features), 1, 1, 1).to(output.dtype)

    handle = conv.register_forward_hook(add)
    try:
        yield model
    finally:
        handle.remove()


def dump_config(config: HintConfig) -> str:
    """The content of ``hint_config.json``, which stands beside the adapter."""
    return json.dumps(asdict(config), indent=1) + "\n"


def read_config(folder: Path) -> HintConfig | None:
    """The hint encoder's config in an adapter folder, None when the adapter was trained without a control."""
    path = folder / FILE
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text())
        if set(values) != {field.name for field in fields(HintConfig)}:
            raise ValueError(f"it has {sorted(values)}")
        return HintConfig(**values)
    except (OSError, ValueError, TypeError) as error:
        raise AdapterFileError(f"{path} is damaged: {error}") from error


def _named(model: nn.Module, last: str) -> nn.Module:
    """The submodule so called, also inside what accelerate, DDP or torch.compile wrap around a UNet."""
    found = next((module for name, module in model.named_modules() if name.split(".")[-1] == last), None)
    if found is None:
        raise ConfigError(f"This UNet has no {last!r}; attach a hint encoder, or load an adapter that has one.")
    return found


def _weight(encoder: nn.Module) -> Tensor:
    """The first weight in use: under peft the encoder is wrapped, and its trained copy may differ in dtype."""
    return list(encoder.parameters())[-1]
