"""Config files: round trip, and every unknown key or wrong type named."""

from dataclasses import replace
from pathlib import Path

import pytest

from smidgen.adapters.methods import Rates, learning_rates
from smidgen.errors import ConfigError
from smidgen.tasks.personalize.settings import PEFT_LORA, PRESETS, Adapter, Data, PersonalizeConfig, Show, rates
from smidgen.training import settings
from smidgen.training.loop import LoopConfig


def write(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_yaml(tmp_path, name):
    text = settings.dump_yaml(PRESETS[name])
    assert settings.load_yaml(PersonalizeConfig, write(tmp_path, text)) == PRESETS[name]


def test_values_take_their_types(tmp_path):
    path = write(
        tmp_path,
        "data: {folder: me}\nadapter: {method: svfit, rank: 8, learning_rate: 1e-4, target_modules: [to_q]}\n"
        "train: {max_grad_norm: 1}\nshow: {compare_lora: no, validation_prompt: [a, b]}\n",
    )
    expected = PersonalizeConfig(
        data=Data(Path("me")),
        adapter=Adapter("svfit", rank=8, learning_rate=1e-4, target_modules=("to_q",)),
        train=LoopConfig(max_grad_norm=1.0),
        show=Show(compare_lora=False, validation_prompt=("a", "b")),
    )
    assert settings.load_yaml(PersonalizeConfig, path) == expected


@pytest.mark.parametrize(
    "text, message",
    [
        ("trian: {seed: 1}", "Unknown key 'trian'.*Did you mean 'train'"),
        ("train: {sead: 1}", r"Unknown key 'train\.sead'.*Did you mean 'seed'"),
        ("learning_rate: 1", r"belongs under 'adapter\.learning_rate'"),
        ("adapter: {method: svift}", "Unknown method 'svift'.*Did you mean 'svfit'"),
        ("train: {seed: yes}", r"train\.seed must be int, not True"),
        ("train: 3", "must be a mapping"),
        ("train: {max_train_steps: 0}", "max_train_steps must be at least 1"),
        ("a: [", "is not YAML"),
    ],
)
def test_mistakes_are_named(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        settings.load_yaml(PersonalizeConfig, write(tmp_path, text))


def test_a_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        settings.load_yaml(PersonalizeConfig, tmp_path / "none.yaml")


def test_flat_names_every_leaf():
    flat = settings.flat(PersonalizeConfig())
    assert flat["train.seed"] == 0 and flat["base"] == "embedded" and "train" not in flat


def test_learning_rates_come_from_the_method_or_the_flags():
    config = PersonalizeConfig(adapter=Adapter("tlora"))
    usual = learning_rates("tlora", "picture_embedded")
    assert rates(config, "tlora") == usual
    assert rates(replace(config, base="some/base"), "tlora") == learning_rates("tlora", "picture")
    faster = replace(config, adapter=Adapter("tlora", learning_rate=2 * usual.residual))
    assert rates(faster, "tlora").transform == pytest.approx(2 * usual.transform)
    assert rates(faster, PEFT_LORA) == learning_rates("lora", "picture_embedded")
    both = replace(config, adapter=Adapter("tlora", learning_rate=0.1, transform_learning_rate=0.05))
    assert rates(both, "tlora") == Rates(0.1, 0.05)
