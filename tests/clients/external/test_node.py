"""SDKs for Node: OpenAI's, Anthropic's, and Vercel's AI SDK over every protocol. What they do is in node/*.mjs."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.clients.external.installing import installed
from tests.clients.witness import Witness
from tests.e2e.serving import GENEROUS_S, Running
from tests.e2e.test_pictures import encoded

OPENAI = ["models", "chat", "chat_stream", "chat_tools", "chat_form", "chat_picture", "responses", "responses_stream", "responses_tools"]
OPENAI += ["responses_form", "embeddings", "a_mistake_is_an_exception_of_its_kind"]
ANTHROPIC = ["models", "messages", "stream", "thinking", "tools", "form", "picture", "count_tokens"]
ANTHROPIC += ["a_mistake_is_an_exception_of_its_kind"]
AI = [
    f"{p}.{s}" for p in ("responses", "chat", "compatible", "messages") for s in ("text", "stream", "tools", "form", "picture", "two_turns")
]
AI += ["responses.embed", "compatible.embed"]
SCENARIOS = {"openai": OPENAI, "anthropic": ANTHROPIC, "ai": AI}
MISTAKES = "a_mistake_is_an_exception_of_its_kind"


@pytest.fixture(scope="session")
def sdks() -> Path:
    return installed(Path(__file__).parent / "node")


def node(folder: Path, script: str, *arguments: str, **environment: str) -> str:
    command = [shutil.which("node") or "node", f"{script}.mjs", *arguments]
    path = {"PATH": os.environ["PATH"]}
    done = subprocess.run(command, cwd=folder, env=path | environment, capture_output=True, text=True, timeout=GENEROUS_S, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("script", SCENARIOS)
def test_no_scenario_is_left_out(sdks: Path, script: str) -> None:
    assert sorted(node(sdks, script, SERVER_URL="http://127.0.0.1:1").split()) == sorted(SCENARIOS[script])


@pytest.mark.parametrize(("script", "scenario"), [(script, s) for script, names in SCENARIOS.items() for s in names if s != MISTAKES])
def test_it_works(sdks: Path, server: Running, wire: Witness, script: str, scenario: str) -> None:
    node(sdks, script, scenario, SERVER_URL=server.url, PICTURE=encoded("green"))
    ignored = {name for exchange in wire.exchanges() for name in exchange.ignored}
    assert ignored == set()


def test_the_ai_sdk_refers_to_what_it_takes_to_be_kept(sdks: Path, server: Running, wire: Witness) -> None:
    """It says nothing of `store`, and sends the turn before as references."""
    node(sdks, "ai", "responses.two_turns", SERVER_URL=server.url)
    _, second = wire.exchanges("/v1/responses")
    assert "store" not in second.body
    assert "item_reference" in [item.get("type") for item in second.body["input"]]


class TestMistakes:
    @pytest.fixture
    def wire(self) -> None:
        """Without the check that nothing is refused."""

    @pytest.mark.parametrize("script", ["openai", "anthropic"])
    def test_a_mistake_is_an_exception_of_its_kind(self, sdks: Path, server: Running, script: str) -> None:
        node(sdks, script, MISTAKES, SERVER_URL=server.url)
