"""Proof that an adapter is on: its file against the model, each layer's own output, and a forward pass of the model.

``verify`` never raises for what a file or a base can do wrong: every finding is a sentence in ``reasons``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smidgen.adapters import api, passes
from smidgen.adapters.checkpoint import base_lock, packing
from smidgen.adapters.checkpoint.files import read_tensors
from smidgen.adapters.components import parts
from smidgen.adapters.example_inputs import as_read
from smidgen.adapters.passes import Inputs
from smidgen.adapters.tuner import bypass, renames
from smidgen.adapters.tuner.adapted_layer import OUTPUT_ERROR, AdaptedLayer, probe
from smidgen.adapters.tuner.base import base_matrices, compare_base, travels
from smidgen.adapters.tuner.canary import (
    CANARY_CAST,
    CANARY_SAME,
    CANARY_TIES,
    delta_error,
    delta_sketch,
    deltas,
    head_sketches,
    moving_advice,
    read_canary,
)
from smidgen.adapters.tuner.carried import adapted_layers, tuner_layers
from smidgen.adapters.tuner.config import SmidgenConfig, is_ours
from smidgen.adapters.tuner.coverage import Coverage, coverage
from smidgen.adapters.tuner.experts import is_stack
from smidgen.adapters.tuner.heads import head_tensors, saved_modules, say_unsaved, unsaved
from smidgen.adapters.tuner.injection import peft_tensors, remove
from smidgen.adapters.tuner.kinds import LinearKind
from smidgen.adapters.tuner.numbers import Numbers
from smidgen.adapters.tuner.stored import stored_tensors
from smidgen.errors import SmidgenError

_SEALED = {
    True: "right",
    False: "none stored: saved before there were checksums, so damage that keeps shapes cannot be told",
    None: "-",
}


@dataclass
class VerifyReport:
    """What :func:`verify` found.

    Attributes:
        reasons: what is wrong or what is missing to the proof, one sentence each; empty when the verdict is ON.
        refuted: something is wrong; proven: a forward pass showed the adapter at work.
        adapter_name: the name it goes by in the model (None when it was loaded for the check only).
        layers, targets: adapted layers found, and those the file lists.
        sealed: whether the file's config holds a checksum, which then was found right; None for adapters of peft's methods.
        base: "same", "cast", "changed" (fine-tuned, merged into, another head), "other" or "unlocked" (no lock in the
            file); base_difference: estimated |W - W'| / |W| of the targets; base_rest: of all other weights, None where
            the lock does not hold them; base_changed: block -> its difference, of those that no cast explains.
        notes: what is worth knowing and no reason against it.
        canary_error: relative difference of the rebuilt deltas from the stored ones, None without a canary.
        output_error: largest relative difference of a layer's output shift from x @ delta^T.
        norms: target -> |delta| / |W|.
        called: adapted layers that the forward pass called, None without a pass; not_called: those it did not.
        moved: |output on - output off| / |output off| of the model, None without a pass.
        coverage: how much of the model's layers and parameters the adapter is on.
        parts: of a pipeline with adapters on several components, a report for each ("denoiser", "text_encoder").
    """

    reasons: list[str] = field(default_factory=list)
    refuted: bool = False
    proven: bool = False
    adapter_name: str | None = None
    layers: int = 0
    targets: int = 0
    sealed: bool | None = None
    base: str = "unlocked"
    base_difference: float = 0.0
    base_rest: float | None = None
    base_changed: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    canary_error: float | None = None
    output_error: float = 0.0
    norms: dict[str, float] = field(default_factory=dict)
    called: int | None = None
    not_called: list[str] = field(default_factory=list)
    moved: float | None = None
    coverage: Coverage | None = None
    parts: dict[str, VerifyReport] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """ "ON", "OFF", or "NOT PROVEN" when nothing is wrong but no forward pass was made."""
        if self.refuted:
            return "OFF"
        return "ON" if self.proven else "NOT PROVEN"

    @property
    def ok(self) -> bool:
        """Whether the verdict is ON."""
        return self.verdict == "ON"

    def fail(self, reason: str) -> None:
        """Adds a reason why the adapter is off."""
        self.refuted = True
        self.reasons.append(reason)

    def compared(self, lock: base_lock.LockReport) -> None:
        """Takes over how the base compares with the file's lock."""
        self.base, self.base_difference, self.base_rest = lock.state, lock.difference, lock.rest
        self.base_changed = lock.changed
        if lock.changed:
            self.notes.append(f"the base was changed since: {base_lock.difference_words(lock)}")
        self.notes += [f"base: {note}" for note in lock.notes]

    def __str__(self) -> str:
        if self.parts:
            return "\n".join([f"adapter is {self.verdict}", *(f"{name}: {part}" for name, part in self.parts.items())])
        canary = "none stored" if self.canary_error is None else f"{self.canary_error:.1e}"
        size = f"{min(self.norms.values()):.1e} to {max(self.norms.values()):.1e}" if self.norms else "-"
        lines = [
            f"adapter is {self.verdict}",
            f"  layers        {self.layers} of {self.targets}",
            f"  checksum      {_SEALED[self.sealed]}",
            f"  base          {self._base_words()}",
            f"  canary        {canary}",
            f"  output shift  {self.output_error:.1e}",
            f"  |delta|/|W|   {size}",
            f"  called        {'no forward pass' if self.called is None else f'{self.called} of {self.layers} layers'}",
            f"  output moves  {'-' if self.moved is None else f'{self.moved:.1e}'}",
        ]
        if self.coverage is not None:
            lines.append(f"  covers        {self.coverage.share:.1%} of the model's parameters")
            lines += [f"    {name:20} {layers:>16} {share:>7}" for name, layers, share in self.coverage.rows()]
        if self.not_called and self.verdict == "ON":
            lines.append(f"  not called    {_some(self.not_called)}")
        lines += [f"  note          {note}" for note in self.notes]
        return "\n".join(lines + [f"  - {reason}" for reason in self.reasons])

    def _base_words(self) -> str:
        if self.base == "unlocked":
            return "unlocked (the file holds no base lock: another base would go unnoticed)"
        rest = "not in the lock" if self.base_rest is None else f"{self.base_rest:.1e}"
        return f"{self.base} (weights differ by {self.base_difference:.1e}, all others: {rest})"


