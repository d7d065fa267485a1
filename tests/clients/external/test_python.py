"""SDKs for Python that cannot stand beside the newest: older ones, and what needs older ones. Each in an environment of its own."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.clients.external.installing import CACHE, INSTALL_S
from tests.clients.witness import Exchange, Witness
from tests.e2e.serving import GENEROUS_S, Running
from tests.e2e.test_pictures import encoded

SCRIPTS = Path(__file__).parent / "python"
OPENAI = ["models", "chat", "tools", "form", "picture", "completions", "responses", "embeddings", "mistake"]
ANTHROPIC = ["models", "messages", "thinking", "tools", "picture", "count_tokens", "mistake"]


def environment(requirements: tuple[str, ...]) -> Path:
    """The Python of an environment with these, made once."""
    folder = CACHE / f"python-{hashlib.sha256(' '.join((sys.version, *requirements)).encode()).hexdigest()[:12]}"
    python = folder / "bin" / "python"
    done = folder / ".installed"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True, timeout=INSTALL_S)
        command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements]
        subprocess.run(command, check=True, timeout=INSTALL_S)
        done.touch()
    return python


@pytest.fixture
def wire(witnessed: tuple[Running, Path]) -> Witness:
    """Without the check that nothing is refused: the scripts make a mistake, to see what it comes out as."""
    running, path = witnessed
    return Witness(running, path, path.stat().st_size)


def is_the_mistake(exchange: Exchange) -> bool:
    return exchange.body.get("model") == "nobody"


@pytest.mark.parametrize(
    ("script", "requirements", "passed"),
    [
        ("openai_sdk", ("openai==1.109.1",), OPENAI),
        ("openai_sdk", ("openai==2.54.0",), OPENAI),
        ("anthropic_sdk", ("anthropic==0.121.0",), ANTHROPIC),
        ("anthropic_sdk", ("anthropic==1.17.0",), ANTHROPIC),
        ("instructor_forms", ("instructor==1.17.0", "openai==3.3.0"), ["TOOLS", "JSON_SCHEMA"]),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_it_works(server: Running, wire: Witness, script: str, requirements: tuple[str, ...], passed: list[str]) -> None:
    around = {"PATH": os.environ["PATH"], "SERVER_URL": server.url, "PICTURE": encoded("green")}
    command = [environment(requirements), SCRIPTS / f"{script}.py"]
    done = subprocess.run(command, env=around, capture_output=True, text=True, timeout=GENEROUS_S, check=False)
    assert (done.returncode, done.stdout.split()) == (0, passed), done.stderr
    exchanges = [e for e in wire.exchanges() if not is_the_mistake(e)]
    assert [e.failure for e in exchanges if e.failure is not None] == []
    assert {name for e in exchanges for name in e.ignored} == set()
