"""The config files in docs/accelerate are ones that accelerate reads, key by key; the loop says which it refuses."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

from smidgen.errors import ConfigError
from smidgen.training.loop import LoopConfig, train
from tests.training import toys

FILES = sorted((Path(__file__).parents[2] / "docs" / "accelerate").glob("*.yaml"))
KINDS = {"deepspeed_zero2": "DEEPSPEED", "deepspeed_zero3": "DEEPSPEED", "fsdp": "FSDP", "multi_gpu": "MULTI_GPU"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_accelerate_reads_it(file):
    config = load_config_from_file(str(file))  # refuses keys it does not know
    assert config.distributed_type == KINDS[file.stem]
    assert config.num_processes >= 2 and config.num_machines == 1
    known = {action.dest: action for action in launch_command_parser()._actions}
    for key, value in {**config.fsdp_config, **config.deepspeed_config}.items():
        choices = known[key].choices
        assert choices is None or str(value) in choices, (key, value)


def test_each_kind_has_its_file():
    assert [file.stem for file in FILES] == sorted(KINDS)


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_a_launch_that_shards_is_refused_before_anything_is_written(tmp_path, monkeypatch, kind):
    monkeypatch.setenv(f"ACCELERATE_USE_{kind}", "true")
    module = toys.model()
    with pytest.raises(ConfigError, match=rf"launched with {kind}.*docs/accelerate/multi_gpu\.yaml"):
        train(toys.Line(), module, toys.groups(module), LoopConfig(), tmp_path, progress=False)
    assert list(tmp_path.iterdir()) == []
