"""Bases as shapes: whole pipelines on the meta device, from the configs of a folder or of a published model, without weights.

The published ones are in ``full_size.json``: what differs from the defaults of their classes, from the configs of the checkpoints
that ``source`` names; ``parameters`` is what they come to, which a test holds every config against.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from smidgen.bases.families import EMBEDDED, FAMILIES, family_of, located, pipeline_class
from smidgen.bases.pipelines import import_diffusers
from smidgen.bases.protocol import ImageBase
from smidgen.errors import ConfigError, did_you_mean
from smidgen.training.quiet import quiet

CLIP_TOKENS = 77
_STEPS = {"steps_offset": 1, "clip_sample": False}


@cache
def full_size() -> dict[str, Any]:
    """The published bases by name, and the text encoders they name."""
    return json.loads((Path(__file__).parent / "full_size.json").read_text())  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Shapes:
    """A base without weights.

    Attributes:
        name, title: what it was asked for by, and what it is called.
        family: its family's name.
        pixels: on a side of the images it is trained on; None: as its pipeline says.
        tokens: of an encoded prompt.
        texts: parameters of each text encoder.
        text_parts: class and config of each, by their names in the pipeline.
        folder: where its weights are on this machine, "" where only its shape is known.
        parts: class name and config of the denoiser, the VAE and the scheduler.
        pipeline: name of the pipeline's class.
    """

    name: str
    title: str
    family: str
    pipeline: str
    pixels: int | None
    tokens: int
    texts: Mapping[str, int]
    folder: str
    parts: Mapping[str, tuple[str, Mapping[str, Any]]]
    text_parts: Mapping[str, tuple[str, Any]]

    def base(self) -> ImageBase:
        """The base on the meta device, new each time; its text encoders are left out."""
        diffusers = import_diffusers()
        cls = getattr(diffusers, self.pipeline)
        with torch.device("meta"), quiet():
            built = {name: self._part(name) for name in (FAMILIES[self.family].cls.component, "vae")}
        scheduler, config = self.parts["scheduler"]
        built["scheduler"] = getattr(diffusers, scheduler).from_config(dict(config))
        wanted = inspect.signature(cls.__init__).parameters
        rest = {n: None for n, p in wanted.items() if n != "self" and p.default is p.empty and n not in built}
        flags = {"requires_safety_checker": False} if "requires_safety_checker" in wanted else {}
        with quiet():
            return FAMILIES[self.family].cls(self.name, cls(**built, **rest, **flags))  # type: ignore[no-any-return]

    def text_encoders(self) -> dict[str, nn.Module]:
        """The text encoders on the meta device, by their names in the pipeline."""
        return {name: _text_encoder(*part) for name, part in self.text_parts.items()}

    def _part(self, name: str) -> nn.Module:
        kind, config = self.parts[name]
        known = {key: value for key, value in config.items() if not key.startswith("_")}
        return getattr(import_diffusers(), kind).from_config(known).eval().requires_grad_(False)  # type: ignore[no-any-return]


def shapes_of(name: str, config: str | None = None) -> Shapes:
    """The shapes of a published base (``flux2-dev``, ...), of the embedded one, of a pipeline's folder, of a hub name, of which
    only the configs are fetched, or of one file, put together as ``config`` is.

    Raises:
        ConfigError: there is no such base, no family knows it, or its configs are not here and nothing may be fetched.

    Example:
        >>> model = shapes_of("flux2-klein-4b").base().model
        >>> sum(p.numel() for p in model.parameters())
        3875544576
    """
    bases = full_size()["bases"]
    if name in bases:
        return _published(name, bases[name])
    try:
        folder = _configs(located(name, config)[0])
    except ConfigError as error:
        if "There is no base" not in str(error):
            raise
        known = [*bases, EMBEDDED]
        hint = did_you_mean(name.lower(), known)
        raise ConfigError(
            f"There is no base {name!r} to plan for.{hint} Give a pipeline's folder, owner/name, or one of {', '.join(known)}."
        ) from error
    return _in_folder(name, folder)


def _published(name: str, row: Mapping[str, Any]) -> Shapes:
    family = family_of(name, row["pipeline"])
    texts = {text: full_size()["text_encoders"][text]["parameters"] for text in row["text_encoders"]}
    flow = FAMILIES[family].cls.component == "transformer"
    scheduler = ("FlowMatchEulerDiscreteScheduler", {}) if flow else ("DDPMScheduler", _STEPS)
    parts = {FAMILIES[family].cls.component: tuple(row["denoiser"]), "vae": tuple(row["vae"]), "scheduler": scheduler}
    rows = [full_size()["text_encoders"][text] for text in row["text_encoders"]]
    made = {
        part: (text["class"], (text["config"], text["options"]))
        for part, text in zip(FAMILIES[family].cls.text_encoders, rows, strict=False)
    }
    return Shapes(name, row["title"], family, row["pipeline"], row["pixels"], row["tokens"], texts, "", parts, made)


def _in_folder(name: str, folder: str) -> Shapes:
    pipeline = pipeline_class(folder, name)
    family = family_of(name, pipeline)
    if not FAMILIES[family].draws:
        raise ConfigError(
            f"The base {name!r} is a {family} model, which reads and does not draw; plan personalize is for those that draw."
        )
    cls = FAMILIES[family].cls
    index = _json(Path(folder) / "model_index.json", name)
    wanted = {cls.component: "config.json", "vae": "config.json", "scheduler": "scheduler_config.json"}
    parts = {part: (index[part][1], _json(Path(folder) / part / file, name)) for part, file in wanted.items()}
    texts, made, limits = {}, {}, [int(getattr(cls, "prompt_options", {}).get("max_sequence_length", CLIP_TOKENS))]
    for part in cls.text_encoders:
        if index.get(part, [None, None])[1] is not None:
            config = _json(Path(folder) / part / "config.json", name)
            made[part] = index[part][1], config
            texts[part] = sum(parameter.numel() for parameter in _text_encoder(*made[part]).parameters())
            limits.append(int(config.get("max_position_embeddings") or limits[0]))
    tokens = limits[0] + CLIP_TOKENS if family == "sd3" else min(limits)
    return Shapes(name, name, family, pipeline, None, tokens, texts, folder, parts, made)


def _text_encoder(kind: str, config: Any) -> nn.Module:
    """A text encoder of the class ``kind`` on the meta device, from its config.json or (class of its config, options)."""
    import transformers

    with torch.device("meta"), quiet():
        if isinstance(config, tuple):
            made = getattr(transformers, config[0])(**config[1])
        else:
            made = transformers.AutoConfig.for_model(**config)
        return getattr(transformers, kind)(made)  # type: ignore[no-any-return]


def _configs(name: str) -> str:
    """The folder of a base's configs; of a hub name they are fetched, and nothing else."""
    if Path(name).is_dir():
        return name
    from huggingface_hub import snapshot_download

    try:
        with quiet():
            return str(snapshot_download(name, allow_patterns=["model_index.json", "*/*config.json"]))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"The configs of {name!r} are not on this machine and could not be fetched; a plan needs its model_index.json and "
            f"config.json files, no weights. Go online for them, or name a folder or one of {', '.join(full_size()['bases'])}. "
            f"({type(error).__name__})"
        ) from error


def _json(path: Path, name: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"The base {name!r} has no readable {path.parent.name}/{path.name}. ({error})") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} of the base {name!r} is no config: it holds a {type(found).__name__}.")
    return found
