"""The families of bases: one row each, with how it is recognised. A new family is a file, a row, and its row in the tests.

base = load_base("embedded")
base.draw(base.encode_prompts(["a portrait of a person"]), [0], negative=base.encode_prompts([""]), steps=20, guidance=2)
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from smidgen.adapters.methods import Kind
from smidgen.bases.embedded import EMBEDDED, FOLDERS, embedded_base
from smidgen.bases.embedded.base import Embedded, EmbeddedFlow, EmbeddedWide
from smidgen.bases.flow_transformers import Chroma, Flux2, Flux2Klein, Krea2, QwenImage, StableDiffusion3, Wan, ZImage
from smidgen.bases.pipelines import PipelineBase, import_diffusers
from smidgen.bases.protocol import ImageBase
from smidgen.bases.single_file import is_single_file, published_config
from smidgen.bases.stable_diffusion import StableDiffusion, StableDiffusionXL
from smidgen.bases.transformers import TransformersBase
from smidgen.errors import ConfigError, did_you_mean
from smidgen.training.quiet import quiet


@dataclass(frozen=True)
class Family:
    """One family: how it is recognised, by the name asked for and the class that ``model_index.json`` names ("" where a
    transformers ``config.json`` stands instead), its class, and whether it draws or reads."""

    recognises: Callable[[str, str], bool]
    cls: Any
    draws: bool = True


def _called(name: str) -> Callable[[str, str], bool]:
    return lambda asked, _: asked == name


def _pipeline(name: str) -> Callable[[str, str], bool]:
    return lambda _, cls: cls == name


FAMILIES: dict[str, Family] = {  # the first that recognises a base has it
    cls.family: Family(_called(cls.family), cls)  # by their names, as their classes are others' too
    for cls in (Embedded, EmbeddedFlow, EmbeddedWide)
} | {
    "sd": Family(_pipeline("StableDiffusionPipeline"), StableDiffusion),
    "sdxl": Family(_pipeline("StableDiffusionXLPipeline"), StableDiffusionXL),
    "flux2": Family(_pipeline("Flux2Pipeline"), Flux2),
    "flux2-klein": Family(_pipeline("Flux2KleinPipeline"), Flux2Klein),
    "z-image": Family(_pipeline("ZImagePipeline"), ZImage),
    "qwen-image": Family(_pipeline("QwenImagePipeline"), QwenImage),
    "sd3": Family(_pipeline("StableDiffusion3Pipeline"), StableDiffusion3),
    "chroma": Family(_pipeline("ChromaPipeline"), Chroma),
    "krea2": Family(_pipeline("Krea2Pipeline"), Krea2),
    "wan": Family(_pipeline("WanPipeline"), Wan),
    "transformers": Family(lambda name, cls: not cls, TransformersBase, draws=False),
}


def load_base(
    name: str | Path, mixed_precision: str = "no", device: torch.device | str = "cpu", quantize: str | None = None,
    variant: str | None = None, text_first: bool = False, config: str | Path | None = None,
) -> ImageBase:  # fmt: skip
    """Load an embedded base, a pipeline folder, a hub name, or a single file, by its family.

    ``quantize`` (``nf4``, ``int8``, ``int8-torchao``, ``fp8``) makes its denoiser smaller in memory; ``variant`` reads files of
    that name, such as ``fp16``. ``text_first``: the denoiser may be read when it is first asked for, so that whoever encodes
    prompts and calls ``release_encoders`` before never holds both. ``config`` is for a single file: the folder or hub name of
    the pipeline that says how its weights are put together, and has what is not in it.

    Raises ConfigError when there is no such base or no family that draws knows it.
    """
    folder, file = located(name, config)
    pipeline = pipeline_class(folder, str(config or name))
    family = family_of(str(name), pipeline)
    if not FAMILIES[family].draws:
        raise ConfigError(
            f"The base {str(name)!r} is a {family} model, which reads and does not draw: it has no model_index.json. Train it "
            "with smidgen train text-classification, image-classification or instruction."
        )
    return FAMILIES[family].cls.load(
        str(name),
        folder,
        pipeline,
        mixed_precision,
        device,
        quantize=quantize,
        variant=variant,
        text_first=text_first,
        file=file,
    )  # type: ignore[no-any-return]


def family_of(name: str, pipeline: str) -> str:
    """The family of a base: ``pipeline`` is the class that its ``model_index.json`` names, "" for a transformers model.

    Raises ConfigError where no family knows it.
    """
    for family, row in FAMILIES.items():
        if row.recognises(name, pipeline):
            return family
    known = ", ".join(family for family, row in FAMILIES.items() if row.draws)
    raise ConfigError(
        f"The base {name!r} is a {pipeline}, and no family here knows that class; those that draw are {known}. "
        "docs/new_base.md says how to add one."
    )


def learning_kind(name: str, task: str = "image") -> Kind:
    """What learning rates of ``task`` (``image``, ``control``) on the base called ``name`` go by; nothing is loaded."""
    cls = FAMILIES[name].cls if name in FOLDERS else PipelineBase
    return cls.learning[task]  # type: ignore[no-any-return]


def card_lines(name: str, config: str | None = None) -> tuple[str, str]:
    """For the example in a model card: the lines that load the pipeline, and what to draw with (", a=1"). ``config`` is that of a
    base in one file."""
    if Path(name).suffix == ".safetensors":
        given = f", config={config!r}" if config else ""
        return f"from smidgen.bases.families import load_base\n\npipe = load_base({name!r}{given}).pipe", ""
    lines = "from diffusers import DiffusionPipeline\n\npipe = DiffusionPipeline.from_pretrained({})"
    if name not in FOLDERS:
        return lines.format(repr(name)), ""
    base = FAMILIES[name].cls
    called = {"num_inference_steps": base.sampling.steps, "guidance_scale": base.sampling.guidance, **base.drawing}
    options = "".join(
        f", {key}={value:g}" if isinstance(value, float) else f", {key}={value}" for key, value in called.items()
    )
    return lines.format(f"smidgen.embedded_base({'' if name == EMBEDDED else repr(name)})"), options


def located(name: str | Path, config: str | Path | None = None) -> tuple[str, str | None]:
    """The folder or hub name that a base's configs are in, and the file of its weights where it is a single one."""
    if is_single_file(name):
        return locate(config, "--base-config") if config else published_config(name), str(Path(name).expanduser())
    if config is not None:
        raise ConfigError(f"--base-config {config} is for a base in one .safetensors file, and {str(name)!r} is none.")
    return locate(name), None


def locate(name: str | Path, what: str = "base") -> str:
    """A local folder or a hub name; ``what`` it is, for the message that there is none."""
    if str(name) in FOLDERS:
        return str(embedded_base(str(name)))
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if path.is_absolute() or str(name).startswith(".") or str(name).count("/") != 1:
        near = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = did_you_mean(path.name, [*near, *FOLDERS])
        raise ConfigError(
            f"There is no {what} {str(name)!r}: neither a folder, nor one of {', '.join(FOLDERS)}, nor owner/name.{hint}"
        )
    return str(name)


def pipeline_class(folder: str, name: str) -> str:
    """The class that ``model_index.json`` names, "" where a transformers ``config.json`` stands instead."""
    if (Path(folder) / "config.json").is_file() and not (Path(folder) / "model_index.json").is_file():
        return ""
    diffusers = import_diffusers()
    try:
        with quiet():
            return str(diffusers.DiffusionPipeline.load_config(folder)["_class_name"])
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        offline = " HF_HUB_OFFLINE is set." if os.environ.get("HF_HUB_OFFLINE") == "1" else ""
        raise ConfigError(
            f"The base {name!r} has no readable model_index.json, so it is not a diffusers pipeline.{offline} ({error})"
        ) from error
