"""What a client reads when a request fails. The path decides the envelope; why it failed is decided elsewhere."""

import json
import math
from http import HTTPStatus
from typing import Literal

from starlette.responses import Response
from starlette.types import Scope

from mlx_manager.protocols.anthropic.errors import error_details, error_type

Envelope = Literal["openai", "anthropic", "merged", "problem"]

PROBLEM_TYPE = "urn:mlx-manager:problem:"

_OPENAI_PATHS = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"})


def envelope_of(path: str) -> Envelope:
    """Which envelope the clients of `path` can read; `merged` is read in full by the SDKs of both vendors."""
    if path in _OPENAI_PATHS or path.startswith("/v1/responses/"):
        return "openai"
    if path == "/v1/messages" or path.startswith("/v1/messages/"):
        return "anthropic"
    if path == "/v1" or path.startswith("/v1/"):
        return "merged"
    return "problem"


def status_at(path: str, status: int) -> int:
    """The status as the protocol of `path` spells it: Anthropic's word for "come back later" is 529."""
    return 529 if status == 503 and envelope_of(path) == "anthropic" else status


def envelope(
    path: str, status: int, *, message: str, type_: str, code: str | None, param: str | None, request_id: str
) -> tuple[bytes, str]:
    """The body of an error reply and its content type.

    `type_` is OpenAI's; Anthropic's follows from the status. On `/api`, `param` is a JSON pointer into the request body.
    """
    content_type = "application/json"
    content: dict[str, object]
    match envelope_of(path):
        case "openai":
            content = {"error": {"message": message, "type": type_, "param": param, "code": code}}
        case "anthropic":
            error: dict[str, object] = {"type": error_type(status), "message": message}
            if (details := error_details(param, code)) is not None:
                error["details"] = details
            content = {"type": "error", "error": error, "request_id": request_id}
        case "merged":
            content = {
                "type": "error",
                "error": {"message": message, "type": type_, "param": param, "code": code},
                "request_id": request_id,
            }
        case "problem":
            content_type = "application/problem+json"
            content = {
                "type": PROBLEM_TYPE + (code or type_),
                "title": HTTPStatus(status).phrase,
                "status": status,
                "detail": message,
                "instance": path,
                "request_id": request_id,
            }
            if param is not None:
                content["errors"] = [{"pointer": param, "detail": message}]
    # ASCII only: a path may hold any character, and a lone surrogate has no UTF-8.
    return json.dumps(content, separators=(",", ":")).encode("ascii"), content_type


class ErrorResponse(Response):
    """An error as the client of this path expects it: envelope, status and the retry hints that the SDKs obey.

    `retry=None` leaves the decision to the SDK (it repeats 408, 409, 429 and every 5xx, twice). `retry_after_s` is kept
    within 1 to 120: above that one SDK does not retry at all, and another waits however long it is told.
    """

    def __init__(
        self,
        scope: Scope,
        status: int,
        message: str,
        *,
        type_: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        retry: bool | None = None,
        retry_after_s: float | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        path: str = scope["path"]
        status = status_at(path, status)
        request_id: str = scope.get("state", {}).get("request_id", "")
        body, content_type = envelope(path, status, message=message, type_=type_, code=code, param=param, request_id=request_id)
        hints: dict[str, str] = {}
        if status == 401:
            hints["www-authenticate"] = "Bearer"
        if retry is not None:
            hints["x-should-retry"] = "true" if retry else "false"
        if retry_after_s is not None:
            hints["retry-after"] = str(min(max(math.ceil(retry_after_s), 1), 120))
        super().__init__(body, status, headers=hints | (headers or {}), media_type=content_type)
