"""What the laws run on: tiny layers of every kind, every member and pair, and one table of tolerances."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

import smidgen
from smidgen.adapters.methods import METHODS
from smidgen.adapters.outputs import OUTPUTS
from smidgen.adapters.residuals import RESIDUALS
from smidgen.adapters.transforms import TRANSFORMS
from smidgen.adapters.tuner.building import make_slot
from smidgen.adapters.tuner.config import SmidgenConfig
from smidgen.adapters.tuner.experts import ExpertStack
from smidgen.errors import ConfigError

# Largest difference allowed, relative to the largest number of the reference, by dtype of the computation or of the file.
TOLERANCES: dict[torch.dtype | str, float] = {
    torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 6e-3,
    "float32": 2e-5, "float16": 6e-3, "int8": 2e-2, "int4": 0.3,
}  # fmt: skip


class LinearSubclass(nn.Linear):
    """A layer that is a Linear by inheritance only."""


class Probe(nn.Module):
    """A model of one target, ``layer``, and one head that is never adapted."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.head = nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x))


class Routed(nn.Module):
    """A model whose target, ``layer``, is fused experts [experts, out, in], or [experts, in, out]: token i goes to expert
    i modulo their number."""

    def __init__(self, experts: int, rows: int, cols: int, is_transposed: bool = False) -> None:
        super().__init__()
        shape = (experts, cols, rows) if is_transposed else (experts, rows, cols)
        self.is_transposed = is_transposed
        self.layer = nn.Parameter(torch.randn(shape) * cols**-0.5)
        self.head = nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        weight = self.layer.mT if self.is_transposed else self.layer
        tokens = x.flatten(0, -2)
        each = [torch.nn.functional.linear(t, weight[i % len(weight)]) for i, t in enumerate(tokens)]
        return self.head(torch.stack(each).unflatten(0, x.shape[:-1]))


def _conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(18, 12)
    nn.init.normal_(layer.bias)
    return layer


# name -> (layer, or a model whose ``layer`` is no module, shape of its input)
LAYER_KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(12, 8), (3, 2, 12)),
    "flat": (lambda: nn.Linear(12, 8, bias=False), (3, 12)),
    "subclass": (lambda: LinearSubclass(8, 12), (3, 2, 8)),
    "wide": (lambda: nn.Linear(24, 4), (3, 2, 24)),
    "tall": (lambda: nn.Linear(4, 24), (3, 2, 4)),
    "rough": (lambda: nn.Linear(37, 11), (3, 2, 37)),
    "conv1d": (_conv1d, (3, 2, 12)),
    "conv2d": (lambda: nn.Conv2d(6, 8, 3, stride=2, padding=1), (3, 6, 5, 5)),
    "conv2d_dilated": (lambda: nn.Conv2d(4, 6, 3, padding=2, dilation=2, padding_mode="reflect"), (3, 4, 6, 6)),
    "conv2d_groups": (lambda: nn.Conv2d(8, 6, 3, padding=1, groups=2), (3, 8, 4, 4)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, padding="same", groups=6), (3, 6, 4, 4)),
    "pointwise": (lambda: nn.Conv2d(6, 8, 1), (3, 6, 3, 3)),
    "experts": (lambda: Routed(3, 8, 12), (3, 2, 12)),
    "experts_transposed": (lambda: Routed(2, 12, 8, is_transposed=True), (3, 2, 8)),
}

