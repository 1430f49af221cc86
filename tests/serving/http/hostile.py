"""Uploads that are made to hurt: name -> the files of the request, out of a good adapter's folder."""

from __future__ import annotations

import io
import json
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Files = list[tuple[str, tuple[str, bytes]]]
Entry = tuple[str | zipfile.ZipInfo, bytes]


def of_folder(folder: Path) -> Files:
    """The two files of an adapter, as they are."""
    return [("files", (name, (folder / name).read_bytes())) for name in (CONFIG, WEIGHTS)]


def archive(*entries: Entry, packing: int = zipfile.ZIP_DEFLATED) -> Files:
    """A zip of these entries."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", packing) as opened, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a name that is there twice
        for name, content in entries:
            opened.writestr(name, content)
    return [("files", ("adapter.zip", file.getvalue()))]


def zipped(folder: Path, inside: str = "") -> Files:
    """A zip of an adapter's two files."""
    return archive(*good(folder, inside))


def good(folder: Path, inside: str = "") -> list[Entry]:
    return [(f"{inside}{name}", (folder / name).read_bytes()) for name in (CONFIG, WEIGHTS)]


def link(name: str, target: str) -> Entry:
    """A symbolic link, as zips of Unix hold it."""
    entry = zipfile.ZipInfo(name)
    entry.external_attr = 0o120777 << 16
    return entry, target.encode()


def two(config: bytes, weights: bytes) -> Files:
    return [("files", (CONFIG, config)), ("files", (WEIGHTS, weights))]


def config_with(folder: Path, **changes: object) -> bytes:
    """The config with other values, and without what protects it."""
    data = json.loads((folder / CONFIG).read_text())
    for name in ("base_lock", "canary", "checksum"):
        data.pop(name, None)
    return json.dumps(data | changes).encode()


def weights_of(folder: Path) -> bytes:
    return (folder / WEIGHTS).read_bytes()


def header(content: object, data: bytes = b"") -> bytes:
    """A safetensors file with this header."""
    text = json.dumps(content).encode()
    return struct.pack("<Q", len(text)) + text + data


def _patched(files: Files, at: bytes, offset: int, value: bytes) -> Files:
    """With other bytes at ``offset`` after the last ``at`` of the archive."""
    content = bytearray(files[0][1][1])
    place = content.rfind(at) + offset
    content[place : place + len(value)] = value
    return [("files", ("adapter.zip", bytes(content)))]


def _encrypted(folder: Path) -> Files:
    content = bytearray(zipped(folder)[0][1][1])
    for sign, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.find(sign) + offset] |= 1
    return [("files", ("adapter.zip", bytes(content)))]


def _with_nan(folder: Path) -> bytes:
    raw = bytearray(weights_of(folder))
    raw[-4:] = struct.pack("<f", float("nan"))
    return bytes(raw)


