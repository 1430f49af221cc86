"""API keys: what is kept of them, who finds them, and files that hold none."""

import base64
import json
from pathlib import Path

import pytest

from smidgen.cli import main
from smidgen.errors import ConfigError
from smidgen.serving.keys import ANYONE, PREFIX, Keyring, add_key, hashed, read_keys, remove_key


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def test_a_key_is_shown_once_and_only_its_hash_is_kept(file: Path) -> None:
    secret = add_key(file, "ann", ["ann/*", "house"])
    assert secret.startswith(PREFIX) and len(secret) > 40
    assert secret not in file.read_text() and hashed(secret) in file.read_text()
    assert oct(file.stat().st_mode)[-3:] == "600"
    key = read_keys(file)["ann"]
    assert key.may_use("ann/me") and key.may_use("house") and not key.may_use("bob") and not key.write


def test_who_has_the_key_is_found(file: Path) -> None:
    ann, bob = add_key(file, "ann"), add_key(file, "bob", ["x"], write=True)
    ring = Keyring(file)

    def name(header: str | None) -> str | None:
        found = ring.find(header)
        return found and found.name

    assert name(f"Bearer {ann}") == "ann" and name(f"bearer  {bob} ") == "bob"
    assert name("Basic " + base64.b64encode(f"anything:{bob}".encode()).decode()) == "bob"
    for wrong in (
        None,
        "",
        "Bearer",
        "Bearer ",
        f"Token {ann}",
        f"Bearer {ann}x",
        f"Bearer {hashed(ann)}",
        "Basic !",
        "Basic ÿ",
    ):
        assert name(wrong) is None, wrong


def test_a_removed_key_is_refused_at_once_and_a_damaged_file_lets_nobody_in(file: Path) -> None:
    ann, bob = add_key(file, "ann"), add_key(file, "bob")
    ring = Keyring(file)
    assert ring.find(f"Bearer {ann}")
    remove_key(file, "ann")
    assert ring.find(f"Bearer {ann}") is None and ring.find(f"Bearer {bob}")
    good = file.read_text()
    file.write_text("{")
    assert ring.find(f"Bearer {bob}") is None
    file.write_text(good)
    assert ring.find(f"Bearer {bob}")
    file.unlink()
    assert ring.find(f"Bearer {bob}") is None


def test_without_a_file_anyone_asks() -> None:
    assert Keyring(None).find(None) is ANYONE


@pytest.mark.parametrize("content", [
    "", "[]", "{", '{"ann": {}}', '{"ann": {"sha256": "short", "adapters": [], "write": true}}', '{"ann": 1}', "\0",
])  # fmt: skip
def test_a_file_that_holds_no_keys_is_said(file: Path, content: str) -> None:
    file.write_text(content)
    with pytest.raises(ConfigError, match="holds no API keys"):
        Keyring(file)


def test_what_the_commands_say(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "add", str(file), "ann", "--adapters", "ann/*", "house", "--write"]) == 0
    secret = capsys.readouterr().out.strip()
    assert hashed(secret) == json.loads(file.read_text())["ann"]["sha256"]
    assert main(["keys", "list", str(file)]) == 0
    assert capsys.readouterr().out == "ann\twrite\tann/* house\n"
    assert main(["keys", "add", str(file), "ann"]) == 2
    assert "has a key 'ann' already" in capsys.readouterr().err
    assert main(["keys", "add", str(file), "a b"]) == 2
    assert main(["keys", "remove", str(file), "an"]) == 2
    assert "Did you mean 'ann'?" in capsys.readouterr().err
    assert main(["keys", "remove", str(file), "ann"]) == 0 and read_keys(file) == {}
