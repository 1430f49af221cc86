"""The checksum: what was not saved together is refused by every route, and nobody who writes a config anew is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import rewrite
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import smidgen
from smidgen import testing
from smidgen.adapters.checkpoint import checksum
from smidgen.errors import AdapterFileError, SmidgenError

from .helpers import Net, inputs, trained

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def headed(method: str = "loldu", **options: Any) -> nn.Module:
    net = trained(method, modules_to_save=["head"], **options)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "modules_to_save" in name:
                p += 0.1
    return net


def bank(folder: Path) -> None:
    net = headed()
    smidgen.Bank(net, net.peft_config["default"]).put("ann", folder)


def with_config(folder: Path) -> None:
    PeftModel.from_pretrained(Net(), folder, config=PeftConfig.from_pretrained(folder))


def second(folder: Path) -> None:
    model = get_peft_model(Net(), smidgen.config("svfit", target_modules=["q_proj"]))
    model.load_adapter(folder, "second")


ROUTES: dict[str, Callable[[Path], object]] = {
    "smidgen.load": lambda folder: smidgen.load(Net(), folder),
    "PeftModel.from_pretrained": lambda folder: PeftModel.from_pretrained(Net(), folder),
    "with a config": with_config,
    "load_adapter": second,
    "Bank.put": bank,
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return smidgen.save(headed(), tmp_path_factory.mktemp("good") / "adapter")


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "adapter"))


def edit(folder: Path, **changes: Any) -> None:
    data = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps({k: v for k, v in data.items() if v is not None}))


def flip(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The lowest bit of the first number is another."""
    raw = tensors[name].clone().view(torch.uint8).flatten()
    raw[0] ^= 1
    return tensors | {name: raw.view(tensors[name].dtype).reshape(tensors[name].shape)}


HEAD = "base_model.model.head.weight"
DAMAGE: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "a bit": lambda t: flip(t, "residual_delta"),
    "a bit of the head": lambda t: flip(t, HEAD),
    "a head of zeros": lambda t: t | {HEAD: torch.zeros_like(t[HEAD])},
    "rescaled": lambda t: t | {"residual_delta": t["residual_delta"] * 2},
    "turned round": lambda t: t | {"residual_delta": t["residual_delta"].flip(0)},
    "rounded": lambda t: t | {"residual_delta": t["residual_delta"].half()},
}


@pytest.mark.parametrize("route", ROUTES)
def test_as_saved_it_loads(folder: Path, route: str) -> None:
    ROUTES[route](folder)


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("route", ROUTES)
def test_tensors_that_were_not_saved_are_refused(folder: Path, route: str, damage: str) -> None:
    save_file(DAMAGE[damage](load_file(folder / WEIGHTS)), folder / WEIGHTS)
    with pytest.raises(AdapterFileError, match=r"adapter_model.safetensors.*not those that were saved.*Copy both"):
        ROUTES[route](folder)


OPTIONS = [
    {"r": 4},
    {"seed": 1},
    {"residual_options": {"alpha": 3.0}},
    {"target_modules": ["q_proj"]},
    {"base_lock": None},
    {"canary": None},
    {"modules_to_save": None},
    {"store_dtype": "float16"},
]


@pytest.mark.parametrize("changes", OPTIONS, ids=str)
@pytest.mark.parametrize("route", ROUTES)
def test_options_that_were_not_saved_are_refused(folder: Path, route: str, changes: dict[str, Any]) -> None:
    edit(folder, **changes)
    with pytest.raises(SmidgenError, match=r"adapter_config.json is not as it was saved"):
        ROUTES[route](folder)


@pytest.mark.parametrize("route", ROUTES)
def test_the_files_of_two_saves_are_refused(folder: Path, tmp_path: Path, route: str) -> None:
    other = smidgen.save(headed(seed=5), tmp_path / "other")
    rewrite(folder / WEIGHTS, (other / WEIGHTS).read_bytes())
    with pytest.raises(AdapterFileError, match="from different saves"):
        ROUTES[route](folder)


FREE = {
    "base_model_name_or_path": "somebody/base",
    "revision": "v2",
    "inference_mode": False,
    "peft_version": "0.99",
    "auto_mapping": {"base_model_class": "Net", "parent_library": "x"},
}


@pytest.mark.parametrize("route", ROUTES)
def test_what_others_write_anew_is_no_damage(folder: Path, route: str) -> None:
    edit(folder, **FREE)
    ROUTES[route](folder)


@pytest.mark.parametrize("route", ROUTES)
def test_a_config_as_peft_itself_would_write_it(folder: Path, route: str) -> None:
    """All fields, indented, sets in any order."""
    stored = json.loads((folder / CONFIG).read_text())
    data = PeftConfig.from_pretrained(folder).to_dict() | {"checksum": stored["checksum"]}
    (folder / CONFIG).write_text(json.dumps(data, indent=2, default=lambda value: sorted(value, reverse=True)))
    ROUTES[route](folder)


@pytest.mark.parametrize("route", ROUTES)
def test_without_a_checksum_it_loads(folder: Path, route: str) -> None:
    edit(folder, checksum=None)
    ROUTES[route](folder)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("value", [{}, {"options": "x"}, {"tensors": 3}, "x", [], {"tensors": "x"}], ids=str)
def test_a_checksum_that_is_none(folder: Path, route: str, value: Any) -> None:
    edit(folder, checksum=value)
    with pytest.raises(SmidgenError, match="checksum"):
        ROUTES[route](folder)


