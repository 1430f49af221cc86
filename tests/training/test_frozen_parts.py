"""What a frozen base lets a training save: states below the lowest trained layer, matrices in bf16, a head from a probe."""

from dataclasses import replace

import numpy as np
import peft
import pytest
import torch
from torch import nn

import smidgen
from smidgen.adapters.tuner.layer import ShiftLayer
from smidgen.tasks.finetune.lower import known_below
from smidgen.tasks.finetune.measuring import MULTI, REGRESSION, label_answers
from smidgen.tasks.finetune.probe import fit_probe
from smidgen.tasks.image_classification import recipe as image_classification
from smidgen.tasks.instruction import recipe as instruction
from smidgen.tasks.text_classification import recipe as text_classification
from smidgen.training import engine
from smidgen.training import frozen as frozen_module
from smidgen.training.frozen import frozen_matmuls
from tests.training import tiny_models

RECIPES = {"text": text_classification, "image": image_classification, "chat": instruction}
LAST = {
    "text": r".*layer\.1\.attention\.self\.(query|value)",
    "image": r".*layers?\.1\..*(q_proj|v_proj|query|value)",
    "mpnet": r".*layer\.1\.attention\.attn\.(q|v)",  # its relative positions come from outside the layers
    "chat": r".*layers\.1\.self_attn\.(q_proj|v_proj)",
}


def prepared(kind, **changes):
    config = RECIPES[kind].PRESETS["debug"]
    data = {"random_flip": False, "random_crop": False} if kind == "image" else {}
    config = replace(config, data=replace(config.data, **data), dropout=0.0)
    return RECIPES[kind].prepare(replace(config, **changes))


