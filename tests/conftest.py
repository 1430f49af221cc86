"""One thread, no network, and a factor cache that belongs to this run."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from crashes import pytest_configure  # noqa: F401 (a hook)

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def factor_cache(tmp_path_factory: pytest.TempPathFactory):
    """A fresh folder for decompositions, so that no run sees another's."""
    before = os.environ.get("SMIDGEN_CACHE")
    os.environ["SMIDGEN_CACHE"] = str(tmp_path_factory.mktemp("factors"))
    yield
    os.environ.pop("SMIDGEN_CACHE")
    if before is not None:
        os.environ["SMIDGEN_CACHE"] = before


USERS_CACHE = os.environ.get("SMIDGEN_CACHE")


@pytest.fixture
def users_cache(factor_cache, monkeypatch: pytest.MonkeyPatch):
    """The user's own cache, for slow tests with packaged models: nobody wants to download them for every run."""
    if USERS_CACHE is None:
        monkeypatch.delenv("SMIDGEN_CACHE")
    else:
        monkeypatch.setenv("SMIDGEN_CACHE", USERS_CACHE)
