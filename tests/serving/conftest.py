"""Adapters that several tests read; none changes them."""

from pathlib import Path

import pytest

from serving.helpers import METHODS, chat_adapter, classifier


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One adapter a method on the debug Llama, and one more of svfit."""
    folder = tmp_path_factory.mktemp("chats")
    for seed, method in enumerate(METHODS):
        chat_adapter(folder / method, method, seed)
    chat_adapter(folder / "team" / "ann", "svfit", 77)
    return folder


@pytest.fixture(scope="session")
def moods(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Classifiers of two and of three classes on the debug BERT."""
    folder = tmp_path_factory.mktemp("moods")
    classifier(folder / "two", ("bad", "good"), 1)
    classifier(folder / "other", ("left", "right"), 2)
    classifier(folder / "three", ("a", "b", "c"), 3)
    return folder
