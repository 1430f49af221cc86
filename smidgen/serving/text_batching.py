"""Answers of a language model, token by token in one batch that requests join and leave between tokens."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch import Tensor

from smidgen.errors import ConfigError
from smidgen.serving.jobs import Job
from smidgen.serving.key_values import RoomyCache
from smidgen.serving.requests import TextPiece, TextResult
from smidgen.serving.residents import Residents
from smidgen.serving.sampling import Choice, choose
from smidgen.serving.spelling import Speller

PREFILL = 4096  # tokens of prompts, padding included, that are read at once


@dataclass
class Prompt:
    """What a text request is made of: tokens, the most that may follow, and a seed."""

    ids: list[int]
    most: int
    seed: int


@dataclass(eq=False)
class Answer:
    """A request in the batch. ``length`` counts the tokens whose keys and values are known."""

    job: Job
    choice: Choice
    speller: Speller
    length: int
    text: str = ""
    ids: list[int] = field(default_factory=list)
    reason: str = ""

    @property
    def prompt(self) -> Prompt:
        return self.job.prepared  # type: ignore[no-any-return]

    def take(self, token: int, ends: frozenset[int]) -> None:
        """The next token, and whether it is the last."""
        self.ids.append(token)
        piece = "" if token in ends else self.speller.add(token)
        if self.speller.stopped or token in ends:
            self.reason = "stop"
        elif len(self.ids) >= self.prompt.most:
            self.reason = "length"
        if self.reason:
            piece += self.speller.end()
            self.reason = "stop" if self.speller.stopped else self.reason
        self.text += piece
        if piece:
            self.job.handle.put(TextPiece(piece, len(self.ids)))

    def finish(self) -> None:
        result = TextResult(
            self.text, self.reason, tuple(self.ids), len(self.prompt.ids), self.prompt.seed, self.job.handle.adapters
        )
        self.job.finish(result)


class TextBatch:
    """The answers that a causal language model is giving.

    Args:
        model: with its adapters in ``residents``.
        tokenizer: that of the model.
        ends: tokens that end an answer.
        pad: the token to fill up with, which nothing attends to.
    """

    def __init__(self, model: Any, tokenizer: Any, residents: Residents, ends: Sequence[int], pad: int) -> None:
        self._model, self._tokenizer, self._residents = model, tokenizer, residents
        self._ends, self._pad = frozenset(ends), pad
        self._answers: list[Answer] = []
        self._cache: RoomyCache | None = None
        self._open = ExitStack()  # the rows of the bank, while nobody comes or goes
        self._stale = True
        self._takes = inspect.signature(model.forward).parameters.keys()
        self.tokens = self.steps = 0

    @property
    def active(self) -> int:
        return len(self._answers)

    def pause(self) -> None:
        self._stale = True
        self._open.close()

    def abandon(self, error: BaseException) -> None:
        self.pause()
        answers, self._answers, self._cache = self._answers, [], None
        for answer in answers:
            answer.job.fail(error)

    @torch.no_grad()
    def admit(self, jobs: Sequence[Job]) -> None:
        self.pause()
        waiting = sorted((_answer(job, self._tokenizer) for job in jobs), key=lambda one: len(one.prompt.ids))
        while waiting:
            count = 1
            while count < len(waiting) and (count + 1) * len(waiting[count].prompt.ids) <= PREFILL:
                count += 1
            now, waiting = waiting[:count], waiting[count:]
            self._read(now)
        self._send_off()

    def _read(self, answers: list[Answer]) -> None:
        """Reads prompts, and takes the first token of each answer."""
        width, cache = max(len(one.prompt.ids) for one in answers), RoomyCache()
        rows = [[self._pad] * (width - len(one.prompt.ids)) + one.prompt.ids for one in answers]
        for one in answers:
            one.length = len(one.prompt.ids)
        with self._residents.rows([one.job.row for one in answers]):
            logits = self._forward(torch.tensor(rows), answers, cache)
        if self._cache is None:
            self._cache = cache
        else:
            self._cache.join(cache, range(len(answers)))
        self._answers += answers
        self._take(answers, logits)

    @torch.no_grad()
    def step(self) -> None:
        for answer in self._answers:
            if answer.job.handle.cancelled:
                answer.reason = "cancelled"
        self._send_off()
        if not self._answers:
            return
        assert self._cache is not None
        if self._stale:
            self._open.enter_context(self._residents.rows([one.job.row for one in self._answers]))
            self._stale = False
        for answer in self._answers:
            answer.length += 1
        last = torch.tensor([[answer.ids[-1]] for answer in self._answers])
        logits = self._forward(last, self._answers, self._cache)
        self.steps += 1
        self._take(self._answers, logits)
        self._send_off()

    def _forward(self, ids: Tensor, answers: Sequence[Answer], cache: RoomyCache) -> Tensor:
        """Logits [row, token of the vocabulary] of what follows; ``length`` of the answers counts ``ids`` too."""
        device, lengths = self._model.device, torch.tensor([one.length for one in answers])
        columns = max(one.length for one in answers)
        mask = torch.arange(columns)[None] >= columns - lengths[:, None]
        given: dict[str, Any] = {"input_ids": ids.to(device), "attention_mask": mask.long().to(device)}
        if "position_ids" in self._takes:
            places = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            given["position_ids"] = places.to(device)
        if "logits_to_keep" in self._takes:
            given["logits_to_keep"] = 1
        given["cache" if "cache" in self._takes else "past_key_values"] = cache
        return self._model(**given, use_cache=True).logits[:, -1].float()  # type: ignore[no-any-return]

    def _take(self, answers: Sequence[Answer], logits: Tensor) -> None:
        self.tokens += len(answers)
        for answer, token in zip(answers, choose(logits, [one.choice for one in answers]), strict=True):
            answer.take(token, self._ends)

    def _send_off(self) -> None:
        """Answers that are at their end get out of the batch."""
        done = [place for place, answer in enumerate(self._answers) if answer.reason]
        if not done:
            return
        self.pause()
        assert self._cache is not None
        finished = [self._answers[place] for place in done]
        for place in reversed(done):
            self._cache.leave(place)
            self._answers[place] = self._answers[-1]
            self._answers.pop()
        if self._answers:
            self._cache.trim(max(answer.length for answer in self._answers))
        else:
            self._cache = None
        for answer in finished:
            answer.finish()


def _answer(job: Job, tokenizer: Any) -> Answer:
    asked = job.request
    choice = Choice(asked.temperature, asked.top_p, numpy.random.default_rng(job.prepared.seed))
    return Answer(job, choice, Speller(tokenizer, asked.stop), 0)


def check_model(model: Any, name: str) -> None:
    """Refuses a language model whose past is more than keys and values, which rows that join and leave cannot share.

    Raises:
        ConfigError: naming it.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer

    try:
        layers = DynamicCache(config=model.config).layers
    except (AttributeError, TypeError, ValueError):
        layers = []
    other = next((layer for layer in layers if not isinstance(layer, DynamicLayer)), None)
    stateful = bool(getattr(model, "_is_stateful", False))
    if other is not None or stateful or getattr(model.config, "is_encoder_decoder", False):
        raise ConfigError(
            f"The base {name!r} is a {type(model).__name__}, which keeps more of a text than keys and values; it is not served: "
            "use smidgen chat."
        )


def prompt_ids(tokenizer: Any, prompt: str | Sequence[Mapping[str, str]], template: str | None) -> list[int]:
    """A text as tokens; or a conversation, written by ``template`` (None: the tokenizer's own) up to where the answer begins.

    Raises:
        DataError: there is nothing to go on from, or the template refuses it.
    """
    from jinja2 import TemplateError

    from smidgen.errors import DataError, shown

    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
    else:
        turns = [dict(turn) for turn in prompt]
        for turn in turns:
            if not isinstance(turn.get("role"), str) or not isinstance(turn.get("content"), str):
                raise DataError(f"A turn of a conversation has a role and a content, both texts; got {shown(turn)}.")
        if not (template or tokenizer.chat_template):
            raise DataError("This base has no chat template; give the prompt as a text.")
        try:
            ids = tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, return_dict=True, chat_template=template
            )["input_ids"]
        except (TemplateError, ValueError, TypeError, IndexError) as error:
            raise DataError(f"The chat template refuses this conversation: {error}.") from error
    if not ids:
        raise DataError("The prompt has no tokens; give some text to go on from.")
    return list(ids)