def verify(model: Any, path: str | os.PathLike[str], inputs: Inputs | None = None) -> VerifyReport:
    """Checks that the adapter in ``path`` is on in ``model`` (or would be: a plain base is used and left as it was).

    Args:
        model: a model that carries the adapter under any name, or the base model alone; or a diffusers pipeline, whose
            components are each checked against what the folder holds for them.
        path: the adapter folder, of a method of ours or of peft's (which keeps no base lock and no canary in its files).
        inputs: for the forward pass that proves it: a tuple of the model's arguments, a dict of its keyword arguments,
            or a function that is given the model, runs it and returns its output. Made from the config of transformers
            and diffusers models, and from the first layer of a model that takes one tensor, unless given; of a pipeline's
            text encoders and VAE it is what the pipeline reads of them.

    Returns:
        A report with ``.verdict``, ``.ok`` and ``.reasons``; ``print(report)`` is a table.
    """
    try:
        found = api.folders(model, path)
        whole = None if isinstance(model, nn.Module) else model
        reports = {}
        for name, (part, folder) in found.items():
            given = _as_read(whole, name) if inputs is None and whole is not None else inputs
            reports[name] = _verify_part(part, folder, given, whole)
        return reports[""] if len(reports) == 1 and "" in reports else _together(reports)
    except SmidgenError as error:
        why = str(error)
    except Exception as error:  # whatever a stranger's model, path or inputs do: a report, never a traceback
        why = f"The check could not be made: {type(error).__name__}: {str(error).strip() or 'no words'}"
    report = VerifyReport()
    report.fail(why)
    return report


def _as_read(pipe: Any, component: str) -> Inputs | None:
    with passes.at_rest(parts(pipe).values()):
        return as_read(pipe, component)


