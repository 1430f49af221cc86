"""Regression from photos to adapters, in closed form: what a generator has to beat.

    ridge            z = x W,  W = (X^T X + s n I)^-1 X^T Z         all components of the adapters
    PCA regression   the same with s ~ 0, and the first k components alone

Regression to noisy targets answers short ones: much of an adapter's numbers is noise of its training, which no photo
tells, and what is left is too small to draw with. So ridge also runs at full length, its distance from the mean stretched
to that of training adapters.

Features are standardised on training people; the strength s and the number k are those with the least error on a fifth
of the training people that were left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

STRENGTHS = tuple(10.0**power for power in range(-5, 4))  # of ridge, times the number of photos
LEAST = 1e-6  # keeps least squares solvable
FOLD = 5  # every fifth person is left out to choose by


@dataclass(frozen=True)
class Regression:
    """Standardised features -> targets [n, size]."""

    shift: Tensor
    width: Tensor
    weights: Tensor
    offset: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        return ((features - self.shift) / self.width) @ self.weights + self.offset


def ridge(features: Tensor, targets: Tensor, strength: float) -> Regression:
    """Least squares with a penalty of ``strength`` times n on the squared weights; means are not penalised.

    Example:
        >>> x = torch.tensor([[0.0], [1.0], [2.0]])
        >>> round(float(ridge(x, 3 * x, 0.0)(torch.tensor([[5.0]]))), 3)
        15.0
    """
    x, z = features.double(), targets.double()
    shift, width = x.mean(0), x.std(0, unbiased=False).clamp(min=1e-8)
    x, offset = (x - shift) / width, z.mean(0)
    gram = x.T @ x + (strength * len(x) + 1e-12) * torch.eye(x.shape[1], dtype=x.dtype)
    weights = torch.linalg.solve(gram, x.T @ (z - offset))
    return Regression(shift.float(), width.float(), weights.float(), offset.float())


def left_out(owners: Sequence[int]) -> Tensor:
    """Which rows [n] belong to people who are left out: every fifth, and always at least one of several."""
    people = sorted(set(owners))
    chosen = set(people[FOLD - 1 :: FOLD] or people[1:2])
    return torch.tensor([owner in chosen for owner in owners])


def choose_strength(features: Tensor, targets: Tensor, owners: Sequence[int]) -> float:
    """The strength of :data:`STRENGTHS` with the least squared error on people left out; the largest of equals."""
    away = left_out(owners)
    if not away.any():
        return STRENGTHS[-1]
    errors = {
        strength: float(
            (ridge(features[~away], targets[~away], strength)(features[away]) - targets[away]).square().sum()
        )
        for strength in reversed(STRENGTHS)
    }
    return min(errors, key=lambda strength: errors[strength])


def choose_components(features: Tensor, targets: Tensor, owners: Sequence[int]) -> int:
    """How many of the targets' columns to predict, the first k, so that the squared error on people left out is least
    when the rest stay at their mean, 0."""
    away = left_out(owners)
    if not away.any():
        return 1
    predicted, wanted = ridge(features[~away], targets[~away], LEAST)(features[away]), targets[away]
    gained = ((predicted - wanted).square() - wanted.square()).sum(0).cumsum(0)
    return int(gained.argmin()) + 1 if float(gained.min()) < 0 else 1


def stretch(features: Tensor, targets: Tensor, owners: Sequence[int], strength: float) -> float:
    """Length of the targets (mean 0) over that of ridge's predictions, on people left out."""
    away = left_out(owners)
    if not away.any():
        return 1.0
    predicted = ridge(features[~away], targets[~away], strength)(features[away])
    return float((targets[away].square().sum() / predicted.square().sum().clamp(min=1e-30)).sqrt())


def principal_components(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Basis [k, numbers] of rows [n, numbers] of mean 0 through their Gram matrix, the largest first; and coordinates
    [n, k].

    Example:
        >>> basis, coordinates = principal_components(torch.tensor([[3.0, 0.0], [-3.0, 0.0]]))
        >>> torch.allclose(coordinates @ basis, torch.tensor([[3.0, 0.0], [-3.0, 0.0]]))
        True
    """
    values, vectors = torch.linalg.eigh(rows.double() @ rows.double().T)
    kept = values > values[-1].clamp(min=1e-30) * 1e-10
    widths, vectors = values[kept].flip(0).sqrt(), vectors[:, kept].flip(1)
    return (vectors.T.float() @ rows) / widths[:, None].float(), (vectors * widths).float()
