"""Upload an adapter folder to the Hugging Face Hub, after looking at what would be published."""

import json
from pathlib import Path
from typing import Any

from smidgen.adapters.checkpoint.files import CONFIG_NAME, WEIGHTS_NAME, read_config, read_tensors
from smidgen.errors import AdapterFileError, ConfigError, HubError

TEXTS = ("README.md", "report.json", "chat_template.jinja")
PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def push_to_hub(folder: str | Path, repo_id: str, private: bool = True) -> str:
    """Upload the adapter in ``folder`` to ``repo_id`` (``name`` or ``owner/name``) in one commit; returns its URL.

    The login is huggingface_hub's own (``hf auth login`` or HF_TOKEN). The two adapter files, README.md, report.json,
    a chat template and the pictures beside them travel; checkpoints, config.yaml (it names local paths) and subfolders stay. A
    repository that does not exist is made, ``private`` or public.

    Raises, before anything is uploaded:
        AdapterFileError: the folder holds no whole adapter, or its report says that it did not verify.
        ConfigError: ``repo_id`` is no name for a repository.
        HubError: offline mode, no login, an existing repository is public although ``private`` was asked for, or the
            Hub refuses.

    Example:
        >>> push_to_hub("runs/personalize", "me/my-dog")  # doctest: +SKIP
        'https://huggingface.co/me/my-dog'
    """
    folder = Path(folder)
    files = _files(folder)
    api = _login(repo_id)
    try:
        repository = api.create_repo(repo_id, private=private, exist_ok=True)
        if private and not api.repo_info(repository.repo_id).private:
            raise HubError(
                f"{repository.repo_id} exists and is public, but a private upload was asked for. Nothing was uploaded: "
                "make the repository private, choose another name, or ask for a public upload."
            )
        api.create_commit(repository.repo_id, _operations(files), commit_message="Upload an adapter made with Smidgen")
    except OSError as error:  # all of huggingface_hub's errors are
        raise HubError(f"The Hub did not take {folder} as {repo_id}: {error}") from error
    return str(repository)


def _files(folder: Path) -> list[Path]:
    """What is to be uploaded, after the checks."""
    read_config(folder)
    read_tensors(folder)
    report = folder / "report.json"
    if report.is_file() and _report(report).get("verified") is False:
        raise AdapterFileError(
            f"{report} says that this adapter did not verify on a fresh base. Run `smidgen verify {folder} --base BASE` "
            "to see why; an adapter that is not on should not be published."
        )
    names = (CONFIG_NAME, WEIGHTS_NAME, *TEXTS)
    known = [folder / name for name in names if (folder / name).is_file()]
    pictures = (path for path in sorted(folder.iterdir()) if path.suffix.lower() in PICTURES and path.is_file())
    return known + [path for path in pictures if not path.name.startswith(".")]


def _report(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterFileError(f"{path} is not valid JSON ({error}).") from error
    if not isinstance(found, dict):
        raise AdapterFileError(f"{path} holds a {type(found).__name__}, not a report.")
    return found


def _login(repo_id: str) -> Any:
    """An API client for a name that is valid and a machine that is online and logged in."""
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ConfigError(f"{repo_id!r} is no name for a repository, such as 'me/my-adapter': {error}") from error
    if constants.HF_HUB_OFFLINE:
        raise HubError("HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it and try again.")
    if get_token() is None:
        raise HubError(
            "Nobody is logged in to the Hub: run `hf auth login`, or set HF_TOKEN to a token that may write."
        )
    return HfApi()


def _operations(files: list[Path]) -> list[Any]:
    from huggingface_hub import CommitOperationAdd

    return [CommitOperationAdd(path_in_repo=path.name, path_or_fileobj=str(path)) for path in files]
