"""smidgen.count against what adapting really trains: every member, pair and method, and peft's own methods."""

import copy
import doctest
import time
import warnings

import peft
import pytest
import torch
from peft import get_peft_model
from torch import nn

import smidgen
import smidgen.adapters.counting
import smidgen.bases.counting
from smidgen import testing
from smidgen.bases import architectures

CONFIGS = dict(testing.configs())
TARGETS = ["query", "value"]


def text_model() -> nn.Module:
    from transformers import RobertaConfig, RobertaModel

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return RobertaModel(RobertaConfig(vocab_size=50, max_position_embeddings=40, **shape))


def mixed() -> nn.Module:
    """A linear, a grouped convolution and a linear that no target names."""
    return nn.ModuleDict({"a": nn.Linear(24, 12), "b": nn.Conv2d(8, 6, 3, groups=2), "c": nn.Linear(24, 12)})


def snapshot(model: nn.Module) -> dict[str, object]:
    """Classes, identities, flags and sums of everything in a model."""
    state: dict[str, object] = {name: type(module) for name, module in model.named_modules()}
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return state | {
        f"tensor {n}": (id(t), t.device, t.requires_grad, float(t.detach().double().sum())) for n, t in tensors
    }


@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d", "conv2d_groups", "experts"])
def test_count_is_what_adapting_trains(kind):
    checked = 0
    for label, config in CONFIGS.items():
        model, _ = testing.base(kind)
        if testing.refused(config, kind) or str(config.r).startswith("energy:"):
            continue
        own = copy.deepcopy(config)
        own.target_modules = {"layer"}
        wanted = smidgen.count(model, own)
        found = smidgen.trained_numbers(smidgen.adapt(model, own))
        assert wanted == found > 0, f"{label} on {kind}"
        checked += 1
    assert checked > len(CONFIGS) // 3


@pytest.mark.parametrize("method", ["tlora(2,3)", "tlora*(2,4)", "svfit", "loldu", "lora", "oft"])
def test_several_layers_with_default_targets(method):
    model = text_model()
    wanted = smidgen.count(model, method)
    assert wanted == smidgen.trained_numbers(smidgen.adapt(model, method)) > 0


def test_rank_pattern_and_excluded_modules():
    config = smidgen.config("svfit", r=4, target_modules=["a", "b", "c"], rank_pattern={"b": 2}, exclude_modules=["c"])
    assert smidgen.count(mixed(), config) == 4 + 2 == smidgen.trained_numbers(smidgen.adapt(mixed(), config))


PEFT = {
    "Lora": {"r": 3},
    "dora": {"r": 3, "use_dora": True},
    "pissa": {"r": 3, "init_lora_weights": "pissa"},
    "olora": {"r": 3, "init_lora_weights": "olora"},
    "lora with biases": {"r": 3, "bias": "lora_only"},
    "AdaLora": {"total_step": 10},
    "OFT": {"r": 4, "oft_block_size": 0},
    "BOFT": {"boft_block_size": 4},
    "Vera": {"r": 8},
    "FourierFT": {"n_frequency": 50},
    "LoHa": {"r": 2},
    "LoKr": {"r": 2},
    "IA3": {"feedforward_modules": []},
    "HRA": {"r": 2},
    "RandLora": {"r": 4},
    "PrefixTuning": {"num_virtual_tokens": 4, "task_type": "FEATURE_EXTRACTION", "target_modules": None},
}


