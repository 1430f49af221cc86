"""The OpenAPI description, tried out by schemathesis: whatever fits it or nearly does, the server does not fail."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import booleans

schemathesis = pytest.importorskip("schemathesis")
from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.generation import GenerationMode  # noqa: E402

from smidgen.serving.app import create_app  # noqa: E402
from smidgen.serving.library import Library  # noqa: E402
from smidgen.serving.settings import Server  # noqa: E402

QUICK = settings(
    database=None,
    max_examples=5,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
    derandomize=True,
)
LONG = settings(QUICK, max_examples=150)
OURS = {"model": "talk/lora", "lora_name": "talk/lora", "max_tokens": 2, "max_completion_tokens": 2, "steps": 1, "n": 1}


@pytest.fixture(scope="module")
def schema(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Iterator[Any]:
    root = tmp_path_factory.mktemp("schema")
    shutil.copytree(folder / "talk/lora", root / "talk/lora")
    with Library(root, ["debug-chat"]) as library:
        yield schemathesis.openapi.from_asgi(
            "/openapi.json", create_app(library, Server(open=True, adapters_root=root))
        )


def try_all(schema: Any, how: settings) -> None:
    for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
        for found in schema.get_all_operations():
            operation = found.ok()
            if mode is GenerationMode.NEGATIVE and not operation.body:  # any text is a name
                continue

            @how
            @given(case=operation.as_strategy(generation_mode=mode), ours=booleans())
            def fits(case: Any, ours: bool) -> None:
                if ours and isinstance(case.body, dict):  # else all ends at an unknown model
                    case.body |= {name: value for name, value in OURS.items() if name in case.body}
                if ours and case.method == "DELETE":
                    return
                case.call_and_validate(checks=[not_a_server_error], timeout=600)  # a busy machine is no fault

            fits()


def test_the_server_does_not_fail(schema: Any) -> None:
    try_all(schema, QUICK)


@pytest.mark.slow
def test_the_server_does_not_fail_at_length(schema: Any) -> None:
    try_all(schema, LONG)
