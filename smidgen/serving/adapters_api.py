"""Adapters come and go while a server runs: list, upload, delete, predict from photos, and vLLM's two calls."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

from fastapi import APIRouter, File, Form, Request, UploadFile
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool

from smidgen.errors import ConfigError
from smidgen.serving.answers import Refusal, without_paths
from smidgen.serving.openai_api import ERRORS, Asked
from smidgen.serving.requests import AdapterInfo
from smidgen.serving.service import Asker, Key, Service, The, Writer
from smidgen.serving.shelf import check_name, read
from smidgen.serving.uploads import quarantine, take_files, unpack_archive

router = APIRouter(responses=ERRORS)
Size = Annotated[int, Field(ge=0)]


class Described(BaseModel):
    """An adapter in the library."""

    name: str
    fingerprint: str
    task: str
    method: str
    base: str
    bytes: Size
    parameters: Size
    labels: list[str] = []
    created: float
    resident: bool
    pinned: bool


class Adapters(BaseModel):
    """The adapters that this key may use; of those that cannot be served why not."""

    adapters: list[Described]
    refused: dict[str, str]


class Deleted(BaseModel):
    """An adapter is gone."""

    name: str
    deleted: Literal[True] = True


class LoadRequest(Asked):
    """vLLM's request to bring an adapter."""

    lora_name: Annotated[str, Field(min_length=1, max_length=512)]
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]
    load_inplace: bool = False


class UnloadRequest(Asked):
    """vLLM's request to take an adapter away."""

    lora_name: Annotated[str, Field(min_length=1, max_length=512)]


def described(info: AdapterInfo) -> Described:
    return Described(**asdict(info))


@router.get("/v1/adapters", summary="List the adapters")
async def listed(service: The, key: Asker) -> Adapters:
    library = service.library
    found, refused = await run_in_threadpool(lambda: (library.adapters(), library.refused()))
    return Adapters(
        adapters=[described(info) for info in found if key.may_use(info.name)],
        refused={name: without_paths(why) for name, why in refused.items() if key.may_use(name)},
    )


@router.get("/v1/adapters/{name:path}", summary="Say what an adapter is")
async def one(name: str, service: The, key: Asker) -> Described:
    await service.check(key, name)
    return described(await run_in_threadpool(service.library.info, name))


@router.post("/v1/adapters/{name:path}", status_code=201, summary="Upload an adapter")
async def upload(
    name: str,
    request: Request,
    service: The,
    key: Writer,
    files: Annotated[
        list[UploadFile],
        File(description="A zip of the adapter's folder, or adapter_config.json and adapter_model.safetensors."),
    ],
    overwrite: Annotated[bool, Form(description="Replace the adapter of this name.")] = False,
) -> Response:
    async with _changing(service, request, key, name) as scratch:
        await run_in_threadpool(_unpack, files, scratch, service.settings.max_upload)
        info = await run_in_threadpool(_add, service, name, scratch, overwrite)
    return _made(info)


@router.delete("/v1/adapters/{name:path}", summary="Delete an adapter")
async def delete(name: str, request: Request, service: The, key: Writer) -> Deleted:
    await service.check(key, name)
    request.state.facts |= {"adapter": name}
    async with service.writing:
        await run_in_threadpool(service.library.remove, name)
    service.brought.discard(name)
    return Deleted(name=name)


@router.post("/v1/predict", status_code=201, summary="Predict the adapter of the person in photos")
async def predict(
    request: Request,
    service: The,
    key: Writer,
    name: Annotated[str, Form(description="Of the new adapter.", min_length=1, max_length=512)],
    photos: Annotated[list[UploadFile], File(description="Photos of one person.")],
    seed: Annotated[int, Form(ge=0, lt=2**63)] = 0,
    unchecked: Annotated[bool, Form(description="Go on with what is no usual photo.")] = False,
    overwrite: Annotated[bool, Form(description="Replace the adapter of this name.")] = False,
) -> Response:
    async with _changing(service, request, key, name) as scratch:
        files = [photo.file for photo in photos]
        made, notes = await run_in_threadpool(service.predictor.predict, files, seed, scratch, unchecked)
        info = await run_in_threadpool(_add, service, name, made, overwrite)
    return _made(info, notes)


