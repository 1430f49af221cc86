"""What ships of the wide world: its judge, and people to learn from."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from smidgen.bases.embedded import EMBEDDED_WIDE, WIDE_FLOW, wide, wide_judge
from smidgen.bases.embedded.judge import as_tensor
from smidgen.bases.families import load_base
from smidgen.cli import main
from smidgen.difflora.adapted_pipeline import AdaptedPipeline
from smidgen.difflora.generator.generator import SHIPPED_FOR, load_generator

pytest.importorskip("diffusers")


def _drawn(count: int, split: wide.Split = "test") -> list[tuple[wide.Identity, wide.Scene]]:
    rng = np.random.default_rng(11)
    people = [wide.sample_identity(rng, split) for _ in range(count)]
    return [(person, wide.sample_scene(rng, person)) for person in people]


def test_what_ships_is_small_and_holds_no_pickle():
    for folder, most, kinds in (
        (wide_judge.FOLDER, 2_500_000, {".safetensors"}),
        (WIDE_FLOW, 10_000_000, {".safetensors", ".json", ".txt", ".md"}),
        (SHIPPED_FOR[EMBEDDED_WIDE], 10_000_000, {".safetensors", ".json", ".yaml", ".md"}),
    ):
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert files and sum(path.stat().st_size for path in files) <= most
        assert {path.suffix for path in files} == kinds


def test_the_base_draws_what_a_caption_asks():
    base, rng = load_base(EMBEDDED_WIDE), np.random.default_rng(5)
    scenes = [wide.sample_scene(rng) for _ in range(32)]
    prompts, negative = base.encode_prompts([wide.caption(scene) for scene in scenes]), base.encode_prompts([""])
    images = base.draw(prompts, range(32), negative=negative, **base.sampling._asdict())
    scores = wide_judge.load_wide_judge().caption_score(images, scenes)
    assert scores["mean"] > 0.87 and min(scores[name] for name in ("background", "framing", "light", "hat")) > 0.8
    assert base.unknown_words(["a person, in a red turban, in warm light"]) == []


def test_its_generator_draws_whoever_a_photo_shows():
    rng = np.random.default_rng(3)
    people = [wide.sample_identity(rng, "test") for _ in range(12)]
    plain = wide.Scene("open", "smile", "t-shirt", "white", "none", "sky blue")
    generator = load_generator(SHIPPED_FOR[EMBEDDED_WIDE])
    rows = torch.cat([generator.predict([wide.render(person, plain)]) for person in people])
    pipeline = AdaptedPipeline.load(EMBEDDED_WIDE, generator.layout)
    base = pipeline.base
    prompts, negative = base.encode_prompts([wide.caption(plain)] * len(people)), base.encode_prompts([""])
    sampling = {"negative": negative, "batch": len(people), **base.sampling._asdict()}
    owners = list(range(len(rows)))
    with torch.no_grad(), pipeline.banked() as bank, bank.holding(pipeline.layout.unpack(rows), owners, copies=True):
        drawn = base.decode(base.draw_latents(prompts, owners, **sampling))
    judge = wide_judge.load_wide_judge()
    scores = [[judge.identity_score([one], [wide.render(p, plain)]).item() for p in people] for one in drawn]
    right = np.mean([int(np.argmax(own)) == number for number, own in enumerate(scores)])
    assert right >= 0.75 and np.diag(scores).mean() > 0.8


def test_the_autoencoder_that_ships_keeps_free_colors_of_people():
    vae = load_base(EMBEDDED_WIDE).pipe.vae
    judge, drawn = wide_judge.load_wide_judge(), _drawn(40)
    pictures = as_tensor([wide.render(*pair) for pair in drawn])
    with torch.no_grad():
        again = vae.decode(vae.encode(pictures).latent_dist.mode()).sample.clamp(-1, 1)
    colors, k = judge.colors((again + 1) / 2)[0], wide.COLORS.index("skin")
    wanted = [wide.colors.lab(wide.color_of(person, "skin")) for person, _ in drawn]
    seen = [i for i, (person, scene) in enumerate(drawn) if wide.seen(person, scene)["skin"]]
    assert np.median([np.linalg.norm(colors[i, k].numpy() - wanted[i]) for i in seen]) < 8
    assert (-10 * ((again - pictures) / 2).square().mean((1, 2, 3)).log10()).mean() > 26


def test_its_judge_reads_colors_of_people_and_knows_them_again():
    judge, drawn = wide_judge.load_wide_judge(), _drawn(40)
    pictures = [wide.render(*pair) for pair in drawn]
    found, sigma = judge.colors(pictures)
    for name, most in (("skin", 4), ("background", 4), ("hair_color", 12)):
        k, errors = wide.COLORS.index(name), []
        for i, (person, scene) in enumerate(drawn):
            color = wide.color_of(person if hasattr(person, name) else scene, name)
            if wide.seen(person, scene)[name]:
                errors.append(np.linalg.norm(found[i, k].numpy() - wide.colors.lab(color)))
        assert np.mean(errors) < most, name
    hidden = [i for i, (person, scene) in enumerate(drawn) if not wide.seen(person, scene)["hair_color"]]
    assert (sigma[hidden, 0] > wide_judge.UNSURE).float().mean() > 0.4
    rng = np.random.default_rng(3)
    again = [wide.render(person, wide.sample_scene(rng, person)) for person, _ in drawn]
    alike = judge.embed(again) @ judge.embed(pictures).T
    assert (alike.diagonal()[:, None] > alike).float().mean() > 0.9  # by chance .5


def test_a_person_of_the_wide_world_is_drawn_to_learn_from(tmp_path):
    assert main(["subject", str(tmp_path / "person"), "--world", "wide", "--seed", "2", "--num-pictures", "3"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "person" / "metadata.jsonl").read_text().splitlines()]
    assert [row["file_name"] for row in rows] == ["000.png", "001.png", "002.png"]
    known = set(wide.vocabulary())
    assert all(word.strip(",") in known for row in rows for word in row["text"].split())
    assert {Image.open(tmp_path / "person" / row["file_name"]).size for row in rows} == {(64, 64)}
