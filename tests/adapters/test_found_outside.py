"""Faults that strangers found on models and calls that nobody here had written: each is right now, or refused in words."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

import smidgen
from smidgen import testing
from smidgen.adapters.checkpoint.files import CONFIG_NAME
from smidgen.adapters.export import export
from smidgen.adapters.transforms.rotation import Rotation
from smidgen.adapters.tuner.carried import adapted_layers
from smidgen.errors import AdapterFileError, ConfigError, SmidgenError
from tests.adapters.helpers import Net, inputs, trained
from tests.adapters.test_experts import moe, out

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
X = torch.ones(2, 16)


class Gated(nn.Module):
    """A branch whose gate is still zero, as at the start of a training."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.gate = nn.Linear(16, 16), nn.Linear(16, 16), nn.Parameter(torch.zeros(1))

    def before(self, x: Tensor) -> Tensor:
        return self.one(x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        return x + self.gate * self.two(x)


class Stateful(Gated):
    state: Tensor | None = None

    def before(self, x: Tensor) -> Tensor:
        new = self.one(x) if self.state is None else 0.9 * self.state + self.one(x)
        self.state = new.detach()
        return new


class OwnGenerator(Gated):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator()

    def before(self, x: Tensor) -> Tensor:
        return self.one(x) + 0.1 * torch.randn(x.shape, generator=self.generator)


class OfNumpy(Gated):
    def before(self, x: Tensor) -> Tensor:
        return self.one(x) + 0.1 * torch.from_numpy(np.random.randn(*x.shape)).float()


class OfPython(Gated):
    def before(self, x: Tensor) -> Tensor:
        return self.one(x) * (1 if random.random() < 0.5 else 0.9)


# ---- verify --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "verdict"),
    [(Gated, "OFF"), (OfNumpy, "OFF"), (OfPython, "OFF"), (Stateful, "NOT PROVEN"), (OwnGenerator, "NOT PROVEN")],
)
def test_what_a_model_does_by_itself_is_no_proof(made: Callable[[], nn.Module], verdict: str, tmp_path: Path) -> None:
    model = trained("lora", net=made(), target_modules=["two"], r=4)
    smidgen.save(model, tmp_path)
    random.seed(7)
    states = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[union-attr]
    for _ in range(3):
        report = smidgen.verify(model, tmp_path, (X,))
        assert report.verdict == verdict, (report.moved, report.reasons)
    assert verdict == "OFF" or "cannot be told from what the model does by itself" in report.reasons[0]
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states  # type: ignore[union-attr]
    with torch.no_grad():
        model.gate.fill_(1e4)
    if made is not OwnGenerator:  # whose noise the gate lets through
        assert smidgen.verify(model, tmp_path, (X,)).ok, "an adapter that does more than that is on"


def test_what_a_merged_neighbour_does_is_no_proof(tmp_path: Path) -> None:
    model = trained("lora", "a", 1, Gated(), target_modules=["one", "two"], r=4)
    trained("lora", "b", 2, model, target_modules=["two"], r=4)
    smidgen.save(model, tmp_path, "b")
    smidgen.set_active(model, ["a", "b"])
    for layer in adapted_layers(model).values():
        layer.merge(adapter_names=["a"])
    merged = model(X)
    assert smidgen.verify(model, tmp_path, (X,)).verdict == "OFF"
    testing.same(model(X), merged, "afterwards")
    with torch.no_grad():
        model.gate.fill_(1.0)
    for names in (["a"], ["a", "b"], ["b"]):
        for layer in adapted_layers(model).values():
            layer.unmerge()
            layer.merge(adapter_names=[name for name in names if name in layer.smidgen_slots])
        before = model(X)
        assert smidgen.verify(model, tmp_path, (X,)).ok, names
        testing.same(model(X), before, f"{names} merged, afterwards")


# ---- merging and strengths -----------------------------------------------------------------------------------------------


class Masked(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.tril(), self.bias)


