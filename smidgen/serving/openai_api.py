"""OpenAI's API over a library: an adapter is a model. What this server cannot do it refuses, and never leaves out in silence."""

from __future__ import annotations

import base64
import json
import re
import secrets
import struct
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError
from starlette.concurrency import run_in_threadpool

from smidgen.errors import did_you_mean
from smidgen.serving.answers import ErrorAnswer, Refusal, as_refusal, error_body
from smidgen.serving.following import EventStream, events, results
from smidgen.serving.handles import Handle
from smidgen.serving.requests import (
    AdapterInfo,
    BaseInfo,
    ClassifyRequest,
    EmbedRequest,
    ImageRequest,
    ImageResult,
    Model,
    TextPiece,
    TextRequest,
    TextResult,
)
from smidgen.serving.service import Asker, Service, The, adapter_header, fingerprint
from smidgen.tasks.png import png_bytes

ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorAnswer, "description": "The request is refused."},
    "5XX": {"model": ErrorAnswer, "description": "The server cannot answer."},
}
NO_MATTER = (  # fields of OpenAI's that change nothing of the answer
    "user", "metadata", "store", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "service_tier",
    "parallel_tool_calls", "background", "moderation", "quality",
)  # fmt: skip
AS_HERE = {  # other fields of OpenAI's, and what they may say: what is done here anyway
    "tool_choice": ("auto", "none"), "response_format": ({"type": "text"},), "modalities": (["text"],), "best_of": (1,),
    "top_k": (-1,), "repetition_penalty": (1, 1.0), "output_format": ("png",),
}  # fmt: skip
SIZE = r"^(auto|[1-9]\d{0,4}x[1-9]\d{0,4})$"
Name = Annotated[str, Field(min_length=1, max_length=512, description="An adapter, or a base.")]
Text = Annotated[str, Field(max_length=2**20)]
Seed = Annotated[int | None, Field(ge=0, lt=2**63, description="The same seed gives the same answer; none: by chance.")]
Weights = Annotated[
    dict[str, float] | None,
    Field(
        min_length=1, max_length=16, description="Weights of the model's adapter, and of others that add up with it."
    ),
]


class Asked(BaseModel):
    """A request. Fields that are not served may be there at the value that changes nothing."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _known(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        kept = {}
        for name, value in given.items():
            if name in cls.model_fields:
                if value is not None:
                    kept[name] = value
            elif name not in NO_MATTER and value not in (None, False, 0, "", [], {}, *AS_HERE.get(name, ())):
                near = did_you_mean(name[:100], cls.model_fields)
                told = {"field": name[:100], "near": near}
                raise PydanticCustomError("not_served", "'{field}' is not served here.{near}", told)
        return kept


class Part(BaseModel):
    """A part of a message."""

    type: Literal["text"]
    text: Text


class Message(Asked):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Part]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """As chat templates read it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(Asked):
    """How an answer is streamed."""

    include_usage: bool = False


class Sampling(Asked):
    """How text is drawn."""

    model: Name
    adapters: Weights = None
    max_tokens: Annotated[int | None, Field(ge=1, le=10**6, description="None: as many as the model has room for.")] = (
        None
    )
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Seed = None
    stop: Annotated[str, Field(max_length=1000)] | list[Annotated[str, Field(max_length=1000)]] = []
    n: Annotated[int, Field(ge=1, le=64)] = 1
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    def questions(self, model: Model, prompts: Sequence[str | list[dict[str, str]]]) -> list[TextRequest]:
        """``n`` requests for each prompt, with seeds one after the other."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        return [
            TextRequest(
                model, prompt, self.max_tokens, self.temperature, self.top_p,
                None if self.seed is None else (self.seed + number) % 2**63, tuple(filter(None, stop)),
            )
            for prompt in prompts
            for number in range(self.n)
        ]  # fmt: skip


class ChatRequest(Sampling):
    """A conversation to go on with."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=10_000)]
    max_completion_tokens: Annotated[int | None, Field(ge=1, le=10**6)] = None


