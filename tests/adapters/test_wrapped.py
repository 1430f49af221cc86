"""Wrapped as trainers wrap models, or a state dict given: the file holds what was asked, for every method."""

import copy
import json

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import smidgen
from benchmarks import wrapping
from smidgen.adapters.tuner.carried import adapted_layers
from smidgen.errors import SmidgenError, TargetError

FAST = ["loldu", "tlora", "svfit"]


def check_cell(cell: dict) -> None:
    assert "refused" not in cell, cell
    assert cell["moved"] > 1e-3, "nothing was trained"
    assert cell["file"] <= 1e-6 and cell.get("given", 0) <= 1e-6 and cell.get("one process", 0) <= 1e-5, cell


@pytest.mark.parametrize("method", wrapping.METHODS)
@pytest.mark.parametrize("cell", [wrapping.averaged, wrapping.snapshot])
def test_averages_are_what_is_saved(method, cell, tmp_path):
    check_cell(cell(method, tmp_path))


def check_two_processes(methods: list[str], folder) -> None:
    cells = wrapping.two_processes(methods, ["ddp", "fsdp2"], folder)
    assert len(cells) == 2 * len(methods)
    for cell in cells.values():
        check_cell(cell)


def test_two_processes(tmp_path):
    check_two_processes(FAST, tmp_path)


@pytest.mark.slow
def test_two_processes_every_method(tmp_path):
    check_two_processes([method for method in wrapping.METHODS if method not in FAST], tmp_path)


# ---- a state dict given ----------------------------------------------------------------------------------------------


def trained(method: str, seed: int = 1) -> PeftModel:
    name, options = wrapping.METHODS[method]
    config = smidgen.config(name, target_modules=["up", "down"], modules_to_save=["head"], **options)
    return moved(get_peft_model(wrapping.Net(), config), seed)


