import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.witness import Witness
from tests.e2e.serving import FIXTURE_MODELS, Running, serve_process

# These install what they test: `make clients`.
collect_ignore = [] if os.environ.get("CLIENTS") else ["external"]


@pytest.fixture(scope="session")
def models_dirs() -> list[Path]:
    return [FIXTURE_MODELS]


@pytest.fixture(scope="session")
def witnessed(tmp_path_factory: pytest.TempPathFactory, models_dirs: list[Path]) -> Iterator[tuple[Running, Path]]:
    data_dir = tmp_path_factory.mktemp("clients")
    path = data_dir / "witness.jsonl"
    path.touch()
    settings = {"CLIENTS_WITNESS": str(path), "MLX_MANAGER_MODELS_DIR": os.pathsep.join(map(str, models_dirs))}
    with serve_process(data_dir, settings, program="tests.clients.process") as running:
        yield running, path


@pytest.fixture
def server(witnessed: tuple[Running, Path]) -> Running:
    return witnessed[0]


@pytest.fixture(autouse=True)
def wire(witnessed: tuple[Running, Path]) -> Iterator[Witness]:
    """Nothing that these clients send on their own account is refused or fails."""
    running, path = witnessed
    witness = Witness(running, path, path.stat().st_size)
    yield witness
    assert witness.failures() == []
