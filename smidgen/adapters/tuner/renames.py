"""Modules that transformers renamed between the versions this library runs on: an adapter saved on one follows to the other.

``RENAMED`` is all that is known, from transformers' own tables (``conversion_mapping.py``) and from the modules of 4.56 and
5.24 beside each other; nothing is guessed from names that look alike. A name is followed where it is missing in the model
and one renaming, old to new or new to old, leads to a module that is there. The base lock then has the last word: shapes
and weights must be those that the adapter was made for.

The files stay as they are: checksum, the order of packed tensors, canary and start values go by the names in the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from smidgen.adapters.checkpoint import base_lock
from smidgen.adapters.tuner.building import members_of, rank_at
from smidgen.adapters.tuner.config import SmidgenConfig
from smidgen.adapters.tuner.kinds import kind_of
from smidgen.adapters.tuner.matching import outside_adapters
from smidgen.errors import TargetError

V = TypeVar("V")

_QKV = (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"))
# What they are of -> runs of a module's name, in the 4.x of transformers and in 5.x; * is a number.
RENAMED: dict[str, tuple[tuple[str, str], ...]] = {
    "ViT, DeiT, BEiT, AST, ViViT, I-JEPA, ViT-MAE, ViT-MSN": (
        *((f"encoder.layer.*.attention.attention.{old}", f"layers.*.attention.{new}") for old, new in _QKV),
        ("encoder.layer.*.attention.output.dense", "layers.*.attention.o_proj"),
        ("encoder.layer.*.intermediate.dense", "layers.*.mlp.fc1"),
        ("encoder.layer.*.output.dense", "layers.*.mlp.fc2"),
    ),
    "DINOv2, with registers or without": (
        *((f"encoder.layer.*.attention.attention.{old}", f"encoder.layer.*.attention.{new}") for old, new in _QKV),
        ("encoder.layer.*.attention.output.dense", "encoder.layer.*.attention.o_proj"),
    ),
    "DINOv3": (("layer.*", "model.layer.*"),),
    "Swin": (
        *((f"blocks.*.attention.self.{old}", f"blocks.*.attention.{new}") for old, new in _QKV),
        ("blocks.*.attention.output.dense", "blocks.*.attention.o_proj"),
        ("blocks.*.intermediate.dense", "blocks.*.mlp.fc1"),
        ("blocks.*.output.dense", "blocks.*.mlp.fc2"),
    ),
    "SegFormer": (
        *((f"encoder.block.*.*.attention.self.{old}", f"stages.*.blocks.*.attention.{new}") for old, new in _QKV),
        ("encoder.block.*.*.attention.output.dense", "stages.*.blocks.*.attention.o_proj"),
        ("encoder.block.*.*.attention.self.sr", "stages.*.blocks.*.attention.sequence_reduction.sequence_reduction"),
        ("encoder.block.*.*.mlp.dense1", "stages.*.blocks.*.mlp.fc1"),
        ("encoder.block.*.*.mlp.dense2", "stages.*.blocks.*.mlp.fc2"),
        ("encoder.block.*.*.mlp.dwconv", "stages.*.blocks.*.mlp.dwconv"),
        ("encoder.patch_embeddings.*", "stages.*.patch_embeddings"),
    ),
    "the image towers of CLIP and SigLIP, alone and in LLaVA, PaliGemma, Gemma 3": (
        ("vision_model.encoder", "encoder"),
        ("vision_model.embeddings", "embeddings"),
        ("vision_model.head", "head"),
    ),
    "the text towers of CLIP and SigLIP": (
        ("text_model.encoder", "encoder"),
        ("text_model.embeddings", "embeddings"),
        ("text_model.head", "head"),
    ),
    "AltCLIP": (("text_model.roberta.encoder.layer", "text_model.roberta.encoder.layers"),),
}


def follow(config: SmidgenConfig, model: nn.Module) -> dict[str, str]:
    """Gives a config from a file the names that its targets have in a model, where transformers renamed them.

    Args:
        config: changed in place where something is followed.
        model: what it is loaded into; untouched.

    Returns:
        Names in the model -> names in the file, of all targets; empty where nothing is followed.

    Raises:
        TargetError: the targets became parts of one tensor; or the adapter draws fixed numbers from its targets' names.
    """
    if not config.base_lock:
        return {}
    wanted = base_lock.read_lock(config.base_lock).targets
    modules = outside_adapters(model.get_base_model() if isinstance(model, PeftModel) else model)
    if all(name in modules for name in wanted):
        return {}
    found = {name: name if name in modules else _only(name, modules) for name in wanted}
    names = {now: name for name, now in found.items() if now}
    if len(names) < len(wanted):
        _check_experts([name for name, now in found.items() if not now], modules)
        return {}
    ranks = {now: rank for now, name in names.items() if (rank := rank_at(config, name)) != config.r}
    config.rank_pattern = {now: rank for now, rank in ranks.items() if rank is not None}  # type: ignore[misc]
    config.target_modules = set(names)
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    config.ties = {now: config.ties[name] for now, name in names.items() if name in config.ties}
    config.base_lock = base_lock.renamed(config.base_lock, {name: now for now, name in names.items()})
    _check_constants(config, names, modules)
    return names


def words(names: Mapping[str, str]) -> str:
    """One sentence on what was followed."""
    moved = {now: name for now, name in names.items() if now != name}
    now, name = next(iter(moved.items()))
    return (
        f"{len(moved)} of its {len(names)} targets have the names of another version of transformers, which were followed: what "
        f"it calls {name!r} is {now!r} here, and so on."
    )


def in_file(names: Mapping[str, str], by_target: Mapping[str, V]) -> dict[str, V]:
    """What is kept by a model's names, by the names in the file."""
    return {names.get(now, now): value for now, value in by_target.items()}