def test_every_way_to_save_writes_the_same_checksum(tmp_path: Path) -> None:
    net = headed()
    model = PeftModel.from_pretrained(Net(), smidgen.save(net, tmp_path / "ours"))
    model.save_pretrained(tmp_path / "theirs")
    smidgen.save(model, tmp_path / "again")
    found = [json.loads((tmp_path / name / CONFIG).read_text())["checksum"] for name in ("ours", "theirs", "again")]
    assert found[0] == found[1] == found[2] and set(found[0]) == {"options", "tensors"}
    for name in ("ours", "theirs", "again"):
        for route in ROUTES.values():
            route(tmp_path / name)


@pytest.mark.parametrize("method", ["svfit", "loldu", "tlora(2,2)", "tlora_star", "lora", "oft", "seeded"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_saved_by_peft_and_loaded_by_all(method: str, dtype: str, tmp_path: Path) -> None:
    net = headed(method, store_dtype=dtype)
    model = PeftModel.from_pretrained(Net(), smidgen.save(net, tmp_path / "ours"))
    wanted = model(inputs()).detach()
    model.save_pretrained(tmp_path / "theirs")
    assert "checksum" in json.loads((tmp_path / "theirs" / CONFIG).read_text())
    for folder in (tmp_path / "ours", tmp_path / "theirs"):
        testing.close(smidgen.load(Net(), folder)(inputs()), wanted, "smidgen.load")
        testing.close(PeftModel.from_pretrained(Net(), folder)(inputs()), wanted, "PeftModel.from_pretrained")


def test_training_goes_on_after_a_load_and_after_a_save(tmp_path: Path) -> None:
    """The checksum is of one file: numbers that come later are other numbers."""
    smidgen.save(headed(), tmp_path / "a")
    model = PeftModel.from_pretrained(Net(), tmp_path / "a", is_trainable=True)
    model.save_pretrained(tmp_path / "b")
    best = {name: value.clone() for name, value in get_peft_model_state_dict(model).items()}
    testing.perturb(model, 9)
    moved = model(inputs()).detach()
    get_peft_model_state_dict(model)
    set_peft_model_state_dict(model, best)
    testing.differs(model(inputs()).detach(), moved, "with its best numbers back")
    testing.perturb(model, 9)
    model.save_pretrained(tmp_path / "c")
    model.peft_config["default"].save_pretrained(tmp_path / "config alone")
    assert "checksum" not in json.loads((tmp_path / "config alone" / CONFIG).read_text())
    model.load_adapter(tmp_path / "b", "default")
    for folder in "abc":
        smidgen.load(Net(), tmp_path / folder)


def test_a_config_read_and_written_keeps_its_checksum(folder: Path) -> None:
    own = PeftConfig.from_pretrained(folder)
    own.base_model_name_or_path = "me/base"
    own.save_pretrained(folder)
    smidgen.load(Net(), folder)
    assert set(json.loads((folder / CONFIG).read_text())["checksum"]) == {"options", "tensors"}


def test_the_checksum_of_tensors_knows_names_formats_shapes_and_bytes() -> None:
    own = {"b": torch.tensor([1.0, 0.0]), "a": torch.ones(2, 3, dtype=torch.bfloat16), "n": torch.tensor(3)}
    first = checksum.of_tensors(own)
    assert first == checksum.of_tensors(dict(reversed(own.items()))) and len(first) == 43
    assert first == checksum.of_tensors({f"base_model.model.{name}": value for name, value in own.items()})
    assert first == checksum.of_tensors(own | {"a": own["a"].t().contiguous().t()})
    others = [
        {"c" if name == "b" else name: value for name, value in own.items()},
        own | {"b": torch.tensor([1.0, -0.0])},
        own | {"b": own["b"].view(torch.int32)},
        own | {"a": own["a"].t()},
        own | {"n": torch.tensor([3])},
        {name: own[name] for name in "ab"},
        own | {"e": torch.ones(0)},
    ]
    assert len({first, *map(checksum.of_tensors, others)}) == 1 + len(others)


# ---- heads, where a checksum does not speak -------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["a head of zeros", "a head of another save", "half"])
def test_a_head_that_was_not_saved_is_not_on(folder: Path, damage: str) -> None:
    assert smidgen.verify(Net(), folder).ok
    edit(folder, checksum=None)
    tensors = load_file(folder / WEIGHTS)
    change = {"a head of zeros": 0.0, "a head of another save": -1.0, "half": 0.5}[damage]
    save_file({n: t * change if "head" in n else t for n, t in tensors.items()}, folder / WEIGHTS)
    report = smidgen.verify(Net(), folder)
    assert not report.ok and any("ead" in reason and "saved" in reason for reason in report.reasons)
    if damage == "a head of zeros":
        assert any("nothing but zeros" in reason for reason in report.reasons)
        edit(folder, canary=None)
        assert not smidgen.verify(Net(), folder).ok


def test_a_head_that_is_loaded_and_not_in_use_is_not_on(folder: Path) -> None:
    net = smidgen.load(Net(), folder)
    assert smidgen.verify(net, folder).ok
    net.head.set_adapter([])
    assert "Head 'head' is loaded but not in use." in smidgen.verify(net, folder).reasons


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("route", ROUTES)
def test_a_head_that_is_not_finite_is_refused(folder: Path, route: str, value: float) -> None:
    edit(folder, checksum=None)
    tensors = load_file(folder / WEIGHTS)
    tensors[HEAD][0, 0] = value
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(AdapterFileError, match=r"head.*1 NaN or infinite"):
        ROUTES[route](folder)
