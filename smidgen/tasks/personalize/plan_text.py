"""A plan as text, as JSON, and as the command that would fit."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from smidgen.errors import ConfigError
from smidgen.tasks.cards import table
from smidgen.tasks.personalize.plan import ASSUMED, Plan
from smidgen.tasks.personalize.settings import PersonalizeConfig
from smidgen.training.settings import flat

_UNITS = {"": 1e9, "GB": 1e9, "G": 1e9, "GIB": 2.0**30, "MB": 1e6, "M": 1e6, "MIB": 2.0**20}


def parse_memory(text: str) -> float:
    """Bytes of "12GB", "24 GiB", "800MB" or "12" (GB).

    Raises:
        ConfigError: it says no amount of memory.

    Example:
        >>> parse_memory("12GB"), parse_memory("1.5 GiB")
        (12000000000.0, 1610612736.0)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    found = float(match[1]) * _UNITS.get(match[2].upper(), 0.0) if match else 0.0
    if not 1e6 <= found <= 1e15:
        raise ConfigError(f"--memory is an amount such as 12GB, 24GiB or 800MB, not {text!r}.")
    return found


Preset = tuple[int, PersonalizeConfig] | None


def to_markdown(
    plan: Plan, memory: float | None = None, fits: PersonalizeConfig | None = None, preset: Preset = None
) -> str:
    """The plan, and with ``memory`` whether it fits and the settings that would (``fits``: None where none do), and the base's
    ``preset`` for so many GB."""
    parts = [
        f"### {plan.config.adapter.method} on {plan.shapes.title}, {plan.resolution} pixels, batches of "
        f"{plan.config.data.train_batch_size}",
        f"{plan.trained:,} parameters are trained, beside {plan.parameters:,} of the denoiser; {_covered(plan)}.",
        "Memory, GB:",
        table(["while the run", "by part", "in all"], [_phase(name, part) for name, part in _phases(plan).items()]),
        _total(plan),
        "Disk, GB: " + "; ".join(f"{name} {_giga(value)}" for name, value in plan.disk.items()) + ".",
        _time(plan),
    ]
    if memory is not None:
        parts.append(_fits(plan, memory, fits))
    if preset is not None:
        parts.append(f"The preset of {plan.shapes.title} for {preset[0]} GB:\n\n    {command(preset[1])}")
    parts.append("Assumed: " + "; ".join(ASSUMED) + ".")
    return "\n\n".join(parts)


def to_json(
    plan: Plan, memory: float | None = None, fits: PersonalizeConfig | None = None, preset: Preset = None
) -> str:
    """Everything of the plan."""
    known: dict[str, Any] = {
        "base": plan.config.base, "method": plan.config.adapter.method, "resolution": plan.resolution,
        "trained_parameters": plan.trained, "denoiser_parameters": plan.parameters, "blocks": _blocks(plan),
        "operations": {"forward": plan.step.forward, "training": plan.step.training}, "memory": _phases(plan),
        "process": plan.process, "peak": plan.peak, "on_a_card": plan.card, "disk": plan.disk,
        "seconds_measured": plan.seconds, "steps": plan.steps, "seconds_counted": plan.counted_seconds(), "assumed": ASSUMED,
    }  # fmt: skip
    if memory is not None:
        known |= {"asked_memory": memory, "fits": plan.peak <= memory}
        known |= {"command": None if fits is None else command(fits)}
        known |= {"preset": None if preset is None else {"GB": preset[0], "command": command(preset[1])}}
    return json.dumps(known, indent=1)


def command(config: PersonalizeConfig) -> str:
    """The ``smidgen personalize`` of a config: what differs from the defaults."""
    usual = flat(PersonalizeConfig())
    words = ["smidgen", "personalize"]
    for name, value in flat(config).items():
        flag = "--" + name.rpartition(".")[2].replace("_", "-")
        if value == usual[name]:
            continue
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif value is None:
            words += [flag, "None"]
        else:
            words += [flag, *map(str, value if isinstance(value, list | tuple) else [value])]
    return shlex.join(words)


def _phases(plan: Plan) -> Mapping[str, dict[str, float]]:
    return {"encodes": plan.encoding, "trains": plan.training, "draws": plan.drawing}


def _phase(name: str, part: Mapping[str, float]) -> list[str]:
    return [name, "; ".join(f"{what} {_giga(value)}" for what, value in part.items()), _giga(sum(part.values()))]


def _giga(value: float) -> str:
    return f"{value / 1e9:,.2f}" if value >= 1e8 else f"{value / 1e9:.4f}"


def _blocks(plan: Plan) -> dict[str, list[int]]:
    return {stack.name: [stack.touched, stack.blocks] for stack in plan.covered.stacks}


def _covered(plan: Plan) -> str:
    stacks = ", ".join(f"{touched} of {there} blocks of {name}" for name, (touched, there) in _blocks(plan).items())
    found = plan.covered
    return f"the adapter is on {found.layers} of {found.there} layers ({found.share:.0%} of the parameters): {stacks}"


def _total(plan: Plan) -> str:
    if plan.card:
        return f"**Peak {_giga(plan.peak)} GB of a card**, counted."
    if plan.process is None:
        return f"**Peak {_giga(plan.peak)} GB** besides the program itself, counted."
    return f"**Peak {_giga(plan.peak)} GB** of the process, of which {_giga(plan.process)} are the program itself (measured)."


def _time(plan: Plan) -> str:
    steps = plan.steps
    if plan.seconds is not None:
        whole = plan.seconds * steps
        return f"{plan.seconds:.3g} seconds a step on this machine when it is idle, measured; {whole:.0f} for {steps} steps, without drawing."
    flops = (plan.step.forward + plan.step.training) / 1e12 * plan.config.train.gradient_accumulation_steps
    times = "; ".join(f"{name} {value:.3g}" for name, value in plan.counted_seconds().items())
    return f"{flops:,.3g} TFLOP a step, counted. Seconds a step if a card reached the share assumed: {times}. Not measured."


def _fits(plan: Plan, memory: float, fits: PersonalizeConfig | None) -> str:
    asked = f"{memory / 1e9:g} GB"
    if fits is None:
        return f"Nothing here fits {asked}: not even one image of half the size in a batch with the base in 4 bits."
    said = f"It fits {asked}:" if fits == plan.config else f"It does not fit {asked}. This would:"
    return f"{said}\n\n    {command(fits)}"


def summary(config: PersonalizeConfig) -> str:
    """What a config chose of memory, in a cell of a table."""
    words = [config.quantize or config.train.mixed_precision.replace("no", "fp32")]
    words += ["checkpointing"] if config.gradient_checkpointing else []
    words += [f"batch {config.data.train_batch_size}"]
    words += [f"{config.data.resolution} px"] if config.data.resolution else []
    return ", ".join(words)


def facts(config: PersonalizeConfig) -> dict[str, Any]:
    """The settings that decide memory."""
    data = asdict(config.data)
    return {
        "quantize": config.quantize, "mixed_precision": config.train.mixed_precision,
        "gradient_checkpointing": config.gradient_checkpointing, "train_batch_size": data["train_batch_size"],
        "resolution": data["resolution"],
    }  # fmt: skip
