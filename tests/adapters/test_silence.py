"""Silence is the enemy: every damage to a file, a config or a base is a clear error that changes nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import rewrite
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import smidgen
from smidgen import testing
from smidgen.errors import AdapterFileError, BaseLockError, ConfigError, SmidgenError, TargetError

from .helpers import Net, inputs, trained

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def refuses(folder: Path, error: type[Exception], match: str, net: nn.Module | None = None) -> None:
    """smidgen.load raises and changes nothing; the message holds ``match``."""
    model = net or Net()
    before = testing.snapshot(model)
    with pytest.raises(error, match=match) as found:
        smidgen.load(model, folder)
    testing.unchanged(before, model, str(found.value))


def peft_refuses(folder: Path, net: nn.Module | None = None, error: type[Exception] = SmidgenError) -> None:
    """The same through peft, which freezes the base before it reads a file: all but requires_grad is as before."""
    model = (net or Net()).requires_grad_(False)
    before = testing.snapshot(model)
    with pytest.raises(error):
        PeftModel.from_pretrained(model, folder)
    testing.unchanged(before, model, "a refused adapter through peft")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    return smidgen.save(trained("loldu", r=4), folder / "adapter")


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """An adapter without its checksum, as one saved before there was any, so that what each other check says is seen."""
    folder = Path(shutil.copytree(good, tmp_path / "adapter"))
    edit_config(folder, checksum=None)
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    data = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps(data))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    tensors = change(load_file(folder / WEIGHTS))
    save_file(tensors, folder / WEIGHTS)


def test_the_undamaged_adapter_loads(folder: Path) -> None:
    wanted = trained("loldu", r=4)(inputs())
    testing.close(smidgen.load(Net(), folder)(inputs()), wanted, "loaded adapter")
    testing.close(PeftModel.from_pretrained(Net(), folder)(inputs()), wanted, "adapter loaded through peft")


# ---- targets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "match"),
    [
        (["q_proj", "v_porj"], r"'v_porj'.*Did you mean 'v_proj'"),
        (["q_prj", "v_porj"], r"Did you mean 'q_proj'"),
        (["attention.q_proj"], r"'attention.q_proj'.*q_proj"),
        (["layers.7.q_proj"], r"'layers.7.q_proj'.*Did you mean 'layers"),
        (".*qproj", r"regular expression.*Did you mean 'q_proj'"),
        (["norm"], r"'norm' is a LayerNorm; adapters go on nn.Linear"),
        (["layers"], r"'layers' is a ModuleList"),
    ],
)
def test_wrong_targets(targets: Any, match: str) -> None:
    for put in (smidgen.adapt, get_peft_model):
        net = Net()
        before = testing.snapshot(net)
        with pytest.raises(TargetError, match=match):
            put(net, smidgen.config("svfit", target_modules=targets))
        testing.unchanged(before, net, f"{targets} through {put.__name__}")


def test_targets_that_other_options_leave_out() -> None:
    net = Net()
    with pytest.raises(TargetError, match="excluded or left out"):
        smidgen.adapt(net, "svfit", target_modules=["q_proj"], exclude_modules=["q_proj"])
    with pytest.raises(TargetError, match="name target_modules"):
        smidgen.adapt(nn.Sequential(nn.Linear(4, 4)), "svfit")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"r": 0}, "at least 1"),
        ({"r": "ful"}, "whole number"),
        ({"r": "energy:2"}, "share"),
        ({"ranks": 3}, "Option ranks=3"),
        ({"alpha": 2.0, "scaling": "rs"}, "'plain'"),
        ({"relativ": True}, "Did you mean 'relative'"),
        ({"alpha": "two"}, "alpha must be a finite number"),
        ({"target_modules": "("}, "no regular expression"),
        ({"rank_pattern": {"*": 3}}, "is a regular expression"),
    ],
)
def test_wrong_options_change_nothing(options: dict[str, Any], match: str) -> None:
    net = Net()
    before = testing.snapshot(net)
    with pytest.raises(ConfigError, match=match):
        smidgen.adapt(net, "svfit", **{"target_modules": ["q_proj"], **options})
    testing.unchanged(before, net, f"options {options}")


def test_an_option_that_fails_at_the_second_layer_changes_nothing() -> None:
    net = Net()
    net.layers[1].q_proj = nn.Linear(15, 16)  # 15 features do not split into 4 blocks
    before = testing.snapshot(net)
    with pytest.raises(ConfigError, match="blocks must divide the width 15"):
        smidgen.adapt(net, "oft", blocks=4, target_modules=["q_proj"])
    testing.unchanged(before, net, "a refused second layer")


def test_names_of_adapters() -> None:
    net = trained()
    for call in (smidgen.set_active, smidgen.set_strength, lambda m, n: smidgen.merge(m, [n])):
        name: Any = {"defualt": 1.0} if call is smidgen.set_strength else "defualt"
        with pytest.raises(SmidgenError, match=r"no adapter 'defualt'. Did you mean 'default'"):
            call(net, name)
    with pytest.raises(SmidgenError, match="already carries"):
        smidgen.adapt(net, "svfit", target_modules=["q_proj"])
    with pytest.raises(SmidgenError, match="without dots"):
        smidgen.adapt(net, "svfit", "a.b", target_modules=["q_proj"])
    with pytest.raises(SmidgenError, match="no adapter 'x'"):
        smidgen.save(net, "nowhere", "x")
    assert not Path("nowhere").exists()


# ---- the base --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("net", "match"),
    [
        (Net(seed=1), "another base model.*differ by"),
        (Net(layers=1), r"lacks 2 of 4 target modules, e.g. 'layers.1.q_proj'"),
        (Net(layers=3), r"2 modules that match.*more layers"),
        (Net(width=24), r"shape \(24, 24\).*made for \(16, 16\)"),
    ],
    ids=["other weights", "fewer layers", "more layers", "wider"],
)
def test_other_bases(folder: Path, net: nn.Module, match: str) -> None:
    refuses(folder, BaseLockError, match, net)
    peft_refuses(folder, net, BaseLockError)


def test_one_layer_of_other_weights(folder: Path) -> None:
    net = Net()
    with torch.no_grad():
        net.layers[1].v_proj.weight.mul_(-1)
    refuses(folder, BaseLockError, "most at 'layers.1.v_proj'", net)


def test_nan_in_the_base(folder: Path) -> None:
    net = Net()
    with torch.no_grad():
        net.layers[0].q_proj.weight[0, 0] = float("nan")
    refuses(folder, BaseLockError, "another base model", net)


def test_a_base_in_another_number_format_is_tolerated_and_reported(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    net = Net().bfloat16().float()
    with caplog.at_level("WARNING", "smidgen"):
        smidgen.load(net, folder)
    assert "The base weights differ by" in caplog.text
    testing.close(net(inputs()), trained("loldu", r=4)(inputs()), "on the re-cast base", torch.bfloat16)


def test_a_merged_neighbour_does_not_look_like_another_base(folder: Path) -> None:
    net = trained("lora", "other", seed=4)
    for p in net.parameters():
        if p.requires_grad:
            p.data *= 20
    for layer in smidgen.adapters.tuner.carried.adapted_layers(net).values():
        layer.merge()
    smidgen.load(net, folder, "mine")
    with smidgen.disabled(net):
        testing.same(net(inputs()), Net()(inputs()), "disabled")


# ---- the file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: {f"x.{k}": v for k, v in t.items()}, "missing.*residual_delta"),
        (lambda t: {k.replace("delta", "dleta"): v for k, v in t.items()}, "Did you mean 'residual_dleta'"),
        (lambda t: {}, "missing"),
        (lambda t: {k: v for k, v in t.items() if k != "residual_pivots"}, "missing.*residual_pivots"),
        (lambda t: t | {"lm_head.weight": torch.ones(2)}, "unexpected.*lm_head.weight"),
        (lambda t: t | {"residual_delta": torch.full((16,), float("nan"))}, "16 NaN or infinite numbers of 16"),
        (lambda t: t | {"residual_delta": torch.ones(4, 4)}, r"shape \(4, 4\).*\(16,\)"),
        (lambda t: t | {"residual_delta": torch.ones(15)}, r"shape \(15,\)"),
        (lambda t: t | {"residual_delta": torch.ones(16, dtype=torch.int64)}, "int64"),
        (lambda t: t | {"residual_pivots": torch.zeros(16, dtype=torch.uint16)}, "distinct row"),
        (lambda t: t | {"residual_pivots": torch.full((16,), 999, dtype=torch.uint16)}, "distinct row"),
        (lambda t: t | {"residual_pivots": torch.zeros(16)}, "float32"),
    ],
)
def test_damaged_tensors(folder: Path, change: Callable[..., Any], match: str) -> None:
    edit_tensors(folder, change)
    refuses(folder, SmidgenError, match)
    if "distinct" not in match:  # pivots are followed only when the factors are first needed
        peft_refuses(folder)


def test_truncation_at_any_byte(folder: Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    for size in [0, 1, 7, 8, 9, 40, len(whole) // 2, len(whole) - 40, len(whole) - 1]:
        rewrite(folder / WEIGHTS, whole[:size])
        refuses(folder, AdapterFileError, f"{size:,} bytes.*truncated")
    config = (folder / CONFIG).read_text()
    rewrite(folder / WEIGHTS, whole)
    for size in (0, 1, len(config) // 2, len(config) - 2):
        (folder / CONFIG).write_text(config[:size])
        refuses(folder, AdapterFileError, "not valid JSON")


@pytest.mark.parametrize(
    "header",
    [
        b"\xff" * 8,
        (2**40).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (8).to_bytes(8, "little") + b'{"a":{}}',
        (90).to_bytes(8, "little")
        + b'{"residual_delta":{"dtype":"F32","shape":[16],"data_offsets":[0,9999999999]}}'.ljust(90),
        (90).to_bytes(8, "little")
        + b'{"residual_delta":{"dtype":"F32","shape":[-16],"data_offsets":[0,64]}}'.ljust(90),
        b"\x80\x04\x95" + b"cos\nsystem\n" * 4,
    ],
)
def test_hostile_headers(folder: Path, header: bytes) -> None:
    rewrite(folder / WEIGHTS, header + b"\0" * 64)
    refuses(folder, AdapterFileError, "truncated or not a safetensors file")


def test_missing_files(folder: Path, tmp_path: Path) -> None:
    refuses(tmp_path / "none", AdapterFileError, "is no folder")
    (tmp_path / "empty").mkdir()
    refuses(tmp_path / "empty", AdapterFileError, r"has no adapter_config.json \(it holds: nothing\)")
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    refuses(folder, AdapterFileError, "pickle file.*never read")
    (folder / CONFIG).unlink()
    refuses(folder, AdapterFileError, "it holds: adapter_model.bin")


def test_a_pickle_beside_the_file_is_not_opened(folder: Path) -> None:
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/smidgen-was-here'\ntR.")
    smidgen.load(Net(), folder)
    assert not Path("/tmp/smidgen-was-here").exists()


# ---- the config --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"rr": 3}, r"unknown keys \['rr'\]"),
        ({"residual_optoins": {}}, "Did you mean 'residual_options'"),
        ({"peft_type": "LORA"}, "does not hold the tensors its config calls for"),
        ({"peft_type": None}, "type None, which this peft does not know"),
        ({"residual": "triangel"}, "Did you mean 'triangular'"),
        ({"residual": "../../etc/passwd"}, "Unknown residual"),
        ({"residual": "__import__('os').system('true')"}, "Unknown residual"),
        ({"residual": None}, "names none"),
        ({"residual": ["low_rank"]}, "residual"),
        ({"residual_options": {"atom": "raw"}}, "Did you mean 'atoms'"),
        ({"residual_options": {"atoms": {"x": 1}}}, "atoms"),
        ({"residual_options": [1]}, "residual_options|option"),
        ({"r": -1}, "at least 1"),
        ({"r": 5}, "shape"),
        ({"r": 1.5}, "whole number"),
        ({"r": True}, "whole number|shape"),
        ({"target_modules": ["q_proj"]}, "lacks 2 of 4"),
        ({"target_modules": 7}, "target_modules"),
        ({"base_lock": {"targets": []}}, "base_lock.*damaged"),
        ({"base_lock": "x"}, "base_lock must be"),
        ({"bias": "all"}, "bias must be 'none'"),
        ({"rank_pattern": {"q_proj": 2}}, r"shape"),
        ({"rank_pattern": ["q"]}, "rank_pattern"),
        ({"modules_to_save": ["head"]}, "missing.*head.weight"),
    ],
)
def test_damaged_configs(folder: Path, changes: dict[str, Any], match: str) -> None:
    edit_config(folder, **changes)
    refuses(folder, SmidgenError, match)


def test_a_rank_of_a_billion_is_refused_without_making_it(tmp_path: Path) -> None:
    smidgen.save(trained("lora", r=2), tmp_path)
    edit_config(tmp_path, r=10**9, checksum=None)
    refuses(tmp_path, AdapterFileError, "r is 1000000000, more than")


def test_a_config_that_is_no_object_or_nests_deeply(folder: Path) -> None:
    for text in ("[]", "3", "null", '"x"', "[" * 100_000):
        (folder / CONFIG).write_text(text)
        refuses(folder, AdapterFileError, "not an object|not valid JSON")


KEYS = ["r", "transform", "residual", "residual_options", "transform_options", "rank_pattern", "seed", "base_lock"]
KEYS += ["target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern", "canary"]
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.floats(allow_nan=False, width=16)
    | st.sampled_from(["", "q_proj", "x"]),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["r", "q_proj", "sketch"]), inner, max_size=2)
    ),
    max_leaves=4,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=2))
def test_any_config_loads_or_is_refused_whole(good: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = Path(shutil.copytree(good, tmp_path / "fuzzed", dirs_exist_ok=True))
    edit_config(folder, **changes)
    net = Net()
    before = testing.snapshot(net)
    try:
        smidgen.load(net, folder)
    except SmidgenError:
        testing.unchanged(before, net, f"{changes}")
