"""Adapters as files: many small tensors packed into one tensor a name, so that a header costs bytes, not kilobytes.

A safetensors header spends about 160 bytes on each tensor; an adapter of 128 layers with 32 numbers each would be more
header than numbers. All tensors that share a name ("residual_delta") are therefore flattened and laid end to end in
the order of the sorted target names, which the config lists. Nothing else is in the file but modules_to_save.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Collection, Mapping
from math import prod

import numpy as np
import torch
from torch import Tensor

from smidgen.errors import AdapterFileError, did_you_mean

Layout = Mapping[str, Mapping[str, tuple[tuple[int, ...], torch.dtype]]]  # target -> tensor name -> (shape, dtype)
STORED = {"float32": torch.float32, "float16": torch.float16}
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
_PREFIXES = ("transform_", "residual_")


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


def cast(packed: Mapping[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """Packed tensors in the number format of the file; whole numbers (pins) stay.

    Raises:
        AdapterFileError: a number that fp16 cannot hold.
    """
    out = {k: v.to(STORED[dtype]) if v.is_floating_point() else v for k, v in packed.items()}
    for name, value in out.items():
        if value.is_floating_point() and bool(torch.isinf(value).any()) and bool(torch.isfinite(packed[name]).all()):
            raise AdapterFileError(
                f"{name} holds {float(packed[name].abs().max()):.3g}, more than float16 can ({torch.finfo(value.dtype).max:,.0f}); "
                "set store_dtype to 'float32'."
            )
    return out


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