@pytest.mark.parametrize("name", PEFT)
def test_any_peft_config_counts_what_peft_trains(name):
    kind = name if hasattr(peft, f"{name}Config") else "Lora"
    options = {"target_modules": TARGETS, **PEFT[name]}
    config = getattr(peft, f"{kind}Config")(**{k: v for k, v in options.items() if v is not None})
    wanted = smidgen.count(text_model(), config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(text_model(), config)
    assert wanted == sum(p.numel() for p in adapted.parameters() if p.requires_grad) > 0


def test_our_lora_counts_as_peft_s():
    for name in ("sd15", "roberta-large", "llama2-7b"):
        assert smidgen.count(name, "lora", r=5) == smidgen.count(name, peft.LoraConfig(r=5))


def test_heads_are_not_counted():
    ours = smidgen.config("svfit", r=4, target_modules=["a"], modules_to_save=["c"])
    theirs = peft.LoraConfig(r=4, target_modules=["a"], modules_to_save=["c"])
    assert smidgen.count(mixed(), ours) == 4
    assert smidgen.count(mixed(), theirs) == 4 * (24 + 12)
    theirs.task_type = "SEQ_CLS"
    assert smidgen.count(mixed(), theirs) == 4 * (24 + 12)


def test_model_and_config_are_left_as_they_were():
    model, config = text_model(), peft.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights="pissa")
    before, told = snapshot(model), copy.deepcopy(config)
    smidgen.count(model, config)
    own = smidgen.config("svfit", r=2)
    smidgen.count(model, own)
    assert snapshot(model) == before and config == told and own.target_modules is None


def test_a_model_that_carries_adapters_counts_like_its_base():
    ours, theirs = smidgen.config("svfit", r=2, target_modules=TARGETS), peft.LoraConfig(r=2, target_modules=TARGETS)
    wanted = smidgen.count(text_model(), ours), smidgen.count(text_model(), theirs)
    adapted = smidgen.adapt(text_model(), "loldu", r=3, target_modules=TARGETS)
    wrapped = get_peft_model(text_model(), peft.LoraConfig(r=7, target_modules=TARGETS))
    for model in (adapted, wrapped):
        assert (smidgen.count(model, ours), smidgen.count(model, theirs)) == wanted


def test_an_energy_rank_cannot_be_counted_until_it_is_fixed():
    config = smidgen.config("svfit", r="energy:0.9", target_modules=["a"])
    with pytest.raises(smidgen.ConfigError, match=r"'energy:0.9' follows from the singular values.*trained_numbers"):
        smidgen.count(mixed(), config)
    with pytest.raises(smidgen.ConfigError, match="singular values"):
        smidgen.count("sd15", "svfit", r="energy:0.99")
    model = smidgen.adapt(mixed(), config)
    assert smidgen.count(mixed(), model.peft_config["default"]) == smidgen.trained_numbers(model)


def test_refusals_say_what_is_wrong():
    refusals = [
        (lambda: smidgen.count("sd15", "svfit", target_modules=["to_qq"]), smidgen.TargetError, "'to_qq'.*'to_q'"),
        (lambda: smidgen.count("sd15", "svfti"), smidgen.ConfigError, "Did you mean 'svfit'"),
        (lambda: smidgen.count("sd15", smidgen.config("svfit"), r=3), smidgen.ConfigError, "go with a method's name"),
        (lambda: smidgen.count("sd15", 3), smidgen.ConfigError, "got a int"),
        (lambda: smidgen.count("sd15", peft.LoraConfig(target_modules=["nope"])), smidgen.ConfigError, "'nope'"),
        (lambda: smidgen.count(mixed(), peft.LoraConfig()), smidgen.ConfigError, "peft refuses this LoraConfig"),
        (lambda: smidgen.count(nn.Bilinear(2, 2, 2), "svfit"), smidgen.TargetError, "name target_modules"),
    ]
    for refused, error, text in refusals:
        with pytest.raises(error, match=text):
            refused()


def test_sdxl_is_light():
    smidgen.count("sd15", "svfit")  # imports
    start = time.process_time()
    smidgen.count("sdxl", peft.LoraConfig(r=2))
    assert time.process_time() - start < 8  # 1.5 s of one core; 10 GB of weights would take minutes


def test_examples_in_docstrings():
    for module in (smidgen.adapters.counting, smidgen.bases.counting, architectures):
        failed, tried = doctest.testmod(module)
        assert tried and not failed
