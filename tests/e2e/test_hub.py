"""Searching the Hub, what lies here, and deleting it, through the real server."""

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.e2e.serving import FIXTURE_MODELS, GENEROUS_S, Running, serve_process
from tests.hub.hub_server import HubServer, serving_hub

ORG = "mlx-community"


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with serving_hub() as server:
        for rank, name in enumerate(("qwen3", "qwen2_vl", "tiny_bert")):
            server.add(f"{ORG}/{name}", FIXTURE_MODELS / name, downloads=100 - rank, likes=rank, tags=["mlx"])
        server.add("someone/pickled", {"config.json": b"{}", "pytorch_model.bin": b"x"}, downloads=1)
        yield server


@pytest.fixture(scope="module")
def server(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder: Path = tmp_path_factory.mktemp("hub")
    shutil.copytree(FIXTURE_MODELS / "llama", folder / "models" / "mine")
    shutil.copytree(FIXTURE_MODELS / "qwen3", folder / "lm-studio" / "someone" / "studio")
    settings = {
        "MLX_MANAGER_HUB_ENDPOINT": hub.url,
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN_PATH": "/nowhere",
        "MLX_MANAGER_MODELS_DIR": str(folder / "models"),
    }
    with serve_process(folder, settings | {"MLX_MANAGER_HUB_TIMEOUT_S": "3"}) as running:
        yield running


@pytest.fixture
def http(server: Running) -> Iterator[httpx2.Client]:
    with server.http() as client:
        yield client


def characteristics(http: httpx2.Client, *models: str, **filters: str) -> dict[str, dict[str, Any]]:
    text = http.get("/api/hub/characteristics", params={"model": models, **filters}).text
    frames = [dict(line.partition(": ")[::2] for line in frame.split("\n")) for frame in text.split("\n\n") if frame]
    assert frames[-1] == {"event": "done", "data": "{}"}
    told = [json.loads(frame["data"]) for frame in frames[:-1]]
    return {one["id"]: one for one in told}


def test_a_search_answers_at_once_and_what_models_are_follows(http: httpx2.Client, hub: HubServer) -> None:
    assert http.get("/api/hub").json() == {"endpoint": hub.url, "state": "online", "has_token": False}
    first = http.get("/api/hub/search").json()
    assert [(one["id"], one["downloads"], one["likes"], one["is_here"]) for one in first["results"]] == [
        (f"{ORG}/qwen3", 100, 0, False), (f"{ORG}/qwen2_vl", 99, 1, False), (f"{ORG}/tiny_bert", 98, 2, False)
    ]  # fmt: skip
    told = characteristics(http, *[one["id"] for one in first["results"]], "someone/pickled", "someone/nothing")
    qwen = told[f"{ORG}/qwen3"]["characteristics"]
    assert (qwen["kind"], qwen["architecture"], qwen["capabilities"]) == ("text", "qwen3", ["text", "tools", "thinking"])
    fit = qwen["fit"]
    assert fit["verdict"] == "fits"
    assert fit["needed"] == fit["weights"] + fit["kv"] + fit["prefill"] <= fit["limit"]
    assert fit["weights"] == qwen["size_bytes"]
    assert told[f"{ORG}/qwen2_vl"]["characteristics"]["capabilities"] == ["text", "vision"]
    assert "can bring code along" in told["someone/pickled"]["reason"]
    assert "There is no" in told["someone/nothing"]["reason"]
    again = http.get("/api/hub/search").json()
    assert again["pending"] == []
    assert again["results"][0]["characteristics"] == qwen


def test_filters_hide_what_does_not_match_and_the_one_that_left_nothing_is_named(http: httpx2.Client) -> None:
    characteristics(http, f"{ORG}/qwen3", f"{ORG}/qwen2_vl", f"{ORG}/tiny_bert")
    seeing = http.get("/api/hub/search", params={"capability": "vision"}).json()
    assert ([one["id"] for one in seeing["results"]], seeing["num_hidden"], seeing["emptied_by"]) == ([f"{ORG}/qwen2_vl"], 2, None)
    nothing = http.get("/api/hub/search", params={"capability": ["vision", "text"], "architecture": "qwen3"}).json()
    assert (nothing["results"], nothing["num_hidden"], nothing["emptied_by"]) == ([], 3, "capability")
    told = characteristics(http, f"{ORG}/qwen3", f"{ORG}/tiny_bert", capability="embedding")
    assert {id: one["matches"] for id, one in told.items()} == {f"{ORG}/qwen3": False, f"{ORG}/tiny_bert": True}
    here = http.get("/api/catalogue", params={"capability": "vision"}).json()
    assert (here["models"], here["emptied_by"]) == ([], "capability")
    for wrong, name in (({"capability": "flying"}, "0"), ({"limit": "0"}, "limit"), ({"sort": "x"}, "sort"), ({"bit": "4"}, "bit")):
        refused = http.get("/api/hub/search", params=wrong)
        assert (refused.status_code, refused.json()["errors"][0]["pointer"]) == (400, name), refused.json()
    assert http.get("/api/hub/characteristics", params={"model": "../etc"}).json()["errors"][0]["pointer"] == "model"


def test_a_hub_that_does_not_answer_is_an_error_in_words_and_what_is_here_is_told_all_the_same(http: httpx2.Client, hub: HubServer) -> None:
    hub.silent = {"hub"}
    try:
        refused = http.get("/api/hub/search")
    finally:
        hub.silent = set()
    assert (refused.status_code, refused.json()["type"].rpartition(":")[2]) == (503, "hub_unavailable")
    assert "did not answer in time" in refused.json()["detail"]
    here = {one["id"]: one for one in http.get("/api/catalogue").json()["models"]}
    assert {"mine", "someone/studio", "starter"} <= here.keys()
    assert here["someone/studio"]["characteristics"]["capabilities"] == ["text", "tools", "thinking"]
    assert (here["starter"]["bundled"], here["mine"]["bundled"]) == (True, False)


def test_a_model_of_lm_studio_answers_by_its_name_and_is_deleted_only_unloaded_and_confirmed(server: Running, http: httpx2.Client) -> None:
    model = "someone/studio"
    with server.openai() as client:
        assert client.completions.create(model=model, prompt="Hello", max_tokens=1).model == model
    used = http.get(f"/api/models/{model}/deletion")
    assert (used.status_code, "unload it first" in used.json()["detail"]) == (409, True)
    assert http.post(f"/api/models/{model}/unload").status_code == 200
    told = http.get(f"/api/models/{model}/deletion").json()
    size = sum(path.stat().st_size for path in Path(told["folder"]).iterdir())
    assert told["freed_bytes"] == size
    unconfirmed = http.delete(f"/api/models/{model}")
    assert (unconfirmed.status_code, unconfirmed.json()["errors"][0]["pointer"]) == (400, "confirmation")
    assert f"{size:,} bytes" in unconfirmed.json()["detail"]
    wrong = http.delete(f"/api/models/{model}", params={"confirmation": "0" * 16})
    assert (wrong.status_code, wrong.json()["type"].rpartition(":")[2]) == (409, "confirmation_outdated")
    done = http.delete(f"/api/models/{model}", params={"confirmation": told["confirmation"]})
    assert (done.status_code, done.json()["freed_bytes"]) == (200, size)
    assert not Path(told["folder"]).exists()
    assert http.delete(f"/api/models/{model}").status_code == 404
    with server.openai() as client:
        assert model not in {m.id for m in client.models.list()}


def test_what_comes_with_the_program_is_not_deleted_in_use_or_not(server: Running, http: httpx2.Client) -> None:
    for use in (False, True):
        if use:
            with server.openai() as client:
                client.completions.create(model="starter", prompt="Hello", max_tokens=1)
        told = http.get("/api/models/starter/deletion")
        assert (told.status_code, "comes with MLX Manager" in told.json()["detail"]) == (409, True)


@pytest.mark.parametrize("id", ["../etc", "..%2f..%2fetc", "/etc/passwd", "starter/../../x", "%2e%2e/x", "mine/..", "a%00b"])
def test_a_name_never_becomes_a_path(http: httpx2.Client, id: str) -> None:
    for reply in (http.get(f"/api/models/{id}/deletion"), http.delete(f"/api/models/{id}?confirmation=x")):
        assert reply.status_code in (400, 404, 405)
    assert http.get("/health").status_code == 200


def test_a_model_that_was_downloaded_and_deleted_leaves_no_entry_behind(http: httpx2.Client) -> None:
    id = http.post("/api/downloads", json={"model": f"{ORG}/tiny_bert"}).json()["id"]
    deadline = time.monotonic() + GENEROUS_S
    while http.get(f"/api/downloads/{id}").json()["state"] != "done":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    told = http.get(f"/api/models/{ORG}/tiny_bert/deletion").json()
    assert http.delete(f"/api/models/{ORG}/tiny_bert", params={"confirmation": told["confirmation"]}).status_code == 200
    assert http.get("/api/downloads").json() == {"downloads": []}
    assert f"{ORG}/tiny_bert" not in {one["id"] for one in http.get("/api/catalogue").json()["models"]}


def test_the_starter_is_not_deleted_and_says_why(http: httpx2.Client) -> None:
    refused = http.get("/api/models/starter/deletion")
    assert (refused.status_code, "comes with MLX Manager" in refused.json()["detail"]) == (409, True)