class CompletionRequest(Sampling):
    """A text to go on from."""

    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=64)]


def _size(given: str) -> str:
    if not re.fullmatch(SIZE, given):
        raise PydanticCustomError("no_size", "Input should be auto, or width x height such as 512x512")
    return given


class ImagesRequest(Asked):
    """Images to draw."""

    model: Name
    prompt: Text
    adapters: Weights = None
    n: Annotated[int, Field(ge=1, le=64)] = 1
    size: Annotated[str, AfterValidator(_size), Field(json_schema_extra={"pattern": SIZE})] = "auto"
    response_format: Annotated[
        Literal["b64_json", "url"], Field(description="b64_json, or a data: URL that holds the image.")
    ] = "b64_json"
    seed: Seed = None
    negative_prompt: Text = ""
    steps: Annotated[int | None, Field(ge=1, le=1000)] = None
    guidance: Annotated[float | None, Field(ge=-1000, le=1000)] = None

    def questions(self, model: Model, most: int) -> list[ImageRequest]:
        """``n`` requests with seeds one after the other, for images of at most ``most`` pixels."""
        width, _, height = self.size.partition("x")
        size = None if self.size == "auto" else (int(width), int(height))
        if size is not None and size[0] * size[1] > most:
            raise Refusal(400, f"An image of {self.size} has more than the {most:,} pixels of this server.", "size")
        seeds = [None if self.seed is None else (self.seed + number) % 2**63 for number in range(self.n)]
        return [
            ImageRequest(model, self.prompt, self.negative_prompt, seed, self.steps, self.guidance, size)
            for seed in seeds
        ]


class EmbeddingsRequest(Asked):
    """Texts to embed."""

    model: Name
    input: Text | Annotated[list[Text], Field(min_length=1, max_length=2048)]
    adapters: Weights = None
    encoding_format: Literal["float", "base64"] = "float"


class ClassifyBody(Asked):
    """Texts to sort."""

    model: Name
    input: Text | Annotated[list[Text], Field(min_length=1, max_length=2048)]
    adapters: Weights = None


