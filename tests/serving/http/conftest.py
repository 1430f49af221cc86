"""One library and one server for the tests that ask it over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from smidgen.serving.library import Library

if any(find_spec(name) is None for name in ("fastapi", "prometheus_client", "openai")):
    collect_ignore_glob = ["test_*.py"]  # of the extra "serve" and of "dev"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from .served import make_folder

    return make_folder(tmp_path_factory.mktemp("served") / "adapters")


@pytest.fixture(scope="session")
def library(folder: Path) -> Iterator[Library]:
    from smidgen.serving.library import Library

    from .served import BASES

    with Library(folder, BASES) as opened:
        yield opened


@pytest.fixture(scope="session")
def address(library: Library) -> Iterator[str]:
    from .served import listening

    with listening(library) as found:
        yield found
