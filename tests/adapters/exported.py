"""What the tests of exports share: tiny models of real classes, adapters as after a training, and how far what others read is off."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import smidgen
from smidgen.adapters.checkpoint.formats import Lora
from smidgen.adapters.tuner.carried import adapted_layers, adapter_parameters

WEIGHT, TOLERANCE = 1e-6, 5e-6  # of a change, and of what it does to the output
FACTORED = {  # methods whose change is a product of their own factors
    "svfit": smidgen.config("svfit", r=5),
    "loldu": smidgen.config("loldu", r=5, alpha=2.0),
    "lora": smidgen.config("lora", r=3, alpha=7.0),
    "seeded": smidgen.config("seeded", r=6),
    "ring": smidgen.SmidgenConfig(residual="tensor_ring", r=2),
}


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=36, num_labels=3
    )
    return BertForSequenceClassification(config).eval()


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=36,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=24, n_layer=2, n_head=2)).eval()


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=36, image_size=16, patch_size=8
    )
    return ViTForImageClassification(config).eval()


class Convolutions(nn.Module):
    """Convolutions of all sorts, and one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=4)
        self.point = nn.Conv2d(12, 6, 1)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.grouped, self.point):
            x = torch.tanh(layer(x))
        return self.head(x.mean(dim=(-2, -1)))  # type: ignore[no-any-return]


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    return Convolutions().eval()


MODELS: dict[str, tuple[Callable[[], nn.Module], list[str], dict[str, Any]]] = {  # how to make it, targets, an input
    "bert": (bert, ["query", "value", "dense"], {"input_ids": torch.arange(12).reshape(2, 6)}),
    "llama": (llama, ["q_proj", "v_proj", "down_proj"], {"input_ids": torch.arange(12).reshape(2, 6)}),
    "gpt2": (gpt2, ["c_attn", "mlp.c_proj"], {"input_ids": torch.arange(12).reshape(2, 6)}),
    "vit": (vit, ["attention.q_proj", "query", "fc1", "intermediate.dense"], {"pixel_values": torch.linspace(-1, 1, 768).reshape(1, 3, 16, 16)}),
    "convolutions": (convolutions, ["first", "grouped", "point", "head"], {"x": torch.linspace(-1, 1, 384).reshape(2, 3, 8, 8)}),
}  # fmt: skip


def adapted(name: str, config: Any, strength: float = 1.0) -> nn.Module:
    """The model ``name`` with an adapter as after a training."""
    make, targets, _ = MODELS[name]
    base = make()
    named = {t for t in targets if any(n.endswith(f".{t}") or n == t for n, _ in base.named_modules())}
    model = smidgen.adapt(base, replace(config, target_modules=named))  # transformers renamed some
    moved(model, by=0.5)
    smidgen.set_strength(model, strength)
    return model


def answer(model: nn.Module, name: str) -> Tensor:
    with torch.no_grad():
        found = model(**MODELS[name][2])
    return found if isinstance(found, Tensor) else found.logits


def off(found: Tensor, wanted: Tensor, base: Tensor) -> float:
    """|found - wanted| / |wanted - base|."""
    return float((found - wanted).norm() / (wanted - base).norm())


def moved(model: nn.Module, adapter_name: str = "default", by: float = 0.2, seed: int = 0) -> int:
    """Gives an adapter numbers as after a training; returns on how many layers it is."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter_parameters(model, adapter_name):
        parameter.data.add_(by * torch.randn(parameter.shape, generator=generator))
    return len(adapted_layers(model, adapter_name))


def changes(model: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """Layer -> the change of its weight."""
    return {
        name: layer.delta_weight(adapter_name).detach() for name, layer in adapted_layers(model, adapter_name).items()
    }


def same_changes(model: nn.Module, theirs: dict[str, nn.Module], adapter_name: str = "default") -> None:
    """Asserts that layers of peft's change their weights as the adapted layers of the same names do."""
    ours = changes(model, adapter_name)
    assert {name.removeprefix("base_model.model.") for name in theirs} == set(ours)
    for name, layer in theirs.items():
        wanted = ours[name.removeprefix("base_model.model.")]
        found = layer.get_delta_weight(layer.active_adapters[0])
        assert found.shape == wanted.shape and (found - wanted).norm() <= WEIGHT * wanted.norm(), name


def same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Asserts that two sets of changes are one."""
    assert found.keys() == wanted.keys()
    for name, change in wanted.items():
        assert (found[name] - change).norm() <= WEIGHT * change.norm(), name


def as_ours(base: nn.Module, loras: Mapping[str, Lora]) -> nn.Module:
    """A model with an adapter of ours that is what was read of a file."""
    config = smidgen.config(
        "lora", r=1, rank_pattern={n: one.r for n, one in loras.items()}, target_modules=list(loras)
    )
    model = smidgen.adapt(base, config)
    for name, parameter in model.named_parameters():
        layer, _, side = name.partition(".smidgen_slots.default.residual_")
        if side:
            parameter.data = loras[layer].a if side == "a" else loras[layer].b * loras[layer].scale
    return model
