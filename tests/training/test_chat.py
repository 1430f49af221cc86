"""Conversations as tokens: exactly what the assistant says, its end-of-turn mark included, is learnt."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from smidgen.bases.packaged.debug import CHATML, word_tokenizer
from smidgen.errors import DataError
from smidgen.tasks.data.chat import APART, encode, encode_conversations, read_template
from smidgen.tasks.data.conversations import Conversation, read_conversations
from smidgen.tasks.data.messages import Places
from smidgen.tasks.instruction import recipe as instruction
from smidgen.tasks.instruction.task import IGNORED, InstructionTask

TWO = [
    ("system", "the day"),
    ("user", "what is 1 ?"),
    ("assistant", "1 is 1 ."),
    ("user", "and 2 ?"),
    ("assistant", "2 ."),
]
MARKED = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}\n"
    "{% else %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
)
BARE = "{% for m in messages %}{{ m['role'] + '\n' + m['content'] + '\n' }}{% endfor %}"  # no prompt, no mark
INST = (  # a template that knows no generation prompt and joins user and answer
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] + '<|im_end|>' }}"
    "{% else %}{{ 'what ' + m['content'] + ' is ' }}{% endif %}{% endfor %}"
)
THINKING = CHATML.replace("'<|im_start|>assistant\\n'", "'<|im_start|>assistant\\nwarm '")
FORGETFUL = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% if loop.last or m['role'] != 'assistant' %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
)


def conversation(turns=TWO, raw=False):
    return Conversation(tuple({"role": role, "content": content} for role, content in turns), raw, "row 1")


def learnt(template, turns=TWO):
    tokenizer = word_tokenizer(template)
    (spoken,) = encode(tokenizer, conversation(turns))
    words = tokenizer.convert_ids_to_tokens(spoken.ids)
    return words, [word for word, target in zip(words, spoken.target, strict=True) if target]


SAID = ["1", "is", "1", ".", "<|im_end|>", "2", ".", "<|im_end|>"]


@pytest.mark.parametrize("template", [CHATML, MARKED, INST, THINKING], ids=["chatml", "marked", "inst", "thinking"])
def test_exactly_the_assistants_tokens_are_targets(template):
    words, targets = learnt(template)
    assert targets == SAID
    assert words.count("<|im_end|>") > 2 or template == INST  # the user's turns end the same way and are no targets


def test_without_an_end_mark_the_line_end_is_learnt():
    prompted = BARE + "{% if add_generation_prompt %}{{ 'assistant\\n' }}{% endif %}"
    assert learnt(prompted)[1] == ["1", "is", "1", ".", "\n", "2", ".", "\n"]
    # nobody writes the head of its turn when the template has no generation prompt: the model must
    assert learnt(BARE)[1] == ["assistant", "\n", "1", "is", "1", ".", "\n", "assistant", "\n", "2", ".", "\n"]


def test_the_first_turn_may_be_the_assistants():
    assert learnt(CHATML, [("assistant", "good day"), ("user", "what ?")])[1][-3:] == ["good", "day", "<|im_end|>"]


def test_a_template_that_rewrites_earlier_turns_gives_an_example_for_each():
    tokenizer = word_tokenizer(FORGETFUL)
    remarks = Places()
    found = encode(tokenizer, conversation(), remarks)
    assert [spoken.where for spoken in found] == ["row 1 turn 3", "row 1 turn 5"]
    assert {spoken.source for spoken in found} == {"row 1"} and list(remarks.found) == [APART]


def test_a_template_that_refuses_a_conversation():
    with pytest.raises(DataError, match=r"row 1: the chat template refuses it: roles must alternate"):
        learnt("{{ raise_exception('roles must alternate') }}")


def test_a_completion_is_learnt_with_its_end():
    tokenizer = word_tokenizer(CHATML)
    (spoken,) = encode(tokenizer, conversation([("user", "the day was "), ("assistant", "good .")], raw=True))
    words = tokenizer.convert_ids_to_tokens(spoken.ids)
    assert words == ["the", "day", "was", "good", ".", "<|im_end|>"] and spoken.target == [False] * 3 + [True] * 3


def test_what_is_cut_or_lost_is_counted():
    tokenizer = word_tokenizer(CHATML)
    long = replace(conversation([("user", "what " * 30), ("assistant", "1 .")]), where="row 2")
    found, warnings = encode_conversations(tokenizer, {"train": [conversation(), long]}, 24)
    assert [spoken.where for spoken in found["train"]] == ["row 1"] and len(found["train"][0].ids) == 24
    assert "2 train conversations longer than 24 tokens and cut there: row 1, row 2." in warnings
    assert "1 train conversation without any answer left after the cut, left out: row 2." in warnings
    with pytest.raises(
        DataError, match=r"Every one of the 1 conversations of train is masked.*alone has 38.*--max-length"
    ):
        encode_conversations(tokenizer, {"train": [long]}, 24)


def test_a_tokenizer_without_a_template_says_what_to_do(tmp_path):
    tokenizer = word_tokenizer()
    with pytest.raises(DataError, match=r"no chat template.*--chat-template"):
        encode_conversations(tokenizer, {"train": [conversation()]}, 64)
    raw = conversation([("user", "the day was "), ("assistant", "good .")], raw=True)
    assert encode_conversations(tokenizer, {"train": [raw]}, 64)[0]["train"][0].targets == 2
    (tmp_path / "t.jinja").write_text(CHATML)
    assert read_template(tmp_path / "t.jinja") == CHATML
    with pytest.raises(DataError, match=r"chat template .*nothing.* cannot be read"):
        read_template(tmp_path / "nothing")


# ---- reading ---------------------------------------------------------------------------------------------------------


def written(tmp_path, rows):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "a.jsonl"


def read(tmp_path, rows):
    return read_conversations(written(tmp_path, rows), 0.1)


def test_the_three_layouts(tmp_path):
    chat = [
        {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "a"}]} for n in range(9)
    ]
    alpaca = [{"instruction": f"q{n}", "input": "", "output": "a"} for n in range(9)]
    completion = [{"prompt": f"q{n}", "completion": "a"} for n in range(9)]
    chats = [{"prompt": row["messages"][:1], "completion": row["messages"][1:]} for row in chat]
    for rows, raw in ((chat, False), (alpaca, False), (completion, True), (chats, False)):
        found = read(tmp_path, rows).splits
        assert [len(found[name]) for name in ("train", "validation", "test")] == [7, 1, 1]
        assert {c.messages[0]["content"] for some in found.values() for c in some} == {f"q{n}" for n in range(9)}
        assert all(c.raw is raw and c.messages[1] == {"role": "assistant", "content": "a"} for c in found["train"])
    given = [row | {"input": "here"} for row in alpaca]
    assert read(tmp_path, given).splits["train"][0].messages[0]["content"].endswith("\n\nhere")


def test_parts_of_text_are_joined(tmp_path):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    rows = [
        {"messages": [{"role": "user", "content": f"{n}"}, {"role": "assistant", "content": parts}]} for n in range(9)
    ]
    assert read(tmp_path, rows).splits["train"][0].messages[1]["content"] == "ab"


def test_rows_without_an_answer_are_counted(tmp_path):
    rows = [{"instruction": f"q{n}", "output": "a" if n else " "} for n in range(9)]
    (warning,) = read(tmp_path, rows).warnings
    assert warning == "1 train row without an assistant turn or an answer, left out: a.jsonl row 1."
    with pytest.raises(DataError, match=r"No row of train holds an assistant turn"):
        read(tmp_path, [{"messages": [{"role": "user", "content": "q"}]}])


@pytest.mark.parametrize("row, message", [
    ({"message": []}, "columns message; conversations need one of: messages; .*instruction, output.*Did you mean 'messages'"),
    ({"messages": "hello"}, "a.jsonl row 1: messages must be a list of objects with role and content"),
    ({"messages": [{"role": "user"}]}, "message 1 must have role and content"),
    ({"messages": [{"role": "asistant", "content": "x"}]}, "role 'asistant'. Did you mean 'assistant'"),
    ({"messages": [{"role": "user", "content": 3}]}, "message 1 must be text, not '3'"),
    ({"instruction": None, "output": "x"}, "instruction must be text, not 'None'"),
])  # fmt: skip
def test_rows_that_are_wrong(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        read(tmp_path, [row])


# ---- the task --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared():
    return instruction.prepare(instruction.PRESETS["debug"])


def test_the_loss_is_the_mean_over_target_tokens(prepared):
    model, task = prepared.model.eval(), prepared.task
    batch = task.batch(2)
    labels = batch["labels"][:, 1:]
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    by_hand = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), ignore_index=IGNORED)
    torch.testing.assert_close(task.loss(model, batch), by_hand, rtol=1e-5, atol=1e-6)
    assert batch["weight"] == float((labels != IGNORED).sum())
    unselected = replace(task, selects=False)
    torch.testing.assert_close(unselected.loss(model, batch), by_hand, rtol=1e-5, atol=1e-6)


def test_scores_do_not_depend_on_the_batch_size(prepared):
    task = prepared.task
    one, all_ = replace(task, eval_batch_size=1), replace(task, eval_batch_size=64)
    first, second = one.evaluate_split(prepared.model, "test"), all_.evaluate_split(prepared.model, "test")
    assert first == pytest.approx(second, rel=1e-4)
    total = sum(spoken.targets for spoken in task.splits["test"])
    assert len(task.predict(prepared.model, "test")) == total
    assert first["perplexity"] == pytest.approx(2.718281828 ** first["nll"], rel=1e-4)


def test_padding_is_never_a_target():
    from smidgen.tasks.data.chat import Spoken

    rows = [
        Spoken([5, 6, 7], [False, True, True], where="a"),
        Spoken([5, 6, 7, 8, 9], [False, False, False, False, True], where="b"),
    ]
    batch = InstructionTask({"train": rows, "validation": rows}, pad=0, batch_size=2).batch(0)
    order = sorted(zip(batch["names"], batch["labels"].tolist(), batch["attention_mask"].tolist(), strict=True))
    assert order[0] == ("a", [-100, 6, 7, -100, -100], [1, 1, 1, 0, 0])
    assert order[1] == ("b", [-100, -100, -100, -100, 9], [1, 1, 1, 1, 1]) and batch["weight"] == 3.0
