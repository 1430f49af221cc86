"""Everything peft, transformers and users of theirs do with an adapter, on tiny random models.

Holds for the peft versions of ``TESTED_PEFT``; ``test_private_names`` lists what the tuner's folder, and no
other, uses of peft's inside.
"""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, LoraConfig, PeftModel, TaskType, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

import smidgen
from smidgen import testing
from smidgen.adapters.tuner.adapted_layer import AdaptedLayer
from smidgen.adapters.tuner.carried import adapted_layers
from smidgen.adapters.tuner.peft_bridge import TESTED_PEFT
from smidgen.errors import AdapterFileError, SmidgenError

from .helpers import Net, inputs, trained

transformers = pytest.importorskip("transformers")

METHODS = ["tlora(2,2)", "tlora_star", "svfit", "loldu", "lora", "oft"]
BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "vocab_size": 60}


def bert(**options) -> nn.Module:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    config = transformers.BertConfig(**BERT, num_labels=3, **options)
    return transformers.BertForSequenceClassification(config).eval()


def llama(tied: bool = False) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**BERT, num_key_value_heads=2, tie_word_embeddings=tied)
    return transformers.LlamaForCausalLM(config).eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=24, n_layer=2, n_head=2, vocab_size=60)).eval()


IDS = torch.arange(24).reshape(3, 8)


def logits(model: nn.Module, ids: Tensor = IDS, **options) -> Tensor:  # type: ignore[no-untyped-def]
    with torch.no_grad():
        return model(input_ids=ids, **options).logits


# ---- peft's calls ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("make", "targets"), [(bert, ["query", "value"]), (llama, None), (gpt2, ["c_attn"])])
def test_peft_from_start_to_merge(method: str, make, targets, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    base = logits(make())
    model = get_peft_model(make(), smidgen.config(method, target_modules=targets))
    testing.same(logits(model), base, "at the start")
    wanted = logits(testing.perturb(model).eval())
    testing.differs(wanted, base, "trained")
    with model.disable_adapter():
        testing.same(logits(model), base, "disable_adapter")
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix != ".md") == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    for options in ({}, {"low_cpu_mem_usage": True}, {"is_trainable": True}, {"adapter_name": "other"}):
        loaded = PeftModel.from_pretrained(make(), tmp_path, **options).eval()
        testing.close(logits(loaded), wanted, f"from_pretrained({options})")
        trains = [n for n, p in loaded.named_parameters() if p.requires_grad]
        assert bool(trains) == ("is_trainable" in options)
        assert all(".smidgen_slots." in n for n in trains)
    testing.close(logits(smidgen.load(make(), tmp_path, "third")), wanted, "smidgen.load")
    merged = model.merge_and_unload(safe_merge=True)
    testing.close(logits(merged), wanted, "merge_and_unload", factor=10)
    assert not any(isinstance(m, AdaptedLayer) for m in merged.modules())
    assert type(merged) is type(make())


def test_several_adapters_of_several_methods(tmp_path: Path) -> None:
    for i, method in enumerate(("svfit", "tlora", "lora")):
        smidgen.save(trained(method, seed=i), tmp_path / method)
    outputs = {m: smidgen.load(Net(), tmp_path / m)(inputs()).detach() for m in ("svfit", "tlora", "lora")}
    model = PeftModel.from_pretrained(Net(), tmp_path / "svfit", adapter_name="svfit")
    model.load_adapter(tmp_path / "tlora", "tlora")
    smidgen.load(model, tmp_path / "lora", "lora")
    for name, wanted in outputs.items():
        model.set_adapter(name)
        testing.close(model(inputs()), wanted, f"set_adapter({name})")
    smidgen.set_active(model, "tlora")
    assert model.active_adapter == "tlora"
    model.set_adapter("svfit")
    model.base_model.set_adapter(["svfit", "lora"])
    both = model(inputs()).detach()
    model.delete_adapter("tlora")
    testing.same(model(inputs()).detach(), both, "after deleting an idle adapter")
    for layer in adapted_layers(model).values():
        delta = layer.delta_weight("svfit") + layer.delta_weight("lora")
        with torch.no_grad():
            layer.base_layer.weight += delta
    with smidgen.disabled(model):
        testing.close(model(inputs()), both, "sum of two deltas by hand", factor=5)


