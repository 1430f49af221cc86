"""Conversations as people have them: every layout, tools, thoughts and weights are rendered, masked or counted; and what is
learnt is what generation would say, token for token."""

import csv
import json

import pytest

from smidgen.errors import DataError
from smidgen.tasks.data.chat import encode, encode_conversations
from smidgen.tasks.data.conversations import Conversation, read_conversations
from smidgen.tasks.data.messages import Places, read_messages

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Thoughts only after the last question, an empty one for a last turn without; tools in the system turn, calls and results
# in tags: as Qwen3 does it.
THINKING = """
{%- if tools %}{{ '<|im_start|>system\n' + (messages[0].content + '\n' if messages[0].role == 'system' else '') + (tools | tojson) + '<|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{% endif %}
{%- set ns = namespace(asked=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- elif m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}OPEN
{%- if loop.index0 > ns.asked and (loop.last or m.reasoning_content) %}{{ '<think>\n' + (m.reasoning_content or '').strip() + '\n</think>\n\n' }}{% endif %}
{{- m.content }}
{%- for call in m.tool_calls or [] %}{{ '\n<tool_call>\n' + (call.function | tojson) + '\n</tool_call>' }}{% endfor %}
{{- '<|im_end|>' }}CLOSE{{ '\n' }}
{%- elif m.role == 'tool' %}{{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
QWEN = THINKING.replace("OPEN", "").replace("CLOSE", "")
MARKED = THINKING.replace("OPEN", "{% generation %}").replace("CLOSE", "{% endgeneration %}")
# A generation prompt that opens a thought which finished turns do not have: as DeepSeek-R1 does it.
OPENED = CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n'")
# Another end for the last turn: as gpt-oss does it.
RETURN = CHATML.replace(
    "m['content'] + '<|im_end|>\n'",
    "m['content'] + ('<|return|>' if loop.last and m['role'] == 'assistant' else '<|im_end|>\n')",
)
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML


@pytest.fixture(scope="module")
def speaker():
    """A byte-level tokenizer in which line ends and spaces join what follows: where prompts end, tokens could reach over."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|im_start|>", "<|im_end|>", "<|return|>"],
    )
    tokenizer.train_from_iterator(
        ["assistant\n\n1", "\n\n\n", "user\n", "system\n", " 2 1", "<think>\n\n</think>\n\n1"] * 9, trainer
    )
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>")
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|return|>"]})

    def speak(template):
        made.chat_template = template
        return made

    return speak


def talk(*turns, tools=(), masked=()):
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    messages = tuple(
        {"role": roles[role], "content": content, **(more[0] if more else {})} for role, content, *more in turns
    )
    return Conversation(messages, False, "row 1", tuple(tools), frozenset(masked))


def generated(tokenizer, conversation, at):
    """The tokens of the prompt that generation starts turn ``at`` with, and those it would then have to say."""
    messages, tools = list(conversation.messages), list(conversation.tools) or None
    prompt = tokenizer.apply_chat_template(messages[:at], tools=tools, add_generation_prompt=True, tokenize=False)
    text = tokenizer.apply_chat_template(messages[: at + 1], tools=tools, tokenize=False)
    assert text.startswith(prompt)
    said = text[len(prompt) :].rstrip("\n")
    return tokenizer(prompt)["input_ids"], tokenizer(said)["input_ids"]