class Doubled(nn.Linear):
    """A forward of its own that says the same."""

    def forward(self, x: Tensor) -> Tensor:
        return (2 * x) @ self.weight.mT / 2 + self.bias


@pytest.mark.parametrize("method", ["lora", "svfit", "diagonal"])
def test_a_layer_that_masks_its_weight_carries_an_adapter_but_merges_none(method: str) -> None:
    model = trained(method, net=nn.Sequential(Masked(16, 16)), target_modules=["0"])
    before = model(X)
    with pytest.raises(SmidgenError, match="A Masked at '0' does more than multiply by its weight"):
        smidgen.merge(model)
    testing.same(model(X), before, "after the refusal")
    plain = trained(method, net=nn.Sequential(Doubled(16, 16)), target_modules=["0"])
    before = plain(X)
    testing.close(smidgen.merge(plain)(X), before, "merged", factor=20)


def test_a_convolution_that_standardises_its_weight_merges_none() -> None:
    sizes = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "num_groups": 4}
    model = trained("lora", net=tf.BitModel(tf.BitConfig(**sizes)).eval(), target_modules=["conv2"], r=2)
    with pytest.raises(SmidgenError, match=r"A WeightStandardizedConv2d at .*conv2' does more"):
        smidgen.merge(model)


def test_experts_beside_merged_ones() -> None:
    model = get_peft_model(moe(), smidgen.config("lora", r=4, target_modules=["experts"]), adapter_name="a").eval()
    model.add_adapter("b", smidgen.config("lora", r=4, target_modules=["experts"], seed=2))
    for seed, name in enumerate("ab"):
        testing.perturb(model, seed, adapter_name=name)
    smidgen.set_active(model, ["a", "b"])
    both = out(model)
    smidgen.set_active(model, ["a"])
    testing.differs(out(model), both, "b")
    smidgen.set_active(model, ["a", "b"])
    model.merge_adapter(adapter_names=["a"])
    testing.close(out(model), both, "a merged, b beside it", factor=20)


@pytest.mark.parametrize(
    "config", [smidgen.config("svfit", r=4, target_modules=["q_proj"]), LoraConfig(r=4, target_modules=["q_proj"])]
)
def test_a_strength_reaches_what_is_merged(config: Any) -> None:
    model = get_peft_model(Net(), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "default" in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    wanted = {}
    for strength in (0.0, 0.5, 1.0):
        smidgen.set_strength(model, strength)
        wanted[strength] = model(inputs()).detach()
    model.merge_adapter()
    for strength, y in wanted.items():
        smidgen.set_strength(model, strength)
        testing.close(model(inputs()), y, f"strength {strength}", factor=20)
        with smidgen.disabled(model):
            testing.close(model(inputs()), Net()(inputs()), "disabled", factor=20)
        testing.close(model(inputs()), y, f"strength {strength}, after a block", factor=20)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), [0.5], None, "half"])
def test_a_strength_is_a_finite_number(wrong: Any) -> None:
    model = trained("lora")
    before = model(inputs())
    with pytest.raises(SmidgenError, match="strength of adapter 'default' is a"):
        smidgen.set_strength(model, wrong)
    testing.same(model(inputs()), before, "after the refusal")
    for fine in (np.float32(1), torch.tensor(1.0), 1):
        smidgen.set_strength(model, fine)
        testing.same(model(inputs()), before, repr(fine))


def test_an_adapter_named_twice_is_on_once() -> None:
    model = trained("lora")
    before = model(inputs())
    smidgen.set_active(model, ["default", "default"])
    testing.same(model(inputs()), before, "named twice")


# ---- what is put in ------------------------------------------------------------------------------------------------------