def _together(reports: dict[str, VerifyReport]) -> VerifyReport:
    """One report on a pipeline's parts: ON when each is, OFF when one is."""
    named = {name or "denoiser": report for name, report in reports.items()}
    every = named.values()
    passes_made = [report.called for report in every if report.called is not None]
    return VerifyReport(
        reasons=[f"{name}: {reason}" for name, report in named.items() for reason in report.reasons],
        refuted=any(report.refuted for report in every),
        proven=all(report.proven for report in every),
        adapter_name=next(iter(every)).adapter_name,
        layers=sum(report.layers for report in every),
        targets=sum(report.targets for report in every),
        output_error=max(report.output_error for report in every),
        norms={f"{name}.{target}": norm for name, report in named.items() for target, norm in report.norms.items()},
        called=sum(passes_made) if len(passes_made) == len(named) else None,
        not_called=[f"{name}.{layer}" for name, report in named.items() for layer in report.not_called],
        parts=named,
    )


def _verify_part(model: nn.Module, path: Path, inputs: Inputs | None, whole: Any) -> VerifyReport:
    """Checks one module; ``whole`` is the pipeline it belongs to, if any."""
    report, whole = VerifyReport(), model if whole is None else whole
    try:
        own = _stored_config(path)
        tensors = read_tensors(path) if own is None else api.read_adapter(path)[1]
        report.sealed = None if own is None else own.checksum is not None
    except SmidgenError as error:
        report.fail(str(error))
        return report
    carried = [n for n in api.names(model) if isinstance(model.peft_config[n], SmidgenConfig) == (own is not None)]  # type: ignore[index]
    if carried:
        _verify_carried(model, carried, own, tensors, report)
        if report.adapter_name is not None:
            _verify_pass(model, report.adapter_name, inputs, whole, report)
            if left_out := unsaved(model, report.adapter_name):
                report.fail(say_unsaved(left_out, report.adapter_name))
        return report
    flags = [(p, p.requires_grad) for p in model.parameters()]
    taken = set(api.names(model))
    name = next(name for k in range(len(taken) + 1) if (name := f"verify{k or ''}") not in taken)
    try:
        api.load_parts([(model, path)], name)
        _verify_layers(model, name, own, report, {} if own is None else renames.follow(own, model))
        _verify_pass(model, name, inputs, whole, report)
    except SmidgenError as error:
        report.fail(str(error))
        lock = getattr(error, "report", None)
        if lock is not None:
            report.compared(lock)
    finally:
        remove(model, name)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    return report


def _stored_config(path: Path) -> SmidgenConfig | None:
    """The config of a file of ours; None for one of peft's."""
    return api.read_smidgen_config(path) if is_ours(path) else None


def _verify_pass(model: nn.Module, name: str, inputs: Inputs | None, whole: Any, report: VerifyReport) -> None:
    """A forward pass, unless something is wrong already: never ON without one."""
    if report.refuted:
        return
    found = passes.run(model, name, inputs, whole)
    if found.error is not None:
        given = "with the given inputs" if inputs is not None else "with inputs made for it"
        report.reasons.append(
            f"No forward pass of the {type(whole).__name__} was made {given} ({found.error}): pass inputs=, a tuple or a "
            "dict of its arguments, or a function that runs it."
        )
        return
    layers = tuner_layers(model, name)
    report.called, report.moved = len(found.called), found.moved
    report.not_called = sorted(layers.keys() - found.called)
    if not found.called and found.missing:
        report.reasons.append(
            f"The inputs made for a {type(whole).__name__} hold no {found.missing} and reach none of the adapter's layers: "
            "pass inputs= that do."
        )
        return
    for layer in report.not_called:
        why = _why_not_called(model, layer, layers, found)
        if why:
            report.fail(f"Layer {layer!r} is not called by a forward pass: {why}.")
    seen = found.moved > max(3 * found.noise, passes.SMALLEST)
    if not report.refuted and not seen and found.noise > passes.NOISY:
        report.reasons.append(
            f"Two equal passes of the {type(whole).__name__} with the adapter off differ by {found.noise:.1e}, with it on by {found.moved:.1e}: what "
            "the adapter does cannot be told from what the model does by itself. Pass inputs=, a function that runs it twice alike."
        )
        return
    if not report.refuted and not seen:
        report.fail(
            f"The adapter's layers are called, but the model's output is the same with the adapter on and off (it moves by "
            f"{found.moved:.1e} of its size)."
        )
    report.proven = not report.refuted


