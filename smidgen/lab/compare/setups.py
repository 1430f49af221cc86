"""From a method of an experiment to the config that ``engine`` adapts by."""

import copy
from collections.abc import Sequence
from typing import Any

import peft

import smidgen
from smidgen.errors import ConfigError, did_you_mean
from smidgen.lab.compare.experiment import FULL, PROBE, Experiment, Method
from smidgen.training import engine
from smidgen.training.fitting import Rates, budgeted

TRANSFORM_SHARE = 0.3  # of the rate, for a transform's numbers; as smidgen.parameter_groups has it
PAIR = "pair"  # any transform with any residual, named in the options
BUDGET = "budget"  # bytes, spent where the first batches have their gradients


def make_setup(
    experiment: Experiment, method: Method, seed: int, model: Any, task: Any, heads: Sequence[str] = ()
) -> engine.Config:
    """A fresh config of ``method``: smidgen's, peft's, or a control's. A budget looks at ``model`` and ``task``.

    Raises:
        ConfigError: an unknown kind or option.
    """
    targets, options = experiment.targets(method), copy.deepcopy(method.options)
    if method.kind == PROBE:
        return engine.LinearProbe()
    if method.kind == FULL:
        return engine.FullFineTuning()
    if method.kind.startswith("peft."):
        return _peft_setup(method, {"target_modules": targets, **options})
    if method.kind == BUDGET:
        return budgeted(model, task, heads, seed=seed, **options)
    return smidgen.config(None if method.kind == PAIR else method.kind, target_modules=targets, seed=seed, **options)


def make_rates(rate: float, head_rate: float) -> Rates:
    """The rate under search is the adapter's; the head has its own with every method."""
    return Rates(rate, TRANSFORM_SHARE * rate, head_rate)


def _peft_setup(method: Method, options: dict[str, Any]) -> peft.PeftConfig:
    known = {name for name in dir(peft) if name.endswith("Config")}
    name = method.kind.removeprefix("peft.")
    if name not in known:
        raise ConfigError(f"{method.name!r}: peft has no {name!r}.{did_you_mean(name, known)}")
    try:
        return getattr(peft, name)(**options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{method.name!r}: peft's {name} refuses its options: {error}") from error