def test_a_weight_that_bitsandbytes_packed_for_a_call_is_read() -> None:
    bnb = pytest.importorskip("bitsandbytes")

    def made() -> nn.Module:
        torch.manual_seed(0)
        old = nn.Linear(256, 256)
        new = bnb.nn.Linear4bit(256, 256, quant_type="nf4", compute_dtype=torch.float32)
        new.load_state_dict(old.state_dict())
        return nn.Sequential(new.to("cpu")).eval()

    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(1))
    fresh, used = made(), made()
    with torch.no_grad():
        used(x)
    for model in (fresh, used):
        smidgen.adapt(model, "dora", r=4, target_modules=["0"])
        testing.perturb(model)
    layers = [next(iter(adapted_layers(model).values())) for model in (fresh, used)]
    testing.close(layers[1].base_matrix(), layers[0].base_matrix(), "the weight as it is read", torch.bfloat16)
    with torch.no_grad():
        testing.close(used(x), fresh(x), "the output", torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_cast_after_it_was_adapted_is_saved(dtype: torch.dtype, tmp_path: Path) -> None:
    model = trained("seeded", r=16).to(dtype)
    assert smidgen.verify(model, smidgen.save(model, tmp_path), (inputs().to(dtype),)).ok
    smidgen.merge(model)


@pytest.mark.parametrize("name", ["pop", "keys", "train", "half"])
def test_names_that_torch_keeps_for_itself(name: str, tmp_path: Path) -> None:
    smidgen.save(trained("lora"), tmp_path)
    for put in (lambda net: smidgen.adapt(net, "lora", name), lambda net: smidgen.load(net, tmp_path, name)):
        net = Net()
        with pytest.raises(SmidgenError, match=f"torch keeps the name '{name}' for itself"):
            put(net)
        assert not adapted_layers(net)


def test_default_targets_of_a_model_of_peft() -> None:
    llama = tf.LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    ours = get_peft_model(tf.LlamaForCausalLM(llama), smidgen.config("svfit", r=4))
    assert smidgen.default_targets(ours) == {"q_proj", "v_proj"}
    smidgen.adapt(ours, "svfit", "second", r=4)
    theirs = get_peft_model(tf.LlamaForCausalLM(llama), LoraConfig(r=4))
    with pytest.raises(ConfigError, match=r"holds adapters of one kind, this one of LORA.*get_base_model"):
        smidgen.adapt(theirs, "svfit", "second", r=4)
    smidgen.adapt(theirs.get_base_model(), "svfit", "second", r=4, target_modules=["k_proj"])


@pytest.mark.parametrize("method", ["svfit", "lora", "oft"])
def test_a_bank_takes_no_live_adapter_of_another_base(method: str) -> None:
    model = trained(method)
    bank = smidgen.Bank(model, model.peft_config["default"])
    with pytest.raises(SmidgenError, match="of another base than the bank's"):
        bank.put("x", trained(method, net=Net(seed=5)))
    assert bank.count == 0
    bank.put("x", trained(method, seed=9))


def test_peft_files_that_peft_would_refuse_are_not_written(tmp_path: Path) -> None:
    mamba = tf.MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1, state_size=4)
    model = trained("lora", net=tf.MambaForCausalLM(mamba), target_modules=["in_proj", "out_proj"], r=2)
    with pytest.raises(
        SmidgenError, match=r"out_proj cannot go into a peft file: peft puts no LoRA on this layer of a mamba"
    ):
        export(model, tmp_path / "out", "peft")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tilt", [0.0, 1e-9, 1e-7, 1e-5, 1e-3])
def test_a_change_that_is_a_half_turn_or_nearly_is_fitted(tilt: float) -> None:
    rotation = Rotation(4, blocks=1)
    weight = torch.randn(8, 4, generator=torch.Generator().manual_seed(1)).double()
    turn = torch.diag(torch.tensor([1.0, 1.0, -1.0, -1.0])).double()
    turn[2, 3], turn[3, 2] = tilt, -tilt
    change = weight @ turn - weight
    found = rotation.fit(weight, change, {})
    for dtype in (torch.float32, torch.float64):
        shift = rotation.row_shift(weight.to(dtype), {"q": found["q"].to(dtype)})
        assert bool(shift.isfinite().all())
    if tilt >= 1e-7:
        testing.close(shift, change, "the turn", torch.bfloat16)


