"""`search`, `pull` and `rm` in processes of their own, with a Hub on loopback."""

import hashlib
import json
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.test_cli import COMMAND, MODELS, WAIT_S, command, home, serving
from tests.hub.hub_server import HubServer, serving_hub

assert home  # a fixture
MODEL = "mlx-community/small"
WEIGHTS = (MODELS / "qwen3" / "model.safetensors").read_bytes()


@pytest.fixture
def hub(home: dict[str, str]) -> Iterator[HubServer]:
    with serving_hub() as server:
        server.add(MODEL, MODELS / "qwen3", tags=["mlx"], downloads=7)
        home |= {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN_PATH": "/nowhere"}
        yield server


def part(home: dict[str, str]) -> Path:
    return Path(home["HF_HUB_CACHE"]) / "models--mlx-community--small" / "blobs" / f"{hashlib.sha256(WEIGHTS).hexdigest()}.part"


def test_a_search_tells_what_models_are_and_which_filter_left_none(home: dict[str, str], hub: HubServer) -> None:
    hub.add("mlx-community/tiny", MODELS / "tiny_bert", tags=["mlx"])
    hub.add("someone/else", MODELS / "llama")
    told = command(home, "search").stdout
    assert "mlx-community/small" in told
    assert "text, tools, thinking" in told
    assert "fits: " in told
    assert "someone/else" not in told
    found = json.loads(command(home, "search", "--organisation", "any", "--all", "--can", "text", "--fits", "--json").stdout)
    assert [one["id"] for one in found["results"]] == [MODEL, "someone/else"]
    assert found["results"][0]["characteristics"]["architecture"] == "qwen3"
    assert found["results"][0]["fit"]["verdict"] == "fits"
    assert "None of 2 models is left: --can took the last." in command(home, "search", "--can", "vision").stdout
    unknown = command(home, "search", "--can", "fly")
    assert (unknown.returncode, "--can fly" in unknown.stderr) == (2, True)
    assert "no model like 'nothing'" in command(home, "search", "nothing").stdout


def test_without_a_hub_a_search_is_a_sentence(home: dict[str, str], hub: HubServer) -> None:
    offline = command(home, "search", HF_HUB_OFFLINE="1")
    assert (offline.returncode, "HF_HUB_OFFLINE is set" in offline.stderr) == (1, True)
    wrong = command(home, "search", HF_ENDPOINT="nonsense")
    assert (wrong.returncode, "is not an address" in wrong.stderr) == (2, True)
    served = command(home, "serve", "--hub-endpoint", "nonsense")
    assert (served.returncode, "--hub-endpoint" in served.stderr) == (2, True)
    hub.silent = {"hub"}
    slow = command(home, "search", MLX_MANAGER_HUB_TIMEOUT_S="1")
    assert (slow.returncode, "did not answer in time" in slow.stderr) == (1, True)


def test_a_model_is_pulled_without_a_server_interrupted_and_gone_on_with(home: dict[str, str], hub: HubServer) -> None:
    hub.bytes_per_s = 500_000
    process = subprocess.Popen(
        [*COMMAND, "pull", MODEL],
        env=home,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # who runs the tests in the background has it ignored
    )
    deadline = time.monotonic() + WAIT_S
    while not part(home).exists() or part(home).stat().st_size == 0:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=WAIT_S)
    assert (process.returncode, "goes on where it stopped" in stderr, "Traceback" in stderr) == (130, True, False)
    have = part(home).stat().st_size
    hub.bytes_per_s = None
    done = json.loads(command(home, "pull", MODEL, "--json").stdout)
    assert (done["state"], done["done_bytes"]) == ("done", done["total_bytes"])
    assert hub.fetched(WEIGHTS)[-1].start == have > 0
    listed = json.loads(command(home, "list", "--json").stdout)
    assert MODEL in [model["id"] for model in listed["models"]]


def test_what_cannot_be_pulled_is_a_sentence(home: dict[str, str], hub: HubServer) -> None:
    hub.add("mlx-community/pickled", {"config.json": b"{}", "pytorch_model.bin": b"x"})
    refused = command(home, "pull", "mlx-community/pickled")
    assert (refused.returncode, "can bring code along" in refused.stderr) == (1, True)
    missing = command(home, "pull", "mlx-community/nothing")
    assert (missing.returncode, "There is no 'mlx-community/nothing' on the Hub" in missing.stderr) == (1, True)


def test_a_running_server_pulls_and_deletes_and_the_models_in_use_stay(home: dict[str, str], hub: HubServer) -> None:
    with serving(home):
        pulled = command(home, "pull", MODEL)
        assert (pulled.returncode, f"{MODEL} is here" in pulled.stdout) == (0, True)
        assert command(home, "load", MODEL).returncode == 0
        used = command(home, "rm", MODEL, "--yes")
        assert (used.returncode, "unload it first" in used.stderr) == (1, True)
        assert command(home, "stop", MODEL).returncode == 0
        assert "is deleted" in command(home, "rm", MODEL, "--yes").stdout
        assert "does not exist here" in command(home, "rm", MODEL, "--yes").stderr
    assert not part(home).parents[1].exists()


def test_a_model_is_deleted_only_when_that_is_meant(home: dict[str, str], hub: HubServer) -> None:
    command(home, "pull", MODEL)
    asked = command(home, "rm", MODEL)
    assert (asked.returncode, "--yes says so" in asked.stderr) == (2, True)
    assert "comes with MLX Manager" in command(home, "rm", "starter", "--yes").stderr
    assert "There is no model 'nothing' here" in command(home, "rm", "nothing", "--yes").stderr
    done = json.loads(command(home, "rm", MODEL, "--yes", "--json").stdout)
    assert done["freed_bytes"] == sum(len(data) for data in hub.repos[MODEL].files.values())
    assert MODEL not in command(home, "list").stdout