# Options that make a member interesting at these sizes; a newcomer's own defaults serve otherwise.
_SMALL: dict[str, dict[str, Any]] = {
    "rotation": {"block_size": 4},
    "output_rotation": {"block_size": 4},
    "low_rank": {"r": 3, "alpha": 2.0},
    "spectral": {"r": 3},
    "triangular": {"r": 3},
    "seeded": {"r": 40},
}
_VARIANTS: dict[str, dict[str, Any]] = {
    "ring of rank 2": {"transform": "tensor_ring", "transform_rank": 2},
    "ring of rank 2, paper": {"transform": "tensor_ring", "transform_rank": 2, "init": "paper"},
    "ring of rank 3 + ring": {"method": "tlora(3,2)"},
    "full svfit": {"method": "svfit", "r": "full"},
    "relative svfit": {"method": "svfit", "r": 3, "relative": True, "alpha": 2.0},
    "nonneg svfit": {"method": "svfit", "r": 3, "nonneg": True},
    "energy svfit": {"method": "svfit", "r": "energy:0.9"},
    "svfit with factors": {"method": "svfit", "r": 3, "store_factors": True},
    "svfit in halves": {"method": "svfit", "r": 3, "store_dtype": "float16"},
    "svfit in int8": {"method": "svfit", "r": 3, "store_dtype": "int8"},
    "svfit in int4": {"method": "svfit", "r": 3, "store_dtype": "int4"},
    "svfit with factors in int4": {"method": "svfit", "r": 3, "store_factors": True, "store_dtype": "int4"},
    "loldu in int4": {"method": "loldu", "r": 3, "store_dtype": "int4"},
    "lora in int4": {"method": "lora", "r": 3, "store_dtype": "int4"},
    "oft in int4": {"method": "oft", "block_size": 4, "store_dtype": "int4"},
    "tlora in int8": {"method": "tlora(2,1)", "store_dtype": "int8"},
    "raw loldu": {"method": "loldu", "r": 3, "atoms": "raw"},
    "full loldu": {"method": "loldu", "r": "full"},
    "loldu with factors": {"method": "loldu", "r": 3, "store_factors": True},
    "dora, gradient of the norm": {"method": "dora", "r": 3, "alpha": 2.0, "detach": False},
    "dora in int4": {"method": "dora", "r": 3, "store_dtype": "int4"},
    "ia3 in int4": {"method": "ia3", "store_dtype": "int4"},
    "svfit with factors + magnitude": {"method": "spectral+magnitude", "r": 3, "store_factors": True},
    "all three": {"method": "rotation+low_rank+scale", "r": 3, "block_size": 4},
    "rings + magnitude": {"method": "tensor_ring+tensor_ring+magnitude", "transform_rank": 2},
    "nonneg svfit + scale": {"method": "spectral+scale", "r": 3, "nonneg": True},
    "rslora": {"method": "lora", "r": 3, "alpha": 4.0, "scaling": "rslora"},
}


def configs(variants: bool = True) -> Iterator[tuple[str, SmidgenConfig]]:
    """(label, config) of every single member, pair and named method and, if wanted, of options worth their test."""
    sides = {"transform": TRANSFORMS, "residual": RESIDUALS, "output": OUTPUTS}
    singles: list[dict[str, Any]] = [{side: name} for side, table in sides.items() for name in table]
    pairs: list[dict[str, Any]] = [a | b for a in singles for b in singles if [*sides].index(*a) < [*sides].index(*b)]
    for pair in singles + pairs:
        options = {k: v for name in pair.values() for k, v in _SMALL.get(name, {}).items()}
        yield "+".join(pair.values()), smidgen.config(**pair, **options)
    for name in METHODS:
        yield name, smidgen.config(name)
    for label, options in _VARIANTS.items() if variants else ():
        yield label, smidgen.config(**options)


def base(kind: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    """A base model of one layer kind and an input for it, the same on every call."""
    make, shape = LAYER_KINDS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(crc32(kind.encode()))
        made = make()
        return (made if isinstance(made, Routed) else Probe(made)).to(dtype), torch.randn(shape).to(dtype)


def target_of(model: nn.Module) -> nn.Module:
    """The target of :func:`base` as a layer, adapted or not."""
    layer: Any = model.layer
    return ExpertStack(layer, model.is_transposed) if isinstance(layer, nn.Parameter) else layer  # type: ignore[arg-type]


def targeted(config: SmidgenConfig, **changes: Any) -> SmidgenConfig:
    """The config aimed at the target of :func:`base`."""
    own = copy.deepcopy(config)
    for name, value in {"target_modules": {"layer"}, **changes}.items():
        setattr(own, name, value)
    return own


def perturb(model: nn.Module, seed: int = 1, size: float = 0.1, adapter_name: str | None = None) -> nn.Module:
    """Moves every trained number of a model's adapters away from its start, as training would."""
    for name, p in model.named_parameters():
        if ".smidgen_slots." in name and (adapter_name is None or f".smidgen_slots.{adapter_name}." in name):
            tensor = name.partition(".smidgen_slots.")[2].partition(".")[2]
            noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(crc32(f"{seed}/{tensor}".encode())))
            with torch.no_grad():
                p += size * noise.to(p)
    return model


