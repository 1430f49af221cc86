"""Every law for every member, pair, named method and variant on every layer kind."""

from __future__ import annotations

import pytest

import smidgen
from smidgen import testing
from smidgen.adapters.checkpoint import packing
from smidgen.adapters.outputs import OUTPUTS
from smidgen.adapters.residuals import RESIDUALS
from smidgen.adapters.transforms import TRANSFORMS
from smidgen.errors import ConfigError

CONFIGS = dict(testing.configs())
# Laws that cost seconds or that torch proves once for a layer kind run on fewer cells.
ONLY_ON = {
    "gradient": ("linear", "conv1d", "conv2d_groups", "experts"),
    "compile": ("linear", "conv2d", "experts"),
    "file again": ("linear", "conv1d", "conv2d_groups"),
    "file damage": ("linear", "rough", "conv1d", "conv2d_groups", "depthwise", "experts_transposed"),
}
# Files in codes are other files, and nothing else: their other laws on one kind.
OF_FILES = ("file", "file again", "file damage", "recast", "count")
ONLY_FOR = {
    "inputs": [
        *TRANSFORMS,
        *RESIDUALS,
        *OUTPUTS,
        "tensor_ring+low_rank",
        "nonneg svfit",
        "full loldu",
        "dora",
        "all three",
    ],
    "compile": [
        *("tlora", "tlora_star", "svfit", "loldu", "lora", "oft", "diagonal", "ring of rank 3 + ring"),
        *("dora", "ia3", "oft_out", "all three"),
    ],
}
# Experts are stacked by one piece of code, whatever the member: single members and what is special on some.
ON_EXPERTS = ["tensor_ring", "rotation", "diagonal", "low_rank", "seeded", "tlora", "full svfit", "loldu with factors"]
ON_EXPERTS += [*OUTPUTS, "dora", "all three"]
ON = {"experts": ON_EXPERTS, "experts_transposed": ["svfit", "rotation+low_rank", "low_rank+magnitude"]}
# What an output transform does at a layer kind it does beside any member, and its files are no others.
ON_ALL = [*OUTPUTS, "dora", "all three"]
ELSEWHERE = [label for label, config in CONFIGS.items() if config.output and label not in ON_ALL]
ELSEWHERE_ON = ("linear", "conv2d_groups", "experts_transposed")
CELLS = [
    (label, kind) for label in CONFIGS for kind in testing.LAYER_KINDS if not testing.refused(CONFIGS[label], kind)
]
RUN = [
    (label, kind)
    for label, kind in CELLS
    if label in ON.get(kind, CONFIGS) and (kind in ELSEWHERE_ON or label not in ELSEWHERE)
]


@pytest.mark.parametrize(
    ("law", "label", "kind"),
    [
        pytest.param(law, label, kind, id=f"{law}-{label}-{kind}".replace(" ", "_"))
        for law in testing.LAWS
        for label, kind in RUN
        if kind in ONLY_ON.get(law, testing.LAYER_KINDS) and label in ONLY_FOR.get(law, CONFIGS)
        if law in OF_FILES or kind == "linear" or CONFIGS[label].store_dtype not in packing.CODES
        if kind not in testing.NOT_ON.get(law, ())
    ],
)
def test_law(law: str, label: str, kind: str) -> None:
    testing.LAWS[law](CONFIGS[label], kind)


def test_only_rotations_of_single_features_are_refused() -> None:
    cells = {(label, kind) for label in CONFIGS for kind in testing.LAYER_KINDS} - set(CELLS)
    assert {kind for _, kind in cells} == {"rough", "depthwise"}
    assert all({"rotation", "output_rotation"} & set(CONFIGS[label].members.values()) for label, _ in cells)
    for label, kind in cells:
        model, _ = testing.base(kind)
        before = testing.snapshot(model)
        with pytest.raises(ConfigError, match="at least 2 features"):
            smidgen.adapt(model, testing.targeted(CONFIGS[label]))
        testing.unchanged(before, model, "a refused adapter")


def test_check_names_the_law_and_the_layer() -> None:
    config = CONFIGS["svfit"]
    assert testing.check(config, ["linear", "conv1d"], ["identity", "merge", "disable"]) == 6
    broken = dict(testing.LAWS)

    def no_law(config: object, kind: str) -> None:
        raise AssertionError("never")

    try:
        testing.LAWS["nothing"] = no_law
        with pytest.raises(AssertionError, match=r"law 'nothing' does not hold for svfit.*'conv2d': never"):
            testing.check(config, ["conv2d"], ["nothing"])
    finally:
        testing.LAWS.clear()
        testing.LAWS.update(broken)
