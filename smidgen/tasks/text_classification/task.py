"""The task of classifying texts, or pairs of texts, into one class or several; with numbers as labels, of predicting a
value.

Texts are tokenised once. A batch is padded to its longest text; evaluation goes from long to short, so that little of
it is padding.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from smidgen.tasks.data.tables import counted
from smidgen.tasks.data.text import Text
from smidgen.tasks.finetune.measuring import (
    Measured,
    at_rest,
    batch_weight,
    label_answers,
    label_loss,
    label_scores,
    label_tensor,
    mixed,
)
from smidgen.training.metrics import SINGLE
from smidgen.training.randomness import examples


@dataclass(frozen=True)
class Encoded:
    """Tokenised texts: the tokenizer's rows (``input_ids`` and the like), labels [example] or [example, class], and
    where each stands."""

    rows: list[dict[str, list[int]]]
    labels: Tensor
    names: list[str]

    def __len__(self) -> int:
        return len(self.rows)


@dataclass
class TextClassificationTask(Measured):
    """Batches, loss and scores of labelled texts; satisfies ``smidgen.training.loop.Task`` and can be evaluated."""

    splits: Mapping[str, Encoded]
    tokenizer: Any
    metric: str
    batch_size: int = 16
    eval_batch_size: int = 64
    seed: int = 0
    problem: str = SINGLE  # or REGRESSION, MULTI
    weights: Tensor | None = None  # [class]
    group_by_length: bool = False
    greater_is_better: bool = True

    def batch(self, index: int) -> dict[str, Any]:
        train = self.splits["train"]
        length = (lambda pick: len(train.rows[pick]["input_ids"])) if self.group_by_length else None
        picks = examples(self.seed, index, self.batch_size, len(train), length)
        padded = self._padded(train, picks)
        weight = batch_weight(padded["labels"], self.problem, self.weights)
        return padded | {"weight": weight, "names": [train.names[pick] for pick in picks], "picks": picks}

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        logits = self._logits(model, batch, "train", batch.get("picks"))
        return label_loss(logits, batch["labels"], self.problem, self.weights)

    def scores(self, predicted: Tensor, split: str) -> dict[str, float]:
        """The metric, the loss, and the accuracy or all metrics of sets."""
        return label_scores(self.metric, predicted, self.labels(split), self.problem)

    def answers(self, predicted: Tensor, split: str) -> tuple[Tensor, Tensor]:
        """Loss and rightness of each example."""
        return label_answers(predicted, self.labels(split), self.problem)

    def labels(self, split: str) -> Tensor:
        """A split's labels, [example] or [example, class]."""
        return self.splits[split].labels

    def predict(self, model: nn.Module, split: str) -> Tensor:
        """Logits [example, class] of a split, on the CPU."""
        data = self.splits[split]
        order = sorted(range(len(data)), key=lambda at: -len(data.rows[at]["input_ids"]))
        found: list[Tensor] = []
        with at_rest(model) as device, mixed(model):
            for start in range(0, len(order), self.eval_batch_size):
                picks = order[start : start + self.eval_batch_size]
                padded = {key: value.to(device) for key, value in self._padded(data, picks).items()}
                found.append(self._logits(model, padded, split, picks).float().cpu())
        logits = torch.cat(found)
        return logits[torch.tensor(order).argsort()]

    def _logits(self, model: nn.Module, batch: Mapping[str, Any], split: str, picks: Sequence[int] | None) -> Tensor:
        lengths = [len(self.splits[split].rows[pick]["input_ids"]) for pick in picks or ()]
        with mixed(model), self.reading(split, picks, lengths):
            return model(**{key: batch[key] for key in self.tokenizer.model_input_names if key in batch}).logits

    def _padded(self, data: Encoded, picks: Sequence[int]) -> dict[str, Tensor]:
        rows = self.tokenizer.pad([data.rows[pick] for pick in picks], return_tensors="pt")
        return {**rows, "labels": data.labels[list(picks)]}


def encode_texts(
    tokenizer: Any, splits: Mapping[str, Sequence[Text]], max_length: int, problem: str, classes: int = 0
) -> tuple[dict[str, Encoded], list[str]]:
    """Tokenise every split, cut to ``max_length`` tokens; returns them and warnings that count what was cut."""
    warnings: list[str] = []
    found: dict[str, Encoded] = {}
    for split, texts in splits.items():
        pairs = [text.pair for text in texts] if texts[0].pair is not None else None
        options: dict[str, Any] = {"add_special_tokens": True, "verbose": False}
        whole = tokenizer([text.text for text in texts], pairs, **options)["input_ids"]
        cut = tokenizer([text.text for text in texts], pairs, truncation=True, max_length=max_length, **options)
        long = [text.where for text, ids in zip(texts, whole, strict=True) if len(ids) > max_length]
        if long:
            share = f"of {len(texts):,} longer than {max_length} tokens and cut there"
            warnings.append(counted(f"{split} text", long, share))
        rows = [{key: values[at] for key, values in cut.items()} for at in range(len(texts))]
        labels = label_tensor([text.label for text in texts], problem, classes)
        found[split] = Encoded(rows, labels, [text.where for text in texts])
    return found, warnings


def content_digest(splits: Mapping[str, Encoded]) -> str:
    """Which tokens and labels these are."""
    parts = [f"{split} {part.rows} {part.labels.tolist()}" for split, part in splits.items()]
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:16]
