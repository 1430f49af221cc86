"""Texts and images that are read in one pass: classes by the heads of adapters, and vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from smidgen.serving.jobs import Job
from smidgen.serving.requests import Classification, Embedding
from smidgen.serving.residents import Residents
from smidgen.tasks.classifying import predictions
from smidgen.tasks.finetune.measuring import mixed


class OnePass:
    """Requests that end with the step that they come in."""

    def __init__(self) -> None:
        self._jobs: list[Job] = []
        self.steps = 0

    @property
    def active(self) -> int:
        return len(self._jobs)

    def admit(self, jobs: Sequence[Job]) -> None:
        self._jobs += jobs

    def pause(self) -> None:
        """Nothing is open between steps."""

    def abandon(self, error: BaseException) -> None:
        jobs, self._jobs = self._jobs, []
        for job in jobs:
            job.fail(error)

    @torch.no_grad()
    def step(self) -> None:
        for job in self._jobs:
            if job.handle.cancelled:
                job.end_cancelled()
        jobs = [job for job in self._jobs if not job.handle.done]
        if jobs:
            self.steps += 1
            for job, result in zip(jobs, self._results(jobs), strict=True):
                job.finish(result)
        self._jobs = []

    def _results(self, jobs: list[Job]) -> list[Any]:
        raise NotImplementedError


class ClassifyBatch(OnePass):
    """Sorts ``prepared`` texts (rows of the tokenizer) or images (scaled pixels)."""

    def __init__(self, model: Any, tokenizer: Any, residents: Residents, options: dict[str, Any]) -> None:
        super().__init__()
        self._model, self._tokenizer, self._residents, self._options = model, tokenizer, residents, options

    def _results(self, jobs: list[Job]) -> list[Any]:
        found: list[Any] = [None] * len(jobs)
        for places in _alike([job.prepared for job in jobs]):
            some = [jobs[place] for place in places]
            for place, result in zip(places, self._sorted(some), strict=True):
                found[place] = result
        return found

    def _sorted(self, jobs: list[Job]) -> list[Classification]:
        if self._tokenizer is None:
            given = {"pixel_values": torch.stack([job.prepared for job in jobs]), **self._options}
        else:
            given = padded(self._tokenizer, [job.prepared for job in jobs])
        with self._residents.rows([job.row for job in jobs]), mixed(self._model):
            logits = self._model(**_on(given, self._model)).logits.float().cpu()
        found = []
        for job, row in zip(jobs, logits, strict=True):
            head = next(entry.origin.head for entry, _ in job.entries if entry.heads)
            assert head is not None
            said = predictions(row[None], head.labels, head.problem_type)[0]
            tokens = 0 if self._tokenizer is None else len(job.prepared["input_ids"])
            found.append(
                Classification(said.answer, said.probabilities, said.logits, job.handle.adapters, prompt_tokens=tokens)
            )
        return found


class EmbedBatch(OnePass):
    """Vectors of ``prepared`` texts (rows of the tokenizer): the mean over their tokens of the last states, of length 1."""

    def __init__(self, trunk: Any, tokenizer: Any, residents: Residents) -> None:
        super().__init__()
        self._trunk, self._tokenizer, self._residents = trunk, tokenizer, residents

    def _results(self, jobs: list[Job]) -> list[Any]:
        given = _on(padded(self._tokenizer, [job.prepared for job in jobs]), self._trunk)
        with self._residents.rows([job.row for job in jobs]), mixed(self._trunk):
            states = self._trunk(**given).last_hidden_state.float()
        mask = given["attention_mask"][..., None].to(states)
        vectors = nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1).cpu()
        return [
            Embedding(tuple(vector.tolist()), len(job.prepared["input_ids"]), job.handle.adapters)
            for job, vector in zip(jobs, vectors, strict=True)
        ]


def padded(tokenizer: Any, rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Rows of a tokenizer as one batch, filled up on the right."""
    return dict(tokenizer.pad(list(rows), padding_side="right", return_tensors="pt"))


def _on(given: dict[str, Any], model: Any) -> dict[str, Any]:
    device = next(model.parameters()).device
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in given.items()}


def _alike(prepared: Sequence[Any]) -> list[list[int]]:
    """Places of what goes into one batch: images of one size, texts of any length."""
    groups: dict[Any, list[int]] = {}
    for place, one in enumerate(prepared):
        groups.setdefault(one.shape if isinstance(one, Tensor) else None, []).append(place)
    return list(groups.values())
