"""Which BLAS serves MLX's fp32 matrix products on the CPU, and how a faster one gets there first.

The Linux wheel of MLX brings a reference BLAS. Python loads `libmlx.so` with its own libraries behind the process's global
scope, so an OpenBLAS put into that scope *before* `mlx.core` is imported answers MLX's calls instead: no preload, no re-exec.
bf16, fp16 and quantised products do not go through BLAS.

Measured on two cores, fp32, (rows, 768) @ (768, 2560), the reference -> one thread of OpenBLAS -> two:
1 row 2.3 -> 0.74 -> 0.36 ms, 16 rows 27 -> 1.2 -> 0.66 ms, 256 rows 444 -> 11 -> 6.2 ms. While other work keeps one core busy, two
threads have the median of one and a longer tail. So the number of threads stays OpenBLAS's own choice, the number of cores, and
`OPENBLAS_NUM_THREADS` the operator's.

An OpenBLAS that is older than the processor takes it for the oldest that it knows. (128, 256) @ (256, 1792) on a Xeon of 2023: 2.0 ms
as the Prescott that OpenBLAS 0.3.15 sees in it, 0.9 as a Haswell, 0.5 as a Skylake-X. So it is told.
"""

import _ctypes
import ctypes
import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

VARIABLE = "MLX_MANAGER_BLAS"
SYSTEM_OPENBLAS = "libopenblas.so.0"  # found by the dynamic loader; Debian, Fedora and Arch call it so
CORE = "OPENBLAS_CORETYPE"  # read by OpenBLAS when it is loaded; the operator's, if it is set


@dataclass(frozen=True)
class Blas:
    """What answers MLX's matrix products on the CPU. `path` is None where it comes with MLX; `why` is a phrase for people."""

    name: Literal["openblas", "accelerate", "reference", "other"]
    path: Path | None
    why: str


def use_fast_blas() -> Blas:
    """Load an OpenBLAS for MLX if there is one, and say what MLX will use. Call it before anything imports `mlx.core`.

    The environment variable `MLX_MANAGER_BLAS` names the library to load, or says `off`.
    """
    if sys.platform == "darwin":
        return Blas("accelerate", None, "part of macOS")
    if (provider := _provider()) is not None:
        return _describe(provider, "already loaded")
    if "mlx.core" in sys.modules:
        return Blas("reference", None, "MLX is already imported")
    wish = os.environ.get(VARIABLE)
    if wish == "off":
        return Blas("reference", None, f"{VARIABLE}=off")
    failures: list[str] = []
    for candidate in [wish] if wish else [SYSTEM_OPENBLAS, *map(str, _bundled())]:
        failure = _load(candidate)
        if failure is None and (provider := _provider()) is not None:
            return _describe(provider, f"{VARIABLE}={wish}" if wish else "found")
        failures.append(failure or f"{candidate}: another library comes first")
    return Blas("reference", None, "; ".join(failures))


def keep_freed_memory() -> None:
    """Linux: has the C library keep what is freed for the next allocation. MLX frees and allocates its CPU buffers with every
    operation, and large ones would go back to the system and be cleared anew each time: a tenth of the time of a small model's step."""
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # musl has none
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the most that it takes
        mallopt(_M_TRIM_THRESHOLD, 1 << 30)
        mallopt(_M_TOP_PAD, 64 << 20)


def give_back_freed_memory() -> None:
    """Linux: the opposite of it, once: after a model has left, its memory is for others."""
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # musl has none
        trim(0)


_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h


def _bundled() -> list[Path]:
    """The library in the opencv-python wheel, beside its `cv2`; its own libraries lie next to it and are found by their rpath."""
    spec = importlib.util.find_spec("cv2")
    if spec is None or spec.origin is None:
        return []
    return sorted(Path(spec.origin).parent.parent.glob("opencv_python*.libs/libopenblas*.so*"))


def _load(library: str) -> str | None:
    """Put a library into the global scope; the reason if it cannot serve MLX, in which case it stays out of that scope."""
    try:
        local = ctypes.CDLL(library, mode=ctypes.RTLD_LOCAL)
        if not hasattr(local, "cblas_sgemm"):
            return f"{library}: no cblas_sgemm"
        if (core := better_core(_core(local), _processor())) is not None and CORE not in os.environ:
            os.environ[CORE] = core  # stays, for those that we start
            _ctypes.dlclose(local._handle)
        ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        return str(error)
    return None


_MODERN = {"Haswell", "Zen", "SkylakeX", "Cooperlake", "SapphireRapids"}  # OpenBLAS's names of those with AVX2 and more
_AVX2 = {"avx2", "fma"}
_AVX512 = {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}


def better_core(core: str, processor: set[str]) -> str | None:
    """What to tell an OpenBLAS that takes this processor (its flags, as Linux calls them) for a `core`; None if it may stay so."""
    if core == "" or core in _MODERN:
        return None
    if processor >= _AVX2 | _AVX512:
        return "SkylakeX"
    return "Haswell" if processor >= _AVX2 else None


def _core(library: ctypes.CDLL) -> str:
    """Empty if it has only one kind of kernels, or is another library."""
    name = getattr(library, "openblas_get_corename", None)
    if name is None:
        return ""
    name.restype = ctypes.c_char_p
    return (name() or b"").decode()


def _processor() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split()) for line in lines if line.startswith("flags")), set[str]())


class _Address(ctypes.Structure):
    """`Dl_info` of dladdr(3)."""

    _fields_ = [
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    ]


def _provider() -> Path | None:
    """The library in which the global scope finds `cblas_sgemm`; None if it is in none, and `libmlx.so` then falls to its own."""
    scope = ctypes.CDLL(None)
    if not hasattr(scope, "cblas_sgemm"):
        return None
    where = _Address()
    scope.dladdr(ctypes.cast(scope.cblas_sgemm, ctypes.c_void_p), ctypes.byref(where))
    return Path(os.fsdecode(where.file))


def _describe(provider: Path, why: str) -> Blas:
    is_openblas = hasattr(ctypes.CDLL(str(provider)), "openblas_get_config")
    return Blas("openblas" if is_openblas else "other", provider, why)
