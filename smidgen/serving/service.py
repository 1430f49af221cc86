"""What the routes share: who may ask whom, requests on their way to the library, and what an answer's headers say."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar
from urllib.parse import quote

from fastapi import Depends, Request
from starlette.concurrency import run_in_threadpool

from smidgen.errors import did_you_mean
from smidgen.serving.answers import Refusal
from smidgen.serving.handles import Handle
from smidgen.serving.keys import Key
from smidgen.serving.library import Library
from smidgen.serving.predictor import Predictor
from smidgen.serving.requests import Model, Served, UnknownAdapterError
from smidgen.serving.settings import Server

T = TypeVar("T")


@dataclass
class Service:
    """A library behind the routes of one application.

    Attributes:
        writing: held while the folder is changed: one upload is verified at a time.
        brought: adapters that load_lora_adapter brought, which unload_lora_adapter takes away.
    """

    library: Library
    settings: Server
    predictor: Predictor
    writing: asyncio.Lock = field(default_factory=asyncio.Lock)
    brought: set[str] = field(default_factory=set)

    def unknown(self, key: Key, name: str) -> UnknownAdapterError:
        """What is said of a model that there is not, or not for this key: the same, with names that it may know."""
        every = [*self.library.shelf.names(), *(base.name for base in self.library.bases())]
        hint = did_you_mean(name, [one for one in every if key.may_use(one)])
        return UnknownAdapterError(
            f"There is no model {name[:100]!r}.{hint}" + ("" if hint else " GET /v1/models lists those that there are.")
        )

    async def model(self, key: Key, name: str, adapters: Mapping[str, float] | None = None) -> Model:
        """Who answers ``name``, or ``adapters`` with their weights, of which ``name`` is one.

        Raises:
            UnknownAdapterError: none that this key may use.
            Refusal: 400, ``name`` is not among ``adapters``.
        """
        if adapters is not None and name not in adapters:
            raise Refusal(400, f"adapters has no {name!r}; it says the weight of model, and of others.", "adapters")
        for one in adapters or {name: 1.0}:
            await self.check(key, one)
        return name if adapters is None else dict(adapters)

    async def check(self, key: Key, name: str) -> None:
        """Refuses a model that there is not, or not for this key. To look for names that are near takes a while where there are
        thousands, so that is done beside the event loop."""
        is_there = any(base.name == name for base in self.library.bases()) or self.library.shelf.place(name) is not None
        if not is_there or not key.may_use(name):
            raise await run_in_threadpool(self.unknown, key, name)

    async def ask(self, request: Request, ask: Callable[[T], Handle[Any]], questions: Sequence[T]) -> list[Handle[Any]]:
        """Hands requests to the library; all of them, or none."""
        handles: list[Handle[Any]] = []

        def submit() -> None:
            for question in questions:
                handles.append(ask(question))

        try:
            await run_in_threadpool(submit)
        except BaseException as error:
            for handle in handles:
                handle.cancel()
            if isinstance(error, UnknownAdapterError):  # removed since it was looked for
                name = str(getattr(questions[0], "model", ""))
                raise await run_in_threadpool(self.unknown, request.state.key, name) from None
            raise
        request.state.facts |= {"adapter": adapter_header(handles[0].adapters) or "", "rows": len(handles)}
        return handles

    def headers(self, model: Model, adapters: Sequence[Served]) -> dict[str, str]:
        """``X-Smidgen-Adapter`` and ``X-Smidgen-Fingerprint``: who answered, a base by its own name."""
        if adapters:
            return {
                "X-Smidgen-Adapter": adapter_header(adapters),
                "X-Smidgen-Fingerprint": fingerprint(adapters),
            }
        found = next((base for base in self.library.bases() if base.name == model), None)
        return {
            "X-Smidgen-Adapter": quote(str(model)),
            "X-Smidgen-Fingerprint": found.fingerprint if found else "",
        }


def adapter_header(adapters: Sequence[Served]) -> str:
    """``ann``, or ``ann=0.5, bob=0.5``: names as a header can hold them."""
    many = len(adapters) > 1 or any(one.weight != 1.0 for one in adapters)
    return ", ".join(quote(one.name) + (f"={one.weight:g}" if many else "") for one in adapters)


def fingerprint(adapters: Sequence[Served]) -> str:
    """Of the versions that answered."""
    return ", ".join(one.fingerprint for one in adapters)


def _service(request: Request) -> Service:
    return request.app.state.service  # type: ignore[no-any-return]


def _key(request: Request) -> Key:
    return request.state.key  # type: ignore[no-any-return]


def _writer(request: Request) -> Key:
    key = _key(request)
    if not key.write:
        raise Refusal(403, f"The key {key.name!r} may use adapters, not change them; make one with --write.")
    return key


The = Annotated[Service, Depends(_service)]
Asker = Annotated[Key, Depends(_key)]
Writer = Annotated[Key, Depends(_writer)]
