"""Adapters as files: many small tensors packed into one tensor a name, so that a header costs bytes, not kilobytes.

A safetensors header spends about 160 bytes on each tensor; an adapter of 128 layers with 32 numbers each would be more
header than numbers. All tensors that share a name ("residual_delta") are therefore flattened and laid end to end in
the order of the sorted target names, which the config lists. Nothing else is in the file but modules_to_save.

In int8 and int4 a packed tensor is one tensor of bytes: the codes, in int4 two to a byte, the first in the lower half, then a
bfloat16 scale for each ``GROUP`` of consecutive numbers (the last group may be shorter). number = code x scale, codes run from -127
to 127 or from -7 to 7; -8 fills the last half byte of an odd count and is nothing else. The scale is, of a few, the one that the
group loses least by: in int4 a group's largest number may be cut by up to a fifth for the sake of the others, which is 7 % less
in all. The largest always has the largest code, so that what was rounded once stays as it is, and bfloat16 has the range of
float32, so that no number is too large or too small. Scales in a tensor of their own would cost 75 bytes of header a name.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Collection, Mapping
from math import prod
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from smidgen.errors import AdapterFileError, did_you_mean

Layout = Mapping[str, Mapping[str, tuple[tuple[int, ...], torch.dtype]]]  # target -> tensor name -> (shape, dtype)


class Code(NamedTuple):
    """A number format of whole numbers: codes to a byte, the largest code, and what it may stand for, in shares of a group's
    largest number."""

    per_byte: int
    most: int
    shares: tuple[float, ...]


FLOATS = {"float32": torch.float32, "float16": torch.float16}
CODES = {"int8": Code(1, 127, (1.0,)), "int4": Code(2, 7, (1.0, 0.95, 0.9, 0.85, 0.8))}
STORED = (*FLOATS, *CODES)  # what store_dtype may be
GROUP = 64  # of half as many each rounding is 9 % less, but their scales take what a longer code would make 16 %
HALVES = "float16"  # of what is stored beside codes and is no packed number: heads, factors
_SCALE = torch.bfloat16
_PAD = -8
_FLOATS = frozenset((torch.float64, torch.float32, torch.float16, torch.bfloat16))
_WHOLE = frozenset(
    (
        torch.bool,
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.uint16,
        torch.uint32,
        torch.uint64,
    )
)
_MAX_TIES = 2**22  # bytes
_PREFIXES = ("transform_", "residual_", "output_")


def is_packed(key: str) -> bool:
    """Whether a key of an adapter file belongs to the packed tensors (and not to modules_to_save)."""
    return "." not in key and key.startswith(_PREFIXES)


def plain_keys(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file with packed names as they are, where transformers put ``base_model.model.`` before them."""
    short = {key: key.removeprefix("base_model.model.") for key in tensors}
    return {short[key] if is_packed(short[key]) else key: value for key, value in tensors.items()}