class Halved(nn.Linear):
    """One entry of the weight is masked, and it happens to be zero."""

    def __init__(self) -> None:
        super().__init__(16, 16)
        with torch.no_grad():
            self.weight[0, 0] = 0

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones_like(self.weight)
        mask[0, 0] = 0
        return nn.functional.linear(x, self.weight * mask, self.bias)


class Clamped(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.clamp(-3, 3), self.weight, self.bias)


def hooked_after() -> nn.Module:
    layer = nn.Linear(16, 16)
    layer.register_forward_hook(lambda module, args, out: out * 2)
    return layer


def hooked_before() -> nn.Module:
    layer = nn.Linear(16, 16)
    layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    return layer


def replaced() -> nn.Module:
    layer = nn.Linear(16, 16)
    layer.forward = lambda x: nn.functional.linear(x, layer.weight / 2, layer.bias)  # type: ignore[method-assign]
    return layer


def watched() -> nn.Module:
    layer = nn.Linear(16, 16)
    layer.register_forward_hook(lambda module, args, out: None)
    return layer


@pytest.mark.parametrize("made", [Halved, lambda: Clamped(16, 16), hooked_after, hooked_before, replaced])
def test_a_layer_that_does_more_than_its_weight_merges_none(made: Callable[[], nn.Module], tmp_path: Path) -> None:
    model = trained("lora", net=nn.Sequential(made()), target_modules=["0"], r=2)
    for write in (smidgen.merge, lambda model: export(model, tmp_path / "x.safetensors", "full-diff")):
        with pytest.raises(SmidgenError, match="does more than multiply by its weight"):
            write(model)
    assert not list(tmp_path.iterdir())


def test_a_hook_that_only_watches_does_not_stand_in_the_way() -> None:
    model = trained("lora", net=nn.Sequential(watched()), target_modules=["0"], r=2)
    before = model(X)
    testing.close(smidgen.merge(model)(X), before, "merged", factor=20)


def test_of_two_adapters_from_one_file_the_active_one_counts(tmp_path: Path) -> None:
    smidgen.save(trained("lora"), tmp_path)
    model = smidgen.load(smidgen.load(Net(), tmp_path, "a"), tmp_path, "b")
    for name in "ab":
        smidgen.set_active(model, name)
        report = smidgen.verify(model, tmp_path)
        assert report.ok and report.adapter_name == name


def test_a_head_trained_alone_is_said(tmp_path: Path) -> None:
    model = smidgen.adapt(Net(), "lora", target_modules=["q_proj"], modules_to_save=["head"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(1.0)
    smidgen.save(model, tmp_path)
    assert "its head alone was trained" in smidgen.verify(model, tmp_path).reasons[0]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda model, bank, path: bank.rows([1, 2]).__enter__(), "Rows are a list of names"),
        (lambda model, bank, path: bank.rows("ann").__enter__(), "Rows are a list of names"),
        (lambda model, bank, path: bank.rows(None).__enter__(), "Rows are a list of names"),
        (lambda model, bank, path: bank.put("q", None), "from a model or from an adapter's folder"),
        (lambda model, bank, path: smidgen.load(Net(), None), "is a path, got None"),
        (lambda model, bank, path: smidgen.save(model, None), "is a path, got None"),
        (lambda model, bank, path: smidgen.save(model, path), "is a file; an adapter is saved into a folder"),
        (lambda model, bank, path: smidgen.adapt(Net(), "lora", 5), "name is a word without dots"),
        (lambda model, bank, path: smidgen.adapt(Net(), None), "is a method's name or a config"),
        (lambda model, bank, path: smidgen.adapt(Net(), {"r": 4}), "is a method's name or a config"),
        (lambda model, bank, path: smidgen.Bank(model, "lora"), "made of a config of Smidgen's"),
        (lambda model, bank, path: smidgen.Bank(model, LoraConfig()), "made of a config of Smidgen's"),
    ],
)
def test_values_of_another_type_are_named(call: Callable[..., Any], says: str, tmp_path: Path) -> None:
    model = trained("lora")
    (tmp_path / "file").write_text("")
    with pytest.raises(SmidgenError, match=says):
        call(model, smidgen.Bank(model, model.peft_config["default"]), tmp_path / "file")


