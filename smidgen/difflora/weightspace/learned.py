"""What the learned codecs share: a network, the weight-preserve loss, and training by the one loop."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smidgen.difflora.weightspace.codec import Codec, Prepared
from smidgen.difflora.weightspace.layout import Layout
from smidgen.difflora.weightspace.normalise import Mode
from smidgen.errors import ConfigError
from smidgen.training.interrupts import scratch_folder
from smidgen.training.loop import LoopConfig, train
from smidgen.training.randomness import derive, examples, stream


def preserve_weights(rows: Tensor, q: float | None = 0.9, p: float = 1.0) -> Tensor:
    """Importance m [n, size] of each number of a row: 1 for those at or above the row's quantile ``q`` of |w|, else 0;
    with q None, |w|^p / mean |w|^p."""
    size = rows.abs()
    if q is None:
        powered = size.pow(p)
        return powered / powered.mean(-1, keepdim=True).clamp(min=1e-30)
    rank = min(rows.shape[-1], int(q * rows.shape[-1]) + 1)
    return (size >= size.kthvalue(rank, dim=-1, keepdim=True).values).to(rows)


def reconstruction_loss(
    rows: Tensor, found: Tensor, weight: float = 1.0, q: float | None = 0.9, p: float = 1.0
) -> Tensor:
    """MSE(w, v) + weight * sum m (w - v)^2 / sum m, the mean over rows [n, size]; ``weight`` 0 is the plain MSE.

    DiffLoRA (arXiv 2408.06740) names a weight-preserve loss and does not write it down; this is one reading of it.
    """
    errors = (rows - found).square()
    loss = errors.mean(-1)
    if weight:
        importance = preserve_weights(rows, q, p)
        loss = loss + weight * (importance * errors).sum(-1) / importance.sum(-1).clamp(min=1e-30)
    return loss.mean()


@dataclass(frozen=True)
class Fit:
    """How a learned codec is trained. Steps of ``batch`` adapters."""

    steps: int = 600
    batch: int = 32
    learning_rate: float = 2e-3
    preserve: float = 1.0  # weight of the weight-preserve loss
    quantile: float | None = 0.9  # the share of small weights it leaves out; None: |w|^power
    power: float = 1.0
    row_noise: float = 0.001  # deviation of the noise on the encoder's input
    latent_noise: float = 0.1  # and on the latent
    seed: int = 0


class Autoencoder(nn.Module):
    """A network with ``encode`` [n, size] -> [n, *latent] and ``decode`` back."""

    def encode(self, rows: Tensor) -> Tensor:
        raise NotImplementedError

    def decode(self, latents: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, rows: Tensor, row_noise: Tensor, latent_noise: Tensor | float) -> Tensor:
        """Reconstruction of noised rows through a noised latent."""
        latents = self.encode(rows + row_noise)
        return self.decode(self.noised(latents, latent_noise))

    def noised(self, latents: Tensor, noise: Tensor | float) -> Tensor:
        """The latent as training sees it."""
        return latents + noise


class LearnedCodec(Codec):
    """A codec whose encoder and decoder are a network; its options are the network's, with ``fit`` for training."""

    def __init__(self, layout: Layout, normalise: Mode = "tensor", fit: Fit | Mapping[str, Any] | None = None) -> None:
        super().__init__(layout, normalise)
        try:
            self.training = fit if isinstance(fit, Fit) else Fit(**(fit or {}))
        except TypeError as error:
            raise ConfigError(f"fit={fit!r} is no setting of a learned codec ({error}).") from error
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(self.training.seed, "codec"))
            self.network = self._network()

    @abstractmethod
    def _network(self) -> Autoencoder:
        """A fresh network."""

    def _fit(self, rows: Prepared, folder: Path | None, progress: bool) -> None:
        chosen = self.training
        loop = LoopConfig(
            max_train_steps=chosen.steps,
            lr_warmup_steps=min(20, chosen.steps - 1),
            checkpointing_steps=max(1, min(200, chosen.steps)),
            seed=chosen.seed,
        )
        groups = [{"params": list(self.network.parameters()), "lr": chosen.learning_rate, "weight_decay": 1e-4}]
        identity = {"codec": self.name, "settings": self.settings(), "normalise": self.normalise, "rows": len(rows)}
        identity |= {"layout": self.layout.digest, "statistics": self._digest()}
        task, resume = AutoencoderTask(rows, chosen), None if folder is None else "latest"
        with scratch_folder() if folder is None else nullcontext(folder) as where:
            train(task, self.network, groups, loop, where, resume=resume, identity=identity, progress=progress)
        self.network.requires_grad_(False).eval().to("cpu")

    def _digest(self) -> str:
        """Of what was learnt from the rows before training: other rows are another run."""
        normaliser = self._fitted(self.normaliser)
        values = torch.cat([self._fitted(self.reference), normaliser.shift, normaliser.width])
        return hashlib.sha256(values.numpy().tobytes()).hexdigest()

    def _encode(self, rows: Tensor) -> Tensor:
        return self.network.to(rows.device).encode(rows)

    def _decode(self, latents: Tensor) -> Tensor:
        return self.network.to(latents.device).decode(latents)

    def _numbers(self) -> dict[str, Tensor]:
        return self.network.state_dict()

    def _take(self, numbers: dict[str, Tensor]) -> None:
        self.network.load_state_dict(numbers)
        self.network.requires_grad_(False).eval()


class AutoencoderTask:
    """Rows by number, noise by number; satisfies ``smidgen.training.loop.Task``."""

    def __init__(self, rows: Prepared, fit: Fit) -> None:
        self.rows, self.fit = rows, fit

    def batch(self, index: int) -> dict[str, Any]:
        fit = self.fit
        picks = examples(fit.seed, index, fit.batch, len(self.rows))
        rows = self.rows.take(picks)
        noise = torch.randn(rows.shape, generator=stream(fit.seed, "rows", index)) * fit.row_noise
        return {"rows": rows, "noise": noise, "index": index, "names": [f"adapter {pick}" for pick in picks]}

    def loss(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        fit, rows = self.fit, batch["rows"]
        found = model(rows, batch["noise"], fit.latent_noise)
        return reconstruction_loss(rows, found, fit.preserve, fit.quantile, fit.power)

    def preview(self, model: nn.Module, step: int, folder: Path) -> None:
        """Nothing to look at."""
