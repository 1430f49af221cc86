"""The whole path, from folders of people to an adapter of a new one, on tiny SD 1.5 and SDXL pipelines."""

import gc
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from damage import rewrite
from PIL import Image
from torch import Tensor

import smidgen
from smidgen.bases.families import load_base
from smidgen.difflora.adapted_pipeline import AdaptedPipeline
from smidgen.difflora.generator import encoders, people, shards
from smidgen.difflora.generator import fit as fitting
from smidgen.difflora.generator.generator import load_generator
from smidgen.difflora.generator.settings import PRESETS, Encoders, TwoStage
from smidgen.difflora.weightspace.layout import write_adapter
from smidgen.difflora.weightspace.pca import PCA
from smidgen.difflora.zoo.build import build
from smidgen.difflora.zoo.settings import PRESETS as ZOOS
from smidgen.difflora.zoo.settings import Subjects, adapter_config
from smidgen.difflora.zoo.store import Zoo, ZooRows
from smidgen.difflora.zoo.subjects import read_subjects
from smidgen.errors import ConfigError
from smidgen.tasks.data.images import load_picture, to_tensor
from tests.difflora import helpers, onnx_faces
from tests.difflora.test_encoders import dinov2_model, written
from tests.training import tiny

PRECISION = {"sd": "no", "sdxl": "bf16"}


@pytest.fixture(scope="module")
def eyes(tmp_path_factory) -> Encoders:
    folder = tmp_path_factory.mktemp("eyes")
    face = onnx_faces.recogniser(folder / "face.onnx")
    return Encoders(face=f"arcface:{face},aligned", image=f"dinov2:{written(dinov2_model(), folder / 'dino')}")


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def made(request, tmp_path_factory, people, eyes) -> SimpleNamespace:
    """A zoo, and a generator trained on it and then end to end."""
    family, root = request.param, tmp_path_factory.mktemp(request.param)
    base = str(getattr(tiny, f"{family}_folder")(root / "base"))
    who = Subjects(folder=people, held_out_share=0.3, consent="signed", licence="own pictures")
    plain = ZOOS["debug"]
    adapter = replace(plain.adapter, rank=2, learning_rate=1e-2)
    train = replace(plain.train, mixed_precision=PRECISION[family])
    zoo = replace(plain, subjects=who, adapter=adapter, train=train, base=base, out=root / "zoo")
    build(zoo, progress=False)
    debug = PRESETS["debug"]
    loop = replace(debug.end_to_end.train, mixed_precision=PRECISION[family])
    config = replace(
        debug, base=base, adapter=adapter, encoders=eyes, out=root / "generator",
        two_stage=replace(debug.two_stage, zoo=root / "zoo"),
        end_to_end=replace(debug.end_to_end, people=who, gradient_checkpointing=True, train=loop),
    )  # fmt: skip
    fitting.fit(config, progress=False)
    return SimpleNamespace(family=family, root=root, base=base, zoo=zoo, config=config)


# ---- from folders to an adapter --------------------------------------------------------------------------------------


def test_folders_of_people_become_a_zoo_whose_bytes_do_not_depend_on_checkpointing(made, tmp_path):
    zoo = Zoo(made.zoo.out)
    assert len(zoo.records()) == 5 and len(zoo.rows("train")) >= 2
    assert {person.consent for person in read_subjects(zoo.folder)} == {"signed"}
    build(replace(made.zoo, gradient_checkpointing=True, out=tmp_path), progress=False)
    assert Zoo(tmp_path).digest() == zoo.digest()


def test_a_photo_becomes_an_adapter_folder_that_draws_like_the_predicted_row(made, people, tmp_path):
    generator = load_generator(made.config.out)
    photo = Image.open(people / "ann" / "0.png")
    rows = generator.predict([photo], seeds=(0, 1))
    assert rows.shape == (2, generator.layout.size) and rows.dtype == torch.float32 and rows.isfinite().all()
    other = generator.predict([Image.open(people / "eve" / "2.png")])
    assert not torch.equal(rows[:1], other)
    base = load_base(made.base, PRECISION[made.family])
    inputs = unet_inputs(made.family, base.model.dtype)
    before = base.model(**inputs)[0]
    folder = write_adapter(generator.layout, rows[0], base.model, tmp_path / "adapter")
    assert torch.equal(base.model(**inputs)[0], before)
    adapted = pipeline(made)
    with torch.no_grad(), adapted.bank(["x"]).holding(generator.layout.unpack(rows[:1]), rows=[0]):
        wanted = adapted.model(**inputs)[0]
    smidgen.load(base.model, folder, "ann")
    found = base.model(**inputs)[0]
    tolerance = {"atol": 2e-2, "rtol": 2e-2} if made.family == "sdxl" else {}
    torch.testing.assert_close(found, wanted, **tolerance)
    assert not torch.allclose(found, before, atol=1e-4)