def _why_not_called(model: nn.Module, layer: str, layers: dict[str, Any], found: passes.Passes) -> str | None:
    """Why a layer that a pass did not call makes the adapter OFF; None for a part that a pass may well leave out."""
    known = bypass.bypassed(model, layer)
    if known:
        return known
    if found.in_training is not None and layer in found.in_training:
        return "it is called in training but not in evaluation, so what it learnt has no effect"
    if not found.called:
        return "no layer of the adapter is, so it has no effect"
    last = layer.rpartition(".")[2]
    kind = [name for name in layers if name.rpartition(".")[2] == last]
    if len(kind) > 1 and not found.called & set(kind) and found.owners >= set(kind):
        return f"the modules that hold the {len(kind)} layers {last!r} are called and call none of them"
    return None


def _some(names: list[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _verify_carried(
    model: nn.Module, carried: list[str], own: SmidgenConfig | None, tensors: dict[str, Tensor], report: VerifyReport
) -> None:
    called = {} if own is None else renames.follow(own, model)
    same = [name for name in carried if _holds(model, name, own, tensors, called)]
    if not same:
        report.fail(f"None of the model's adapters ({', '.join(carried)}) holds the numbers of this file.")
        return
    same.sort(key=lambda name: all(name not in layer.active_adapters for layer in tuner_layers(model, name).values()))
    report.adapter_name = same[0]
    layers = tuner_layers(model, same[0])
    off = [n for n, layer in layers.items() if same[0] not in layer.active_adapters]
    disabled = [n for n, layer in layers.items() if layer.disable_adapters]
    silent = [n for n, layer in layers.items() if getattr(layer, "scaling", {}).get(same[0]) == 0]
    if off:
        report.fail(f"Adapter {same[0]!r} is loaded but not active at {len(off)} of {len(layers)} layers.")
    if disabled:
        report.fail(f"Adapters are switched off at {len(disabled)} of {len(layers)} layers.")
    if silent:
        report.fail(f"Adapter {same[0]!r} has strength 0 at {len(silent)} of {len(layers)} layers.")
    _verify_layers(model, same[0], own, report, called, tensors)


def _holds(
    model: nn.Module, name: str, own: SmidgenConfig | None, tensors: dict[str, Tensor], called: Mapping[str, str]
) -> bool:
    if own is not None:
        stored = {n: stored_tensors(lay, name, own.store_factors) for n, lay in adapted_layers(model, name).items()}
        held = packing.pack(renames.in_file(called, stored)) | head_tensors(model, name)
    else:
        held = peft_tensors(model, name)
    codes = own.store_dtype if own is not None and own.store_dtype in packing.CODES else None
    return held.keys() == tensors.keys() and all(
        _same_numbers(held[k].cpu(), tensors[k], codes if packing.is_packed(k) else None) for k in held
    )


def _same_numbers(held: Tensor, file: Tensor, codes: str | None = None) -> bool:
    """Equality up to the coarser of two number formats, and to what rounding to ``codes`` takes: a model may have been cast after the
    file was written."""
    if held.shape != file.shape or held.is_floating_point() != file.is_floating_point():
        return False
    if not held.is_floating_point():
        return torch.equal(held.long(), file.long())
    formats = [torch.finfo(t.dtype) for t in (held, file)]
    eps, tiny = max(f.eps for f in formats), max(f.tiny * f.eps for f in formats)
    if held.dtype == file.dtype:
        eps, tiny = 0.0, 0.0
    allowed = eps * file.double().abs() + tiny + (packing.rounded_by(file, codes) if codes else 0.0)
    return bool(((held.double() - file.double()).abs() <= allowed).all())


@torch.no_grad()
def _verify_layers(
    model: nn.Module,
    name: str,
    own: SmidgenConfig | None,
    report: VerifyReport,
    called: Mapping[str, str],
    tensors: dict[str, Tensor] | None = None,
) -> None:
    """``tensors`` are the file's, where the model's own numbers may be what they were before the file rounded them."""
    report.layers = report.targets = len(tuner_layers(model, name))
    if own is None:  # the pass alone proves peft's
        return
    _verify_heads(model, name, own, report)
    if called:
        report.notes.append(renames.words(called))
    layers = adapted_layers(model, name)
    report.coverage = coverage(model, name)
    matrices = base_matrices(dict(layers))
    if own.base_lock:
        report.targets = len(base_lock.read_lock(own.base_lock).targets)
        lock = compare_base(own, dict(layers), model)
        report.compared(lock)
        if lock.problems and travels(own, lock):
            report.notes.append("another base than the one it was made for; the file holds its factors and goes on any")
        else:
            for problem in lock.problems:
                report.fail(problem)
    named = renames.in_file(called, layers)
    rounded = tensors is not None and own.store_dtype != "float32"
    found = deltas(named, name, _in_file(named, name, own, tensors or {}) if rounded else None)
    rows, shifts = list[Tensor](), dict[str, tuple[float, float]]()
    for target, delta in zip(sorted(layers, key=lambda n: called.get(n, n)), found, strict=True):
        rows.append(delta_sketch(delta))
        report.norms[target] = float(rows[-1][0] / matrices[target].float().norm().clamp(min=1e-30))
        with _unmerged(layers[target]):
            shifts[target] = output_error(layers[target], name, None if rounded else delta)
    sketches = torch.stack(rows)
    if not bool(torch.isfinite(sketches).all()):
        report.fail("The adapter's deltas are not finite on this base.")
        return
    if not any(report.norms.values()):
        alone = ", its head alone was trained" if own.modules_to_save else ""
        report.fail(f"Every delta is zero: the adapter does nothing (it was saved before any training step{alone}).")
    if own.canary and len(layers) == report.targets:
        report.canary_error = delta_error(read_canary(own.canary), sketches)
        cast = report.base != "same" or any(_is_cast(layer) for layer in layers.values())
        most = CANARY_SAME if not cast else CANARY_TIES if own.ties and not own.store_factors else CANARY_CAST
        if not report.canary_error <= most:
            report.fail(
                f"The deltas rebuilt on this base differ by {report.canary_error:.1%} from the ones that were saved "
                f"(at most {most:.1%} is accepted).{moving_advice(own)}"
            )
    for target, (error, most) in shifts.items():
        report.output_error = max(report.output_error, error)
        if not error <= most:
            report.fail(f"Layer {target!r} does not apply its delta: output shift is off by {error:.1%}.")


def _in_file(layers: Mapping[str, AdaptedLayer], name: str, own: SmidgenConfig, tensors: dict[str, Tensor]) -> Numbers:
    """The numbers of a file by the targets' names in it."""
    layout = {
        n: {tensor: (tuple(v.shape), v.dtype) for tensor, v in stored_tensors(layer, name, own.store_factors).items()}
        for n, layer in layers.items()
    }
    found = packing.unpack({key: value for key, value in tensors.items() if packing.is_packed(key)}, layout)
    return Numbers({n: {k: v.float() if v.is_floating_point() else v for k, v in t.items()} for n, t in found.items()})


def _verify_heads(model: nn.Module, name: str, own: SmidgenConfig, report: VerifyReport) -> None:
    """The heads that the adapter trained are in use, are not empty, and are those that were saved."""
    for head, wrapper in saved_modules(model, name).items():
        where = head.removeprefix("base_model.model.")
        if wrapper.disable_adapters or name not in wrapper.active_adapters:
            report.fail(f"Head {where!r} is loaded but not in use.")
        values = [value for value in wrapper.modules_to_save[name].state_dict().values() if value.numel()]
        if values and not any(bool(value.any()) for value in values):
            report.fail(f"Head {where!r} holds nothing but zeros: it gives the same answer to every input.")
        if not all(bool(torch.isfinite(value).all()) for value in values if value.is_floating_point()):
            report.fail(f"Head {where!r} holds numbers that are not finite.")
    held = head_tensors(model, name)
    if own.canary and own.canary.get("heads") is not None and held:
        error = delta_error(read_canary(own.canary, "heads"), head_sketches(held))
        cast = any(value.is_floating_point() and value.dtype.itemsize < 4 for value in held.values())
        if not error <= (CANARY_CAST if cast else CANARY_SAME):
            report.fail(
                f"The heads {', '.join(own.modules_to_save or ())} differ by {error:.1%} from those that were saved."
            )


@contextmanager
def _unmerged(layer: AdaptedLayer) -> Iterator[None]:
    """Within, a merged layer is as it was before: its original bits come back, then it is merged again."""
    merged = list(layer.merged_adapters)
    if merged:
        layer.unmerge()
    try:
        yield
    finally:
        if merged:
            layer.merge(adapter_names=merged)


def _is_cast(layer: AdaptedLayer) -> bool:
    """Whether an adapter's numbers or factors are in a 16-bit format, as after ``model.to(torch.bfloat16)``."""
    held = (*layer.smidgen_slots.parameters(), *layer.smidgen_slots.buffers())
    return any(t.is_floating_point() and t.dtype.itemsize < 4 for t in held)


def output_error(layer: AdaptedLayer, name: str, delta: Tensor | None = None) -> tuple[float, float]:
    """(relative error of the layer's output shift on a fixed probe against x @ delta^T, what its dtype allows); ``delta`` may be
    given by who has made it already."""
    delta = (layer.delta_matrix(name) if delta is None else delta).float()
    base: Any = layer.base_layer
    weight = layer._original()
    if is_stack(layer):
        return _weight_error(layer, name, weight, delta)
    dtype = _computes_in(base, weight)
    x = probe(layer).to(weight.device, dtype)
    if isinstance(layer.kind, LinearKind):
        expected = x.float() @ delta.T
    else:
        expected = base._conv_forward(x.float(), layer.kind.unmatrix(delta, base), None)
    off, strength = base(x), layer.scaling[name]
    layer.scaling[name] = 1.0
    try:
        found = layer.shifted(x, [name]).float() - off.float()
    finally:
        layer.scaling[name] = strength
    rounding = torch.finfo(off.dtype).eps * 4 * float(off.float().norm())
    size = float(expected.norm())
    if size <= rounding:
        return 0.0, 1.0
    return float((found - expected).norm()) / size, OUTPUT_ERROR.get(dtype, 0.05) + rounding / size


def _weight_error(layer: AdaptedLayer, name: str, weight: Tensor, delta: Tensor) -> tuple[float, float]:
    """The same of fused experts: of what is added to their weight."""
    delta, strength = layer.kind.unmatrix(delta, layer.base_layer), layer.scaling[name]
    layer.scaling[name] = 1.0
    try:
        found = layer.shifted_weight([name]).float() - weight.float()
    finally:
        layer.scaling[name] = strength
    size, rounding = float(delta.norm()), torch.finfo(weight.dtype).eps * float(weight.float().norm())
    if size <= rounding:
        return 0.0, 1.0
    return float((found - delta).norm()) / size, OUTPUT_ERROR.get(weight.dtype, 0.05) + rounding / size


def _computes_in(base: Any, weight: Tensor) -> torch.dtype:
    """The number format of a layer's activations: its weight's, unless diffusers casts an fp8 weight for each call."""
    registry = getattr(base, "_diffusers_hook", None)
    for hook in registry.hooks.values() if registry is not None else ():
        if isinstance(getattr(hook, "compute_dtype", None), torch.dtype):
            return hook.compute_dtype  # type: ignore[no-any-return]
    return weight.dtype if weight.is_floating_point() else torch.float32
