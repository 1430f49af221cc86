"""Conversations as tokens, and which of them the assistant said: those alone are learnt.

The spans come from the template's own ``{% generation %}`` markers where it has them. Otherwise the conversation is
rendered up to each assistant turn and with it: what the second has more is that turn with its end-of-turn mark. A
template that renders earlier turns differently once others follow has no such spans, and is refused.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smidgen.errors import DataError
from smidgen.tasks.data.conversations import Conversation
from smidgen.tasks.data.tables import counted


@dataclass(frozen=True)
class Spoken:
    """One conversation: token ids, and for each whether it is a target (something the model itself must say)."""

    ids: list[int]
    target: list[bool]
    where: str

    @property
    def targets(self) -> int:
        """How many tokens are learnt; the first has nothing before it to be predicted from."""
        return sum(self.target[1:])


def encode_conversations(
    tokenizer: Any, splits: Mapping[str, Sequence[Conversation]], max_length: int
) -> tuple[dict[str, list[Spoken]], list[str]]:
    """Tokenise every split, cut to ``max_length`` tokens; returns it and warnings that count what was cut or lost.

    Raises DataError when no assistant token is left in a split.
    """
    check_template(tokenizer, [conversation for some in splits.values() for conversation in some])
    warnings: list[str] = []
    found: dict[str, list[Spoken]] = {}
    for split, conversations in splits.items():
        whole = [encode(tokenizer, conversation) for conversation in conversations]
        long = [spoken.where for spoken in whole if len(spoken.ids) > max_length]
        cut = [Spoken(s.ids[:max_length], s.target[:max_length], s.where) for s in whole]
        found[split] = [spoken for spoken in cut if spoken.targets]
        if not found[split]:
            shortest = min(next((at for at, t in enumerate(s.target) if t), len(s.ids)) for s in whole)
            raise DataError(
                f"Every one of the {len(whole)} conversations of {split} is masked: with max_length {max_length} no "
                f"token of an answer is left (the shortest question alone has {shortest}). Raise --max-length."
            )
        if long:
            warnings.append(counted(f"{split} conversation", long, f"longer than {max_length} tokens and cut there"))
        lost = [spoken.where for spoken in cut if not spoken.targets]
        if lost:
            warnings.append(counted(f"{split} conversation", lost, "without any answer left after the cut, left out"))
    return found, warnings


def encode(tokenizer: Any, conversation: Conversation) -> Spoken:
    """One conversation as tokens with their targets."""
    if conversation.raw:
        return _encode_raw(tokenizer, conversation)
    messages = list(conversation.messages)
    if re.search(r"\{%-?\s*generation\b", tokenizer.chat_template):
        marked = _apply(
            tokenizer, conversation, messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return Spoken(list(marked["input_ids"]), [bool(mark) for mark in marked["assistant_masks"]], conversation.where)
    text = _apply(tokenizer, conversation, messages)
    spans = [_span(tokenizer, conversation, text, at) for at, m in enumerate(messages) if m["role"] == "assistant"]
    return _tokens(tokenizer, text, spans, conversation.where, special=False)


def check_template(tokenizer: Any, conversations: Sequence[Conversation]) -> None:
    """Refuse a tokenizer that cannot say where its tokens lie, or that lacks a chat template where one is needed."""
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(f"A {type(tokenizer).__name__} does not tell where its tokens lie; use a fast tokenizer.")
    if not tokenizer.chat_template and any(not conversation.raw for conversation in conversations):
        raise DataError(
            "The model's tokenizer has no chat template, so it is not known how turns are written. Give a Jinja file "
            "with --chat-template, take an instruction-tuned model, or give the data as prompt and completion."
        )


def read_template(path: Path) -> str:
    """A chat template's Jinja text."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"The chat template {path} cannot be read: {error}") from error


def _span(tokenizer: Any, conversation: Conversation, text: str, at: int) -> tuple[int, int]:
    """Where turn ``at`` lies in the rendered ``text``, its end-of-turn mark included, the line end after it not."""
    messages = list(conversation.messages)
    after = _apply(tokenizer, conversation, messages[: at + 1])
    before = _apply(tokenizer, conversation, messages[:at], add_generation_prompt=True) if at else ""
    told = after.startswith(before)
    if not told:  # a generation prompt of its own kind, such as one that opens a thought
        before = _apply(tokenizer, conversation, messages[:at])
    turn, content = after[len(before) :], messages[at]["content"].strip()
    if not (after.startswith(before) and text.startswith(after)) or not (told or turn.count(content) == 1):
        raise DataError(
            f"{conversation.where}: the chat template writes earlier turns differently once others follow, so what the "
            "assistant says cannot be told apart. Mark it with {% generation %} ... {% endgeneration %} in a copy of "
            "the template and give that with --chat-template."
        )
    start = 0 if told else turn.index(content)
    mark = turn[turn.rfind(content) + len(content) :] if content in turn else turn
    return len(before) + start, len(before) + len(turn.rstrip() if mark.strip() else turn)


def _encode_raw(tokenizer: Any, conversation: Conversation) -> Spoken:
    prompt, completion = (message["content"] for message in conversation.messages)
    span = (len(prompt), len(prompt) + len(completion))
    spoken = _tokens(tokenizer, prompt + completion, [span], conversation.where, special=True)
    end = tokenizer.eos_token_id
    if end is None or spoken.ids[-1] == end:
        target = [*spoken.target[:-1], end is not None or spoken.target[-1]]
        return Spoken(spoken.ids, target, spoken.where)
    return Spoken([*spoken.ids, end], [*spoken.target, True], spoken.where)


def _tokens(tokenizer: Any, text: str, spans: Sequence[tuple[int, int]], where: str, special: bool) -> Spoken:
    encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
    inside = [
        end > start and any(first <= start and end <= last for first, last in spans)
        for start, end in encoded["offset_mapping"]
    ]
    return Spoken(list(encoded["input_ids"]), inside, where)


def _apply(tokenizer: Any, conversation: Conversation, messages: Sequence[Mapping[str, str]], **options: Any) -> Any:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(list(messages), **({"tokenize": False} | options))
    except (TemplateError, ValueError, TypeError, KeyError, IndexError) as error:
        raise DataError(f"{conversation.where}: the chat template refuses it: {error}") from error
