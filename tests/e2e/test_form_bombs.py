"""Forms that are made to keep the server busy: refused in time by the name of their field, while everybody else is served."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

from tests.e2e.serving import MODEL, Running, serve_process
from tests.e2e.test_shutdown import wait_until_ended

HELLO = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
ENDLESS = {"multipleOf": 2147483648}
GOOD = {"type": "object", "properties": {"warm": {"type": "boolean"}}, "required": ["warm"], "additionalProperties": False}
TOOL = {"name": "count", "parameters": {"type": "object", "properties": {"n": ENDLESS}, "required": ["n"], "additionalProperties": False}}


def form(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


BOMBS: dict[str, tuple[str, dict[str, Any], str]] = {
    "a schema in chat": ("/v1/chat/completions", HELLO | {"response_format": form(ENDLESS)}, "response_format.json_schema.schema"),
    "a regular expression": ("/v1/chat/completions", HELLO | {"guided_regex": "~((😀){99999})"}, "guided_regex"),
    "a grammar": (
        "/v1/completions",
        {"model": MODEL, "prompt": "Hi", "guided_grammar": f"start: %json {json.dumps(ENDLESS)}"},
        "guided_grammar",
    ),
    "a tool": (
        "/v1/chat/completions",
        HELLO | {"tools": [{"type": "function", "function": TOOL}], "tool_choice": "required"},
        "tools: count",
    ),
    "a schema in messages": (
        "/v1/messages",
        HELLO | {"output_config": {"format": {"type": "json_schema", "schema": ENDLESS}}},
        "output_config.format.schema",
    ),
}


@pytest.fixture(scope="module")
def http(server: Running) -> Iterator[httpx2.Client]:
    with server.http() as http:
        http.post("/v1/chat/completions", json=HELLO | {"response_format": form(GOOD)}).raise_for_status()
        yield http


def test_each_kind_is_refused_in_time_by_its_name(http: httpx2.Client) -> None:
    def sent(bomb: tuple[str, dict[str, Any], str]) -> tuple[httpx2.Response, float]:
        began = time.monotonic()
        return http.post(bomb[0], json=bomb[1]), time.monotonic() - began

    with ThreadPoolExecutor(len(BOMBS)) as pool:
        answers = list(pool.map(sent, BOMBS.values()))
    for (_, _, field), (response, took_s) in zip(BOMBS.values(), answers, strict=True):
        assert response.status_code == 400, response.text
        assert f"'{field.partition(':')[0]}" in response.json()["error"]["message"]  # which tool it is, if there is time
        assert took_s < 5  # all of them at once; alone it is less than three
    began = time.monotonic()
    path, body, _ = BOMBS["a schema in chat"]
    assert http.post(path, json=body).json()["error"]["param"] == "response_format.json_schema.schema"
    assert time.monotonic() - began < 3


def test_twenty_at_once_leave_the_others_alone(server: Running, http: httpx2.Client) -> None:
    def bomb(i: int) -> httpx2.Response:
        return http.post("/v1/chat/completions", json=HELLO | {"response_format": form({"multipleOf": 2147483648 + 2 * i})})

    with ThreadPoolExecutor(20) as pool:
        bombs = [pool.submit(bomb, i) for i in range(20)]
        endless = {"model": MODEL, "prompt": "apple apple", "temperature": 0, "logit_bias": {"300": 100}, "stream": True, "max_tokens": 300}
        with http.stream("POST", "/v1/completions", json=endless) as stream:
            *_, last = (line for line in stream.iter_lines() if line)
        assert last == "data: [DONE]"
        assert http.post("/v1/chat/completions", json=HELLO).status_code == 200
        began = time.monotonic()
        formed = http.post("/v1/chat/completions", json=HELLO | {"response_format": form(GOOD | {"title": "new"}), "max_tokens": 40})
        assert formed.status_code == 200
        assert time.monotonic() - began < 5
        answers = [b.result() for b in bombs]
    assert {a.status_code for a in answers} <= {400, 503}
    assert all(int(a.headers["retry-after"]) >= 1 for a in answers if a.status_code == 503)
    server.wait_until_idle(within_s=10)
    assert http.post("/v1/chat/completions", json=HELLO | {"response_format": form(GOOD), "max_tokens": 40}).status_code == 200


GROWING = 'start: x x x\nx: "a" | x x | x x x | x x x x | x x x x x | "a" x "a"'


def test_a_form_that_costs_more_with_each_token_ends_before_it_keeps_everybody_waiting(server: Running, http: httpx2.Client) -> None:
    body = {"model": MODEL, "prompt": "Hi", "guided_grammar": GROWING, "max_tokens": 600, "temperature": 0}
    began = time.monotonic()
    streamed = http.post("/v1/completions", json=body | {"stream": True}).text
    last = json.loads(streamed.strip().split("\n\n")[-1].removeprefix("data: "))
    assert last["error"]["param"] == "guided_grammar"
    assert "[DONE]" not in streamed
    assert time.monotonic() - began < 30  # without a limit it is minutes
    server.wait_until_idle(within_s=5)


def test_a_signal_ends_the_server_and_all_that_it_started(tmp_path: Path) -> None:
    with serve_process(tmp_path) as running, running.http() as http, ThreadPoolExecutor(2) as pool:
        assert running.process is not None
        asked = pool.submit(http.post, "/v1/chat/completions", json=HELLO | {"response_format": form(ENDLESS)})
        started: list[psutil.Process] = []
        while len(started) < 3:  # the one that tries, its fork, and one for the next form
            started = psutil.Process(running.process.pid).children(recursive=True)
        running.process.terminate()
        assert asked.result().status_code == 400
        wait_until_ended(running)
        assert psutil.wait_procs(started, timeout=5)[1] == []
