"""The server on several machines: the same application as a deployment of Ray Serve.

    ray.serve.run(application({"folder": "/shared/adapters", "bases": ["smollm2"], "replicas": 4}))

Each replica has the whole application over a library of its own, all of one folder. Before them stands an entrance, which reads for
which model a request is. That is all there is here: Ray's model multiplexing knows which replica has which adapter in memory, sends a
request there, and forgets the least recently used.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import unquote

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.routing import Mount
from starlette.types import Message, Receive, Scope, Send

from smidgen.adapters.budget import parse_bytes
from smidgen.adapters.checkpoint.files import public_name
from smidgen.errors import ConfigError, MissingExtraError, SmidgenError
from smidgen.serving.answers import Refusal, refuse
from smidgen.serving.app import create_app
from smidgen.serving.library import Library
from smidgen.serving.limits import Limits
from smidgen.serving.running import bases_in, log_to_stderr
from smidgen.serving.settings import Server

try:
    from ray import serve
    from ray.exceptions import RayError
    from ray.serve.exceptions import RayServeException
except ImportError as error:
    raise MissingExtraError("Serving on a cluster needs Ray Serve: pip install 'smidgen[serve,ray]'") from error

PASSED = (  # of an ASGI scope, what says which request it is
    "type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "headers", "client",
    "server",
)  # fmt: skip
MOST = 512  # characters of a model's name
AHEAD = 16  # pieces of an answer that a replica makes before the first of them is taken


class Cluster(BaseModel):
    """What a deployment is told, in Python, in a file for ``serve deploy`` or as words of ``serve run``."""

    model_config = ConfigDict(extra="forbid")

    folder: Path  # of adapters; the same on all machines
    bases: Annotated[
        list[str], BeforeValidator(lambda given: given.split(",") if isinstance(given, str) else given)
    ] = []  # none: those that the adapters name
    replicas: Annotated[int, Field(ge=1)] = 1
    residents: Annotated[int, Field(ge=1)] = 1000  # adapters that one replica is known to have in memory
    resources: dict[str, Any] = {}  # of Ray's that one replica takes, such as {"num_gpus": 1}
    memory: str = "1GB"  # for the adapters of one replica
    batch: Annotated[int, Field(ge=1)] = 64  # requests that one replica computes at once; more go to another one
    queue: Annotated[int, Field(ge=1)] = 1024
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    server: Server = Server()  # limits and keys; where it listens is Ray's to say


def application(cluster: Cluster | Mapping[str, Any]) -> serve.Application:
    """What ``ray.serve.run`` or ``serve run smidgen.serving.ray:application folder=...`` runs.

    Raises:
        ConfigError: a value that does not fit, or a folder whose adapters name no base.
    """
    try:
        cluster = Cluster.model_validate(cluster)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}.") from error
    folder = cluster.folder.resolve()
    cluster = cluster.model_copy(update={"folder": folder, "bases": cluster.bases or bases_in(folder)})
    both = {"graceful_shutdown_timeout_s": cluster.server.shutdown_seconds}
    replica = serve.deployment(
        replica_class(cluster.residents),
        name="Replica",
        num_replicas=cluster.replicas,
        max_ongoing_requests=cluster.batch,
        ray_actor_options=cluster.resources,
        **both,
    )
    front = Starlette(routes=[Mount("/", Limits(Entrance(cluster.bases), cluster.server))])
    entrance = serve.deployment(
        serve.ingress(front)(Holder),
        name="Entrance",
        max_ongoing_requests=cluster.server.max_requests,
        ray_actor_options={"num_cpus": 0},
        **both,
    )
    return entrance.bind(replica.bind(cluster))


class Resident:
    """An adapter of which Ray knows that a replica has it in memory, until Ray forgets it."""

    def __init__(self, library: Library, name: str) -> None:
        self._unload: Any = lambda: library.unload(name)

    def __del__(self) -> None:  # Ray calls it, and Python may once more
        unload, self._unload = self._unload, None
        if unload is not None:
            with suppress(SmidgenError):  # deleted since
                unload()


def replica_class(residents: int) -> type:
    """The class of replicas that are known to have ``residents`` adapters in memory at most."""

    class Replica:
        """A library, and the application of it, in a process of Ray's."""

        def __init__(self, cluster: Cluster) -> None:
            log_to_stderr()
            self.library = Library(
                cluster.folder, cluster.bases, parse_bytes(cluster.memory), cluster.batch, cluster.queue, cluster.mixed_precision
            )  # fmt: skip
            self.app = create_app(self.library, cluster.server)
            self.name = serve.get_replica_context().replica_id.unique_id.encode()

        @serve.multiplexed(max_num_models_per_replica=residents)
        async def resident(self, name: str) -> Resident:
            await run_in_threadpool(self.library.load, name)
            return Resident(self.library, name)

        async def answer(self, scope: Scope, body: bytes) -> AsyncIterator[Message]:
            """What the application sends for a request whose body is whole."""
            pieces: asyncio.Queue[Message | Exception | None] = asyncio.Queue(AHEAD)
            given = [{"type": "http.request", "body": body}]

            async def receive() -> Message:
                if not given:
                    await asyncio.Event().wait()  # when the client goes away, Ray cancels this call
                return given.pop()

            async def whole() -> None:
                end = None
                try:
                    await self.app(scope, receive, pieces.put)
                except Exception as error:
                    end = error
                await pieces.put(end)

            work = asyncio.create_task(whole())
            try:
                while (piece := await pieces.get()) is not None:
                    if isinstance(piece, Exception):
                        raise piece
                    if piece["type"] == "http.response.start":
                        await self._note(piece["headers"])
                        piece["headers"] = [*piece["headers"], (b"x-smidgen-replica", self.name)]
                    yield piece
            finally:
                work.cancel()

        async def _note(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
            """Has Ray know of the adapters that answer, which are in memory: only those, whatever a client asked for."""
            bases = [base.name for base in self.library.bases()]
            for name in answering(headers):
                if name not in bases:
                    with suppress(SmidgenError):  # deleted since
                        await self.resident(name)

    return Replica


class Holder:
    """What Ray makes of the entrance; the replicas are bound to it."""

    def __init__(self, _replicas: Any) -> None: ...


class Entrance:
    """An ASGI application that passes requests on to a replica, by the model that they name."""

    def __init__(self, bases: Sequence[str]) -> None:
        self.bases = [public_name(base) for base in bases]  # which every replica has
        self._replicas: Any = None  # a handle, made where it is used

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1000, "reason": "There are no websockets here."})
            return
        begun = False
        try:
            body = await _whole(receive)
            name = model_of(body) or serve.get_multiplexed_model_id()
            name = "" if name in self.bases else name
            self._replicas = self._replicas or serve.get_deployment_handle("Replica")
            answer = self._replicas.options(stream=True, multiplexed_model_id=name).answer
            async for piece in answer.remote({key: scope[key] for key in PASSED if key in scope}, body):
                begun = True
                await send(piece)
        except Refusal as refusal:
            await refuse(refusal, scope, receive, send)
        except (RayError, RayServeException):
            if begun:
                raise  # the connection is closed: whoever reads knows that the answer is not whole
            await refuse(
                Refusal(503, "The replica of this request ended, or none is there; make it again."),
                scope,
                receive,
                send,
            )


async def _whole(receive: Receive) -> bytes:
    parts: list[bytes] = []
    while (message := await receive())["type"] == "http.request":
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)
    raise Refusal(499, "The client went away.")


def answering(headers: Iterable[tuple[bytes, bytes]]) -> list[str]:
    """The names in ``X-Smidgen-Adapter``, as :func:`smidgen.serving.service.adapter_header` writes them.

    Example:
        >>> answering([(b"x-smidgen-adapter", b"team/ann=0.5, b%2Cob=2")])
        ['team/ann', 'b,ob']
    """
    said = next((value.decode() for name, value in headers if name.lower() == b"x-smidgen-adapter"), "")
    return [unquote(part.partition("=")[0]) for part in said.split(", ") if part]


def model_of(body: bytes) -> str:
    """The model that a request's JSON names, "" where there is none: uploads, lists, what the application will refuse.

    Example:
        >>> model_of(b'{"model": "ann", "prompt": "Hello"}'), model_of(b"PK...")
        ('ann', '')
    """
    try:
        given = json.loads(body)
    except ValueError:
        return ""
    found = given.get("model") if isinstance(given, dict) else None
    return found if isinstance(found, str) and len(found) <= MOST else ""
