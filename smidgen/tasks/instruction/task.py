"""The task of following instructions: the next token of what the assistant says, given all before it.

The loss is taken on the assistant's tokens alone, its end-of-turn mark included. A batch weighs as many as it has such
tokens, so that k small batches equal one large one.
"""

import hashlib
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smidgen.tasks.data.chat import Spoken
from smidgen.tasks.finetune.measuring import Measured, at_rest, mixed
from smidgen.training.randomness import examples

IGNORED = -100  # the label of a token that is not learnt


@dataclass
class InstructionTask(Measured):
    """Batches, loss and scores of conversations; satisfies ``smidgen.training.loop.Task`` and can be evaluated.

    With ``selects`` the model computes logits only where some row of the batch has a target.
    """

    splits: Mapping[str, Sequence[Spoken]]
    pad: int
    batch_size: int = 8
    eval_batch_size: int = 16
    seed: int = 0
    selects: bool = False
    group_by_length: bool = False
    metric: str = "nll"
    greater_is_better: bool = False

    def batch(self, index: int) -> dict[str, Any]:
        train = self.splits["train"]
        length = (lambda pick: len(train[pick].ids)) if self.group_by_length else None
        picks = examples(self.seed, index, self.batch_size, len(train), length)
        chosen = [train[pick] for pick in picks]
        found = {"weight": float(sum(spoken.targets for spoken in chosen)), "names": [one.where for one in chosen]}
        return self._padded(chosen) | found | {"picks": picks}

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        logits, targets = self._at_targets(model, batch, "train", batch.get("picks"))
        return F.cross_entropy(logits.float(), targets)

    def scores(self, predicted: Tensor, split: str) -> dict[str, float]:
        """nll (mean negative log-likelihood of a target token, in nats), perplexity and token_accuracy."""
        nll = -float(predicted[:, 0].double().mean())
        found = {"nll": nll, "perplexity": math.exp(min(nll, 700.0))}
        return found | {"token_accuracy": float(predicted[:, 1].double().mean())}

    def predict(self, model: nn.Module, split: str) -> Tensor:
        """For each target token of a split its log-likelihood and whether it was the likeliest, [token, 2]; conversations by
        :meth:`order`."""
        order = self.order(split)
        found = []
        with at_rest(model) as device:
            for start in range(0, len(order), self.eval_batch_size):
                picks = order[start : start + self.eval_batch_size]
                batch = {k: v.to(device) for k, v in self._padded([self.splits[split][at] for at in picks]).items()}
                logits, targets = self._at_targets(model, batch, split, picks)
                likely = -F.cross_entropy(logits.float(), targets, reduction="none")
                found.append(torch.stack([likely, (logits.argmax(-1) == targets).float()], dim=1).cpu())
        return torch.cat(found)

    def order(self, split: str) -> list[int]:
        """The conversations from long to short, so that little of a batch is padding."""
        return sorted(range(len(self.splits[split])), key=lambda at: -len(self.splits[split][at].ids))

    def answers(self, predicted: Tensor, split: str) -> tuple[Tensor, Tensor]:
        """Mean loss and share of right tokens of each conversation, in nats and in 0..1."""
        sizes = [self.splits[split][at].targets for at in self.order(split)]
        own = torch.stack([part.double().mean(0) for part in predicted.split(sizes)])
        back = torch.tensor(self.order(split)).argsort()
        return -own[back, 0], own[back, 1]

    def _at_targets(
        self, model: nn.Module, batch: Mapping[str, Any], split: str, picks: Sequence[int] | None
    ) -> tuple[Tensor, Tensor]:
        """Logits [target, token] that predict each target, and the targets' ids."""
        following = batch["labels"][:, 1:]  # what comes after each position but the last
        positions = (following != IGNORED).any(0).nonzero().squeeze(-1)
        inputs: dict[str, Any] = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        lengths = [len(self.splits[split][pick].ids) for pick in picks or ()]
        with mixed(model), self.reading(split, picks, lengths):
            if self.selects:
                logits = model(**inputs, use_cache=False, logits_to_keep=positions).logits
            else:
                logits = model(**inputs, use_cache=False).logits[:, positions]
        wanted = following[:, positions]
        asked = wanted != IGNORED
        return logits[asked], wanted[asked]

    def _padded(self, picks: Sequence[Spoken]) -> dict[str, Tensor]:
        longest = max(len(spoken.ids) for spoken in picks)
        ids = torch.full((len(picks), longest), self.pad)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
        for row, spoken in enumerate(picks):
            size = len(spoken.ids)
            ids[row, :size] = torch.tensor(spoken.ids)
            mask[row, :size] = 1
            labels[row, :size] = torch.where(torch.tensor(spoken.target), ids[row, :size], IGNORED)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def selects_logits(model: nn.Module) -> bool:
    """Whether the model can be asked for the logits of some positions alone."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def content_digest(splits: Mapping[str, Sequence[Spoken]]) -> str:
    """Which tokens and targets these are."""
    found = hashlib.sha256()
    for split, some in splits.items():
        found.update("".join(f"{split} {spoken.ids} {spoken.target}\n" for spoken in some).encode())
    return found.hexdigest()[:16]
