"""`smidgen export` from the command line: what it says, what it refuses, and that it leaves nothing then."""

import typing

import pytest

import smidgen
from smidgen.adapters.checkpoint.formats import FORMATS
from smidgen.adapters.export import Exported
from smidgen.bases.embedded import embedded_base
from smidgen.bases.families import load_base
from smidgen.cli import main, using
from smidgen.tasks import exporting
from tests.adapters.exported import moved


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder, pipe = tmp_path_factory.mktemp("adapter") / "ann", load_base("embedded").pipe
    smidgen.adapt(pipe, "svfit", r=8, target_modules=["to_q", "to_v"])
    moved(pipe.unet)
    return smidgen.save(pipe, folder)


def test_the_command_knows_all_formats():
    assert list(typing.get_args(typing.get_type_hints(using.export)["to"])) == list(FORMATS)


@pytest.mark.parametrize(
    "written, words",
    [(80, "became 80 bytes. Keep"), (103, "about as much"), (130, "30% more"), (290, "3 times as much")],
)
def test_it_says_what_leaving_the_small_file_costs(written, words, tmp_path):
    assert words in exporting._cost(100, Exported("kohya", tmp_path, {"a": written}, 1), tmp_path)


def test_it_says_how_many_layers_and_what_it_costs(adapter, tmp_path, capsys):
    words = ["export", str(adapter), "--to", "kohya", "--base", "embedded", "--out", str(tmp_path / "ann.safetensors")]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "ann.safetensors, 28 of 28 layers" in said and f"Keep {adapter}" in said and "times as much" in said
    assert [path.name for path in tmp_path.iterdir()] == ["ann.safetensors"]
    assert main(words) == 2 and "is there already; give another --out, or --overwrite" in capsys.readouterr().err
    assert main([*words, "--overwrite", "--strength", "0.5"]) == 0


def test_what_cannot_be_is_a_sentence(adapter, tmp_path, capsys):
    words = ["export", str(adapter), "--base", "embedded", "--out", str(tmp_path / "out"), "--to"]
    assert main([*words, "peft-oft"]) == 2
    assert "is no rotation alone; --to merged or full-diff" in capsys.readouterr().err
    assert main([*words, "gguf"]) == 2 and "is of no language model" in capsys.readouterr().err
    assert main([*words, "onnx"]) == 2 and "onnx" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_merged_pipeline_does_not_tell_where_its_base_lay(adapter, tmp_path, capsys):
    assert main(["export", str(adapter), "--to", "merged", "--base", "embedded", "--out", str(tmp_path / "whole")]) == 0
    assert "28 of 28 layers" in capsys.readouterr().out
    written = [*(tmp_path / "whole").rglob("*.json")]
    assert written and not any(str(embedded_base().parent) in file.read_text() for file in written)
