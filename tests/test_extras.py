"""The engine alone, as the bare wheel installs it: every command works or names the extra that its user needs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from smidgen.cli import table
from smidgen.cli.extras import PACKAGES

# Words that each command takes, and the extras that it must name (none: it works, or says what else is wrong).
COMMANDS = {
    "train text-classification": (["texts.csv", "--model", "debug-text", "--out", "OUT"], "tasks"),
    "train image-classification": (["images", "--model", "debug-image", "--out", "OUT"], "tasks"),
    "train instruction": (["chat.jsonl", "--model", "debug-chat", "--out", "OUT"], "tasks"),
    "train control": (["images", "--out", "OUT"], "diffusion,control"),
    "personalize": (["images", "--out", "OUT"], "diffusion"),
    "subject": (["OUT"], "world"),
    "pairs": (["OUT", "--control", "canny"], "world"),
    "ui": (["--folder", "OUT"], "ui"),
    "generate": (["adapter", "--prompt", "a", "--out", "OUT"], "diffusion"),
    "verify": (["adapter"], None),
    "classify": (["adapter", "a text", "--out", "OUT"], "tasks"),
    "chat": (["adapter"], "tasks"),
    "merge": (["adapter", "--out", "OUT"], None),
    "serve": (["OUT"], "serve"),
    "keys add": (["keys.json", "ann"], None),
    "keys list": (["keys.json"], None),
    "keys remove": (["keys.json", "ann"], None),
    "export": (["adapter", "--to", "peft", "--out", "OUT"], None),
    "compare": (["debug", "--out", "OUT"], "tasks"),
    "predict": (["images/0.png", "--out", "OUT"], "diffusion"),
    "load": (["ann.recipe", "--out", "OUT"], "diffusion"),
    "edit": (["images/0.png", "--set", "skin=dark:1.0", "--out", "OUT"], "diffusion"),
    "blend": (["images/0.png", "images/1.png", "--out", "OUT"], "diffusion"),
    "invert": (["images/0.png", "--out", "OUT"], "diffusion"),
    "sample": (["--out", "OUT"], "diffusion"),
    "zoo build": (["--out", "OUT"], "diffusion,zoo"),
    "zoo status": (["OUT"], "zoo"),
    "zoo import": (["adapter", "--out", "OUT"], "diffusion,zoo"),
    "zoo evaluate": (["OUT"], "diffusion,zoo"),
    "zoo plan": ([], "diffusion"),
    "plan personalize": (["--base", "sd15"], "diffusion"),
    "generator train": (["--out", "OUT"], "diffusion,zoo"),
    "generator directions": (["OUT", "--people", "OUT"], "diffusion,zoo"),
    "generator calibrate": (["OUT", "--people", "OUT"], "diffusion,zoo"),
    "generator inspect": ([], None),
    "inspect": (["adapter"], None),
    "extract": (["minilm", "adapter", "--out", "OUT"], "tasks"),
    "resize": (["adapter", "--rank", "1", "--out", "SMALLER"], None),
    "combine": (["adapter", "adapter", "--out", "SUM"], None),
    "methods": ([], None),
    "count": (["svfit", "--architecture", "roberta-base"], None),
    "config": (["show", "--recipe", "text-classification"], None),
}
BY_ADAPTER = {"verify", "merge", "export"}  # what they need follows from the adapter, here one that draws
# What `pip install smidgen` does not bring; the path finder is what the import of a package and a look for it both ask.
BARE = """
import json, sys
from importlib.machinery import PathFinder
missing, calls = json.loads(sys.argv[1]), json.loads(sys.argv[2])
find = PathFinder.find_spec
PathFinder.find_spec = staticmethod(
    lambda name, *where: None if name.partition(".")[0] in missing else find(name, *where)
)
import contextlib, io, smidgen
from smidgen.cli import main
model = __import__("torch").nn.Sequential(__import__("torch").nn.Linear(4, 4))
smidgen.save(smidgen.adapt(model, "svfit", r=2, target_modules=["0"]), "adapter")
for name, words in calls:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main([*name.split(), *words])
        except SystemExit as stop:
            status = stop.code
        except BaseException as error:
            status = repr(error)
    print(json.dumps([name, status, out.getvalue(), err.getvalue()]), file=sys.__stdout__)
"""


Answers = dict[str, tuple[object, str, str]]  # status, stdout and stderr


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bare")
    (folder / "texts.csv").write_text("text,label\n" + "good,a\nbad,b\n" * 20)
    (folder / "chat.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 20)
    (folder / "images").mkdir()
    for number in range(4):
        Image.new("RGB", (64, 64), (60 * number, 0, 0)).save(folder / "images" / f"{number}.png")
        (folder / "images" / f"{number}.txt").write_text("a picture")
    return folder


@pytest.fixture(scope="module")
def answers(place: Path) -> Answers:
    """What each command, and its help, gives where no extra is installed."""
    calls = [(name, words) for name, (words, _) in COMMANDS.items()] + [(f"{name} --help", []) for name in COMMANDS]
    missing = {name for names in PACKAGES.values() for name in names} - {"psutil"} | {
        "onnxruntime",
        "onnx",
        "gguf",
        "rdata",
    }
    given = [json.dumps(sorted(missing)), json.dumps(calls)]
    done = subprocess.run([sys.executable, "-c", BARE, *given], cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {name: (status, out, err) for name, status, out, err in map(json.loads, done.stdout.splitlines())}


def test_every_command_is_in_the_table() -> None:
    assert set(COMMANDS) == set(table.COMMANDS)
    assert all(",".join(row.needs) == (COMMANDS[name][1] or "") for name, row in table.COMMANDS.items())


@pytest.mark.parametrize("name", COMMANDS)
def test_without_extras(name: str, answers: Answers, place: Path) -> None:
    status, out, err = answers[name]
    extra = COMMANDS[name][1]
    if name in BY_ADAPTER:
        assert status == 2 and len(err.strip().splitlines()) == 1, err or status
        assert err.endswith("pip install 'smidgen[diffusion]'\n")
    elif extra is None:
        assert status == 0 and out, err
    else:
        assert status == 2 and len(err.strip().splitlines()) == 1, err or status
        assert err.startswith(f"smidgen: `smidgen {name}` needs ") and err.endswith(f"pip install 'smidgen[{extra}]'\n")
    assert not (place / "OUT").exists()


@pytest.mark.parametrize("name", COMMANDS)
def test_help_without_extras(name: str, answers: Answers) -> None:
    status, out, err = answers[f"{name} --help"]
    assert status == 0 and f"smidgen {name}" in out, err or status
