"""Proof that an adapter is on: coverage, finite and non-zero numbers, base lock, canary, and the layers' own outputs.

``verify`` never raises for what a file or a base can do wrong: every finding is a sentence in ``reasons``.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from smidgen.adapters import api
from smidgen.adapters.checkpoint import base_lock, packing
from smidgen.adapters.checkpoint.files import read_tensors
from smidgen.adapters.tuner.canary import delta_error, delta_sketches, read_canary
from smidgen.adapters.tuner.config import SmidgenConfig
from smidgen.adapters.tuner.kinds import Conv2dKind, LinearKind
from smidgen.adapters.tuner.peft_bridge import AdaptedLayer, adapted_layers, base_matrices, remove, stored_tensors
from smidgen.errors import SmidgenError

# Largest relative error of the rebuilt delta: same base (other thread count or device), same base re-cast (the
# portability figures of users.md, section 2, with stored pivots).
CANARY_SAME, CANARY_CAST = 2e-3, 0.15
# Largest relative error of a layer's output shift against x @ delta^T, and the output rounding allowed besides.
OUTPUT_ERROR = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.02}


@dataclass
class VerifyReport:
    """What :func:`verify` found.

    Attributes:
        ok: whether the adapter is on and is the one in the file.
        reasons: what is wrong, one sentence each; empty when ok.
        adapter_name: the name it goes by in the model (None when it was loaded for the check only).
        layers, targets: adapted layers found, and those the file lists.
        base: "same", "cast", "other" or "unlocked"; base_difference: estimated |W - W'| / |W|.
        canary_error: relative difference of the rebuilt deltas from the stored ones, None without a canary.
        output_error: largest relative difference of a layer's output shift from x @ delta^T.
        norms: target -> |delta| / |W|.
    """

    ok: bool = True
    reasons: list[str] = field(default_factory=list)
    adapter_name: str | None = None
    layers: int = 0
    targets: int = 0
    base: str = "unlocked"
    base_difference: float = 0.0
    canary_error: float | None = None
    output_error: float = 0.0
    norms: dict[str, float] = field(default_factory=dict)

    def fail(self, reason: str) -> None:
        """Adds a reason."""
        self.ok = False
        self.reasons.append(reason)

    def __str__(self) -> str:
        canary = "none stored" if self.canary_error is None else f"{self.canary_error:.1e}"
        size = f"{min(self.norms.values()):.1e} to {max(self.norms.values()):.1e}" if self.norms else "-"
        lines = [
            "adapter is ON" if self.ok else "adapter is NOT verified",
            f"  layers        {self.layers} of {self.targets}",
            f"  base          {self.base} (weights differ by {self.base_difference:.1e})",
            f"  canary        {canary}",
            f"  output shift  {self.output_error:.1e}",
            f"  |delta|/|W|   {size}",
        ]
        return "\n".join(lines + [f"  - {reason}" for reason in self.reasons])


def verify(model: nn.Module, path: str | os.PathLike[str]) -> VerifyReport:
    """Checks that the adapter in ``path`` is on in ``model`` (or would be: a plain base is used and left as it was).

    Args:
        model: a model that carries the adapter under any name, or the base model alone.
        path: the adapter folder.

    Returns:
        A report with ``.ok`` and ``.reasons``; ``print(report)`` is a table.
    """
    report = VerifyReport()
    model = api.denoiser(model)
    try:
        own = api.read_smidgen_config(path)
        tensors = read_tensors(path)
    except SmidgenError as error:
        report.fail(str(error))
        return report
    carried = [n for n in api.names(model) if adapted_layers(model, n)]
    if carried:
        _verify_carried(model, carried, own, tensors, report)
        return report
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        api.load(model, path, adapter_name="verify")
        _verify_layers(model, "verify", own, report)
    except SmidgenError as error:
        report.fail(str(error))
    finally:
        remove(model, "verify")
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    return report


def _verify_carried(
    model: nn.Module, carried: list[str], own: SmidgenConfig, tensors: dict[str, Tensor], report: VerifyReport
) -> None:
    same = [name for name in carried if _holds(model, name, tensors)]
    if not same:
        report.fail(f"None of the model's adapters ({', '.join(carried)}) holds the numbers of this file.")
        return
    report.adapter_name = same[0]
    layers = adapted_layers(model, same[0])
    off = [n for n, layer in layers.items() if same[0] not in layer.active_adapters]
    disabled = [n for n, layer in layers.items() if layer.disable_adapters]
    silent = [n for n, layer in layers.items() if layer.scaling[same[0]] == 0]
    if off:
        report.fail(f"Adapter {same[0]!r} is loaded but not active at {len(off)} of {len(layers)} layers.")
    if disabled:
        report.fail(f"Adapters are switched off at {len(disabled)} of {len(layers)} layers.")
    if silent:
        report.fail(f"Adapter {same[0]!r} has strength 0 at {len(silent)} of {len(layers)} layers.")
    _verify_layers(model, same[0], own, report)


def _holds(model: nn.Module, name: str, tensors: dict[str, Tensor]) -> bool:
    layers = adapted_layers(model, name)
    held = packing.pack({n: stored_tensors(layer, name) for n, layer in layers.items()})
    file = {k: v for k, v in tensors.items() if packing.is_packed(k)}
    return held.keys() == file.keys() and all(torch.equal(held[k].to(file[k].dtype), file[k]) for k in held)


@torch.no_grad()
def _verify_layers(model: nn.Module, name: str, own: SmidgenConfig, report: VerifyReport) -> None:
    layers = adapted_layers(model, name)
    report.layers = report.targets = len(layers)
    matrices = base_matrices(dict(layers))
    if own.base_lock:
        report.targets = len(base_lock.read_lock(own.base_lock).targets)
        lock = base_lock.check_lock(own.base_lock, matrices)
        report.base, report.base_difference = lock.state, lock.difference
        for problem in lock.problems:
            report.fail(problem)
    sketches = delta_sketches(layers, name)
    for target, row in zip(sorted(layers), sketches, strict=True):
        report.norms[target] = float(row[0] / matrices[target].float().norm().clamp(min=1e-30))
    if not bool(torch.isfinite(sketches).all()):
        report.fail("The adapter's deltas are not finite on this base.")
        return
    if not any(report.norms.values()):
        report.fail("Every delta is zero: the adapter does nothing (it was saved before any training step).")
    if own.canary and len(layers) == report.targets:
        report.canary_error = delta_error(read_canary(own.canary), sketches)
        most = CANARY_SAME if report.base == "same" else CANARY_CAST
        if not report.canary_error <= most:
            report.fail(
                f"The deltas rebuilt on this base differ by {report.canary_error:.1%} from the ones that were saved "
                f"(at most {most:.1%} is accepted); save the adapter with store_factors=True to move it here."
            )
    for target, layer in layers.items():
        error, most = output_error(layer, name)
        report.output_error = max(report.output_error, error)
        if not error <= most:
            report.fail(f"Layer {target!r} does not apply its delta: output shift is off by {error:.1%}.")


def output_error(layer: AdaptedLayer, name: str) -> tuple[float, float]:
    """(relative error of the layer's output shift on a fixed probe against x @ delta^T, what its dtype allows)."""
    base: Any = layer.base_layer
    weight = layer._original()
    dtype = weight.dtype if weight.is_floating_point() else torch.float32
    x = probe(layer).to(weight.device, dtype)
    delta = layer.delta_matrix(name).float()
    if isinstance(layer.kind, LinearKind):
        expected = x.float() @ delta.T
    else:
        values = {"weight": layer.kind.unmatrix(delta, base)} | (
            {"bias": torch.zeros_like(base.bias).float()} if base.bias is not None else {}
        )
        expected = torch.func.functional_call(base, values, (x.float(),))
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


def probe(layer: AdaptedLayer) -> Tensor:
    """A fixed input for a layer: +-1 in every feature, a few tokens or a small picture."""
    width = layer.kind.geometry(layer.base_layer)[0] * layer.kind.geometry(layer.base_layer)[3]
    signs = base_lock.signs(width, 2)
    if not isinstance(layer.kind, Conv2dKind):
        return signs.T.contiguous()
    base: Any = layer.base_layer
    size = 2 + max(k * d for k, d in zip(base.kernel_size, base.dilation, strict=True))
    columns = signs[None]
    return columns.repeat(1, 1, size * size // signs.shape[1] + 1)[..., : size * size].reshape(1, width, size, size)
