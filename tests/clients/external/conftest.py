from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.external.outside import Outside, nobody_gets_out
from tests.clients.external.parrot import make_parrot
from tests.e2e.serving import FIXTURE_MODELS

NOTE = "A heron stands in the river."


@pytest.fixture(scope="session")
def note(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file in the folder that the agents work in."""
    path = tmp_path_factory.mktemp("work") / "note.txt"
    path.write_text(NOTE + "\n")
    return path


@pytest.fixture(scope="session")
def models_dirs(tmp_path_factory: pytest.TempPathFactory, note: Path) -> list[Path]:
    """The fixture models, one that only talks, and for each agent one that reads the note first, by the agent's own tool."""
    folder = tmp_path_factory.mktemp("models")
    make_parrot(folder, "parrot")
    make_parrot(folder, "reader-claude", {"name": "Read", "arguments": {"file_path": str(note)}})
    make_parrot(folder, "reader-codex", {"name": "exec_command", "arguments": {"cmd": f"cat {note}"}})
    make_parrot(folder, "reader-opencode", {"name": "read", "arguments": {"filePath": str(note)}})
    return [FIXTURE_MODELS, folder]


@pytest.fixture
def outside() -> Iterator[Outside]:
    with nobody_gets_out() as outside:
        yield outside
