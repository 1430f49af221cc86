"""A trained generator: photos in, rows of adapter numbers out, in a folder that travels.

generator.json          format, sizes, encoders, base, sampler's defaults, hashes
network.safetensors     the network in 16 bits, or in 8 with a scale for each row
possible.safetensors    where there is one, the network that knows all people whom a photo may show
codec/                  what turns latents into adapters, with the layout and the base's lock
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from smidgen.adapters.atomic import replace_file
from smidgen.bases.embedded import EMBEDDED, EMBEDDED_WIDE
from smidgen.bases.embedded.layers import in_int8, spread
from smidgen.difflora.generator import encoders
from smidgen.difflora.generator.encoders import PictureEncoder
from smidgen.difflora.generator.network import Network
from smidgen.difflora.generator.settings import Encoders, Model
from smidgen.difflora.weightspace.codec import Codec
from smidgen.difflora.weightspace.codecs import load_codec
from smidgen.difflora.weightspace.layout import Layout
from smidgen.errors import ConfigError, DataError
from smidgen.training.randomness import stream
from smidgen.training.settings import from_dict, to_dict

if TYPE_CHECKING:
    from PIL.Image import Image

JSON, TENSORS, CODEC, POSSIBLE = "generator.json", "network.safetensors", "codec", "possible.safetensors"
POSSIBLE_STEPS = 20  # of the sampler, unless asked otherwise
POSSIBLE_GUIDANCE = 2.0  # with less, less is kept of what a photo does show
FORMAT = 1
SHIPPED = Path(__file__).parent / "embedded"
SHIPPED_FOR = {EMBEDDED: SHIPPED, EMBEDDED_WIDE: Path(__file__).parent / "embedded_wide"}
"""Base -> where the generator of its adapters is that comes with the package, or that `make wide-generator` makes."""


@dataclass(frozen=True)
class Possible:
    """All people whom photos may show: a diffusion over the generator's latents, in deviations ``width`` [size]."""

    network: Network
    width: Tensor
    model: Model

    @torch.no_grad()
    def latents(
        self,
        features: tuple[Tensor, Tensor] | None,
        seeds: Sequence[int],
        steps: int = POSSIBLE_STEPS,
        guidance: float = POSSIBLE_GUIDANCE,
    ) -> Tensor:
        """Latents [n, size], one for each seed, of somebody whom the photos with these ``features`` may show; None: of anybody."""
        noise = _noise(self.network, seeds)
        condition = None if features is None else self.network.mixing(*features).expand(len(seeds), -1)
        return self.network.sample(noise, condition, steps, guidance) * self.width


def _noise(network: Network, seeds: Sequence[int]) -> Tensor:
    return torch.stack([torch.randn(network.latents, generator=stream(seed, "latent")) for seed in seeds])


class Generator:
    """Photos of a person -> latents -> adapters.

    Args:
        base: name of the base that the adapters are for, as ``load_base`` takes it.
        codec: latents <-> rows; its layout says what a row is.
        network: photos' features -> latents.
        sees: names of the two encoders.
        model: sizes, and the sampler's defaults.

    Example:
        >>> generator = load_generator()
        >>> row = generator.predict([photo])[0]
        >>> write_adapter(generator.layout, row, base.model, "adapter")
    """

    def __init__(self, base: str, codec: Codec, network: Network, sees: Encoders, model: Model) -> None:
        self.base, self.codec, self.sees, self.model = base, codec, sees, model
        self.saw: dict[str, str] = {}  # the encoders' full names when it was made, where they are known
        self.network = network.eval().requires_grad_(False)
        self.possible: Possible | None = None

    @property
    def layout(self) -> Layout:
        """What each number of a row is."""
        return self.codec.layout

    @cached_property
    def face(self) -> PictureEncoder:
        return self._encoder("face")

    @cached_property
    def image(self) -> PictureEncoder:
        return self._encoder("image")

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the numbers that turn photos into adapters, as its files hold them."""
        return self._digest(self._content())

    def _digest(self, content: bytes) -> str:
        digest = hashlib.sha256(content)
        for _, value in sorted(self.codec._numbers().items()):
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _content(self) -> bytes:
        return save_tensors(_kept(self.network, self.model))

    @property
    def _wanted(self) -> str:
        """The photos it can read."""
        return getattr(self.face, "reads", "a picture with one face, upright and in front of the camera")

    def _encoder(self, side: str) -> PictureEncoder:
        """An encoder with the very weights that the generator was made with."""
        encoder = encoders.load(getattr(self.sees, side))
        if self.saw.get(side, encoder.name) != encoder.name:
            raise ConfigError(
                f"The generator was made with {self.saw[side]} for the {side}, and {getattr(self.sees, side)} is now "
                f"{encoder.name}: other weights give other features. Put the file of then back, or correct its path in {JSON}."
            )
        return encoder

    # ---- photos to adapters ----------------------------------------------------------------------------------------

    def features(self, photos: Sequence[Image], names: Sequence[str] | None = None) -> tuple[Tensor, Tensor]:
        """What the encoders see [1, photos, width] each; DataError naming a photo without a face."""
        if not photos:
            raise DataError("Give at least one photo.")
        face, image = self.face.encode(photos), self.image.encode(photos)
        for number, seen in enumerate(zip(face, image, strict=True)):
            if any(values.isnan().any() for values in seen):
                photo = photos[number]
                name = names[number] if names else f"photo {number + 1} ({photo.width} x {photo.height} pixels)"
                raise DataError(f"No face was found in {name}; give {self._wanted}.")
        return face[None], image[None]

    @torch.no_grad()
    def condition(self, photos: Sequence[Image], names: Sequence[str] | None = None) -> Tensor:
        """The condition [1, width] of one person's photos."""
        return self.network.mixing(*self.features(photos, names))  # type: ignore[no-any-return]

    @torch.no_grad()
    def latents(
        self, condition: Tensor | None, seeds: Sequence[int], steps: int | None = None, guidance: float | None = None
    ) -> Tensor:
        """Latents [n, size], one for each seed: under ``condition`` ([n, width], or [1, width] for all), or of people who
        do not exist (None)."""
        noise = _noise(self.network, seeds)
        if condition is not None:
            condition = condition.expand(len(seeds), -1)
        guidance = self.model.guidance_scale if guidance is None else guidance
        return self.network.sample(noise, condition, self._steps(steps), guidance)

    @torch.no_grad()
    def rows(self, latents: Tensor) -> Tensor:
        """Adapters [n, numbers] of latents [n, size]."""
        return self.codec.decode(latents.reshape(-1, *self.codec.latent_shape)).float()

    def predict(
        self,
        photos: Sequence[Image],
        seeds: Sequence[int] = (0,),
        steps: int | None = None,
        guidance: float | None = None,
        names: Sequence[str] | None = None,
    ) -> Tensor:
        """Adapters [seeds, numbers] of the person in ``photos``.

        Raises:
            DataError: no photo, or one without a face (``names`` are what to call them).
        """
        return self.rows(self.latents(self.condition(photos, names), seeds, steps, guidance))

    def _steps(self, steps: int | None) -> int:
        steps = self.model.inference_steps if steps is None else steps
        if not 1 <= steps <= 1000:
            raise ConfigError(f"The sampler takes 1 to 1000 steps, not {steps}.")
        return steps

    # ---- files -------------------------------------------------------------------------------------------------------

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Writes the generator's folder, each file in one step."""
        folder = Path(folder)
        self.codec.save(folder / CODEC)
        content = self._content()
        described = {
            "format": FORMAT, "base": self.base, "encoders": to_dict(self.sees), "model": to_dict(self.model),
            "saw": {"face": self.face.name, "image": self.image.name},
            "widths": {"face": self.face.width, "image": self.image.width}, "latents": self.network.latents,
            "sha256": hashlib.sha256(content).hexdigest(),
        }  # fmt: skip
        replace_file(folder / TENSORS, content)
        if self.possible is not None:
            tensors = _kept(self.possible.network, self.possible.model)
            about = {"generator": self._digest(content), "model": to_dict(self.possible.model)}
            packed = {"smidgen": json.dumps(about, sort_keys=True)}  # one key: safetensors does not keep their order
            replace_file(folder / POSSIBLE, save_tensors(tensors | {"width": self.possible.width}, metadata=packed))
        replace_file(folder / JSON, json.dumps(described, indent=1, sort_keys=True))
        return folder