def unet_inputs(family, dtype):
    width, noise = {"sd": 16, "sdxl": 32}[family], torch.Generator().manual_seed(0)
    inputs = {"sample": torch.randn(1, 4, 8, 8, generator=noise).to(dtype), "timestep": torch.tensor([500])}
    inputs["encoder_hidden_states"] = torch.randn(1, 16, width, generator=noise).to(dtype)
    if family == "sdxl":
        known = {"text_embeds": torch.randn(1, 16, generator=noise).to(dtype), "time_ids": torch.full((1, 6), 16.0)}
        inputs["added_cond_kwargs"] = known
    return inputs | {"return_dict": False}


def pipeline(made) -> AdaptedPipeline:
    return AdaptedPipeline.load(made.base, adapter_config(made.zoo), made.zoo.train.mixed_precision)


def test_trained_numbers_stay_in_fp32_on_a_base_in_16_bits(made):
    adapted = pipeline(made)
    assert adapted.base.model.dtype == (torch.bfloat16 if made.family == "sdxl" else torch.float32)
    assert {p.dtype for p in adapted.bank(["x"]).parameters()} == {torch.float32}


# ---- the end-to-end stage --------------------------------------------------------------------------------------------


def captured(made, monkeypatch, tmp_path, **stage):
    """Task and model of the end-to-end stage, from nothing."""
    held = {}

    def instead(task, model, *_, **__):
        held.update(task=task, model=model)
        raise InterruptedError

    monkeypatch.setattr(fitting, "train", instead)
    loop = replace(made.config.end_to_end.train, mixed_precision="no")
    config = replace(
        made.config, out=tmp_path, two_stage=TwoStage(),
        end_to_end=replace(made.config.end_to_end, train=loop, pictures=2, **stage),
    )  # fmt: skip
    with pytest.raises(InterruptedError):
        fitting.fit(config, progress=False)
    return held["task"], held["model"]


def test_gradient_checkpointing_changes_memory_and_nothing_else(made, monkeypatch, tmp_path):
    found = {}
    for checkpointing in (False, True):
        task, model = captured(made, monkeypatch, tmp_path, gradient_checkpointing=checkpointing)
        kept = [0]

        def pack(tensor: Tensor, kept=kept) -> Tensor:
            kept[0] += tensor.numel()
            return tensor

        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = task.loss(model, task.batch(0))
        loss.backward()
        task.release()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found[checkpointing] = (loss.detach(), gradients, kept[0])
    (plain, wanted, much), (loss, gradients, little) = found[False], found[True]
    torch.testing.assert_close(loss, plain)
    assert gradients.keys() == wanted.keys() and any(g.abs().max() > 0 for g in wanted.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], msg=name)
    assert little < 0.7 * much


def test_batches_hold_what_the_family_s_unet_needs(made, monkeypatch, tmp_path):
    task, _ = captured(made, monkeypatch, tmp_path)
    batch = task.batch(3)
    rows = task.config.batch_size * task.config.pictures
    assert batch["latents"].shape == (rows, 4, 8, 8) and len(batch["prompts"]) == rows
    shapes = {name: tuple(value.shape[1:]) for name, value in batch["prompts"].tensors.items()}
    assert shapes == (
        {"embeds": (32, 32), "pooled": (16,)} if made.family == "sdxl" else {"embeds": (32, 16)}
    )  # 2 chunks


def test_a_zoo_in_another_precision_is_refused_with_what_to_set(made):
    wrong = "no" if made.family == "sdxl" else "bf16"
    stage = replace(made.config.end_to_end, train=replace(made.config.end_to_end.train, mixed_precision=wrong))
    with pytest.raises(ConfigError, match=f"Set end_to_end.train.mixed_precision to '{PRECISION[made.family]}'"):
        fitting.fit(replace(made.config, end_to_end=stage), progress=False)


# ---- what is in memory -----------------------------------------------------------------------------------------------


