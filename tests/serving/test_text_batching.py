"""Row i of a batch of answers is adapter i alone, whoever comes and goes beside it."""

import time
from pathlib import Path

import pytest
import torch

from serving.helpers import CHAT, METHODS, alone, chat_adapter
from smidgen.errors import ConfigError, DataError
from smidgen.serving.library import Library
from smidgen.serving.requests import CancelledRequestError, TextPiece, TextRequest, TextResult

PROMPT = "what is 3 plus 4 ?"
LONG = " ".join(["the film was good and the road was bad ."] * 3)


@pytest.fixture(scope="module")
def library(chats: Path):
    with Library(chats, bases=[CHAT]) as library:
        yield library


def test_six_methods_and_the_base_in_one_batch_say_what_each_says_alone(library: Library, chats: Path) -> None:
    prompts = [PROMPT, LONG, "the", PROMPT + " " + LONG, "good", LONG + " a", PROMPT]
    models = [*METHODS, CHAT]
    requests = [TextRequest(m, p, max_tokens=10) for m, p in zip(models, prompts, strict=True)]
    before = library.counters()
    found = library.generate_all(requests)
    steps = library.counters().steps - before.steps
    assert steps < 30  # they shared batches: one by one it would be 63
    for model, prompt, result in zip(models, prompts, found, strict=True):
        assert result.token_ids == alone(None if model == CHAT else chats / model, prompt, 10), model
        assert [served.name for served in result.adapters] == ([] if model == CHAT else [model])
    assert len({result.token_ids for result in library.generate_all([TextRequest(m, LONG) for m in models])}) > 4


def test_one_prompt_asked_of_an_adapter_and_of_the_base_at_once(chats: Path) -> None:
    with Library(
        chats, bases=[CHAT]
    ) as fresh:  # whose first batch of several is this: it is what the rows are learnt from
        for first in ([LONG] * 2, [PROMPT, LONG]):
            requests = [TextRequest(model, text, 12) for model, text in zip(("svfit", CHAT), first, strict=True)]
            for model, text, result in zip(("svfit", None), first, fresh.generate_all(requests), strict=True):
                assert result.token_ids == alone(model and chats / model, text, 12), model


def test_what_a_seed_draws_does_not_depend_on_the_batch(library: Library) -> None:
    def asked(model: str, seed: int, top_p: float) -> TextRequest:
        return TextRequest(model, LONG, max_tokens=15, temperature=1.3, top_p=top_p, seed=seed)

    some = [asked(model, seed, 0.6 + 0.4 * (seed % 2)) for seed in range(4) for model in ("svfit", "lora", CHAT)]
    single = [library.generate(request).result() for request in some]
    together = library.generate_all([*some, *(TextRequest("oft", PROMPT, 25) for _ in range(5))])[: len(some)]
    assert [one.token_ids for one in single] == [one.token_ids for one in together]
    assert all(len({one.token_ids for one in single[model::3]}) == 4 for model in range(3))
    drawn = library.generate(TextRequest("svfit", LONG, 15, temperature=1.3, seed=None)).result()
    again = library.generate(TextRequest("svfit", LONG, 15, temperature=1.3, seed=drawn.seed)).result()
    assert drawn.token_ids == again.token_ids


def test_requests_join_and_leave_between_tokens(library: Library) -> None:
    """While one answer is long, others come with longer and shorter prompts, and go."""
    requests = [TextRequest("svfit", PROMPT, 60), TextRequest("lora", LONG, 9), TextRequest("tlora", "a", 3)]
    requests += [TextRequest(CHAT, LONG + LONG, 20), TextRequest("loldu", "the song", 31)]
    expected = [library.generate(request).result().token_ids for request in requests]
    first = library.generate(requests[0])
    handles = [first]
    for request in requests[1:]:
        seen = len(first.events())
        while len(first.events()) == seen and not first.done:
            time.sleep(0)
        handles.append(library.generate(request))
    assert [handle.result().token_ids for handle in handles] == expected


def test_a_bank_that_has_become_too_large_waits_for_open_blocks(tmp_path: Path) -> None:
    """Making it smaller moves its members; a batch that is being written would go on with whoever comes to lie there."""
    names = [f"chat-{seed}" for seed in range(4)]
    for seed, name in enumerate(names):
        chat_adapter(tmp_path / name, seed=seed)
    with Library(tmp_path, bases=[CHAT]) as library:
        for name in names[:3]:
            library.load(name)
        (host,) = library._hosts.values()
        assert host.residents is not None
        (bank,) = host.residents._banks.values()
        bank.resize(200)
        library.unload(names[0])  # a free place below the others
        last = bank.names[-1]
        place = bank.index(last)
        with host.residents.rows([[(last, 1.0)]]):
            library.load(names[3])
            assert (bank.size, bank.index(last)) == (200, place)
        library.load(names[0])
        assert bank.size < 50
        for name in names:
            assert library.generate(TextRequest(name, PROMPT, 5)).result().token_ids == alone(
                tmp_path / name, PROMPT, 5
            )


