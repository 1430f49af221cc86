"""Uploading: what travels, and every refusal before anything does. The Hub itself is faked."""

import json
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from smidgen.errors import AdapterFileError, ConfigError, HubError
from smidgen.training.hub import push_to_hub


class Url(str):
    repo_id: str


class FakeApi:
    """Remembers what it is asked; ``public`` repositories exist already, ``error`` is raised by ``failing``."""

    public, failing, error = frozenset(), "", OSError("503 busy")

    def __init__(self):
        self.calls = FakeApi.calls

    def create_repo(self, repo_id, private, exist_ok):
        self._note("create_repo", repo_id, private)
        url = Url(f"https://huggingface.co/me/{repo_id.split('/')[-1]}")
        url.repo_id = f"me/{repo_id.split('/')[-1]}"
        self.private = private and url.repo_id not in FakeApi.public
        return url

    def repo_info(self, repo_id):
        return SimpleNamespace(private=self.private)

    def create_commit(self, repo_id, operations, commit_message):
        self._note("create_commit", repo_id, [operation.path_in_repo for operation in operations])

    def _note(self, name, *values):
        if FakeApi.failing == name:
            raise FakeApi.error
        self.calls.append((name, *values))


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    FakeApi.calls = []
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_token")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return FakeApi.calls


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    save_file({"w": torch.ones(2)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "README.md").write_text("# mine")
    (tmp_path / "report.json").write_text(json.dumps({"verified": True}))
    for name in ("contact_sheet.png", "loss.png", ".hidden.png", "config.yaml", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    for name in ("checkpoint-100", "peft_lora"):
        (tmp_path / name).mkdir()
        save_file({"w": torch.ones(2)}, tmp_path / name / "adapter_model.safetensors")
    return tmp_path


def test_the_adapter_its_card_report_and_pictures_travel_and_nothing_else(folder, calls):
    assert push_to_hub(folder, "me/dog") == "https://huggingface.co/me/dog"
    files = ["adapter_config.json", "adapter_model.safetensors", "README.md", "report.json"]
    pictures = ["contact_sheet.png", "loss.png"]
    assert calls == [("create_repo", "me/dog", True), ("create_commit", "me/dog", files + pictures)]


def test_a_name_without_owner_is_ones_own(folder, calls):
    push_to_hub(folder, "dog", private=False)
    assert calls[0] == ("create_repo", "dog", False) and calls[1][1] == "me/dog"


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("adapter_config.json", None, r"has no adapter_config\.json"),
        ("adapter_config.json", b"{", "not valid JSON"),
        ("adapter_model.safetensors", None, r"has no adapter_model\.safetensors"),
        ("adapter_model.safetensors", b"half", "truncated or not a safetensors file"),
        ("report.json", b'{"verified": false}', "did not verify on a fresh base"),
        ("report.json", b"[]", "holds a list, not a report"),
        ("report.json", b"{", "not valid JSON"),
    ],
)
def test_a_folder_that_is_no_whole_proved_adapter_is_refused(folder, calls, name, content, message):
    (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    with pytest.raises(AdapterFileError, match=message):
        push_to_hub(folder, "me/dog")
    assert calls == []


def test_a_folder_without_report_and_card_is_uploaded(folder, calls):
    (folder / "report.json").unlink()
    (folder / "README.md").unlink()
    push_to_hub(folder, "me/dog")
    assert calls[1][2][:2] == ["adapter_config.json", "adapter_model.safetensors"] and len(calls[1][2]) == 4


def test_offline_and_logged_out_are_said(folder, calls, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        push_to_hub(folder, "me/dog")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(HubError, match="hf auth login"):
        push_to_hub(folder, "me/dog")
    with pytest.raises(ConfigError, match="'a/b/c' is no name for a repository"):
        push_to_hub(folder, "a/b/c")
    assert calls == []


def test_a_private_upload_never_goes_to_a_public_repository(folder, calls, monkeypatch):
    monkeypatch.setattr(FakeApi, "public", {"me/dog"})
    with pytest.raises(HubError, match="me/dog exists and is public"):
        push_to_hub(folder, "me/dog")
    assert [call[0] for call in calls] == ["create_repo"]
    push_to_hub(folder, "me/dog", private=False)
    assert calls[-1][0] == "create_commit"


@pytest.mark.parametrize("failing", ["create_repo", "create_commit"])
def test_what_the_hub_says_is_passed_on(folder, monkeypatch, failing):
    monkeypatch.setattr(FakeApi, "failing", failing)
    with pytest.raises(HubError, match=r"did not take .* as me/dog: 503 busy"):
        push_to_hub(folder, "me/dog")
