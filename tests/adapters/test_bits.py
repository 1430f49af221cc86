"""Files in int8 and int4: what is encoded comes back within half a step or a cut, by every route, and damage is told in words."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

import smidgen
from smidgen import testing
from smidgen.adapters import budget
from smidgen.adapters.checkpoint import packing
from smidgen.adapters.resize import resize
from smidgen.adapters.tuner.carried import adapted_layers
from smidgen.errors import AdapterFileError
from tests.adapters.helpers import Net, inputs, trained

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
NAME = "residual_delta"


def encoded(values: Tensor, dtype: str) -> Tensor:
    return packing.encode({NAME: values}, dtype)[NAME]


def decoded(raw: Tensor, dtype: str) -> Tensor:
    return packing.decode({NAME: raw}, dtype, "here")[NAME]


def headed(method: str, **options: Any) -> nn.Module:
    net = trained(method, modules_to_save=["head"], **options)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if "modules_to_save" in name:
                p += 0.1
    return net


def deltas(net: nn.Module) -> dict[str, Tensor]:
    return {name: layer.delta_matrix("default").detach() for name, layer in adapted_layers(net).items()}


NUMBERS = st.floats(-(2.0**120), 2.0**120, width=32, allow_nan=False)


@settings(deadline=None, max_examples=60)
@given(
    st.one_of(
        st.lists(NUMBERS, max_size=200),
        st.tuples(st.integers(0, 300), st.floats(-40, 30), st.integers(0, 99)).map(
            lambda t: (torch.randn(t[0], generator=torch.Generator().manual_seed(t[2])) * 10 ** t[1]).tolist()
        ),
    ),
    st.sampled_from(sorted(packing.CODES)),
)
@example([], "int4")
@example([0.0] * 65, "int4")
@example([1e-30, 1e30] * 33, "int8")
@example([7.0] + [0.5] * 63 + [1e-8], "int4")
def test_numbers_come_back_within_a_step_and_then_for_good(numbers: list[float], dtype: str) -> None:
    values = torch.tensor(numbers, dtype=torch.float32)
    raw = encoded(values, dtype)
    back = decoded(raw, dtype)
    assert len(raw) == packing.size(len(values), dtype) and back.shape == values.shape and back.dtype == torch.float32
    off = (back.double() - values.double()).abs()
    code = packing.CODES[dtype]
    for group, lost in zip(values.double().split(packing.GROUP), off.split(packing.GROUP), strict=True):
        largest = group.abs().amax(0) if len(group) else 0
        cut = group.abs() > min(code.shares) * largest
        assert bool((lost[~cut] <= 0.502 * largest / code.most + 1e-36).all())
        whole = (group / (largest / code.most)).round() * (largest / code.most) if largest else group
        assert (
            float(lost.norm()) <= 1.02 * float((group - whole).norm()) + 4e-3 * float(group.norm()) + 1e-36
        )  # scales have 8 bits
    assert bool((off <= packing.rounded_by(back, dtype)).all())
    assert bool((back[values == 0] == 0).all())
    testing.same(encoded(back, dtype), raw, "what was rounded once")


def test_four_bits_lose_less_than_with_the_largest_number_on_the_largest_code() -> None:
    for draw in (torch.randn, lambda *shape, generator: torch.randn(*shape, generator=generator) ** 3, torch.rand):
        values = draw(6400, generator=torch.Generator().manual_seed(3)).float()
        groups = values.view(-1, packing.GROUP)
        steps = groups.abs().amax(1, keepdim=True) / 7
        plain = float(((groups / steps).round() * steps - groups).norm())
        assert 0.85 * plain < float((decoded(encoded(values, "int4"), "int4") - values).norm()) < 0.98 * plain


@pytest.mark.parametrize(
    ("dtype", "damage", "words"),
    [
        ("int4", lambda raw: raw[:-1], "has 36 bytes"),
        ("int4", lambda raw: raw[:2], "has 2 bytes"),
        ("int8", lambda raw: raw[None], "is uint8 of shape"),
        ("int8", lambda raw: raw.view(torch.int8), "is int8 of shape"),
        ("int8", lambda raw: raw.index_fill(0, torch.tensor(3), 128), "the code -128"),
        ("int4", lambda raw: raw.index_fill(0, torch.tensor(3), 8), "the code -8"),
        ("int4", lambda raw: torch.cat([raw[:-2], torch.tensor([192, 127], dtype=torch.uint8)]), "negative, NaN"),
        ("int8", lambda raw: torch.cat([raw[:-2], torch.tensor([128, 191], dtype=torch.uint8)]), "negative, NaN"),
    ],
)
def test_bytes_that_are_no_numbers_are_refused_by_name(dtype: str, damage: Any, words: str) -> None:
    with pytest.raises(AdapterFileError, match=words):
        decoded(damage(encoded(torch.linspace(-1, 1, 65), dtype)), dtype)


def test_the_padding_is_the_code_that_is_no_number() -> None:
    raw = encoded(torch.linspace(-1, 1, 65), "int4")
    assert int(raw[32]) >> 4 == 8 and len(decoded(raw, "int4")) == 65
    raw[32] = int(raw[32]) & 15  # a zero in its place: one number more than the config calls for
    layout = {"a": {NAME: ((65,), torch.float32)}}
    with pytest.raises(AdapterFileError, match=r"shape \(66,\)"):
        packing.unpack(packing.decode({NAME: raw}, "int4", "here"), layout)


@pytest.mark.parametrize(
    ("method", "dtype"),
    [*((method, "int4") for method in ("svfit", "loldu", "tlora(2,2)", "lora", "oft", "seeded")), ("svfit", "int8")],
)
def test_every_route_reads_the_same_numbers(method: str, dtype: str, tmp_path: Path) -> None:
    net = headed(method, store_dtype=dtype)
    live = {name: value.clone() for name, value in net.state_dict().items()}
    folder = smidgen.save(net, tmp_path / "ours")
    assert all(torch.equal(value, live[name]) for name, value in net.state_dict().items()), (
        "a save rounds the file alone"
    )
    loaded = smidgen.load(Net(), folder)
    wanted = loaded(inputs()).detach()
    testing.close(wanted, net(inputs()), "loaded", dtype)
    testing.differs(wanted, net(inputs()), "rounding")
    assert all(p.dtype == torch.float32 for p in loaded.parameters())
    through_peft = PeftModel.from_pretrained(Net(), folder)
    testing.same(through_peft(inputs()), wanted, "PeftModel.from_pretrained")
    lean = PeftModel.from_pretrained(Net(), folder, low_cpu_mem_usage=True)
    testing.same(lean(inputs()), wanted, "low_cpu_mem_usage")
    through_peft.save_pretrained(tmp_path / "theirs")
    testing.same(smidgen.load(Net(), tmp_path / "theirs")(inputs()), wanted, "saved by peft")
    assert (tmp_path / "theirs" / WEIGHTS).stat().st_size <= (folder / WEIGHTS).stat().st_size + 40  # peft's metadata
    for model in (Net(), loaded, net, through_peft, Net().bfloat16().float()):
        report = smidgen.verify(model, folder)
        assert report.ok, report.reasons
    bank = smidgen.Bank(net, net.peft_config["default"])
    bank.put("ann", folder)
    with bank.rows(["ann"] * 4):
        testing.close(net(inputs()), wanted, "a bank")
    state = get_peft_model_state_dict(through_peft)
    testing.perturb(through_peft, 5)
    assert not smidgen.verify(through_peft, folder).ok
    set_peft_model_state_dict(through_peft, state)
    testing.same(through_peft(inputs()), wanted, "its state dict put back")
    smidgen.save(through_peft, tmp_path / "given", state_dict=state)
    testing.same(smidgen.load(Net(), tmp_path / "given")(inputs()), wanted, "saved from a state dict")


def test_verify_tells_a_step_from_half_a_step(tmp_path: Path) -> None:
    net = trained("svfit", r=8, store_dtype="int4")
    smidgen.save(net, tmp_path)
    model = smidgen.load(Net(), tmp_path)
    delta = next(layer.smidgen_slots["default"].residual_delta for layer in adapted_layers(model).values())
    numbers = load_file(tmp_path / WEIGHTS)[NAME]
    step = float(decoded(numbers, "int4").abs().max()) / 7
    least = int(delta.abs().argmin())  # the largest may have been cut by more
    for moved, ok in ((0.4 * step, True), (0.7 * step, False)):
        with torch.no_grad():
            delta[least] += moved
            assert smidgen.verify(model, tmp_path).ok is ok
            delta[least] -= moved


def test_sizes_and_that_no_header_grows(tmp_path: Path) -> None:
    size, header = {}, {}
    for dtype in packing.STORED:
        folder = smidgen.save(headed("seeded", r=1001, store_dtype=dtype), tmp_path / dtype)
        size[dtype] = (folder / WEIGHTS).stat().st_size
        header[dtype] = int.from_bytes((folder / WEIGHTS).read_bytes()[:8], "little")
        held = load_file(folder / WEIGHTS)
        assert held[NAME].numel() * held[NAME].element_size() == packing.size(4 * 1001, dtype)
        heads = {value.dtype for name, value in held.items() if name != NAME}
        assert heads == {torch.float16 if dtype in packing.CODES else torch.float32}
        assert len((folder / CONFIG).read_text()) <= len((tmp_path / "float32" / CONFIG).read_text()) + 26
    assert max(header.values()) - min(header.values()) <= 16
    assert size["float16"] / size["int4"] > 3.2


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_budgets_count_bits(dtype: str, tmp_path: Path) -> None:
    loss = [lambda model: model(inputs()).square().mean()]
    own = budget.allocate(Net(), "2kB", loss, store_dtype=dtype)
    net = testing.perturb(smidgen.adapt(Net(), own))
    folder = smidgen.save(net, tmp_path)
    found = sum((folder / name).stat().st_size for name in (WEIGHTS, CONFIG))
    assert found == budget.file_bytes(Net(), own) and 1940 <= found <= 2000
    halves = smidgen.trained_numbers(smidgen.adapt(Net(), budget.allocate(Net(), "2kB", loss, store_dtype="float16")))
    assert smidgen.trained_numbers(net) / halves == pytest.approx({"int8": 1.94, "int4": 3.7}[dtype], rel=0.06)
    stored = smidgen.config("svfit", r=5, target_modules=["q_proj"], store_dtype=dtype, store_factors=True)
    folder = smidgen.save(testing.perturb(smidgen.adapt(Net(), stored)), tmp_path / "factors")
    found = sum((folder / name).stat().st_size for name in (WEIGHTS, CONFIG))
    assert budget.file_bytes(Net(), stored) == found


def test_factors_in_the_file_are_halves_and_travel(tmp_path: Path) -> None:
    net = trained("svfit", r=5, store_dtype="int4", store_factors=True)
    folder = smidgen.save(net, tmp_path / "a")
    kinds = {name: value.dtype for name, value in load_file(folder / WEIGHTS).items()}
    halves = dict.fromkeys(("residual_up", "residual_down", "residual_values"), torch.float16)
    assert kinds == {NAME: torch.uint8, **halves}
    other = smidgen.load(Net(seed=5), folder)
    for name, delta in deltas(smidgen.load(Net(), folder)).items():
        testing.close(deltas(other)[name], delta, name)
    assert smidgen.verify(net, folder).ok and smidgen.verify(Net(), folder).ok


@pytest.mark.parametrize("method", ["svfit", "lora"])
def test_what_is_made_of_files_reads_them(method: str, tmp_path: Path) -> None:
    folders = [smidgen.save(trained(method, r=6, seed=n, store_dtype="int4"), tmp_path / str(n)) for n in (1, 2)]
    each = [deltas(smidgen.load(Net(), folder)) for folder in folders]
    both = smidgen.combine(folders, [0.5, 2.0], out=tmp_path / "both")
    assert smidgen.verify(Net(), both).ok
    for name, delta in deltas(smidgen.load(Net(), both)).items():
        testing.close(delta, 0.5 * each[0][name] + 2 * each[1][name], name)
    resize(folders[0], out=tmp_path / "small", rank=3)
    assert smidgen.verify(Net(), tmp_path / "small").ok
    assert load_file(tmp_path / "small" / WEIGHTS).popitem()[1].dtype == torch.uint8


def test_inspect_says_the_format(tmp_path: Path) -> None:
    from smidgen.tasks.drawing import inspect

    said = inspect(smidgen.save(trained("loldu", r=5, store_dtype="int4"), tmp_path))
    assert (
        'store_dtype: "int4"' in said and "40 stored numbers" in said and "int4" in said.partition("residual_delta")[2]
    )


def test_a_save_says_when_rounding_takes_much(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    net = trained("svfit", r=16, store_dtype="int4")
    with caplog.at_level(logging.WARNING, "smidgen"):
        smidgen.save(net, tmp_path / "a")
        assert "Rounded" not in caplog.text
        for layer in adapted_layers(net).values():
            with torch.no_grad():
                delta = layer.smidgen_slots["default"].residual_delta
                delta.fill_(0.07)
                delta[0] = 1.0
        smidgen.save(net, tmp_path / "b")
    assert "Rounded to int4" in caplog.text and "'int8'" in caplog.text
    assert smidgen.verify(Net(), tmp_path / "b").ok and smidgen.verify(net, tmp_path / "b").ok