def test_pieces_are_the_text_and_come_before_the_result(library: Library) -> None:
    handle = library.generate(TextRequest("svfit", PROMPT, 12, temperature=1.0, seed=5))
    *pieces, result = list(handle)
    assert isinstance(result, TextResult) and len(pieces) > 3
    assert "".join(piece.text for piece in pieces if isinstance(piece, TextPiece)) == result.text
    assert result.finish_reason == "length" and result.completion_tokens == 12 and result.prompt_tokens == 6
    assert list(handle)[-1] is result  # whoever comes later reads the same


def test_a_stop_text_across_tokens_ends_an_answer(library: Library) -> None:
    whole = library.generate(TextRequest("lora", PROMPT, 30, temperature=1.0, seed=3)).result()
    words = whole.text.split(" ")
    stop = f"{words[2][-2:]} {words[3][:2]}"
    found = library.generate(TextRequest("lora", PROMPT, 30, temperature=1.0, seed=3, stop=("zzz", stop)))
    *pieces, result = list(found)
    assert result.finish_reason == "stop"
    assert result.text == whole.text[: whole.text.index(stop)]
    assert "".join(piece.text for piece in pieces) == result.text


def test_cancelling_ends_with_what_there_was(library: Library) -> None:
    handle = library.generate(TextRequest("svfit", PROMPT, 110, temperature=1.0, seed=1))
    for event in handle:
        if isinstance(event, TextPiece) and event.tokens > 4:
            break
    handle.cancel()
    result = handle.result(20)
    assert result.finish_reason == "cancelled" and 4 < result.completion_tokens < 110
    whole = library.generate(TextRequest("svfit", PROMPT, 110, temperature=1.0, seed=1)).result()
    assert whole.token_ids[: result.completion_tokens] == result.token_ids


def test_one_that_never_began_is_cancelled(chats: Path) -> None:
    with Library(chats, bases=[CHAT], batch=1) as library:
        first = library.generate(TextRequest("svfit", PROMPT, 110))
        second = library.generate(TextRequest("lora", PROMPT, 5))
        second.cancel()
        first.cancel()
        with pytest.raises(CancelledRequestError):
            second.result(20)


def test_conversations_are_written_by_the_template(library: Library) -> None:
    turns = [{"role": "user", "content": PROMPT}]
    found = library.generate(TextRequest("svfit", turns, 5)).result()
    host = library._host(CHAT, "generate", ())
    text = host.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)  # type: ignore[attr-defined]
    assert found.token_ids == library.generate(TextRequest("svfit", text, 5)).result().token_ids


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"prompt": " ".join(["the"] * 400)}, DataError, "tokens long"),
        ({"prompt": [{"role": "user"}]}, DataError, "role and a content"),
        ({"max_tokens": 0}, ConfigError, "max_new_tokens"),
        ({"temperature": -1.0}, ConfigError, "temperature"),
        ({"temperature": "hot"}, ConfigError, "temperature"),
        ({"top_p": 2.0}, ConfigError, "top_p"),
        ({"seed": -1}, ConfigError, "seed"),
        ({"stop": ("",)}, ConfigError, "stop"),
    ],
)
def test_what_cannot_be_meant_is_refused_at_once(library: Library, options: dict, error: type, says: str) -> None:
    with pytest.raises(error, match=says):
        library.generate(TextRequest(**{"model": "svfit", "prompt": PROMPT, **options}))


def test_adapters_add_up_with_weights(library: Library, chats: Path) -> None:
    import smidgen
    from smidgen.bases.transformers import load_language_model, load_tokenizer

    model = load_language_model(CHAT, "no", None).model.eval()
    smidgen.load(model, chats / "svfit", "one")
    smidgen.load(model, chats / "lora", "two")
    smidgen.set_active(model, ["one", "two"])
    smidgen.set_strength(model, {"one": 0.5, "two": 1.5})
    ids = load_tokenizer(CHAT)(LONG, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        said = model.generate(**ids, max_new_tokens=10, do_sample=False)[0, ids["input_ids"].shape[1] :].tolist()
    both, single = library.generate_all(
        [TextRequest({"svfit": 0.5, "lora": 1.5}, LONG, 10), TextRequest("team/ann", LONG, 10)]
    )
    assert both.token_ids == tuple(said) and [served.weight for served in both.adapters] == [0.5, 1.5]
    assert single.token_ids == alone(chats / "team" / "ann", LONG, 10)
