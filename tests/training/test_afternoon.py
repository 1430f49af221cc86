"""docs/afternoon.md, block by block: a table, an adapter, a model, and the same logits everywhere."""

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from smidgen import cli
from tests.docs.blocks import blocks_of

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "afternoon.md"
BLOCKS = [(block.kind, block.text) for block in blocks_of("docs/afternoon.md")]
FRESH = "AutoPeftModelForSequenceClassification"  # what must work in a process that has nothing of Smidgen's yet
NO_RECIPES = "\nimport sys\nassert not [name for name in sys.modules if name.startswith('smidgen.tasks')]\n"


def in_a_process(code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def here(kind: str, code: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        if kind == "python":
            exec(compile(code, str(PAGE), "exec"), {})
        else:
            assert cli.main(shlex.split(code)[1:]) == 0, code
    return out.getvalue()


def afternoon(model: str, all_alone: bool) -> list[str]:
    """What each block prints, in the folder one is in, on the base called ``model``; every one in a process of its own, or only
    the one that claims to need no more."""
    said = []
    for kind, block in BLOCKS:
        code = block.replace("minilm", model)
        if kind == "sh" and all_alone:
            code = f"import sys\nfrom smidgen import cli\nassert cli.main({shlex.split(code)[1:]!r}) == 0"
        alone = all_alone or FRESH in code
        said.append(in_a_process(code + (NO_RECIPES if FRESH in code else "")) if alone else here(kind, code))
    return said


def logits(said: str) -> torch.Tensor:
    """The last two numbers of the last two lines: [text, class]."""
    lines = said.strip().splitlines()[-2:]
    return torch.tensor(
        [[float(number) for number in re.findall(r"-?\d+\.\d+(?:e-?\d+)?", line)[-2:]] for line in lines]
    )


def check(said: list[str]) -> None:
    compared = [
        logits(text) for text, (_, block) in zip(said, BLOCKS, strict=True) if "logits" in block and "lovely" in block
    ]
    assert len(compared) == 4  # the command line, Python, peft, transformers
    for other in compared[1:]:
        torch.testing.assert_close(other, compared[0], atol=1e-5, rtol=0)
    assert compared[0][0].argmax() == 1 and compared[0][1].argmax() == 0  # bad, good
    assert len(Path("answers.csv").read_text().splitlines()) == 81


def test_the_afternoon_on_a_tiny_base(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    check(afternoon("debug-text", all_alone=False))


@pytest.mark.slow
def test_the_afternoon_as_it_stands(tmp_path, monkeypatch, users_cache) -> None:
    monkeypatch.chdir(tmp_path)
    check(afternoon("minilm", all_alone=True))
