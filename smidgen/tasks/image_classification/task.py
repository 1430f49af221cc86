"""The task of classifying pictures.

Pixels wait as bytes and are scaled when they are needed. Random crops and flips follow from the batch's number.
"""

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smidgen.errors import ConfigError
from smidgen.tasks.data.pictures import LabelledPicture
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
from smidgen.training.randomness import examples, stream

CROP = 8  # a random crop moves the picture by at most an eighth of its side


@dataclass
class ImageClassificationTask(Measured):
    """Batches, loss and scores of labelled pictures; satisfies ``smidgen.training.loop.Task`` and can be evaluated.

    ``pixels`` gives a picture as [3, height, width] bytes; ``mean`` and ``std`` [3] are of values in 0..1.
    ``interpolate`` asks the model for position encodings of another size than its own.
    """

    splits: Mapping[str, Sequence[LabelledPicture]]
    pixels: Callable[[LabelledPicture], Tensor]
    mean: Tensor
    std: Tensor
    metric: str = "accuracy"
    batch_size: int = 16
    eval_batch_size: int = 64
    seed: int = 0
    random_crop: bool = False
    random_flip: bool = False
    interpolate: bool = False
    problem: str = SINGLE  # or MULTI
    classes: int = 0  # how many, where several may hold
    weights: Tensor | None = None  # [class]
    greater_is_better: bool = True

    def batch(self, index: int) -> dict[str, Any]:
        train = self.splits["train"]
        picks = examples(self.seed, index, self.batch_size, len(train))
        chosen = [train[pick] for pick in picks]
        pixels = self._augmented(torch.stack([self.pixels(picture) for picture in chosen]), index)
        labels = label_tensor([picture.label for picture in chosen], self.problem, self.classes)
        found = {"pixel_values": self._scaled(pixels), "labels": labels, "names": [one.where for one in chosen]}
        found["picks"] = None if self.random_crop or self.random_flip else picks
        return found | {"weight": batch_weight(labels, self.problem, self.weights)}

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        logits = self._logits(model, batch["pixel_values"], "train", batch.get("picks"))
        return label_loss(logits, batch["labels"], self.problem, self.weights)

    def scores(self, predicted: Tensor, split: str) -> dict[str, float]:
        """The metric, the loss, and the accuracy or all metrics of sets."""
        return label_scores(self.metric, predicted, self.labels(split), self.problem)

    def answers(self, predicted: Tensor, split: str) -> tuple[Tensor, Tensor]:
        """Loss and rightness of each picture."""
        return label_answers(predicted, self.labels(split), self.problem)

    def labels(self, split: str) -> Tensor:
        """A split's labels, [picture] or [picture, class]."""
        return label_tensor([picture.label for picture in self.splits[split]], self.problem, self.classes)

    def predict(self, model: nn.Module, split: str) -> Tensor:
        """Logits [picture, class] of a split, on the CPU."""
        pictures, found = self.splits[split], []
        with at_rest(model) as device:
            for start in range(0, len(pictures), self.eval_batch_size):
                picks = range(len(pictures))[start : start + self.eval_batch_size]
                pixels = self._scaled(torch.stack([self.pixels(pictures[pick]) for pick in picks]))
                found.append(self._logits(model, pixels.to(device), split, picks).float().cpu())
        return torch.cat(found)

    def _logits(self, model: nn.Module, pixels: Tensor, split: str, picks: Sequence[int] | None) -> Tensor:
        options = {"interpolate_pos_encoding": True} if self.interpolate else {}
        with mixed(model), self.reading(split, picks):
            return model(pixel_values=pixels, **options).logits

    def _scaled(self, pixels: Tensor) -> Tensor:
        return (pixels.float() / 255 - self.mean[:, None, None]) / self.std[:, None, None]

    def _augmented(self, pixels: Tensor, index: int) -> Tensor:
        chance = stream(self.seed, "augment", index)
        if self.random_flip:
            flip = torch.rand(len(pixels), generator=chance) < 0.5
            pixels = torch.where(flip[:, None, None, None], pixels.flip(-1), pixels)
        if self.random_crop:
            side, edge = pixels.shape[-1], max(1, pixels.shape[-1] // CROP)
            padded = F.pad(pixels.float(), (edge,) * 4, mode="reflect").to(pixels.dtype)
            corners = torch.randint(0, 2 * edge + 1, (len(pixels), 2), generator=chance).tolist()
            parts = [p[:, y : y + side, x : x + side] for p, (y, x) in zip(padded, corners, strict=True)]
            pixels = torch.stack(parts)
        return pixels


def content_digest(pictures: Mapping[str, Sequence[LabelledPicture]]) -> str:
    """Which pictures and labels these are."""
    found = hashlib.sha256()
    for split, some in pictures.items():
        found.update("".join(f"{split} {picture.digest} {picture.label}\n" for picture in some).encode())
    return found.hexdigest()[:16]


def choose_resolution(wanted: int | None, config: Any) -> int:
    """``wanted`` pixels, or what the model was made for; refuses what its patches cannot tile."""
    own = getattr(config, "image_size", None)
    own = own[0] if isinstance(own, list | tuple) else own
    resolution = wanted or own or 224
    patch = getattr(config, "patch_size", None)
    patch = patch[0] if isinstance(patch, list | tuple) else patch or 1
    if resolution < patch or resolution % patch:
        near = max(1, round(resolution / patch)) * patch
        raise ConfigError(
            f"resolution must be a multiple of the model's patch of {patch} pixels, not {resolution}; {near}?"
        )
    return resolution


def needs_interpolation(model: Any, resolution: int) -> bool:
    """Whether the model must be asked to stretch its position encodings; ConfigError when it needs to and cannot."""
    own = getattr(model.config, "image_size", None)
    own = own[0] if isinstance(own, list | tuple) else own
    if own is None or own == resolution or getattr(model.config, "patch_size", None) is None:
        return False
    if "interpolate_pos_encoding" in inspect.signature(model.forward).parameters:
        return True
    try:  # some stretch them unasked
        with torch.no_grad(), mixed(model):
            model(pixel_values=torch.zeros(1, 3, resolution, resolution))
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"A {type(model).__name__} for {own} pixels cannot read {resolution}: {error}. Leave out --resolution."
        ) from error
    return False
