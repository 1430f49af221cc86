"""A generator trained by two processes is that of one with twice the batches; encoding is shared."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from smidgen.bases.embedded import world
from smidgen.difflora.generator import shards
from smidgen.difflora.generator.fit import fit
from smidgen.difflora.generator.generator import load_generator
from smidgen.difflora.generator.people import ENCODED
from smidgen.difflora.generator.settings import PRESETS, GeneratorConfig, SharedBasis
from smidgen.difflora.zoo.settings import Subjects
from smidgen.training.loop import LoopConfig
from smidgen.training.settings import dump_yaml
from tests.training.test_two_processes import launch

linux = pytest.mark.skipif(sys.platform != "linux", reason="gloo and signals as Linux has them")
DEBUG = PRESETS["debug"]
SUBJECTS = Subjects(people=6, held_out=0, pictures=2, same_scenes=False, people_seed=1)


def end_to_end(out: Path, parts: int) -> GeneratorConfig:
    assert DEBUG.end_to_end is not None
    loop = replace(DEBUG.end_to_end.train, gradient_accumulation_steps=parts)
    return replace(DEBUG, end_to_end=replace(DEBUG.end_to_end, train=loop), out=out)


def in_a_basis(out: Path, parts: int) -> GeneratorConfig:
    loop = LoopConfig(max_train_steps=3, lr_warmup_steps=0, checkpointing_steps=2)
    several = replace(loop, gradient_accumulation_steps=parts)
    stage = SharedBasis(people=SUBJECTS, batch_size=3, train=several, zoo=loop, round=loop, rounds=2)
    diffusion = replace(PRESETS["two-stage"].two_stage, batch_size=2, train=several)
    return replace(DEBUG, end_to_end=None, shared_basis=stage, two_stage=diffusion, out=out)


@linux
@pytest.mark.slow
@pytest.mark.parametrize("kind", [end_to_end, in_a_basis])
def test_two_processes_make_what_one_makes_of_twice_the_batches(kind, tmp_path):
    settings = tmp_path / "config.yaml"
    settings.write_text(dump_yaml(kind(tmp_path / "two", 1)))
    done = launch("-m", "smidgen.cli", "generator", "train", "--config", str(settings))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.count("predicts: ") == 1  # told once
    made = {1: fit(kind(tmp_path / "one", 1), progress=False), 2: fit(kind(tmp_path / "twice", 2), progress=False)}
    rng = np.random.default_rng(3)
    photo = world.render(world.sample_identity(rng), world.sample_scene(rng))
    one, twice, two = (g.predict([photo]) for g in (made[1], made[2], load_generator(tmp_path / "two")))
    assert float((two - twice).norm()) < 0.02 * float((one - twice).norm())
    files = [{path.name for path in (tmp_path / out / "people" / ENCODED).iterdir()} for out in ("one", "two")]
    assert files[0] == files[1]


def test_files_of_encoded_pictures_are_shared_by_the_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "wait_for_all", lambda: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    made = []

    def squares(places):
        made.append((os.environ["RANK"], len(places)))
        return {"square": torch.tensor([float(place**2) for place in places])}

    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        shared = shards.Shards(tmp_path, "squares", 1, 2 * shards.ROWS + 5)
        assert shared.missing() == (shards.ROWS if rank == "1" else shards.ROWS + 5)
        shared.fill(squares)
        assert shared.missing() == 0
    assert made == [("1", shards.ROWS), ("0", shards.ROWS), ("0", 5)]
    last = 2 * shards.ROWS + 4
    assert shared.column("square")[[last, 3]].tolist() == [last**2, 9]
