"""OpenAI's client, unmodified, against a library of several bases and methods."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from smidgen.serving.library import Library
from smidgen.serving.requests import ClassifyRequest, EmbedRequest, ImageRequest, TextRequest
from smidgen.tasks.chatting import Chat

from ..helpers import METHODS
from .served import FACES, MOODS, TALKERS

QUESTION = [{"role": "user", "content": "what is 3 plus 4 ?"}]
SPEAKERS = [*TALKERS, "debug-chat"]


@pytest.fixture(scope="module")
def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def chat(client: openai.OpenAI, model: str, **options: Any) -> Any:
    options = {"max_tokens": 12, "temperature": 0, "messages": QUESTION} | options
    return client.chat.completions.create(model=model, **options)


def pixels(encoded: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))), dtype=np.float64) / 255


def test_models_are_the_adapters_and_the_bases(client: openai.OpenAI, library: Library) -> None:
    models = {model.id: model for model in client.models.list()}
    assert set(models) == {*SPEAKERS, *FACES, *MOODS, "debug-text", "embedded"}
    one = client.models.retrieve("talk/lora")
    assert one.parent == "debug-chat" and one.fingerprint == library.info("talk/lora").fingerprint  # type: ignore[attr-defined]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("talk/lorra")


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_answers_as_alone_on_its_base(client: openai.OpenAI, folder: Path, method: str) -> None:
    alone = Chat(folder / "talk" / method, max_new_tokens=12).say(QUESTION[0]["content"])
    assert chat(client, f"talk/{method}").choices[0].message.content.strip() == alone


def test_every_answer_says_who_gave_it(client: openai.OpenAI, library: Library) -> None:
    raw = client.chat.completions.with_raw_response.create(model="talk/svfit", messages=QUESTION, max_tokens=3)  # type: ignore[arg-type]
    fingerprint = library.info("talk/svfit").fingerprint
    assert raw.headers["x-smidgen-adapter"] == "talk/svfit" and raw.headers["x-smidgen-fingerprint"] == fingerprint
    assert raw.parse().system_fingerprint == fingerprint and raw.headers["x-request-id"]
    raw = client.chat.completions.with_raw_response.create(model="debug-chat", messages=QUESTION, max_tokens=3)  # type: ignore[arg-type]
    assert raw.headers["x-smidgen-adapter"] == "debug-chat" and raw.headers["x-smidgen-fingerprint"]


def test_an_unknown_adapter_is_never_the_base(client: openai.OpenAI) -> None:
    for name in ("talk/lorra", "Talk/Lora", "talk", "nobody", "../talk/lora", "talk/lora/", "a\0b", "é"):
        with pytest.raises(openai.NotFoundError) as error:
            chat(client, name)
        assert error.value.code == "model_not_found", name
    with pytest.raises(openai.NotFoundError, match="Did you mean 'talk/lora'"):
        chat(client, "talk/lorra", stream=True)


def test_a_stream_is_the_answer_in_pieces(client: openai.OpenAI) -> None:
    for options in ({"temperature": 0}, {"temperature": 1.5, "seed": 7}):
        whole = chat(client, "talk/tlora", **options)
        chunks = list(chat(client, "talk/tlora", stream=True, stream_options={"include_usage": True}, **options))
        told = [chunk.choices[0] for chunk in chunks if chunk.choices]
        assert told[0].delta.role == "assistant" and sum(bool(one.delta.content) for one in told) > 1
        assert "".join(one.delta.content or "" for one in told) == whole.choices[0].message.content
        assert told[-1].finish_reason == whole.choices[0].finish_reason and chunks[-1].usage == whole.usage
        assert {chunk.system_fingerprint for chunk in chunks} == {whole.system_fingerprint}


def test_completions_with_several_prompts_and_answers(client: openai.OpenAI, library: Library) -> None:
    prompts = ["what is 1 plus", "the film was"]
    answer = client.completions.create(
        model="talk/loldu", prompt=prompts, n=2, seed=5, temperature=1.0, max_tokens=6, stop=["."]
    )
    wanted = [
        library.generate(TextRequest("talk/loldu", prompt, 6, 1.0, 1.0, seed, (".",))).result(60).text
        for prompt in prompts
        for seed in (5, 6)
    ]
    assert [choice.text for choice in answer.choices] == wanted
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3] and answer.usage.total_tokens > 8
    pieces: dict[int, str] = {}
    for chunk in client.completions.create(
        model="talk/loldu", prompt=prompts, n=2, seed=5, temperature=1.0, max_tokens=6, stop=".", stream=True
    ):
        for choice in chunk.choices:
            pieces[choice.index] = pieces.get(choice.index, "") + choice.text
    assert [pieces[number] for number in range(4)] == wanted


def test_a_mix_of_everything_at_once_equals_each_alone(address: str, client: openai.OpenAI, library: Library) -> None:
    """Six methods and the base, greedy and sampled, whole and streamed; images; classes: all in flight together."""
    texts = [(name, seed) for name in SPEAKERS for seed in (None, 1, 2)]
    pictures = [(name, seed) for name in (*FACES, "embedded") for seed in (1, 2)]

    def options(seed: int | None) -> dict[str, Any]:
        return {"temperature": 0.0} if seed is None else {"temperature": 1.3, "top_p": 0.9, "seed": seed}

    alone = [chat(client, name, **options(seed)).choices[0].message.content for name, seed in texts]
    drawn = [
        np.asarray(library.draw(ImageRequest(name, "a portrait", seed=seed, steps=2)).result(60).image) / 255
        for name, seed in pictures
    ]
    sorted_ = [library.classify(ClassifyRequest(name, "the film was good")).result(60) for name in MOODS]
    assert len(set(alone)) > len(SPEAKERS) and sorted_[0].logits != sorted_[1].logits

    async def mixed() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as many:

            async def say(name: str, seed: int | None, stream: bool) -> str:
                answer = await many.chat.completions.create(
                    model=name, messages=QUESTION, max_tokens=12, stream=stream, **options(seed)
                )  # type: ignore[call-overload]
                if not stream:
                    return answer.choices[0].message.content
                return "".join([chunk.choices[0].delta.content or "" async for chunk in answer])

            async def show(name: str, seed: int) -> str:
                answer = await many.images.generate(
                    model=name, prompt="a portrait", response_format="b64_json", extra_body={"seed": seed, "steps": 2}
                )
                return answer.data[0].b64_json

            async def sort(name: str) -> Any:
                return await many.post("/classify", body={"model": name, "input": "the film was good"}, cast_to=object)

            tasks = [say(name, seed, number % 2 == 0) for number, (name, seed) in enumerate(texts)]
            return await asyncio.gather(*tasks, *(show(*one) for one in pictures), *(sort(name) for name in MOODS))

    found = asyncio.run(mixed())
    assert found[: len(texts)] == alone
    for encoded, wanted in zip(found[len(texts) :], drawn, strict=False):
        assert np.abs(pixels(encoded) - wanted).max() <= 1 / 255 + 1e-9  # a rounding to 8 bits
        assert np.abs(pixels(encoded) - wanted).mean() < 1e-4
    for answer, wanted in zip(found[-len(MOODS) :], sorted_, strict=True):
        assert answer["data"][0]["label"] == wanted.answer
        assert answer["data"][0]["probabilities"] == pytest.approx(dict(wanted.probabilities), abs=1e-5)


def test_adapters_with_weights(client: openai.OpenAI, library: Library) -> None:
    both = {"talk/lora": 0.5, "talk/svfit": -1.5}
    raw = client.chat.completions.with_raw_response.create(
        model="talk/lora", messages=QUESTION, max_tokens=12, temperature=0, extra_body={"adapters": both}
    )  # type: ignore[arg-type]
    wanted = library.generate(TextRequest(both, QUESTION, 12)).result(60)
    assert raw.parse().choices[0].message.content == wanted.text
    assert raw.headers["x-smidgen-adapter"] == "talk/lora=0.5, talk/svfit=-1.5"
    with pytest.raises(openai.BadRequestError, match="adapters has no 'talk/lora'"):
        chat(client, "talk/lora", extra_body={"adapters": {"talk/svfit": 1.0}})


def test_images(client: openai.OpenAI, library: Library) -> None:
    def answer(**more: Any) -> Any:
        return client.images.generate(model="face-1", prompt="a portrait", extra_body={"seed": 3, "steps": 3}, **more)

    found = answer(n=2)
    for number, one in enumerate(found.data):
        wanted = library.draw(ImageRequest("face-1", "a portrait", seed=3 + number, steps=3)).result(60).image
        assert np.abs(pixels(one.b64_json) - np.asarray(wanted) / 255).max() <= 1 / 255 + 1e-9
    assert (pixels(found.data[0].b64_json) != pixels(found.data[1].b64_json)).any()
    head, _, encoded = answer(response_format="url").data[0].url.partition(",")
    assert head == "data:image/png;base64"
    assert np.abs(pixels(encoded) - pixels(found.data[0].b64_json)).max() <= 1 / 255 + 1e-9
    text = Image.open(io.BytesIO(base64.b64decode(found.data[0].b64_json))).info
    assert json.loads(text["smidgen"])["adapter"]["fingerprint"] == library.info("face-1").fingerprint
    with pytest.raises(openai.BadRequestError):
        answer(size="1x1")


def test_embeddings(client: openai.OpenAI, library: Library) -> None:
    texts = ["the film was good", "what is 1 plus 2 ?"]
    found = client.embeddings.create(model="talk/lora", input=texts)  # as base64, which the client unpacks
    plain = client.embeddings.create(model="talk/lora", input=texts[0], encoding_format="float").data[0].embedding
    for one, text in zip(found.data, texts, strict=True):
        wanted = library.embed(EmbedRequest("talk/lora", text)).result(60).vector
        assert one.embedding == pytest.approx(wanted, abs=1e-6)
    assert plain == pytest.approx(found.data[0].embedding, abs=1e-6) and found.usage.prompt_tokens > 4


@pytest.mark.parametrize("options, said", [
    ({"temperature": -1}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"n": 1000}, "n: "),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "tool_call_id"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "text"),
    ({"tools": [{"type": "function", "function": {"name": "x"}}]}, "'tools' is not served here"),
    ({"logprobs": True}, "'logprobs' is not served here"),
    ({"presence_penalty": 0.5}, "'presence_penalty' is not served here"),
    ({"extra_body": {"temprature": 1}}, "Did you mean 'temperature'?"),
    ({"response_format": {"type": "json_object"}}, "'response_format' is not served here"),
    ({"messages": [{"role": "user", "content": "good " * 5000}]}, "token"),
    ({"stop": 5}, "stop: Input should be a valid string, or: Input should be a valid list."),
    ({"stop": ["a", 1]}, "stop.1: Input should be a valid string."),
    ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content: Input should be a valid string, or: Input should be a valid list."),
])  # fmt: skip
def test_what_cannot_be_done_is_said(client: openai.OpenAI, options: dict[str, Any], said: str) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        chat(client, "talk/lora", **options)
    assert said in str(error.value) and error.value.type == "invalid_request_error"
    assert "Value error" not in str(error.value) and ".." not in str(error.value)


def test_fields_that_change_nothing_are_taken(client: openai.OpenAI) -> None:
    plain = chat(client, "talk/lora").choices[0].message.content
    more = {"presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {}, "user": "ann", "store": False, "tools": []}
    given = chat(client, "talk/lora", **more, response_format={"type": "text"}, max_completion_tokens=12)
    assert given.choices[0].message.content == plain
    history = [*QUESTION, given.choices[0].message.model_dump(), *QUESTION]  # as programs send answers back
    assert chat(client, "talk/lora", messages=history).choices[0].message.content is not None


def test_a_wrong_kind_of_adapter_is_said(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError):
        chat(client, "face-0")
    with pytest.raises(openai.BadRequestError):
        client.images.generate(model="talk/lora", prompt="a portrait")


def test_who_goes_away_is_not_computed_for(address: str, library: Library) -> None:
    before = library.counters()
    body = {"model": "face-0", "prompt": "a portrait", "seed": 1, "steps": 1000}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{address}/v1/images/generations", json=body, timeout=0.5)
    _idle(library)
    assert library.counters().steps - before.steps < 900

    async def leave() -> None:
        """Reads the first piece of each of several streams, and no more."""
        async with httpx.AsyncClient() as http:
            said = {
                "model": "talk/lora",
                "messages": QUESTION,
                "stream": True,
                "n": 8,
                "max_tokens": 50,
                "temperature": 5,
            }
            async with http.stream("POST", f"{address}/v1/chat/completions", json=said) as answer:
                async for _ in answer.aiter_lines():
                    break

    asyncio.run(leave())
    _idle(library)


def _idle(library: Library, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while (now := library.counters()).active or now.queued:
        assert time.monotonic() < end, now
        time.sleep(0.02)
