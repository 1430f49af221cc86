"""Whatever is refused is one line and leaves nothing where its results would have gone: over the whole table of commands."""

import pytest

from smidgen import cli
from tests.test_extras import COMMANDS
from tests.training import tiny

NOWHERE = ["--target-modules", "nowhere"]
CANNY = ["--control", "canny", "--num-held-out", "1"]
PHOTO = "pictures/0.png"
REFUSED = {  # what is refused late: when the base is there, or is looked for
    "personalize": [["pictures", "--base", "sd", *NOWHERE], ["pictures", "--base", "embeded"]],
    "train control": [["pictures", *CANNY, "--base", "sd", *NOWHERE], ["pictures", *CANNY, "--base", "embeded"]],
    "train text-classification": [["--preset", "debug", *NOWHERE], ["--preset", "debug", "--model", "nowhere"]],
    "train image-classification": [["--preset", "debug", *NOWHERE], ["--preset", "debug", "--model", "nowhere"]],
    "train instruction": [["--preset", "debug", *NOWHERE], ["--preset", "debug", "--model", "nowhere"]],
    "zoo build": [["--preset", "debug", *NOWHERE], ["--preset", "debug", "--base", "embeded"]],
    "zoo import": [["pictures"], ["pictures", "--base", "embeded"]],
    "generator train": [["--adapter.target-modules", "nowhere"], ["--base", "embeded"]],
    "predict": [[PHOTO, "--base", "embeded"], ["nobody.png"]],
    "load": [["nowhere.recipe"], [PHOTO]],
    "edit": [[PHOTO, "--set", "skin=dark:1", "--base", "embeded"], [PHOTO, "--set", "skin=darkk:1"]],
    "blend": [[PHOTO, PHOTO, "--base", "embeded"], [PHOTO, "nobody.png"]],
    "invert": [[PHOTO, "--base", "embeded"], ["nobody.png"]],
    "sample": [["--base", "embeded"], ["--seeds", "x"]],
    "generate": [["nowhere", "--prompt", "a"], ["nowhere", "--prompt", "a", "--base", "embeded"]],
    "classify": [["nowhere", "a text"]],
    "merge": [["nowhere"]],
    "export": [["nowhere", "--to", "peft"]],
    "extract": [["debug-text", "nowhere"], ["debug-text", "debug-text"]],
    "compare": [["nowhere"], ["debug", "--only", "nothing"]],
    "subject": [["--num-pictures", "0"]],
    "pairs": [["--num-pictures", "1"]],
}
READ_ONLY = {
    "zoo status",
    "zoo evaluate",
    "generator directions",
    "generator calibrate",
}  # they take a folder that is there
READ_ONLY |= {"serve", "ui"}  # and so do these, whose refusals have tests of their own


@pytest.fixture(scope="module")
def place(sd, tmp_path_factory):
    folder = tmp_path_factory.mktemp("refused")
    (folder / "sd").symlink_to(sd)
    tiny.pictures(folder / "pictures")
    return folder


def test_every_command_that_writes_is_in_the_table() -> None:
    assert set(REFUSED) == {name for name, (words, _) in COMMANDS.items() if "OUT" in words} - READ_ONLY


@pytest.mark.parametrize("name, words", [(name, words) for name, cases in REFUSED.items() for words in cases])
def test_a_refusal_leaves_nothing(name, words, place, monkeypatch, capsys) -> None:
    monkeypatch.chdir(place)
    before = sorted(place.iterdir())
    positional = COMMANDS[name][0][0] == "OUT"
    assert (
        cli.main([*name.split(), *(["OUT"] if positional else []), *words, *([] if positional else ["--out", "OUT"])])
        == 2
    )
    said = capsys.readouterr().err
    assert "\nsmidgen: " in f"\n{said}" and "Traceback" not in said
    assert sorted(place.iterdir()) == before, said


def test_a_refused_resume_leaves_the_earlier_run_as_it_was(tmp_path, capsys) -> None:
    words = ["train", "text-classification", "--preset", "debug", "--out", str(tmp_path / "out")]
    assert cli.main(words) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert cli.main([*words, "--resume-from-checkpoint", "latest", "--seed", "1"]) == 2
    assert "seed" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before
