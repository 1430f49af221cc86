"""Conversations as tokens, and which of them the assistant said: those alone are learnt, as generation sees them.

At generation the model reads the conversation so far, rendered with a generation prompt, and says the rest of its turn. So a
turn's tokens are what rendering it has beyond that prompt, its end-of-turn mark included (or what lies in the template's
``{% generation %}`` markers). A template that writes earlier turns differently once others follow (Qwen3 drops their
thoughts) has no rendering in which all turns stand as they were generated: each turn is then an example of its own.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

from smidgen.errors import DataError
from smidgen.tasks.data.conversations import Conversation
from smidgen.tasks.data.messages import REASONING, Message, Places
from smidgen.tasks.data.tables import counted

MARKER = re.compile(r"\{%[-+]?\s*generation\b")
Span = tuple[int, int]
APART = "whose turns are learnt each by itself, since earlier ones are written differently once others follow"


@dataclass(frozen=True)
class Spoken:
    """Token ids, and for each whether it is a target (something the model itself must say); where they come from."""

    ids: list[int]
    target: list[bool]
    cut: bool = False  # whether the text had to be cut where a turn begins, a token reaching over
    where: str = ""
    conversation: str = ""  # where it stands, when ``where`` names one of its turns

    @property
    def targets(self) -> int:
        """How many tokens are learnt; the first has nothing before it to be predicted from."""
        return sum(self.target[1:])

    @property
    def source(self) -> str:
        return self.conversation or self.where


def encode_conversations(
    tokenizer: Any, splits: Mapping[str, Sequence[Conversation]], max_length: int
) -> tuple[dict[str, list[Spoken]], list[str]]:
    """Tokenise every split, cut to ``max_length`` tokens; returns it and warnings that count what was cut, lost, masked or
    not written by the template.

    Raises DataError when no assistant token is left in a split.
    """
    check_template(tokenizer, [conversation for some in splits.values() for conversation in some])
    warnings: list[str] = []
    found: dict[str, list[Spoken]] = {}
    for split, conversations in splits.items():
        remarks = Places()
        whole = [spoken for conversation in conversations for spoken in encode(tokenizer, conversation, remarks)]
        long = [spoken.where for spoken in whole if len(spoken.ids) > max_length]
        cut = [replace(s, ids=s.ids[:max_length], target=s.target[:max_length]) for s in whole]
        found[split] = [spoken for spoken in cut if spoken.targets]
        warnings += [counted(f"{split} conversation", places, what) for what, places in remarks.found.items()]
        if not found[split]:
            shortest = min((next((at for at, t in enumerate(s.target) if t), len(s.ids)) for s in whole), default=0)
            raise DataError(
                f"Every one of the {len(conversations)} conversations of {split} is masked: with max_length {max_length} no "
                f"token of an answer is left (the shortest question alone has {shortest}). Raise --max-length."
                f"{' ' if warnings else ''}{' '.join(warnings)}"
            )
        if long:
            warnings.append(counted(f"{split} conversation", long, f"longer than {max_length} tokens and cut there"))
        lost = [spoken.where for spoken in cut if not spoken.targets]
        if lost:
            warnings.append(counted(f"{split} conversation", lost, "without any answer left after the cut, left out"))
    return found, warnings


def encode(tokenizer: Any, conversation: Conversation, remarks: Places | None = None) -> list[Spoken]:
    """A conversation as tokens with their targets: one example, or one for each turn to learn; none if there is no such
    turn. What is to be said of it goes to ``remarks``."""
    remarks = Places() if remarks is None else remarks
    if conversation.raw:
        return [_encode_raw(tokenizer, conversation)]
    conversation = _written(tokenizer, conversation, remarks)
    if not conversation.learnt:
        return []
    rendering = _Rendering(tokenizer, conversation)
    examples = rendering.examples(conversation.learnt)
    found = [_spoken(rendering, text, turns, remarks) for text, turns in examples]
    if len(examples) == 1 and len(conversation.learnt) > 1 and found[0].cut:
        found = [_spoken(rendering, text, turns, remarks) for text, turns in rendering.apart(conversation.learnt)]
    if len(found) > 1:
        remarks.add(APART, conversation.where)
    return found


def _spoken(rendering: "_Rendering", text: str, turns: Sequence[int], remarks: Places) -> Spoken:
    tokenizer, conversation = rendering.tokenizer, rendering.conversation
    alone = len(turns) == 1 and len(conversation.learnt) > 1
    where = f"{conversation.where} turn {turns[0] + 1}" if alone else conversation.where
    if MARKER.search(tokenizer.get_chat_template(tools=list(conversation.tools) or None)):
        return Spoken(*_marked(rendering, text, turns), where, conversation.where)
    spans = [rendering.span(text, at, remarks) for at in turns]
    return Spoken(*_tokens(tokenizer, text, spans), where, conversation.where)


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


class _Rendering:
    """A conversation as the tokenizer's chat template writes it."""

    def __init__(self, tokenizer: Any, conversation: Conversation):
        self.tokenizer = tokenizer
        self.conversation = conversation
        self.messages = [_named(message) for message in conversation.messages]
        self.kept: dict[tuple[int, bool], str] = {}

    def up_to(self, count: int, prompt: bool = False) -> str:
        """The first ``count`` messages, with a generation prompt if asked; nothing where the template cannot begin so."""
        if (count, prompt) not in self.kept:
            try:
                text = self.applied(count, add_generation_prompt=prompt, tokenize=False) if count or prompt else ""
            except DataError:
                if count:
                    raise
                text = ""
            self.kept[count, prompt] = text
        return self.kept[count, prompt]

    def applied(self, count: int, **options: Any) -> Any:
        from jinja2 import TemplateError

        tools = list(self.conversation.tools) or None
        wrong = (TemplateError, ValueError, TypeError, KeyError, IndexError, AttributeError)
        try:
            return self.tokenizer.apply_chat_template(self.messages[:count], tools=tools, **options)
        except wrong as error:
            try:  # some templates take a call's arguments as text alone
                return self.tokenizer.apply_chat_template(_as_text(self.messages[:count]), tools=tools, **options)
            except wrong:
                raise DataError(f"{self.conversation.where}: the chat template refuses it: {error}") from error

    def examples(self, learnt: list[int]) -> list[tuple[str, list[int]]]:
        """Texts, and the turns to learn in each: all in one, or each in the text that ends with it."""
        whole = self.up_to(learnt[-1] + 1)
        if all(whole.startswith(self.up_to(at + 1)) for at in learnt):
            return [(whole, learnt)]
        return self.apart(learnt)

    def apart(self, learnt: list[int]) -> list[tuple[str, list[int]]]:
        """A text for each turn to learn, that ends with it."""
        return [(self.up_to(at + 1), [at]) for at in learnt]

    def span(self, text: str, at: int, remarks: Places) -> Span:
        """Where turn ``at`` lies in ``text``: from the generation prompt to its end-of-turn mark, a line end after that not
        included."""
        after, prompt, before = self.up_to(at + 1), self.up_to(at, prompt=True), self.up_to(at)
        content = self.messages[at]["content"].strip()
        if prompt and text.startswith(prompt) and after.startswith(prompt):
            start = len(prompt)
        elif after.startswith(before):  # a prompt that opens what the turn does not have, such as a thought
            remarks.add(
                "whose answers do not go on from the template's generation prompt; they are learnt without it",
                self.conversation.where,
            )
            turn, start = after[len(before) :], _shared(after, prompt)
            if content and turn.count(content) == 1:
                start = min(start, len(before) + turn.index(content))
        else:
            raise DataError(
                f"{self.conversation.where}: the chat template writes what comes before a turn differently once the turn "
                "follows, so what the assistant says cannot be told apart. Mark it with {% generation %} ... "
                "{% endgeneration %} in a copy of the template and give that with --chat-template."
            )
        end = self.end(at, start)
        if content and after[start:end].endswith(content):
            remarks.add(
                "whose turns end in no mark that the template writes: to end is not learnt", self.conversation.where
            )
        return start, end

    def end(self, at: int, start: int) -> int:
        """Where turn ``at`` ends that begins at ``start``: with its end-of-turn mark, white space after which is the
        template's."""
        turn, content = self.up_to(at + 1)[start:], self.messages[at]["content"].strip()
        return start + len(turn.rstrip() if self._ends_in_mark(turn, content) else turn)

    def _ends_in_mark(self, turn: str, content: str) -> bool:
        special = {token.content for token in self.tokenizer.added_tokens_decoder.values()}
        if any(turn.rstrip().endswith(mark) for mark in special if mark.strip()):
            return True
        return bool(content) and content in turn and bool(turn[turn.rfind(content) + len(content) :].strip())


