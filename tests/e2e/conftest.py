import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI

from tests.e2e.serving import FIXTURE_MODELS, Running, make_small_window_model, serve_process


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One server for all tests that leave it as they found it. It logs everything there is to log."""
    data_dir: Path = tmp_path_factory.mktemp("server")
    make_small_window_model(data_dir / "models")
    folders = os.pathsep.join(map(str, (FIXTURE_MODELS, data_dir / "models")))
    with serve_process(data_dir, {"MLX_MANAGER_LOG_LEVEL": "debug", "MLX_MANAGER_MODELS_DIR": folders}) as running:
        yield running


@pytest.fixture(scope="session")
def client(server: Running) -> Iterator[OpenAI]:
    with server.openai() as client:
        yield client
