"""Small adapters in a folder, and what each says alone, by transformers' and diffusers' own loops."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

import smidgen
from smidgen import testing
from smidgen.adapters.tuner.injection import remove
from smidgen.bases.transformers import AUTO, Head, load_classifier, load_language_model, load_tokenizer

CHAT, TEXT, IMAGE = "debug-chat", "debug-text", "debug-image"
METHODS = ("svfit", "lora", "loldu", "tlora", "oft", "seeded")
LAYERS = {CHAT: ["q_proj", "v_proj"]}


def config(method: str, layers: Any, **options: Any) -> smidgen.SmidgenConfig:
    rank = {} if method in ("oft", "tlora") else {"r": 4}
    return smidgen.config(method, target_modules=layers, **rank, **options)


def chat_adapter(folder: Path, method: str = "svfit", seed: int = 0, **options: Any) -> Path:
    """An adapter of the debug Llama that changes what it says."""
    model = load_language_model(CHAT, "no", None).model
    smidgen.adapt(model, config(method, LAYERS[CHAT], task_type="CAUSAL_LM", **options))
    testing.perturb(model, seed)
    return smidgen.save(model, folder)


def classifier(folder: Path, labels: tuple[str, ...] = ("bad", "good"), seed: int = 0, base: str = TEXT) -> Path:
    """A classifier on the debug BERT or ViT, with a head of its own."""
    task = "text-classification" if base == TEXT else "image-classification"
    found = load_classifier(AUTO[task], base, Head(labels), seed, "no", None)
    kind = {"task_type": "SEQ_CLS"} if base == TEXT else {}
    own = config("svfit", found.targets(), modules_to_save=list(found.heads), labels=list(labels), **kind)
    smidgen.adapt(found.model, own)
    testing.perturb(found.model, seed)
    smidgen.save(found.model, folder)
    (folder / "report.json").write_text(json.dumps({"kind": task, "labels": labels, "base": base}))
    return folder


def image_adapters(folder: Path, base: Any, methods: tuple[str, ...]) -> None:
    """An adapter of each method on a base that draws."""
    for seed, method in enumerate(methods):
        smidgen.adapt(base.model, config(method, set(base.targets)))
        testing.perturb(base.model, seed)
        smidgen.save(base.pipe, folder / method)
        (folder / method / "report.json").write_text(json.dumps({"base": base.name}))
        remove(base.model, "default")


def copied(source: Path, folder: Path) -> Path:
    return Path(shutil.copytree(source, folder, dirs_exist_ok=True))


def alone(folder: Path | None, prompt: str, tokens: int) -> tuple[int, ...]:
    """What transformers' own loop says greedily with one adapter in the model, or none."""
    model = load_language_model(CHAT, "no", None).model.eval()
    if folder is not None:
        smidgen.load(model, folder)
    given = load_tokenizer(CHAT)(prompt, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        said = model.generate(**given, max_new_tokens=tokens, do_sample=False)
    return tuple(said[0, given["input_ids"].shape[1] :].tolist())
