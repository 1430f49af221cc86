"""Weights that layers share, weights made anew for each call, and what a model goes through between merge and unmerge."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import smidgen
from smidgen import testing
from smidgen.adapters.tuner.carried import adapted_layers
from smidgen.errors import AdapterFileError, SmidgenError, TargetError

METHODS = ("svfit", "loldu", "lora", "tlora", "seeded")


class Tied(nn.Module):
    """An encoder and a decoder of one weight: the same parameter, or views of one storage."""

    def __init__(self, views: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enc = nn.Linear(16, 16, bias=False)
        self.dec = nn.Linear(16, 16, bias=False)
        self.dec.weight = nn.Parameter(self.enc.weight.data.T) if views else self.enc.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.dec(torch.tanh(self.enc(x)))  # type: ignore[no-any-return]


class Twice(nn.Module):
    """One layer in two places."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(16, 16)
        self.steps = nn.ModuleList([self.first, nn.Linear(16, 16), self.first])

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = torch.tanh(step(x))
        return x


def inputs() -> Tensor:
    return torch.randn(4, 16, generator=torch.Generator().manual_seed(3))


def weight(layer: nn.Module) -> Tensor:
    return getattr(layer, "base_layer", layer).weight  # type: ignore[no-any-return]


# ---- weights that are shared -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("views", [False, True], ids=["one parameter", "one storage"])
@pytest.mark.parametrize("targets", [["dec"], ["enc"], ["enc", "dec"]], ids="+".join)
@pytest.mark.parametrize("method", METHODS)
def test_merging_unties(method: str, targets: list[str], views: bool) -> None:
    config = smidgen.config(method, target_modules=targets)
    live = testing.perturb(smidgen.adapt(Tied(views), config))(inputs()).detach()
    bare = smidgen.merge(testing.perturb(smidgen.adapt(Tied(views), config)))
    testing.close(bare(inputs()), live, "smidgen.merge", factor=5)
    bare = testing.perturb(get_peft_model(Tied(views), config)).merge_and_unload(safe_merge=True)
    testing.close(bare(inputs()), live, "merge_and_unload", factor=5)
    model = testing.perturb(get_peft_model(Tied(views), config))
    model.merge_adapter()
    testing.close(model(inputs()), live, "merge_adapter", factor=5)
    model.unmerge_adapter()
    testing.same(model(inputs()).detach(), live, "unmerge_adapter")
    base = model.unload()
    assert (base.enc.weight is base.dec.weight) != views, "the tie is back after unmerging"


def test_merging_says_what_it_unties(caplog: pytest.LogCaptureFixture) -> None:
    for put in (smidgen.adapt, get_peft_model):
        model = put(Tied(), smidgen.config("svfit", target_modules=["dec"]))
        caplog.clear()
        smidgen.merge(model) if put is smidgen.adapt else model.merge_and_unload()
        assert "'dec' shares its weight with enc.weight; merged, it has one of its own" in caplog.text
    caplog.clear()
    smidgen.merge(smidgen.adapt(Twice(), "svfit", target_modules=["steps.1"]))
    assert not caplog.text


def test_merging_an_adapter_of_pefts_own_unties_too() -> None:
    model = smidgen.adapt(Tied(), LoraConfig(r=2, target_modules=["dec"], init_lora_weights=False))
    live, tied = model(inputs()).detach(), Tied()
    merged = smidgen.merge(model)
    testing.close(merged(inputs()), live, "peft's LoRA merged by smidgen", factor=5)
    testing.same(merged.enc.weight, tied.enc.weight, "the other layer's weight")


def test_disabling_a_merged_layer_that_is_tied() -> None:
    model = testing.perturb(smidgen.adapt(Tied(), "svfit", target_modules=["enc", "dec"]))
    for layer in adapted_layers(model).values():
        layer.merge()
    with smidgen.disabled(model):
        testing.same(model(inputs()), Tied()(inputs()), "disabled")