def test_deleting_the_active_adapter_and_unload() -> None:
    model = get_peft_model(Net(), smidgen.config("svfit", target_modules=["q_proj"]), adapter_name="a")
    model.add_adapter("b", smidgen.config("oft", target_modules=["v_proj"]))
    testing.perturb(model)
    model.set_adapter("b")
    model.delete_adapter("b")
    assert model.active_adapter == "a"
    base = model.unload()
    testing.same(base(inputs()), Net()(inputs()), "unloaded")


def test_a_copy_is_independent() -> None:
    model = get_peft_model(trained("loldu").requires_grad_(False), LoraConfig(target_modules=["head"]))
    twin = copy.deepcopy(model)
    before = model(inputs()).detach()
    testing.perturb(twin, 7)
    testing.same(model(inputs()).detach(), before, "the original after training its copy")
    testing.differs(twin(inputs()).detach(), before, "the copy")
    for layer in adapted_layers(twin).values():
        layer.merge()
    testing.same(model(inputs()).detach(), before, "the original after merging its copy")


def test_state_dict_of_peft_goes_in_and_out() -> None:
    model = testing.perturb(get_peft_model(Net(), smidgen.config("loldu", target_modules=["q_proj"])))
    state = get_peft_model_state_dict(model)
    assert set(state) == {"residual_delta", "residual_pivots"}
    fresh = get_peft_model(Net(), smidgen.config("loldu", target_modules=["q_proj"]))
    result = set_peft_model_state_dict(fresh, state)
    assert not result.unexpected_keys
    testing.close(fresh(inputs()), model(inputs()), "set_peft_model_state_dict")


# ---- heads ---------------------------------------------------------------------------------------------------------------


def headed(method: str = "svfit", name: str = "default", seed: int = 1) -> nn.Module:
    net = trained(method, name, seed, modules_to_save=["head"])
    with torch.no_grad():
        for head in (m for m in net.modules() if hasattr(m, "modules_to_save")):
            head.modules_to_save[name].weight += 0.1 * seed
    return net


def test_a_head_is_saved_and_restored_both_ways(tmp_path: Path) -> None:
    base = Net()(inputs())
    net = headed()
    wanted = net(inputs()).detach()
    with smidgen.disabled(net):
        testing.same(net(inputs()), base, "disabled, head included")
    testing.same(net(inputs()).detach(), wanted, "enabled again")
    smidgen.save(net, tmp_path / "ours")
    testing.close(smidgen.load(Net(), tmp_path / "ours", "x")(inputs()), wanted, "smidgen.save, smidgen.load")
    through = PeftModel.from_pretrained(Net(), tmp_path / "ours", adapter_name="y")
    testing.close(through(inputs()), wanted, "smidgen.save, from_pretrained")
    through.save_pretrained(tmp_path / "theirs")
    testing.close(smidgen.load(Net(), tmp_path / "theirs" / "y")(inputs()), wanted, "save_pretrained, smidgen.load")
    fresh = PeftModel.from_pretrained(Net(), tmp_path / "theirs" / "y")
    testing.close(fresh(inputs()), wanted, "save_pretrained, from_pretrained")
    merged = smidgen.merge(net)
    testing.close(merged(inputs()), wanted, "merged, head included", factor=5)
    assert [type(m) for m in merged.modules()] == [type(m) for m in Net().modules()]


def test_a_damaged_head_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    smidgen.save(headed(), tmp_path)
    good = load_file(tmp_path / "adapter_model.safetensors")
    name = next(k for k in good if k.endswith("head.weight"))
    for damage in (
        {k: v for k, v in good.items() if k != name},
        good | {name: good[name][:, :-1].contiguous()},
        good | {name: good[name] * float("nan")},
        good | {"base_model.model.other.weight": good[name].clone()},
    ):
        save_file(damage, tmp_path / "adapter_model.safetensors")
        net = Net()
        before = testing.snapshot(net)
        with pytest.raises(AdapterFileError, match=r"head|other"):
            smidgen.load(net, tmp_path)
        testing.unchanged(before, net, "a damaged head")


