"""A library of adapters as an ASGI application.

    app = create_app(Library("adapters", bases=["embedded"]))

It computes nothing itself. What runs it decides nothing: uvicorn, Ray Serve or another server, alone or mounted in another
application.
"""

from __future__ import annotations

from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, Response

from smidgen.serving import adapters_api, openai_api
from smidgen.serving.access import Access
from smidgen.serving.answers import add_handlers
from smidgen.serving.keys import Keyring
from smidgen.serving.library import Library
from smidgen.serving.limits import Limits
from smidgen.serving.metrics import Metrics
from smidgen.serving.predictor import Predictor
from smidgen.serving.service import Service
from smidgen.serving.settings import Server


def create_app(library: Library, settings: Server | None = None) -> FastAPI:
    """The application that serves ``library``, which is the caller's to close.

    Raises:
        ConfigError: the file of keys cannot be read.
    """
    settings = settings or Server()
    app = FastAPI(title="Smidgen", version=version("smidgen"), docs_url=None, redoc_url=None)
    app.state.service = Service(library, settings, Predictor(settings.generator))
    metrics = Metrics(lambda: _flat(library))
    app.include_router(openai_api.router)
    app.include_router(adapters_api.router)
    add_handlers(app)
    app.add_middleware(Limits, settings=settings)
    app.add_middleware(Access, keyring=Keyring(settings.keys), metrics=metrics, settings=settings)  # around the limits

    @app.get("/health", summary="Whether the server runs")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready", summary="Whether it can answer", responses={503: {"description": "It cannot yet, or any more."}})
    async def ready() -> Response:
        bases = {base.name: base.loaded for base in library.bases()}
        is_ready = bool(bases) and all(bases.values())
        return JSONResponse({"ready": is_ready, "bases": bases}, 200 if is_ready else 503)

    @app.get("/metrics", summary="Counters for Prometheus", responses={200: {"content": {"text/plain": {}}}})
    async def counters(_request: Request) -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def described() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
            schemes = app.openapi_schema.setdefault("components", {}).setdefault("securitySchemes", {})
            schemes["key"] = {"type": "http", "scheme": "bearer"}
            app.openapi_schema["security"] = [{"key": []}, {}]
        return app.openapi_schema

    app.openapi = described  # type: ignore[method-assign]
    return app


def _flat(library: Library) -> dict[str, float]:
    """The library's counters, each a number of its own."""
    found: dict[str, float] = {}
    for name, value in asdict(library.counters()).items():
        if isinstance(value, dict):
            found |= {f"{name}_{part}": number for part, number in value.items()}
        else:
            found[name] = value
    return found
