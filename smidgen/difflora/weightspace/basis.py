"""A basis whose numbers can be trained: row = mean + z B, with the mean [size] and the basis B [latents, size].

It starts from the adapter's own start values and a basis of zeros (``fresh``), so that every latent is the untrained adapter
and the first gradient already tells latents apart, or from any codec that decodes by one matrix (``of``). The denoising loss then shapes mean and basis end to end.

One basis for the whole adapter grows with latents times numbers: 64 latents of an adapter for SDXL fill a large card. With ``per_layer``
each target has latents and a basis of its own, as HyperLoRA (arXiv 2503.16944) has them for each matrix: B is then zero outside of its
blocks, which are not kept, and equally many kept numbers serve as many times more latents as there are layers.
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
    """Args: ``latents`` numbers of a latent, of each layer with ``per_layer``; ``half`` stores mean and basis in 16 bits, ``int8`` the basis
    in 8, with a scale for each tensor of each basis vector."""

    name = "basis"

    def __init__(
        self, layout: Layout, normalise: Mode = "x10", latents: int = 64, half: bool = False, per_layer: bool = False,
        int8: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(layout, normalise)
        if latents < 1:
            raise ConfigError(f"latents must be at least 1, got {latents}.")
        self.latents, self.half, self.per_layer, self.int8 = latents, half, per_layer, int8
        self.kept = torch.float16 if int8 else torch.float32
        self.numbers = _Numbers(layout, latents, per_layer)

    def settings(self) -> dict[str, Any]:
        return {"latents": self.latents, "half": self.half} | {
            name: True for name in ("per_layer", "int8") if getattr(self, name)
        }

    @classmethod
    def fresh(
        cls, layout: Layout, start: Tensor, latents: int, shared: Shared = "none", per_layer: bool = False, int8: bool = False
    ) -> Basis:  # fmt: skip
        """An untrained basis around the adapter ``start`` [size]. ``shared`` keeps LoRA's A out of the prediction: one
        for all that is learnt, or one that stays at random.

        Raises:
            ConfigError: ``shared`` for a family without two trained factors.
        """
        codec = cls(layout, latents=latents, half=True, per_layer=per_layer, int8=int8)
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
        size = self.latents * len(self.numbers.layers)
        self.latent_mean, self.latent_width = torch.zeros(size), torch.ones(size)
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
        self.latents, self.per_layer = len(found.basis), False
        self.numbers = _Numbers(self.layout, self.latents)
        self._take({"mean": found.mean, "basis": found.basis})

    def _encode(self, rows: Tensor) -> Tensor:
        """Least squares."""
        numbers = self.numbers
        basis = (numbers.basis * numbers.predicted).split(numbers.layers, 1)
        parts = (rows - numbers.mean).split(numbers.layers, 1)
        return torch.cat([own @ torch.linalg.pinv(of) for own, of in zip(parts, basis, strict=True)], 1)

    def _decode(self, latents: Tensor) -> Tensor:
        return self.numbers(latents)  # type: ignore[no-any-return]

    def _numbers(self) -> dict[str, Tensor]:
        dtype = torch.float16 if self.half else torch.float32
        mean, basis = self.numbers.mean.to(dtype), self.numbers.basis * self.numbers.predicted
        if not self.int8:
            return {"mean": mean, "basis": basis.to(dtype)}
        scales = [part.abs().amax(1).clamp_min(1e-6) / 127 for part in basis.split(self._tensors, 1)]
        scale = torch.stack(scales, 1).half()
        return {
            "mean": mean,
            "basis": (basis / self._spread(scale)).round().clamp(-127, 127).to(torch.int8),
            "scale": scale,
        }

    @property
    def _tensors(self) -> list[int]:
        return [entry.size for entry in self.layout.entries]

    def _spread(self, scale: Tensor) -> Tensor:
        """A scale [latents, tensors] for each number [latents, size]."""
        return scale.float().repeat_interleave(torch.tensor(self._tensors), 1)

    def _take(self, numbers: dict[str, Tensor]) -> None:
        basis = numbers["basis"]
        with torch.no_grad():
            self.numbers.mean.copy_(numbers["mean"])
            self.numbers.basis.copy_(basis.float() * self._spread(numbers["scale"]) if "scale" in numbers else basis)
        self.numbers.requires_grad_(False)


class _Numbers(nn.Module):
    """Mean and basis; ``predicted`` masks what latents move, ``learnt`` what training moves of the mean. ``layers`` are the widths of
    the pieces that have latents of their own."""

    predicted: Tensor
    learnt: Tensor

    def __init__(self, layout: Layout, latents: int, per_layer: bool = False) -> None:
        super().__init__()
        widths: dict[str, int] = {}
        for entry in layout.entries:  # a layer's lie together
            widths[entry.key] = widths.get(entry.key, 0) + entry.size
        self.layers = list(widths.values()) if per_layer else [layout.size]
        self.mean = nn.Parameter(torch.zeros(layout.size))
        self.basis = nn.Parameter(torch.zeros(latents, layout.size))
        self.register_buffer("predicted", torch.ones(layout.size))
        self.register_buffer("learnt", torch.ones(layout.size))

    def forward(self, latents: Tensor) -> Tensor:
        mean = self.mean.detach() * (1 - self.learnt) + self.mean * self.learnt
        parts = zip(
            latents.unflatten(-1, (len(self.layers), -1)).unbind(-2), self.basis.split(self.layers, 1), strict=True
        )
        return mean + torch.cat([own @ basis for own, basis in parts], -1) * self.predicted
