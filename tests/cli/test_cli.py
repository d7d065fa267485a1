"""The real command in processes of its own, with a real model, without anybody's settings or data."""

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pytest

MODELS = Path(__file__).parents[1] / "fixtures" / "models"
MODEL = "qwen3"
COMMAND = (sys.executable, "-W", "error", "-m", "mlx_manager")
WAIT_S = 60
NAMES = (
    *("serve", "run", "list", "show", "search", "pull", "rm", "profiles", "alias", "probe"),
    *("status", "load", "stop", "ps", "doctor", "bench", "version"),
)


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    """An environment in which nothing is configured and nothing of ours is found."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MLX_MANAGER_", "HF_", "LOGFIRE_", "OTEL_"))}
    return kept | {
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "MLX_MANAGER_DATA_DIR": str(tmp_path / "data"),
        "MLX_MANAGER_LM_STUDIO_DIR": str(tmp_path / "lm-studio"),
        "MLX_MANAGER_MODELS_DIR": str(MODELS),
        "MLX_MANAGER_PORT": str(free_port()),
        "NO_COLOR": "1",
    }


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def command(home: dict[str, str], *arguments: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*COMMAND, *arguments], env=home | environment, input=stdin, capture_output=True, text=True, timeout=WAIT_S)
    assert "Traceback" not in done.stderr, done.stderr
    return done


@dataclass
class Running:
    process: subprocess.Popen[str]
    address: str
    told: list[str]

    def end(self) -> tuple[int, str]:
        """The exit code, and what was said to stderr."""
        _, stderr = self.process.communicate(timeout=WAIT_S)
        return self.process.returncode, stderr


@contextmanager
def serving(home: dict[str, str], *arguments: str) -> Iterator[Running]:
    process = subprocess.Popen([*COMMAND, "serve", *arguments], env=home, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stderr is not None
        told = [process.stdout.readline()]
        found = re.search(r"http://([\d.]+:\d+)", told[0])
        assert found is not None, told[0] + process.stderr.read()
        told += [process.stdout.readline() for _ in range(3)]
        while "Uvicorn running" not in (line := process.stderr.readline()):
            assert line, "it ended"
        yield Running(process, found[1], told)
    finally:
        process.kill()
        process.communicate()


@contextmanager
def asking(address: str, path: str, body: object = None) -> Iterator[http.client.HTTPResponse]:
    with closing(http.client.HTTPConnection(address, timeout=WAIT_S)) as connection:
        if body is None:
            connection.request("GET", path)
        else:
            connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
        with connection.getresponse() as reply:
            yield reply


# Without a server


def test_help_names_every_command_without_importing_what_is_slow(home: dict[str, str]) -> None:
    done = command(home, "--help")
    assert done.returncode == 0
    for name in NAMES:
        assert re.search(rf"\b{name}\b", done.stdout)
    slow = "import sys, mlx_manager.cli; print([m for m in ('pydantic', 'mlx', 'transformers', 'fastapi', 'httpx2') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", slow], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize("name", [*NAMES, "chat", "ls", "info", "unload"])
def test_every_command_and_its_other_name_has_help(name: str) -> None:
    from typer.testing import CliRunner  # noqa: PLC0415 - the only test in this process

    from mlx_manager.cli import app  # noqa: PLC0415 - the only test in this process

    assert CliRunner().invoke(app, [name, "--help"]).exit_code == 0


def test_the_version_is_told_both_ways(home: dict[str, str]) -> None:
    assert command(home, "version").stdout == command(home, "--version").stdout == f"mlx-manager {version('mlx-manager')}\n"


def test_models_are_listed_and_the_unusable_ones_with_their_reason(home: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "models" / "no model").mkdir(parents=True)
    listed = json.loads(command(home, "list", "--json", "--models-dir", str(MODELS), "--models-dir", str(tmp_path / "models")).stdout)
    assert MODEL in [model["id"] for model in listed["models"]]
    (unusable,) = listed["unusable"]
    assert unusable["id"] == "no model"
    assert unusable["reason"]
    shown = command(home, "ls", "--models-dir", str(tmp_path / "models"))
    assert "no model" in shown.stderr


def test_adapters_are_listed_on_their_model_and_the_others_with_their_reason(home: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(MODELS.parent / "adapters", tmp_path / "adapters")
    (tmp_path / "adapters" / "empty").mkdir()
    listed = json.loads(command(home, "list", "--json", "--adapters-dir", str(tmp_path / "adapters")).stdout)
    assert [model["id"] for model in listed["models"] if model["adapter"]] == [f"{MODEL}:butler", f"{MODEL}:pirate"]
    (unusable,) = listed["unusable"]
    assert (unusable["id"], unusable["reason"]) == ("*:empty", "it has no adapter_config.json")
    shown = command(home, "show", f"{MODEL}:pirate", MLX_MANAGER_ADAPTERS_DIR=str(tmp_path / "adapters"))
    assert "mlx-lm, rank 4, scale 10" in shown.stdout
    said = command(home, "run", f"{MODEL}:pirate", "Hello", "--temperature", "0", "--adapters-dir", str(tmp_path / "adapters"))
    assert "Ahoy" in said.stdout, said.stderr


def test_folders_of_models_come_from_the_environment_too(home: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "mine").symlink_to(MODELS / MODEL)
    both = os.pathsep.join([str(tmp_path / "here"), str(MODELS)])
    listed = json.loads(command(home, "list", "--json", MLX_MANAGER_MODELS_DIR=both).stdout)
    assert {"mine", MODEL} <= {model["id"] for model in listed["models"]}


def test_a_model_is_shown_and_an_unknown_one_is_answered_with_what_there_is(home: dict[str, str]) -> None:
    shown = json.loads(command(home, "show", MODEL, "--json").stdout)
    assert (shown["id"], shown["path"], shown["kind"]) == (MODEL, str(MODELS / MODEL), "text")
    assert str(MODELS / MODEL) in command(home, "info", MODEL).stdout
    unknown = command(home, "show", "nope")
    assert unknown.returncode == 1
    assert "'nope'" in unknown.stderr
    assert MODEL in unknown.stderr


def test_a_value_that_is_no_good_is_wrong_usage_and_named(home: dict[str, str]) -> None:
    done = command(home, "list", MLX_MANAGER_PORT="many")
    assert done.returncode == 2
    assert "MLX_MANAGER_PORT" in done.stderr


def test_one_question_is_answered_and_that_is_all_that_is_printed(home: dict[str, str], tmp_path: Path) -> None:
    once = command(home, "run", MODEL, "Hello", "--temperature", "0", "--max-tokens", "200")
    assert once.returncode == 0, once.stderr
    assert once.stdout.strip()
    piped = command(home, "run", MODEL, "--temperature", "0", "--max-tokens", "200", stdin="Hello\n")
    assert piped.stdout == once.stdout
    assert not (tmp_path / "data").exists()  # no database is needed to talk


def test_a_model_that_is_not_there_cannot_be_talked_to(home: dict[str, str]) -> None:
    done = command(home, "run", "nope", "hi")
    assert done.returncode == 1
    assert MODEL in done.stderr
    assert done.stdout == ""


def test_a_benchmark_model_is_made_and_listed_and_not_written_over(home: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "made" / "llama-15m"
    made = command(home, "bench", "--make-model", "llama-15m", str(folder))
    assert (made.returncode, made.stdout.split(": ")[1][:23]) == (0, "15.0 million parameters")
    listed = json.loads(command(home, "list", "--json", "--models-dir", str(folder.parent)).stdout)
    assert "llama-15m" in [model["id"] for model in listed["models"]]
    assert command(home, "bench", "--make-model", "llama-15m", str(folder)).returncode == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--make-model", "gpt-99", "x"], "the shapes are llama-15m, llama-8b"),
        ([], "--model is missing"),
        (["--model", "m", "--peer", "mlx-lm"], "need --model-dir"),
        (["--model", "m", "--ceiling"], "need --model-dir"),
        (["--model", "m", "--peer", "other", "--model-dir", "."], "the peers are mlx-lm, mlx-vlm, vllm-mlx"),
        (["--scenario", "pool"], "needs --model-dir"),
        (["--scenario", "pool", "--scenario", "join", "--model-dir", "."], "measured alone"),
        (["--model", "m", "--scenario", "joining"], "the scenarios are served, join, stall"),
        (["--model", "m", "--scenario", "join:probes=0"], "join takes load=N"),
    ],
)
def test_a_benchmark_that_cannot_be_run_is_wrong_usage_and_says_why(home: dict[str, str], arguments: list[str], said: str) -> None:
    done = command(home, "bench", *arguments)
    assert done.returncode == 2
    assert said in done.stderr


def test_status_without_a_server_says_so(home: dict[str, str]) -> None:
    done = command(home, "status")
    assert done.returncode == 3
    assert f"127.0.0.1:{home['MLX_MANAGER_PORT']}" in done.stderr
    assert command(home, "status", "--host", f"http://127.0.0.1:{free_port()}", "--json").stdout == ""


@pytest.mark.parametrize("arguments", [["profiles"], ["profiles", "show", "a:b"], ["alias", "set", "a", "b"], ["probe", MODEL]])
def test_what_needs_a_server_says_so(home: dict[str, str], arguments: list[str]) -> None:
    done = command(home, *arguments)
    assert (done.returncode, done.stdout) == (3, "")
    assert "mlx-manager serve" in done.stderr


def test_a_profile_needs_a_model_and_a_field_to_unset_must_exist(home: dict[str, str]) -> None:
    assert command(home, "profiles", "set", "terse").returncode == 2
    done = command(home, "profiles", "set", f"{MODEL}:terse", "--unset", "temprature")
    assert (done.returncode, "temperature" in done.stderr) == (2, True)


def test_the_doctor_looks_at_what_is_configured(home: dict[str, str]) -> None:
    done = command(home, "doctor", "--json")
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    assert done.returncode == (1 if any(check["status"] == "fail" for check in checks.values()) else 0)
    assert home["MLX_MANAGER_PORT"] in checks["Port"]["found"]
    assert home["MLX_MANAGER_DATA_DIR"] in checks["Data folder"]["found"]


# What keeps a server from starting


def test_a_server_that_others_can_reach_needs_a_key(home: dict[str, str]) -> None:
    done = command(home, "serve", "--host", "0.0.0.0")
    assert done.returncode == 2
    assert "MLX_MANAGER_API_KEY" in done.stderr


def test_a_taken_port_is_a_sentence(home: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        taken.settimeout(0.0)
        threading.Thread(target=_hang_up, args=(taken,), daemon=True).start()
        done = command(home, "serve", "--port", str(port))
    assert done.returncode == 1
    assert f"{port} is in use" in done.stderr


def _hang_up(server: socket.socket) -> None:
    server.settimeout(WAIT_S)
    try:
        while True:
            server.accept()[0].close()
    except OSError:
        pass


def test_a_database_that_is_none_is_a_sentence(home: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mlx-manager.db").write_bytes(b"not a database, and long enough to be looked at" * 100)
    done = command(home, "serve")
    assert done.returncode == 1
    assert "mlx-manager.db" in done.stderr


# With a server


def test_a_server_tells_how_it_is_and_lets_a_reply_finish_when_it_is_stopped(home: dict[str, str]) -> None:
    with serving(home) as running:
        assert running.address == f"127.0.0.1:{home['MLX_MANAGER_PORT']}"
        assert MODEL in "".join(running.told)
        second = command(home, "serve")
        assert second.returncode == 1
        assert "already running" in second.stderr

        body = {"model": MODEL, "prompt": "count", "stream": True, "max_tokens": 400, "temperature": 1, "seed": 1}
        with asking(running.address, "/v1/completions", body) as reply:
            while not reply.readline().startswith(b"data: "):
                pass  # comments keep the connection alive while the model is loaded
            status = json.loads(command(home, "status", "--json").stdout)
            assert MODEL in [model["id"] for model in status["models"]]
            running.process.terminate()
            assert reply.read().endswith(b"data: [DONE]\n\n")
        code, stderr = running.end()
    assert code == 0
    assert "Traceback" not in stderr


def test_profiles_and_aliases_are_made_changed_shown_and_removed(home: dict[str, str]) -> None:
    profile = f"{MODEL}:terse"
    with serving(home) as running:
        assert "profiles set" in command(home, "profiles").stdout
        presets = ["--temperature", "0", "--no-enable-thinking", "--stop", "7", "--stop", "9", "--seed", "-3"]
        made = command(home, "profiles", "set", profile, "--description", "Short.\nAnd greedy.", *presets)
        assert made.stdout == f"{profile} says: temperature, seed, stop, enable_thinking.\n", made.stderr
        refused = command(home, "profiles", "set", profile, "--temperature", "3")
        assert (refused.returncode, "temperature" in refused.stderr) == (1, True)
        changed = command(home, "profiles", "set", profile, "--unset", "stop", "--max-tokens", "9", "--json", "--host", running.address)
        told = json.loads(changed.stdout)
        assert (told["temperature"], told["seed"], told["stop"], told["max_tokens"], told["version"]) == (0, -3, None, 9, 2)
        assert told == json.loads(command(home, "profiles", "show", profile, "--json").stdout)
        assert "And greedy." in command(home, "profiles", "show", profile).stdout
        listed = command(home, "profiles", "list").stdout
        assert "Short." in listed
        assert "max_tokens" in listed

        assert "stands for" in command(home, "alias", "set", "gpt-4o", profile).stdout
        assert "not on the server's machine yet" in command(home, "alias", "set", "gpt-4o", "someone/large").stdout
        assert json.loads(command(home, "alias", "list", "--json").stdout)["aliases"][0]["target"] == "someone/large"
        assert command(home, "alias", "show", "gpt-4o").stdout.startswith("gpt-4o stands for someone/large.")
        assert command(home, "alias", "rm", "gpt-4o").returncode == command(home, "profiles", "rm", profile).returncode == 0
        gone = command(home, "profiles", "rm", profile)
        assert (gone.returncode, gone.stderr) == (1, f"There is no profile '{profile}'.\n")


def test_what_a_probe_finds_is_shown_without_the_server_too(home: dict[str, str]) -> None:
    assert "yes (guessed), <tool_call>" in command(home, "show", MODEL).stdout
    with serving(home):
        probed = command(home, "probe", MODEL)
        assert probed.returncode == 0, probed.stderr
        assert re.search(r"Tools +yes \(verified\) +it called get_weather", probed.stdout)
        assert re.search(r"Vision +no \(failed\)", probed.stdout)
        unknown = command(home, "probe", "nobody")
        assert (unknown.returncode, "nobody" in unknown.stderr) == (1, True)
    shown = json.loads(command(home, "show", MODEL, "--json").stdout)["abilities"]
    assert (shown["tools"]["status"], shown["vision"]["status"], shown["options"][0]) == ("verified", "failed", "enable_thinking")
    assert "no (failed)" in command(home, "show", MODEL).stdout
    Path(home["MLX_MANAGER_DATA_DIR"], "mlx-manager.db").write_bytes(b"no database at all" * 1000)
    assert "yes (guessed)" in command(home, "show", MODEL).stdout


def test_a_server_is_measured_in_scenarios(home: dict[str, str], tmp_path: Path) -> None:
    scenarios = ("overhead:requests=2", "join:load=2,load_tokens=8,probes=2", "shared-prefix:requests=2,prompt_tokens=60")
    flags = [word for scenario in scenarios for word in ("--scenario", scenario)]
    with serving(home, "--port", "0") as server:
        url = f"http://{server.address}"
        done = command(home, "bench", "--url", url, "--model", MODEL, "--repeats", "1", *flags, "--json", str(tmp_path / "seen.json"))
    assert done.returncode == 0, done.stderr
    for name in ("overhead", "join", "shared-prefix"):
        assert f"{name}: " in done.stdout
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert [one["scenario"]["name"] for one in seen["scenarios"]] == ["overhead", "join", "shared-prefix"]
    assert all(value is not None for one in seen["scenarios"] for value in one["measures"].values())
    assert seen["figures"] == []


def test_ctrl_c_ends_a_server_that_has_nothing_to_do(home: dict[str, str]) -> None:
    with serving(home, "--port", "0") as running:
        with asking(running.address, "/health") as reply:
            assert json.load(reply) == {"status": "ok"}
        running.process.send_signal(signal.SIGINT)
        code, stderr = running.end()
    assert code == 0
    assert "Traceback" not in stderr
