"""Forgetting: the loss on unrelated data with the adapter on minus off.

A classifier has no loss on another task, so a logistic probe is fitted once to the frozen base's features of another
data set; its log loss on held-out examples is taken on the base's features and on the adapted model's. A language model
has one: the mean negative log likelihood of a token of unrelated text.
"""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smidgen.errors import MissingExtraError
from smidgen.lab.compare.experiment import Experiment
from smidgen.lab.compare.recipes import prepare
from smidgen.lab.compare.subsets import shortened

MAX_TOKENS, TEXTS_AT_ONCE = 64, 8  # of a text for a language model


class ProbeForgetting:
    """Measures a classifier's encoder by a logistic probe fitted to the frozen base."""

    def __init__(self, experiment: Experiment):
        try:
            from sklearn.linear_model import LogisticRegression
            from sklearn.preprocessing import StandardScaler
        except ImportError as error:
            raise MissingExtraError("Measuring forgetting needs scikit-learn: pip install 'smidgen[tasks]'") from error
        wanted, config = experiment.forgetting, experiment.config()
        assert wanted is not None
        config = replace(config, data=replace(config.data, path=wanted.data, metric=None, max_train_examples=None))
        prepared = prepare(experiment.recipe, config)
        self.task = shortened(prepared.task, train=wanted.probe_examples, test=wanted.examples)
        train, test = (self._features(prepared.model, split) for split in ("train", "test"))
        self.scaler = StandardScaler().fit(train)
        self.probe = LogisticRegression(C=0.1, max_iter=2000).fit(self.scaler.transform(train), self._labels("train"))
        self.off = self._loss(test)

    def __call__(self, model: nn.Module) -> dict[str, float]:
        on = self._loss(self._features(model, "test"))
        return {"off": self.off, "on": on, "change": on - self.off}

    def _features(self, model: nn.Module, split: str) -> np.ndarray:
        return self.task.predict(_Features(model), split).double().numpy()

    def _labels(self, split: str) -> np.ndarray:
        found = self.task.splits[split]
        return np.asarray(found.labels if hasattr(found, "labels") else [example.label for example in found])

    def _loss(self, features: np.ndarray) -> float:
        from sklearn.metrics import log_loss

        chances = self.probe.predict_proba(self.scaler.transform(features))
        return float(log_loss(self._labels("test"), chances, labels=self.probe.classes_))


class TextForgetting:
    """Measures a language model by the likelihood of unrelated text."""

    def __init__(self, experiment: Experiment, prepared: Any):
        from smidgen.bases.transformers import load_tokenizer, locate_data
        from smidgen.tasks.data.text import Columns, read_texts

        wanted = experiment.forgetting
        assert wanted is not None
        texts = read_texts(locate_data(wanted.data), Columns(), held_out=0.1).splits["test"]
        chosen = [text.text for text in texts if len(text.text.split()) >= 8][: wanted.examples]
        tokenizer = load_tokenizer(experiment.config().model)
        self.batches = [
            tokenizer(
                chosen[at : at + TEXTS_AT_ONCE],
                max_length=MAX_TOKENS,
                truncation=True,
                padding=True,
                return_tensors="pt",
            )
            for at in range(0, len(chosen), TEXTS_AT_ONCE)
        ]
        self.off = self._loss(prepared.fresh())

    def __call__(self, model: nn.Module) -> dict[str, float]:
        on = self._loss(model)
        return {"off": self.off, "on": on, "change": on - self.off}

    def _loss(self, model: nn.Module) -> float:
        from smidgen.tasks.finetune.measuring import at_rest

        total, tokens = 0.0, 0
        with at_rest(model) as device:
            for batch in self.batches:
                ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
                logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
                losses = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
                total += float((losses * mask[:, 1:]).sum())
                tokens += int(mask[:, 1:].sum())
        return total / tokens


class _Features(nn.Module):
    """A classifier's encoder in a classifier's place: its "logits" are the mean of its tokens' states."""

    def __init__(self, model: Any):
        super().__init__()
        self.encoder = model.base_model

    def forward(self, **inputs: Any) -> SimpleNamespace:
        states: Tensor = self.encoder(**inputs).last_hidden_state
        mask = inputs.get("attention_mask")
        weights = torch.ones(states.shape[:2], device=states.device) if mask is None else mask.to(states.dtype)
        return SimpleNamespace(logits=(states * weights[..., None]).sum(1) / weights.sum(1, keepdim=True))


def make_forgetting(experiment: Experiment, prepared: Any) -> ProbeForgetting | TextForgetting | None:
    """What measures forgetting in this experiment; None when it does not."""
    if experiment.forgetting is None:
        return None
    return TextForgetting(experiment, prepared) if experiment.recipe == "instruction" else ProbeForgetting(experiment)