@pytest.mark.parametrize("config", ["MambaConfig", "Mamba2Config"])
def test_rows_of_models_whose_cache_is_their_own(config: str) -> None:
    small = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "pad_token_id": 0}
    small |= {"num_heads": 8, "head_dim": 8, "n_groups": 1} if config == "Mamba2Config" else {}
    torch.manual_seed(0)
    made = getattr(tf, config.replace("Config", "ForCausalLM"))(getattr(tf, config)(**small)).eval()
    model = trained("lora", "a", 1, made, target_modules=["in_proj"], r=4)
    trained("lora", "b", 2, model, target_modules=["in_proj"], r=4)
    bank = smidgen.Bank(model, model.peft_config["a"])
    for name in "ab":
        bank.put(name, model, name)
    ids = torch.randint(3, 97, (2, 6), generator=torch.Generator().manual_seed(5))

    def scores(rows: list[str]) -> Tensor:
        with bank.rows(rows), torch.no_grad():
            told = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
            return torch.stack(model.generate(ids, attention_mask=torch.ones_like(ids), **told).logits, 1)

    both = scores(["a", "b"])
    for row, name in enumerate("ab"):
        testing.close(both[row], scores([name, name])[row], name, factor=50)


def test_targets_and_kinds_written_into_an_exported_config_are_not_passed_over(tmp_path: Path) -> None:
    model = trained("lora", r=4)
    export(model, tmp_path, "peft")
    config = json.loads((tmp_path / CONFIG_NAME).read_text())
    changes = {
        "use_dora": True,
        "exclude_modules": ["v_proj"],
        "layers_to_transform": [0],
        "target_modules": config["target_modules"][:1],
    }
    for key, value in changes.items():
        (tmp_path / CONFIG_NAME).write_text(json.dumps(config | {key: value}))
        with pytest.raises(AdapterFileError, match=f"was changed since it was written: {key}, which peft would follow"):
            smidgen.load(Net(), tmp_path)
    (tmp_path / CONFIG_NAME).write_text(json.dumps(config | {"target_modules": config["target_modules"][::-1]}))
    assert smidgen.verify(Net(), tmp_path, (inputs(),)).ok, "another order is the same"


@pytest.mark.parametrize(
    ("key", "value"), [("lora_alpha", 40), ("r", 10**9), ("use_rslora", True), ("alpha_pattern", {"q_proj": 1})]
)
def test_a_scale_written_into_an_exported_config_is_not_passed_over(key: str, value: Any, tmp_path: Path) -> None:
    model = trained("lora", r=4)
    export(model, tmp_path, "peft")
    assert smidgen.verify(Net(), tmp_path, (inputs(),)).ok
    config = json.loads((tmp_path / CONFIG_NAME).read_text())
    (tmp_path / CONFIG_NAME).write_text(json.dumps(config | {key: value}))
    with pytest.raises(AdapterFileError, match="was changed since it was written: r "):
        smidgen.load(Net(), tmp_path)
    assert smidgen.verify(Net(), tmp_path, (inputs(),)).verdict == "OFF"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_merged_model_in_16_bits_has_its_head_in_16_bits(dtype, tmp_path):
    model = trained("svfit", modules_to_save=["head"])
    with torch.no_grad():
        model.head.modules_to_save["default"].weight.mul_(1.2345678)
    export(model, tmp_path, "merged", dtype=dtype, allow_loss=True)
    found = load_file(tmp_path / "model.safetensors")
    testing.same(found["head.weight"], model.head.modules_to_save["default"].weight.to(dtype), "the head")
