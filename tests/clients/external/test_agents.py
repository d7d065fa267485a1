"""Agents for the terminal: one turn, the next turn of the session, and a turn with a tool. They run as they come, in a home of their own.

What a model says does not matter here. What does: the agent ends well, nothing that it sends is refused or has no effect unnamed, and of
the ten thousand tokens and more that it sends with every request only the new ones are computed.
"""

import json
import os
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.clients.external.conftest import NOTE
from tests.clients.external.installing import installed
from tests.clients.external.outside import Outside
from tests.clients.external.parrot import CONTEXT, SAID
from tests.clients.witness import Exchange, Witness
from tests.e2e.serving import Running

TURN_S = 100.0
# Its context of 4096 tokens does not hold what an agent says before the first word of its user.
SMALL = "qwen3"
FIRST, SECOND = "Say apple three times.", "And again."


@dataclass(frozen=True)
class Agent:
    """`run` takes what to say, to which model, and further arguments; it returns what the agent wrote and raises if it did not end well.
    `too_long` is what it says to a prompt that does not fit, if it has understood why. `noted` are the fields that it sends and that have
    no effect. `asks` is whom it wants to reach outside though everything is off that can be; it goes on without an answer."""

    name: str
    path: str
    run: Callable[..., str]
    again: tuple[str, ...]
    too_long: str
    noted: frozenset[str] = frozenset()
    asks: frozenset[str] = frozenset()


def run(command: list[str], folder: Path, environment: dict[str, str]) -> str:
    """Ended with all that it started if it takes too long."""
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=TURN_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError(f"it did not end:\n{out.decode()}\n{err.decode()}") from None
    assert process.returncode == 0, f"{out.decode()}\n{err.decode()}"
    return out.decode()


@pytest.fixture(scope="session")
def packages() -> Path:
    return installed(Path(__file__).parent / "agents") / "node_modules"


def binary(packages: Path, pattern: str) -> str:
    """The build for this machine. Of several (another libc, older processors) the plain one has the shortest name."""
    return str(min(packages.glob(pattern), key=lambda path: len(str(path))))


@pytest.fixture
def home(tmp_path: Path, outside: Outside) -> dict[str, str]:
    """A throw-away home, and no way out but to the server."""
    path = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "NO_COLOR": "1"}
    return path | {"HTTPS_PROXY": outside.url, "HTTP_PROXY": outside.url, "NO_PROXY": "127.0.0.1,localhost"}


def claude(packages: Path, server: Running, note: Path, home: dict[str, str]) -> Agent:
    environment = home | {
        "ANTHROPIC_BASE_URL": server.url,
        "ANTHROPIC_AUTH_TOKEN": "none",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "CLAUDE_CODE_MAX_CONTEXT_TOKENS": str(CONTEXT),
        "DISABLE_TELEMETRY": "1",
        "DISABLE_ERROR_REPORTING": "1",
        "DISABLE_AUTOUPDATER": "1",
    }
    program = binary(packages, "@anthropic-ai/claude-code-*/claude")

    def turn(text: str, model: str, *arguments: str) -> str:
        command = [
            program,
            "-p",
            text,
            "--model",
            model,
            "--tools",
            "Read",
            "--allowedTools",
            "Read",
            "--output-format",
            "json",
            *arguments,
        ]
        result = json.loads(run(command, note.parent, environment))
        assert (result["subtype"], result["is_error"]) == ("success", False)
        assert result["modelUsage"][model]["contextWindow"] == CONTEXT
        return str(result["result"])

    noted = frozenset({"context_management", "metadata", "tools.defer_loading"})
    return Agent("claude", "/v1/messages", turn, ("--continue",), r"Prompt is too long .*limit 4096", noted=noted)


def codex(packages: Path, server: Running, note: Path, home: dict[str, str]) -> Agent:
    folder = Path(home["HOME"]) / ".codex"
    folder.mkdir()
    (folder / "config.toml").write_text(f"""
model_provider = "mlx-manager"
model_context_window = {CONTEXT}
check_for_update_on_startup = false
sandbox_mode = "read-only"

[model_providers.mlx-manager]
name = "MLX Manager"
base_url = "{server.url}/v1"
wire_api = "responses"
request_max_retries = 0
stream_max_retries = 0

[analytics]
enabled = false

[features]
apps = false
plugins = false
""")
    program = binary(packages, "@openai/codex-*/vendor/*/bin/codex")

    def turn(text: str, model: str, *arguments: str) -> str:
        return run([program, "exec", *arguments, "--skip-git-repo-check", "--model", model, text], note.parent, home)

    noted = frozenset({"client_metadata", "prompt_cache_key", "tools.web_search"})
    return Agent("codex", "/v1/responses", turn, ("resume", "--last"), "ran out of room in the model's context window", noted=noted)


