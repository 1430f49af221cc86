"""The kinds of hosts: a language model, an encoder with or without a head, a base that draws."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smidgen.bases import packaged
from smidgen.bases.embedded import FOLDERS
from smidgen.bases.families import load_base, locate, pipeline_class
from smidgen.bases.origin import TEMPLATE
from smidgen.bases.packaged import debug
from smidgen.bases.pipelines import default_device
from smidgen.bases.protocol import sides
from smidgen.bases.single_file import is_single_file
from smidgen.bases.transformers import (
    AUTO,
    Head,
    image_statistics,
    load_classifier,
    load_config,
    load_language_model,
    load_tokenizer,
)
from smidgen.errors import ConfigError, DataError, shown
from smidgen.serving.hosts import Host
from smidgen.serving.image_batching import ImageBatch
from smidgen.serving.jobs import Batch
from smidgen.serving.reading import ClassifyBatch, EmbedBatch
from smidgen.serving.requests import ClassifyRequest, EmbedRequest, TextRequest
from smidgen.serving.residents import Residents
from smidgen.serving.shelf import Entry
from smidgen.serving.text_batching import Prompt, TextBatch, check_model, prompt_ids
from smidgen.tasks.data.pictures import read_pixels
from smidgen.tasks.image_classification.task import choose_resolution, needs_interpolation
from smidgen.training.ranges import check_value

TEMPLATE_BYTES = 2**16
SEEDS = 2**31


def fresh_seed(seed: int | None) -> int:
    """A seed, taken by chance where none is given."""
    return random.randrange(SEEDS) if seed is None else seed


def check_request(**values: Any) -> None:
    """Refuses values that are no numbers of their settings.

    Raises:
        ConfigError: naming the first.
    """
    for name, value in values.items():
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{name} is a number, not {shown(value)}.")
        if name in ("max_new_tokens", "seed", "inference_steps") and not isinstance(value, int):
            raise ConfigError(f"{name} is a whole number, not {shown(value)}.")
        check_value(name, value)


class LanguageHost(Host):
    """A causal language model: goes on from texts, and embeds them."""

    verbs = ("generate", "embed")

    def __init__(self, name: str, *args: Any) -> None:
        super().__init__(name, *args)
        self.tokenizer = load_tokenizer(name)
        self._most = getattr(load_config(name), "max_position_embeddings", None)
        self._lock = threading.Lock()  # of the tokenizer

    def load(self) -> tuple[Residents, dict[str, Batch]]:
        base = load_language_model(self.name, self.precision, None)
        model = base.model.to(default_device()).eval().requires_grad_(False)
        check_model(model, self.name)
        self.fingerprint = base.fingerprint()
        residents = Residents(model)
        own = model.generation_config.eos_token_id
        ends = [*(own if isinstance(own, list) else [own]), self.tokenizer.eos_token_id]
        pad = self.tokenizer.pad_token_id
        return residents, {
            "generate": TextBatch(model, self.tokenizer, residents, [end for end in ends if end is not None], pad),
            "embed": EmbedBatch(model.base_model, self.tokenizer, residents),
        }

    def prepare(self, verb: str, request: Any, entries: Sequence[tuple[Entry, float]]) -> Any:
        if verb == "embed":
            return _text_row(self.tokenizer, self._lock, request.text, None, self._most)
        return self._prompt(request, entries)

    def _prompt(self, request: TextRequest, entries: Sequence[tuple[Entry, float]]) -> Prompt:
        check_request(
            max_new_tokens=request.max_tokens, temperature=request.temperature, top_p=request.top_p, seed=request.seed
        )
        if any(not isinstance(stop, str) or not stop for stop in request.stop):
            raise ConfigError(f"stop holds texts that are not empty; got {shown(request.stop)}.")
        with self._lock:
            ids = prompt_ids(self.tokenizer, request.prompt, _template(entries))
        room = 10**6 if self._most is None else self._most - len(ids)
        if room < 1:
            raise DataError(f"The prompt is {len(ids):,} tokens long, and {self.name} reads {self._most:,}: say less.")
        return Prompt(
            ids, room if request.max_tokens is None else min(room, request.max_tokens), fresh_seed(request.seed)
        )


def _template(entries: Sequence[tuple[Entry, float]]) -> str | None:
    """The chat template of the first adapter that brings one."""
    for entry, _ in entries:
        file = entry.folder / TEMPLATE
        if file.is_file():
            if file.stat().st_size > TEMPLATE_BYTES:
                raise ConfigError(f"The chat template of {entry.name!r} has more than {TEMPLATE_BYTES:,} bytes.")
            return file.read_text(encoding="utf-8", errors="replace")
    return None


def _text_row(
    tokenizer: Any, lock: Any, text: Any, pair: str | None, most: int | None, cut: bool = False
) -> dict[str, list[int]]:
    """A text as a row of the tokenizer."""
    if not isinstance(text, str) or not isinstance(pair, str | None):
        raise DataError(f"A text is asked for, not {shown(text)}.")
    options = {"truncation": True, "max_length": most} if cut else {}
    with lock:
        row = dict(tokenizer(text, pair, verbose=False, **options))
    length = len(row["input_ids"])
    if not length:
        raise DataError("The text has no tokens.")
    if most is not None and length > most:
        raise DataError(f"The text is {length:,} tokens long, and the model reads {most:,}: say less.")
    return {name: value for name, value in row.items() if name in tokenizer.model_input_names}


class EncoderHost(Host):
    """A base that reads, with heads of so many classes: sorts by the heads of adapters, and embeds texts.

    Args:
        task: ``text-classification`` or ``image-classification``.
        head: as many classes, and of the kind, as those of the adapters.
        weights: of the same base's parameters, where another host has them in memory: they are shared.
    """

    def __init__(self, name: str, *args: Any, task: str, head: Head, weights: dict[str, Any]) -> None:
        super().__init__(name, *args)
        self.task, self.head, self._weights = task, head, weights
        self.reads_images = task == "image-classification"
        self.verbs = ("classify",) if self.reads_images else ("classify", "embed")
        self._lock = threading.Lock()
        self.tokenizer: Any = None if self.reads_images else load_tokenizer(name)
        if self.reads_images:
            self._mean, self._std = image_statistics(name)
        self._config = load_config(name)
        if self.tokenizer is not None:
            self._most = min(
                int(self.tokenizer.model_max_length), getattr(self._config, "max_position_embeddings", None) or 10**9
            )

    def load(self) -> tuple[Residents, dict[str, Batch]]:
        base = load_classifier(AUTO[self.task], self.name, self.head, 0, self.precision, None)
        model, self.fingerprint = base.model, base.fingerprint()
        model.to(default_device()).eval().requires_grad_(False)
        for name, parameter in model.base_model.named_parameters():
            shared = self._weights.setdefault(name, parameter)
            if shared.shape == parameter.shape and shared.dtype == parameter.dtype:
                parameter.data = shared.data
        if self.tokenizer is not None:
            model.config.pad_token_id = self.tokenizer.pad_token_id
        residents, options = Residents(model), {}
        if self.reads_images and needs_interpolation(model, choose_resolution(None, model.config)):
            options = {"interpolate_pos_encoding": True}
        batches: dict[str, Batch] = {"classify": ClassifyBatch(model, self.tokenizer, residents, options)}
        if not self.reads_images:
            batches["embed"] = EmbedBatch(model.base_model, self.tokenizer, residents)
        return residents, batches

    def prepare(self, verb: str, request: Any, entries: Sequence[tuple[Entry, float]]) -> Any:
        if verb == "embed":
            assert isinstance(request, EmbedRequest)
            return _text_row(self.tokenizer, self._lock, request.text, None, self._most)
        assert isinstance(request, ClassifyRequest)
        heads = [entry for entry, _ in entries if entry.heads]
        if len(heads) != 1:
            what = "no adapter with a head" if not heads else f"{len(heads)} adapters that each bring a head"
            raise ConfigError(f"To sort, name one adapter with a head; {shown(request.model)} is {what}.")
        if self.reads_images:
            wanted = heads[0].origin.setting("data.resolution", 0) or None
            pixels = read_pixels(request.given, choose_resolution(wanted, self._config))  # type: ignore[arg-type]
            return (pixels.float() / 255 - self._mean[:, None, None]) / self._std[:, None, None]
        text, pair = (request.given, None) if isinstance(request.given, str) else request.given
        most = min(self._most, heads[0].origin.setting("data.max_length", 128))
        return _text_row(self.tokenizer, self._lock, text, pair, most, cut=True)


class ImageHost(Host):
    """A base that draws."""

    verbs = ("draw",)

    def load(self) -> tuple[Residents, dict[str, Batch]]:
        base = load_base(self.name, self.precision, default_device())
        base.model.eval().requires_grad_(False)
        self.fingerprint = base.fingerprint()
        residents = Residents(base.model, base.pipe)
        return residents, {"draw": ImageBatch(base, residents)}

    def prepare(self, verb: str, request: Any, entries: Sequence[tuple[Entry, float]]) -> Any:
        check_request(inference_steps=request.steps, guidance=request.guidance, seed=request.seed)
        if not isinstance(request.prompt, str) or not isinstance(request.negative_prompt, str):
            raise DataError(f"A prompt is a text, not {shown(request.prompt)}.")
        if request.size is not None:
            for side in sides(request.size):
                check_request(resolution=side)
        return fresh_seed(request.seed)


def abilities(name: str) -> tuple[str, ...]:
    """What a base does without an adapter; nothing is loaded.

    Raises:
        ConfigError: there is no such base.
    """
    if draws(name):
        return ImageHost.verbs
    config = load_config(name)
    if any(kind.endswith(("ForCausalLM", "LMHeadModel")) for kind in config.architectures or ()):
        return LanguageHost.verbs
    return () if hasattr(config, "patch_size") or hasattr(config, "num_channels") else ("embed",)


def draws(name: str) -> bool:
    """Whether a base draws, as its files say.

    Raises:
        ConfigError: there is no such base.
    """
    if name in FOLDERS or is_single_file(name):
        return True
    if name in packaged.MODELS or name in debug.NAMES:
        return False
    folder = locate(name)
    return (Path(folder) / "model_index.json").is_file() or bool(pipeline_class(folder, name))