def test_two_adapters_with_heads_switch_but_do_not_add(tmp_path: Path) -> None:
    outputs = {}
    for i, name in enumerate(("a", "b"), start=1):
        net = headed("svfit", name, i)
        outputs[name] = net(inputs()).detach()
        smidgen.save(net, tmp_path / name, name)
    net = smidgen.load(smidgen.load(Net(), tmp_path / "a", "a"), tmp_path / "b", "b")
    for name, wanted in outputs.items():
        smidgen.set_active(net, name)
        testing.close(net(inputs()), wanted, f"head and adapter {name}")
    with pytest.raises(SmidgenError, match=r"heads do not add"):
        smidgen.set_active(net, ["a", "b"])
    testing.close(net(inputs()), outputs["b"], "after the refusal")


def test_sequence_classification_restores_its_classifier(tmp_path: Path) -> None:
    config = smidgen.config("svfit", target_modules=["query", "value"], task_type=TaskType.SEQ_CLS)
    model = testing.perturb(get_peft_model(bert(), config)).eval()
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].bias += 3
    wanted = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    testing.close(logits(PeftModel.from_pretrained(bert(), tmp_path / "adapter").eval()), wanted, "with its classifier")
    bert().save_pretrained(tmp_path / "base")
    data = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    data["base_model_name_or_path"] = str(tmp_path / "base")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(data))
    auto = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=3).eval()
    testing.close(logits(auto), wanted, "AutoPeftModel")


# ---- mixed batches, training aids ------------------------------------------------------------------------------------------


def test_mixed_batch_by_adapter_names() -> None:
    model = get_peft_model(bert(), smidgen.config("svfit", target_modules=["query"]), adapter_name="a")
    model.add_adapter("b", smidgen.config("tlora(2,2)", target_modules=["query", "value"]))
    testing.perturb(model, 3).eval()
    alone = {"__base__": logits(bert())}
    for name in "ab":
        model.set_adapter(name)
        alone[name] = logits(model)
    names = ["b", "__base__", "a"]
    mixed = logits(model, adapter_names=names)
    for i, name in enumerate(names):
        testing.close(mixed[i], alone[name][i], f"row of {name}")
    with pytest.raises(ValueError, match="non-existing adapter"):
        logits(model, adapter_names=["b", "c", "a"])
    with pytest.raises(ValueError, match="same as the number of inputs"):
        logits(model, adapter_names=["b"])


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    grads = []
    for on in (False, True):
        model = testing.perturb(get_peft_model(llama(), smidgen.config("tlora"))).train()
        if on:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(input_ids=IDS, labels=IDS).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, grad in grads[0].items():
        testing.close(grads[1][name], grad, name)


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_autocast_trains(method: str) -> None:
    model = testing.perturb(get_peft_model(llama(), smidgen.config(method)))
    full = model(input_ids=IDS, labels=IDS).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=IDS, labels=IDS).loss
    testing.close(loss.detach(), full.detach(), "loss", torch.bfloat16)
    loss.backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad is not None and bool(torch.isfinite(p.grad).all()) and bool(p.grad.any()), name


def test_all_linear_leaves_the_head_alone_and_can_be_used_twice() -> None:
    for tied in (False, True):
        model = smidgen.adapt(llama(tied), "svfit", target_modules="all-linear", r=2)
        first = set(adapted_layers(model))
        assert not any("lm_head" in n for n in first)
        assert {n.rpartition(".")[2] for n in first} >= {"q_proj", "o_proj", "down_proj"}
        smidgen.adapt(model, "lora", "second", target_modules="all-linear", r=2)
        assert set(adapted_layers(model, "second")) == first
    config = smidgen.config("lora", target_modules="all-linear", task_type=TaskType.SEQ_CLS)
    assert not any("classifier" in n for n in adapted_layers(get_peft_model(bert(), config)))


# ---- transformers' own calls -------------------------------------------------------------------------------------------------