def moved(model: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return model


def snapshot_of(model: nn.Module) -> dict:
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.mark.parametrize("method", wrapping.METHODS)
def test_save_pretrained_writes_the_state_dict_it_is_given(method, tmp_path):
    model = trained(method)
    best, wanted = snapshot_of(model), wrapping.answer(model)
    moved(model, 2)
    live = snapshot_of(model)
    model.save_pretrained(tmp_path, state_dict=best)
    assert all(torch.equal(value, live[key]) for key, value in model.state_dict().items())
    assert wrapping.off(tmp_path, wanted) <= 1e-6  # verified too: the canary is of the numbers written
    through_peft = PeftModel.from_pretrained(wrapping.Net(), tmp_path)
    torch.testing.assert_close(wrapping.answer(through_peft), wanted)
    assert wrapping.off(smidgen.save(model, tmp_path / "live"), wrapping.answer(model)) <= 1e-6


WRAPPED = {
    "as it is": lambda model: model.state_dict(),
    "averaged": lambda model: AveragedModel(model).state_dict(),
    "compiled": lambda model: {f"_orig_mod.{key}": value for key, value in model.state_dict().items()},
    "the model within peft's": lambda model: model.get_base_model().state_dict(),
    "trained parameters alone": lambda model: {n: p for n, p in model.named_parameters() if p.requires_grad},
    "the adapter's own": get_peft_model_state_dict,
}


@pytest.mark.parametrize("take", WRAPPED)
@pytest.mark.parametrize("method", ["loldu", "tlora"])
def test_a_state_dict_under_any_wrapping(method, take, tmp_path):
    model = trained(method)
    best, wanted = {k: v.clone() for k, v in WRAPPED[take](model).items()}, wrapping.answer(model)
    moved(model, 2)
    assert wrapping.off(smidgen.save(model, tmp_path, state_dict=best), wanted) <= 1e-6


def test_a_state_dict_for_an_adapter_of_pefts_and_for_one_of_two(tmp_path):
    model = smidgen.adapt(wrapping.Net(), LoraConfig(r=2, target_modules=["up"], init_lora_weights=False))
    best, wanted = snapshot_of(AveragedModel(model)), wrapping.answer(model)
    smidgen.save(moved(model, 2), tmp_path / "peft", state_dict=best)
    torch.testing.assert_close(wrapping.answer(smidgen.load(wrapping.Net(), tmp_path / "peft")), wanted)
    two = trained("svfit")
    two.add_adapter("other", smidgen.config("lora", r=2, target_modules=["up"]))
    two.set_adapter("other")
    moved(two, 3)
    best, wanted = snapshot_of(two), wrapping.answer(two)
    moved(two, 4).save_pretrained(tmp_path, state_dict=best)
    torch.testing.assert_close(wrapping.answer(smidgen.load(wrapping.Net(), tmp_path / "other")), wanted)


BROKEN = {
    "lacks numbers": (lambda s: {k: v for k, v in s.items() if "down.smidgen" not in k}, "holds no .down.smidgen_slots"),
    "lacks the head": (lambda s: {k: v for k, v in s.items() if "head" not in k}, "holds no .head"),
    "another size": (lambda s: {k: v[:3] if "up.smid" in k else v for k, v in s.items()}, r"shape \(3,\), it should be \(8,\)"),
    "pivots of another base": (lambda s: {k: v.flip(0) if "up" in k and "pivots" in k else v for k, v in s.items()}, "another base"),
    "not finite": (lambda s: {k: v * float("nan") if "delta" in k else v for k, v in s.items()}, "NaN .* not saved"),
    "a head that is not finite": (lambda s: {k: v / 0 if "head" in k else v for k, v in s.items()}, "NaN .* not saved"),
    "nothing": (lambda s: {}, "holds no"),
}  # fmt: skip


@pytest.mark.parametrize("how", BROKEN)
def test_a_state_dict_that_cannot_be_written_is_refused_and_nothing_is_written(how, tmp_path):
    change, match = BROKEN[how]
    model = trained("loldu")
    with pytest.raises(SmidgenError, match=match):
        smidgen.save(model, tmp_path / "new", state_dict=change(snapshot_of(model)))
    assert not (tmp_path / "new").exists()
    with pytest.raises(SmidgenError, match=match):
        model.save_pretrained(tmp_path / "peft", state_dict=change(snapshot_of(model)))
    assert not (tmp_path / "peft" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("where", ["up.smidgen_slots", "head.modules_to_save"])
def test_numbers_that_are_not_finite_are_not_saved(where, tmp_path):
    model = trained("tlora")
    next(p for n, p in model.named_parameters() if where in n).data.view(-1)[0] = float("inf")
    for save in (lambda: smidgen.save(model, tmp_path / "a"), lambda: model.save_pretrained(tmp_path / "a")):
        with pytest.raises(SmidgenError, match=r"NaN or infinite numbers in 1 of .* earlier step"):
            save()
    assert not (tmp_path / "a" / "adapter_model.safetensors").exists()


# ---- pivots ------------------------------------------------------------------------------------------------------------


def test_pivots_are_int32_in_memory_and_halves_of_that_in_the_file(tmp_path):
    model = trained("loldu")
    pivots = model.base_model.model.up.smidgen_slots["default"].residual_pivots
    assert pivots.dtype == torch.int32
    smidgen.save(model, tmp_path)
    assert load_file(tmp_path / "adapter_model.safetensors")["residual_pivots"].dtype == torch.uint16
    average = AveragedModel(model, use_buffers=True)
    for _ in range(20):
        average.update_parameters(model)
    assert torch.equal(average.module.base_model.model.up.smidgen_slots["default"].residual_pivots, pivots)
    other = trained("loldu", 5)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(wrapping.answer(other), wrapping.answer(model))
    with pytest.raises(RuntimeError, match="residual_pivots"):
        other.load_state_dict({k: v for k, v in model.state_dict().items() if "pivots" not in k})


# ---- accelerate, and bases in pieces -----------------------------------------------------------------------------------


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def test_accelerate_prepares_what_is_saved(tmp_path):
    model = trained("loldu")
    prepared = Accelerator(cpu=True).prepare(model)
    assert wrapping.off(smidgen.save(prepared, tmp_path), wrapping.answer(model)) <= 1e-6


def test_a_wrapper_is_seen_through(one_process, tmp_path):
    model = trained("loldu")
    wrapped = DistributedDataParallel(model)
    assert smidgen.names(wrapped) == ["default"]
    smidgen.save(wrapped, tmp_path)
    assert smidgen.verify(wrapped, tmp_path).ok


@pytest.mark.parametrize("method", wrapping.METHODS)
def test_a_base_in_pieces_is_named_before_anything_is_touched(one_process, method, tmp_path):
    name, options = wrapping.METHODS[method]
    smidgen.save(trained(method), tmp_path)

    def parallel(model):
        mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("tp",))
        model.up.weight = nn.Parameter(distribute_tensor(model.up.weight.detach(), mesh, [Shard(0)]))
        return r"'up': its weight is a DTensor, in pieces \(S\(0\)|'up': its weight is a DTensor, in pieces \(Shard"

    def zero3(model):
        model.up.weight.ds_shape = model.up.weight.shape
        model.up.weight.data = torch.empty(0)
        return r"'up': its weight is empty here, DeepSpeed ZeRO-3 .* \(24, 16\)"

    def flat(model):
        model.up.weight.data = model.up.weight.data.flatten()[:100]
        return r"'up': its weight has shape \(100,\) here"

    for cut in (parallel, zero3, flat):
        model = wrapping.Net()
        match, before = cut(model), copy.copy(dict(model.named_modules()))
        for put in (
            lambda m: smidgen.adapt(m, name, target_modules=["up", "down"], **options),
            lambda m: get_peft_model(m, smidgen.config(name, target_modules=["up", "down"], **options)),
            lambda m: smidgen.load(m, tmp_path),
        ):
            with pytest.raises(TargetError, match=match):
                put(model)
            assert dict(model.named_modules()) == before
        report = smidgen.verify(model, tmp_path)
        assert not report.ok and "docs/multi_gpu.md" in report.reasons[0]


@pytest.mark.parametrize("method", ["svfit", "tlora"])
def test_sharded_after_adapt_needs_whole_weights_to_save(method, tmp_path):
    model = trained(method)
    full, wanted = snapshot_of(model), wrapping.answer(model)
    for layer in adapted_layers(model).values():
        layer.get_base_layer().weight.ds_shape = layer.get_base_layer().weight.shape
        layer.get_base_layer().weight.data = torch.empty(0)
    for state in (None, {k: v for k, v in full.items() if "base_layer.weight" not in k}):
        with pytest.raises(SmidgenError, match=r"'up.weight' of the base is not here whole"):
            smidgen.save(model, tmp_path / "no", state_dict=state)
    assert not (tmp_path / "no").exists()
    smidgen.save(model, tmp_path / "given", state_dict=full)
    assert wrapping.off(tmp_path / "given", wanted) <= 1e-6
    assert json.loads((tmp_path / "given" / "adapter_config.json").read_text())["base_lock"]