class Listed(BaseModel):
    """A model: an adapter, or a base (which has no parent)."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "smidgen"
    parent: str | None = None
    fingerprint: str = ""


class Models(BaseModel):
    """The models that this key may use."""

    object: Literal["list"] = "list"
    data: list[Listed]


router = APIRouter(responses=ERRORS)


# ---- text ------------------------------------------------------------------------------------------------------------


@router.post("/v1/chat/completions", summary="Go on with a conversation")
async def chat(body: ChatRequest, request: Request, service: The, key: Asker) -> Response:
    body.max_tokens = body.max_completion_tokens or body.max_tokens
    prompt = [message.plain() for message in body.messages]

    def choice(index: int, text: str | None, reason: str | None, whole: bool) -> dict[str, Any]:
        said = {"role": "assistant"} if whole or text is None else {}
        said |= {"content": text or ""} if whole or reason is None else {}
        return {"index": index, "message" if whole else "delta": said, "logprobs": None, "finish_reason": reason}

    return await _text(service, request, key, body, [prompt], "chat.completion", choice)


@router.post("/v1/completions", summary="Go on from a text")
async def complete(body: CompletionRequest, request: Request, service: The, key: Asker) -> Response:
    prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt

    def choice(index: int, text: str | None, reason: str | None, whole: bool) -> dict[str, Any]:
        return {"index": index, "text": text or "", "logprobs": None, "finish_reason": reason}

    return await _text(service, request, key, body, prompts, "text_completion", choice)


Choice = Callable[[int, str | None, str | None, bool], dict[str, Any]]  # number, text, why it ended, whole


async def _text(
    service: Service,
    request: Request,
    key: Asker,
    body: Sampling,
    prompts: Sequence[Any],
    kind: str,
    choice: Choice,
) -> Response:
    _note(service, request, prompt=prompts)
    model = await service.model(key, body.model, body.adapters)
    handles = await service.ask(request, service.library.generate, body.questions(model, prompts))
    adapters = handles[0].adapters
    head = {
        "id": f"{'chatcmpl' if kind.startswith('chat') else 'cmpl'}-{secrets.token_hex(12)}",
        "object": kind,
        "created": int(time.time()),
        "model": body.model,
        "system_fingerprint": fingerprint(adapters) or None,
    }
    headers = service.headers(model, adapters)
    if body.stream:
        head["object"] = "chat.completion.chunk" if kind.startswith("chat") else kind
        return EventStream(_stream(service, request, body, handles, head, choice), handles, headers)
    found: list[TextResult] = await results(request, handles, service.settings.request_seconds)
    choices = [choice(number, one.text, one.finish_reason, True) for number, one in enumerate(found)]
    told = _usage(found, body.n)
    request.state.facts |= {"tokens": told["completion_tokens"]}
    _note(service, request, answer=[one.text for one in found])
    return JSONResponse({**head, "choices": choices, "usage": told}, headers=headers)


async def _stream(
    service: Service,
    request: Request,
    body: Sampling,
    handles: Sequence[Handle[TextResult]],
    head: dict[str, Any],
    choice: Choice,
) -> AsyncIterator[str]:
    """Chunks of all answers as they come; an error ends them in words."""
    more = {"usage": None} if body.stream_options.include_usage else {}
    found: dict[int, TextResult] = {}
    try:
        for number in range(len(handles) if head["object"].startswith("chat") else 0):
            yield _line({**head, "choices": [choice(number, None, None, False)], **more})
        async for number, event in events(handles, service.settings.request_seconds):
            if isinstance(event, TextPiece) and event.text:
                yield _line({**head, "choices": [choice(number, event.text, None, False)], **more})
            elif isinstance(event, TextResult):
                found[number] = event
                yield _line({**head, "choices": [choice(number, "", event.finish_reason, False)], **more})
        if more:
            yield _line({**head, "choices": [], "usage": _usage([found[number] for number in sorted(found)], body.n)})
        yield "data: [DONE]\n\n"
    except Exception as error:
        refusal = as_refusal(error)
        request.state.facts |= {"error": str(refusal.detail)}
        yield _line(error_body(refusal.status_code, str(refusal.detail), refusal.param, refusal.code))
        if refusal.status_code == 500:
            raise
    finally:
        request.state.facts |= {"tokens": sum(one.completion_tokens for one in found.values())}
        _note(service, request, answer=[found[number].text for number in sorted(found)])


def _line(value: Any) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _usage(found: Sequence[TextResult], n: int) -> dict[str, int]:
    """Tokens of the prompts, each counted once, and of the answers."""
    prompt = sum(one.prompt_tokens for one in found[::n])
    answer = sum(one.completion_tokens for one in found)
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


# ---- images ----------------------------------------------------------------------------------------------------------


@router.post("/v1/images/generations", summary="Draw images")
async def draw(body: ImagesRequest, request: Request, service: The, key: Asker) -> Response:
    _note(service, request, prompt=body.prompt)
    model = await service.model(key, body.model, body.adapters)
    handles = await service.ask(request, service.library.draw, body.questions(model, service.settings.max_pixels))
    found: list[ImageResult] = await results(request, handles, service.settings.request_seconds)
    files = await run_in_threadpool(lambda: [_png(one, body, model) for one in found])
    data = []
    for one, file in zip(found, files, strict=True):
        text = base64.b64encode(file).decode()
        content = {"b64_json": text} if body.response_format == "b64_json" else {"url": f"data:image/png;base64,{text}"}
        data.append({**content, "revised_prompt": None, "seed": one.seed, "steps": one.steps, "guidance": one.guidance})
    request.state.facts |= {"images": len(data)}
    answer = {
        "created": int(time.time()), "data": data, "size": f"{found[0].image.width}x{found[0].image.height}",
        "output_format": "png", "model": body.model, "system_fingerprint": fingerprint(found[0].adapters) or None,
    }  # fmt: skip
    return JSONResponse(answer, headers=service.headers(model, found[0].adapters))


def _png(one: ImageResult, body: ImagesRequest, model: Model) -> bytes:
    facts: dict[str, Any] = {
        "prompt": body.prompt, "negative_prompt": body.negative_prompt, "seed": one.seed, "steps": one.steps,
        "guidance": one.guidance,
    }  # fmt: skip
    if one.adapters:
        facts["adapter"] = {"name": adapter_header(one.adapters), "fingerprint": fingerprint(one.adapters)}
    else:
        facts["base"] = model
    return png_bytes(one.image, facts)


# ---- vectors and classes ---------------------------------------------------------------------------------------------


async def _of_texts(
    body: EmbeddingsRequest | ClassifyBody, request: Request, service: Service, key: Any, call: Any, kind: Any
) -> tuple[Any, list[Any]]:
    """The model that a body names, and what it says of each of its texts."""
    texts = [body.input] if isinstance(body.input, str) else body.input
    _note(service, request, prompt=texts)
    model = await service.model(key, body.model, body.adapters)
    handles = await service.ask(request, call, [kind(model, text) for text in texts])
    return model, await results(request, handles, service.settings.request_seconds)


@router.post("/v1/embeddings", summary="Embed texts")
async def embed(body: EmbeddingsRequest, request: Request, service: The, key: Asker) -> Response:
    model, found = await _of_texts(body, request, service, key, service.library.embed, EmbedRequest)
    as_text = body.encoding_format == "base64"
    data = [
        {"object": "embedding", "index": number, "embedding": _packed(one.vector) if as_text else list(one.vector)}
        for number, one in enumerate(found)
    ]
    tokens = sum(one.prompt_tokens for one in found)
    answer = {
        "object": "list", "data": data, "model": body.model, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}
    }  # fmt: skip
    return JSONResponse(answer, headers=service.headers(model, found[0].adapters))


def _packed(vector: Sequence[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


@router.post("/v1/classify", summary="Sort texts into the classes of an adapter")
@router.post("/classify", include_in_schema=False)  # where vLLM has it
async def classify(body: ClassifyBody, request: Request, service: The, key: Asker) -> Response:
    model, found = await _of_texts(body, request, service, key, service.library.classify, ClassifyRequest)
    data = [
        {
            "index": number, "label": one.answer, "probs": list(one.probabilities.values()),
            "probabilities": dict(one.probabilities), "logits": dict(one.logits), "num_classes": len(one.logits),
        }
        for number, one in enumerate(found)
    ]  # fmt: skip
    tokens = sum(one.prompt_tokens for one in found)
    answer = {
        "id": f"classify-{secrets.token_hex(12)}", "object": "list", "created": int(time.time()), "model": body.model,
        "data": data, "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }  # fmt: skip
    return JSONResponse(answer, headers=service.headers(model, found[0].adapters))


# ---- models ----------------------------------------------------------------------------------------------------------


@router.get("/v1/models", summary="List the models: adapters and bases")
async def models(service: The, key: Asker) -> Models:
    listed = await run_in_threadpool(_listed, service)
    return Models(data=[one for one in listed if key.may_use(one.id)])


@router.get("/v1/models/{model:path}", summary="Say what a model is")
async def one_model(model: str, service: The, key: Asker) -> Listed:
    await service.check(key, model)
    base = next((base for base in service.library.bases() if base.name == model), None)
    return _of_base(base) if base else _of_adapter(await run_in_threadpool(service.library.info, model))


def _listed(service: Service) -> list[Listed]:
    library = service.library
    return [*map(_of_adapter, library.adapters()), *map(_of_base, library.bases())]


def _of_adapter(info: AdapterInfo) -> Listed:
    return Listed(id=info.name, created=int(info.created), parent=info.base, fingerprint=info.fingerprint)


def _of_base(base: BaseInfo) -> Listed:
    return Listed(id=base.name, fingerprint=base.fingerprint)


def _note(service: Service, request: Request, **said: Any) -> None:
    """Prompts and answers go to the log where the settings want that, and nowhere else."""
    if service.settings.log_prompts:
        request.state.facts |= said