def _only(name: str, modules: Mapping[str, nn.Module]) -> str | None:
    """The one module that a renaming, in either direction, makes of a name; None for none and for several."""
    there = {
        found
        for pairs in RENAMED.values()
        for old, new in pairs
        for found in (_replaced(name, old, new), _replaced(name, new, old))
        if found in modules
    }
    return there.pop() if len(there) == 1 else None  # type: ignore[return-value]


def _replaced(name: str, old: str, new: str) -> str | None:
    """A name with a run of it replaced; None where it has no such run.

    Example:
        >>> _replaced("vit.encoder.layer.3.output.dense", "encoder.layer.*.output.dense", "layers.*.mlp.fc2")
        'vit.layers.3.mlp.fc2'
    """
    path, run = name.split("."), old.split(".")
    for at in range(len(path) - len(run) + 1):
        piece = path[at : at + len(run)]
        if all(p == r or (r == "*" and p.isdigit()) for p, r in zip(piece, run, strict=True)):
            numbers = iter([p for p, r in zip(piece, run, strict=True) if r == "*"])
            put = [next(numbers) if part == "*" else part for part in new.split(".")]
            return ".".join(path[:at] + put + path[at + len(run) :])
    return None


def _check_experts(missing: list[str], modules: Mapping[str, nn.Module]) -> None:
    """Experts are layers in transformers 4 and one tensor a block in 5: no renaming follows that, and it is said so."""
    here = {_block_of(name): name for name in modules if _block_of(name)}
    for name in missing:
        block, single = _block_of(name) or ("", False)
        other = here.get((block, not single))
        if block and other:
            raise TargetError(
                f"Target {name!r} of the file is {'one expert' if single else 'all experts of a block'}, and here there is {other!r}, "
                f"{'all experts of a block in one tensor' if single else 'one layer for each expert'}: transformers 5 keeps experts "
                "in another layout than 4, and an adapter of one does not fit the other. Load it on the version of transformers "
                "that it was saved on, or train it again."
            )


def _block_of(name: str) -> tuple[str, bool] | None:
    """Of a layer of one expert, or of a tensor of all experts: the block it is in, and whether it is of one."""
    path = name.split(".")
    at = path.index("experts") if "experts" in path else 0
    return (".".join(path[: at - 1]), path[at + 1].isdigit()) if 0 < at < len(path) - 1 else None


def _check_constants(config: SmidgenConfig, names: Mapping[str, str], modules: Mapping[str, nn.Module]) -> None:
    """Fixed random numbers that a member draws from its target's name cannot follow it to another."""
    for now, name in names.items():
        layer = modules[now]
        layer = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
        if now == name or kind_of(layer) is None:
            continue
        for prefix, member in members_of(config, layer, now).each():
            drawn = [member.constants(f"{config.seed}/{target}/{prefix}") for target in (name, now)]
            if any(not torch.equal(value, drawn[1][key]) for key, value in drawn[0].items()):
                raise TargetError(
                    f"The adapter is made for a module {name!r}, which another version of transformers calls {now!r}. The fixed "
                    f"random numbers of its {prefix} ({config.label()}) follow from that name, so it cannot go by another: load it "
                    "on the version of transformers that it was saved on, and merge it into the base there."
                )
