"""One pipeline for many adapters: each is drawn as if it were alone, the base is untouched, and banks share its factors."""

import numpy
import pytest
import torch

import smidgen
from smidgen.bases.families import load_base
from smidgen.difflora.adapted_pipeline import AdaptedPipeline
from smidgen.difflora.use.refine import widened
from smidgen.difflora.weightspace.layout import write_adapter
from smidgen.errors import BaseLockError, DataError, SmidgenError
from smidgen.tasks.diffusion.scenes import Scenes

SCENES = Scenes(("a red person", "a blue person"), (3, 4), steps=3, guidance=3.0)


@pytest.fixture(scope="module", params=["lora", "svfit"])
def pipeline(request, base) -> AdaptedPipeline:
    return AdaptedPipeline.load(str(base), smidgen.config(request.param, r=2, target_modules=["to_q", "to_v"]))


def rows(pipeline: AdaptedPipeline, count: int) -> torch.Tensor:
    return 0.3 * torch.randn(count, pipeline.layout.size, generator=torch.Generator().manual_seed(0))


def alone(base, scenes: Scenes) -> list:
    """The same scenes with whatever ``base`` carries, without a bank."""
    options = {"steps": scenes.steps, "guidance": scenes.guidance, "negative": base.encode_prompts([""])}
    return base.draw(base.encode_prompts(scenes.prompts), scenes.seeds, **options)


def near(one, other) -> bool:
    return max(abs(numpy.asarray(a, int) - numpy.asarray(b, int)).max() for a, b in zip(one, other, strict=True)) <= 1


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_each_adapter_draws_as_if_alone(pipeline, base, tmp_path, batch):
    """Whatever shares its batch, under guidance, which stacks the batch on itself."""
    vectors = rows(pipeline, 3)
    of_base, *drawn = pipeline.draw(vectors, SCENES, with_base=True, batch=batch)
    plain = load_base(base)
    assert near(of_base, alone(plain, SCENES))
    for number, found in enumerate(drawn):
        folder = write_adapter(pipeline.layout, vectors[number], load_base(base).model, tmp_path / str(number))
        own = load_base(base)
        smidgen.load(own.model, folder)
        assert near(found, alone(own, SCENES)) and not near(found, of_base)


def test_no_adapters_are_the_base_alone(pipeline, base):
    nothing = torch.empty(0, pipeline.layout.size)
    assert pipeline.draw(nothing, SCENES) == []
    assert near(pipeline.draw(nothing, SCENES, with_base=True)[0], alone(load_base(base), SCENES))


def test_a_layout_of_more_rank_is_drawn_too(base):
    pipeline = AdaptedPipeline.load(str(base), smidgen.config("lora", r=2, target_modules=["to_q"]))
    wide = widened(pipeline.layout, 1)
    bank = pipeline.bank(["ann"])
    images = pipeline.draw(0.3 * torch.randn(1, wide.size), SCENES, wide)
    assert not near(images[0], pipeline.draw(torch.zeros(1, wide.size), SCENES, wide)[0])
    assert pipeline.layout.pack(bank.get("ann")).shape == (pipeline.layout.size,)
    with pytest.raises(DataError, match=f"Rows have {wide.size} numbers"):
        pipeline.draw(torch.zeros(1, wide.size), SCENES)


def test_banks_start_alike_or_each_from_its_seed(base):
    pipeline = AdaptedPipeline.load(str(base), smidgen.config("lora", r=2, target_modules=["to_q"]))

    def starts(*seeds: int) -> list[torch.Tensor]:
        bank = pipeline.bank(["ann", "bob"], seeds)
        return [pipeline.layout.pack(bank.get(name)) for name in bank.names]

    assert torch.equal(*starts()) and not torch.equal(*starts(1, 2)) and torch.equal(*starts(1, 1))
    assert list(pipeline.model.peft_config) == ["default"]
    frozen = AdaptedPipeline.load(str(base), smidgen.config("seeded", r=2, target_modules=["to_q"]))
    with pytest.raises(SmidgenError, match="another seed"):
        frozen.bank(["ann", "bob"], [1, 2])
    assert list(frozen.model.peft_config) == ["default"], "nothing stays behind"


def test_another_base_is_refused(pipeline, base, monkeypatch):
    def other(*args):
        loaded = load_base(*args)
        for name, parameter in loaded.model.named_parameters():
            parameter.data.mul_(-1 if ".to_" in name else 1)
        return loaded

    monkeypatch.setattr("smidgen.difflora.adapted_pipeline.load_base", other)
    with pytest.raises(BaseLockError, match="another base than"):
        AdaptedPipeline.load(str(base), pipeline.layout)


def test_without_targets_the_bases_own_are_adapted(base):
    pipeline = AdaptedPipeline.load(str(base), smidgen.config("lora", r=2))
    assert set(pipeline.config.target_modules) == set(pipeline.base.targets)
