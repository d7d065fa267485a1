"""Clients from npm, in the versions of a committed package.json and its lock, in a folder outside of the repository."""

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from platformdirs import user_cache_path

CACHE = Path(os.environ.get("CLIENTS_CACHE", user_cache_path("mlx-manager-clients", appauthor=False)))
INSTALL_S = 900.0


def installed(package: Path) -> Path:
    """The folder with that package's `node_modules`, and its own files beside them. It is made once for each lock."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not there")
    lock = (package / "package-lock.json").read_bytes()
    folder = CACHE / f"{package.name}-{hashlib.sha256(lock).hexdigest()[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    for file in package.iterdir():
        shutil.copy(file, folder)
    done = folder / ".installed"
    if not done.exists():
        # Scripts of packages are not run: none of these needs them, and they could do anything.
        subprocess.run(["npm", "ci", "--ignore-scripts", "--no-fund", "--no-audit"], cwd=folder, check=True, timeout=INSTALL_S)
        done.touch()
    return folder
