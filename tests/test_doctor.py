import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_manager import doctor
from mlx_manager.config import BUNDLED_MODELS
from mlx_manager.doctor import Check, Device, examine
from mlx_manager.hub.checkpoint import Checkpoint
from mlx_manager.hub.local import Catalogue, UnusableModel
from mlx_manager.inference.blas import Blas

OPENBLAS = Blas("openblas", Path("/lib/libopenblas.so.0"), "found")
REFERENCE = Blas("reference", None, "MLX_MANAGER_BLAS=off")
CPU = Device("CPU", "a CPU", None)
METAL = Device("Metal", "an Apple chip", 48 * doctor.GIB)
NOTHING = Catalogue((), ())


def model(path: Path) -> Checkpoint:
    return Checkpoint(path.name, path, "text", "llama", 2048, 1_000, None, 500, 0)


def look(data_dir: Path, free_disk_bytes: Callable[[Path], int] = lambda _: 100 * doctor.GIB, port: int = 0) -> dict[str, Check]:
    checks = examine(data_dir=data_dir, host="127.0.0.1", port=port, models=NOTHING, blas=OPENBLAS, free_disk_bytes=free_disk_bytes)
    assert len({check.name for check in checks}) == len(checks)
    return {check.name: check for check in checks}


def test_what_is_wrong_comes_with_what_to_do(tmp_path: Path) -> None:
    checks = look(tmp_path)
    assert all((check.fix is None) == (check.status == "ok") for check in checks.values())
    assert list(checks) == [
        "Python", "mlx", "mlx-lm", "MLX library", "Device", "BLAS", "Memory", "SQLite", "Data folder", "Disk", "Port",
        "Hugging Face cache", "Models",
    ]  # fmt: skip


def test_this_installation_can_serve(tmp_path: Path) -> None:
    checks = look(tmp_path)
    assert [check for check in checks.values() if check.status == "fail"] == []
    assert checks["Device"].found.startswith(("CPU: ", "Metal: ", "CUDA: "))


def test_a_taken_port_names_who_has_it(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        check = look(tmp_path, port=port)["Port"]
    assert check.status == "fail"
    assert f"127.0.0.1:{port} is in use" in check.found
    if sys.platform == "linux":
        assert f"(pid {os.getpid()})" in check.found
    assert look(tmp_path, port=port)["Port"].status == "ok"


def test_an_address_that_is_not_this_machines_fails() -> None:
    assert doctor.port_check("192.0.2.1", 10242).status == "fail"
    assert doctor.port_check("name.invalid", 10242).status == "fail"


def test_a_folder_not_made_yet_is_fine(tmp_path: Path) -> None:
    data_dir = tmp_path / "not" / "yet"
    assert look(data_dir)["Data folder"] == Check("Data folder", "ok", f"{data_dir} (not made yet)")
    assert not data_dir.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_fails(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert look(tmp_path / "data")["Data folder"].status == "fail"


def test_a_file_in_the_folders_place_fails(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert look(tmp_path / "file")["Data folder"].status == "fail"
    assert look(tmp_path / "file" / "data")["Data folder"].status == "fail"


@pytest.mark.parametrize(("free_bytes", "status"), [(0, "fail"), (doctor.GIB, "warn"), (3 * doctor.GIB, "ok")])
def test_a_disk_that_fills_up_is_noticed(tmp_path: Path, free_bytes: int, status: str) -> None:
    assert look(tmp_path, lambda _: free_bytes)["Disk"].status == status


@pytest.mark.parametrize(
    ("version", "is_enough"),
    [
        ("0.32.2", True), ("0.32.2.dev20261101+abc", True), ("0.32.10", True), ("1.0", True), ("0.33", True),
        ("0.32.1", False), ("0.32", False), ("0.31.9", False), ("unknown", False),
    ],
)  # fmt: skip
def test_versions_are_compared_by_their_numbers(version: str, is_enough: bool) -> None:
    assert doctor.is_at_least(version, (0, 32, 2)) == is_enough
    assert doctor.version_check("mlx-lm", version, (0, 32, 2)).status == ("ok" if is_enough else "fail")


def test_a_missing_package_fails() -> None:
    assert doctor.version_check("mlx", None, (0, 32)) == Check("mlx", "fail", "not installed", "install mlx>=0.32")


def test_two_mlx_libraries_overwrite_each_other() -> None:
    assert doctor.libraries_check(["mlx", "mlx-cpu", "mlx-lm", "mlx-manager"]) == Check("MLX library", "ok", "mlx-cpu")
    assert doctor.libraries_check(["mlx", "mlx-metal"]) == Check("MLX library", "ok", "part of mlx")
    both = doctor.libraries_check(["mlx", "mlx-cuda-13", "mlx-cpu"])
    assert (both.status, both.fix) == ("fail", "uninstall mlx-cpu, then reinstall mlx-cuda-13 alone")


def test_mlx_that_cannot_be_imported_fails() -> None:
    assert doctor.device_check(None, ["mlx"]).status == "fail"


def test_a_gpu_that_is_not_found_is_noticed() -> None:
    assert doctor.device_check(CPU, ["mlx", "mlx-cuda-13"]).status == "warn"
    assert doctor.device_check(Device("CUDA", "a GPU", None), ["mlx", "mlx-cuda-13"]).status == "ok"


def test_a_slow_blas_matters_on_a_cpu_only() -> None:
    assert doctor.blas_check(REFERENCE, is_used=True).status == "warn"
    assert doctor.blas_check(REFERENCE, is_used=False).status == "ok"
    assert doctor.blas_check(OPENBLAS, is_used=True).status == "ok"


def test_little_memory_is_noticed_and_the_devices_advice_told() -> None:
    assert doctor.memory_check(8 * doctor.GIB, doctor.GIB // 2, None).status == "warn"
    check = doctor.memory_check(64 * doctor.GIB, 50 * doctor.GIB, METAL.recommended_bytes)
    assert check == Check("Memory", "ok", "50.0 GiB of 64.0 GiB available, MLX advises at most 48.0 GiB")


def test_an_sqlite_with_the_wal_bug_is_noticed() -> None:
    assert doctor.sqlite_check((3, 51, 2)).status == "warn"
    assert doctor.sqlite_check((3, 51, 3)) == Check("SQLite", "ok", "3.51.3, journal WAL")


def test_a_lost_starter_model_is_noticed(tmp_path: Path) -> None:
    broken = UnusableModel("b", tmp_path / "b", "it has no config.json")
    assert doctor.models_check(Catalogue((model(tmp_path / "a"),), (broken,))).status == "warn"
    check = doctor.models_check(Catalogue((model(tmp_path / "a"), model(BUNDLED_MODELS / "starter")), (broken,)))
    assert check == Check("Models", "ok", "2 usable, 1 unusable")
