"""The table of codecs, and the codec in a folder."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors

from smidgen.difflora.weightspace.basis import Basis
from smidgen.difflora.weightspace.codec import FORMAT, JSON, TENSORS, Codec
from smidgen.difflora.weightspace.conv_autoencoder import ConvAutoencoder
from smidgen.difflora.weightspace.layout import Layout
from smidgen.difflora.weightspace.normalise import Normaliser
from smidgen.difflora.weightspace.pca import PCA
from smidgen.difflora.weightspace.token_autoencoder import TokenAutoencoder
from smidgen.errors import DataError, did_you_mean

CODECS: dict[str, type[Codec]] = {kind.name: kind for kind in (PCA, Basis, ConvAutoencoder, TokenAutoencoder)}


def known_codec(name: str) -> type[Codec]:
    """The codec called ``name``; DataError with the nearest names otherwise."""
    if name not in CODECS:
        raise DataError(f"There is no codec {name!r}.{did_you_mean(name, CODECS)} Known: {', '.join(sorted(CODECS))}.")
    return CODECS[name]


def load_codec(folder: str | os.PathLike[str], layout: Layout | None = None) -> Codec:
    """The codec in ``folder``.

    Args:
        layout: of the rows it shall read; another base, rank or target is an error.

    Raises:
        DataError: no codec, a damaged one, one of another format or layout.
    """
    folder = Path(folder)
    try:
        described = json.loads((folder / JSON).read_text())
        content = (folder / TENSORS).read_bytes()
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} holds no codec that can be read ({error}).") from error
    if described.get("format") != FORMAT:
        raise DataError(f"{folder / JSON} has format {described.get('format')}; this version reads format {FORMAT}.")
    kind = known_codec(str(described.get("codec")))
    if hashlib.sha256(content).hexdigest() != described.get("sha256"):
        raise DataError(f"{folder / TENSORS} ({len(content):,} bytes) is not the file that {JSON} was written with.")
    own = Layout.from_json(json.dumps(described["layout"]), f"The layout in {folder / JSON}")
    if layout is not None:
        layout.check_same(own, f"The rows that {folder} was fitted on")
    try:
        codec = kind(own, normalise=described["normalise"], **described["settings"])
        numbers = load_tensors(content)
        codec.reference = numbers["reference"].float()
        codec.normaliser = Normaliser(*(numbers[name].expand(own.size).clone() for name in ("shift", "width")))
        codec.latent_mean, codec.latent_width = numbers["latent_mean"], numbers["latent_width"]
        codec._take({name[4:]: value for name, value in numbers.items() if name.startswith("own.")})
    except (KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise DataError(f"{folder} is damaged: {error}") from error
    return codec