@router.post(
    "/v1/load_lora_adapter", response_class=PlainTextResponse, summary="Bring an adapter that lies on the server"
)
async def load(body: LoadRequest, request: Request, service: The, key: Writer) -> str:
    root = service.settings.adapters_root
    if root is None:
        raise Refusal(
            403, "This server takes no adapters by path: start it with --adapters-root FOLDER, or upload them."
        )
    folder = _below(root, body.lora_path)
    async with _changing(service, request, key, body.lora_name):
        await run_in_threadpool(_add, service, body.lora_name, folder, body.load_inplace)
    service.brought.add(body.lora_name)
    return f"Success: LoRA adapter '{body.lora_name}' added successfully."


@router.post(
    "/v1/unload_lora_adapter", response_class=PlainTextResponse, summary="Take away an adapter that was brought"
)
async def unload(body: UnloadRequest, request: Request, service: The, key: Writer) -> str:
    name = body.lora_name
    await service.check(key, name)
    if name not in service.brought:
        raise Refusal(
            400,
            f"load_lora_adapter did not bring {name!r}, and its files would be lost: DELETE /v1/adapters/{name} deletes it.",
            "lora_name",
        )
    await delete(name, request, service, key)
    return f"Success: LoRA adapter '{name}' removed successfully."


@asynccontextmanager
async def _changing(service: Service, request: Request, key: Key, name: str) -> AsyncIterator[Path]:
    """Within, an adapter is made in a hidden folder of the library's and then added, one at a time.

    Raises:
        ConfigError: ``name`` is no adapter's.
        Refusal: 403, it is not for this key.
    """
    check_name(name)
    if not key.may_use(name):
        raise Refusal(
            403, f"The key {key.name!r} is for adapters named {', '.join(key.adapters)}, not {name!r}.", "name"
        )
    request.state.facts |= {"adapter": name}
    async with service.writing:
        shelf = service.library.shelf
        other = await run_in_threadpool(shelf.around, name)
        if other and not key.may_use(other):  # of which it is not to learn
            raise Refusal(400, f"The name {name!r} cannot be had here; choose another.", "name")
        above = shelf.folder
        above.mkdir(parents=True, exist_ok=True)
        with quarantine(above) as scratch:
            yield scratch


def _unpack(files: list[UploadFile], scratch: Path, most: int) -> None:
    if len(files) == 1:
        unpack_archive(files[0].file, scratch, most)
        return
    names = [str(file.filename) for file in files]
    if twice := [name for name in names if names.count(name) > 1]:
        raise Refusal(400, f"{twice[0][:100]!r} is sent twice.", "files")
    take_files({name: file.file for name, file in zip(names, files, strict=True)}, scratch, most)


def _add(service: Service, name: str, folder: Path, overwrite: bool) -> AdapterInfo:
    """Adds an adapter of a base that is served: what comes from outside does not decide what is loaded."""
    library = service.library
    found, bases = read(name, folder, library.shelf.most), [base.name for base in library.bases()]
    if found.base not in bases:
        raise ConfigError(
            f"The adapter is for the base {found.base or 'nobody named'!r}, and those served are: {', '.join(bases) or 'none'}."
        )
    return library.add(name, folder, overwrite)


def _made(info: AdapterInfo, notes: list[str] | None = None) -> Response:
    headers = {"X-Smidgen-Adapter": info.name, "X-Smidgen-Fingerprint": info.fingerprint}
    said = {} if notes is None else {"notes": notes}
    return JSONResponse(described(info).model_dump() | said, 201, headers=headers)


def _below(root: Path, path: str) -> Path:
    """A folder below ``root`` whose files are there too, whatever links there are.

    Raises:
        Refusal: 403 for anything else, whether it is there or not.
    """
    inside = root.resolve()
    try:
        folder = (inside / path).resolve(strict=True)
        places = [folder, *(file.resolve(strict=True) for file in folder.iterdir())]
    except (OSError, ValueError, RuntimeError):
        places = []
    if not places or not all(place.is_relative_to(inside) for place in places) or places[0] == inside:
        raise Refusal(
            403, f"{path[:200]!r} is no folder of an adapter below the --adapters-root of this server.", "lora_path"
        )
    return folder
