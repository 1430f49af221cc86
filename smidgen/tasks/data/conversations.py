"""Conversations to learn from: ``messages``, or ``instruction, input, output``, or ``prompt, completion``.

Rows that teach nothing (no answer, no assistant turn) are left out and counted; rows that are wrong are errors.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smidgen.errors import DataError, did_you_mean
from smidgen.tasks.data import splits
from smidgen.tasks.data.tables import Row, counted, read_splits

ROLES = ("system", "user", "assistant", "tool")
LAYOUTS = {
    "chat": ("messages",),
    "alpaca": ("instruction", "output"),
    "completion": ("prompt", "completion"),
}
Message = dict[str, str]


@dataclass(frozen=True)
class Conversation:
    """Messages with role and content; ``raw`` are a prompt and its completion that no chat template wraps."""

    messages: tuple[Message, ...]
    raw: bool
    where: str

    @property
    def key(self) -> str:
        return splits.digest(*(f"{message['role']}\x1e{message['content']}" for message in self.messages))


@dataclass(frozen=True)
class Conversations:
    """Conversations by split (train, validation, test) and warnings."""

    splits: dict[str, list[Conversation]]
    warnings: tuple[str, ...]


def read_conversations(path: Path, held_out: float, most: int | None = None) -> Conversations:
    """Read, check and split the conversations at ``path``; see ``tables.read_splits`` for what it may be.

    ``held_out`` is the share cut from train for each of validation and test that has no file, ``most`` how many train
    examples are kept. Raises DataError for rows of none of the layouts, and when nothing is left.
    """
    warnings: list[str] = []
    found = {split: _usable(rows, split, warnings) for split, rows in read_splits(path, warnings).items()}
    complete = splits.complete(found, lambda example: example.key, held_out, most)
    warnings += splits.leaks(complete, lambda example: example.key, lambda example: example.where)
    return Conversations(complete, tuple(warnings))


def _usable(rows: Sequence[Row], split: str, warnings: list[str]) -> list[Conversation]:
    layout = _layout(rows)
    kept: list[Conversation] = []
    silent: list[Conversation] = []
    for row in rows:
        conversation = _conversation(row, layout)
        answers = [m for m in conversation.messages if m["role"] == "assistant" and m["content"].strip()]
        (kept if answers else silent).append(conversation)
    if not kept:
        raise DataError(f"No row of {split} holds an assistant turn or an answer: there is nothing to learn.")
    if silent:
        names = [conversation.where for conversation in silent]
        warnings.append(counted(f"{split} row", names, "without an assistant turn or an answer, left out"))
    return kept


def _layout(rows: Sequence[Row]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row.values))
    for name, wanted in LAYOUTS.items():
        if set(wanted) <= set(columns):
            return name
    layouts = "; ".join(", ".join(wanted) for wanted in LAYOUTS.values())
    near = "".join(did_you_mean(column, [name for wanted in LAYOUTS.values() for name in wanted]) for column in columns)
    raise DataError(f"The data has the columns {', '.join(columns)}; conversations need one of: {layouts}.{near}")


def _conversation(row: Row, layout: str) -> Conversation:
    values = row.values
    if layout == "chat":
        return Conversation(_messages(values["messages"], row.where), False, row.where)
    if layout == "completion" and isinstance(values["prompt"], list):
        both = [*values["prompt"], *(values["completion"] or [])]
        return Conversation(_messages(both, row.where), False, row.where)
    asked, answer = LAYOUTS[layout]
    question = _text(values.get(asked), row.where, asked)
    if layout == "alpaca" and values.get("input"):
        question = f"{question}\n\n{_text(values['input'], row.where, 'input')}"
    said = {"role": "assistant", "content": _text(values.get(answer) or "", row.where, answer)}
    return Conversation(({"role": "user", "content": question}, said), layout == "completion", row.where)


def _messages(value: Any, where: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: messages must be a list of objects with role and content, not {str(value)[:60]!r}.")
    found = []
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise DataError(f"{where}: message {number} must have role and content, not {str(message)[:60]!r}.")
        if message["role"] not in ROLES:
            role = str(message["role"])
            hint = did_you_mean(role, ROLES)
            raise DataError(f"{where}: message {number} has the role {role!r}.{hint} Known: {', '.join(ROLES)}.")
        found.append({"role": message["role"], "content": _text(message["content"], where, f"message {number}")})
    return tuple(found)


def _text(value: Any, where: str, what: str) -> str:
    """A text, or the joined text parts of a message that is a list of parts."""
    if isinstance(value, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in value):
        return "".join(str(part.get("text", "")) for part in value)
    if not isinstance(value, str):
        raise DataError(f"{where}: {what} must be text, not {str(value)[:60]!r}.")
    return value