def pack(tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """target -> name -> tensor, laid end to end: name -> one flat tensor.

    Example:
        >>> pack({"b": {"residual_delta": torch.ones(2)}, "a": {"residual_delta": torch.zeros(1)}})
        {'residual_delta': tensor([0., 1., 1.])}
    """
    names = sorted({name for own in tensors.values() for name in own})
    return {
        name: torch.cat([tensors[t][name].detach().flatten().cpu() for t in sorted(tensors) if name in tensors[t]])
        for name in names
    }


def encode(packed: Mapping[str, Tensor], dtype: str, frozen: Collection[str] = ()) -> dict[str, Tensor]:
    """Packed tensors in the number format of the file; whole numbers (pins) stay, and factors, which are ``frozen``, are halves
    beside codes.

    Raises:
        AdapterFileError: a number that fp16 cannot hold.

    Example:
        >>> encode({"residual_delta": torch.tensor([7.0, -1.2, 0.0])}, "int4")["residual_delta"].tolist()[:2]
        [247, 128]
        >>> decode(encode({"residual_delta": torch.tensor([7.0, -1.2, 0.0])}, "int4"), "int4", "here")
        {'residual_delta': tensor([ 7., -1.,  0.])}
    """
    out = {}
    for name, value in packed.items():
        if not value.is_floating_point():
            out[name] = value
        elif dtype in CODES and name not in frozen:
            out[name] = _coded(value.float(), CODES[dtype])
        else:
            out[name] = _cast(name, value, FLOATS.get(dtype, FLOATS[HALVES]))
    return out


def _cast(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    out = value.to(dtype)
    if bool(torch.isinf(out).any()) and bool(torch.isfinite(value).all()):
        raise AdapterFileError(
            f"{name} holds {float(value.abs().max()):.3g}, more than float16 can ({torch.finfo(dtype).max:,.0f}); "
            "set store_dtype to 'float32'."
        )
    return out


def decode(tensors: Mapping[str, Tensor], dtype: str, where: str) -> dict[str, Tensor]:
    """Inverse of :func:`encode` for the tensors of a file, heads among them: codes become fp32 numbers, all else stays.

    Raises:
        AdapterFileError: bytes that are no codes with their scales, naming the tensor and what is wrong.
    """
    if dtype not in CODES:
        return dict(tensors)
    return {
        name: _decoded(name, value, dtype, where) if is_packed(name) and value.dtype in (torch.uint8, torch.int8) else value
        for name, value in tensors.items()
    }  # fmt: skip


def _coded(values: Tensor, code: Code) -> Tensor:
    """Numbers [n] as bytes: their codes, then their scales."""
    groups = _groups(values)
    scales = _scales(groups, code)
    codes = _steps(groups, scales.float(), code).to(torch.int8).flatten()[: len(values)]
    if code.per_byte == 2:
        codes = torch.cat([codes, codes.new_full((len(codes) % 2,), _PAD)]).view(torch.uint8)
        codes = (codes[::2] & 15) | (codes[1::2] & 15) << 4
    return torch.cat([codes.view(torch.uint8), scales.view(torch.uint8)])


def _scales(groups: Tensor, code: Code) -> Tensor:
    """Of each group [groups, GROUP] the scale [groups] that loses least of it; of equals that of its largest number."""
    largest = groups.abs().amax(1)
    unit = groups / torch.where(largest == 0, 1, largest)[:, None]  # no square of these is too large
    best, least = torch.zeros_like(largest, dtype=_SCALE), torch.full_like(largest, torch.inf)
    for share in code.shares:
        scales = (share * largest / code.most).to(_SCALE)
        scales[scales < torch.finfo(_SCALE).tiny] = 0  # below, bfloat16 has few digits, then none
        step = scales.float() / torch.where(largest == 0, 1, largest)
        lost = (unit - _steps(unit, step, code) * step[:, None]).square().sum(1)
        best, least = torch.where(lost < least, scales, best), torch.minimum(lost, least)
    return best


def _steps(groups: Tensor, step: Tensor, code: Code) -> Tensor:
    """The codes of numbers [groups, n] in steps [groups]."""
    return (groups / torch.where(step == 0, torch.inf, step)[:, None]).round().clamp(-code.most, code.most)


def _decoded(name: str, raw: Tensor, dtype: str, where: str) -> Tensor:
    """Numbers [n] from bytes."""

    def damaged(what: str) -> AdapterFileError:
        return AdapterFileError(
            f"{where}: tensor {name!r} {what}, which {dtype} numbers do not have; the file was damaged or changed."
        )

    code = CODES[dtype]
    if raw.dim() != 1 or raw.dtype != torch.uint8:
        raise damaged(f"is {str(raw.dtype).removeprefix('torch.')} of shape {tuple(raw.shape)}")
    whole = GROUP // code.per_byte + _SCALE.itemsize  # bytes of a group
    count = -(-len(raw) // whole)
    if 0 < len(raw) % whole <= _SCALE.itemsize:
        raise damaged(f"has {len(raw)} bytes")
    at = len(raw) - count * _SCALE.itemsize
    codes, scales = raw[:at].clone(), raw[at:].clone().view(_SCALE).float()
    if not bool((torch.isfinite(scales) & (scales >= 0)).all()):
        raise damaged("holds scales that are negative, NaN or infinite")
    if code.per_byte == 2:
        halves = torch.stack([codes & 15, codes >> 4], 1).flatten().to(torch.int8)
        codes = torch.where(halves > code.most, halves - 16, halves)
        codes = codes[:-1] if len(codes) and int(codes[-1]) == _PAD else codes
    values = codes.view(torch.int8).float()
    if bool((values < -code.most).any()):
        raise damaged(f"holds the code {int(values.min())} in place of a number")
    return (_groups(values) * scales[:, None]).flatten()[: len(values)]


def _groups(values: Tensor) -> Tensor:
    """[groups, GROUP] of numbers [n], zeros after the last."""
    count = -(-len(values) // GROUP)
    return torch.nn.functional.pad(values, (0, count * GROUP - len(values))).view(count, GROUP)


def rounded_by(values: Tensor, dtype: str) -> Tensor:
    """How far the numbers that were written as codes may lie from those that come back, ``values`` [n], in fp64: half a step, and
    for what has the largest code what it may have been cut by."""
    code, groups = CODES[dtype], _groups(values.double()).abs()
    largest = groups.amax(1, keepdim=True)
    cut = torch.where(groups == largest, (1 / min(code.shares) - 1) * largest, 0)
    vanished = 1.01 * code.most * torch.finfo(_SCALE).tiny
    return (0.501 * largest / code.most + cut + vanished).flatten()[: len(values)]


def size(count: int, dtype: str) -> int:
    """Bytes of ``count`` packed numbers in a file."""
    if dtype in FLOATS:
        return count * FLOATS[dtype].itemsize
    return -(-count // CODES[dtype].per_byte) + -(-count // GROUP) * _SCALE.itemsize


def encode_ties(ties: Tensor) -> str:
    """Ties (int32, any length) as text for a config."""
    return base64.b64encode(zlib.compress(ties.cpu().numpy().astype("<i4").tobytes(), 9)).decode()


def decode_ties(text: str, target: str) -> Tensor:
    """Inverse of :func:`encode_ties`.

    Raises:
        AdapterFileError: damaged.
    """
    try:
        unpacker = zlib.decompressobj()
        raw = unpacker.decompress(base64.b64decode(text, validate=True), _MAX_TIES)
        if not unpacker.eof:
            raise ValueError("cut short or endless")
        return torch.from_numpy(np.frombuffer(raw, dtype="<i4").astype(np.int32))
    except (ValueError, zlib.error) as error:
        raise AdapterFileError(f"ties of {target!r} in adapter_config.json are damaged ({error}).") from error


def unpack(
    packed: Mapping[str, Tensor], layout: Layout, where: str = "the adapter file"
) -> dict[str, dict[str, Tensor]]:
    """Inverse of :func:`pack` for a known layout; whole numbers come as int32.

    Raises:
        AdapterFileError: missing, extra, wrongly sized, wrongly typed or non-finite tensors, by name.
    """
    expected: dict[str, int] = {}
    dtypes: dict[str, torch.dtype] = {}
    for own in layout.values():
        for name, (shape, dtype) in own.items():
            expected[name] = expected.get(name, 0) + prod(shape)
            dtypes[name] = dtype
    check_names(packed, expected, where)
    for name, numel in expected.items():
        check_tensor(name, packed[name], (numel,), dtypes[name], where)
    out: dict[str, dict[str, Tensor]] = {}
    at = dict.fromkeys(expected, 0)
    for target in sorted(layout):
        out[target] = {}
        for name, (shape, _) in layout[target].items():
            n = prod(shape)
            value = packed[name][at[name] : at[name] + n].reshape(shape)
            out[target][name] = value if value.is_floating_point() else value.to(torch.int32)
            at[name] += n
    return out


def check_names(packed: Collection[str], expected: Collection[str], where: str) -> None:
    """The tensors of a file must be exactly those that its config calls for.

    Raises:
        AdapterFileError: naming the missing and the unexpected ones.
    """
    missing, extra = sorted(set(expected) - set(packed)), sorted(set(packed) - set(expected))
    if missing or extra:
        hints = "".join(did_you_mean(name, extra) for name in missing[:1])
        raise AdapterFileError(
            f"{where} does not hold the tensors its config calls for: missing {missing or 'none'}, "
            f"unexpected {extra or 'none'}.{hints} The file and adapter_config.json must be from one save."
        )


def check_tensor(name: str, value: Tensor, shape: tuple[int, ...], dtype: torch.dtype, where: str) -> None:
    """Shape, kind of number and finiteness of one stored tensor.

    Raises:
        AdapterFileError: naming the tensor, what was found and what would fit.
    """
    if tuple(value.shape) != shape:
        raise AdapterFileError(
            f"{where}: tensor {name!r} has shape {tuple(value.shape)}, this base model and config call for {shape}. "
            "The base has other layers or widths than the one the adapter was made for, or the file was changed."
        )
    if (value.dtype in _FLOATS) != dtype.is_floating_point or not (value.dtype in _FLOATS or value.dtype in _WHOLE):
        raise AdapterFileError(f"{where}: tensor {name!r} is {value.dtype}, expected {dtype}.")
    if value.dtype.is_floating_point and not bool(torch.isfinite(value).all()):
        bad = int((~torch.isfinite(value)).sum())
        raise AdapterFileError(
            f"{where}: tensor {name!r} holds {bad} NaN or infinite numbers of {value.numel()}. "
            "The training run diverged or the file is damaged; use an earlier checkpoint."
        )
