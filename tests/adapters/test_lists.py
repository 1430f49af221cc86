"""Every name in every list of a config means something, or it is an error with near names."""

from __future__ import annotations

from typing import Any

import pytest
from peft import IA3Config, LoHaConfig, LoraConfig, TaskType, get_peft_model
from torch import Tensor, nn

import smidgen
from smidgen import testing
from smidgen.adapters.tuner.carried import adapted_layers, tuner_layers
from smidgen.errors import ConfigError, TargetError, did_you_mean

from .helpers import Net


class Model(nn.Module):
    """Three layers behind one more name, and a head of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Net(layers=3)
        self.lm_head = nn.Linear(3, 3)
        self.extra = nn.ModuleList([nn.LayerNorm(3)])

    def forward(self, x: Tensor) -> Tensor:
        return self.lm_head(self.extra[0](self.model(x)))  # type: ignore[no-any-return]


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"modules_to_save": ["lm_haed"]}, r"modules_to_save: no module is named 'lm_haed'. Did you mean 'lm_head'"),
    ({"modules_to_save": ["lm_head", "scor"]}, "modules_to_save: no module is named 'scor'"),
    ({"modules_to_save": ["model.haed"]}, r"'model.haed'. Did you mean 'model.head'"),
    ({"exclude_modules": ["q_porj"]}, r"exclude_modules: no module is named 'q_porj'. Did you mean 'q_proj'"),
    ({"exclude_modules": ["layers.7.q_proj"]}, r"'layers.7.q_proj'. Did you mean 'model.layers"),
    ({"exclude_modules": r"model\.layer\..*"}, r"exclude_modules.*regular expression.*matches nothing"),
    ({"exclude_modules": ["model"]}, r"'model' is no target itself.*write the regular expression '\(\.\*"),
    ({"rank_pattern": {"q_prj": 3}}, r"rank_pattern: no target is named 'q_prj'. Did you mean 'q_proj'"),
    ({"rank_pattern": {"lm_head": 3}}, r"rank_pattern: no target is named 'lm_head'.*Targets end in: q_proj, v_proj"),
    ({"rank_pattern": {"q_proj": 3}, "exclude_modules": ["q_proj"]}, "rank_pattern: no target is named 'q_proj'"),
    ({"layers_to_transform": [0, 9]}, "layers_to_transform: no target is in a layer 9; they are in 0 to 2"),
    ({"layers_to_transform": 3}, "no target is in a layer 3"),
    ({"layers_to_transform": [1], "layers_pattern": "layer"}, r"no list of layers is named 'layer'. Did you mean 'layers'"),
    ({"layers_pattern": "layers"}, "goes with layers_to_transform"),
    ({"layers_to_transform": [1], "target_modules": ".*q_proj"}, "not with '.[*]q_proj'"),
    ({"layers_to_transform": [1], "target_modules": "all-linear"}, "not with 'all-linear'"),
    ({"target_modules": ["Q_PROJ"]}, "Did you mean 'q_proj'"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "match"), WRONG, ids=[str(options) for options, _ in WRONG])
def test_a_name_that_means_nothing(options: dict[str, Any], match: str) -> None:
    config = {"target_modules": ["q_proj", "v_proj"], **options}
    for put in (smidgen.adapt, get_peft_model):
        model = Model()
        before = testing.snapshot(model)
        with pytest.raises(TargetError, match=match):
            put(model, smidgen.config("lora", **config))
        testing.unchanged(before, model, f"{options} through {put.__name__}")


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (LoraConfig(target_modules=["q_proj", "v_porj"]), r"target_modules: no module is named 'v_porj'. Did you mean 'v_"),
        (LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_haed"]), r"modules_to_save.*Did you mean 'lm_head'"),
        (LoraConfig(target_modules=["q_proj"], rank_pattern={"q_prj": 2}), r"rank_pattern: no target is named 'q_prj'"),
        (LoraConfig(target_modules=["q_proj"], alpha_pattern={"q_prj": 2}), r"alpha_pattern: no target is named 'q_prj'"),
        (LoraConfig(target_modules=["q_proj"], layers_to_transform=[5]), "no target is in a layer 5"),
        (LoHaConfig(target_modules=["q_proj"], exclude_modules=["v_porj"]), r"exclude_modules.*Did you mean 'v_proj'"),
        (IA3Config(target_modules=["q_prj"], feedforward_modules=[]), r"target_modules.*Did you mean 'q_proj'"),
        (LoraConfig(target_modules=["q_proj"], modules_to_save=["extra"]), "peft refuses its own LoraConfig.*ModuleList"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.peft_type.value,
)  # fmt: skip
def test_a_name_that_means_nothing_in_a_config_of_pefts(config: Any, match: str) -> None:
    model = Model()
    before = testing.snapshot(model)
    with pytest.raises((TargetError, ConfigError), match=match):
        smidgen.adapt(model, config)
    testing.unchanged(before, model, "a refused config")


def test_modules_to_save_that_cannot_be_wrapped() -> None:
    model = Model()
    before = testing.snapshot(model)
    with pytest.raises(ConfigError, match="ModuleList"):
        smidgen.adapt(model, "svfit", target_modules=["q_proj"], modules_to_save=["extra"])
    testing.unchanged(before, model, "a list of layers as a head")


@pytest.mark.parametrize(
    ("options", "layers"),
    [
        ({"exclude_modules": ["norm"]}, 6),
        ({"exclude_modules": ["q_proj"]}, 3),
        ({"exclude_modules": r"model\.layers\.0\..*"}, 4),
        ({"target_modules": "all-linear", "exclude_modules": ["q_proj", "lm_head"]}, 4),
        ({"layers_to_transform": [0, 2]}, 4),
        ({"layers_to_transform": 1, "layers_pattern": "layers"}, 2),
        ({"rank_pattern": {"layers.1.v_proj": 3, "layers.0.q_proj": 2}}, 6),
        ({"modules_to_save": ["lm_head"]}, 6),
    ],
    ids=str,
)
def test_names_that_mean_something(options: dict[str, Any], layers: int) -> None:
    config = smidgen.config("lora", **{"target_modules": ["q_proj", "v_proj"], **options})
    assert len(adapted_layers(smidgen.adapt(Model(), config))) == layers
    assert smidgen.count(Model(), config) == smidgen.trained_numbers(smidgen.adapt(Model(), config))
    own = LoraConfig(**{"r": 8, "target_modules": ["q_proj", "v_proj"], **options})
    if own.target_modules != "all-linear":
        assert len(tuner_layers(smidgen.adapt(Model(), own))) == layers


def test_heads_that_peft_names_by_itself_need_not_be_there() -> None:
    config = smidgen.config("lora", target_modules=["q_proj"], task_type=TaskType.SEQ_CLS)
    config.modules_to_save = ["classifier", "score"]
    assert smidgen.names(smidgen.adapt(Model(), config)) == ["default"]
    config.modules_to_save = ["classifier", "scor"]
    with pytest.raises(TargetError, match="'scor'"):
        smidgen.adapt(Model(), config)


def test_did_you_mean_never_repeats_what_was_typed() -> None:
    assert did_you_mean("norm", ["norm", "head"]) == ""
    assert did_you_mean("q_proj", ["q_proj", "v_proj"]) == " Did you mean 'v_proj'?"
    assert did_you_mean("Q_Proj", ["q_proj"]) == " Did you mean 'q_proj'?"