def llama() -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning")
@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied:UserWarning")
@pytest.mark.parametrize("route", ["smidgen", "peft"])
@pytest.mark.parametrize("options", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_a_merged_head_survives_a_save_of_the_whole_model(
    route: str, options: dict[str, list[str]], tmp_path: Path
) -> None:
    ids, config = torch.arange(6)[None], smidgen.config("svfit", **{"target_modules": ["q_proj"], **options})
    model = smidgen.adapt(llama(), config) if route == "smidgen" else get_peft_model(llama(), config)
    testing.perturb(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "modules_to_save" in name:
                p += 0.1
    live = model(ids).logits.detach()
    merged = smidgen.merge(model) if route == "smidgen" else model.merge_and_unload()
    assert not merged.config.tie_word_embeddings
    testing.same(merged.get_input_embeddings().weight, llama().get_input_embeddings().weight, "the embeddings")
    merged.save_pretrained(tmp_path)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    testing.close(again(ids).logits, live, "merged, saved and loaded", factor=5)


def test_a_tied_model_whose_tied_weights_are_not_adapted_stays_tied() -> None:
    merged = smidgen.merge(testing.perturb(smidgen.adapt(llama(), "svfit", target_modules=["q_proj"])))
    assert merged.config.tie_word_embeddings
    assert merged.get_input_embeddings().weight is merged.get_output_embeddings().weight


def test_a_merge_that_one_layer_refuses_changes_none() -> None:
    model = testing.perturb(get_peft_model(Twice(), smidgen.config("lora", target_modules=["first", "steps.1"])))
    with torch.no_grad():
        next(iter(adapted_layers(model)["steps.1"].smidgen_slots["default"].parameters()))[0, 0] = float("nan")
    before = testing.snapshot(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="seems to be broken"):
            merge(safe_merge=True)
        testing.unchanged(before, model, "a refused merge")
        assert not any(layer.merged for layer in adapted_layers(model).values())


# ---- one layer in two places -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_in_two_places_is_adapted_in_both(method: str, tmp_path: Path) -> None:
    classes = [type(m) for m in Twice().modules()]
    model = testing.perturb(smidgen.adapt(Twice(), method, target_modules=["first"]))
    assert model.steps[0] is model.steps[2] is model.first
    live = model(inputs()).detach()
    smidgen.save(model, tmp_path)
    assert smidgen.verify(Twice(), tmp_path).ok
    for put in (smidgen.adapt, get_peft_model):
        one = testing.perturb(put(Twice(), smidgen.config(method, target_modules=["first"])))
        testing.same(one(inputs()).detach(), live, put.__name__)
        bare = smidgen.merge(one) if put is smidgen.adapt else one.merge_and_unload()
        testing.close(bare(inputs()), live, f"merged after {put.__name__}", factor=5)
        assert [type(m) for m in bare.modules()] == classes
        assert bare.steps[0] is bare.steps[2] is bare.first
    fresh = smidgen.load(Twice(), tmp_path)
    testing.close(fresh(inputs()), live, "loaded", torch.float16)
    testing.same(get_peft_model(Twice(), smidgen.config(method, target_modules=["first"])).unload()(inputs()), Twice()(inputs()), "unloaded")  # fmt: skip


def test_another_name_of_a_layer_is_said() -> None:
    with pytest.raises(TargetError, match=r"'steps.2' is the same layer as 'first'; name that"):
        smidgen.adapt(Twice(), "svfit", target_modules=["steps.2"])


# ---- merge, cast, unmerge --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("base", [Tied, Twice])
def test_a_cast_between_merge_and_unmerge(base: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    name = "dec" if base is Tied else "first"
    wanted = base().to(dtype)
    model = smidgen.adapt(base(), "svfit", target_modules=[name])
    smidgen.adapt(model, "tlora", "other", target_modules=[name])
    testing.perturb(model)
    layer = adapted_layers(model)[name]
    layer.merge()
    model.to(dtype)
    merged = model(inputs().to(dtype)).detach()
    with smidgen.disabled(model):
        testing.same(model(inputs().to(dtype)), wanted(inputs().to(dtype)), "disabled after the cast")
    coarse = torch.float32 if dtype == torch.float64 else dtype  # it was merged in float32
    testing.close(model(inputs().to(dtype)), merged, "merged again", coarse, factor=5)
    layer.unmerge()
    testing.same(layer.base_layer.weight, getattr(wanted, name).weight, "weight after the cast")
    if base is Tied:
        assert weight(model.enc) is weight(model.dec), "still tied"
    assert model(inputs().to(dtype)).dtype == dtype


def test_a_bank_beside_a_merged_adapter_after_a_cast() -> None:
    model = smidgen.adapt(Twice(), "svfit", target_modules=["first"])
    testing.perturb(model)
    bank = smidgen.Bank(model, model.peft_config["default"])
    bank.put("a", model, "default")
    wanted = model(inputs()).detach()
    adapted_layers(model)["first"].merge()
    model.bfloat16()
    with bank.rows(["a"] * 4):
        testing.close(model(inputs().bfloat16()), wanted, "the bank", torch.bfloat16)


# ---- weights made anew for each call ---------------------------------------------------------------------------------

MAKERS: dict[str, tuple[Callable[[nn.Module], nn.Module], str]] = {
    "weight_norm": (parametrizations.weight_norm, "WeightNorm"),
    "spectral_norm": (parametrizations.spectral_norm, "SpectralNorm"),
    "orthogonal": (parametrizations.orthogonal, "Orthogonal"),
    "old weight_norm": (weight_norm, "WeightNorm"),
    "old spectral_norm": (spectral_norm, "SpectralNorm"),
    "pruning": (lambda layer: prune.l1_unstructured(layer, "weight", 0.3), "L1Unstructured"),
}


def made(maker: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), MAKERS[maker][0](nn.Linear(16, 16)), nn.Tanh()).eval()


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:torch.nn.utils.weight_norm is deprecated:FutureWarning")
@pytest.mark.parametrize("maker", MAKERS)
def test_a_weight_that_is_made_for_each_call_carries_an_adapter_but_merges_none(maker: str, tmp_path: Path) -> None:
    for method in ("svfit", "tlora"):
        model = smidgen.adapt(made(maker), method, target_modules=["0", "1"])
        testing.same(model(inputs()), made(maker)(inputs()), "at the start")
        testing.perturb(model)
        live = model(inputs()).detach()
        smidgen.save(model, tmp_path / method)
        testing.close(smidgen.load(made(maker), tmp_path / method)(inputs()), live, "loaded", factor=5)
        before = testing.snapshot(model)
        with pytest.raises(SmidgenError, match=f"'1' is made anew for each call by {MAKERS[maker][1]}.*take that off"):
            smidgen.merge(model)
        testing.unchanged(before, model, "a refused merge")
        wrapped = get_peft_model(made(maker), smidgen.config(method, target_modules=["0", "1"]))
        before = testing.snapshot(wrapped)
        for merge in (wrapped.merge_adapter, wrapped.merge_and_unload):
            with pytest.raises(SmidgenError, match="made anew for each call"):
                merge()
            testing.unchanged(before, wrapped, "a refused merge through peft")


def test_messages_name_the_class_that_its_author_wrote() -> None:
    conv = nn.Sequential(parametrizations.weight_norm(nn.Conv1d(4, 4, 3)))
    with pytest.raises(TargetError, match="'0' is a Conv1d;"):
        smidgen.adapt(conv, "lora", target_modules=["0"])


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
@pytest.mark.parametrize("lazy", [nn.LazyLinear, lambda rows: nn.LazyConv2d(rows, 3)], ids=["linear", "conv2d"])
@pytest.mark.parametrize("targets", [["0"], ["1"], "all-linear"], ids=["another", "named", "all-linear"])
def test_a_layer_without_a_shape_is_refused_until_it_has_one(lazy: Callable[[int], nn.Module], targets: object) -> None:
    model = nn.Sequential(nn.Linear(16, 16), lazy(8))
    with pytest.raises(TargetError, match=r"'1' is a Lazy\w+ whose shape is not known yet; run one forward pass"):
        smidgen.adapt(model, "svfit", target_modules=targets)
    assert not smidgen.names(model)
    x = inputs() if isinstance(model[1], nn.LazyLinear) else torch.randn(3, 4, 16)
    wanted = model(x)
    smidgen.adapt(model, "svfit", target_modules=targets)
    testing.same(model(x), wanted, "once it has run")


# ---- models without values -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("through_meta", [True, False], ids=["meta", "to_empty alone"])
@pytest.mark.parametrize("method", METHODS)
def test_an_emptied_adapter_runs_again_once_it_is_loaded(method: str, through_meta: bool) -> None:
    model = testing.perturb(smidgen.adapt(Twice(), method, target_modules=["first"]))
    wanted, state = model(inputs()).detach(), copy.deepcopy(model.state_dict())
    if through_meta:
        model.to("meta")
    model.to_empty(device="cpu")
    with pytest.raises(AdapterFileError, match=r"numbers of this adapter are gone.*Load its state dict"):
        model(inputs())
    model.load_state_dict(state)
    testing.close(model(inputs()), wanted, "loaded after to_empty")
    model.to("meta").load_state_dict(state, assign=True)
    testing.close(model(inputs()), wanted, "loaded by assignment")


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_made_on_meta_starts_when_its_modules_are_reset(method: str) -> None:
    model = smidgen.adapt(Twice().to("meta"), method, target_modules=["first"])
    model.to_empty(device="cpu")
    with torch.no_grad():
        weight(model.first).copy_(Twice().first.weight)
        model.first.base_layer.bias.copy_(Twice().first.bias)
        model.steps[1].load_state_dict(Twice().steps[1].state_dict())
    with pytest.raises(AdapterFileError, match="reset_parameters"):
        model(inputs())
    for module in model.modules():
        if ".slot" in type(module).__module__:
            module.reset_parameters()
    testing.same(model(inputs()), Twice()(inputs()), "a fresh adapter")
    wanted = testing.perturb(smidgen.adapt(Twice(), method, target_modules=["first"]))(inputs())
    testing.close(testing.perturb(model)(inputs()), wanted, "the adapter that would have been made at once")
