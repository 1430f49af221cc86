"""Our rows of peft's own test matrix; imported by its test file in the subprocess that test_peft_matrix.py starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import peft.mapping
import torch

import smidgen
from smidgen.adapters.tuner.config import PEFT_TYPE, SmidgenConfig
from smidgen.adapters.tuner.peft_bridge import SmidgenModel


@dataclass
class OurConfig(SmidgenConfig):
    """A config as peft's tests build it: svfit by default, and away from the identity with init_weights=False."""

    init_weights: bool = True

    def __post_init__(self) -> None:
        if not self.transform and not self.residual and not self.output:
            self.residual, self.r = "spectral", 4
        if self.bias != "none":  # a config that refuses trained biases is, to peft's test, one that has none
            raise TypeError("bias")
        super().__post_init__()

    def to_dict(self) -> dict:
        return {
            name: value for name, value in super().to_dict().items() if name != "init_weights"
        }  # of no file of ours


peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = OurConfig
_create = SmidgenModel._create_and_replace


def _create_perturbed(self, config, adapter_name, target, target_name, parent, **kwargs):  # type: ignore[no-untyped-def]
    _create(self, config, adapter_name, target, target_name, parent, **kwargs)
    if not getattr(config, "init_weights", True):
        slot = getattr(parent, target_name).smidgen_slots[adapter_name]
        with torch.no_grad():
            for p in slot.parameters():
                if not p.is_meta:
                    p += 0.3 * torch.randn_like(p)


SmidgenModel._create_and_replace = _create_perturbed  # type: ignore[method-assign]


def _fields(*method: str, **options: Any) -> dict[str, Any]:
    own = smidgen.config(*method, **options)
    names = ("transform", "residual", "output", "r", "store_factors")
    names += ("transform_options", "residual_options", "output_options")
    return {name: getattr(own, name) for name in names}


_METHODS = {
    "tlora": _fields("tlora(2,2)"),
    "tlora_star": _fields("tlora_star", r=2),
    "svfit": _fields("svfit"),
    "loldu": _fields("loldu"),
    "lora": _fields("lora", r=4, alpha=8.0),
    "oft": _fields("oft", block_size=5),
    "dora": _fields("dora", r=4),
    "ia3": _fields("ia3"),
    "oft_out": _fields("oft_out", block_size=5),
    "rotation+spectral": _fields(transform="rotation", residual="spectral", block_size=5),
    "diagonal+tensor_ring": _fields(transform="diagonal", residual="tensor_ring", r=2),
}
_TARGETS: list[tuple[str, dict[str, Any]]] = [
    ("MLP", {"target_modules": "lin0"}),
    ("MLP", {"target_modules": ["lin0"]}),
    ("MLP", {"target_modules": ["lin0", "lin1"]}),
    ("MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("EmbConv1D", {"target_modules": ["conv1d"]}),
    ("EmbConv1D", {"target_modules": ["lin0"], "modules_to_save": ["conv1d"]}),
    ("Conv2d", {"target_modules": ["conv2d"]}),
    ("Conv2d", {"target_modules": ["conv2d", "lin0"]}),
    ("Conv2d2", {"target_modules": ["conv2d", "lin0"]}),
    ("Conv2dGroups", {"target_modules": ["conv2d"]}),
]
_MODELS_OF_MIXED = {"MLP", "Conv2d"}

TEST_CASES = [
    (f"{model} {method} {i}", model, OurConfig, fields | targets)
    for method, fields in _METHODS.items()
    for i, (model, targets) in enumerate(_TARGETS)
    if "+" not in method or model in _MODELS_OF_MIXED
    if not (method == "oft_out" and targets["target_modules"] == ["conv1d"])  # one output feature cannot be rotated
]
MULTIPLE_ACTIVE = [
    (
        f"{method} {kind}",
        "smidgen",
        OurConfig,
        fields | {"target_modules": ["lin0"], "init_weights": False},
        other | {"target_modules": second, "init_weights": False},
    )
    for (method, fields), other in zip(_METHODS.items(), [*[*_METHODS.values()][1:], _METHODS["tlora"]], strict=True)
    for kind, second, other in (
        ("same", ["lin0"], fields),
        ("different", ["lin1"], fields),
        ("mixed methods", ["lin0"], other),
    )
]
