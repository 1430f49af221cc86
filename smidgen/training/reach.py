"""Does the loss reach every layer that is trained? Said in the first steps, before a long run.

A layer is an adapted one, or a head that is trained beside the adapter. Its gradient may be exactly zero for a while (a
LoRA's `down` while `up` is 0, a gate that starts at 0), and an expert may get no token in a step, so the first step ends
a run only for what no later step can mend. The rest is given :data:`STEPS` steps.
"""

import logging
import re
from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from smidgen.errors import TrainingError
from smidgen.training.processes import gathered

logger = logging.getLogger(__name__)

STEPS = 10
_UNUSED = "called, but the loss does not depend on the output"
_NOT_CALLED = "not called, or only without gradients"
_LATE = f"no gradient in the first {STEPS} steps"


class Reach:
    """Watches the trained layers of a model until a gradient has reached all of them."""

    def __init__(self, accelerator: Any, model: nn.Module, trained: Mapping[str, nn.Parameter]) -> None:
        self.accelerator, self.steps = accelerator, 0
        modules = dict(model.named_modules())
        self.layers: dict[str, list[nn.Parameter]] = {}
        for name, parameter in trained.items():
            layer = _layer_of(name, modules)
            if layer is not None:
                self.layers.setdefault(layer, []).append(parameter)
        self.unreached = set(self.layers)
        self.called: set[str] = set()
        self.owner = {
            name: name.rpartition(".")[0] for name in self.layers
        }  # a ModuleList is never called: what is in one waits
        watched = {*self.layers, *self.owner.values()}
        self.hooks = [modules[name].register_forward_pre_hook(self._noting(name)) for name in watched]

    def _noting(self, name: str) -> Any:
        def note(_module: nn.Module, _inputs: Any) -> None:
            if torch.is_grad_enabled():  # evaluations and previews do not count
                self.called.add(name)

        return note

    def check(self) -> None:
        """To be asked after each step's gradients were made, before they are gone.

        Raises:
            TrainingError: no step will train a layer: its output is thrown away, the module that holds it does not call it
                nor any of its kind (the same name but for numbers), or no layer of its kind had a gradient in 10 steps.
        """
        if not self.hooks:
            return
        self.steps += 1
        self.unreached = {name for name in self.unreached if not _any_gradient(self.layers[name])}
        if self.unreached and self.steps in (1, STEPS):
            self._judge()
        if not self.unreached or self.steps == STEPS:
            self.close()

    def _judge(self) -> None:
        called = self._called_anywhere()
        kinds_called = {_kind(name) for name in called}
        kinds_reached = {_kind(name) for name in self.layers.keys() - self.unreached}
        wrong: dict[str, list[str]] = {}
        for name in sorted(self.unreached):
            if all(parameter.grad is None for parameter in self.layers[name]) and self.steps == 1:
                if name in called:
                    wrong.setdefault(_UNUSED, []).append(name)
                elif self.owner[name] in called and _kind(name) not in kinds_called:
                    wrong.setdefault(_NOT_CALLED, []).append(name)
            elif self.steps == STEPS and _kind(name) not in kinds_reached:
                wrong.setdefault(_LATE, []).append(name)
        if wrong:
            raise TrainingError(self._sentence(wrong))
        if self.steps == STEPS:
            logger.warning(
                "%d of %d trained layers got no gradient in the first %d steps, though others of their kind did: %s. An expert "
                "without tokens may get some later; what the model never uses stays untrained.",
                len(self.unreached), len(self.layers), STEPS, _some(sorted(self.unreached)),
            )  # fmt: skip

    def _called_anywhere(self) -> set[str]:
        """Layers and owners that any process called."""
        names = sorted({*self.layers, *self.owner.values()})
        rows = gathered(self.accelerator, [float(name in self.called) for name in names])
        return {name for name, *flags in zip(names, *rows, strict=True) if any(flags)}

    def nothing(self) -> TrainingError:
        """What to raise when the loss has no gradient at all."""
        layers = sorted(self.layers)
        if not layers:
            return TrainingError("The loss depends on nothing that is trained, so there is nothing to learn.")
        called = [name for name in layers if name in self.called]
        parts = {_UNUSED: called, _NOT_CALLED: [name for name in layers if name not in self.called]}
        return TrainingError(self._sentence({why: names for why, names in parts.items() if names}))

    def _sentence(self, wrong: Mapping[str, list[str]]) -> str:
        count = sum(map(len, wrong.values()))
        said = "; ".join(f"{why}: {_some(names)}" for why, names in wrong.items())
        left = "Choose other target modules" if count == len(self.layers) else "Leave them out of the target modules"
        return (
            f"{count} of {len(self.layers)} trained layers would stay untrained, as the loss does not reach them ({said}). "
            f"{left}, or train on a task whose loss uses them."
        )

    def close(self) -> None:
        """Takes the hooks away."""
        for hook in self.hooks:
            hook.remove()
        self.hooks = []


def _layer_of(parameter: str, modules: Mapping[str, nn.Module]) -> str | None:
    """The innermost adapted layer or trained head that holds a parameter."""
    parts = parameter.split(".")
    for end in range(len(parts) - 1, -1, -1):
        name = ".".join(parts[:end])
        if isinstance(modules.get(name), BaseTunerLayer | ModulesToSaveWrapper):
            return name
    return None


def _any_gradient(parameters: list[nn.Parameter]) -> bool:
    return any(p.grad is not None and bool(torch.count_nonzero(p.grad)) for p in parameters)


def _kind(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def _some(names: list[str], most: int = 6) -> str:
    shown = ", ".join(repr(name.removeprefix("base_model.model.")) for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
