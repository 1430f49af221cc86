"""Forward passes that prove an adapter: which layers a pass calls, and how far the adapter moves the output."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, is_dataclass
from functools import wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from smidgen.adapters.example_inputs import Example, examples
from smidgen.adapters.tuner.adapted_layer import AdaptedLayer
from smidgen.adapters.tuner.carried import model_keys, tuner_layers

Inputs = tuple[Any, ...] | Mapping[str, Any] | Callable[[Any], Any]

SMALLEST = 1e-8  # relative movement of an output below which it is rounding whatever its format
NOISY = 1e-3  # the same of two equal passes, above which a model does not answer twice alike


@dataclass
class Passes:
    """What the passes of a model showed.

    Attributes:
        called: adapted layers that a pass in evaluation called; in_training: one in training, None without such a pass.
        owners: adapted layers whose parent module was called, in evaluation.
        moved: |output on - output off| / |output off| in evaluation, ``noise`` the same of two equal passes.
        missing: what kind of input the example left out, "" if none.
        error: why there was no pass.
    """

    called: set[str] = field(default_factory=set)
    in_training: set[str] | None = None
    owners: set[str] = field(default_factory=set)
    moved: float = 0.0
    noise: float = 0.0
    missing: str = ""
    error: str | None = None


def run(model: nn.Module, adapter_name: str, inputs: Inputs | None, whole: Any = None) -> Passes:
    """Runs a model in evaluation with the adapter on and off, and once as it is if it is in training.

    Random state, buffers and modes are as before afterwards.

    Args:
        model: carries the adapter, active.
        inputs: positional or keyword arguments of the model, a function that runs ``whole`` and returns its output, or
            None for inputs made from the model's config.
        whole: what the caller holds, a pipeline perhaps; the model itself unless given.
    """
    found = Passes()
    layers = tuner_layers(model, adapter_name)
    owners = {
        name: model.get_submodule(key.rpartition(".")[0]) for name, key in model_keys(model, adapter_name).items()
    }
    with ExitStack() as stack:
        modes = stack.enter_context(left_as_it_was(model))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        model.eval()
        seen = stack.enter_context(_calls(layers))
        parents = stack.enter_context(_calls(owners))
        try:
            call, on, found.missing = _first_that_runs(model, inputs, model if whole is None else whole)
            found.called, found.owners = set(seen), set(parents)
            with silent(layers.values(), adapter_name):
                off = numbers(call())
                found.moved, found.noise = _distance(on, off), _distance(numbers(call()), off)
            if any(training for _, training in modes):
                seen.clear()
                _set_modes(modes)
                call()
                found.in_training = set(seen)
        except Exception as error:  # whatever a stranger's forward raises is an answer: there was no pass
            found.error = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    return found


def _first_that_runs(
    model: nn.Module, inputs: Inputs | None, whole: Any
) -> tuple[Callable[[], Any], list[Tensor], str]:
    """(a seeded call, its output's numbers, what the inputs leave out): the given inputs, or the first example that fits."""
    last: Exception | None = None
    for example in [_given(inputs, whole)] if inputs is not None else examples(model):

        def call(example: Example = example) -> Any:
            torch.manual_seed(0)
            random.seed(0)
            np.random.seed(0)
            return example.run()

        try:
            return call, numbers(call()), example.missing
        except Exception as error:
            last = last or error
    raise last or ValueError(f"no inputs are known for a {type(model).__name__}")


def _given(inputs: Inputs, whole: Any) -> Example:
    if isinstance(inputs, Mapping):
        named = dict(inputs)
        return Example(lambda: whole(**named))
    if callable(inputs):
        run = inputs
        return Example(lambda: run(whole))
    if isinstance(inputs, Tensor):
        raise TypeError("inputs must be a tuple, a dict or a function of the model; write (x,) for one tensor")
    positional = tuple(inputs)
    return Example(lambda: whole(*positional))


# ---- what a pass calls -----------------------------------------------------------------------------------------------


@contextmanager
def _calls(modules: Mapping[str, nn.Module]) -> Iterator[set[str]]:
    """Within, the names of those modules that are called gather in the set.

    ``forward`` is wrapped on the module itself: a hook would take torch's encoder layer off its fast path, and the pass
    would no longer be the one that users get.
    """
    seen: set[str] = set()
    names: dict[nn.Module, list[str]] = {}
    for name, module in modules.items():
        names.setdefault(module, []).append(name)
    before = {module: module.__dict__.get("forward") for module in names}

    def watched(module: nn.Module) -> Callable[..., Any]:
        forward = module.forward

        @wraps(forward)
        def call(*args: Any, **kwargs: Any) -> Any:
            seen.update(names[module])
            return forward(*args, **kwargs)

        return call

    for module in names:
        module.forward = watched(module)  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        for module, own in before.items():
            if own is None:
                del module.__dict__["forward"]
            else:
                module.forward = own  # type: ignore[method-assign]


@contextmanager
def silent(layers: Collection[Any], adapter_name: str) -> Iterator[None]:
    """Within, an adapter does nothing at these layers; what is active or merged beside it stays, what it was merged in the place of
    stays away."""
    before = [
        (layer, list(layer.active_adapters), list(layer.merged_adapters), list(getattr(layer, "_replaced", ())))
        for layer in layers
    ]
    try:
        for layer, active, merged, replaced in before:
            if adapter_name in merged:
                _merged_anew(layer, [name for name in merged if name != adapter_name], replaced)
            layer._active_adapter = [name for name in active if name not in (adapter_name, *replaced)]
        yield
    finally:
        for layer, active, merged, replaced in before:
            layer._active_adapter = active
            if adapter_name in merged:
                _merged_anew(layer, merged, replaced)


def _merged_anew(layer: Any, names: list[str], replaced: list[str]) -> None:
    """Those adapters merged at a layer and no others."""
    if layer.merged:
        layer.unmerge()
    if names:
        layer.merge(adapter_names=names)
    if hasattr(layer, "_replaced"):
        layer._replaced = replaced


# ---- nothing is left behind --------------------------------------------------------------------------------------------


Modes = list[tuple[nn.Module, bool]]


@contextmanager
def at_rest(models: Iterable[nn.Module]) -> Iterator[None]:
    """Within, models are in evaluation without gradients or compiling; afterwards they are as they were."""
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(left_as_it_was(model))
            model.eval()
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def _set_modes(modes: Modes) -> None:
    for module, training in modes:
        module.training = training


@contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[Modes]:
    """Gives the modules' modes; afterwards random state, buffers (running statistics) and modes are as before."""
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and not buffer.is_meta and not isinstance(module, AdaptedLayer)
    ]
    modes = [(module, module.training) for module in model.modules()]
    with torch.random.fork_rng(devices=[d.index or 0 for d in devices]):
        states = random.getstate(), np.random.get_state()
        try:
            yield modes
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            _set_modes(modes)
            with torch.no_grad():
                for module, name, buffer, kept in buffers:
                    if module._buffers.get(name) is not buffer:
                        module._buffers[name] = buffer
                    if not torch.equal(buffer, kept):
                        buffer.copy_(kept)