CALL = {"tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"town": "Oslo"}}}]}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
TALKS = {
    "one turn": talk(("u", "1"), ("a", "2")),
    "a system": talk(("s", "be brief"), ("u", "1"), ("a", "2"), ("u", "1"), ("a", "2 1")),
    "thoughts": talk(
        ("u", "1"), ("a", "2", {"reasoning_content": "count on"}), ("u", "2"), ("a", "1", {"reasoning_content": "back"})
    ),
    "calls": talk(("u", "w"), ("a", "", CALL), ("t", "12"), ("a", "12 there"), ("u", "1"), ("a", "2"), tools=[TOOL]),
    "line ends and spaces": talk(("u", "1"), ("a", "\n1 2"), ("u", "2"), ("a", " 2 1 \n")),
    "the same again": talk(("u", "2"), ("a", "2"), ("u", "2"), ("a", "2"), ("u", "user"), ("a", "assistant")),
    "a draft": talk(("u", "1"), ("a", "wrong"), ("u", "again"), ("a", "2"), masked=[1]),
    "no answer yet": talk(("u", "1"), ("a", "2"), ("u", "and?")),
}


@pytest.mark.parametrize("template", [CHATML, QWEN, MARKED, RETURN], ids=["chatml", "qwen3", "qwen3 marked", "gpt-oss"])
@pytest.mark.parametrize("name", TALKS)
def test_what_is_learnt_is_what_generation_would_say(speaker, name, template):
    """Every turn to learn, behind the tokens that generation would have read, and nothing else."""
    tokenizer, conversation = speaker(template), TALKS[name]
    if template in (CHATML, RETURN):
        stripped = tuple({k: m[k] for k in ("role", "content")} for m in conversation.messages)
        conversation = Conversation(stripped, False, "row 1", (), conversation.masked)
    found = encode(tokenizer, conversation)
    wanted = [generated(tokenizer, conversation, at) for at in conversation.learnt]
    assert sum(sum(spoken.target) for spoken in found) == sum(len(said) for _, said in wanted)
    for prompt, said in wanted:
        spans = [
            spoken.target[len(prompt) : len(prompt) + len(said)]
            for spoken in found
            if spoken.ids[: len(prompt) + len(said)] == [*prompt, *said]
            and not any(spoken.target[len(prompt) - 1 : len(prompt)])
        ]
        assert [True] * len(said) in spans, tokenizer.decode(prompt)
    rewrites = template in (QWEN, MARKED, RETURN) or name == "line ends and spaces"  # a token over the border of a turn
    assert (len(found) > 1) == (len(conversation.learnt) > 1 and rewrites)


def test_a_prompt_that_opens_a_thought_is_said(speaker):
    remarks = Places()
    (spoken,) = encode(speaker(OPENED), TALKS["a system"], remarks)
    said = [token for token, target in zip(spoken.ids, spoken.target, strict=True) if target]
    assert speaker(OPENED).decode(said) == "2<|im_end|>2 1<|im_end|>"
    assert next(iter(remarks.found)).startswith("whose answers do not go on from the template's generation prompt")


def test_templates_that_take_arguments_as_text(speaker):
    """As DeepSeek-V3's does."""
    joined = CHATML.replace(
        "m['content'] +", "m['content'] + (m.tool_calls[0].function.arguments + '!' if m.tool_calls else '') +"
    )
    (spoken,) = encode(speaker(joined), TALKS["calls"])
    assert '<|im_start|>assistant\n{"town": "Oslo"}!<|im_end|>' in speaker(joined).decode(spoken.ids)


def test_turns_without_an_end_are_said(speaker):
    """As GLM-4.5's are: the next speaker's head ends them."""
    endless = CHATML.replace(" + '<|im_end|>\n'", "")
    remarks = Places()
    encode(speaker(endless), TALKS["one turn"], remarks)
    assert list(remarks.found) == ["whose turns end in no mark that the template writes: to end is not learnt"]


@pytest.mark.parametrize("name, said", [
    ("thoughts", {"whose reasoning the chat template does not write"}),
    ("calls", {"whose tools the chat template does not write",
               "with tool calls that the chat template does not write: those turns are not learnt"}),
    ("a system", set()),
])  # fmt: skip
def test_what_a_template_does_not_write_is_counted(speaker, name, said):
    remarks = Places()
    (spoken,) = encode(speaker(CHATML), TALKS[name], remarks)
    assert set(remarks.found) == said
    if name == "calls":
        learnt = [token for token, target in zip(spoken.ids, spoken.target, strict=True) if target]
        assert speaker(CHATML).decode(learnt) == "12 there<|im_end|>2<|im_end|>"  # no empty turn
    again = Places()
    encode(speaker(QWEN), TALKS[name], again)
    assert not any("does not write" in what for what in again.found)


def test_a_turn_of_nothing_but_thoughts_that_are_not_written_is_not_learnt(speaker):
    thought = talk(("u", "1"), ("a", "", {"reasoning_content": "count on"}), ("a", "2"))
    (spoken,) = encode(speaker(CHATML), thought)
    learnt = [token for token, target in zip(spoken.ids, spoken.target, strict=True) if target]
    assert speaker(CHATML).decode(learnt) == "2<|im_end|>"


def test_a_system_message_that_is_not_written_is_counted(speaker):
    deaf = CHATML.replace("{{ '<|im_start|>'", "{% if m['role'] != 'system' %}{{ '<|im_start|>'").replace(
        "{% endfor %}", "{% endif %}{% endfor %}", 1
    )
    remarks = Places()
    encode(speaker(deaf), TALKS["a system"], remarks)
    assert list(remarks.found) == ["whose system messages the chat template does not write"]
    with pytest.raises(DataError, match="row 1: the chat template refuses it: System role not supported"):
        encode(speaker(STRICT), TALKS["a system"])


def test_a_split_whose_every_turn_is_a_call_that_is_not_written(speaker):
    calls = talk(("u", "w"), ("a", "", CALL), tools=[TOOL])
    with pytest.raises(
        DataError, match=r"Every one of the 1 conversations of train is masked.*tool calls that the chat"
    ):
        encode_conversations(speaker(CHATML), {"train": [calls]}, 64)


# ---- layouts ---------------------------------------------------------------------------------------------------------


def read(tmp_path, rows, name="a.jsonl"):
    if name.endswith(".csv"):
        with open(tmp_path / name, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif name.endswith(".parquet"):
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name)
    else:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_conversations(tmp_path / name, 0.1)
    first = next(c for some in found.splits.values() for c in some if c.where == f"{name} row 1")
    return first, list(found.warnings)


def rows(make, count=9):
    return [make(n) for n in range(count)]


ASKED = ({"role": "user", "content": "q0"}, {"role": "assistant", "content": "a"})


@pytest.mark.parametrize("make, messages", [
    (lambda n: {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "a"}]}, ASKED),
    (lambda n: {"conversations": [{"from": "human", "value": f"q{n}"}, {"from": "gpt", "value": "a"}]}, ASKED),
    (lambda n: {"conversation": [{"role": "user", "content": f"q{n}"}, {"role": "model", "content": "a"}]}, ASKED),
    (lambda n: {"messages": {"role": ["user", "assistant"], "content": [f"q{n}", "a"]}}, ASKED),
    (lambda n: {"instruction": f"q{n}", "input": None, "output": "a", "history": [], "system": ""}, ASKED),
    (lambda n: {"question": f"q{n}", "answer": "a"}, ASKED),
    (lambda n: {"prompt": f"q{n}", "response": "a"}, ASKED),
    (lambda n: {"prompt": [{"role": "user", "content": f"q{n}"}], "completion": "a"}, ASKED),
    (lambda n: {"instruction": f"q{n}", "context": "here", "response": "a"},
     ({"role": "user", "content": "q0\n\nhere"}, ASKED[1])),
    (lambda n: {"system": "Brief.", "instruction": f"q{n}", "output": "a", "history": [["hi", "ho"]]},
     ({"role": "system", "content": "Brief."}, {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}, *ASKED)),
    (lambda n: {"system": "Brief.", "conversations": [{"from": "human", "value": f"q{n}"}, {"from": "gpt", "value": "a"}]},
     ({"role": "system", "content": "Brief."}, *ASKED)),
    (lambda n: {"messages": [{"role": "developer", "content": "Brief."}, *({**m, "content": m["content"].replace("q0", f"q{n}")} for m in ASKED)]},
     ({"role": "system", "content": "Brief."}, *ASKED)),
])  # fmt: skip
def test_layouts(tmp_path, make, messages):
    first, warnings = read(tmp_path, rows(make))
    assert first.messages == messages and not first.raw and not warnings


