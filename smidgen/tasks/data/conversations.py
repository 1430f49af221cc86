"""Conversations to learn from: messages in the layouts of OpenAI and ShareGPT, or a question and its answer in columns.

Rows that teach nothing (no answer, no assistant turn) are left out and counted; rows that are wrong are errors; columns and
keys that nothing reads are counted.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smidgen.errors import DataError, did_you_mean
from smidgen.tasks.data import splits
from smidgen.tasks.data.messages import Message, Places, read_messages, read_tools, says, text_of
from smidgen.tasks.data.tables import Row, counted, read_splits, structured

CHATS = ("messages", "conversations", "conversation")
PAIRS = {  # question and answer, and what else is read of such a row
    ("instruction", "output"): ("input", "system", "history", "tools"),
    ("instruction", "response"): ("context", "system", "history", "tools"),
    ("prompt", "completion"): ("tools",),
    ("query", "response"): ("system", "history", "tools"),
    ("question", "answer"): ("system", "history", "tools"),
    ("prompt", "response"): ("system", "history", "tools"),
}
RAW = ("prompt", "completion")  # texts that no chat template wraps


@dataclass(frozen=True)
class Conversation:
    """Messages with role and content; ``raw`` are a prompt and its completion that no chat template wraps.

    ``masked`` are the messages, by number from 0, that are shown but not learnt.
    """

    messages: tuple[Message, ...]
    raw: bool
    where: str
    tools: tuple[Any, ...] = ()
    masked: frozenset[int] = frozenset()

    @property
    def learnt(self) -> list[int]:
        """The messages to learn: what the assistant says, if anything."""
        found = [at for at, m in enumerate(self.messages) if m["role"] == "assistant" and at not in self.masked]
        return [at for at in found if says(self.messages[at])]

    @property
    def key(self) -> str:
        return splits.digest(json.dumps([self.messages, self.tools], sort_keys=True, default=str))


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
    unread = Places()
    kept: list[Conversation] = []
    silent: list[str] = []
    empty: list[str] = []
    for row in rows:
        conversation = _conversation(row, layout, unread)
        if not conversation.learnt:
            silent.append(conversation.where)
            continue
        kept.append(conversation)
        if any(m["role"] == "assistant" and not says(m) for m in conversation.messages):
            empty.append(conversation.where)
    if not kept:
        raise DataError(f"No row of {split} holds an assistant turn or an answer: there is nothing to learn.")
    if silent:
        warnings.append(counted(f"{split} row", silent, "without an assistant turn or an answer, left out"))
    if empty:
        warnings.append(
            counted(f"{split} row", empty, "with an assistant turn that says nothing, shown but not learnt")
        )
    for what, places in unread.found.items():
        warnings.append(counted(f"{split} row", places, f"whose {what} is not read"))
    return kept


def _layout(rows: Sequence[Row]) -> tuple[str, ...]:
    """The columns that make a row a conversation."""
    columns = list(dict.fromkeys(key for row in rows for key in row.values))
    layouts = [*((name,) for name in CHATS), *PAIRS]
    found = next((wanted for wanted in layouts if set(wanted) <= set(columns)), None)
    if found is not None:
        return found
    known = dict.fromkeys(name for wanted in layouts for name in wanted)
    near = "".join(did_you_mean(column, known) for column in columns)
    raise DataError(
        f"The data has the columns {', '.join(columns)}; conversations need one of: "
        f"{'; '.join(', '.join(wanted) for wanted in layouts)}.{near}"
    )


def _conversation(row: Row, layout: tuple[str, ...], unread: Places) -> Conversation:
    values, where = row.values, row.where
    more = ("system", "tools", "functions") if len(layout) == 1 else PAIRS[layout]  # type: ignore[index]
    for name, value in values.items():
        if name not in (*layout, *more) and value not in (None, "", [], {}):
            unread.add(f"column {name!r}", where)
    tools = tuple(read_tools(values.get("tools") or values.get("functions"), where) or ())
    turns = _asked(row, layout)
    if layout == RAW and isinstance(turns, str):  # a prompt as it is
        said = text_of(values.get(layout[1]) or "", f"{where}: {layout[1]}")
        messages: tuple[Message, ...] = ({"role": "user", "content": turns}, {"role": "assistant", "content": said})
        if tools:
            unread.add("column 'tools'", where)
        return Conversation(messages, True, where)
    messages, masked = read_messages(turns, where, unread)
    if values.get("system") and "system" in more:
        if messages[0]["role"] == "system":
            unread.add("column 'system'", where)
        else:
            messages = ({"role": "system", "content": text_of(values["system"], f"{where}: system")}, *messages)
            masked = frozenset(at + 1 for at in masked)
    return Conversation(messages, False, where, tools, masked)


def _asked(row: Row, layout: tuple[str, ...]) -> Any:
    """The turns of a row: a list of messages as it holds them, or a raw prompt."""
    values, where = row.values, row.where
    if len(layout) == 1:
        return values.get(layout[0])
    ask, answer = layout
    if layout == RAW:
        prompt, completion = structured(values.get(ask)), structured(values.get(answer))
        if isinstance(prompt, list):
            ending = completion if isinstance(completion, list) else [{"role": "assistant", "content": completion}]
            return [*prompt, *ending]
        return text_of(values.get(ask), f"{where}: {ask}")
    question = text_of(values.get(ask), f"{where}: {ask}")
    given = next((name for name in ("input", "context") if name in PAIRS[layout] and values.get(name)), None)  # type: ignore[index]
    if given:
        question = f"{question}\n\n{text_of(values[given], f'{where}: {given}')}"
    said = text_of(values.get(answer) or "", f"{where}: {answer}")
    return [
        *_history(values.get("history"), where),
        {"role": "user", "content": question},
        {"role": "assistant", "content": said},
    ]


def _history(value: Any, where: str) -> list[Any]:
    """Earlier turns: pairs of a question and its answer, or messages."""
    turns = structured(value)
    if not turns:
        return []
    if isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns):
        return turns
    pairs = isinstance(turns, list) and all(isinstance(turn, list | tuple) and len(turn) == 2 for turn in turns)
    if not pairs:
        raise DataError(
            f"{where}: history must be a list of pairs of a question and its answer, not {str(value)[:60]!r}."
        )
    return [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