def test_encoded_people_stream_and_go_on_after_a_kill(made, eyes, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "ROWS", 4)
    base, (face, image) = load_base(made.base), (encoders.load(eyes.face), encoders.load(eyes.image))
    who = made.zoo.subjects
    calls = []

    class Killed:
        name, width = image.name, image.width

        def encode(self, pictures):
            calls.append(len(pictures))
            if len(calls) == 2:
                raise KeyboardInterrupt
            return image.encode(pictures)

    with pytest.raises(KeyboardInterrupt):
        people.people_of(tmp_path, who, base, face, Killed(), progress=False)
    folder = tmp_path / people.ENCODED
    first = folder / "pictures-00000.safetensors"
    assert [path.name for path in folder.iterdir()] == [first.name]
    written_at = first.stat().st_mtime_ns
    photos, encoded = people.people_of(tmp_path, who, base, face, image, progress=False)
    assert first.stat().st_mtime_ns == written_at
    kept = [person for person in read_subjects(tmp_path) if person.split == "train"]
    pictures = [load_picture(path, base.resolution) for person in kept for path in person.pictures]
    captions = [caption for person in kept for caption in person.captions]
    assert len(encoded) == len(pictures) > 8 and not isinstance(encoded.mean, Tensor)
    mean, std = base.encode_images(to_tensor(pictures))
    prompts = base.encode_prompts(captions)
    picks, noise = [len(pictures) - 1, 0, 5, 5], torch.Generator().manual_seed(0)
    drawn = torch.randn(mean[picks].shape, generator=torch.Generator().manual_seed(0))
    batch = encoded.rows(picks, noise)
    torch.testing.assert_close(batch["latents"], mean[picks] + std[picks] * drawn, atol=1e-5, rtol=1e-4)
    assert batch["prompts"].tensors.keys() == prompts.tensors.keys()
    for name, value in prompts.tensors.items():
        torch.testing.assert_close(batch["prompts"].tensors[name], value[picks], atol=1e-5, rtol=1e-4)
    assert batch["names"][0] == f"{kept[-1].id} picture 2"
    torch.testing.assert_close(photos.image, image.encode(pictures), atol=1e-5, rtol=1e-4)
    # captions are encoded once each, another VAE is noticed, and what no longer belongs goes
    assert people.encoded_shards(tmp_path, kept, base, face, image)[1].count == len(set(captions)) < len(captions)
    with torch.no_grad():
        next(base.pipe.vae.parameters()).add_(0.1)
    seen, said = people.encoded_shards(tmp_path, kept, base, face, image)
    assert seen.missing() == len(pictures) and said.missing() == 0
    seen.fill(lambda places: {"mean": torch.zeros(len(places), 1)})
    assert seen.missing() == 0 and len(list(folder.glob("pictures-*"))) == -(-len(pictures) // 4)


def test_a_damaged_shard_is_named(tmp_path):
    kept = shards.Shards(tmp_path, "x", 1, count=3)
    kept.fill(lambda places: {"v": torch.arange(3.0)[places.start : places.stop]})
    assert kept.column("v", [2, 2, 0])[[0, 2]].tolist() == [2.0, 0.0]
    rewrite(kept.path(0), kept.path(0).read_bytes()[:-4])
    with pytest.raises(smidgen.errors.SmidgenError, match=r"x-00000.safetensors cannot be read"):
        kept.whole("v")
    kept.fill(lambda places: {"v": torch.ones(len(places))})
    assert kept.whole("v").tolist() == [1.0, 1.0, 1.0]


def test_two_stages_take_a_block_of_rows_at_a_time(made, tmp_path, monkeypatch):
    taken = []

    def counted(self, indices, take=ZooRows.take):
        taken.append(len(indices))
        return take(self, indices)

    monkeypatch.setattr(ZooRows, "take", counted)
    monkeypatch.setattr("smidgen.difflora.generator.two_stage.ROWS", 1)
    fitting.fit(replace(made.config, out=tmp_path, end_to_end=None), progress=False)
    assert max(taken) == 1 < len(taken)


def test_pca_holds_few_rows_of_a_zoo(tmp_path, monkeypatch):
    """Five blocks at most, whatever the number of rows."""
    zoo = helpers.zoo(tmp_path / "zoo", groups=16, size=2)
    alive, most = [0], [0]

    def counted(self, lines, read=Zoo.read):
        rows = read(self, lines)
        alive[0] += len(rows)
        most[0] = max(most[0], alive[0])
        weakref.finalize(rows, gone, len(rows))
        return rows

    def gone(number):
        alive[0] -= number

    monkeypatch.setattr(Zoo, "read", counted)
    rows = zoo.rows("train")
    assert isinstance(rows, ZooRows) and len(rows) == 32
    codec = PCA(zoo.layout, components=4, block=4)
    codec._fit(rows, None, False)
    assert 4 < most[0] <= 5 * 4
    gc.collect()
    assert alive[0] == 0
    monkeypatch.setattr("smidgen.difflora.weightspace.pca.NUMBERS", 2 * zoo.layout.size)
    most[0], wide = 0, PCA(zoo.layout, components=4)
    wide._fit(rows, None, False)
    assert most[0] <= 5 * 2  # whatever ``block`` says
    torch.testing.assert_close(wide.basis.abs(), codec.basis.abs(), atol=1e-4, rtol=1e-4)
