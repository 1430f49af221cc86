"""Caption dropout, and the base's own answers kept without class pictures."""

from dataclasses import replace

import pytest
import torch

import smidgen
from smidgen.bases.families import load_base
from smidgen.bases.protocol import Prompts
from smidgen.errors import ConfigError
from smidgen.tasks.data.images import bind, of_class, read_folder
from smidgen.tasks.diffusion.task import PersonalizeTask, encode_examples, swapped
from smidgen.tasks.personalize.recipe import personalize
from smidgen.tasks.personalize.settings import PRESETS, Adapter, Data


def encoded(folder, pictures):
    base, found = load_base(str(folder)), read_folder(pictures)
    return base, encode_examples(base, found.pictures, bind(found.captions, "person", "sks"), 16), found


def test_a_dropped_caption_is_the_empty_prompt_and_follows_from_its_number(sdxl, pictures):
    base, subject, _ = encoded(sdxl, pictures)
    blank = base.encode_prompts([""])
    task = PersonalizeTask(subject, base, batch_size=2, blank=blank, dropout=0.4)
    plain, empty, share = PersonalizeTask(subject, base, batch_size=2), blank.tensors["embeds"][0], []
    for index in range(100):
        found, usual = task.batch(index), plain.batch(index)
        for row, embeds in enumerate(found["prompts"].tensors["embeds"]):
            share.append(torch.equal(embeds[: len(empty)], empty))  # longer captions are of several chunks
            assert share[-1] or torch.equal(embeds, usual["prompts"].tensors["embeds"][row])
        for kept in ("latents", "noise", "levels"):  # another stream: what else is drawn stays as it was
            assert torch.equal(found[kept], usual[kept])
        assert torch.equal(found["prompts"].tensors["time_ids"], usual["prompts"].tensors["time_ids"])
    assert 0.28 < sum(share) / len(share) < 0.52
    assert torch.equal(task.batch(7)["prompts"].tensors["embeds"], task.batch(7)["prompts"].tensors["embeds"])


@pytest.mark.parametrize("lengths", [(3, 5), (5, 3), (4, 4)])
def test_swapped_prompts_of_other_lengths_carry_their_masks(lengths):
    long, short = (
        Prompts({"embeds": torch.full((2, n, 1), float(n)), "mask": torch.ones(2, n, dtype=torch.bool)})
        for n in lengths
    )
    found = swapped(long, torch.tensor([False, True]), short[:1])
    assert found.tensors["mask"].sum(1).tolist() == list(lengths)
    assert found.tensors["embeds"].sum((1, 2)).tolist() == [n * n for n in lengths]


def _trained(base, task, steps=20):
    smidgen.adapt(base.model, "lora", target_modules=list(base.targets), r=4)
    optimizer = torch.optim.AdamW([p for p in base.model.parameters() if p.requires_grad], 2e-2)
    for index in range(steps):
        optimizer.zero_grad()
        task.loss(base.model, task.batch(index)).backward()
        optimizer.step()


def _moved(base, prompts):
    """How far the adapter moves the answer to ``prompts``."""
    g = torch.Generator().manual_seed(1)
    noisy = torch.randn(len(prompts), *base.latent_shape(16), generator=g)
    times = base.schedule.timesteps(torch.full((len(prompts),), 0.6))
    with torch.no_grad():
        said = base.predict(base.model, noisy, times, prompts)
        with smidgen.disabled(base.model):
            return float((said - base.predict(base.model, noisy, times, prompts)).norm())


def test_dropped_captions_train_the_empty_prompt(sd, pictures):
    """All of them dropped: to the bit what pictures without a caption train."""
    trained = []
    for way in ("dropped", "none"):
        base, subject, _ = encoded(sd, pictures)
        blank = base.encode_prompts([""])
        if way == "none":
            same = Prompts.join([blank, subject.prompts])[:1]  # as many chunks as the longest caption
            subject = replace(subject, prompts=same[[0] * len(subject)])
        dropout = 1.0 if way == "dropped" else 0.0
        _trained(base, PersonalizeTask(subject, base, batch_size=2, blank=blank, dropout=dropout), steps=3)
        trained.append([p for p in base.model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*trained, strict=True))


@pytest.mark.parametrize("kind", ["class", "blank"])
def test_preserved_prompts_keep_the_bases_answers(kind, sd, pictures):
    moved = {}
    for way in ("none", kind):
        base, subject, found = encoded(sd, pictures)
        captions = found.captions if kind == "class" else [""] * len(subject)
        kept = base.encode_prompts(captions)
        options = {} if way == "none" else {"preserved": kept, "preserved_weight": 4.0}
        _trained(base, PersonalizeTask(subject, base, batch_size=2, **options))
        moved[way] = _moved(base, kept)
    assert moved[kind] < 0.7 * moved["none"], moved


def test_the_preserved_rows_are_the_subjects_with_other_prompts(sd, pictures):
    base, subject, found = encoded(sd, pictures)
    kept = base.encode_prompts(found.captions)
    task = PersonalizeTask(subject, base, batch_size=2, preserved=kept, preserved_weight=0.5)
    batch = task.batch(3)
    for key in ("latents", "noise", "levels"):
        assert torch.equal(batch[key][:2], batch[key][2:])
    torch.testing.assert_close(batch["weights"], torch.tensor([0.5, 0.5, 0.25, 0.25]))
    smidgen.adapt(base.model, "lora", target_modules=list(base.targets))
    errors = task.errors(base.model, batch)  # at its start the adapter is the base: nothing to keep
    assert errors[:2].min() > 0 and errors[2:].abs().max() < 1e-10


@pytest.mark.parametrize("options, message", [
    ({"preservation": "class"}, r"a word of its own.*--placeholder-token sks"),
    ({"preservation": "blank", "caption_dropout": 0.1}, "take one of them"),
    ({"preservation": "klass"}, "must be one of 'class', 'blank'"),
])  # fmt: skip
def test_what_contradicts_itself_is_refused(options, message):
    from smidgen.training.settings import from_dict

    with pytest.raises(ConfigError, match=message):
        from_dict(Data, options)


def test_a_caption_that_is_also_kept_is_refused(sd, pictures, tmp_path):
    data = Data(pictures, preservation="class", class_prompt=read_folder(pictures).captions[0], train_batch_size=2)
    made = replace(PRESETS["debug"], base=str(sd), out=tmp_path / "out", data=data, adapter=Adapter("svfit"))
    with pytest.raises(ConfigError, match="which is also a caption of the subject"):
        personalize(made, progress=False)
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_captions_of_the_class():
    captions = ["a Person, smiling", "sks in the rain", "two (sks person) here", "a risks person"]
    bound = bind(captions, "person", "sks")
    assert bound == ["a sks Person, smiling", "sks in the rain", "two (sks person) here", "a risks sks person"]
    assert of_class(bound, "person", "sks") == [
        "a Person, smiling",
        "person in the rain",
        "two (person) here",
        "a risks person",
    ]
