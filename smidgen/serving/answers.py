"""Errors as the OpenAI API gives them: what is wrong in a sentence, and the status that a client acts on."""

from __future__ import annotations

import errno
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from smidgen.errors import SmidgenError
from smidgen.serving.requests import (
    BusyError,
    CancelledRequestError,
    ClosedError,
    FailedError,
    ReplacedError,
    UnknownAdapterError,
)

_KINDS = {  # status -> type of the error, code
    400: ("invalid_request_error", "invalid_request"),
    401: ("authentication_error", "invalid_api_key"),
    403: ("permission_error", "not_allowed"),
    404: ("invalid_request_error", "not_found"),
    405: ("invalid_request_error", "method_not_allowed"),
    408: ("invalid_request_error", "request_timeout"),
    409: ("invalid_request_error", "conflict"),
    413: ("invalid_request_error", "too_large"),
    429: ("rate_limit_error", "queue_full"),
    499: ("invalid_request_error", "client_closed_request"),
    500: ("server_error", "server_error"),
    503: ("server_error", "unavailable"),
}


class ErrorBody(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorAnswer(BaseModel):
    """An error, in OpenAI's form."""

    error: ErrorBody


class Refusal(HTTPException):
    """A request is refused: a status, a sentence, what it is about, and the code that a program reads."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.param, self.code = param, code


def busy(message: str, seconds: int = 1) -> Refusal:
    """429, to be tried again after ``seconds``."""
    return Refusal(429, message, headers={"Retry-After": str(seconds)})


def late(seconds: float) -> Refusal:
    """503 for an answer that took too long."""
    return Refusal(503, f"No answer within {seconds:g} s; ask for less, or try again later.", code="timeout")


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The JSON of an error."""
    kind, usual = _KINDS.get(status, _KINDS[400 if status < 500 else 500])
    return {"error": {"message": message, "type": kind, "param": param, "code": code or usual}}


def as_refusal(error: Exception) -> Refusal:
    """What a client is told of an error in its work; of a fault of the server's own, nothing but that it is one. Where things
    lie on this machine is not said."""
    if isinstance(error, Refusal):
        return error
    message = without_paths(str(error))
    if isinstance(error, UnknownAdapterError):
        return Refusal(404, message, "model", "model_not_found")
    if isinstance(error, BusyError):
        return busy(message)
    if isinstance(error, ClosedError | CancelledRequestError):
        return Refusal(503, message)
    if isinstance(error, ReplacedError):
        return Refusal(409, message, "model", "adapter_replaced")
    if isinstance(error, SmidgenError) and not isinstance(error, FailedError):
        return Refusal(400, message)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE):
        return Refusal(503, f"The server cannot keep this now ({error.strerror}); try again later.")
    return Refusal(500, "The server failed at this; its log says where.")


def without_paths(message: str) -> str:
    """Absolute paths in a message as their last part alone, and the hidden folders of uploads by what they are."""
    message = re.sub(r"(?<![\w/:.])/(?!v1/)(?:[^\s/'\"(),;]+/)+(?=[^\s/'\"(),;])", "", message)
    return re.sub(r"\.(upload|adding)-\w+", "the upload", message)


def response_of(error: Exception) -> JSONResponse:
    """The answer to a request that ended with ``error``."""
    found = as_refusal(error)
    body = error_body(found.status_code, str(found.detail), found.param, found.code)
    return JSONResponse(body, found.status_code, headers=found.headers)


async def refuse(refusal: Refusal, scope: Scope, receive: Receive, send: Send) -> None:
    """Answers below the routes."""
    await response_of(refusal)(scope, receive, send)


def _value_error(errors: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """(field, what is wrong with it) of pydantic's errors; of a value that may be several things, what all of them say."""
    deepest = max(len(one["loc"]) for one in errors)
    at = next(one["loc"][:-1] for one in errors if len(one["loc"]) == deepest)
    said = [one for one in errors if len(one["loc"]) == deepest and one["loc"][:-1] == at]
    first = said[0]
    if first["type"] == "json_invalid":
        return "", f"The body is no JSON: {first['ctx']['error']} at character {first['loc'][-1]}."
    kinds = [one for one in said if _is_kind(one["loc"][-1])]
    where = ".".join(str(part) for part in first["loc"][1:] if not _is_kind(part))
    if "field" in (context := first.get("ctx") or {}):
        where = f"{where}.{context['field']}" if where else context["field"]
    told = [one["msg"].rstrip(".") for one in (kinds or said[:1])]
    why = ", or: ".join(dict.fromkeys(told))
    return where, why if why.endswith("?") else f"{why}."


def _is_kind(part: Any) -> bool:
    """Whether it is pydantic's name of a kind of value, in the place of an error, and no field."""
    return "[" in str(part) or part == "constrained-str"


def add_handlers(app: FastAPI) -> None:
    """Every error of a route leaves ``app`` in this form."""

    async def of_work(_request: Request, error: Exception) -> JSONResponse:
        return response_of(error)

    async def of_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        if isinstance(error, Refusal):
            return response_of(error)
        message = str(error.detail)
        if error.status_code in (404, 405):
            message = f"There is no {request.method} {request.url.path[:200]} here; /openapi.json says what there is."
        return JSONResponse(error_body(error.status_code, message), error.status_code, headers=error.headers)

    async def of_values(_request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        where, why = _value_error(error.errors())
        return JSONResponse(error_body(400, f"{where or 'the request'}: {why}", where or None), 400)

    app.add_exception_handler(SmidgenError, of_work)
    app.add_exception_handler(HTTPException, of_http)
    app.add_exception_handler(RequestValidationError, of_values)
