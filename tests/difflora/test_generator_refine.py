"""Refinement of predicted adapters: step 0, many people at once, ranks, families, bad input."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from smidgen.adapters.tuner.config import SmidgenConfig
from smidgen.bases.families import load_base
from smidgen.difflora.adapted_pipeline import AdaptedPipeline
from smidgen.difflora.use.refine import Refine, refine_rows, widened
from smidgen.difflora.weightspace.layout import layout_of, write_adapter
from smidgen.difflora.zoo.settings import ZooConfig, adapter_config
from smidgen.errors import ConfigError, DataError
from smidgen.tasks.personalize.settings import Adapter
from tests.difflora.helpers import layout as small_layout
from tests.difflora.helpers import numbers
from tests.training import tiny

QUICK = Refine(steps=3, batch_size=2, learning_rate=1e-2)


@pytest.fixture(scope="module")
def pipelines(base):
    """A pipeline for each family, loaded once."""
    kinds = {
        "lora": Adapter(method="lora", rank=1),
        "svfit": Adapter(method="svfit", rank=4),
        "tlora_star": Adapter("tlora_star"),
    }
    made: dict[str, AdaptedPipeline] = {}

    def get(name: str) -> AdaptedPipeline:
        if name not in made:
            made[name] = AdaptedPipeline.load(str(base), adapter_config(ZooConfig(adapter=kinds[name])))
        return made[name]

    return get


def photos(count: int) -> list[list[Image.Image]]:
    return [[Image.new("RGB", (40, 30), (60 * number, 90, 200))] for number in range(count)]


def predictions(pipeline: AdaptedPipeline, count: int) -> torch.Tensor:
    return numbers(count, pipeline.layout.size) * 0.05


def delta(layout, rows):
    """The products B A of every target, in fp64."""
    parts = []
    for a, b in layout.factor_pairs():
        left, right = (rows[:, e.columns].reshape(-1, *e.shape).double() for e in (b, a))
        parts.append((a.scale * left @ right).flatten(1))
    return torch.cat(parts, 1)


def test_no_steps_leave_the_prediction_to_the_bit(pipelines):
    pipeline = pipelines("lora")
    rows = predictions(pipeline, 2)
    found, layout = refine_rows(pipeline, rows, photos(2), Refine(steps=0))
    assert torch.equal(found, rows) and layout is pipeline.layout


@pytest.mark.parametrize("name", ["lora", "tlora_star"])
def test_the_first_step_starts_from_the_prediction(pipelines, name, monkeypatch):
    """Its loss is the loss of the prediction in its own rank, and the extra rank's B is zero."""
    from smidgen.difflora.use import refine

    pipeline, seen = pipelines(name), []
    rows = predictions(pipeline, 1)
    monkeypatch.setattr(refine, "train", lambda task, model, *args, **options: seen.append((task.layout, model())))
    refine_rows(pipeline, rows, photos(1), replace(QUICK, steps=1, keep_rank=True))
    (layout, start), narrow = seen[0], pipeline.layout
    assert torch.equal(delta(layout, start), delta(narrow, rows))
    for old, new in zip(narrow.entries, layout.entries, strict=True):
        wide = start[:, new.columns].reshape(-1, *new.shape)
        assert torch.equal(wide[tuple(map(slice, (1, *old.shape)))].flatten(1), rows[:, old.columns])
        if old.side == "residual_b":
            assert not wide[..., old.shape[1] :].any()
        if old.side == "residual_a":
            assert wide[:, old.shape[0] :].any()


@pytest.mark.parametrize("name", ["lora", "svfit", "tlora_star"])
def test_many_people_at_once_are_refined_as_if_alone(pipelines, name):
    pipeline, people = pipelines(name), photos(3)
    rows = predictions(pipeline, 3)
    together, layout = refine_rows(pipeline, rows, people, replace(QUICK, keep_rank=True))
    alone = torch.cat(
        [refine_rows(pipeline, rows[i : i + 1], people[i : i + 1], replace(QUICK, keep_rank=True))[0] for i in range(3)]
    )
    in_twos, _ = refine_rows(pipeline, rows, people, replace(QUICK, keep_rank=True, group_size=2))
    assert layout is pipeline.layout
    moved = (together - rows).norm()
    assert moved > 1e-3
    assert (together - alone).norm() < 0.02 * moved
    assert (together - in_twos).norm() < 0.02 * moved


def test_refinement_lowers_the_loss_on_the_photo(pipelines):
    pipeline = pipelines("lora")
    rows = predictions(pipeline, 1) * 0
    rows = pipeline.layout.pack(pipeline.bank(["x"]).get("x"))[None]
    losses = []
    for steps in (1, 30):
        _, task = refine_losses(pipeline, rows, replace(QUICK, steps=steps, learning_rate=3e-2))
        losses.append(float(task.history[-1]))
    assert losses[1] < losses[0]


