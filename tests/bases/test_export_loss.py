"""``smidgen export`` of what is no LoRA: the file does what it says it does, through the program that reads it."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open

import smidgen
from smidgen.adapters.checkpoint.files import LORA_NAME
from smidgen.bases.families import load_base
from smidgen.bases.protocol import Sampling
from smidgen.bases.stable_diffusion import StableDiffusion
from smidgen.errors import ConfigError, SmidgenError
from smidgen.tasks import held_out
from smidgen.tasks.exporting import Cut, export_folder
from smidgen.tasks.held_out import noisy_latents
from tests.adapters.exported import moved
from tests.training import tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    return str(tiny.sd_folder(tmp_path_factory.mktemp("tiny") / "base"))


@pytest.fixture
def undrawn(monkeypatch):
    """Latents of nothing in the place of drawn ones, which take seconds."""

    def latents(base, prompts, seed, copies):
        shape = len(prompts) * copies, *base.latent_shape(base.resolution)
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    monkeypatch.setattr(held_out, "drawn_latents", latents)
    monkeypatch.setattr(held_out, "ROWS", 32)
    monkeypatch.setattr(held_out, "FEW", 16)


def adapter(base: str, folder: Path, method: str = "oft", text: bool = False) -> Path:
    """A saved adapter as after a training, on the UNet and, if ``text``, on the text encoder."""
    loaded = load_base(base)
    smidgen.adapt(loaded.pipe, method, target_modules=["to_q", "to_v", "conv1"])
    moved(loaded.pipe.unet)
    if text:
        smidgen.adapt(loaded.pipe.text_encoder, method, target_modules=["q_proj", "v_proj"])
        moved(loaded.pipe.text_encoder)
    return smidgen.save(loaded.pipe, folder)


def loss_in(path: Path) -> dict:
    with safe_open(path / LORA_NAME, "pt") as file:
        return json.loads(file.metadata()["smidgen"])["loss"]


@pytest.mark.parametrize("text", [False, True])
def test_what_it_prints_is_what_diffusers_does_on_other_inputs(base, text, tmp_path, monkeypatch):
    monkeypatch.setattr(held_out, "SCENES", 2)
    monkeypatch.setattr(held_out, "FEW_SCENES", 2)
    monkeypatch.setattr(StableDiffusion, "sampling", Sampling(3, 2.0))
    folder = adapter(base, tmp_path / "own", text=text)
    found, told = export_folder(folder, "diffusers", tmp_path / "lora", base, cut=Cut(rank="auto", max_loss=0.1))
    said = loss_in(tmp_path / "lora")
    assert 0.03 < said["end_to_end"] <= 0.1 and f"{said['end_to_end']:.3f} of the adapter's effect" in told
    low, high = said["interval"]
    assert low < said["end_to_end"] < high
    assert f"({low:.3f} to {high:.3f}), on 256 noisy latents of" in told
    assert said["weighted_by"] and said["judged_on"] and said["weight_error"]["worst_layer"] in told
    assert f"{found.layers} of {found.layers} layers" in told

    ours, fresh = load_base(base), load_base(base)
    smidgen.load(ours.pipe, folder)
    fresh.pipe.load_lora_weights(tmp_path / "lora")
    prompts = ["a red person", "a person in blue"]

    def answers(own):  # prompts are encoded here, by whatever is on the text encoder
        return torch.cat(noisy_latents(own, prompts, latents, 7).run())

    with torch.no_grad():
        latents = held_out.drawn_latents(ours, prompts, 7, 12)
        adapted, exported = answers(ours), answers(fresh)
        with smidgen.disabled(ours.pipe):
            plain = answers(ours)
    again = float((exported - adapted).norm() / (adapted - plain).norm())
    assert again == pytest.approx(said["end_to_end"], rel=0.35)  # few rows; 10 % is what the benchmark asks


def test_ranks_errors_and_calibration_are_as_asked(base, tmp_path, undrawn):
    folder = adapter(base, tmp_path / "own")
    run = lambda name, **cut: export_folder(folder, "diffusers", tmp_path / name, base, cut=Cut(**cut), allow_loss=True)  # noqa: E731
    run("rank", rank=2)
    run("plain", rank=2, calibration="none")
    run("error", max_error=0.3, calibration="none")
    (tmp_path / "pictures").mkdir()
    for number in range(2):
        Image.effect_noise((32, 32), 50).convert("RGB").save(tmp_path / "pictures" / f"{number}.png")
    run("pictures", rank=2, calibration=str(tmp_path / "pictures"))
    rank, plain, error, pictures = (loss_in(tmp_path / name) for name in ("rank", "plain", "error", "pictures"))
    assert rank["rank"] == plain["rank"] == 2 and error["rank"][0] < error["rank"][1]
    assert rank["activation_error"]["median"] < plain["activation_error"]["median"]
    assert plain["weight_error"]["median"] < rank["weight_error"]["median"] and "weighted_by" not in plain
    assert error["weight_error"]["worst"] <= 0.3 and "the pictures in pictures" in pictures["weighted_by"]


def test_refusals_leave_nothing(base, tmp_path, undrawn):
    folder = adapter(base, tmp_path / "own")
    with pytest.raises(SmidgenError, match=r"At rank 1 the export does \d+% .*--allow-loss"):
        export_folder(folder, "kohya", tmp_path / "lora", base, cut=Cut(rank=1))
    exact = adapter(base, tmp_path / "exact", "svfit")
    with pytest.raises(ConfigError, match="goes into a kohya file as it is, without loss: leave out --rank"):
        export_folder(exact, "kohya", tmp_path / "lora", base, cut=Cut(rank=4))
    with pytest.raises(ConfigError, match="full-diff file as it is, without loss: leave out --max-loss"):
        export_folder(folder, "full-diff", tmp_path / "lora", base, cut=Cut(max_loss=0.1))
    with pytest.raises(SmidgenError, match=r"nowhere"):
        export_folder(folder, "kohya", tmp_path / "lora", base, cut=Cut(calibration=str(tmp_path / "nowhere")))
    assert not (tmp_path / "lora").exists()
