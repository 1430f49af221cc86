"""What an adapter takes on the disk, and what of it is the head's."""

import re
from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save

CONFIGS = ("adapter_config.json", "config.json")


def disk_bytes(folder: Path, heads: Sequence[str]) -> dict[str, int]:
    """Bytes of a saved adapter or control, by part.

    ``file`` is its safetensors file written again without the tensors of ``heads``, ``config`` its config file,
    ``adapter`` both, ``head`` what the heads add to the file. A linear probe has nothing but its head.
    """
    found = {"file": 0, "config": 0, "head": 0}
    for path in sorted(folder.glob("*.safetensors")):
        bare = _without(path, heads)
        found["file"] += bare
        found["head"] += path.stat().st_size - bare
    if found["file"]:
        found["config"] = sum((folder / name).stat().st_size for name in CONFIGS if (folder / name).is_file())
    return found | {"adapter": found["file"] + found["config"]}


def _without(path: Path, heads: Sequence[str]) -> int:
    """Size of the file without the tensors of ``heads``; 0 when nothing else is in it."""
    inside = [re.compile(rf"(^|\.){re.escape(name)}\.") for name in heads]
    with safe_open(path, "pt") as file:
        names = list(file.keys())
        kept = [name for name in names if not any(pattern.search(name) for pattern in inside)]
        if not kept:
            return 0
        if len(kept) == len(names):
            return path.stat().st_size
        tensors, metadata = {name: file.get_tensor(name) for name in kept}, file.metadata()
    return len(save(tensors, metadata))
