"""Tiny random models and tiny data sets, made on the spot: what the debug presets and the tests run on.

They are written once into the cache as the ordinary folders that any real model or data set is.
"""

import itertools
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from smidgen.bases.packaged.entry import Kind, Packaged
from smidgen.bases.packaged.folders import finished_folder, write_dialogues, write_pictures, write_table

NAMES = ("debug-text", "debug-image", "debug-chat")
GOOD, BAD = ("good", "lovely", "bright", "warm", "kind"), ("bad", "ugly", "dull", "cold", "mean")
THINGS = ("film", "book", "song", "day", "meal", "house", "road", "game")
WORDS = (*GOOD, *BAD, *THINGS, "the", "was", "a", "and", "what", "plus", "is", "?", ".", *map(str, range(20)))
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def model_folder(name: str) -> Path:
    """The folder of the debug model ``name``: a BERT, a ViT or a Llama of a few thousand random numbers."""
    kinds: dict[str, tuple[Kind, Any]] = {
        "debug-text": ("text encoder", _bert),
        "debug-image": ("vision encoder", _vit),
        "debug-chat": ("language model", _llama),
    }
    return finished_folder(_entry(name, *kinds[name]))


def data_folder(name: str) -> Path:
    """The folder of the debug data ``name``: sentences with a mood, coloured squares, or small sums."""
    kinds: dict[str, tuple[Kind, Any]] = {
        "debug-text": ("text", lambda folder: write_table(folder, _parts(sentences()))),
        "debug-image": ("pictures", lambda folder: write_pictures(folder, _parts(squares()))),
        "debug-chat": ("instructions", lambda folder: write_dialogues(folder, _parts(sums()))),
    }
    return finished_folder(_entry(name, *kinds[name]))


def sentences() -> list[tuple[str, str]]:
    """(text, label): good or bad, by its adjective."""
    pairs = list(itertools.product(range(len(GOOD)), THINGS))
    return [(f"the {thing} was {words[at]}", label) for at, thing in pairs for words, label in _MOODS]


def sums() -> list[tuple[str, str]]:
    """(question, answer): what is a plus b?"""
    return [(f"what is {a} plus {b} ?", f"{a} plus {b} is {a + b} .") for a in range(9) for b in range(9)]


def squares() -> list[tuple[str, str, bytes]]:
    """(label, name, PNG): a red, green or blue square somewhere on noise."""
    import io

    from PIL import Image

    found = []
    for number in range(48):
        draws = torch.Generator().manual_seed(number)
        pixels = torch.randint(0, 90, (32, 32, 3), generator=draws, dtype=torch.uint8)
        top, left = torch.randint(0, 16, (2,), generator=draws).tolist()
        pixels[top : top + 16, left : left + 16, number % 3] = 230
        buffer = io.BytesIO()
        Image.fromarray(pixels.numpy()).save(buffer, "PNG")
        found.append((("red", "green", "blue")[number % 3], f"{number:02}", buffer.getvalue()))
    return found


def word_tokenizer(template: str | None = None, pairs: bool = True) -> Any:
    """A tokenizer whose tokens are the words of the debug data, spaces and line ends; ``pairs``: it says which text of a
    pair a token is of, as BERT takes it and most models do not."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "<|im_start|>", "<|im_end|>"]
    words = [*special, "\n", "system", "user", "assistant", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r" +"), "removed"), pre_tokenizers.Split(Regex(r"\n|[.?]"), "isolated")]
    )
    if template is None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    inputs = (
        ["input_ids", "token_type_ids", "attention_mask"]
        if pairs and template is None
        else ["input_ids", "attention_mask"]
    )
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, model_input_names=inputs, **names)
    if template is not None:
        made.add_special_tokens({"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]})
        made.chat_template = template
    return made


_MOODS = ((GOOD, "good"), (BAD, "bad"))


def _entry(name: str, kind: Kind, write: Any) -> Packaged:
    return Packaged(name, kind, "random numbers to try a recipe on", "Apache-2.0", "Smidgen", (), write)


def _parts(rows: list[Any]) -> dict[str, list[Any]]:
    """Of every seven rows the first is for validation, the second for the test."""
    train = [row for at, row in enumerate(rows) if at % 7 > 1]
    return {"train": train, "validation": rows[::7], "test": rows[1::7]}


def _bert(folder: Path) -> None:
    from transformers import BertConfig, BertModel

    tokenizer = word_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64, hidden_dropout_prob=0.1, initializer_range=0.2,
    )  # fmt: skip
    _save(BertModel, config, folder)
    tokenizer.save_pretrained(folder)


def _vit(folder: Path) -> None:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        initializer_range=0.2,
    )  # fmt: skip
    _save(ViTModel, config, folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({
        "image_processor_type": "ViTImageProcessor", "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
        "size": {"height": 32, "width": 32},
    }))  # fmt: skip


def _llama(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = word_tokenizer(CHATML)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, max_position_embeddings=64, initializer_range=0.2, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    _save(LlamaForCausalLM, config, folder)
    tokenizer.save_pretrained(folder)


def _save(kind: Any, config: Any, folder: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(config)
    tensors = model.state_dict()
    first = {tensor.data_ptr(): name for name, tensor in reversed(tensors.items())}  # of tied weights one is saved
    state = {name: tensor.contiguous() for name, tensor in tensors.items() if first[tensor.data_ptr()] == name}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config.architectures = [kind.__name__]
    config.save_pretrained(folder)
