"""How commands end: one sentence and a status for every mistake, the right name for other tools' names, nothing left."""

import errno
import io
import os
import signal
import sys
import time

import pytest
import torch

import smidgen
from smidgen.adapters import atomic
from smidgen.cli import ends, main
from smidgen.errors import ConfigError, did_you_mean
from smidgen.tasks.personalize.settings import PersonalizeConfig
from smidgen.training.loop import LoopConfig
from smidgen.training.ranges import check_value
from smidgen.training.settings import from_dict, load_yaml


def refused(capsys, *words):
    """The one sentence of a refusal."""
    assert main([str(word) for word in words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("smidgen: "), lines
    return lines[0]


@pytest.mark.parametrize("words, said", [
    ("personalize x --lr 1e-4", "Did you mean --learning-rate?"),
    ("personalize x --epochs 3", "Did you mean --num-train-epochs or --max-train-steps (optimizer steps)?"),
    ("personalize x --num-epochs 3", "Did you mean --num-train-epochs or --max-train-steps (optimizer steps)?"),
    ("personalize x --steps 3", "Did you mean --max-train-steps or --inference-steps?"),
    ("personalize x --batch_size 3", "Did you mean --train-batch-size?"),
    ("train instruction x --lora-r=8", "Did you mean --rank?"),
    ("train instruction x --targets q", "Did you mean --target-modules?"),
    ("train instruction x --train.max-train-steps 3", "Did you mean --max-train-steps?"),
    ("invert x --out o --lr 1", "Did you mean --invert-rate?"),
    ("generate x --prompt a --cfg 3", "Did you mean --guidance?"),
    ("generate x --prompt a --rnak 3", "`generate` has no --rnak."),
    ("generator train --lr 3", "--end-to-end.learning-rate"),
    ("generator train --end-to-end.lr 3", "Did you mean --end-to-end.learning-rate?"),
])  # fmt: skip
def test_the_right_name_is_offered_on_the_command_line(capsys, words, said):
    assert said in refused(capsys, *words.split())


@pytest.mark.parametrize("text, said", [
    ("train: {lr: 1}", "Unknown key 'train.lr'"),
    ("adapter: {lr: 1}", "Did you mean 'learning_rate'?"),
    ("epochs: 3", "Did you mean 'data.num_train_epochs' or 'train.max_train_steps'?"),
    ("data: {batch_size: 3}", "Did you mean 'train_batch_size'?"),
    ("adapter: {lora_r: 3}", "Did you mean 'rank'?"),
    ("adapter: {targets: [q]}", "Did you mean 'target_modules'?"),
    ("adapter: {lora_alpha: 3}", "Did you mean 'alpha'?"),
])  # fmt: skip
def test_the_right_name_is_offered_for_config_files(tmp_path, text, said):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        load_yaml(PersonalizeConfig, tmp_path / "a.yaml")
    assert said in str(error.value)


@pytest.mark.parametrize("option, said", [
    ("rank", "Did you mean 'r' or 'transform_rank'?"), ("lora_r", "Did you mean 'r'?"), ("lora_alpha", "Did you mean 'alpha'?"),
    ("targets", "Did you mean 'target_modules'?"), ("lr", "It belongs to training"), ("epochs", "It belongs to training"),
    ("batch_size", "It belongs to training"), ("steps", "It belongs to training"),
])  # fmt: skip
def test_the_right_name_is_offered_in_python(option, said):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    for call in (
        lambda **options: smidgen.adapt(model, "lora", **options),
        lambda **options: smidgen.config("lora", **options),
    ):
        with pytest.raises(ConfigError) as error:
            call(**{option: 8})
        assert said.replace(" or 'transform_rank'", "") in str(error.value).replace(" or 'transform_rank'", "")


def test_other_names_that_are_known_themselves_are_not_offered():
    assert did_you_mean("steps", ["steps"]) == "" and "'r'" not in did_you_mean("lr", ["learning_rate", "r"])


@pytest.mark.parametrize("words, said", [
    ("personalize x --seed -1", "seed must be from 0"),
    ("personalize x --seed 18446744073709551616", "seed must be from 0"),
    ("personalize x --seed potato", "--seed"),
    ("personalize x --train-batch-size 1000000000", "train_batch_size must be from 1 to 65,536"),
    ("personalize x --weight-decay nan", "weight_decay must be a finite number, not nan"),
    ("personalize x --learning-rate inf", "learning_rate must be a finite number"),
    ("personalize x --learning-rate 0", "learning_rate must be above 0"),
    ("personalize x --resolution 7", "resolution must be from 8"),
    ("personalize x --max-train-steps 0", "max_train_steps must be at least 1"),
    ("personalize x --out a --out b", "--out is given twice"),
    ("personalize x y", "no further argument, but got: y"),
    ("personalize x --mixed-precision fp8", "'fp8'"),
    ("generate x --prompt a --strength 50", "strength must be from -10 to 10, not 50.0"),
    ("generate x --prompt a --steps 0", "steps must be from 1"),
    ("generate x --prompt a --guidance nan", "guidance must be a finite number"),
    ("generate x --prompt", "at least one prompt"),
    ("subject o --seed -1", "seed must be from 0"),
    ("pairs o --num-pictures 0", "num_pictures must be from 1"),
    ("edit p.png --set skin=dark:100 --out o", "skin=dark:100 is too far"),
    ("edit p.png --set skin=dark:nan --out o", "ATTRIBUTE=WORD:NUMBER"),
    ("blend a.png b.png --share 1e9 --out o", "--share is a number from -10 to 10"),
    ("sample --seeds 0..99999999999 --out o", "at most 1,000"),
    ("sample --seeds=-1 --out o", "--seeds takes"),
    ("train instruction x --output runs/me", "folder that everything is written to is out (--out)"),
    ("personalize x --output scal", "Known: scale, magnitude, output_rotation"),
    ("train instruction x --budget 5potatoes", "A budget is a number of bytes"),
    ("train instruction x --budget=-1", "A budget is a number of bytes"),
    ("train instruction x --budget 0", "A budget is a number of bytes"),
    ("train instruction x --budget 1e30", "A budget is a number of bytes"),
])  # fmt: skip
def test_values_that_cannot_be_meant(capsys, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()
    assert said in refused(capsys, *words.split())
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("words", [
    "--adapters ann/* mood --use", "--adapters ann/* --adapters mood", "--adapters=ann/* --adapters=mood", "--adapters ann/* --adapters=mood",
])  # fmt: skip
def test_a_list_may_be_given_in_several_places(capsys, tmp_path, words):
    main(["keys", "add", str(tmp_path / "keys"), "bob", *words.replace(" --use", "").split()])
    capsys.readouterr()
    main(["keys", "list", str(tmp_path / "keys")])
    assert "ann/* mood" in capsys.readouterr().out


def test_empty_words_are_not_the_folder_one_is_in(capsys):
    assert "--out is empty" in refused(capsys, "subject", "x", "--out", "")  # before it is found to be unknown
    assert "--config is empty" in refused(capsys, "personalize", "x", "--config=")
    assert "is empty" in refused(capsys, "personalize", "")
    with pytest.raises(ConfigError, match="out must be"):
        from_dict(PersonalizeConfig, {"out": ""})
    assert "NUL" in refused(capsys, "inspect", "a\0b")


def test_settings_in_python_have_the_same_limits():
    for wrong in ({"seed": -1}, {"max_grad_norm": float("nan")}, {"max_train_steps": 2**64}):
        with pytest.raises(ConfigError):
            PersonalizeConfig(train=LoopConfig(**wrong))
    check_value("overwrite", True)
    check_value("budget", "20kB")
    for name, value in {"seed": 2**63 - 1, "noise": 0.0, "steps": 1, "dropout": 0.0, "preview_steps": 0}.items():
        check_value(name, value)
    with pytest.raises(ConfigError, match="below 1"):
        check_value("dropout", 1.0)


@pytest.mark.parametrize(
    "text", ["a: " + "[" * 3000, "a: [", "\x00", "? [a]\n: b", "&x a: *x", "a: 2026-13-45", "--- 1\n--- 2"]
)
def test_config_files_that_are_no_yaml_are_refused_in_words(tmp_path, text):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError):
        load_yaml(PersonalizeConfig, tmp_path / "a.yaml")


@pytest.mark.parametrize("words", [
    "personalize {}", "personalize x --config {}", "personalize x --out {}", "train instruction {}", "zoo status {}", "config show {}",
    "train instruction x --chat-template {}", "predict {} --out o", "generate x --prompt a --control {}", "compare {}",
])  # fmt: skip
def test_a_pipe_is_not_waited_for(capsys, tmp_path, words):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        assert "is a pipe or a device" in refused(capsys, *words.format(path).split())


# ---- places that cannot be written


def places(folder):
    """Paths that no folder can be made at, for root neither."""
    (folder / "a file").write_text("mine")
    os.symlink(folder / "loop", folder / "loop")
    return [
        folder / "a file",
        folder / "a file" / "x",
        folder / "loop",
        folder / ("x" * 300),
        "/proc/nothing/here",
        "/dev/null",
    ]


@pytest.mark.parametrize("words", ["subject {} --num-pictures 1", "pairs {} --num-pictures 2"])
def test_a_place_that_cannot_be_written_is_refused_in_a_sentence(capsys, tmp_path, words):
    for place in places(tmp_path):
        before = sorted(path.name for path in tmp_path.iterdir())
        said = refused(capsys, *[word.format(place) for word in words.split(" ")])
        assert str(place)[:40] in said or "x" * 30 in said
        assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert (tmp_path / "a file").read_text() == "mine"


def test_a_full_disk_leaves_nothing(capsys, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "pairs"))

    monkeypatch.setattr(atomic, "flush", full)
    said = refused(capsys, "pairs", tmp_path / "pairs", "--num-pictures", 2)
    assert "No space left on device (free some space" in said and not any(
        path.is_file() for path in tmp_path.rglob("*")
    )
    said = refused(capsys, "subject", tmp_path / "pictures", "--num-pictures", 2)
    assert "No space left on device" in said and not any(path.is_file() for path in tmp_path.rglob("*"))


def test_files_that_may_not_grow(capsys, tmp_path):
    """As on a full disk, by the system itself: a picture stops in its middle."""
    import resource

    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1][1]))
    try:
        status = main(["subject", str(tmp_path / "pictures"), "--num-pictures", "2"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before[1])
        signal.signal(signal.SIGXFSZ, before[0])
    assert status == 2 and "File too large" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_a_refused_training_leaves_nothing(capsys, tmp_path):
    """What is refused after the settings were written, before there is anything to go on from."""
    (tmp_path / "people").mkdir()
    words = (
        "generator",
        "train",
        "--preset",
        "debug",
        "--end-to-end.people.folder",
        tmp_path / "people",
        "--out",
        tmp_path / "new" / "out",
    )
    assert "holds no folders" in refused(capsys, *words)
    assert [path.name for path in tmp_path.iterdir()] == ["people"]
    refused(capsys, "compare", "debug", "--stage", "report", "--workers", "1", "--out", tmp_path / "compared")
    assert [path.name for path in tmp_path.iterdir()] == ["people"]


# ---- ends that are nobody's mistake


def test_a_fault_of_ours_names_a_log_and_debug_shows_it(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def fault():
        raise KeyError("deep\ninside")

    assert ends.ended(fault) == 1
    said = capsys.readouterr().err
    (log,) = tmp_path.iterdir()
    assert (
        len(said.splitlines()) == 1
        and "fault of Smidgen's own" in said
        and str(log) in said
        and "Traceback" in log.read_text()
    )
    assert ends.ended(fault, debug=True) == 1 and "Traceback" in capsys.readouterr().err


def test_a_full_memory_is_no_fault(capsys):
    def torch_says():
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    assert ends.ended(torch_says) == 2 and "The memory is full" in capsys.readouterr().err


@pytest.mark.parametrize("signum, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_a_command_and_take_back_what_it_began(capsys, tmp_path, signum, status):
    before = signal.getsignal(signal.SIGTERM)
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it

    def command():
        with atomic.new_files(tmp_path / "out") as scratch:
            (scratch / "a").write_text("half")
            os.kill(os.getpid(), signum)
            time.sleep(60)  # until another thread has passed the signal on
            raise AssertionError("not reached")

    try:
        assert ends.ended(command) == status and capsys.readouterr().err.startswith("smidgen: stopped")
    finally:
        signal.signal(signal.SIGINT, interrupt)
    assert list(tmp_path.iterdir()) == [] and signal.getsignal(signal.SIGTERM) == before


def test_nobody_reads_the_output(monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        assert main(["methods"]) == 141
        assert os.write(output.fileno(), b"x") == 1  # it leads nowhere now, so that the last flush is silent
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["methods"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("coding", ["ascii", "latin-1"])
def test_a_terminal_that_cannot_show_a_name(monkeypatch, coding):
    said = io.TextIOWrapper(io.BytesIO(), encoding=coding)
    monkeypatch.setattr(sys, "stderr", said)
    for name in ("größe 人", os.fsdecode(b"half\xe9"), "new\nline", "-"):
        assert main(["inspect", name]) == 2
    said.seek(0)
    assert len(said.read().splitlines()) == 4


def test_mistakes_of_every_kind_end_in_one_sentence(tmp_path):
    """A sample of benchmarks.cli_fuzz."""
    from benchmarks.cli_fuzz import run

    failed = []

    def tell(case, result, said):
        if result not in ("refused", "accepted"):
            failed.append((result, case, said))

    counts = run(seed=1, most=30, seconds=120, tell=tell, quick=True)
    assert not failed and sum(counts.values()) == 30
