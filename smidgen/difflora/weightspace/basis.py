"""A basis whose numbers can be trained: row = mean + z B, with the mean [size] and the basis B [latents, size].

It starts from the adapter's own start values and a basis of zeros (``fresh``), so that every latent is the untrained adapter
and the first gradient already tells latents apart, or from any codec that decodes by one matrix (``of``). The denoising loss then shapes mean and basis end to end.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from smidgen.difflora.weightspace.codec import Codec, Prepared
from smidgen.difflora.weightspace.layout import Layout
from smidgen.difflora.weightspace.normalise import Mode, Normaliser
from smidgen.difflora.weightspace.pca import PCA
from smidgen.errors import ConfigError

Shared = Literal["none", "learned", "random"]


class Basis(Codec):
    """Args: ``latents`` numbers of a latent; ``half`` stores mean and basis in 16 bits."""

    name = "basis"

    def __init__(self, layout: Layout, normalise: Mode = "x10", latents: int = 64, half: bool = False) -> None:
        super().__init__(layout, normalise)
        if latents < 1:
            raise ConfigError(f"latents must be at least 1, got {latents}.")
        self.latents, self.half = latents, half
        self.numbers = _Numbers(layout.size, latents)

    def settings(self) -> dict[str, Any]:
        return {"latents": self.latents, "half": self.half}

    @classmethod
    def fresh(cls, layout: Layout, start: Tensor, latents: int, shared: Shared = "none") -> Basis:
        """An untrained basis around the adapter ``start`` [size]. ``shared`` keeps LoRA's A out of the prediction: one
        for all that is learnt, or one that stays at random.

        Raises:
            ConfigError: ``shared`` for a family without two trained factors.
        """
        codec = cls(layout, latents=latents, half=True)
        with torch.no_grad():
            codec.numbers.mean.copy_(start)
        pairs = list(layout.factor_pairs())
        if shared != "none" and not pairs:
            raise ConfigError(f"shared={shared!r} is about LoRA's factor A; {layout.config.get('method')!r} has none.")
        for a, _ in pairs if shared != "none" else ():
            codec.numbers.predicted[a.columns] = 0.0
            if shared == "random":
                codec.numbers.learnt[a.columns] = 0.0
        return codec._around(start)

    @classmethod
    def of(cls, codec: Codec) -> Basis:
        """The basis that decodes as ``codec`` does, which must decode by one matrix (PCA)."""
        size = torch.Size(codec.latent_shape).numel()
        with torch.no_grad():
            mean = codec.decode(torch.zeros(1, *codec.latent_shape))[0]
            basis = codec.decode(torch.eye(size).reshape(size, *codec.latent_shape)) - mean
        made = cls(codec.layout, latents=size, half=True)
        with torch.no_grad():
            made.numbers.mean.copy_(mean)
            made.numbers.basis.copy_(basis)
        return made._around(mean)

    def _around(self, reference: Tensor) -> Basis:
        """Fitted, with latents and rows in their own units."""
        self.reference = reference.detach().clone()
        self.normaliser = Normaliser(torch.zeros(self.layout.size), torch.ones(self.layout.size))
        self.latent_mean, self.latent_width = torch.zeros(self.latents), torch.ones(self.latents)
        return self

    def raw(self, latents: Tensor) -> Tensor:
        """Latents [n, latents] as the basis itself takes them, z of the formula."""
        return latents * self._fitted(self.latent_width) + self._fitted(self.latent_mean)  # type: ignore[no-any-return]

    def standardise(self, latents: Tensor) -> Tensor:
        """Latents [n, latents] of training identities in units of their own mean and deviation, which the codec's are from now on;
        they decode as before."""
        raw = self.raw(latents)
        self.latent_mean, self.latent_width = raw.mean(0), raw.std(0).clamp(min=1e-6)
        return (raw - self.latent_mean) / self.latent_width

    def _fit(self, rows: Prepared, folder: Path | None, progress: bool) -> None:
        found = PCA(self.layout, self.normalise, self.latents)
        found._fit(rows, folder, progress)
        assert found.mean is not None and found.basis is not None
        self.latents = len(found.basis)
        self.numbers = _Numbers(self.layout.size, self.latents)
        self._take({"mean": found.mean, "basis": found.basis})

    def _encode(self, rows: Tensor) -> Tensor:
        """Least squares."""
        numbers = self.numbers
        return (rows - numbers.mean) @ torch.linalg.pinv(numbers.basis * numbers.predicted)  # type: ignore[no-any-return]

    def _decode(self, latents: Tensor) -> Tensor:
        return self.numbers(latents)  # type: ignore[no-any-return]

    def _numbers(self) -> dict[str, Tensor]:
        dtype = torch.float16 if self.half else torch.float32
        numbers = self.numbers
        return {"mean": numbers.mean.to(dtype), "basis": (numbers.basis * numbers.predicted).to(dtype)}

    def _take(self, numbers: dict[str, Tensor]) -> None:
        with torch.no_grad():
            self.numbers.mean.copy_(numbers["mean"])
            self.numbers.basis.copy_(numbers["basis"])
        self.numbers.requires_grad_(False)


class _Numbers(nn.Module):
    """Mean and basis; ``predicted`` masks what latents move, ``learnt`` what training moves of the mean."""

    predicted: Tensor
    learnt: Tensor

    def __init__(self, size: int, latents: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(size))
        self.basis = nn.Parameter(torch.zeros(latents, size))
        self.register_buffer("predicted", torch.ones(size))
        self.register_buffer("learnt", torch.ones(size))

    def forward(self, latents: Tensor) -> Tensor:
        mean = self.mean.detach() * (1 - self.learnt) + self.mean * self.learnt
        return mean + (latents @ self.basis) * self.predicted