def _named(message: Message) -> Message:
    """A message with its thought under every name that templates know."""
    thought = message.get("reasoning_content")
    return message | dict.fromkeys(REASONING, thought) if thought else dict(message)


def _written(tokenizer: Any, conversation: Conversation, remarks: Places) -> Conversation:
    """The conversation, those turns masked that are calls or nothing but thoughts which the template does not write;
    whatever else it does not write is remarked."""
    rendering = _Rendering(tokenizer, conversation)
    texts = [text for text, _ in rendering.examples(conversation.learnt)]

    def matters(change: Callable[[Conversation], Conversation]) -> bool:
        other = _Rendering(tokenizer, change(conversation))
        try:
            return [text for text, _ in other.examples(conversation.learnt)] != texts
        except DataError:
            return True

    if conversation.tools and not matters(lambda whole: replace(whole, tools=())):
        remarks.add("whose tools the chat template does not write", conversation.where)
    lost: frozenset[int] = frozenset()
    thinking = _have(conversation, "reasoning_content")
    if thinking and not matters(_without("reasoning_content")):
        remarks.add("whose reasoning the chat template does not write", conversation.where)
        lost = thinking - _have(conversation, "content") - _have(conversation, "tool_calls")
    named = any(message.get("name") and message["role"] != "tool" for message in conversation.messages)
    if named and not matters(_without("name")):
        remarks.add("whose names the chat template does not write", conversation.where)
    for role in ("system", "user", "tool"):
        said = [message["content"].strip() for message in conversation.messages if message["role"] == role]
        missing = any(content not in text for content in said for text in texts[-1:])
        if missing and not matters(_other_words(role)):
            remarks.add(f"whose {role} messages the chat template does not write", conversation.where)
    calling = _have(conversation, "tool_calls")
    if calling and not matters(_without("tool_calls")):
        remarks.add(
            "with tool calls that the chat template does not write: those turns are not learnt", conversation.where
        )
        lost |= calling
    return replace(conversation, masked=conversation.masked | lost)


