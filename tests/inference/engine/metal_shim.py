"""Stands for `mx.fast.metal_kernel` and `mx.fast.cuda_kernel` where there is no GPU: the same text, compiled as C++ and run at once.

The signature around a source is written as MLX writes it (`test_paged_attention` compares the two for Metal). Inputs are the MLX
arrays' own memory, so what a kernel writes into one shows.
"""

import ctypes
import hashlib
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

Array = np.ndarray
Template = Sequence[tuple[str, Any]]

HEADER = Path(__file__).with_name("metal_shim.h")
COMPILER = shutil.which("c++") or shutil.which("g++")
FLAGS = (
    "-std=c++17",
    "-O1",
    "-shared",
    "-fPIC",
    "-fno-strict-aliasing",
    "-Wno-unknown-pragmas",
    "-Wno-attributes",
    "-I",
    str(HEADER.parent),
)
GUARD = 64  # elements on either side of an output, which nobody may touch
FEWEST_ON_DEVICE = 8  # elements; smaller inputs are, on Metal, in the constant address space

METAL_TYPES = {mx.float32: "float", mx.float16: "float16_t", mx.bfloat16: "bfloat16_t", mx.int32: "int32_t"}
CUDA_TYPES = {mx.float32: "float", mx.float16: "__half", mx.bfloat16: "__nv_bfloat16", mx.int32: "int32_t"}
NUMPY_TYPES = {mx.float32: np.float32, mx.float16: np.float16, mx.bfloat16: np.uint16, mx.int32: np.int32}

# What Metal hands a thread if its kernel asks, and what it is here. In the order in which MLX declares them.
ATTRIBUTES = {
    "simdgroup_index_in_threadgroup": ("uint", "shim::fibers[shim::running].warp"),
    "thread_index_in_simdgroup": ("uint", "shim::fibers[shim::running].lane"),
    "thread_position_in_grid": (
        "uint3",
        "uint3{shim::group.x * shim::group_size.x + shim::fibers[shim::running].position.x, shim::group.y, shim::group.z}",
    ),
    "thread_position_in_threadgroup": ("uint3", "shim::fibers[shim::running].position"),
    "threadgroup_position_in_grid": ("uint3", "shim::group"),
    "threadgroups_per_grid": ("uint3", "shim::groups"),
}


def why_not(folder: Path) -> str | None:
    """Why kernels cannot be run here, if they cannot."""
    if COMPILER is None:
        return "there is no C++ compiler"
    probe = folder / "probe.cpp"
    probe.write_text('#include "metal_shim.h"\n')
    done = subprocess.run([COMPILER, *FLAGS, probe, "-o", probe.with_suffix(".so")], capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else f"the C++ compiler lacks something: {done.stderr.splitlines()[0]}"


def memory(array: mx.array) -> Array:
    """The array's own memory, row-contiguous; bfloat16 as its bits."""
    mx.eval(array)
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)
        mx.eval(array)
    view = np.array(array, copy=False)
    return view if view.flags.c_contiguous else np.ascontiguousarray(view)


@dataclass
class Launch:
    """One call of a kernel, as it was made."""

    name: str
    inputs: list[mx.array]
    outputs: list[mx.array]
    template: dict[str, Any]


@dataclass
class Shim:
    """Makes kernels of either dialect, compiled into `folder`, and remembers their `launches`."""

    folder: Path
    launches: list[Launch] = field(default_factory=list)
    _libraries: dict[str, ctypes.CDLL] = field(default_factory=dict)

    def metal_kernel(self, **definition: Any) -> Callable[..., list[mx.array]]:
        return self._kernel(definition, is_cuda=False)

    def cuda_kernel(self, **definition: Any) -> Callable[..., list[mx.array]]:
        return self._kernel(definition, is_cuda=True)

    def _kernel(self, definition: dict[str, Any], *, is_cuda: bool) -> Callable[..., list[mx.array]]:
        def launch(
            *,
            inputs: list[mx.array],
            template: Template,
            grid: tuple[int, int, int],
            threadgroup: tuple[int, int, int],
            output_shapes: list[tuple[int, ...]],
            output_dtypes: list[mx.Dtype],
        ) -> list[mx.array]:
            write = cuda_source if is_cuda else metal_source
            source = write(definition, inputs, template, output_dtypes)
            dialect = "#define SHIM_CUDA\n" if is_cuda else ""
            launcher = _launcher(definition, inputs, template, output_dtypes, is_cuda)
            library = self._library(f'{dialect}#include "metal_shim.h"\n{source}{launcher}')
            guarded = [
                np.full(GUARD * 2 + int(np.prod(shape)), 0x55, NUMPY_TYPES[dtype])
                for shape, dtype in zip(output_shapes, output_dtypes, strict=True)
            ]
            arrays = [memory(array) for array in inputs]
            pointers = [array.ctypes.data for array in arrays] + [array.ctypes.data + GUARD * array.itemsize for array in guarded]
            shapes = [(ctypes.c_int * array.ndim)(*array.shape) for array in inputs]
            assert threadgroup[1:] == (1, 1)
            finished = library.launch(
                (ctypes.c_void_p * len(pointers))(*pointers),
                (ctypes.c_void_p * len(shapes))(*[ctypes.addressof(shape) for shape in shapes]),
                (ctypes.c_uint * 3)(*grid),
                (ctypes.c_uint * 3)(*threadgroup),
            )
            assert finished, f"threads of {definition['name']} wait for each other for ever"
            outputs: list[mx.array] = []
            for array, shape, dtype in zip(guarded, output_shapes, output_dtypes, strict=True):
                assert (array[:GUARD] == 0x55).all(), f"{definition['name']} wrote before an output"
                assert (array[-GUARD:] == 0x55).all(), f"{definition['name']} wrote behind an output"
                output = mx.array(array[GUARD:-GUARD].reshape(shape))
                outputs.append(output.view(mx.bfloat16) if dtype == mx.bfloat16 else output)
            self.launches.append(Launch(definition["name"], inputs, outputs, dict(template)))
            return outputs

        return launch

    def _library(self, source: str) -> ctypes.CDLL:
        if source not in self._libraries:
            path = self.folder / f"{hashlib.blake2b(source.encode(), digest_size=8).hexdigest()}.cpp"
            if not path.with_suffix(".so").exists():
                path.write_text(source)
                assert COMPILER is not None
                subprocess.run([COMPILER, *FLAGS, path, "-o", path.with_suffix(".so")], check=True)
            self._libraries[source] = ctypes.CDLL(str(path.with_suffix(".so")))
        return self._libraries[source]


