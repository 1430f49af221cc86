"""A per-layer token autoencoder: each piece of a layer's tensor is a token that knows where it comes from.

A row is cut along its layout: every tensor into pieces of ``token`` numbers (a LoRA factor along its long side), each
piece one token with embeddings of its module type (``to_q``), its layer, its side (``residual_a``) and its place in the
tensor, as in recurrent parameter generation (RPG, arXiv 2501.11587). A small transformer encodes all tokens to
``latent`` numbers each; another decodes them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from smidgen.difflora.weightspace.layout import Entry, Layout
from smidgen.difflora.weightspace.learned import Autoencoder, LearnedCodec
from smidgen.difflora.weightspace.normalise import Mode
from smidgen.errors import ConfigError


class TokenAutoencoder(LearnedCodec):
    """Args: ``token`` numbers in a token, ``latent`` numbers it is coded by, ``width``, ``depth`` and ``heads`` of the
    transformers."""

    name = "token_autoencoder"

    def __init__(
        self,
        layout: Layout,
        normalise: Mode = "tensor",
        token: int = 128,
        latent: int = 4,
        width: int = 96,
        depth: int = 2,
        heads: int = 4,
        fit: Any = None,
    ) -> None:
        if min(token, latent, width, depth, heads) < 1 or width % heads:
            raise ConfigError(
                f"token={token}, latent={latent}, width={width}, depth={depth}, heads={heads}: all must be at least 1 "
                "and width a multiple of heads."
            )
        self.options = {"token": token, "latent": latent, "width": width, "depth": depth, "heads": heads}
        super().__init__(layout, normalise, fit)

    def settings(self) -> dict[str, Any]:
        return self.options | {"fit": dict(vars(self.training))}

    def _network(self) -> Autoencoder:
        return _Network(self.layout, **self.options)


class Tokens:
    """Where the tokens of a layout lie and what they are called.

    Attributes:
        places [tokens, token]: column of each number in the row; ``size`` (one past the end) where a token is padded.
        labels [4, tokens]: type, layer, side and place of each token; ``counts`` says how many there are of each.
    """

    def __init__(self, layout: Layout, token: int) -> None:
        pieces = [(entry, place, columns) for entry in layout.entries for place, columns in _pieces(entry, token)]
        self.places = torch.full((len(pieces), token), layout.size)
        for row, (_, _, columns) in enumerate(pieces):
            self.places[row, : len(columns)] = torch.as_tensor(columns)
        names = [(_type(e.key), _parent(e.key), e.side, str(place)) for e, place, _ in pieces]
        known = [sorted(set(column)) for column in zip(*names, strict=True)]
        self.counts = [len(words) for words in known]
        self.labels = torch.tensor(
            [[w.index(n) for n in c] for w, c in zip(known, zip(*names, strict=True), strict=True)]
        )
        where = torch.full((layout.size,), -1)  # column of a row -> place among the flattened tokens
        flat = self.places.flatten()
        inside = flat < layout.size
        where[flat[inside]] = torch.arange(len(flat))[inside]
        self.where = where


class _Network(Autoencoder):
    def __init__(self, layout: Layout, token: int, latent: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        tokens = Tokens(layout, token)
        self.token = token
        for name in ("places", "labels", "where"):
            self.register_buffer(name, getattr(tokens, name), persistent=False)
        self.words = nn.ModuleList(nn.Embedding(count, width) for count in tokens.counts)
        for table in self.words:
            nn.init.normal_(table.weight, std=0.5 / len(tokens.counts))  # type: ignore[arg-type]
        self.into, self.code = nn.Linear(token, width), nn.Linear(width, latent)
        self.uncode, self.out = nn.Linear(latent, width), nn.Linear(width, token)
        self.encoder, self.decoder = (_transformer(width, depth, heads) for _ in range(2))

    def encode(self, rows: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(rows, (0, 1))
        return self.code(self.encoder(self.into(padded[:, self.places]) + self._named()))  # type: ignore[no-any-return, index]

    def decode(self, latents: Tensor) -> Tensor:
        tokens = self.out(self.decoder(self.uncode(latents) + self._named()))
        return tokens.flatten(1)[:, self.where]  # type: ignore[no-any-return]

    def noised(self, latents: Tensor, noise: Tensor | float) -> Tensor:
        """Noise in the units of the batch's own latents, whose size is free."""
        return latents + noise * latents.detach().std() * torch.randn_like(latents)

    def _named(self) -> Tensor:
        return sum(table(label) for table, label in zip(self.words, self.labels, strict=True))  # type: ignore[return-value,arg-type]


def _transformer(width: int, depth: int, heads: int) -> nn.Module:
    layer = nn.TransformerEncoderLayer(
        width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    return nn.TransformerEncoder(layer, depth, norm=nn.LayerNorm(width), enable_nested_tensor=False)


def _pieces(entry: Entry, token: int) -> list[tuple[int, list[int]]]:
    """(place, columns) of the tokens of one tensor: each line along the longest axis, cut into pieces."""
    columns = torch.arange(entry.offset, entry.offset + entry.size).reshape(entry.shape)
    longest = max(range(len(entry.shape)), key=lambda axis: entry.shape[axis])
    lines = columns.movedim(longest, -1).reshape(-1, entry.shape[longest])
    parts = [part.tolist() for line in lines for part in line.split(token)]
    return list(enumerate(parts))


def _type(key: str) -> str:
    """``to_q`` of ``...attn1.to_q``, ``to_out.0`` of ``...attn1.to_out.0``; attn1 and attn2 stay in the layer's name."""
    parts = key.split(".")
    return ".".join(parts[-2:]) if parts[-1].isdigit() and len(parts) > 1 else parts[-1]


def _parent(key: str) -> str:
    return key.removesuffix(_type(key))
