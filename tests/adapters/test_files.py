"""Files: bytes, names, atomic writes, what moves between bases, and the promise on size."""

from __future__ import annotations

import errno
import json
import re
import resource
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import smidgen
from smidgen import testing
from smidgen.adapters import api
from smidgen.adapters.atomic import new_file, new_files
from smidgen.adapters.checkpoint import packing
from smidgen.adapters.methods import METHODS

from .helpers import Net, inputs, trained

WEIGHTS = "adapter_model.safetensors"


def bytes_allowed(folder: Path) -> float:
    numbers = sum(t.numel() * t.element_size() for t in load_file(folder / WEIGHTS).values())
    return 1.2 * numbers + 4096


def sd15_attention() -> nn.Module:
    """The attention projections of Stable Diffusion 1.5's UNet by shape: 16 blocks, 768 text features."""
    widths = [320] * 2 + [640] * 2 + [1280] * 2 + [1280] + [1280] * 3 + [640] * 3 + [320] * 3
    blocks = {}
    for i, width in enumerate(widths):
        for kind, context in (("attn1", width), ("attn2", 768)):
            for name, cols in (("to_q", width), ("to_k", context), ("to_v", context), ("to_out", width)):
                blocks[f"b{i}_{kind}_{name}"] = nn.Linear(cols, width, bias=False)
    return nn.ModuleDict(blocks)


TARGETS = ".*(to_q|to_k|to_v|to_out)"


@pytest.mark.parametrize("method", METHODS)
def test_size_on_the_shapes_of_sd15(method: str, tmp_path: Path) -> None:
    """Numbers are made without storage (meta) and filled with zeros: only sizes count here."""
    with torch.device("meta"):
        model = sd15_attention()
    options = {"r": 4} if method == "lora" else {}
    smidgen.adapt(model, method, target_modules=TARGETS, **options)
    layers = api.adapted_layers(model)
    stored = {
        name: {key: torch.zeros_like(t, device="cpu") for key, t in layer.smidgen_slots["default"].stored().items()}
        for name, layer in layers.items()
    }
    assert len(layers) == 128
    packed = packing.pack(stored)
    from safetensors.torch import save_file

    save_file(packed, tmp_path / WEIGHTS)
    numbers = sum(t.numel() * t.element_size() for own in stored.values() for t in own.values())
    assert sum(t.numel() for t in packed.values()) >= smidgen.trained_numbers(model) > 0
    size = (tmp_path / WEIGHTS).stat().st_size
    assert size <= 1.2 * numbers + 4096, f"{size} bytes for {numbers} bytes of numbers"


@pytest.mark.parametrize("method", METHODS)
def test_size_through_smidgen_and_through_peft(method: str, tmp_path: Path) -> None:
    net = trained(method, net=Net(layers=4))
    ours = smidgen.save(net, tmp_path / "ours")
    model = testing.perturb(get_peft_model(Net(layers=4), smidgen.config(method, target_modules=["q_proj", "v_proj"])))
    model.save_pretrained(tmp_path / "theirs")
    for folder in (ours, tmp_path / "theirs"):
        size = (folder / WEIGHTS).stat().st_size
        assert size <= bytes_allowed(folder), f"{folder}: {size} bytes"
    tensors = load_file(ours / WEIGHTS)
    trained_only = sum(v.numel() for k, v in tensors.items() if not k.endswith("pivots"))
    assert trained_only == smidgen.trained_numbers(net)
    assert all(torch.equal(t, load_file(tmp_path / "theirs" / WEIGHTS)[k]) for k, t in tensors.items())


def test_two_saves_are_the_same_bytes(tmp_path: Path) -> None:
    net = trained("loldu")
    files = [(smidgen.save(net, tmp_path / str(i)) / WEIGHTS).read_bytes() for i in range(2)]
    assert files[0] == files[1]
    again = smidgen.save(smidgen.load(Net(), tmp_path / "0", "other"), tmp_path / "2", "other")
    assert (again / WEIGHTS).read_bytes() == files[0]


def test_start_values_depend_on_seed_and_target_alone() -> None:
    torch.manual_seed(1)
    first = smidgen.adapt(Net(), "tlora(2,2)", target_modules=["q_proj"])
    torch.manual_seed(2)
    torch.randn(5)
    second = smidgen.adapt(Net(), "tlora(2,2)", target_modules=["v_proj", "q_proj"])
    other = smidgen.adapt(Net(), "tlora(2,2)", target_modules=["q_proj"], seed=7)
    name = "layers.1.q_proj.smidgen_slots.default.residual_c1"
    testing.same(first.state_dict()[name], second.state_dict()[name], "same seed and target")
    testing.differs(first.state_dict()[name], other.state_dict()[name], "another seed")
    assert not torch.equal(first.state_dict()[name], first.state_dict()[name.replace("layers.1", "layers.0")]), (
        "two targets start from the same numbers"
    )


