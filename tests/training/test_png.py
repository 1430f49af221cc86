"""The one writer of pictures: what Smidgen drew says so, and how; what it drew to train on does not."""

import ast
import hashlib
import json
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import smidgen
from smidgen.errors import DataError
from smidgen.tasks.contact_sheet import loss_plot
from smidgen.tasks.png import about_adapter, is_ours, read_facts, write_figure, write_png, written_by_smidgen

FACTS = {
    "prompt": "a person, smiling\nin the rain",
    "negative_prompt": "hat",
    "seed": 7,
    "steps": 8,
    "guidance": 1.5,
    "base": "some/base, with a comma",
    "adapter": {"name": "me", "method": "svfit", "fingerprint": "0123456789ab"},
}


def test_a_drawn_picture_says_how_it_was_made(tmp_path):
    path = write_png(Image.new("RGB", (6, 4)), tmp_path / "a.png", FACTS)
    assert written_by_smidgen(path) and not written_by_smidgen(tmp_path)
    with Image.open(path) as image:
        assert is_ours(image) and image.info["Software"] == f"smidgen {smidgen.__version__}"
        words = image.info["parameters"].splitlines()
    facts = read_facts(path)
    assert FACTS.items() <= facts.items() and facts["size"] == "6x4"
    assert facts["versions"].keys() >= {"smidgen", "torch", "peft", "diffusers"}
    assert words[:3] == ["a person, smiling", "in the rain", "Negative prompt: hat"]
    assert words[3] == (
        'Steps: 8, CFG scale: 1.5, Seed: 7, Size: 6x4, Model: "some/base, with a comma", '
        f'Lora hashes: "me: 0123456789ab", Version: smidgen {smidgen.__version__}'
    )


@pytest.mark.parametrize("prompt", ["größer 人 🙂", "half \udce9 a name", "nul\0nul", "", 'say "hi", twice: \\'])
def test_any_prompt_can_be_written_and_read(tmp_path, prompt):
    path = write_png(Image.new("L", (3, 3)), tmp_path / "a.png", {"prompt": prompt, "seed": 2**64})
    facts = read_facts(path)
    assert facts["prompt"] == prompt and facts["seed"] == 2**64


def test_a_picture_that_is_not_ours_says_so(tmp_path):
    Image.new("RGB", (3, 3)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="does not say how it was made"):
        read_facts(tmp_path / "a.png")


def test_figures_and_sheets_are_ours_too(tmp_path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1, 1))
    figure.subplots().plot([1, 2])
    assert read_facts(write_figure(figure, tmp_path / "b.png", {"shows": "a line"}))["shows"] == "a line"
    assert read_facts(loss_plot({"svfit": [1.0, 0.5]}, tmp_path / "loss.png"))["runs"] == ["svfit"]


def test_other_tools_pictures_are_not_ours(tmp_path):
    for number, text in enumerate(
        [{}, {"Software": "Adobe ImageReady"}, {"parameters": "a cat", "Software": "smidgens"}]
    ):
        chunks = PngInfo()
        for key, value in text.items():
            chunks.add_text(key, value)
        path = tmp_path / f"{number}.png"
        Image.new("L", (3, 3)).save(path, pnginfo=chunks)
        with Image.open(path) as image:
            assert not is_ours(image) and not written_by_smidgen(path)


@pytest.mark.parametrize("facts", ["{", "[1]", "[" * 100_000, "null"])
def test_facts_that_were_damaged_are_refused_in_words(tmp_path, facts):
    chunks = PngInfo()
    chunks.add_text("Software", "smidgen 9")
    chunks.add_text("smidgen", facts)
    Image.new("L", (3, 3)).save(tmp_path / "a.png", pnginfo=chunks)
    with pytest.raises(DataError, match="damaged"):
        read_facts(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n no")
    with pytest.raises(DataError, match="cannot be read as a picture"):
        read_facts(tmp_path / "b.png")


def test_an_adapter_is_named_with_the_hash_of_its_weights(tmp_path):
    folder = tmp_path / "me"
    folder.mkdir()
    assert about_adapter(folder, "probe") == {"name": "me", "method": "probe"}
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    digest = hashlib.sha256(b"weights").hexdigest()
    assert about_adapter(folder) == {"name": "me", "method": "LORA", "fingerprint": digest[:12]}


def test_nothing_else_writes_pictures():
    """Outside what draws data to train on, ``Image.save`` and ``print_png`` are called in one file."""
    root = Path(smidgen.__file__).parent
    data = {root / "bases" / "embedded" / "world.py", root / "tasks" / "control" / "pairs.py"}
    data |= {root / "difflora" / "use" / "calibration.py", root / "serving" / "page" / "pictures.py"}  # JPEGs in memory
    for path in root.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if path == root / "tasks" / "png.py" or "packaged" in path.parts or "PIL" not in text + "matplotlib":
            continue
        called = {
            node.func.attr
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        }
        assert not called & {"print_png", "savefig", "imwrite"}, path
        assert path in data or "save" not in called or "PIL" not in text or "safetensors" in text, path
