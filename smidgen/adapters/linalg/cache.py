"""Disk cache of decompositions, keyed by the content of the weight.

Factors that follow from the base weight are not stored in an adapter but recomputed at load; this makes the second load
cheap. One safetensors file an entry, written beside its final name and moved there, so that any number of processes may
share the folder. A cache is never a reason to fail: what cannot be read is recomputed, what cannot be written is not.

The folder is ``SMIDGEN_CACHE``, else ``~/.cache/smidgen/factors``; ``SMIDGEN_CACHE=off`` disables it.
"""

import hashlib
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from smidgen.adapters.atomic import new_file

VERSION = 2
"""Raised whenever an algorithm of this folder gives other factors than before."""

LIMIT = 4 * 1024**3
"""Bytes the folder may hold before the least recently used entries go."""

_STALE_SECONDS = 3600.0
_log = logging.getLogger(__name__)
_Factors = dict[str, Tensor]
_FACTORS = np.frombuffer(hashlib.shake_256(b"smidgen").digest(8 * 8192), dtype=np.int64) | 1


def cached(
    key_parts: tuple[object, ...],
    weight: Tensor,
    compute: Callable[[], _Factors],
    *,
    folder: Path | None = None,
    limit: int = LIMIT,
) -> _Factors:
    """``compute()``, or what it gave earlier for the same weight and key, on the weight's device.

    ``key_parts`` says everything but the weight that the factors depend on, as plain values: ("svd", rank, seed,
    tolerance). The weight enters with its bytes, shape and dtype. Entries are bit for bit what ``compute`` returned.

    Example:
        >>> w = torch.randn(8, 4)
        >>> f = cached(("qr",), w, lambda: dict(zip("qr", torch.linalg.qr(w))))
        >>> torch.allclose(f["q"] @ f["r"], w, atol=1e-6)
        True
    """
    folder = folder or cache_folder()
    if folder is None or weight.is_meta:
        return compute()
    path = folder / f"{weight_key(key_parts, weight)}.safetensors"
    found = _read(path)
    if found is None:
        found = compute()
        _write(path, found, limit)
    return {name: tensor.to(weight.device) for name, tensor in found.items()}


def cache_folder() -> Path | None:
    """Where entries live, or None when the cache is switched off."""
    chosen = os.environ.get("SMIDGEN_CACHE", "")
    if chosen.lower() == "off":
        return None
    return Path(chosen).expanduser() if chosen else Path("~/.cache/smidgen/factors").expanduser()


def weight_key(key_parts: tuple[object, ...], weight: Tensor) -> str:
    """sha256 over the key, and the weight's shape, dtype and content (read in place, not copied, on the CPU).

    Example:
        >>> w = torch.zeros(2, 3)
        >>> weight_key(("svd", 1), w) == weight_key(("svd", 1), w.clone())
        True
    """
    head = repr((VERSION, key_parts, tuple(weight.shape), str(weight.dtype)))
    return hashlib.sha256(head.encode() + _content(weight)).hexdigest()


def _content(tensor: Tensor) -> bytes:
    """32 bytes that follow from every bit of a tensor: each block of 8,192 words times fixed odd numbers modulo 2^64,
    then sha256 over the blocks' sums. Five times as fast as sha256 over all bytes; not meant against forgers, who
    could write into the folder anyway.
    """
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    whole = data.size - data.size % _FACTORS.nbytes
    sums = data[:whole].view(np.int64).reshape(-1, _FACTORS.size) @ _FACTORS
    return hashlib.sha256(sums.tobytes() + data[whole:].tobytes()).digest()


def _read(path: Path) -> _Factors | None:
    """The entry, or None when there is none or it does not hold what was written."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            # copied: a mapping of the file would kill the process once somebody truncates it in place
            found = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)
            sums = file.metadata() or {}
        if any(sums.get(name) != _checksum(tensor) for name, tensor in found.items()) or len(sums) != len(found):
            raise SafetensorError("checksum")
        os.utime(path)
    except PermissionError:  # the time stamp of a read-only cache cannot be renewed, its entries are fine
        pass
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:  # RuntimeError: evicted while being mapped
        _log.warning("cache entry %s is unreadable (%s): recomputed", path.name, error)
        return None
    return found


def _write(path: Path, factors: _Factors, limit: int) -> None:
    """Write beside, then move: readers see all of an entry or none of it."""
    plain = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in factors.items()
    }
    try:
        with new_file(path, durable=False) as beside:
            save_file(plain, beside, metadata={name: _checksum(tensor) for name, tensor in plain.items()})
        _evict(path.parent, limit)
    except (OSError, SafetensorError) as error:
        _log.warning("decomposition not cached (%s)", error)


def _evict(folder: Path, limit: int) -> None:
    """Remove the least recently used entries until the rest fit, and what crashed writers left behind."""
    entries, now = [], time.time()
    for item in os.scandir(folder):
        try:
            stat = item.stat()
        except OSError:  # another process was faster
            continue
        if item.name.endswith(".safetensors"):
            entries.append((stat.st_mtime, stat.st_size, item.path))
        elif item.name.endswith(".tmp") and now - stat.st_mtime > _STALE_SECONDS:
            _remove(Path(item.path))
    excess = sum(size for _, size, _ in entries) - limit
    for _, size, path in sorted(entries):
        if excess <= 0:
            return
        _remove(Path(path))
        excess -= size


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:  # Windows: another process has it mapped
        _log.debug("cache file %s stays (%s)", path.name, error)


def _checksum(tensor: Tensor) -> str:
    return _content(tensor).hex()