def metal_source(definition: dict[str, Any], inputs: list[mx.array], template: Template, output_dtypes: list[mx.Dtype]) -> str:
    """The Metal that MLX makes of a definition and a call, from the header to the end of the function."""
    source = definition["source"]
    arguments: list[str] = []
    for name, array in zip(definition["input_names"], inputs, strict=True):
        space = "constant" if array.size < FEWEST_ON_DEVICE else "device"
        arguments.append(f"const {space} {METAL_TYPES[array.dtype]}* {name}")
        if f"{name}_shape" in source:
            arguments.append(f"const constant int* {name}_shape")
    arguments += [f"device {METAL_TYPES[dtype]}* {name}" for name, dtype in zip(definition["output_names"], output_dtypes, strict=True)]
    buffers = [f"  {argument} [[buffer({i})]]" for i, argument in enumerate(arguments)]
    attributes = [f"  {kind} {name} [[{name}]]" for name, (kind, _) in ATTRIBUTES.items() if name in source]
    names = {bool: "bool", int: "int", mx.Dtype: "typename"}
    parameters = ", ".join(f"{names[type(value)]} {name}" for name, value in template)
    return (
        f"{definition['header']}\ntemplate <{parameters}>\n[[kernel]] void custom_kernel_{definition['name']}(\n"
        + ",\n".join(buffers + attributes)
        + f") {{\n{source}\n}}\n"
    )


def cuda_source(definition: dict[str, Any], inputs: list[mx.array], template: Template, output_dtypes: list[mx.Dtype]) -> str:
    """The CUDA that MLX makes of a definition and a call, without its own headers."""
    source = definition["source"]
    arguments: list[str] = []
    for name, array in zip(definition["input_names"], inputs, strict=True):
        arguments.append(f"    const {CUDA_TYPES[array.dtype]}* {name}")
        if f"{name}_shape" in source:
            arguments.append(f"    const int* {name}_shape")
    arguments += [f"    {CUDA_TYPES[dtype]}* {name}" for name, dtype in zip(definition["output_names"], output_dtypes, strict=True)]
    constants = "".join(
        f"  using {name} = {CUDA_TYPES[value]};\n"
        if isinstance(value, mx.Dtype)
        else f"  constexpr {'bool' if isinstance(value, bool) else 'int'} {name} = {int(value)};\n"
        for name, value in template
    )
    return (
        f"{definition['header']}\nvoid custom_kernel_{definition['name']}(\n" + ",\n".join(arguments) + f") {{\n{constants}{source}\n}}\n"
    )


def _launcher(definition: dict[str, Any], inputs: list[mx.array], template: Template, output_dtypes: list[mx.Dtype], is_cuda: bool) -> str:
    """Calls the kernel for one thread, and for all of them. The shim's header and its defines come before the kernel's text."""
    source = definition["source"]
    types = CUDA_TYPES if is_cuda else METAL_TYPES
    arguments: list[str] = []
    for i, (name, array) in enumerate(zip(definition["input_names"], inputs, strict=True)):
        arguments.append(f"(const {types[array.dtype]}*)buffers[{i}]")
        if f"{name}_shape" in source:
            arguments.append(f"shapes[{i}]")
    arguments += [f"({types[dtype]}*)buffers[{len(inputs) + i}]" for i, dtype in enumerate(output_dtypes)]
    function = f"custom_kernel_{definition['name']}"
    if not is_cuda:
        arguments += [value for name, (_, value) in ATTRIBUTES.items() if name in source]
        values = ", ".join(types[value] if isinstance(value, mx.Dtype) else str(int(value)) for _, value in template)
        function += f"<{values}>"
    return (
        "static void* const* buffers;\nstatic const int* const* shapes;\n"
        f"static void one_thread() {{\n  {function}({', '.join(arguments)});\n}}\n"
        'extern "C" int launch(void* const* b, const int* const* s, const uint* grid, const uint* size) {\n'
        "  buffers = b;\n  shapes = s;\n"
        f"  return shim::run_grid({{grid[0], grid[1], grid[2]}}, {{size[0], size[1], size[2]}}, {str(is_cuda).lower()}, one_thread);\n}}\n"
    )