def test_transformers_add_adapter(tmp_path: Path) -> None:
    model = bert()
    base = logits(model)
    model.add_adapter(smidgen.config("loldu", target_modules=["query", "value"]), "mine")
    wanted = logits(testing.perturb(model).eval())
    model.disable_adapters()
    testing.same(logits(model), base, "disable_adapters")
    model.enable_adapters()
    testing.same(logits(model), wanted, "enable_adapters")
    model.save_pretrained(tmp_path)
    testing.close(logits(smidgen.load(bert(), tmp_path)), wanted, "model.save_pretrained, smidgen.load")
    through = PeftModel.from_pretrained(bert(), tmp_path).eval()
    testing.close(logits(through), wanted, "model.save_pretrained, PeftModel.from_pretrained")
    model.delete_adapter("mine")
    testing.same(logits(model), base, "delete_adapter")


# ---- a process without smidgen, and peft's inside ------------------------------------------------------------------------------


def test_a_process_that_has_not_imported_smidgen(tmp_path: Path) -> None:
    smidgen.save(trained(), tmp_path)
    code = f"from peft import PeftConfig; PeftConfig.from_pretrained({str(tmp_path)!r})"
    environment = os.environ | {"PYTHONPATH": str(Path(smidgen.__file__).parents[1])}
    for line, ends in ((code, False), (f"import smidgen; {code}", True)):
        done = subprocess.run([sys.executable, "-c", line], env=environment, capture_output=True, text=True)
        assert (done.returncode == 0) == ends, done.stderr
        if not ends:
            assert "SMIDGEN" in done.stderr.strip().splitlines()[-1]


def test_private_names() -> None:
    import peft.mapping
    from peft.tuners import tuners_utils
    from peft.utils import other

    assert peft.__version__ in TESTED_PEFT, (
        f"run tests/conformance on peft {peft.__version__} and add it to TESTED_PEFT"
    )
    names = {
        tuners_utils: ["check_adapters_to_merge"],
        tuners_utils.BaseTuner: [
            "_prepare_model",
            "_check_target_module_exists",
            "_create_and_replace",
            "_replace_module",
            "_check_merge_allowed",
            "_unload_and_optionally_merge",
            "_cast_adapter_dtype",
            "_get_adapter_state_dict",
            "_remove_adapter_name_from_key",
            "_remap_adapter_state_dict_for_load",
            "uses_shared_state",
        ],
        tuners_utils.BaseTunerLayer: ["_move_adapter_to_device_of_base_layer", "get_base_weight"],
        peft.PeftModel: ["_enable_peft_forward_hooks"],
        peft.utils: ["resolve_quantization_backend"],
        other: ["AuxiliaryTrainingWrapper", "get_pattern_key"],
        other.AuxiliaryTrainingWrapper: ["adapter_state_dict_load_map"],
    }
    for owner, own in names.items():
        for name in own:
            assert hasattr(owner, name), f"peft {peft.__version__} has no {owner.__name__}.{name} any more"
    for table in ("CONFIG", "TUNER", "PREFIX"):
        assert hasattr(peft.mapping, f"PEFT_TYPE_TO_{table}_MAPPING")
    package = Path(smidgen.__file__).parent
    texts = {path.relative_to(package): path.read_text() for path in package.rglob("*.py")}
    for name in (name for own in names.values() for name in own):
        users = {path for path, text in texts.items() if re.search(rf"\b{name}\b", text)}
        assert users and all(path.parts[:2] == ("adapters", "tuner") for path in users), (name, users)


def test_registering_again_changes_nothing() -> None:
    import peft.mapping

    from smidgen.adapters.tuner.peft_bridge import register

    before = dict(peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING)
    register()
    assert before == peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_is_called_with_its_input_by_name(method: str) -> None:
    """As AnimateDiff's motion modules call theirs."""
    net = trained(method)
    layer, x = adapted_layers(net)["layers.0.q_proj"], inputs()
    testing.same(layer(input=x), layer(x), "by name")
    with smidgen.disabled(net):
        testing.same(layer(input=x), layer(x), "by name, switched off")
