"""What the engine keeps between requests, restarts and clients, over the wire."""

import random
import statistics
import threading
import time
from pathlib import Path

import pytest

from tests.e2e.serving import MODEL, Running, serve_process

LOT = random.Random("prefixes")
SYSTEM = " ".join(str(LOT.randrange(1000)) for _ in range(80))


def question(text: str, **options: object) -> dict[str, object]:
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
    return {"model": MODEL, "messages": messages, "max_tokens": 4, "temperature": 0, **options}


def ask(server: Running, text: str) -> tuple[str, int]:
    """What is said, and how many tokens of the prompt were there already."""
    with server.http() as http:
        reply = http.post("/v1/chat/completions", json=question(text)).raise_for_status().json()
    return reply["choices"][0]["message"]["content"], reply["usage"]["prompt_tokens_details"]["cached_tokens"]


@pytest.mark.requirement("BATCH-02")
def test_a_restart_keeps_prefixes_where_there_is_a_disk_for_them(tmp_path: Path) -> None:
    settings = {"MLX_MANAGER_PREFIX_DISK_GIB": "0.5"}
    with serve_process(tmp_path, settings) as server:
        said, cached = ask(server, "What is 2 + 3?")
        assert cached == 0
    assert len(list((tmp_path / "prefixes").rglob("*.safetensors"))) > 3
    with serve_process(tmp_path, settings) as server:
        again, cached = ask(server, "What is 2 + 3?")
        assert again == said
        assert cached > 96
        assert server.metric("mlx_manager_prefix_disk_blocks_total") > 3
        with server.http() as http:
            (state,) = [m for m in http.get("/api/status").json()["models"] if m["id"] == MODEL]
    assert state["kv_cache"]["disk_blocks"] > 3
    assert state["kv_cache"]["kind"]


@pytest.mark.requirement("BATCH-02")
def test_the_explainer_shows_the_text_from_which_a_prompt_differs(tmp_path: Path) -> None:
    with serve_process(tmp_path) as server, server.http() as http:
        rest = f" Think of {SYSTEM}"
        new = http.post("/api/prefix/explain", json=question("What is 2 + 3?" + rest)).json()
        assert (new["reason"], new["cached_tokens"]) == ("new", 0)
        ask(server, "What is 2 + 3?" + rest)
        other = http.post("/api/prefix/explain", json=question("What is 2 + 4?" + rest)).json()
        assert other["reason"] == "differs"
        assert 96 < other["cached_tokens"] <= other["position"] < other["prompt_tokens"]
        assert other["text"].startswith("4")
        assert other["other_text"].startswith("3")
        raw = http.post("/api/prefix/explain", json={"model": MODEL, "prompt": "apple"}).json()
        assert raw["reason"] == "short"
        wrong = http.post("/api/prefix/explain", json={"model": "nobody", "prompt": "apple"})
        assert wrong.status_code == 404
        bad = http.post("/api/prefix/explain", json={"model": MODEL, "prompt": "apple", "top_p": 7})
        assert bad.status_code == 400
        assert "top_p" in bad.text


@pytest.mark.requirement("D-03")
def test_urgent_requests_overtake_a_queue_of_others(tmp_path: Path) -> None:
    """Two places, a dozen long completions for them: a chat is answered before the first of the waiting ones has begun."""
    settings = {"MLX_MANAGER_MAX_BATCH": "2", "MLX_MANAGER_ENDPOINT_PRIORITY": "/v1/completions=low,/v1/chat/completions=high"}
    slow = {"model": MODEL, "max_tokens": 300, "temperature": 0, "logit_bias": {"300": 100}}
    ended: list[float] = []

    def complete(n: int) -> None:
        with server.http() as http:
            http.post("/v1/completions", json=slow | {"prompt": f"{n} apple"}).raise_for_status()
        ended.append(time.monotonic())

    with serve_process(tmp_path, settings) as server:
        ask(server, "What is 1 + 1?")  # loads the model
        threads = [threading.Thread(target=complete, args=(n,)) for n in range(12)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 30
        while server.metric("mlx_manager_waiting_sequences") < 10:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        answered: list[float] = []
        for n in range(3):
            ask(server, f"What is {n} + 2?")
            answered.append(time.monotonic())
        for thread in threads:
            thread.join()
        assert server.metric("mlx_manager_preemptions_total") > 0
    assert answered[-1] < statistics.median(ended)


def test_a_reply_that_takes_longer_than_it_may_ends_with_an_error(tmp_path: Path) -> None:
    with serve_process(tmp_path, {"MLX_MANAGER_REQUEST_TIMEOUT_S": "1.5"}) as server, server.http() as http:
        ask(server, "What is 1 + 1?")
        endless = {"model": MODEL, "prompt": "apple", "max_tokens": 4000, "logit_bias": {"300": 100}, "n": 8}
        refused = http.post("/v1/completions", json=endless)
        assert refused.status_code == 504
        assert refused.json()["error"]["code"] == "timeout"
        server.wait_until_idle(within_s=10)


def test_a_prompt_that_memory_cannot_hold_is_refused_with_numbers(tmp_path: Path) -> None:
    with serve_process(tmp_path, {"MLX_MANAGER_KV_CACHE_GIB": "0.0005"}) as server, server.http() as http:
        reply = http.post("/v1/completions", json={"model": MODEL, "prompt": [300] * 1000, "max_tokens": 1})
        assert reply.status_code == 400
        error = reply.json()["error"]
        assert error["code"] == "context_length_exceeded"
        assert "1000 tokens" in error["message"]
        assert "--kv-cache-gib" in error["message"]
        cut = http.post("/v1/completions", json={"model": MODEL, "prompt": "apple", "max_tokens": 4000, "logit_bias": {"300": 100}}).json()
    assert cut["choices"][0]["finish_reason"] == "length"
    assert 32 < cut["usage"]["completion_tokens"] < 1000