def adapted(
    config: SmidgenConfig, kind: str, dtype: torch.dtype = torch.float32, seed: int = 1, name: str = "default"
) -> tuple[nn.Module, Tensor]:
    """A base model with a perturbed adapter and an input; in float64 the factors are those of the float32 base."""
    wide = dtype == torch.float64
    model, x = base(kind, torch.float32 if wide else dtype)
    smidgen.adapt(model, targeted(config), adapter_name=name)
    perturb(model, seed)
    return (model.double(), x.double()) if wide else (model, x)


def refused(config: SmidgenConfig, kind: str) -> bool:
    """Whether a member has no meaning on a layer kind and says so (a rotation of one feature, say)."""
    try:
        make_slot(_without_energy(config), target_of(base(kind)[0]), "layer")
    except ConfigError:
        return True
    return False


def _without_energy(config: SmidgenConfig) -> SmidgenConfig:
    energy = isinstance(config.r, str) and config.r.startswith("energy:")
    return targeted(config, r="full") if energy else config


def close(
    found: Tensor, wanted: Tensor, what: str, dtype: torch.dtype | str | None = None, factor: float = 1.0
) -> None:
    """Equality within the table of tolerances; ``dtype`` is a number format of the computation, or of a file (``store_dtype``).

    Raises:
        AssertionError: with the relative difference found and allowed.
    """
    assert found.shape == wanted.shape, f"{what}: shape {tuple(found.shape)}, not {tuple(wanted.shape)}"
    allowed = factor * TOLERANCES[dtype or found.dtype]
    if not wanted.numel():
        return
    size = max(float(wanted.detach().abs().max()), 1e-12)
    off = float((found.detach().to(torch.float64) - wanted.detach().to(torch.float64)).abs().max()) / size
    assert off <= allowed, f"{what}: off by {off:.2e} of the largest number, {allowed:.0e} allowed"


def same(found: Tensor, wanted: Tensor, what: str) -> None:
    """Equality bit for bit.

    Raises:
        AssertionError: with the largest difference.
    """
    if not torch.equal(found, wanted):
        off = float((found.detach().double() - wanted.detach().double()).abs().max())
        raise AssertionError(f"{what}: not the same bits, largest difference {off:.2e}")


def differs(found: Tensor, other: Tensor, what: str) -> None:
    """Guard against laws that hold because nothing happens.

    Raises:
        AssertionError: the two are nearly the same.
    """
    off = float((found.detach().double() - other.detach().double()).abs().max())
    assert off > 1e-4 * float(other.detach().abs().max()), f"{what}: no effect (largest difference {off:.1e})"


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All that must be as before when an operation is refused: classes, bits, flags, hooks and peft's marks."""
    state: dict[str, Any] = {}
    for name, module in model.named_modules():
        hooks = (*module._forward_pre_hooks, *module._forward_hooks)
        state[f"module {name}"] = (type(module), module.training, hooks)
        for slots in (module._parameters, module._buffers):
            for key, t in slots.items():
                if t is not None:
                    bits = t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
                    state[f"tensor {name}.{key}"] = (type(t), t.dtype, tuple(t.shape), t.requires_grad, bits)
        if isinstance(module.__dict__.get("scaling"), dict):  # attention calls a number so
            state[f"strengths {name}"] = dict(module.scaling)
            state[f"active {name}"] = (tuple(module.active_adapters), module.disable_adapters)
    state["adapters"] = tuple(getattr(model, "peft_config", None) or ())
    state["mark"] = getattr(model, "_hf_peft_config_loaded", False)
    return state


def unchanged(before: dict[str, Any], model: nn.Module, what: str) -> None:
    """A model against an earlier :func:`snapshot`.

    Raises:
        AssertionError: naming what changed.
    """
    after = snapshot(model)
    changed = [k for k in (before | after) if before.get(k) != after.get(k)]
    assert not changed, f"{what}: the model was changed: {changed[:4]}"
