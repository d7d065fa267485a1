from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.witness import Witness
from tests.e2e.serving import Running, serve_process


@pytest.fixture(scope="session")
def witnessed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, Path]]:
    data_dir = tmp_path_factory.mktemp("clients")
    path = data_dir / "witness.jsonl"
    path.touch()
    with serve_process(data_dir, {"CLIENTS_WITNESS": str(path)}, program="tests.clients.process") as running:
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
