"""Photos that hide something, and the diffusion over a generator's own latents that learns from them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from damage import rewrite
from PIL import Image

from smidgen.bases.embedded import wide, world
from smidgen.difflora.generator import fit as fitting
from smidgen.difflora.generator import hiding
from smidgen.difflora.generator.generator import POSSIBLE, SHIPPED, load_generator
from smidgen.difflora.generator.people import Photos
from smidgen.difflora.generator.settings import PRESETS, Encoders, GeneratorConfig, OwnLatents
from smidgen.difflora.generator.tasks import LatentTask
from smidgen.difflora.zoo.settings import Subjects
from smidgen.difflora.zoo.subjects import make_subjects
from smidgen.errors import ConfigError, DataError
from tests.difflora.test_two_stage import Colours


def photo(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8))


@pytest.mark.parametrize("way", hiding.WAYS)
def test_a_way_to_hide_changes_a_copy_of_the_photo_and_follows_from_its_seed(way):
    shown, before = photo(), photo()
    hidden = way(shown, np.random.default_rng(1))
    assert hidden.size == shown.size and hidden.mode == "RGB"
    assert np.array_equal(np.asarray(shown), np.asarray(before))
    assert not np.array_equal(np.asarray(hidden), np.asarray(shown))
    assert np.array_equal(np.asarray(hidden), np.asarray(way(shown, np.random.default_rng(1))))


def test_a_hat_hides_the_hair_and_nothing_else():
    rng = np.random.default_rng(0)
    person, scene = world.sample_identity(rng), world.sample_scene(rng)
    words = person.as_dict() | {"facial_hair": "none"}
    other = words | {"hair": next(word for word in world.IDENTITY_ATTRIBUTES["hair"] if word != person.hair)}
    dark = words | {"skin": "dark" if person.skin != "dark" else "pale"}
    first, second, third = (wide.in_a_hat(one, scene, np.random.default_rng(3)) for one in (words, other, dark))
    assert np.array_equal(np.asarray(first), np.asarray(second))
    assert not np.array_equal(np.asarray(first), np.asarray(third))


def test_every_other_hidden_photo_is_in_a_hat_and_they_are_kept(tmp_path, monkeypatch):
    people = make_subjects(tmp_path, Subjects(people=3, held_out=0, pictures=2, same_scenes=False, people_seed=1))
    drawn: list[dict[str, str]] = []

    def in_a_hat(attributes, rng):
        drawn.append(dict(attributes))
        return Image.new("RGB", (64, 64), "red")

    base = SimpleNamespace(resolution=64, in_a_hat=in_a_hat)
    found = hiding.hidden_photos(tmp_path, people, 4, base, Colours(), Colours())
    assert found.ids == tuple(person.id for person in people) and [len(own) for own in found.usable] == [4, 4, 4]
    red = (found.face == Colours().encode([Image.new("RGB", (64, 64), "red")])).all(1)
    assert red.tolist() == [True, False, True, False] * 3
    assert drawn == [person.attributes for person in people for _ in range(2)]
    monkeypatch.setattr(hiding, "read_pictures", None)
    again = hiding.hidden_photos(tmp_path, people, 4, base, Colours(), Colours())  # from the files
    assert torch.equal(again.face, found.face)
    with pytest.raises(TypeError):  # without hats others are made
        hiding.hidden_photos(tmp_path, people, 4, SimpleNamespace(resolution=64), Colours(), Colours())


def test_half_of_the_photos_hide_something_with_their_own_noise_where_there_are_any():
    photos = Photos(("a", "b"), torch.randn(4, 3), torch.randn(4, 4), ((0, 1), (2, 3)), ((0, 1), (2, 3)))
    hidden = Photos(("b",), torch.full((1, 3), 50.0), torch.full((1, 4), 50.0), ((0,),), ((0,),))
    task = LatentTask(torch.randn(2, 6), photos, 64, 0.0, 0, 0.0, hidden, 0.1)
    rows, far = [], []
    for number in range(200):
        batch = task.batch(number)
        own = [name == "b" for name in batch["names"]]
        rows += [(face[0] > 25).all().item() for face, its in zip(batch["face"], own, strict=True) if its]
        assert not any((face > 25).any() for face, its in zip(batch["face"], own, strict=True) if not its)
        far += [face[0] - 50 for face in batch["face"] if face[0, 0] > 25]
        seen = torch.cat([face for face, its in zip(batch["face"], own, strict=True) if not its])
        assert torch.cdist(seen, photos.face).min(1).values.max() < 1e-5  # a plain photo has no noise here
    assert 0.4 < np.mean(rows) < 0.6
    deviation = torch.stack(far).std(0) / photos.face.std(0)
    assert (deviation - 0.1).abs().max() < 0.05
    assert torch.equal(task.batch(3)["face"], task.batch(3)["face"])


def test_latents_of_pictures_go_with_the_picture_that_is_shown_or_hidden():
    photos = Photos(("a", "b"), torch.randn(4, 3), torch.randn(4, 4), ((0, 1), (2, 3)), ((0, 1), (2, 3)))
    hidden = Photos(("b",), torch.full((1, 3), 50.0), torch.full((1, 4), 50.0), ((0,),), ((0,),))
    latents = torch.randn(4, 6)
    batches = [LatentTask(latents, photos, 64, 0.0, 0, 0.0, hidden, 0.0).batch(number) for number in range(50)]
    faces, clean = (
        torch.cat([batch["face"][:, 0] for batch in batches]),
        torch.cat([batch["clean"] for batch in batches]),
    )
    picture = torch.cdist(clean, latents).argmin(1)
    plain = faces[:, 0] < 25
    assert torch.equal(faces[plain], photos.face[picture[plain]])
    assert set(picture[~plain].tolist()) == {2, 3}  # those of the person under the hat


def config(out: Path) -> GeneratorConfig:
    debug = PRESETS["debug"]
    stage = replace(debug.two_stage, hidden_photos=2, condition_noise=0.1)
    return replace(debug, out=out, encoders=Encoders(), two_stage=stage, own_latents=OwnLatents(model=debug.model))


def test_a_diffusion_over_own_latents_leaves_the_generator_and_a_killed_training_ends_with_the_same_bytes(
    tmp_path, monkeypatch
):
    whole = fitting.fit(config(tmp_path / "whole"), progress=False)
    losses, calls = LatentTask.loss, []

    def dies(self, model, batch):
        calls.append(1)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return losses(self, model, batch)

    monkeypatch.setattr(LatentTask, "loss", dies)
    with pytest.raises(KeyboardInterrupt):
        fitting.fit(config(tmp_path / "killed"), progress=False)
    monkeypatch.undo()
    again = fitting.fit(config(tmp_path / "killed"), progress=False)
    assert (tmp_path / "whole" / POSSIBLE).read_bytes() == (tmp_path / "killed" / POSSIBLE).read_bytes()
    assert again.digest == whole.digest and whole.possible is not None
    rng = np.random.default_rng(0)
    features = whole.features([world.render(world.sample_identity(rng), world.sample_scene(rng))])
    three = whole.possible.latents(features, range(3), steps=4)
    alone = whole.possible.latents(features, [2], steps=4)[0]
    torch.testing.assert_close(alone, three[2])  # whichever others are asked for
    assert not torch.equal(three[0], three[1])
    assert whole.possible.latents(None, [0], steps=4).shape == (1, 8)
    large, whole.possible = whole.possible, replace(whole.possible, model=replace(whole.possible.model, int8=True))
    whole.save(tmp_path / "small")
    small = load_generator(tmp_path / "small").possible
    assert small is not None
    torch.testing.assert_close(small.latents(features, range(3), steps=4), three, rtol=0.05, atol=0.05)
    weight = large.network.transformer.state_dict()
    for name, value in small.network.transformer.state_dict().items():  # half a step of its row at most
        step = weight[name].abs().amax(tuple(range(1, value.ndim)), keepdim=True) / 127 if value.ndim > 1 else 1e-3
        assert ((value - weight[name]).abs() <= 0.51 * step + 1e-3 * weight[name].abs() + 1e-6).all()
    sizes = [(tmp_path / name / POSSIBLE).stat().st_size for name in ("whole", "small")]
    assert sizes[1] < 0.8 * sizes[0]
    own = replace(
        config(tmp_path / "of"),
        end_to_end=None,
        own_latents=OwnLatents(str(tmp_path / "whole"), _people(), PRESETS["debug"].model),
    )
    onto = fitting.fit(own, progress=False)
    assert onto.digest == whole.digest and onto.possible is not None  # the generator stays, bit for bit
    rewrite(tmp_path / "of" / POSSIBLE, b"no tensors")
    with pytest.raises(DataError, match="preset seeds"):
        load_generator(tmp_path / "of")
    (tmp_path / "of" / POSSIBLE).write_bytes((SHIPPED / POSSIBLE).read_bytes())
    with pytest.raises(DataError, match=r"another generator|damaged"):
        load_generator(tmp_path / "of")


def _people() -> Subjects:
    return Subjects(people=6, held_out=0, pictures=2, same_scenes=False, people_seed=1)


def test_own_latents_are_of_one_generator():
    with pytest.raises(ConfigError, match="left out after an end-to-end"):
        GeneratorConfig(own_latents=OwnLatents("shipped"))
    with pytest.raises(ConfigError, match="names a generator"):
        GeneratorConfig(end_to_end=None, own_latents=OwnLatents())
