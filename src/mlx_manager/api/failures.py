"""Core errors → what the client is told. Rendered here and nowhere else."""

import logging
import math

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from mlx_manager.api.errors import ErrorResponse
from mlx_manager.api.sse import ClientGone
from mlx_manager.core.errors import (
    Conflict,
    ContextTooLong,
    EngineFault,
    HubRefused,
    HubUnavailable,
    InvalidField,
    MLXManagerError,
    ModelLoadFailed,
    ModelNotFound,
    NotEnoughMemory,
    NotFound,
    NotSaved,
    Overloaded,
    StorageFull,
    TimedOut,
)
from mlx_manager.protocols.wire import Failure

log = logging.getLogger(__name__)


def failure(error: Exception, path: str) -> Failure:
    """What the client of a path is told of an error. Anything that is not ours to name is an internal error, and logged."""
    match error:
        case ContextTooLong():
            message, param = _overflow(error, path)
            return Failure(400, "invalid_request_error", "context_length_exceeded", message, param, retry=False)
        case InvalidField():
            return Failure(400, "invalid_request_error", error.code, error.message, error.param, retry=False)
        case ModelNotFound():
            return Failure(404, "invalid_request_error", "model_not_found", error.message, retry=False)
        case NotFound():
            return Failure(404, "invalid_request_error", None, error.message, error.param, retry=False)
        case Conflict():
            return Failure(409, "invalid_request_error", error.code, error.message, error.param, retry=False)
        case HubRefused():
            return Failure(403, "invalid_request_error", "hub_refused", error.message, retry=False)
        case HubUnavailable():
            code = "offline" if error.is_offline else "hub_unavailable"
            wait_s = None if error.retry_after_s is None else math.ceil(error.retry_after_s)
            return Failure(503, "server_error", code, error.message, retry=False, retry_after_s=wait_s)
        case StorageFull():
            return Failure(507, "server_error", "storage_full", error.message, retry=False)
        case NotEnoughMemory():
            return Failure(503, "server_error", "model_loading", error.message, retry_after_s=error.retry_after_s)
        case Overloaded():
            return Failure(503, "server_error", "queue_full", error.message, retry_after_s=error.retry_after_s)
        case ModelLoadFailed():
            return Failure(503, "server_error", "model_load_failed", error.message, retry=False)
        case NotSaved():
            return Failure(507 if error.is_full else 503, "server_error", "not_saved", error.message)
        case TimedOut():
            return Failure(504, "server_error", "timeout", error.message)
        case EngineFault():
            return Failure(500, "server_error", None, error.message)
        case MLXManagerError():
            return Failure(500, "server_error", None, error.message)
        case _:
            log.error("a request failed in a way nobody expected", exc_info=error)
            return Failure(500, "server_error", None, "The server failed to answer this request.")


def _overflow(error: ContextTooLong, path: str) -> tuple[str, str]:
    """Message, in the words that the clients of this path look for, and field."""
    if path.startswith("/v1/messages"):
        return f"prompt is too long: {error.tokens} tokens > {error.limit} maximum", "messages"
    if path.startswith("/v1/responses"):
        beginning = "Your input exceeds the context window of this model. Please adjust your input and try again."
        return f"{beginning} This model's maximum context length is {error.limit} tokens; your input is {error.tokens} tokens.", "input"
    if error.where is not None:
        return error.message, error.where.partition("[")[0]
    return error.message, {"/v1/completions": "prompt", "/v1/embeddings": "input"}.get(path, "messages")


def error_response(request: Request, error: Exception) -> Response:
    f = failure(error, request.url.path)
    return ErrorResponse(
        request.scope,
        f.status,
        f.message,
        type_=f.type_,
        code=f.code,
        param=f.param,
        retry=_is_first_try(request) if isinstance(error, EngineFault) else f.retry,
        retry_after_s=f.retry_after_s,
    )


def _is_first_try(request: Request) -> bool:
    """A fault of the engine may be the request's own: it is worth one more try, not three."""
    return request.headers.get("x-stainless-retry-count", "0") == "0"


def _http_error(request: Request, error: Exception) -> Response:
    """What the framework refuses: unknown paths and wrong methods."""
    assert isinstance(error, HTTPException)
    message = str(error.detail)
    headers = dict(error.headers or {})
    if error.status_code == 405:
        message = f"This address does not know the method {request.method}. It knows: {headers.get('Allow', 'none')}."
    if error.status_code == 404:
        message = "There is nothing at this address."
        if request.url.path.startswith("/v1/v1/"):
            message += " Its base URL has one '/v1' too many."
    return ErrorResponse(request.scope, error.status_code, message, retry=False, headers=headers)


def _invalid_query(request: Request, error: Exception) -> Response:
    """The first mistake in the query of a request; bodies are read elsewhere."""
    assert isinstance(error, RequestValidationError)
    mistake = error.errors()[0]
    name = str(mistake["loc"][-1])[:64]
    message = f"There is no parameter '{name}' here." if mistake["type"] == "extra_forbidden" else f"Invalid '{name}': {mistake['msg']}."
    return error_response(request, InvalidField(message, param=name))


def _client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


def install(app: FastAPI) -> None:
    """Registers the one rendering of every error."""
    app.add_exception_handler(MLXManagerError, error_response)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _invalid_query)
    app.add_exception_handler(ClientGone, _client_gone)
    # What is not named here goes through to `RequestId`, which answers 500, and to the server, which logs it.
