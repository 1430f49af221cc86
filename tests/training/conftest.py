"""Tiny pipelines, built once a session; one thread, so that runs can be compared bit for bit."""

from pathlib import Path

import pytest
import torch

from tests.training import tiny

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def sd(tmp_path_factory) -> Path:
    return tiny.sd_folder(tmp_path_factory.mktemp("sd") / "sd")


@pytest.fixture(scope="session")
def sdxl(tmp_path_factory) -> Path:
    return tiny.sdxl_folder(tmp_path_factory.mktemp("sdxl") / "sdxl")


@pytest.fixture
def pictures(tmp_path) -> Path:
    return tiny.pictures(tmp_path / "pictures")