@pytest.mark.parametrize("write", [json.dumps, str], ids=["json", "python"])
def test_messages_as_text_in_a_table(tmp_path, write):
    first, warnings = read(
        tmp_path,
        rows(lambda n: {"messages": write([ASKED[0] | {"content": f"q{n}"}, ASKED[1]]), "tools": write([TOOL])}),
        "a.csv",
    )
    assert first.messages == ASKED and first.tools == (TOOL,) and not warnings


def test_keys_that_parquet_fills_with_nothing_are_no_keys(tmp_path):
    first, warnings = read(tmp_path, rows(lambda n: {"messages": [
        {"role": "user", "content": f"q{n}", "weight": None},
        {"role": "assistant", "content": "draft", "weight": 0},
        {"role": "assistant", "content": "a", "weight": 1},
    ]}), "a.parquet")  # fmt: skip
    assert first.messages == (ASKED[0], {"role": "assistant", "content": "draft"}, ASKED[1])
    assert first.learnt == [2] and not warnings


@pytest.mark.parametrize("call", [
    {"tool_calls": [{"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"town": "Oslo"}'}}]},
    {"tool_calls": [{"name": "weather", "arguments": {"town": "Oslo"}}]},
    {"tool_calls": '[{"name": "weather", "arguments": {"town": "Oslo"}}]'},
    {"function_call": {"name": "weather", "arguments": '{"town": "Oslo"}'}},
    {"from": "function_call", "value": '{"name": "weather", "arguments": {"town": "Oslo"}}'},
])  # fmt: skip
def test_calls_of_tools_in_any_form(call):
    message = call if "from" in call else {"role": "assistant", "content": None, **call}
    (found,), masked = read_messages([message], "row 1", Places())
    assert found["role"] == "assistant" and found["content"] == "" and not masked
    assert found["tool_calls"][0]["function"] == CALL["tool_calls"][0]["function"]


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_by_any_name(speaker, key):
    messages, _ = read_messages([ASKED[0], ASKED[1] | {key: "count on"}], "row 1", Places())
    (spoken,) = encode(speaker(QWEN), Conversation(messages, False, "row 1"))
    assert "<think>\ncount on\n</think>\n\na" in speaker(QWEN).decode(spoken.ids)


@pytest.mark.parametrize("key, value", [("weight", 0), ("train", False), ("loss", False), ("weight", 0.0)])
def test_turns_that_are_not_to_be_learnt(key, value):
    messages, masked = read_messages(
        [ASKED[0], ASKED[1] | {key: value}, ASKED[0], ASKED[1] | {key: 1}], "row 1", Places()
    )
    assert masked == {1} and Conversation(messages, False, "row 1", (), masked).learnt == [3]


def test_columns_and_keys_that_are_not_read_are_counted(tmp_path):
    def make(n):
        return {"id": n, "messages": [ASKED[0] | {"content": f"q{n}", "mood": "warm"}, ASKED[1]], "note": ""}

    _, warnings = read(tmp_path, rows(make, 3))
    assert warnings == [
        "3 train rows whose column 'id' is not read: a.jsonl row 1, a.jsonl row 2, a.jsonl row 3.",
        "3 train rows whose message key 'mood' is not read: a.jsonl row 1, a.jsonl row 2, a.jsonl row 3.",
    ]
    _, warnings = read(tmp_path, rows(lambda n: {"prompt": f"q{n}", "completion": "a", "tools": [TOOL]}, 3))
    assert warnings[0].startswith("3 train rows whose column 'tools' is not read")

    def make(n):
        return {
            "system": "x",
            "messages": [{"role": "system", "content": "y"}, ASKED[0] | {"content": f"q{n}"}, ASKED[1]],
        }

    _, warnings = read(tmp_path, rows(make, 3))
    assert warnings[0].startswith("3 train rows whose column 'system' is not read")
    _, warnings = read(
        tmp_path, rows(lambda n: {"messages": [ASKED[0] | {"content": f"q{n}", "weight": 1}, ASKED[1]]}, 3)
    )
    assert warnings[0].startswith("3 train rows whose message key 'weight' is not read")


def test_turns_that_say_nothing_are_not_learnt(tmp_path):
    def make(n):
        return {"messages": [ASKED[0] | {"content": f"q{n}"}, {"role": "assistant", "content": None}, *ASKED]}

    first, warnings = read(tmp_path, rows(make, 3))
    assert first.learnt == [3]
    assert warnings == [
        "3 train rows with an assistant turn that says nothing, shown but not learnt: a.jsonl row 1, a.jsonl row 2, a.jsonl row 3."
    ]

    def make(n):
        return {"messages": [ASKED[0] | {"content": f"q{n}"}, ASKED[1] | {"weight": n % 2}]}

    (tmp_path / "b.jsonl").write_text("".join(json.dumps(make(n)) + "\n" for n in range(8)))
    found = read_conversations(tmp_path / "b.jsonl", 0.1)
    assert sum(map(len, found.splits.values())) == 4 and found.warnings[0].startswith(
        "4 train rows without an assistant turn"
    )


@pytest.mark.parametrize("message, said", [
    ({"role": "user", "content": None}, "message 1 has no content: a user says something"),
    ({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, "message 1 must be text; it has a part 'image_url'"),
    ({"role": "assistant", "content": "x", "weight": 0.5}, "message 1 has the weight 0.5: it is 1 where a turn is learnt"),
    ({"role": "assistant", "content": "x", "weight": "0"}, "message 1 has the weight '0'"),
    ({"role": "assistant", "tool_calls": [{"function": {"arguments": {}}}]}, "a tool call must name a function"),
    ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{broken"}]}, "the arguments of f must be an object"),
    ({"from": "humann", "value": "x"}, "role 'humann'. Did you mean 'human'"),
])  # fmt: skip
def test_messages_that_are_wrong(message, said):
    with pytest.raises(DataError, match=f"row 7: {said}" if said.startswith("message") else said):
        read_messages([message], "row 7", Places())


@pytest.mark.parametrize("row, said", [
    ({"instruction": "q", "output": "a", "history": [["one"]]}, "a.jsonl row 1: history must be a list of pairs"),
    ({"messages": [*ASKED], "tools": "weather"}, "a.jsonl row 1: tools must be a list of objects"),
])  # fmt: skip
def test_rows_that_are_wrong(tmp_path, row, said):
    with pytest.raises(DataError, match=said):
        read(tmp_path, [row])
