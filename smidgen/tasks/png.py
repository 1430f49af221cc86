"""The one writer of PNG files. What Smidgen drew or plotted says so in the file, with how it was made.

A PNG carries three text chunks: ``Software`` is ``smidgen`` and its version, ``smidgen`` holds every fact as JSON, and
``parameters`` the settings of a drawn picture as other tools write and read them (the form of AUTOMATIC1111's web UI).
What is drawn to be trained on (``smidgen subject``, ``smidgen pairs``, packaged data) carries none: it is data.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smidgen.adapters.atomic import new_file
from smidgen.adapters.checkpoint.files import CONFIG_NAME, WEIGHTS_NAME, read_config
from smidgen.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.PngImagePlugin import PngInfo

SOFTWARE, FACTS, PARAMETERS = "Software", "smidgen", "parameters"
OURS = "smidgen "  # what Software starts with in every picture of ours
_LIBRARIES = ("torch", "peft", "diffusers", "transformers")
_WORDS = {"steps": "Steps", "guidance": "CFG scale", "seed": "Seed", "size": "Size", "base": "Model"}


def write_png(image: Image, path: Path, facts: Mapping[str, Any] | None = None) -> Path:
    """Write ``image`` as a PNG in one step, with ``facts`` on how it was made; returns ``path``.

    Args:
        image: any Pillow image that PNG can hold.
        path: the file, put in place when whole.
        facts: plain values. ``prompt``, ``negative_prompt``, ``seed``, ``steps``, ``guidance``, ``base`` and ``adapter``
            (name, method, fingerprint) are also written as other tools read them. Versions are added.
    """
    with new_file(path) as beside:
        image.save(beside, "PNG", pnginfo=_chunks(image, facts or {}))
    return path


def png_bytes(image: Image, facts: Mapping[str, Any] | None = None) -> bytes:
    """The file that `write_png` writes."""
    file = io.BytesIO()
    image.save(file, "PNG", pnginfo=_chunks(image, facts or {}))
    return file.getvalue()


def _chunks(image: Image, facts: Mapping[str, Any]) -> PngInfo:
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    known = {"size": f"{image.width}x{image.height}", **facts, "versions": _versions()}
    chunks.add_text(SOFTWARE, OURS + known["versions"]["smidgen"])
    chunks.add_text(FACTS, json.dumps(known, default=str))  # ASCII, so that lone surrogates pass
    if "prompt" in known:
        chunks.add_text(PARAMETERS, _writable(_parameters(known)))
    return chunks


def write_figure(figure: Any, path: Path, facts: Mapping[str, Any] | None = None) -> Path:
    """Write a matplotlib figure as `write_png` does."""
    import numpy
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return write_png(Image.fromarray(numpy.asarray(canvas.buffer_rgba())), path, facts)


def is_ours(image: Image) -> bool:
    """Did Smidgen draw or plot this opened picture? Then it is not something to train on."""
    return str(image.info.get(SOFTWARE, "")).startswith(OURS)


def written_by_smidgen(path: Path) -> bool:
    """`is_ours` of a file, by its first bytes: what cannot be read is not."""
    try:
        with path.open("rb") as file:
            return f"{SOFTWARE}\0{OURS}".encode() in file.read(8192)  # it stands before the pixels
    except OSError:
        return False


def read_facts(path: Path) -> dict[str, Any]:
    """What a picture of ours says of itself; DataError for one that is not ours, or is no picture."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            ours, text = is_ours(image), str(image.info.get(FACTS, ""))
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{path} cannot be read as a picture: {error}.") from error
    if not ours:
        raise DataError(f"{path} does not say how it was made: it is no picture of Smidgen's, or its text was removed.")
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: what it says of itself is damaged.") from error
    if not isinstance(facts, dict):
        raise DataError(f"{path}: what it says of itself is damaged.")
    return facts


def about_adapter(folder: Path, method: str | None = None) -> dict[str, str]:
    """An adapter in a picture's facts: name, method, and the start of its weights file's SHA-256."""
    weights = folder / WEIGHTS_NAME
    if method is None and (folder / CONFIG_NAME).is_file():
        config = read_config(folder)
        method = config.get("method") or config.get("peft_type")
    told = {"name": folder.absolute().name} | ({"method": str(method)} if method else {})
    if weights.is_file():
        told["fingerprint"] = hashlib.sha256(weights.read_bytes()).hexdigest()[:12]
    return told


def _parameters(facts: Mapping[str, Any]) -> str:
    """Prompt, negative prompt, and ``Name: value, ...`` in one line."""
    adapter = facts.get("adapter") or {}
    pairs = [f"{word}: {_quoted(facts[key])}" for key, word in _WORDS.items() if facts.get(key) is not None]
    if adapter:
        pairs += [f"Lora hashes: {json.dumps(adapter['name'] + ': ' + adapter.get('fingerprint', ''))}"]
    pairs += [f"Version: {OURS}{facts['versions']['smidgen']}"]
    negative = facts.get("negative_prompt")
    return "\n".join([str(facts["prompt"]), *([f"Negative prompt: {negative}"] if negative else []), ", ".join(pairs)])


def _quoted(value: Any) -> str:
    """A value as it stands in the line of settings: in quotes where it holds a separator."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(sign in text for sign in ',:\n"') else text


def _writable(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8").replace("\0", " ")


def _versions() -> dict[str, str]:
    found = {}
    for name in ("smidgen", *_LIBRARIES):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed" if name != "smidgen" else "unknown"
    return found
