"""Tiny random models of the families the recipes must serve, as folders without any head."""

from pathlib import Path

import torch

from smidgen.bases.packaged.debug import CHATML, word_tokenizer

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
TEXT = ("bert", "roberta", "distilbert", "deberta", "mpnet", "gpt2", "llama")
IMAGE = ("vit", "dinov2", "resnet")
CHAT = ("llama", "gpt2")


def folder(kind: str, root: Path, causal: bool = False) -> Path:
    """A folder of the base model ``kind``; ``causal`` with its language model head and a chat template."""
    path = root / f"{kind}{'-lm' if causal else ''}"
    if path.is_dir():
        return path
    torch.manual_seed(0)
    model = _build(kind, causal)
    with torch.no_grad():
        for parameter in model.parameters():  # a random model's outputs hardly depend on its input otherwise
            if parameter.ndim == 2:
                parameter.mul_(5)
    model.save_pretrained(path)
    if kind not in IMAGE:
        tokenizer = word_tokenizer(CHATML if causal else None, pairs=kind not in ("distilbert", "mpnet"))
        if kind in ("gpt2", "llama") and not causal:
            tokenizer.pad_token, tokenizer.eos_token = None, "[SEP]"  # as the real ones come
        tokenizer.save_pretrained(path)
    return path


def _build(kind: str, causal: bool):
    import transformers as t

    words = len(word_tokenizer(CHATML if causal else None))
    made = {
        "bert": lambda: t.BertModel(t.BertConfig(vocab_size=words, max_position_embeddings=64, **SMALL)),
        "roberta": lambda: t.RobertaModel(
            t.RobertaConfig(vocab_size=words, max_position_embeddings=66, type_vocab_size=1, pad_token_id=0, **SMALL)
        ),
        "distilbert": lambda: t.DistilBertModel(
            t.DistilBertConfig(vocab_size=words, max_position_embeddings=64, dim=32, n_layers=2, n_heads=2, hidden_dim=48)
        ),
        "deberta": lambda: t.DebertaV2Model(
            t.DebertaV2Config(vocab_size=words, max_position_embeddings=64, relative_attention=True,
                              pos_att_type=["p2c", "c2p"], position_buckets=16, type_vocab_size=0, **SMALL)
        ),
        "mpnet": lambda: t.MPNetModel(t.MPNetConfig(vocab_size=words, max_position_embeddings=66, pad_token_id=0, **SMALL)),
        "gpt2": lambda: (t.GPT2LMHeadModel if causal else t.GPT2Model)(
            t.GPT2Config(vocab_size=words, n_positions=64, n_embd=32, n_layer=2, n_head=2, n_inner=48,
                         bos_token_id=None, eos_token_id=3)
        ),
        "llama": lambda: (t.LlamaForCausalLM if causal else t.LlamaModel)(
            t.LlamaConfig(vocab_size=words, max_position_embeddings=64, num_key_value_heads=1, bos_token_id=None,
                          eos_token_id=3, tie_word_embeddings=causal, **SMALL)
        ),
        "vit": lambda: t.ViTModel(t.ViTConfig(image_size=32, patch_size=8, **SMALL)),
        "dinov2": lambda: t.Dinov2Model(
            t.Dinov2Config(image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                           mlp_ratio=2)
        ),
        "resnet": lambda: t.ResNetModel(
            t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
        ),
    }  # fmt: skip
    return made[kind]().eval()
