"""What is right and wrong with this machine and installation, for `doctor` and for the start of `serve`. Looks, and changes nothing."""

import errno
import os
import platform
import re
import shutil
import socket
import sqlite3
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import psutil
from huggingface_hub import constants

from mlx_manager.config import BUNDLED_MODELS
from mlx_manager.hub.local import Catalogue, hub_cache_folder
from mlx_manager.inference.blas import Blas
from mlx_manager.storage.database import SqliteVersion, has_wal_reset_bug, journal_mode

MINIMUM_VERSIONS = {"mlx": (0, 32), "mlx-lm": (0, 32, 2)}
"""Before them, running out of Metal memory aborted the process, and a model's configuration could run code."""
GIB = 1 << 30
LOW_MEMORY_BYTES = GIB
LOW_DISK_BYTES = 2 * GIB
NO_DISK_BYTES = GIB // 16


@dataclass(frozen=True, slots=True)
class Check:
    """One finding. `fail` keeps the server from working, `warn` makes it slower or poorer; `fix` is what a person can do."""

    name: str
    status: Literal["ok", "warn", "fail"]
    found: str
    fix: str | None = None


def examine(
    *,
    data_dir: Path,
    host: str,
    port: int,
    models: Catalogue,
    blas: Blas,
    free_disk_bytes: Callable[[Path], int] = lambda folder: shutil.disk_usage(folder).free,
) -> list[Check]:
    """Every check, in the order to read them. Imports MLX; takes well under a second besides, and no network."""
    installed = {_normal(distribution.name): distribution.version for distribution in metadata.distributions()}
    device = _device()
    return [
        Check("Python", "ok", f"{platform.python_version()} ({platform.platform()})"),
        *(version_check(name, installed.get(name), minimum) for name, minimum in MINIMUM_VERSIONS.items()),
        libraries_check(installed),
        device_check(device, installed),
        blas_check(blas, is_used=device is None or not device.is_gpu),
        memory_check(psutil.virtual_memory().total, psutil.virtual_memory().available, device.recommended_bytes if device else None),
        sqlite_check(sqlite3.sqlite_version_info),
        *folder_checks(data_dir, free_disk_bytes),
        port_check(host, port),
        hub_check(),
        models_check(models),
    ]


def version_check(name: str, version: str | None, minimum: tuple[int, ...]) -> Check:
    wanted = f"{name}>={'.'.join(map(str, minimum))}"
    if version is None:
        return Check(name, "fail", "not installed", f"install {wanted}")
    if not is_at_least(version, minimum):
        return Check(name, "fail", version, f"install {wanted}")
    return Check(name, "ok", version)


def is_at_least(version: str, minimum: tuple[int, ...]) -> bool:
    """By the release numbers alone: a development version of a release counts as that release."""
    numbers = re.match(r"\d+(\.\d+)*", version)
    return numbers is not None and tuple(map(int, numbers[0].split("."))) >= minimum


def libraries_check(installed: Iterable[str]) -> Check:
    """mlx-cpu and mlx-cuda-… own the same libmlx.so: the one installed last is in use, and removing either removes it."""
    backends = sorted(name for name in installed if name == "mlx-cpu" or re.fullmatch(r"mlx-cuda(-?\d+)?", name))
    found = ", ".join(backends) or "part of mlx"
    if len(backends) > 1:
        cuda = backends[-1]
        return Check("MLX library", "fail", f"{found} overwrite each other", f"uninstall mlx-cpu, then reinstall {cuda} alone")
    return Check("MLX library", "ok", found)


@dataclass(frozen=True, slots=True)
class Device:
    backend: Literal["Metal", "CUDA", "CPU"]
    name: str
    recommended_bytes: int | None
    """What the device advises to use at most; CPUs advise nothing."""

    @property
    def is_gpu(self) -> bool:
        return self.backend != "CPU"


def _device() -> Device | None:
    """What MLX computes on; None if it cannot be imported."""
    try:
        import mlx.core as mx  # noqa: PLC0415 - a broken installation is a finding, not a crash
    except ImportError:
        return None
    info = mx.device_info()
    recommended = info.get("max_recommended_working_set_size")
    is_gpu = mx.default_device() == mx.Device(mx.gpu)
    backend = "CPU" if not is_gpu else "Metal" if mx.metal.is_available() else "CUDA"
    return Device(backend, str(info.get("device_name", "unknown")), recommended if isinstance(recommended, int) else None)