def _kept(network: Network, model: Model) -> dict[str, Tensor]:
    """Its numbers as files hold them: in 16 bits, matrices in 8 where ``model`` says so."""
    tensors = {name: tensor.half().contiguous() for name, tensor in network.state_dict().items()}
    return in_int8(tensors) if model.int8 else tensors


def _whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.float() for name, tensor in spread(tensors).items()}


def shipped(base: str | None = None) -> Path:
    """The folder of the generator that comes with the package for a base; that of the embedded base where there is none."""
    folder = SHIPPED_FOR.get(base or EMBEDDED, SHIPPED)
    return folder if (folder / JSON).is_file() else SHIPPED


def load_generator(folder: str | os.PathLike[str] | None = None) -> Generator:
    """The generator in ``folder``, or the shipped one for the embedded base.

    Raises:
        DataError: there is none, or it is damaged or of another format.
    """
    folder = SHIPPED if folder is None else Path(folder)
    try:
        described: dict[str, Any] = json.loads((folder / JSON).read_text())
        content = (folder / TENSORS).read_bytes()
    except (OSError, ValueError) as error:
        raise DataError(
            f"{folder} holds no generator that can be read ({error}). `smidgen generator train` makes one."
        ) from error
    if described.get("format") != FORMAT:
        raise DataError(f"{folder / JSON} has format {described.get('format')}; this version reads format {FORMAT}.")
    if hashlib.sha256(content).hexdigest() != described.get("sha256"):
        raise DataError(f"{folder / TENSORS} ({len(content):,} bytes) is not the file that {JSON} was written with.")
    try:
        model, sees = from_dict(Model, described["model"]), from_dict(Encoders, described["encoders"])
        network = Network(described["widths"]["face"], described["widths"]["image"], described["latents"], model)
        network.load_state_dict(_whole(load_tensors(content)))
    except (KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise DataError(f"{folder} is damaged: {error}") from error
    generator = Generator(described["base"], load_codec(folder / CODEC), network, sees, model)
    generator.saw = described.get("saw", {})
    if (folder / POSSIBLE).is_file():
        generator.possible = _load_possible(folder / POSSIBLE, generator, described["widths"])
    return generator


def _load_possible(path: Path, generator: Generator, widths: Mapping[str, int]) -> Possible:
    again = "`smidgen generator train --preset seeds` makes it."
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})["smidgen"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        width, model = tensors.pop("width"), from_dict(Model, about["model"])
        network = Network(widths["face"], widths["image"], len(width), model).eval().requires_grad_(False)
        network.load_state_dict(_whole(tensors))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise DataError(f"{path} is damaged ({error}). {again}") from error
    if about.get("generator") != generator.digest:
        raise DataError(f"{path} was trained for another generator than the one in {path.parent}. {again}")
    return Possible(network, width, model)