def test_a_save_that_fails_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = smidgen.save(trained(), tmp_path)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(api, "save_file", full)
    net = trained("svfit", seed=5)
    with pytest.raises(OSError, match="No space"):
        smidgen.save(net, tmp_path)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert net.peft_config["default"].inference_mode is False


@pytest.mark.parametrize("many", [False, True])
def test_what_the_disk_refuses_to_safetensors_is_an_error_of_the_system(tmp_path: Path, many: bool) -> None:
    """Really refused: files may have 1,000 bytes here. safetensors says it in a sentence, and an OSError is what is answered."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, old[1]))
    place = tmp_path / "a"
    try:
        with pytest.raises(OSError) as error, (new_files if many else new_file)(place) as beside:
            save_file({"w": torch.zeros(1000)}, beside / "b.safetensors" if many else beside)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert error.value.errno == errno.EFBIG and error.value.filename == str(place)
    assert list(tmp_path.iterdir()) == []


def test_a_config_holds_no_paths_and_no_secrets(tmp_path: Path) -> None:
    folder = smidgen.save(trained("tlora"), tmp_path)
    data = json.loads((folder / "adapter_config.json").read_text())
    assert data["peft_type"] == "SMIDGEN" and data.get("base_model_name_or_path") is None
    assert not re.search(r"/(work|tmp|home|root)", json.dumps(data))


def test_a_config_of_a_subclass_keeps_its_own_fields(tmp_path: Path) -> None:
    @dataclass
    class Wider(smidgen.SmidgenConfig):
        init_weights: bool = True

    for value, kept in ((True, {}), (False, {"init_weights": False})):
        Wider(residual="spectral", r=4, init_weights=value).save_pretrained(tmp_path)
        data = json.loads((tmp_path / "adapter_config.json").read_text())
        assert {name: data[name] for name in data if name == "init_weights"} == kept


def test_an_older_peft_reads_the_config_of_a_newer_one(tmp_path: Path) -> None:
    """What peft adds to its base config later is an unknown key here: refused by name, not swallowed."""
    folder = smidgen.save(trained(), tmp_path)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"brand_new": 1}))
    with pytest.raises(smidgen.AdapterFileError, match="brand_new"):
        smidgen.load(Net(), folder)


@pytest.mark.parametrize("method", ["svfit", "loldu"])
def test_stored_factors_need_no_decomposition(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = trained(method, r=4, store_factors=True)
    wanted = net(inputs()).detach()
    smidgen.save(net, tmp_path)
    from smidgen.adapters.residuals.spectral import Spectral
    from smidgen.adapters.residuals.triangular import Triangular

    def never(*args: object) -> None:
        raise AssertionError("decomposed although the factors are in the file")

    monkeypatch.setattr(Spectral, "decompose", never)
    monkeypatch.setattr(Triangular, "decompose", never)
    testing.same(smidgen.load(Net(), tmp_path)(inputs()).detach(), wanted, "with stored factors")


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_loads_on_the_base_in_16_bits(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    net = trained(method)
    smidgen.save(net, tmp_path)
    half = smidgen.load(Net().to(dtype), tmp_path)
    testing.close(half(inputs().to(dtype)), net(inputs()), f"on a {dtype} base", dtype, factor=2)


def test_energy_ranks_travel_in_the_file(tmp_path: Path) -> None:
    net = trained("svfit", r="energy:0.8")
    ranks = {n: layer.r["default"] for n, layer in api.adapted_layers(net).items()}
    for name, layer in api.adapted_layers(net).items():
        values = torch.linalg.svdvals(layer.base_layer.weight.detach()) ** 2
        share = values.cumsum(0) / values.sum()
        assert int((share < 0.8).sum()) + 1 == ranks[name]
    smidgen.save(net, tmp_path)
    again = smidgen.load(Net(), tmp_path)
    assert {n: layer.r["default"] for n, layer in api.adapted_layers(again).items()} == ranks
    testing.close(again(inputs()), net(inputs()), "energy ranks")


def test_a_pattern_of_ranks(tmp_path: Path) -> None:
    net = trained("lora", r=2, rank_pattern={"v_proj": 5})
    assert {n.rpartition(".")[2]: layer.r["default"] for n, layer in api.adapted_layers(net).items()} == {
        "q_proj": 2,
        "v_proj": 5,
    }
    smidgen.save(net, tmp_path)
    testing.close(smidgen.load(Net(), tmp_path)(inputs()), net(inputs()), "ranks by pattern")