def refine_losses(pipeline, rows, config):
    from unittest.mock import patch

    from smidgen.difflora.use import refine

    tasks = []

    class Kept(refine.PhotoTask):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            tasks.append(self)

        def batch(self, index):
            return super().batch(0)

    with patch.object(refine, "PhotoTask", Kept):
        return refine_rows(pipeline, rows, photos(1), config), tasks[0]


def test_a_frozen_prediction_is_still_in_the_product(pipelines):
    """What is added has the extra rank alone."""
    pipeline = pipelines("lora")
    rows = predictions(pipeline, 1)
    found, layout = refine_rows(pipeline, rows, photos(1), replace(QUICK, train_prediction=False))
    for (a, b), (wide_a, wide_b) in zip(pipeline.layout.factor_pairs(), layout.factor_pairs(), strict=True):
        before, after = (
            rows_[:, y.columns].reshape(y.shape).double() @ rows_[:, x.columns].reshape(x.shape).double()
            for rows_, x, y in ((rows, a, b), (found, wide_a, wide_b))
        )
        values = torch.linalg.svdvals(after - before)
        assert values[0] > 1e-5 and values[1] < 1e-3 * values[0]


def test_an_anchor_holds_the_prediction(pipelines):
    pipeline = pipelines("svfit")
    rows = predictions(pipeline, 1)
    free, _ = refine_rows(pipeline, rows, photos(1), replace(QUICK, steps=8))
    held, _ = refine_rows(pipeline, rows, photos(1), replace(QUICK, steps=8, anchor=100.0))
    assert (held - rows).norm() < 0.7 * (free - rows).norm()


def test_a_refined_adapter_is_an_ordinary_one(pipelines, base, tmp_path):
    pipeline = pipelines("lora")
    found, layout = refine_rows(pipeline, predictions(pipeline, 1), photos(1), QUICK)
    assert layout.config["r"] == 2 and found.shape == (1, layout.size)
    plain = load_base(str(base))
    write_adapter(layout, found[0], plain.model, tmp_path / "a")
    assert layout_of(_loaded(plain, tmp_path / "a"), SmidgenConfig(**layout.config)).digest == layout.digest


def _loaded(base, folder):
    import smidgen

    return smidgen.load(base.model, folder)


def test_the_pipeline_is_left_as_it_was(pipelines):
    pipeline = pipelines("lora")
    bank = pipeline.bank(["ann"])
    for parameter in bank.parameters():
        parameter.requires_grad_(False)
    refine_rows(pipeline, predictions(pipeline, 1), photos(1), QUICK)
    assert all(list(layer.banks) == [bank.label] for layer in bank.layers.values())
    assert pipeline.layout.pack(bank.get("ann")).shape == (pipeline.layout.size,)
    assert not any(parameter.requires_grad for parameter in pipeline.base.model.parameters())


@pytest.mark.parametrize("scaling", ["plain", "rslora"])
def test_a_wider_layout_keeps_the_scale(scaling):
    own = small_layout("lora", r=2, alpha=3.0, scaling=scaling)
    model_layout = small_layout("lora", **_options(widened(own, 2)))
    assert [e.shape for e in widened(own, 2).entries] == [e.shape for e in model_layout.entries]
    assert [e.scale for e in own.entries] == pytest.approx([e.scale for e in model_layout.entries])


def _options(layout):
    return {"r": layout.config["r"], **layout.config["residual_options"]}


def test_bad_input_is_told(pipelines):
    pipeline = pipelines("lora")
    with pytest.raises(DataError, match="2 adapters are to be refined on the photos of 1 people"):
        refine_rows(pipeline, predictions(pipeline, 2), photos(1), QUICK)
    with pytest.raises(DataError, match="one caption"):
        refine_rows(pipeline, predictions(pipeline, 1), photos(1), QUICK, [["a", "b"]])
    with pytest.raises(ConfigError, match="extra_rank"):
        Refine(extra_rank=-1)
    with pytest.raises(ConfigError, match="range inside 0 to 1"):
        Refine(timesteps=(0.5, 0.2))


def test_sdxl_is_refined_too(tmp_path):
    """Two text encoders, pooled embeddings, time ids."""
    folder = tiny.sdxl_folder(tmp_path / "sdxl")
    pipeline = AdaptedPipeline.load(str(folder), adapter_config(ZooConfig()))
    rows = predictions(pipeline, 1)
    found, _ = refine_rows(pipeline, rows, photos(1), replace(QUICK, steps=1, keep_rank=True))
    assert found.shape == rows.shape and torch.isfinite(found).all() and not torch.equal(found, rows)
