"""Models are asked what they can do, by the server itself; what came of it is told, kept, and forgotten once the files are others."""

import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from mlx_manager.core.capabilities import CAPABILITIES
from tests.e2e.serving import FIXTURE_MODELS, GENEROUS_S, MODEL, Running, serve_process

CALLS = ("qwen3", "llama", "mistral", "gemma3_text", "glm4")
THINKS = ("qwen3", "glm4")
SEES = ("qwen2_vl",)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copies that a test may spoil, and one that cannot be loaded."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("mine", "changing", "broken"):
        shutil.copytree(FIXTURE_MODELS / MODEL, folder / name)
    config = json.loads((folder / "broken" / "config.json").read_text())
    (folder / "broken" / "config.json").write_text(json.dumps(config | {"hidden_size": 7}))
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Iterator[Running]:
    data_dir = tmp_path_factory.mktemp("probe")
    adapters = Path(__file__).parents[1] / "fixtures" / "adapters"
    settings = {
        "MLX_MANAGER_MODELS_DIR": os.pathsep.join(map(str, (FIXTURE_MODELS, models))),
        "MLX_MANAGER_ADAPTERS_DIR": str(adapters),
    }
    with serve_process(data_dir, settings) as running:
        yield running


@pytest.fixture
def http(server: Running) -> Iterator[httpx2.Client]:
    with server.http() as http:
        yield http


def probe(http: httpx2.Client, model: str) -> dict[str, Any]:
    return http.post(f"/api/models/{model}/probe").raise_for_status().json()


def told(http: httpx2.Client, model: str) -> dict[str, Any]:
    """What both lists say of it."""
    entry = http.get(f"/v1/models/{model}").raise_for_status().json()["abilities"]
    (status,) = [m["abilities"] for m in http.get("/api/status").json()["models"] if m["id"] == model]
    assert entry == status
    return entry


def verdicts(abilities: dict[str, Any]) -> dict[str, tuple[bool, str]]:
    return {name: (abilities[name]["supported"], abilities[name]["status"]) for name in CAPABILITIES}


def test_what_a_model_can_do_is_guessed_without_loading_it(http: httpx2.Client) -> None:
    for model in (*CALLS, *SEES):
        guessed = told(http, model)
        assert verdicts(guessed) == {
            "tools": (model in CALLS, "guessed"),
            "thinking": (model in THINKS, "guessed"),
            "thinking_switch": (model in THINKS, "guessed"),
            "vision": (model in SEES, "guessed"),
        }
        assert guessed["options"] == (["enable_thinking", "reasoning_effort", "thinking_budget"] if model in THINKS else [])
    assert (told(http, "qwen3")["tool_format"], told(http, "llama")["tool_format"]) == ("<tool_call>", "")
    assert told(http, "tiny_bert") is None
    assert {m["state"] for m in http.get("/v1/models").json()["data"]} == {"cold"}


@pytest.mark.requirement("DISC-04", "D-20")
@pytest.mark.parametrize("model", [*CALLS, *SEES])
def test_asking_a_model_shows_what_it_does_and_what_it_does_not(http: httpx2.Client, model: str) -> None:
    asked = probe(http, model)
    assert verdicts(asked) == {
        "tools": (True, "verified") if model in CALLS else (False, "failed"),
        "thinking": (True, "verified") if model in THINKS else (False, "failed"),
        "thinking_switch": (True, "verified") if model in THINKS else (False, "failed"),
        "vision": (True, "verified") if model in SEES else (False, "failed"),
    }
    assert told(http, model) == asked
    if model in CALLS:
        assert "Paris" in asked["tools"]["detail"]
        assert asked["vision"]["detail"].startswith("This model reads text only")
    if model in THINKS:
        assert "2 + 3" in asked["thinking"]["detail"]
        assert "2 + 3 = 5." in asked["thinking_switch"]["detail"]
    if model in SEES:
        assert asked["vision"]["detail"] == "it told red from blue"
    assert all(asked[name]["found_at"] > 1_700_000_000 for name in CAPABILITIES)


def test_a_name_is_probed_as_the_model_that_it_stands_for(http: httpx2.Client) -> None:
    http.post("/api/profiles", json={"model": MODEL, "name": "mute", "max_tokens": 1, "enable_thinking": False}).raise_for_status()
    http.post("/api/aliases", json={"name": "gpt-4o", "target": f"{MODEL}:mute"}).raise_for_status()
    assert verdicts(probe(http, "gpt-4o"))["tools"] == (True, "verified")
    assert http.get("/v1/models/gpt-4o").json()["abilities"] == told(http, MODEL)


def test_an_adapter_is_asked_for_itself(http: httpx2.Client) -> None:
    assert verdicts(probe(http, f"{MODEL}:pirate"))["tools"] == (True, "verified")
    assert verdicts(told(http, f"{MODEL}:butler"))["tools"] == (True, "guessed")


def test_what_cannot_be_asked_is_refused(http: httpx2.Client) -> None:
    assert http.post("/api/models/nobody/probe").status_code == 404
    embedder = http.post("/api/models/tiny_bert/probe")
    assert (embedder.status_code, "makes embeddings" in embedder.json()["detail"]) == (400, True)


def test_two_do_not_probe_one_model_at_once(http: httpx2.Client, server: Running) -> None:
    statuses: list[int] = []

    def ask() -> None:
        with server.http() as own:
            statuses.append(own.post("/api/models/mistral/probe").status_code)

    deadline = time.monotonic() + GENEROUS_S
    while 409 not in statuses:  # on a busy machine they may happen to come one after the other
        assert time.monotonic() < deadline
        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert set(statuses) == {200, 409}
    assert probe(http, "mistral")["tools"]["status"] == "verified"
    server.wait_until_idle(within_s=10)


def test_whoever_leaves_stops_the_probe(server: Running) -> None:
    with server.http() as impatient, pytest.raises(httpx2.ReadTimeout):
        impatient.post("/api/models/mine/probe", timeout=0.2)
    server.wait_until_idle(within_s=20)
    with server.http() as http:
        assert verdicts(told(http, "mine"))["tools"] == (True, "guessed")
        assert probe(http, "mine")["tools"]["status"] == "verified"


@pytest.mark.requirement("DISC-04")
def test_findings_end_with_the_files_that_they_are_of(http: httpx2.Client, models: Path) -> None:
    asked = probe(http, "changing")
    template, weights = models / "changing" / "chat_template.jinja", models / "changing" / "model.safetensors"
    text = template.read_text()
    template.write_text("{{ messages[-1].content }}")
    changed = told(http, "changing")
    assert set(verdicts(changed).values()) == {(False, "guessed")}
    assert (changed["tool_format"], changed["options"]) == (None, [])
    template.write_text(text)
    assert told(http, "changing") == asked
    content = bytearray(weights.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4] = b"\1\2\3\4"
    weights.write_bytes(content)
    assert verdicts(told(http, "changing"))["tools"] == (True, "guessed")


def test_a_model_that_fails_to_load_is_not_judged(http: httpx2.Client) -> None:
    failed = http.post("/api/models/broken/probe")
    assert (failed.status_code, failed.json()["type"].rpartition(":")[2]) == (503, "model_load_failed")
    assert verdicts(told(http, "broken"))["tools"] == (True, "guessed")
