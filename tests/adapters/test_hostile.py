"""Folders made to hurt: what never ends, what unfolds without end, what is no file; by every route, before a model is touched."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn

import smidgen
from smidgen import testing
from smidgen.adapters.api import adapted_layers
from smidgen.adapters.tuner import patterns
from smidgen.errors import AdapterFileError, ConfigError, SmidgenError
from smidgen.tasks.drawing import inspect

from .helpers import Net, inputs, trained

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def bank(net: nn.Module, folder: Path) -> None:
    model = smidgen.adapt(net, "lora", r=2, target_modules=["q_proj", "v_proj"])
    smidgen.Bank(model, model.peft_config["default"]).put("ann", folder)


def second(net: nn.Module, folder: Path) -> None:
    get_peft_model(net, smidgen.config("svfit", target_modules=["q_proj"])).load_adapter(folder, "second")


ROUTES: dict[str, Callable[[nn.Module, Path], object]] = {
    "smidgen.load": smidgen.load,
    "PeftModel.from_pretrained": PeftModel.from_pretrained,
    "with a config": lambda net, f: PeftModel.from_pretrained(net, f, config=PeftConfig.from_pretrained(f)),
    "load_adapter": second,
    "Bank.put": bank,
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return smidgen.save(trained("lora", r=2, modules_to_save=None), tmp_path_factory.mktemp("good") / "adapter")


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "adapter"))


def foreign(folder: Path, **changes: Any) -> None:
    """As another writer would: no base lock, no canary, no checksum."""
    data = json.loads((folder / CONFIG).read_text())
    for name in ("base_lock", "canary", "checksum"):
        data.pop(name, None)
    (folder / CONFIG).write_text(json.dumps({"target_modules": ["q_proj", "v_proj"]} | data | changes))


def ends(call: Callable[[], object], most: float = 20.0) -> None:
    """The call is refused in words, soon. (Without the bound each of these takes longer than the universe lasts.)"""
    started = time.monotonic()
    with pytest.raises(SmidgenError) as found:
        call()
    assert time.monotonic() - started < most, str(found.value)
    assert 20 < len(str(found.value)) < 2000


# ---- regular expressions ---------------------------------------------------------------------------------------------

BAD = r"(?:(?:a|b|[a-z]|\w|.)*?(?:[a-z.]|\d|.)*?)*?(?R)?!"
ENDLESS = ["(?R)*a", r"((\w+\.?)+(\d|\w)*)+(?<!x)!{2}", "(.*)*!", BAD, "(((.+)+)+)+!", r"(.|\w|[a-z])*\1!"]
FIELDS: dict[str, Callable[[str], dict[str, Any]]] = {
    "target_modules": lambda p: {"target_modules": p},
    "exclude_modules": lambda p: {"exclude_modules": p},
    "layers_pattern": lambda p: {"layers_pattern": [p], "layers_to_transform": [0]},
    "a layers_pattern": lambda p: {"layers_pattern": p, "layers_to_transform": 0},
    "modules_to_save": lambda p: {"modules_to_save": [p]},
    "rank_pattern": lambda p: {"rank_pattern": {p: 2}},
}


def deep(width: int = 16) -> nn.Module:
    """A net whose modules have long names, as those of real models."""
    net = Net(width=width)
    for i in range(20):
        net.add_module("a_long_name_for_a_module_of_a_real_model_" + "ab" * 10 + str(i), nn.Identity())
    return net


@pytest.mark.parametrize("pattern", ENDLESS)
@pytest.mark.parametrize("field", FIELDS)
def test_no_expression_keeps_a_loader_busy(
    folder: Path, field: str, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.05)
    foreign(folder, **FIELDS[field](pattern))
    for route in ROUTES.values():
        started = time.monotonic()
        with suppress(SmidgenError):
            route(deep(), folder)
        assert time.monotonic() - started < 20, (field, pattern)
    assert isinstance(smidgen.verify(deep(), folder).ok, bool)
    with suppress(SmidgenError):
        inspect(folder)


@pytest.mark.parametrize(
    "field", ["target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern"]
)
def test_nor_one_of_a_file_of_peft_s_own(field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.05)
    smidgen.save(smidgen.adapt(Net(), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])), tmp_path)
    changes = {"alpha_pattern": {"(?R)*a": 2}} if field == "alpha_pattern" else FIELDS[field]("(?R)*a")
    file = tmp_path / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    net = deep()
    before = testing.snapshot(net)
    ends(lambda: smidgen.load(net, tmp_path))
    testing.unchanged(before, net, field)
    assert smidgen.verify(net, tmp_path).verdict == "OFF"


def test_an_expression_of_a_file_becomes_names(folder: Path) -> None:
    wanted = smidgen.load(Net(), folder)(inputs()).detach()
    for changes in (
        {"target_modules": r"layers\.\d+\.(q|v)_proj"},
        {"target_modules": r"^(?!.*head).*_proj"},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 1], "layers_pattern": ["lay.*"]},
        {"target_modules": ["q_proj", "v_proj", "head"], "exclude_modules": "he.d"},
    ):
        foreign(folder, **changes)
        for route in ("smidgen.load", "PeftModel.from_pretrained", "with a config"):
            model: Any = Net()
            model = ROUTES[route](model, folder)
            testing.close(model(inputs()), wanted, f"{route}: {changes}")
            own = model.peft_config["default"]
            assert not isinstance(own.target_modules, str) and not isinstance(own.exclude_modules, str)
            assert own.layers_pattern is None or own.layers_pattern == []


def test_an_adapter_that_is_saved_names_its_modules(tmp_path: Path) -> None:
    for i, options in enumerate(
        (
            {"target_modules": r".*\.(q|v)_proj"},
            {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.0\..*"},
            {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "lay[ae]rs"},
        )
    ):
        net = trained("svfit", **options)
        for name, folder in (("ours", smidgen.save(net, tmp_path / f"{i}")), ("theirs", tmp_path / f"{i}-peft")):
            if name == "theirs":
                PeftModel.from_pretrained(Net(), tmp_path / f"{i}").save_pretrained(folder)
            text = (folder / CONFIG).read_text()
            assert not {"exclude_modules", "layers_pattern", "target_modules"} & json.loads(text).keys()
            loaded = smidgen.load(Net(), folder)
            assert set(adapted_layers(loaded)) == set(adapted_layers(net))
            testing.close(loaded(inputs()), net(inputs()), f"{name}: {options}")


# ---- sizes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        '{"peft_type": "SMIDGEN", "r": ' + "9" * 10_000 + "}",
        '{"peft_type": "SMIDGEN", "r": 1e999}',
        '{"peft_type": "SMIDGEN", "r": NaN}',
        '{"peft_type": "SMIDGEN", "seed": 99999999999999999999}',
        '{"peft_type": "SMIDGEN", "residual_options": ' + '{"a":' * 50 + "1" + "}" * 51,
        '{"peft_type": "SMIDGEN", "canary": ' + "[" * 100_000,
        '{"peft_type": "SMIDGEN", "r": 1, "r": 2}',
        '{"peft_type": "SMIDGEN", "base_model_name_or_path": "\\ud800"}',
        '{"peft_type": "SMIDGEN"} ' + " " * 5 * 2**20,
    ],
    ids=["digits", "infinite", "nan", "wide", "nested", "open", "twice", "half a character", "5 MB"],
)
def test_a_config_beyond_all_reason(folder: Path, text: str) -> None:
    (folder / CONFIG).write_text(text)
    net = Net()
    before = testing.snapshot(net)
    with pytest.raises(AdapterFileError, match=r"valid JSON|at most 4,194,304"):
        smidgen.load(net, folder)
    testing.unchanged(before, net, text[:50])
    with pytest.raises((ValueError, RecursionError)):
        PeftModel.from_pretrained(net, folder)
    testing.unchanged(before, net, text[:50])


HUGE: list[dict[str, Any]] = [
    {"r": 10**9},
    {"rank_pattern": {"q_proj": 10**9}},
    {"transform": "tensor_ring", "transform_options": {"rank": 10**8}},
    {"transform": "tensor_ring", "transform_options": {"order": 10**9}},
    {"transform": "tensor_ring", "transform_options": {"mode_shape": [2**31, 2**31]}},
    {"transform": "tensor_ring", "transform_options": {"mode_shape": [1] * 10**5}},
    {"residual": "tensor_ring", "residual_options": {"order": 10**9}, "r": 2},
    {"residual": "seeded", "r": 10**9},
    {"residual": "spectral", "r": 10**9},
    {"transform": "rotation", "transform_options": {"blocks": 10**12}},
    {"transform": "rotation", "transform_options": {"block_size": 10**12}},
]
WRONG: list[Any] = [-1, 0, 1.5, True, "3", None, [], {}, "full", 10**18, -(10**18), 1e308]


@pytest.mark.parametrize("changes", HUGE, ids=lambda c: json.dumps(c)[:60])
@pytest.mark.parametrize("route", ROUTES)
def test_a_rank_beyond_all_reason_is_refused_before_anything_is_made(
    folder: Path, route: str, changes: dict[str, Any]
) -> None:
    foreign(folder, **changes)
    ends(lambda: ROUTES[route](Net(), folder))


@pytest.mark.parametrize("value", WRONG, ids=repr)
@pytest.mark.parametrize("route", ["smidgen.load", "PeftModel.from_pretrained", "with a config"])
def test_a_value_of_another_kind_is_refused_in_words(folder: Path, route: str, value: Any) -> None:
    for changes in (
        {"r": value},
        {"residual_options": {"alpha": value}},
        {"residual_options": {"scaling": value}},
        {"rank_pattern": {"q_proj": value}},
        {"seed": value},
        {"layers_to_transform": value},
        {"inference_mode": value},
        {"base_model_name_or_path": value},
        {"auto_mapping": value},
        {"transform": "tensor_ring", "transform_options": {"rank": value}},
        {"transform": "tensor_ring", "transform_options": {"mode_shape": value}},
        {"transform": "tensor_ring", "transform_options": {"order": value}},
        {"transform": "rotation", "transform_options": {"blocks": value}},
        {"transform": "diagonal", "transform_options": {"relative": value}},
    ):
        foreign(folder, **changes)
        try:
            ROUTES[route](Net(), folder)
        except SmidgenError as error:
            assert 20 < len(str(error)) < 2000, changes


# ---- no files ----------------------------------------------------------------------------------------------------------


def make(kind: str, path: Path) -> None:
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "dangling":
        path.symlink_to("nowhere")
    elif kind == "socket":
        os.chdir(path.parent)
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="kinds of files that this system has not")
@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "loop", "dangling", "socket"])
@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_what_is_no_file_is_not_opened(folder: Path, name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    make(kind, folder / name)
    for route, call in ROUTES.items():
        if name == WEIGHTS and route == "with a config" and kind in ("pipe", "device"):
            continue  # peft opens it itself: docs/files.md
        net = Net()
        before = testing.snapshot(net)
        with pytest.raises((SmidgenError, ValueError, OSError)) as found:
            call(net, folder)
        if route == "smidgen.load" or (route == "PeftModel.from_pretrained" and name == WEIGHTS):
            assert isinstance(found.value, AdapterFileError) and re.search("is a|cannot be read", str(found.value))
        if route in ("smidgen.load", "PeftModel.from_pretrained"):
            testing.unchanged(before, net, f"{route}: {kind}")
    assert smidgen.verify(Net(), folder).verdict == "OFF"
    with pytest.raises(AdapterFileError):
        inspect(folder)


# ---- verify ------------------------------------------------------------------------------------------------------------


class Strange(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt if x is None else RecursionError("deep")


def test_verify_never_raises(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    paths: list[Any] = [
        folder,
        str(folder),
        os.fsencode(folder),
        tmp_path / "empty",
        tmp_path / "none",
        "",
        "\0",
        "x" * 5000,
    ]
    paths += [None, 3, object(), [], folder / CONFIG, "/dev/null", "/proc/self/mem", b"\xff"]
    models: list[Any] = [
        Net(),
        nn.Module(),
        nn.Sequential(),
        Strange(),
        None,
        3,
        "model",
        object(),
        [],
        Net,
        torch.ones(2),
    ]
    models += [nn.LazyLinear(3), Net().to("meta"), torch.jit.script(nn.Linear(2, 2))]
    given: list[Any] = [
        None,
        (),
        {},
        3,
        "x",
        torch.ones(2),
        (None,),
        lambda model: None,
        lambda: 3,
        lambda m: 1 / 0,
        [[]],
        object(),
    ]
    for model in models:
        for path in paths:
            report = smidgen.verify(model, path)
            proven = isinstance(model, Net) and str(folder) in str(path) and CONFIG not in str(path)
            assert report.ok is proven or report.reasons, (model, path)
            assert str(report)
    for inputs_ in given:
        report = smidgen.verify(Net(), folder, inputs_)
        assert report.ok or report.reasons, inputs_
    net = Net()
    before = testing.snapshot(net)
    smidgen.verify(net, folder, lambda model: 1 / 0)
    testing.unchanged(before, net, "a check that fails")


def test_verify_leaves_an_adapter_that_has_its_own_name(folder: Path) -> None:
    net = smidgen.adapt(Net(), peft.LoraConfig(r=2, target_modules=["head"]), "verify")
    smidgen.verify(net, folder)
    assert smidgen.names(net) == ["verify"]


def test_patterns_are_bounded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.1)
    config = smidgen.config("lora", r=2, target_modules=["q_proj"])
    config.target_modules = "(?R)*a"
    with pytest.raises(ConfigError, match="takes too long"):
        patterns.name_modules(config, ["a" * 60])
    config.target_modules = "a" * 30_000
    with pytest.raises(ConfigError, match="30,000 characters"):
        patterns.name_modules(config, ["x" * 40])
    for wrong in ("(", "(" * 5000 + ")" * 5000, "*", "(?P<a>.)(?P<a>.)(?P=b)"):
        config.target_modules = wrong
        with pytest.raises(ConfigError, match="no regular expression"):
            patterns.name_modules(config, ["x"])
