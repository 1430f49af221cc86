"""Methods: the table of learning rates, and that each method and pair reaches every command's settings with a rate."""

from dataclasses import replace

import pytest

import smidgen
from smidgen.adapters.methods import KINDS, METHODS, OTHERS, Rates, learning_rates, member_rates
from smidgen.adapters.residuals import RESIDUALS
from smidgen.adapters.transforms import TRANSFORMS
from smidgen.difflora.zoo import settings as zoo
from smidgen.errors import ConfigError
from smidgen.lab.compare.experiment import Method
from smidgen.lab.compare.setups import make_setup
from smidgen.tasks.control import settings as control_settings
from smidgen.tasks.finetune import settings as finetune_settings
from smidgen.tasks.personalize import settings as personalize_settings

BASES = ("embedded", "somebody/base")
FAMILIES = ("encoder", "vision", "decoder")
PAIRS = [f"{transform}+{residual}" for transform in TRANSFORMS for residual in RESIDUALS]

# What was in force before the table: encoder, vision, decoder, picture, picture_embedded, control_embedded.
KNOWN = {
    "tlora": [(2e-2, 6e-3), (2e-2, 6e-3), (1e-2, 3e-3), (2e-4, 1e-4), (4e-2, 1.2e-2), (3e-2, 9e-3)],
    "tlora_star": [(5e-3, 1.5e-3), (5e-3, 1.5e-3), (2e-3, 6e-4), (2e-4, 5e-5), (1e-2, 5e-3), (1e-2, 3e-3)],
    "svfit": [(1e-1,) * 2, (3e-2,) * 2, (5e-2,) * 2, (5e-2,) * 2, (1.5e-1,) * 2, (2e-1,) * 2],
    "loldu": [(1e-1,) * 2, (3e-2,) * 2, (5e-2,) * 2, (5e-3,) * 2, (2e-1,) * 2, (2e-1,) * 2],
    "lora": [(2e-3,) * 2, (2e-3,) * 2, (1e-3,) * 2, (1e-4,) * 2, (1e-2,) * 2, (1e-2,) * 2],
    "oft": [(2e-3,) * 2, (2e-3,) * 2, (1e-3,) * 2, (1e-4,) * 2, (5e-3,) * 2, (3e-3,) * 2],
    "peft:lora": [(2e-3,) * 2, (2e-3,) * 2, (1e-3,) * 2, (1e-4,) * 2, (1e-2,) * 2, (1e-2,) * 2],
    "seeded": [(1e-1,) * 2, (3e-2,) * 2, (5e-2,) * 2],
    "full": [(5e-5,) * 2, (5e-5,) * 2, (2e-5,) * 2],
}


@pytest.mark.parametrize("method", KNOWN)
def test_the_rates_of_the_present_methods_are_what_they_were(method):
    found = [learning_rates(method, kind) for kind, _ in zip(KINDS, KNOWN[method], strict=False)]
    assert found == [Rates(*pair) for pair in KNOWN[method]]  # to the bit


def test_every_command_takes_its_own_kind():
    made = finetune_settings.Adapter("tlora")
    assert [finetune_settings.rates(made, family).residual for family in FAMILIES] == [2e-2, 2e-2, 1e-2]
    personal = personalize_settings.PersonalizeConfig()
    assert [personalize_settings.rates(replace(personal, base=b), "tlora").residual for b in BASES] == [4e-2, 2e-4]
    control = control_settings.ControlConfig(adapter=control_settings.Adapter("tlora"))
    assert [control_settings.rates(replace(control, base=b)).transform for b in BASES] == [9e-3, 1e-4]


@pytest.mark.parametrize("method", [*METHODS, *PAIRS, "diagonal"])
def test_every_method_and_pair_reaches_every_command(method):
    reach_every_command(method)


def reach_every_command(method):
    """Settings of every command with nothing but the method's name: a config is built and has a rate."""
    wanted = smidgen.config(method)
    members = (wanted.transform, wanted.residual)
    for base in BASES:
        own = personalize_settings.Adapter(method)
        found = [personalize_settings.rates(personalize_settings.PersonalizeConfig(adapter=own, base=base), method)]
        made = zoo.ZooConfig(adapter=own, base=base)
        config = zoo.adapter_config(made)
        assert (config.transform, config.residual) == members
        found.append(zoo.rates(made))
        control = control_settings.Adapter(method)
        found.append(control_settings.rates(control_settings.ControlConfig(adapter=control, base=base)))
        assert all(0 < rate.residual < 1 and 0 < rate.transform < 1 for rate in found)
    adapter = finetune_settings.Adapter(method)
    for family in FAMILIES:
        rate = finetune_settings.rates(adapter, family)
        assert 0 < rate.residual < 1 and 0 < rate.transform < 1
    for one in (control, adapter):
        config = finetune_settings.setup(one, ["layer"], seed=0)
        assert (config.transform, config.residual) == members
    experiment = _Experiment()
    assert make_setup(experiment, Method("row", method, rates=(1e-2,)), 0, None, None).residual == members[1]


class _Experiment:
    def targets(self, method):
        return ["layer"]


def test_a_pair_takes_each_rate_from_the_method_of_the_member():
    assert learning_rates("rotation+spectral", "encoder") == Rates(1e-1, 2e-3)
    assert learning_rates("svfit", "encoder", transform="rotation") == Rates(1e-1, 2e-3)
    assert learning_rates("diagonal+low_rank", "decoder") == Rates(1e-3, 5e-2)  # diagonals run like svfit
    assert learning_rates("tensor_ring+low_rank", "picture") == learning_rates("tlora_star", "picture")
    assert member_rates("rotation", None, "picture_embedded") == learning_rates("oft", "picture_embedded")


def test_one_rate_is_scaled_to_the_other_kinds_as_its_family_is(monkeypatch):
    own = replace(METHODS["lora"], name="mine", transform="rotation", rates={"decoder": Rates(4e-3, 2e-3)})
    monkeypatch.setitem(METHODS, "mine", own)
    found = learning_rates("mine", "encoder")
    assert (found.residual, found.transform) == pytest.approx((8e-3, 4e-3))  # lora: twice as much as on decoders
    assert learning_rates("mine", "decoder") == Rates(4e-3, 2e-3)


def test_a_pair_is_the_same_config_however_it_is_spelled():
    spelled = smidgen.config("Rotation + low-rank", r=2)
    assert spelled == smidgen.config(transform="rotation", residual="low_rank", r=2)
    assert spelled.method is None and spelled.label() == "rotation+low_rank r=2"


@pytest.mark.parametrize("method, message", [
    ("svift", "Unknown method 'svift'.*'svfit'.*rotation[+]low_rank"),
    ("rotatoin+low_rank", "Unknown transform 'rotatoin'.*Did you mean 'rotation'"),
    ("rotation+", "Unknown residual ''"),
])  # fmt: skip
def test_what_is_no_method_is_named(method, message):
    for asked in (lambda: learning_rates(method, "encoder"), lambda: personalize_settings.Adapter(method)):
        with pytest.raises(ConfigError, match=message):
            asked()


def test_full_fine_tuning_is_not_for_image_generators():
    assert set(OTHERS["full"]) == set(FAMILIES)
    with pytest.raises(ConfigError, match="no learning rate for 'full' in a picture task"):
        learning_rates("full", "picture")
