import json

import pytest
from starlette.types import Scope

from mlx_manager.api.errors import ErrorResponse, envelope, envelope_of


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/v1/chat/completions", "openai"),
        ("/v1/completions", "openai"),
        ("/v1/embeddings", "openai"),
        ("/v1/responses", "openai"),
        ("/v1/responses/resp_1/input_items", "openai"),
        ("/v1/messages", "anthropic"),
        ("/v1/messages/count_tokens", "anthropic"),
        ("/v1/messages/nope", "anthropic"),
        ("/v1/models", "merged"),
        ("/v1/models/a/b", "merged"),
        ("/v1", "merged"),
        ("/v1/v1/chat/completions", "merged"),
        ("/v1/messagesx", "merged"),
        ("/v1/responsesx", "merged"),
        ("/v1/chat/completions/", "merged"),
        ("/V1/messages", "problem"),
        ("/v12/messages", "problem"),
        ("/api/models", "problem"),
        ("/", "problem"),
    ],
)
def test_the_path_decides_the_envelope(path: str, expected: str) -> None:
    assert envelope_of(path) == expected


def rendered(path: str, status: int = 404) -> tuple[object, str]:
    body, content_type = envelope(
        path, status, message="Not here.", type_="invalid_request_error", code="model_not_found", param="model", request_id="req_1"
    )
    return json.loads(body), content_type


def test_each_envelope_is_what_the_contract_says() -> None:
    error = {"message": "Not here.", "type": "invalid_request_error", "param": "model", "code": "model_not_found"}
    assert rendered("/v1/responses") == ({"error": error}, "application/json")
    assert rendered("/v1/messages") == (
        {"type": "error", "error": {"type": "not_found_error", "message": "Not here."}, "request_id": "req_1"},
        "application/json",
    )
    assert rendered("/v1/models") == ({"type": "error", "error": error, "request_id": "req_1"}, "application/json")
    assert rendered("/api/models") == (
        {
            "type": "urn:mlx-manager:problem:model_not_found",
            "title": "Not Found",
            "status": 404,
            "detail": "Not here.",
            "instance": "/api/models",
            "request_id": "req_1",
            "errors": [{"pointer": "model", "detail": "Not here."}],
        },
        "application/problem+json",
    )


@pytest.mark.parametrize("path", ["/\r\nx: y", "/\x00", "/\ud800", '/"}', "/</script>"])
def test_a_hostile_path_is_only_a_json_string(path: str) -> None:
    body, _ = envelope(path, 404, message="", type_="x", code=None, param=None, request_id="")
    assert json.loads(body)["instance"] == path
    assert all(0x20 <= byte < 0x7F for byte in body)


def response(path: str, status: int, *, retry: bool | None = None, retry_after_s: float | None = None) -> ErrorResponse:
    scope: Scope = {"type": "http", "path": path, "state": {"request_id": "req_1"}}
    return ErrorResponse(scope, status, "No.", type_="server_error", retry=retry, retry_after_s=retry_after_s)


def test_overload_is_529_on_messages_and_503_elsewhere() -> None:
    overloaded = response("/v1/messages", 503)
    assert overloaded.status_code == 529
    assert json.loads(bytes(overloaded.body))["error"]["type"] == "overloaded_error"
    assert response("/v1/responses", 503).status_code == 503
    assert response("/api/models", 503).status_code == 503


@pytest.mark.parametrize(("asked", "told"), [(0, "1"), (0.2, "1"), (7.1, "8"), (120, "120"), (9999, "120")])
def test_retry_after_stays_within_what_sdks_wait(asked: float, told: str) -> None:
    assert response("/v1/messages", 503, retry_after_s=asked).headers["retry-after"] == told


def test_hints() -> None:
    assert "x-should-retry" not in response("/v1/messages", 500).headers
    assert "retry-after" not in response("/v1/messages", 500).headers
    assert response("/v1/messages", 500, retry=True).headers["x-should-retry"] == "true"
    assert response("/v1/messages", 500, retry=False).headers["x-should-retry"] == "false"
    assert response("/v1/messages", 401).headers["www-authenticate"] == "Bearer"
