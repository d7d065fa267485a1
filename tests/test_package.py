"""What a user installs: the wheel, and nothing but the wheel."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's content, built from this checkout without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder], cwd=ROOT, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_has_the_starter_model_the_migrations_and_the_page(unpacked: Path) -> None:
    package = unpacked / "mlx_manager"
    assert (package / "bundled" / "starter" / "model.safetensors").exists()
    assert (package / "bundled" / "starter" / "README.md").exists()
    assert list((package / "storage" / "migrations" / "versions").glob("*.py"))
    assert (package / "api" / "page" / "index.html").exists()


def test_the_unpacked_wheel_answers_with_the_starter_and_tries_no_network(unpacked: Path, tmp_path: Path) -> None:
    # An audit hook sees every connection that Python code opens, whatever library asks for it.
    guard = tmp_path / "sitecustomize.py"
    guard.write_text(
        "import sys\n"
        "def hook(event, args):\n"
        "    if event == 'socket.getaddrinfo' or (event == 'socket.connect' and args[1][0] != '127.0.0.1'):\n"
        "        sys.stderr.write(f'NETWORK {event} {args[1:]}\\n')\n"
        "        raise OSError('this machine has no network')\n"
        "sys.addaudithook(hook)\n"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": f"{tmp_path}{os.pathsep}{unpacked}",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "hf"),
        "MLX_MANAGER_DATA_DIR": str(tmp_path / "data"),
    }
    reply = subprocess.run(
        [sys.executable, "-m", "mlx_manager", "run", "starter", "Hello", "--temperature", "0"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert reply.returncode == 0, reply.stderr
    assert "Hello" in reply.stdout
    assert "NETWORK" not in reply.stderr
    where = [sys.executable, "-c", "import mlx_manager; print(mlx_manager.__file__)"]
    assert str(unpacked) in subprocess.run(where, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