HOSTILE: dict[str, Callable[[Path], Files]] = {
    "nothing": lambda f: [("files", ("adapter.zip", b""))],
    "noise": lambda f: [("files", ("adapter.zip", bytes(range(256)) * 40))],
    "a zip cut short": lambda f: [("files", ("adapter.zip", zipped(f)[0][1][1][:-30]))],
    "a zip whose start is gone": lambda f: [("files", ("adapter.zip", zipped(f)[0][1][1][200:]))],
    "an empty zip": lambda f: archive(),
    "only the config": lambda f: archive(good(f)[0]),
    "only the weights": lambda f: archive(good(f)[1]),
    "a name that climbs": lambda f: archive(*good(f), ("../evil.txt", b"evil")),
    "the config climbs": lambda f: archive(("../adapter_config.json", good(f)[0][1]), good(f)[1]),
    "a name from the root": lambda f: archive(*good(f), ("/tmp/smidgen-evil.txt", b"evil")),
    "a Windows drive": lambda f: archive(*good(f), ("C:evil.txt", b"evil")),
    "backslashes": lambda f: archive(*good(f), ("..\\evil.txt", b"evil")),
    "a NUL in a name": lambda f: _nul(archive(*good(f), ("evil.txtXadapter.json", b"evil"))),
    "climbing inside a folder": lambda f: archive(*good(f, "a/"), ("a/../../evil.txt", b"evil")),
    "a link for the config": lambda f: archive(link(CONFIG, "/etc/passwd"), good(f)[1]),
    "a link beside": lambda f: archive(*good(f), link("card", "/etc/passwd")),
    "a pickle beside": lambda f: archive(*good(f), ("adapter_model.bin", b"\x80\x04.")),
    "a pickle for the weights": lambda f: archive(good(f)[0], ("adapter_model.bin", b"\x80\x04.")),
    "a chat template": lambda f: archive(*good(f), ("chat_template.jinja", b"{% for i in range(10) %}{% endfor %}")),
    "the config twice": lambda f: archive(good(f)[0], *good(f)),
    "two adapters": lambda f: archive(*good(f), *good(f, "text_encoder/")),
    "a thousand entries": lambda f: archive(*good(f), *((f"card{i}.md", b"") for i in range(1000))),
    "a lie about the entries": lambda f: _patched(zipped(f), b"PK\x05\x06", 8, struct.pack("<HH", 60000, 60000)),
    "a lie about the list's size": lambda f: _patched(zipped(f), b"PK\x05\x06", 12, struct.pack("<I", 2**31)),
    "a lie about the list's place": lambda f: _patched(zipped(f), b"PK\x05\x06", 16, struct.pack("<I", 2**31)),
    "a lie about a size": lambda f: _patched(zipped(f), b"PK\x01\x02", 24, struct.pack("<I", 10)),
    "zip64": lambda f: [("files", ("adapter.zip", _zip64(zipped(f)[0][1][1])))],
    "an encrypted entry": _encrypted,
    "packed by lzma": lambda f: archive(*good(f), packing=zipfile.ZIP_LZMA),
    "packed by bzip2": lambda f: archive(*good(f), packing=zipfile.ZIP_BZIP2),
    "a bomb for the weights": lambda f: archive(good(f)[0], (WEIGHTS, bytes(64 * 2**20))),
    "a bomb for the config": lambda f: archive((CONFIG, b" " * 8 * 2**20 + b"{}"), good(f)[1]),
    "a bomb that lies": lambda f: _patched(
        archive(good(f)[0], (WEIGHTS, bytes(64 * 2**20))), b"PK\x01\x02", 24, struct.pack("<I", 4096)
    ),
    "a header of 2 GB": lambda f: two(good(f)[0][1], struct.pack("<Q", 2**31) + b"{}"),
    "a header of 2**64": lambda f: two(good(f)[0][1], b"\xff" * 8 + b"{}"),
    "a header longer than the file": lambda f: two(good(f)[0][1], struct.pack("<Q", 1000) + b"{}"),
    "no header": lambda f: two(good(f)[0][1], b"1234"),
    "a header that is no JSON": lambda f: two(good(f)[0][1], struct.pack("<Q", 8) + b"not json"),
    "a header nested without end": lambda f: two(good(f)[0][1], struct.pack("<Q", 10**6) + b"[" * 10**6),
    "tensors that overlap": lambda f: two(
        good(f)[0][1],
        header({n: {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} for n in ("a", "b")}, bytes(16)),
    ),
    "a tensor larger than the file": lambda f: two(
        good(f)[0][1], header({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}, bytes(16))
    ),
    "tensors of nobody": lambda f: two(
        good(f)[0][1], header({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, bytes(16))
    ),
    "weights cut short": lambda f: two(good(f)[0][1], weights_of(f)[:-100]),
    "one bit is another": lambda f: two(good(f)[0][1], weights_of(f)[:-1] + bytes([weights_of(f)[-1] ^ 1])),
    "a number that is none": lambda f: two(config_with(f), _with_nan(f)),
    "a config that is no JSON": lambda f: two(b"{", weights_of(f)),
    "a config that is a list": lambda f: two(b"[]", weights_of(f)),
    "a config nested without end": lambda f: two(b'{"a":' * 10**5 + b"1" + b"}" * 10**5, weights_of(f)),
    "a config of endless digits": lambda f: two(b'{"r": ' + b"9" * 10**5 + b"}", weights_of(f)),
    "a config with a key twice": lambda f: two(b'{"r": 1, "r": 2}', weights_of(f)),
    "a config of Latin letters": lambda f: two('{"r": "é"}'.encode("latin-1"), weights_of(f)),
    "another base": lambda f: two(config_with(f, base_model_name_or_path="gpt2", task_type="CAUSAL_LM"), weights_of(f)),
    "a base on this disk": lambda f: two(config_with(f, base_model_name_or_path="/etc", task_type="CAUSAL_LM"), weights_of(f)),
    "an endless expression": lambda f: two(config_with(f, target_modules="(.*)*!"), weights_of(f)),
    "a rank beyond reason": lambda f: two(config_with(f, r=10**9), weights_of(f)),
    "a method there is not": lambda f: two(config_with(f, peft_type="EVIL"), weights_of(f)),
    "a file too many": lambda f: [*of_folder(f), ("files", ("evil.py", b"import os"))],
    "a file's name that climbs": lambda f: [("files", (f"../../{CONFIG}", good(f)[0][1])), of_folder(f)[1]],
    "the same file twice": lambda f: [of_folder(f)[0], *of_folder(f)],
    "a report that is no JSON": lambda f: [*of_folder(f), ("files", ("report.json", b"{"))],
    "a report with a base on this disk": lambda f: [
        *of_folder(f), ("files", ("report.json", b'{"kind": "instruction", "base": "/etc"}'))
    ],
}  # fmt: skip


def _nul(files: Files) -> Files:
    """The X in the names of an archive as a NUL, which its writer would not write."""
    return [("files", ("adapter.zip", files[0][1][1].replace(b"evil.txtX", b"evil.txt\0")))]


def _zip64(content: bytes) -> bytes:
    """With the record of an archive beyond 4 GB before its end."""
    end = content.rfind(b"PK\x05\x06")
    start, size = struct.unpack("<II", content[end + 16 : end + 20] + content[end + 12 : end + 16])
    record = struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, 2, 2, size, start)
    return content[:end] + record + struct.pack("<4sIQI", b"PK\x06\x07", 0, end, 1) + content[end:]
