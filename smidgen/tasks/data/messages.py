"""Messages of a conversation as chat templates take them, whatever tool wrote them.

A message here has ``role`` (system, user, assistant, tool) and ``content``, and where there are such ``tool_calls``,
``reasoning_content``, ``name`` and ``tool_call_id``. Other names for these are followed; what is not read is counted.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from smidgen.errors import DataError, did_you_mean
from smidgen.tasks.data.tables import structured

ROLES = ("system", "user", "assistant", "tool")
OTHER_ROLES = {
    "developer": "system", "human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant",
    "bot": "assistant", "ai": "assistant", "function": "tool", "observation": "tool", "ipython": "tool",
    "tool_response": "tool", "function_response": "tool",
}  # fmt: skip
CALLING = ("function_call", "tool_call")  # roles of ShareGPT: the assistant calls, and the call is the text
REASONING = ("reasoning_content", "reasoning", "thinking")
WEIGHTS = ("weight", "train", "loss")  # OpenAI, axolotl, ms-swift: whether a turn is learnt
PARTS = ("text", "input_text", "output_text")
Message = dict[str, Any]


@dataclass
class Places:
    """Rows by what is to be said of them, each once."""

    found: dict[str, list[str]] = field(default_factory=dict)

    def add(self, what: str, where: str) -> None:
        places = self.found.setdefault(what, [])
        if not places or places[-1] != where:
            places.append(where)


def read_messages(value: Any, where: str, unread: Places) -> tuple[tuple[Message, ...], frozenset[int]]:
    """The messages of a row, and which of them are not to be learnt: those of weight 0.

    Raises DataError with row and message for what is none.
    """
    value = structured(value)
    if isinstance(value, dict) and all(isinstance(part, list) for part in value.values()):  # a column of columns
        longest = max(map(len, value.values()), default=0)
        value = [{key: part[at] for key, part in value.items() if at < len(part)} for at in range(longest)]
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: messages must be a list of objects with role and content, not {str(value)[:60]!r}.")
    found: list[Message] = []
    masked: set[int] = set()
    for number, one in enumerate(value, 1):
        message, learnt = _message(one, f"{where}: message {number}", where, unread)
        if not learnt:
            masked.add(len(found))
        found.append(message)
    return tuple(found), frozenset(masked)


def says(message: Mapping[str, Any]) -> bool:
    """Whether there is anything in a message to learn."""
    return bool(message["content"].strip() or message.get("tool_calls") or message.get("reasoning_content"))


def text_of(value: Any, what: str) -> str:
    """A text, or the joined text parts of a list of them."""
    if isinstance(value, list):
        return "".join(_part(part, what) for part in value)
    if not isinstance(value, str):
        raise DataError(f"{what} must be text, not {str(value)[:60]!r}.")
    return value


def read_tools(value: Any, where: str) -> list[Any] | None:
    """The tools of a row as templates take them; None without any."""
    tools = structured(value)
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"{where}: tools must be a list of objects that describe functions, not {str(value)[:60]!r}.")
    return [
        tool if "function" in tool or "name" not in tool else {"type": "function", "function": tool} for tool in tools
    ]


def _message(value: Any, what: str, where: str, unread: Places) -> tuple[Message, bool]:
    if not isinstance(value, dict):
        raise DataError(f"{what} must have role and content, not {str(value)[:60]!r}.")
    left = {key: part for key, part in value.items() if part is not None}
    role = _take(left, ("role", "from"))
    content = _take(left, ("content", "value"))
    silent = not any(key in value for key in ("content", "value")) and not any(
        left.get(k) for k in ("tool_calls", "function_call")
    )
    if not isinstance(role, str) or silent:
        raise DataError(f"{what} must have role and content, not {str(value)[:60]!r}.")
    calls = _take(left, ("tool_calls", "function_call"))
    if role in CALLING:
        role, calls, content = "assistant", content, None
    role = OTHER_ROLES.get(role, role)
    if role not in ROLES:
        hint = did_you_mean(role, [*ROLES, *OTHER_ROLES])
        raise DataError(f"{what} has the role {role!r}.{hint} Known: {', '.join(ROLES)}.")
    if content is None and role in ("system", "user"):
        raise DataError(f"{what} has no content: a {role} says something.")
    message: Message = {"role": role, "content": text_of(content if content is not None else "", what)}
    if role == "assistant":
        if calls:
            message["tool_calls"] = [_call(call, what) for call in _listed(calls)]
        thought = _take(left, REASONING)
        if thought:
            message["reasoning_content"] = text_of(thought, f"{what}: its reasoning")
    elif calls:
        left["tool_calls"] = calls
    message |= {key: left.pop(key) for key in ("name", "tool_call_id") if left.get(key)}
    learnt = _learnt(left, role, what)
    for key, part in left.items():
        if part not in ("", [], {}):
            unread.add(f"message key {key!r}", where)
    return message, learnt


def _take(left: dict[str, Any], names: Iterable[str]) -> Any:
    """The value of the first of ``names`` there is, taken out; the others of the same value too."""
    found = None
    for name in names:
        if name in left and (found is None or left[name] == found):
            found = left.pop(name)
    return found


def _learnt(left: dict[str, Any], role: str, what: str) -> bool:
    """Whether a turn's weight lets it be learnt; what asks to learn other turns than the assistant's is left unread."""
    learnt = True
    for name in [name for name in WEIGHTS if name in left]:
        if isinstance(left[name], str) or left[name] not in (0, 1):
            raise DataError(f"{what} has the {name} {left[name]!r}: it is 1 where a turn is learnt and 0 where not.")
        if role == "assistant" or not left[name]:
            learnt &= bool(left.pop(name))
    return learnt


def _listed(value: Any) -> Sequence[Any]:
    value = structured(value)
    return value if isinstance(value, list) else [value]


def _call(value: Any, what: str) -> dict[str, Any]:
    """One call of a function, its arguments as an object: templates write text as text, in quotes."""
    value = structured(value)
    function = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f"{what}: a tool call must name a function and its arguments, not {str(value)[:60]!r}.")
    arguments = structured(function.get("arguments") or function.get("parameters") or {})
    if not isinstance(arguments, dict):
        raise DataError(
            f"{what}: the arguments of {function['name']} must be an object, or one as JSON, not {str(arguments)[:60]!r}."
        )
    link = {"id": value["id"]} if value.get("id") else {}
    return {"type": "function", **link, "function": {"name": function["name"], "arguments": arguments}}


def _part(part: Any, what: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and part.get("type") in PARTS and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, dict) else part
    raise DataError(f"{what} must be text; it has a part {str(kind)[:60]!r}, and only text is read.")