def opencode(packages: Path, server: Running, note: Path, home: dict[str, str]) -> Agent:
    names = ("parrot", "reader-opencode", SMALL)
    models = {f"a-{name}": {"id": name, "limit": {"context": CONTEXT, "output": 4096}} for name in names}
    provider = {"npm": "@ai-sdk/openai-compatible", "options": {"baseURL": f"{server.url}/v1", "apiKey": "none"}, "models": models}
    config = {
        "autoupdate": False,
        "share": "disabled",
        "small_model": "mlx-manager/a-parrot",
        "provider": {"mlx-manager": provider},
        "permission": {"edit": "deny", "bash": "deny", "webfetch": "deny"},
    }
    environment = home | {
        "OPENCODE_CONFIG_CONTENT": json.dumps(config),
        "OPENCODE_DISABLE_AUTOUPDATE": "1",
        "OPENCODE_DISABLE_MODELS_FETCH": "1",
        "OPENCODE_DISABLE_LSP_DOWNLOAD": "1",
        "OPENCODE_PURE": "1",
    }
    program = binary(packages, "opencode-*/bin/opencode")

    def turn(text: str, model: str, *arguments: str) -> str:
        return run([program, "run", "--model", f"mlx-manager/a-{model}", *arguments, text], note.parent, environment)

    return Agent(
        "opencode",
        "/v1/chat/completions",
        turn,
        ("--continue",),
        "maximum context length is 4096 tokens",
        asks=frozenset({"registry.npmjs.org:443"}),
    )


@pytest.fixture(params=[claude, codex, opencode], ids=lambda make: make.__name__)
def agent(request: pytest.FixtureRequest, packages: Path, server: Running, note: Path, home: dict[str, str]) -> Agent:
    made: Agent = request.param(packages, server, note, home)
    return made


def with_tools(wire: Witness, agent: Agent) -> list[Exchange]:
    """The requests of the conversation itself: titles and the like are asked for without tools."""
    exchanges = wire.exchanges(agent.path)
    assert {name for e in exchanges for name in e.ignored} <= agent.noted
    return [e for e in exchanges if e.body.get("tools")]


def reuse(exchange: Exchange) -> float:
    prompt, cached = exchange.prompt
    return cached / prompt


def test_the_next_turn_of_a_session_computes_only_what_is_new(agent: Agent, wire: Witness, outside: Outside) -> None:
    assert SAID in agent.run(FIRST, "parrot")
    assert SAID in agent.run(SECOND, "parrot", *agent.again)
    first, second = with_tools(wire, agent)
    assert first.prompt[0] > 1000
    assert second.prompt[0] > first.prompt[0]
    assert reuse(second) >= 0.95
    assert outside.asked <= agent.asks


def test_a_tool_is_called_and_its_result_comes_back(agent: Agent, wire: Witness) -> None:
    assert SAID in agent.run("What does the note say?", f"reader-{agent.name}")
    call, answer = with_tools(wire, agent)
    assert NOTE not in call.request
    assert NOTE in answer.request
    assert reuse(answer) >= 0.95


class TestTooLong:
    @pytest.fixture
    def wire(self, witnessed: tuple[Running, Path]) -> Witness:
        """Without the check that nothing is refused."""
        running, path = witnessed
        return Witness(running, path, path.stat().st_size)

    def test_a_prompt_that_does_not_fit_is_told_in_words_that_the_agent_knows(self, agent: Agent, wire: Witness) -> None:
        with pytest.raises(AssertionError, match=agent.too_long):
            agent.run(FIRST, SMALL)
        refused = [e.request for e in wire.exchanges(agent.path) if e.failure is not None]
        assert refused
        assert len(set(refused)) == len(refused), "it tries again, but never with the same"
