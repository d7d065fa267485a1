"""Each case runs in a process of its own: what a process has loaded into its global scope stays there."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_manager.inference.blas import better_core

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="macOS has Accelerate")

USE = "from mlx_manager.inference.blas import use_fast_blas; blas = use_fast_blas(); print(blas.name, blas.path, blas.why, sep='|');"
MULTIPLY = "import mlx.core as mx; a = mx.ones((4, 4), dtype=mx.float32); mx.eval(mx.matmul(a, a, stream=mx.cpu));"


CORE = "import ctypes; of = ctypes.CDLL(str(blas.path)).openblas_get_corename; of.restype = ctypes.c_char_p; print(of().decode());"


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name not in ("MLX_MANAGER_BLAS", "LD_PRELOAD", "OPENBLAS_CORETYPE")}
    return subprocess.run([sys.executable, "-c", code], env=env | environment, capture_output=True, text=True, check=True)


def found_openblas() -> str:
    name, path, _ = run(USE).stdout.strip().split("|")
    if name != "openblas":
        pytest.skip("no OpenBLAS on this machine")
    return path


def test_the_library_it_names_is_in_the_process() -> None:
    maps = "print(open('/proc/self/maps').read())"
    path = found_openblas()
    assert str(Path(path).resolve()) in run(USE + maps).stdout
    assert str(Path(path).resolve()) not in run(USE + maps, MLX_MANAGER_BLAS="off").stdout


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the dynamic loader of glibc tells what it binds")
def test_mlx_multiplies_with_that_library() -> None:
    path = found_openblas()
    trace = run(USE + MULTIPLY, LD_DEBUG="bindings").stderr
    (binding,) = [line for line in trace.splitlines() if "`cblas_sgemm'" in line and "libmlx.so" in line.split(" to ")[0]]
    assert f" to {path} " in binding


def test_a_library_can_be_named() -> None:
    path = found_openblas()
    assert run(USE, MLX_MANAGER_BLAS=path).stdout.strip() == f"openblas|{path}|MLX_MANAGER_BLAS={path}"


def test_a_named_library_that_is_not_there_is_not_replaced_by_another() -> None:
    name, _, why = run(USE, MLX_MANAGER_BLAS="/nowhere/libblas.so").stdout.strip().split("|")
    assert name == "reference"
    assert "/nowhere/libblas.so" in why


def test_a_library_without_matrix_products_is_not_used() -> None:
    assert run(USE, MLX_MANAGER_BLAS="libm.so.6").stdout.strip() == "reference|None|libm.so.6: no cblas_sgemm"


def test_off_leaves_mlx_with_its_own() -> None:
    assert run(USE, MLX_MANAGER_BLAS="off").stdout.strip() == "reference|None|MLX_MANAGER_BLAS=off"


def test_after_mlx_is_imported_it_is_too_late() -> None:
    assert run("import mlx.core;" + USE).stdout.strip() == "reference|None|MLX is already imported"


def test_asked_again_it_names_the_same_library() -> None:
    path = found_openblas()
    assert run(USE + "import mlx.core;" + USE).stdout.splitlines() == [f"openblas|{path}|found", f"openblas|{path}|already loaded"]


def test_mlx_is_not_imported_by_it() -> None:
    assert run(USE + "import sys; print([name for name in sys.modules if name.startswith('mlx.')])").stdout.splitlines()[-1] == "[]"


def test_an_old_library_is_told_what_it_runs_on() -> None:
    found_openblas()
    flags = next((set(line.split()) for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), set())
    assert better_core(run(USE + CORE).stdout.split()[-1], flags) is None


def test_what_the_operator_says_of_the_processor_stands() -> None:
    found_openblas()
    assert run(USE + CORE, OPENBLAS_CORETYPE="Nehalem").stdout.split()[-1] == "Nehalem"


@pytest.mark.parametrize(
    ("core", "processor", "better"),
    [
        ("Prescott", "fma avx2 avx512f avx512bw avx512cd avx512dq avx512vl", "SkylakeX"),
        ("Prescott", "fma avx2 avx512f", "Haswell"),
        ("Prescott", "sse4_2", None),
        ("Haswell", "fma avx2 avx512f avx512bw avx512cd avx512dq avx512vl", None),
        ("", "fma avx2", None),
    ],
)
def test_only_what_the_processor_can_is_told(core: str, processor: str, better: str | None) -> None:
    assert better_core(core, set(processor.split())) == better