def _have(conversation: Conversation, key: str) -> frozenset[int]:
    return frozenset(at for at, message in enumerate(conversation.messages) if message.get(key))


def _without(key: str) -> Callable[[Conversation], Conversation]:
    def strip(whole: Conversation) -> Conversation:
        messages = tuple({k: v for k, v in message.items() if k != key} for message in whole.messages)
        return replace(whole, messages=messages)

    return strip


def _other_words(role: str) -> Callable[[Conversation], Conversation]:
    def change(whole: Conversation) -> Conversation:
        messages = (m | {"content": f"{m['content']}?"} if m["role"] == role else m for m in whole.messages)
        return replace(whole, messages=tuple(messages))

    return change


def _marked(rendering: _Rendering, text: str, turns: Sequence[int]) -> tuple[list[int], list[bool], bool]:
    """Tokens of ``text`` and those between the template's markers that are of ``turns``."""
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    marked = rendering.applied(turns[-1] + 1, **options)
    encoded = rendering.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    starts = [_shared(rendering.up_to(at), text) for at in turns]
    regions = [(start, rendering.end(at, start)) for start, at in zip(starts, turns, strict=True)]
    inside = [
        any(first <= start and end <= last for first, last in regions) for start, end in encoded["offset_mapping"]
    ]
    ids, mask = list(marked["input_ids"]), marked["assistant_masks"]
    return ids, [bool(mark) and there for mark, there in zip(mask, inside, strict=True)], False


def _as_text(messages: Sequence[Message]) -> list[Message]:
    """Messages whose calls have their arguments as JSON."""
    found = []
    for message in messages:
        calls = []
        for call in message.get("tool_calls", ()):
            arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
            calls.append(call | {"function": call["function"] | {"arguments": arguments}})
        found.append(message | {"tool_calls": calls} if calls else message)
    return found


def _shared(one: str, other: str) -> int:
    """How many letters two texts begin with alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _encode_raw(tokenizer: Any, conversation: Conversation) -> Spoken:
    prompt, completion = (message["content"] for message in conversation.messages)
    text, span = prompt + completion, (len(prompt), len(prompt) + len(completion))
    ids, target, cut = _tokens(tokenizer, text, [span], special=True)
    end = tokenizer.eos_token_id
    if end is None or ids[-1] == end:
        target = [*target[:-1], end is not None or target[-1]]
    else:
        ids, target = [*ids, end], [*target, True]
    return Spoken(ids, target, cut, conversation.where)


def _tokens(
    tokenizer: Any, text: str, spans: Sequence[Span], special: bool = False
) -> tuple[list[int], list[bool], bool]:
    """Tokens of ``text``, which of them lie in ``spans``, and whether it had to be cut. Where a token would reach over the
    border of a span, the text is cut there, as generation cuts it: the prompt is read first, and then the model speaks."""

    def ids(part: str, special: bool = False) -> list[int]:
        return list(tokenizer(part, add_special_tokens=special, verbose=False)["input_ids"]) if part else []

    body, borders = ids(text), [border for span in spans for border in span]
    pieces = [ids(text[start:end]) for start, end in pairwise([0, *borders, len(text)])]
    flags = [at % 2 == 1 for at, piece in enumerate(pieces) for _ in piece]
    flat = [token for piece in pieces for token in piece]
    cut = flat != body
    if cut:
        heads = [ids(text[:border]) for border in borders]
        if all(body[: len(head)] == head for head in heads):  # tokens are clean there; it is the cut that changes them
            sizes = [0, *map(len, heads), len(body)]
            flags = [at % 2 == 1 for at, (start, end) in enumerate(pairwise(sizes)) for _ in range(end - start)]
            flat, cut = body, False
    if special:  # what the tokenizer puts before a text, and after it
        around = ids(text, special=True)
        lead = next((at for at in range(len(around) - len(body) + 1) if around[at : at + len(body)] == body), 0)
        tail = around[lead + len(body) :]
        flat, flags = [*around[:lead], *flat, *tail], [*[False] * lead, *flags, *[False] * len(tail)]
    return flat, flags, cut
