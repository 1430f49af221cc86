"""What ``inspect`` says of files, ours and others': layers, norms, a plot, and where they go without loss."""

import pytest
import torch

import smidgen
from smidgen.errors import AdapterFileError, ConfigError
from smidgen.tasks.drawing import inspect
from tests.adapters.helpers import trained


@pytest.mark.parametrize(
    "method, formats",
    [("svfit", "peft, diffusers, kohya"), ("oft", "peft-oft, full-diff"), ("tlora", "full-diff, merged")],
)
def test_ours(method, formats, tmp_path):
    folder = smidgen.save(trained(method), tmp_path / "a")
    (folder / "config.yaml").write_text("train: {max_train_steps: 60}\n")
    said = inspect(folder, tmp_path / "norms.png")
    assert "Trained with (config.yaml):\n  train: {max_train_steps: 60}" in said
    assert "Norm of the trained numbers by layer" in said and said.count("layers.1.v_proj #") == 1
    assert f"Exported without loss to: {formats}" in said
    assert (tmp_path / "norms.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match=r"writes a \.png"):
        inspect(folder, tmp_path / "norms.pdf")


def test_formats_that_hold_no_heads_are_not_named_for_a_classifier(tmp_path):
    model = trained("svfit", modules_to_save=["head"])
    assert "Exported without loss to: peft, merged (smidgen export)." in inspect(smidgen.save(model, tmp_path / "a"))


def test_the_norm_of_a_lora_is_that_of_its_update(tmp_path):
    from smidgen.adapters.tuner.carried import adapted_layers

    model = trained("lora", r=2, alpha=4)
    said = inspect(smidgen.save(model, tmp_path / "a"))
    for name, layer in adapted_layers(model).items():
        line = next(line for line in said.splitlines() if line.startswith(f"  {name} ") and "#" in line)
        assert float(line.split()[-1]) == pytest.approx(float(layer.delta_matrix("default").norm()), rel=5e-3)


def test_other_programs_files(tmp_path):
    from safetensors.torch import save_file

    a, b = torch.randn(2, 6), torch.randn(5, 2)
    for kind, keys in {
        "kohya's": ("lora_unet_mid_to_q.lora_down.weight", "lora_unet_mid_to_q.lora_up.weight"),
        "diffusers'": ("unet.mid.to_q.lora_A.weight", "unet.mid.to_q.lora_B.weight"),
    }.items():
        save_file({keys[0]: a, keys[1]: b}, tmp_path / "file.safetensors")
        said = inspect(tmp_path / "file.safetensors")
        assert f"a LoRA with {kind} keys, 22 stored numbers" in said and "1 layers, rank 2" in said
        assert float(said.split()[-1]) == pytest.approx(float((b @ a).norm()), rel=5e-3)
    save_file({}, tmp_path / "file.safetensors")
    with pytest.raises(AdapterFileError, match="holds no tensors"):
        inspect(tmp_path / "file.safetensors")
