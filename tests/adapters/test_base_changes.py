"""A base that was cast, tuned, merged into, rescaled, or given another head: what the lock says of what is no target."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import smidgen
from smidgen import testing
from smidgen.adapters.checkpoint import base_groups, base_lock
from smidgen.adapters.tuner.base import base_parts, fingerprint
from smidgen.errors import BaseLockError

tf = pytest.importorskip("transformers")

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = {"input_ids": torch.arange(8)[None]}
Change = Callable[[nn.Module], Any]


def bert() -> Any:
    torch.manual_seed(0)
    model = tf.BertForSequenceClassification(tf.BertConfig(**SIZES)).eval()
    with torch.no_grad():  # norms and biases as training leaves them, not ones and zeros
        for p in model.parameters():
            p.add_(0.02 * torch.randn(p.shape))
    return model


@torch.no_grad()
def moved(model: nn.Module, share: float, only: str = "") -> None:
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if only in name:
            p.add_(share * p.norm() / p.numel() ** 0.5 * torch.randn(p.shape, generator=generator))


@torch.no_grad()
def fresh(model: nn.Module, only: str) -> None:
    for name, p in model.named_parameters():
        if only in name:
            p.copy_(torch.randn(p.shape) if p.dim() > 1 else torch.full_like(p, float("weight" in name)))


@torch.no_grad()
def scaled(model: nn.Module, by: float) -> None:
    for p in model.parameters():
        p.mul_(by)


def merged(model: nn.Module, targets: str) -> None:
    torch.manual_seed(3)
    testing.perturb(smidgen.adapt(model, "lora", r=2, target_modules=[targets]), 1)
    smidgen.set_strength(model, 0.1)
    smidgen.merge(model)


def cast(*dtypes: torch.dtype) -> Change:
    def change(model: nn.Module) -> None:
        for dtype in dtypes:
            model.to(dtype)

    return change


def saved(folder: Path, method: str = "lora", heads: list[str] | None = None, model: Any = None) -> Path:
    model = smidgen.adapt(model or bert(), method, r=4, target_modules=["query", "value"], modules_to_save=heads)
    return smidgen.save(testing.perturb(model), folder)


HALF, BF16, FULL = torch.float16, torch.bfloat16, torch.float32
CASES: dict[str, tuple[Change, str, str]] = {  # change -> (what it does, state, what is named)
    "as it was": (lambda m: None, "same", ""),
    "fp16": (cast(HALF), "cast", ""),
    "bf16": (cast(BF16), "cast", ""),
    "fp16 and back": (cast(HALF, FULL), "cast", ""),
    "bf16 and back": (cast(BF16, FULL), "cast", ""),
    "bf16, then fp16": (cast(BF16, HALF), "cast", ""),
    "tuned by 0.1 %": (lambda m: moved(m, 1e-3), "changed", "bert.encoder.layer"),
    "tuned by 3 %": (lambda m: moved(m, 0.03), "changed", "bert.encoder.layer"),
    "tuned by 3 %, then bf16": (lambda m: (moved(m, 0.03), m.to(BF16)), "changed", "bert.encoder.layer"),
    "biases alone tuned": (lambda m: moved(m, 0.05, "bias"), "changed", "bert.encoder.layer.* (norms and biases)"),
    "one feed-forward tuned": (lambda m: moved(m, 0.02, "layer.1.inter"), "changed", "bert.encoder.layer.1"),
    "merged into the targets": (lambda m: merged(m, "query"), "changed", "(targets)"),
    "merged beside the targets": (lambda m: merged(m, "key"), "changed", "bert.encoder.layer"),
    "scaled by 1.05": (lambda m: scaled(m, 1.05), "changed", "bert.encoder.layer"),
    "scaled by 1.5": (lambda m: scaled(m, 1.5), "other", "another base model"),
    "another head": (lambda m: fresh(m, "classifier"), "changed", "classifier"),
    "other embeddings": (lambda m: fresh(m, "word_embeddings"), "changed", "bert.embeddings"),
    "other blocks beside the targets": (lambda m: fresh(m, "dense"), "other", "no targets differ by"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_a_base_became(case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    change, state, named = CASES[case]
    folder, base = saved(tmp_path), bert()
    change(base)
    report = smidgen.verify(base, folder, IDS)
    assert report.base == state, (report.base, report.base_changed, report.reasons)
    assert (report.verdict == "ON") is (state != "other"), report.reasons
    said = "\n".join([*report.notes, *report.reasons])
    assert named in said and (state in ("changed", "other")) is bool(said), said
    caplog.clear()
    with caplog.at_level(logging.WARNING, "smidgen"):
        if state == "other":
            with pytest.raises(BaseLockError, match=r"differ by \d+%.*up to 15% is tolerated"):
                smidgen.load(base, folder)
        else:
            smidgen.load(base, folder)
    lines = [r.getMessage() for r in caplog.records if "base" in r.getMessage()]
    assert len(lines) == (state in ("cast", "changed")), lines  # said once
    assert state != "changed" or (named in lines[0] and "was changed since" in lines[0])


def test_the_difference_is_measured_block_by_block(tmp_path: Path) -> None:
    folder, base = saved(tmp_path), bert()
    moved(base, 0.05, "layer.1.")
    report = smidgen.verify(base, folder, IDS)
    assert 0.01 < report.base_changed["bert.encoder.layer.1"] < 0.15
    assert not any("layer.0" in name for name in report.base_changed)
    assert 0.002 < (report.base_rest or 0) < 0.15 and 0.01 < report.base_difference < 0.1


def test_a_head_that_the_adapter_keeps_may_be_any(tmp_path: Path) -> None:
    folder, base = saved(tmp_path, heads=["classifier"]), bert()
    fresh(base, "classifier")
    assert smidgen.verify(base, folder, IDS).base == "same"


def test_what_legitimately_differs_is_named_and_not_compared(tmp_path: Path) -> None:
    folder, base = saved(tmp_path), bert()
    base.resize_token_embeddings(101)
    base.bert.pooler = None
    base.bert.embeddings.register_buffer("position_ids", torch.zeros(1, 512, dtype=torch.long))
    report = smidgen.verify(base.bert, folder)
    assert "lacks" in " ".join(report.reasons)  # names without "bert.": other targets altogether
    lock = json.loads((folder / "adapter_config.json").read_text())["base_lock"]
    matrices = {n: m.weight for n, m in base.named_modules() if n.endswith(("query", "value"))}
    rest = {n: p for n, p in base_parts(base).items() if n.removesuffix(".weight") not in matrices}
    found = base_lock.check_lock(lock, matrices, rest)
    assert found.state == "same" and found.rest == 0, found
    assert [note.partition(" '")[0] for note in found.notes] == [
        "this base lacks",
        "tensors of another shape or number at",
    ]
    assert "bert.pooler" in found.notes[0] and "bert.embeddings" in found.notes[1]


def test_tied_copies_count_once(tmp_path: Path) -> None:
    def model() -> Any:
        torch.manual_seed(0)
        return tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=97, n_embd=32, n_layer=1, n_head=4)).eval()

    smidgen.save(testing.perturb(smidgen.adapt(model(), "lora", r=2, target_modules=["c_attn"])), tmp_path)
    untied = model()
    untied.config.tie_word_embeddings = False
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())
    report = smidgen.verify(untied, tmp_path, IDS)
    assert report.base == "same" and report.base_rest == 0 and not report.notes, report.notes


def test_running_statistics_are_no_part_of_a_base(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    smidgen.save(testing.perturb(smidgen.adapt(net, "lora", r=2, target_modules=["0"])), tmp_path)
    with torch.no_grad():
        net.train()(torch.randn(16, 8))
    assert smidgen.verify(net, tmp_path).base == "same"


def test_yesterdays_lock_and_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, base = saved(tmp_path), bert()
    config = json.loads((folder / "adapter_config.json").read_text())
    config.pop("checksum")
    for key in ("rest", "places", "format"):
        config["base_lock"].pop(key)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    moved(base, 0.03)
    report = smidgen.verify(base, folder, IDS)
    assert report.base == "cast" and report.ok and "all others: not in the lock" in str(report)
    config["base_lock"] = None
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with caplog.at_level(logging.WARNING, "smidgen"):
        report = smidgen.verify(base, folder, IDS)
    assert "carries no base lock" in caplog.text and "another base would go unnoticed" in str(report)


@pytest.mark.parametrize(
    "change", [{"rest": "AAAA"}, {"rest": 3}, {"places": ""}, {"places": "!"}, {"format": "q"}, {"places": None}]
)
def test_a_damaged_lock(change: dict[str, Any], tmp_path: Path) -> None:
    folder = saved(tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    config.pop("checksum")
    config["base_lock"] |= change
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(smidgen.SmidgenError, match=r"base_lock.*damaged"):
        smidgen.load(bert(), folder)


def test_what_it_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a tensor of any size at most 1024 elements are read, and a group costs ten bytes."""
    read: list[int] = []
    real = Tensor.__getitem__
    monkeypatch.setattr(Tensor, "__getitem__", lambda self, at: read.append(self.numel()) or real(self, at))
    assert base_groups.samples(torch.empty(3000, 4000)).numel() == 1024 == len(base_groups.places(12_000_000))
    assert read.count(12_000_000) == 1
    parts = base_parts(bert())
    assert base_groups.RECORD.itemsize == 10 and len(base_groups.members(parts)) == 9


def test_a_fingerprint_is_the_bases() -> None:
    one, other = bert(), bert()
    kept = fingerprint(one)
    assert (
        kept == fingerprint(other) == fingerprint(smidgen.adapt(copy.deepcopy(one), "lora", target_modules=["query"]))
    )
    layer = smidgen.adapt(
        testing.perturb(smidgen.adapt(copy.deepcopy(one), "lora", target_modules=["key"])), "svfit", "b"
    )
    assert fingerprint(layer) == kept
    moved(other, 1e-3, "layer.1.output.LayerNorm.bias")
    assert fingerprint(other) != kept
