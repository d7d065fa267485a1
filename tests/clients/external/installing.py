"""Clients from npm, in the versions of a committed package.json, in a folder outside of the repository."""

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
    """The folder with that package's `node_modules`, and its own files beside them. It is made once for each set of versions."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not there")
    # What is there for one platform only stands in no lock that is made on another: where that is all there is, there is none.
    lock = package / "package-lock.json"
    versions = (lock if lock.exists() else package / "package.json").read_bytes()
    folder = CACHE / f"{package.name}-{hashlib.sha256(versions).hexdigest()[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    for file in package.iterdir():
        shutil.copy(file, folder)
    done = folder / ".installed"
    if not done.exists():
        # Scripts of packages are not run: none of these needs them, and they could do anything.
        command = ["npm", "ci"] if lock.exists() else ["npm", "install", "--no-package-lock"]
        subprocess.run([*command, "--ignore-scripts", "--no-fund", "--no-audit"], cwd=folder, check=True, timeout=INSTALL_S)
        done.touch()
    return folder
