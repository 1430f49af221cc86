"""A LoRA as a GGUF file, for llama.cpp and what is built on it: ``--lora file.gguf`` beside a base that was converted to GGUF.

    general.type = adapter, general.architecture, adapter.type = lora, adapter.lora.alpha; <tensor>.lora_a [r, cols], .lora_b [rows, r]

Tensors have the names of the ``gguf`` package's own map. llama.cpp turns neighbours in a head together where transformers turns its two
halves, so rows of q and k are in another order in some families. One alpha is for all ranks: what it makes wrong is made good in b.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from smidgen.adapters.atomic import flush
from smidgen.adapters.checkpoint.files import check_file
from smidgen.adapters.checkpoint.formats.format import (
    Content,
    Format,
    Lora,
    Place,
    Source,
    as_weights,
    at_one_alpha,
    both,
    check_change,
    check_layers,
    sides,
)  # fmt: skip
from smidgen.errors import AdapterFileError, MissingExtraError, did_you_mean

ENDINGS = {"lora_a": "a", "lora_b": "b"}
WEIGHT = ".weight"


class Architecture(NamedTuple):
    """What llama.cpp makes of a family: its name there, and whether rows of q and k change places."""

    name: str
    paired: bool = False


ARCHITECTURES = {  # transformers' name of a family whose linear layers llama.cpp takes one for one, not joined or split
    "llama": Architecture("llama", True),
    "mistral": Architecture("llama", True),
    "granite": Architecture("granite", True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "gemma": Architecture("gemma"),
    "gemma2": Architecture("gemma2"),
    "gemma3_text": Architecture("gemma3"),
    "phi3": Architecture("phi3"),
    "olmo2": Architecture("olmo2"),
    "smollm3": Architecture("smollm3", True),
    "starcoder2": Architecture("starcoder2"),
}


class Gguf(Format):
    """One file for a language model."""

    name = "gguf"
    summary = "a GGUF LoRA of a language model, for llama.cpp and what is built on it"
    holds = "lora"
    task = "CAUSAL_LM"
    file = "{name}.gguf"

    def refusal(self, place: Place, source: Source) -> str | None:
        if why := no_language_model(place, source, "llama.cpp"):
            return why
        name = tensor_name(place, source)
        if name is None:
            return f"llama.cpp has no tensor for it in a {_architecture(source).name} model"
        if name == "output.weight" and getattr(source.model.config, "tie_word_embeddings", False):
            return "its weight is the embedding's, of which llama.cpp has no second one; --to merged holds it"
        return None

    def write(self, content: Content, source: Source, path: Path) -> None:
        writer = _gguf().GGUFWriter(path, _architecture(source).name)
        alpha, scaled = at_one_alpha(content)
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)
        for key, text in (source.header or {}).items():
            writer.add_string(key, text)
        for place, lora in scaled.items():
            name, (a, b) = tensor_name(place, source), as_weights(in_order(lora, place, source), place)
            writer.add_tensor(f"{name}.lora_a", a.float().numpy())
            writer.add_tensor(f"{name}.lora_b", b.float().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        flush(path)

    def check(self, content: Content, source: Source, path: Path) -> int:
        """llama.cpp wants its own words for the kind of file, the architecture of the model, a pair for each name, and the name in the model."""
        fields, tensors = _read(path)
        _check_kind(fields, path)
        if fields.get("general.architecture") != _architecture(source).name:
            raise AdapterFileError(
                f"{path.name} is for {fields.get('general.architecture')!r}, the model is {_architecture(source).name!r}."
            )
        found = sides(tensors, ENDINGS, path)
        wanted = {str(tensor_name(place, source)): place for place in content}
        count = check_layers(found, wanted, path, "llama.cpp")
        for name, place in wanted.items():
            a, b = both(name, found[name], path)
            there = Lora(b, a, _scale(fields, len(a)))
            check_change(place, there, in_order(content[place], place, source), path)
        return count

    @staticmethod
    def read(path: Path) -> dict[str, Lora]:
        """The LoRA in a file by llama.cpp's tensors, whose rows are in llama.cpp's order.

        Raises:
            AdapterFileError: a model, another kind of adapter, damage.
            MissingExtraError: gguf is not installed.
        """
        fields, tensors = _read(path)
        _check_kind(fields, path)
        found = {}
        for name, own in sides(tensors, ENDINGS, path).items():
            a, b = both(name, own, path)
            found[name] = Lora(b, a, _scale(fields, len(a)))
        return found


def no_language_model(place: Place, source: Source, reader: str) -> str | None:
    """Why a layer is of no language model that llama.cpp and mlx-lm take layer for layer; None where it is."""
    kind = getattr(getattr(source.model, "config", None), "model_type", None)
    if place.component or kind not in ARCHITECTURES:
        hint = did_you_mean(str(kind), ARCHITECTURES)
        what = f"a {kind}" if kind and not place.component else "no language model"
        return f"it is of {what}; known to be the same layer for layer in {reader}: {', '.join(ARCHITECTURES)}.{hint}"
    if place.kind != "linear":
        return f"{reader} has no LoRA for {place.kind} layers; --to merged holds it"
    return None


def tensor_name(place: Place, source: Source) -> str | None:
    """The name of a layer's weight in llama.cpp, by the map of the gguf package; None where it has none."""
    gguf = _gguf()
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == _architecture(source).name)
    names = gguf.get_tensor_name_map(kind, source.model.config.num_hidden_layers)
    found = names.get_name(place.layer)
    return None if found is None else f"{found}{WEIGHT}"


def in_order(lora: Lora, place: Place, source: Source, back: bool = False) -> Lora:
    """The factors of a layer with rows in llama.cpp's order; with ``back``, of llama.cpp's in ours."""
    config, end = source.model.config, place.layer.rpartition(".")[2]
    if not _architecture(source).paired or end not in ("q_proj", "k_proj"):
        return lora
    heads = config.num_attention_heads if end == "q_proj" else config.num_key_value_heads
    rows = torch.arange(len(lora.b)).reshape(heads, 2, -1).transpose(1, 2).flatten()
    return lora._replace(b=lora.b[rows.argsort() if back else rows])


def _architecture(source: Source) -> Architecture:
    return ARCHITECTURES[source.model.config.model_type]


def _scale(fields: dict[str, Any], r: int) -> float:
    """What llama.cpp multiplies with: alpha / rank, and nothing where alpha is 0 or not there."""
    alpha = float(fields.get("adapter.lora.alpha") or 0)
    return alpha / r if alpha else 1.0


def _check_kind(fields: dict[str, Any], path: Path) -> None:
    kind = fields.get("general.type"), fields.get("adapter.type")
    if kind != ("adapter", "lora"):
        raise AdapterFileError(
            f"{path.name} is no LoRA for llama.cpp: general.type is {kind[0]!r}, adapter.type {kind[1]!r}."
        )


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The plain facts and the tensors of a GGUF file.

    Raises:
        AdapterFileError: damage.
    """
    gguf = _gguf()
    check_file(path)
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items() if len(field.types) == 1}
        tensors = {
            one.name: torch.from_numpy(gguf.dequantize(one.data, one.tensor_type).copy()) for one in reader.tensors
        }
    except (
        OSError,
        ValueError,
        IndexError,
        KeyError,
        TypeError,
        NotImplementedError,
        OverflowError,
        MemoryError,
    ) as error:
        raise AdapterFileError(f"{path} is truncated or no GGUF file ({error}).") from error
    return fields, tensors


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise MissingExtraError("GGUF files need the package gguf: pip install 'smidgen[gguf]'.") from error
    return gguf
