"""A person in 256 bytes."""

from pathlib import Path

import numpy
import pytest
import torch
from damage import rewrite

import smidgen
from smidgen.bases.embedded import world
from smidgen.bases.families import load_base
from smidgen.cli import main
from smidgen.difflora.generator.generator import load_generator
from smidgen.difflora.use import commands
from smidgen.difflora.use.folders import read_recipe
from smidgen.difflora.use.recipes import open_recipe, write_recipe
from smidgen.difflora.use.refine import Refine
from smidgen.difflora.use.sampler import Output, Sheet
from smidgen.difflora.weightspace.layout import write_adapter
from smidgen.errors import AdapterFileError, ConfigError, DataError

LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def photo(tmp_path_factory) -> Path:
    rng = numpy.random.default_rng(0)
    path = tmp_path_factory.mktemp("photos") / "ann.png"
    world.render(world.sample_identity(rng, "test"), world.sample_scene(rng)).save(path)
    return path


@pytest.fixture(scope="module")
def written(photo, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("recipes") / "ann"
    assert main(["predict", str(photo), "--recipe", "--out", str(out), "--no-sheet"]) == 0
    assert [path.name for path in out.iterdir()] == ["ann.recipe"]
    return out / "ann.recipe"


def test_it_has_256_bytes_and_is_the_adapter(photo, written, tmp_path, capsys):
    assert written.stat().st_size == 256
    generator, latent = open_recipe(written)
    commands.predict([photo], Output(tmp_path / "folder", sheet=Sheet(sheet=False)))
    whole = torch.tensor(read_recipe(tmp_path / "folder")["latent"])
    assert torch.equal(latent, whole.half().float())
    base, same = load_base("embedded"), load_base("embedded")
    write_adapter(generator.layout, generator.rows(latent[None])[0], same.model, tmp_path / "same")
    smidgen.load(base.model, written)
    smidgen.load(same.model, tmp_path / "same")
    x = torch.randn(2, 64)
    assert torch.equal(base.model.get_submodule(LAYER)(x), same.model.get_submodule(LAYER)(x))
    assert smidgen.verify(base.model, written).ok
    bank = smidgen.Bank(same.model, same.model.peft_config["default"])
    bank.put("ann", written)
    assert torch.equal(
        bank.get("ann")[LAYER]["residual_b"],
        generator.layout.unpack(generator.rows(latent[None])[0])[LAYER]["residual_b"],
    )
    assert main(["load", str(written), "--out", str(tmp_path / "loaded"), "--no-sheet"]) == 0
    assert torch.equal(torch.tensor(read_recipe(tmp_path / "loaded")["latent"]), latent)


def test_edit_and_blend_start_from_one(written, tmp_path):
    out = Output(tmp_path / "edited", sheet=Sheet(sheet=False))
    commands.edit([written], out, {"skin=dark": 0.0})
    assert torch.equal(torch.tensor(read_recipe(out.out)["latent"]), open_recipe(written)[1])


def test_seeds_and_people_have_a_file_each(photo, tmp_path):
    result = commands.predict(
        [photo], Output(tmp_path / "out", sheet=Sheet(sheet=False)), seeds=(0, 1), each=True, recipe=True
    )
    assert sorted(path.name for path in result.folders) == ["ann-seed-0.recipe", "ann-seed-1.recipe"]
    assert set(result.folders.values()) == {256}
    with pytest.raises(ConfigError, match="--refine"):
        commands.predict([photo], Output(tmp_path / "no"), refine=Refine(steps=1), recipe=True)


def test_what_is_wrong_is_said(written, tmp_path, monkeypatch):
    generator = load_generator()
    other = load_generator()
    other.__dict__["digest"] = "0123456789abcdef" * 4
    strange = tmp_path / "strange.recipe"
    write_recipe(strange, other, torch.zeros(64))
    base = load_base("embedded")
    with pytest.raises(
        DataError, match=rf"needs the generator 0123456789abcdef.*{generator.digest[:16]}.*SMIDGEN_GENERATORS"
    ):
        smidgen.load(base.model, strange)
    assert not smidgen.names(base.model)
    monkeypatch.setenv("SMIDGEN_GENERATORS", str(tmp_path))
    with pytest.raises(DataError, match="holds no generator"):
        open_recipe(strange)
    damaged = tmp_path / "damaged.recipe"
    content = bytearray(written.read_bytes())
    content[-3] ^= 4
    rewrite(damaged, bytes(content))
    with pytest.raises(AdapterFileError, match="damaged"):
        smidgen.load(base.model, damaged)
    rewrite(damaged, b"no")
    with pytest.raises(AdapterFileError, match="no recipe"):
        open_recipe(damaged)


def test_a_generator_elsewhere_is_found(tmp_path, monkeypatch):
    generator = load_generator()
    with torch.no_grad():
        generator.network.nobody += 1.0
    generator.save(tmp_path / "mine")
    mine = load_generator(tmp_path / "mine")
    write_recipe(tmp_path / "a.recipe", mine, torch.zeros(64))
    monkeypatch.setenv("SMIDGEN_GENERATORS", str(tmp_path / "mine"))
    assert open_recipe(tmp_path / "a.recipe")[0].digest == mine.digest


def test_a_prediction_adds_up_with_a_personalised_adapter(written, tmp_path):
    """Of two LoRA their sum is exact: half a predicted person and half a trained one."""
    assert main(["load", str(written), "--out", str(tmp_path / "predicted"), "--no-sheet"]) == 0
    base = load_base("embedded")
    targets = sorted(base.targets)
    smidgen.adapt(base.model, "lora", target_modules=targets, r=2, seed=3)
    with torch.no_grad():
        for parameter in base.model.parameters():
            if parameter.requires_grad:
                parameter += 0.02
    smidgen.save(base.model, tmp_path / "trained")
    words = [
        str(tmp_path / "predicted"),
        str(tmp_path / "trained"),
        "--weights",
        "0.5,0.5",
        "--out",
        str(tmp_path / "both"),
    ]
    assert main(["combine", *words]) == 0
    changes, x = [], torch.randn(2, 64)
    for name in ("predicted", "trained", "both"):
        own = load_base("embedded")
        smidgen.load(own.model, tmp_path / name)
        layer = own.model.get_submodule(LAYER)
        changes.append(layer(x) - layer.base_layer(x))
    assert torch.allclose(changes[2], (changes[0] + changes[1]) / 2, atol=1e-5) and changes[2].norm() > 0.01