def trained(model, task, steps=4):
    """The losses of some steps, and what the trained model predicts of the test split."""
    numbers = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.Adam(numbers, lr=1e-2), []
    model.train()
    for step in range(steps):
        loss = task.loss(model, task.batch(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return torch.tensor(losses), task.predict(model, "test")


@pytest.mark.parametrize("kind", LAST)
def test_a_run_with_states_from_memory_is_the_run_without(kind, tmp_path):
    own = kind not in RECIPES
    found, one = [], prepared("text", model=str(tiny_models.folder(kind, tmp_path))) if own else prepared(kind)
    for megabytes in (0, 100):
        model = one.fresh()
        smidgen.adapt(model, "lora", r=2, target_modules=LAST[kind], modules_to_save=list(one.heads) or None)
        with known_below(one.task, model, megabytes, reads=10**6) as depth:
            assert depth == (1 if megabytes else 0)
            states = one.task.lower and len(one.task.lower.states)
            found.append(trained(model, one.task))
            if megabytes:
                assert states == len(one.task.splits["train"]) < len(one.task.lower.states)  # the test's too by now
        assert one.task.lower is None
    for plain, known in zip(*found, strict=True):
        torch.testing.assert_close(known, plain, rtol=1e-5, atol=1e-5)


def adapted(one, how):
    model = one.fresh()
    if how == "head":
        return engine.adapt(model, engine.LinearProbe(), one.heads)
    if how == "embeddings":
        engine.adapt(model, engine.LinearProbe(), one.heads)
        next(m for m in model.modules() if isinstance(m, nn.LayerNorm)).requires_grad_(True)
        return model
    config = {
        "all": peft.LoraConfig(r=2, target_modules=["query", "value"]),
        "norms": peft.LNTuningConfig(target_modules=r".*layer\.1\..*LayerNorm"),
        "shared": peft.VeraConfig(r=2, save_projection=False, target_modules=r".*layer\.1\.attention\.self\.value"),
        "last": peft.LoraConfig(r=2, target_modules=LAST["text"]),
    }[how]
    return engine.adapt(model, config, one.heads)


@pytest.mark.parametrize(
    ("how", "depth"), [("head", 2), ("norms", 1), ("shared", 1), ("last", 1), ("all", 0), ("embeddings", 0)]
)
def test_how_many_layers_are_passed_over(how, depth):
    one = prepared("text")
    with known_below(one.task, adapted(one, how), 100, 0) as found:
        assert found == depth
        assert one.task.lower is None or not one.task.lower.states  # too few reads to be worth a pass ahead


def test_states_are_not_taken_from_memory_where_that_would_be_wrong():
    chance = prepared("text", dropout=0.1)
    with known_below(chance.task, adapted(chance, "last"), 100, 10**6) as depth:
        assert depth == 0
    config = RECIPES["image"].PRESETS["debug"]
    moved = image_classification.prepare(replace(config, dropout=0.0))  # random crops and flips
    model = engine.adapt(moved.fresh(), engine.LinearProbe(), moved.heads)
    with known_below(moved.task, model, 100, 10**6) as depth:
        assert depth == 0


def test_memory_is_bounded_and_shared():
    one, states = prepared("text"), {}
    with known_below(one.task, adapted(one, "last"), 100, 10**6, states) as depth:
        assert depth == 1
    size = sum(state.nbytes for state in states.values())
    kept = dict(states)
    with known_below(one.task, adapted(one, "last"), 100, 10**6, states):
        pass
    assert all(states[key] is value for key, value in kept.items()) and len(states) == len(kept)
    one.task.lower = None
    from smidgen.tasks.finetune.lower import Lower

    model = adapted(one, "last")
    one.task.lower = Lower(list(model.bert.encoder.layer), 1, size // 2)
    before = one.task.predict(model, "train")
    assert sum(state.nbytes for state in one.task.lower.states.values()) <= size // 2
    torch.testing.assert_close(one.task.predict(model, "train"), before, rtol=1e-5, atol=1e-5)
    one.task.lower = None


# ---- bf16 ------------------------------------------------------------------------------------------------------------


def test_frozen_matrices_multiply_in_bf16_and_trained_ones_do_not(monkeypatch):
    monkeypatch.setattr(frozen_module, "multiplies_bf16", lambda device: True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[0].requires_grad_(False)
    x = torch.randn(8, 64, requires_grad=True)
    plain = model(x)
    (slope,) = torch.autograd.grad(plain.sum(), x)
    with frozen_matmuls(model, "bf16") as on:
        assert on and model(x).dtype == torch.float32
        error = (model[0](x) - nn.functional.linear(x, model[0].weight, model[0].bias)).norm() / x.norm()
        assert 1e-4 < float(error) < 1e-2
        assert torch.equal(model[1](x), nn.functional.linear(x, model[1].weight, model[1].bias))
        (halved,) = torch.autograd.grad(model(x).sum(), x)
        assert float((halved - slope).norm() / slope.norm()) < 1e-2
    assert torch.equal(model(x), plain)
    with frozen_matmuls(model, "base") as on:
        assert not on


@pytest.mark.parametrize("method", ["svfit", "loldu", "seeded", "spectral+scale", "rotation+seeded+scale"])
def test_frozen_factors_of_an_adapter_multiply_in_bf16_too(method, monkeypatch):
    monkeypatch.setattr(frozen_module, "multiplies_bf16", lambda device: True)
    torch.manual_seed(0)
    model = smidgen.adapt(nn.Sequential(nn.Linear(48, 64), nn.Linear(64, 32)), method, r=16, target_modules=["0", "1"])
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    x = torch.randn(600, 48)  # many tokens: where the composed form would be taken

    def run():
        y = model(x)
        return y, torch.autograd.grad(y.square().mean(), [p for p in model.parameters() if p.requires_grad])

    y, slopes = run()
    with frozen_matmuls(model, "bf16"):
        assert {slot.rounded[1].dtype for slot in slots_of(model)} == {torch.bfloat16}
        rounded, others = run()
    assert 1e-4 < float((rounded - y).norm() / y.norm()) < 2e-2
    for slope, other in zip(slopes, others, strict=True):
        assert other.dtype == torch.float32 and float((other - slope).norm() / slope.norm()) < 5e-2
    assert all(slot.rounded is None for slot in slots_of(model)) and torch.equal(model(x), y)


def slots_of(model):
    return [
        slot for module in model.modules() if isinstance(module, ShiftLayer) for slot in module.smidgen_slots.values()
    ]


def test_where_bf16_is_emulated_it_is_not_used(monkeypatch, caplog):
    monkeypatch.setattr(frozen_module, "multiplies_bf16", lambda device: False)
    model = nn.Linear(8, 8).requires_grad_(False)
    with frozen_matmuls(model, "bf16") as on:
        assert not on and "forward" not in model.__dict__
    assert "does not multiply in bf16" in caplog.text


# ---- the probe -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "gpt2"])
def test_a_probe_is_the_best_head_on_frozen_features(family, tmp_path):
    one = prepared("text", model=str(tiny_models.folder(family, tmp_path)))
    probe, model = fit_probe(one.model, one.task, one.heads), one.fresh()
    if family == "gpt2":  # its head has no bias
        assert probe is None
        return
    before = one.task.evaluate(model)
    probe.put(model)
    after = one.task.evaluate(model)
    assert (
        after["loss"] == pytest.approx(probe.scores["validation"]["loss"], rel=1e-4) and after["loss"] < before["loss"]
    )


def test_a_probe_of_images_and_none_without_a_head():
    one = prepared("image")
    probe = fit_probe(one.model, one.task, one.heads)
    assert probe.scores["validation"]["loss"] < one.task.evaluate(one.model)["loss"]
    chat = prepared("chat")
    assert fit_probe(chat.model, chat.task, chat.heads) is None


@pytest.mark.parametrize("problem", ["single", MULTI, REGRESSION])
def test_what_an_example_was_answered(problem):
    logits = torch.tensor([[2.0, -1.0], [0.5, 3.0]])
    if problem == "single":
        losses, right = label_answers(logits, torch.tensor([0, 0]), "single_label_classification")
        assert right.tolist() == [1, 0]
        assert losses.tolist() == pytest.approx([np.log1p(np.exp(-3)), 2.5 + np.log1p(np.exp(-2.5))])
    elif problem == MULTI:
        losses, right = label_answers(logits, torch.tensor([[1.0, 0.0], [1.0, 0.0]]), problem)
        assert right.tolist() == [1, 0] and losses[0] < losses[1]
    else:
        losses, right = label_answers(torch.tensor([[1.0], [3.0]]), torch.tensor([1.0, 1.0]), problem)
        assert losses.tolist() == [0, 4] and right.tolist() == [0, -4]
