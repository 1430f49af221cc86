"""What importing costs: nothing of torch before it is needed, and peft knows our adapters whichever is imported first."""

import subprocess
import sys

import pytest

import smidgen


def python(*words: str) -> str:
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("words", [
    ["--help"], ["--version"], ["train", "--help"], ["zoo", "--help"], ["generator", "--help"],
    ["generate", "--help"], ["verify", "--help"], ["count", "--help"], ["zoo", "status", "--help"], ["compare", "--help"],
])  # fmt: skip
def test_help_and_version_import_no_torch(words: list[str]) -> None:
    code = """
import contextlib, sys
from smidgen.cli import main
with contextlib.suppress(SystemExit):
    main(sys.argv[1:])
print(sorted({"torch", "peft", "numpy"} & {*sys.modules}))"""
    assert python("-c", code, *words).splitlines()[-1] == "[]"


def test_python_m_smidgen_is_the_command() -> None:
    assert python("-m", "smidgen", "--help").startswith("usage: smidgen COMMAND")


def test_a_command_prints_no_words_of_other_libraries() -> None:
    words = ["-m", "smidgen", "count", "svfit", "--architecture", "roberta-base"]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr


KNOWS = "from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING as table; assert 'SMIDGEN' in table"


@pytest.mark.parametrize("code", [
    f"import smidgen, importlib.util, sys; assert importlib.util.find_spec('peft'); assert 'torch' not in sys.modules; {KNOWS}",
    f"import peft, smidgen; {KNOWS}",
])  # fmt: skip
def test_peft_knows_the_adapters_whichever_comes_first(code: str) -> None:
    python("-c", code)


def test_every_public_name_is_there_and_listed() -> None:
    found = {}
    exec("from smidgen import *", found)
    assert set(smidgen.__all__) <= set(found) and set(smidgen.__all__) <= set(dir(smidgen))
    assert smidgen.verify is smidgen.adapters.verify.verify  # the function, whatever submodules were imported
    with pytest.raises(AttributeError, match="no attribute 'adopt'"):
        smidgen.adopt  # noqa: B018
