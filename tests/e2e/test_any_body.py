"""Whatever object a client sends, it is answered, and the fault is never said to be ours."""

import json
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.e2e.serving import MODEL, Running
from tests.protocols.test_requests import bodies

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}
COMPLETION = {"model": MODEL, "prompt": "Hello", "max_tokens": 2}


@pytest.fixture(scope="module")
def http(server: Running) -> Iterator[httpx2.Client]:
    with server.http() as http:
        yield http


def _is_short(body: dict[str, Any]) -> bool:
    """Two tokens, or a limit that is refused: an answer of thousands of tokens proves nothing here."""
    return body["max_tokens"] == 2 and body.get("max_completion_tokens") in (None, 2)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(st.sampled_from(["/v1/chat/completions", "/v1/completions"]), (bodies(CHAT) | bodies(COMPLETION)).filter(_is_short))
def test_any_object_is_answered(http: httpx2.Client, path: str, body: dict[str, Any]) -> None:
    response = http.post(path, content=json.dumps(body).encode(), headers={"content-type": "application/json"})
    assert response.status_code < 500, response.text
    assert response.status_code != 422
    if response.status_code >= 400:
        assert response.json()["error"]["message"]