# ---- outputs -----------------------------------------------------------------------------------------------------------


def numbers(output: Any) -> list[Tensor]:
    """All numbers of an output, in order: of tensors, arrays, pictures, tuples, dicts and the libraries' own classes.

    Raises:
        ValueError: there are none, or they are not finite.
    """
    found = _tensors(output)
    if not found:
        raise ValueError(f"its output, a {type(output).__name__}, holds no numbers")
    if not all(bool(torch.isfinite(tensor).all()) for tensor in found):
        raise ValueError("its output is not finite")
    return found


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output.detach().double()]
    if isinstance(output, Mapping):
        return [tensor for part in output.values() for tensor in _tensors(part)]
    if isinstance(output, (list, tuple)):
        return [tensor for part in output for tensor in _tensors(part)]
    if is_dataclass(output) and not isinstance(output, type):
        return _tensors(vars(output))
    if isinstance(output, (int, float, np.ndarray)) or hasattr(output, "__array_interface__"):  # pictures have it
        return [torch.from_numpy(np.array(output, dtype=np.float64))]
    return []


def _distance(a: list[Tensor], b: list[Tensor]) -> float:
    """|a - b| / |b| over all tensors."""
    off, size = gap(a, b), sum(float(y.abs().square().sum()) for y in b) ** 0.5
    return off / size if size > 0 else off


def gap(a: list[Tensor], b: list[Tensor]) -> float:
    """|a - b| over all tensors; infinite where they are of other shapes."""
    return float(row_gaps(a, b).sum()) ** 0.5


def row_gaps(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """|a - b|^2 [rows] of each row along the first axis of each tensor in turn; infinite where they are of other shapes."""
    if [t.shape for t in a] != [t.shape for t in b]:
        return torch.tensor([float("inf")])
    pairs = zip(a, b, strict=True)
    return torch.cat([(x - y).abs().square().reshape(len(x) if x.dim() else 1, -1).sum(1) for x, y in pairs])