def device_check(device: Device | None, installed: Iterable[str]) -> Check:
    if device is None:
        return Check("Device", "fail", "MLX cannot be imported", "reinstall mlx; on Linux with one of its extras, cpu or cuda13")
    found = f"{device.backend}: {device.name}"
    if not device.is_gpu and any(name.startswith("mlx-cuda") for name in installed):
        return Check("Device", "warn", found, "MLX for CUDA is installed and finds no GPU: check the driver with nvidia-smi")
    if not device.is_gpu and sys.platform == "darwin":
        return Check("Device", "warn", found, "MLX finds no Metal: it needs an Apple chip and an arm64 Python")
    return Check("Device", "ok", found)


def blas_check(blas: Blas, *, is_used: bool) -> Check:
    """Only the CPU's matrix products need it."""
    found = f"{blas.name} ({blas.path or blas.why})"
    if blas.name == "reference" and is_used:
        return Check("BLAS", "warn", found, "install OpenBLAS (Debian: libopenblas0), which is 3 to 60 times faster")
    return Check("BLAS", "ok", found)


def memory_check(total_bytes: int, available_bytes: int, recommended_bytes: int | None) -> Check:
    found = f"{_gib(available_bytes)} of {_gib(total_bytes)} available"
    if recommended_bytes is not None:
        found += f", MLX advises at most {_gib(recommended_bytes)}"
    if available_bytes < LOW_MEMORY_BYTES:
        return Check("Memory", "warn", found, "close other programs, or use a smaller model")
    return Check("Memory", "ok", found)


def sqlite_check(version: SqliteVersion) -> Check:
    found = f"{'.'.join(map(str, version))}, journal {journal_mode(version)}"
    if has_wal_reset_bug(version):
        return Check("SQLite", "warn", found, "use a Python with SQLite 3.51.3 or later: this one's write-ahead log can be corrupted")
    return Check("SQLite", "ok", found)


def folder_checks(data_dir: Path, free_disk_bytes: Callable[[Path], int]) -> list[Check]:
    """A folder that is not there yet is made at the first start, so its nearest parent is looked at."""
    folder = next(path for path in (data_dir, *data_dir.absolute().parents) if os.path.exists(path))
    if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        return [Check("Data folder", "fail", f"{folder} cannot be written to", "change its permissions, or choose another --data-dir")]
    free_bytes = free_disk_bytes(folder)
    found = f"{_gib(free_bytes)} free at {folder}"
    return [
        Check("Data folder", "ok", f"{data_dir}{'' if folder == data_dir else ' (not made yet)'}"),
        Check("Disk", "fail", found, "make room, or choose another --data-dir")
        if free_bytes < NO_DISK_BYTES
        else Check("Disk", "warn", found, "make room: a model takes gigabytes")
        if free_bytes < LOW_DISK_BYTES
        else Check("Disk", "ok", found),
    ]


def port_check(host: str, port: int) -> Check:
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does: connections in TIME_WAIT do not count
            probe.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return Check("Port", "fail", f"{host}:{port} is in use{_listener(port)}", "stop that program, or choose another --port")
        return Check("Port", "fail", f"{host}:{port}: {error.strerror}", "choose another --host or --port")
    return Check("Port", "ok", f"{host}:{port} is free")


def _listener(port: int) -> str:
    """` by NAME (pid N)`; nothing where the system does not tell whose it is."""
    with suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            listens_there = connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port
            if listens_there and connection.pid is not None:
                return f" by {psutil.Process(connection.pid).name()} (pid {connection.pid})"
    return ""


def hub_check() -> Check:
    folder = hub_cache_folder()
    found = f"{folder}{'' if folder.is_dir() else ' (not made yet)'}{', HF_HUB_OFFLINE is set' if constants.HF_HUB_OFFLINE else ''}"
    return Check("Hugging Face cache", "ok", found)


def models_check(models: Catalogue) -> Check:
    found = f"{len(models.models)} usable, {len(models.unusable)} unusable"
    if not any(model.path.is_relative_to(BUNDLED_MODELS) for model in models.models):
        return Check("Models", "warn", f"{found}, no starter model", "reinstall mlx-manager: its starter model comes with it")
    return Check("Models", "ok", found)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f} GiB"
