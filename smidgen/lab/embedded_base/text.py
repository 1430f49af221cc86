"""The tokenizer and text encoder: genuine CLIP classes, a vocabulary of some hundred pieces."""

import json
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from smidgen.bases.embedded import embedded_base, world
from smidgen.lab.embedded_base.config import Config

TOKENS = 48
"""Length every caption is padded to."""
PLACEHOLDER_SHARE = 0.1
"""Share of training captions whose person carries a meaningless name."""


def byte_letters() -> list[str]:
    """The printable letter CLIP and GPT-2 write for each byte: itself where printable, else one from U+0100
    onwards."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [b for b in range(256) if b not in printable]
    return [chr(b) if b in printable else chr(256 + others.index(b)) for b in range(256)]


def _join(pieces: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """Byte-pair encoding of one word under the merges learnt so far."""
    while len(pieces) > 1:
        pairs = list(pairwise(pieces))
        best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        at = pairs.index(best)
        pieces = [*pieces[:at], "".join(best), *pieces[at + 2 :]]
    return pieces


def byte_pair_files(drawn: ModuleType = world) -> tuple[dict[str, int], list[str]]:
    """(vocabulary, merges): all bytes, then the merges that make each word of the world one token.

    A later merge ranks below all earlier ones, so it cannot split a word that was already whole.
    """
    letters = byte_letters()
    tokens = letters + [letter + "</w>" for letter in letters]
    ranks: dict[tuple[str, str], int] = {}
    for word in drawn.vocabulary():
        pieces = _join([*word[:-1], word[-1] + "</w>"], ranks)
        while len(pieces) > 1:
            ranks[(pieces[0], pieces[1])] = len(ranks)
            tokens.append(pieces[0] + pieces[1])
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
    tokens = list(dict.fromkeys([*tokens, "<|startoftext|>", "<|endoftext|>"]))
    return {token: i for i, token in enumerate(tokens)}, [" ".join(pair) for pair in ranks]


def tokenizer(folder: Path, drawn: ModuleType = world) -> CLIPTokenizer:
    """Write vocab.json and merges.txt of the words of a world into `folder` and load them as a CLIPTokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary, merges = byte_pair_files(drawn)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS)


def text_encoder(config: Config, words: CLIPTokenizer) -> CLIPTextModel:
    """A CLIP text model of two layers, trained from scratch together with the UNet."""
    width = config.text_width
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=2,
            num_attention_heads=4 if width >= 64 else 2,
            max_position_embeddings=TOKENS,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
        )
    )


def shipped_encoder(words: CLIPTokenizer) -> CLIPTextModel:
    """The shipped text encoder with an embedding for each of `words`, new ones as those at a start."""
    encoder = CLIPTextModel.from_pretrained(embedded_base() / "text_encoder")
    known = CLIPTokenizer.from_pretrained(embedded_base() / "tokenizer").get_vocab()
    places = sorted(words.get_vocab().items(), key=lambda item: item[1])
    old, new = encoder.get_input_embeddings(), nn.Embedding(len(places), encoder.config.hidden_size)
    nn.init.normal_(new.weight, std=encoder.config.initializer_range)
    with torch.no_grad():
        for token, place in places:
            if token in known:
                new.weight[place] = old.weight[known[token]]
    encoder.set_input_embeddings(new)
    ids = {f"{name}_token_id": getattr(words, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    encoder.config.update({"vocab_size": len(places), **ids})
    return encoder


def token_ids(words: CLIPTokenizer, captions: list[str]) -> Tensor:
    """[captions, TOKENS] token numbers, padded and cut as the pipeline does."""
    return words(captions, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt").input_ids


def scene_of(codes: np.ndarray, drawn: ModuleType = world) -> Any:
    """The scene of one row of attribute codes."""
    words = {name: list(options)[code] for (name, options), code in zip(drawn.ATTRIBUTES.items(), codes, strict=True)}
    return drawn.Scene(**{name: words[name] for name in drawn.SCENE_ATTRIBUTES})


def training_caption(
    codes: np.ndarray, rng: np.random.Generator, dropped: float = 0.1, drawn: ModuleType = world
) -> str:
    """A caption in varied words; empty with probability `dropped`, for guidance."""
    if rng.random() < dropped:
        return ""
    subject = world.CLASS_PHRASE
    if rng.random() < PLACEHOLDER_SHARE:
        name = world.PLACEHOLDERS[rng.integers(len(world.PLACEHOLDERS))]
        subject = f"{'a ' if rng.random() < 0.5 else ''}{name} person"
    return drawn.caption(scene_of(codes, drawn), rng, subject)  # type: ignore[no-any-return]
