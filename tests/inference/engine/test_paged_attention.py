"""The kernels and the plain-MLX reference against NumPy in float64; without a GPU, the kernels' own text compiled as C++."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_manager.inference.engine import paged_attention
from mlx_manager.inference.engine.block_pool import BLOCK_TOKENS
from mlx_manager.inference.engine.paged_attention import (
    Chunks,
    Kernels,
    PagedAttention,
    Pool,
    Reference,
    as_tokens,
    is_supported,
    num_splits,
    self_test,
)
from mlx_manager.inference.engine.paged_kernels import APPEND_AND_ATTEND, WRITE
from tests.inference.engine.metal_shim import Shim, metal_source, why_not

Array = np.ndarray

# How far a head's result may be from the exact one, relative to its length: the rounding of the result, mostly.
TOLERANCE = {mx.float32: 5e-6, mx.float16: 1e-3, mx.bfloat16: 5e-3}
SIMPLE = ["reference float32", "metal float32", "cuda float32"]
ALL = [*SIMPLE, "metal float16", "metal bfloat16", "cuda float16", "cuda bfloat16"]


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Shim:
    folder = tmp_path_factory.mktemp("kernels")
    reason = why_not(folder)
    if reason is not None:
        pytest.skip(f"kernels need a C++ compiler to run here: {reason}")
    return Shim(folder)


def implementation(name: str, request: pytest.FixtureRequest) -> tuple[PagedAttention, mx.Dtype]:
    kind, dtype = name.split()
    if kind == "reference":
        return Reference(), getattr(mx, dtype)
    shim: Shim = request.getfixturevalue("shim")
    return (Kernels("metal", shim.metal_kernel) if kind == "metal" else Kernels("cuda", shim.cuda_kernel)), getattr(mx, dtype)


class World:
    """A pool of NaN, in which each row has its tokens in blocks from anywhere, and what these tokens are. Blocks 0 and the last
    two belong to nobody."""

    def __init__(self, *, lengths: list[int], width: int, head_dim: int, kv_heads: int, dtype: mx.Dtype, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.dtype, self.kv_heads, self.head_dim = dtype, kv_heads, head_dim
        self.lengths = lengths
        num_blocks = len(lengths) * width + 3
        self.tables = self.random.permutation(num_blocks - 3)[: len(lengths) * width].reshape(len(lengths), width).astype(np.int32) + 1
        self.keys = [self.some(kv_heads, length, head_dim) for length in lengths]
        self.values = [self.some(kv_heads, length, head_dim) for length in lengths]
        shape = (num_blocks, kv_heads, BLOCK_TOKENS, head_dim)
        self.expected_keys, self.expected_values = np.full(shape, np.nan), np.full(shape, np.nan)
        for row in range(len(lengths)):
            self.place(row, 0, self.keys[row], self.values[row])
        self.pool = Pool(self.array(self.expected_keys), self.array(self.expected_values))

    def some(self, *shape: int) -> Array:
        """Numbers that the dtype represents exactly."""
        return exact(self.array(self.random.normal(size=shape)))

    def array(self, numbers: Array) -> mx.array:
        array = mx.array(numbers.astype(np.float32)).astype(self.dtype)
        mx.eval(array)
        return array

    def place(self, row: int, start: int, keys: Array, values: Array) -> None:
        """Says that these [H, L, D] are what should be in the pool from position `start`."""
        for i in range(keys.shape[1]):
            block, slot = self.tables[row, (start + i) // BLOCK_TOKENS], (start + i) % BLOCK_TOKENS
            self.expected_keys[block, :, slot], self.expected_values[block, :, slot] = keys[:, i], values[:, i]

    def append(self, row: int, keys: Array, values: Array) -> None:
        self.place(row, self.lengths[row], keys, values)
        self.keys[row] = np.concatenate([self.keys[row], keys], axis=1)
        self.values[row] = np.concatenate([self.values[row], values], axis=1)
        self.lengths[row] += keys.shape[1]

    def table(self, *rows: int) -> mx.array:
        return mx.array(self.tables[list(rows)])

    def check_pool(self) -> None:
        """Everything is where it should be and nothing else has changed, to the bit."""
        mx.eval(self.pool.epoch)
        np.testing.assert_array_equal(exact(self.pool.keys)[1:], self.expected_keys[1:])
        np.testing.assert_array_equal(exact(self.pool.values)[1:], self.expected_values[1:])

    def decode(
        self, attention: PagedAttention, *, shared_by: int, rows: list[int] | None = None, window: int = 0, has_sinks: bool = False
    ) -> float:
        """One new token for each of the rows; how far off the worst head's result is."""
        rows = list(range(len(self.lengths))) if rows is None else rows
        queries = self.some(len(rows), self.kv_heads * shared_by, 1, self.head_dim)
        keys, values = self.some(len(rows), self.kv_heads, 1, self.head_dim), self.some(len(rows), self.kv_heads, 1, self.head_dim)
        sinks = self.some(self.kv_heads * shared_by) if has_sinks else None
        found = attention.append_and_attend(
            self.array(queries),
            self.array(keys),
            self.array(values),
            self.pool,
            self.table(*rows),
            mx.array([self.lengths[row] for row in rows], mx.int32),
            scale=self.head_dim**-0.5,
            window=window,
            sinks=None if sinks is None else self.array(sinks),
        )
        assert found.dtype == self.dtype
        assert found.shape == queries.shape
        errors: list[float] = []
        for i, row in enumerate(rows):
            self.append(row, keys[i], values[i])
            expected = attended(queries[i, :, 0], self.keys[row], self.values[row], window, sinks)
            errors += list(np.linalg.norm(exact(found)[i, :, 0] - expected, axis=-1) / np.linalg.norm(expected, axis=-1))
        return float(np.max(errors))


def exact(array: mx.array) -> Array:
    return np.array(array.astype(mx.float32)).astype(np.float64)


def attended(queries: Array, keys: Array, values: Array, window: int, sinks: Array | None) -> Array:
    """What `queries` [Hq, D] attend to among `keys` and `values` [H, n, D], of which they see the last `window`."""
    results: list[Array] = []
    first = max(0, keys.shape[1] - window) if window else 0
    for head, query in enumerate(queries):
        of = head // (len(queries) // len(keys))
        scores = keys[of, first:] @ query * len(query) ** -0.5
        highest = max(scores.max(), -np.inf if sinks is None else sinks[head])
        weights = np.exp(scores - highest)
        total = weights.sum() + (0.0 if sinks is None else np.exp(sinks[head] - highest))
        results.append(weights @ values[of, first:] / total)
    return np.array(results)


@dataclass(frozen=True)
class Shape:
    head_dim: int
    kv_heads: int
    shared_by: int
    width: int  # from 8 on, a row's pages are split
    window: int = 0
    has_sinks: bool = False


SHAPES = {
    "64": Shape(64, 2, 1, width=4),
    "64 shared by 8, split, sinks": Shape(64, 1, 8, width=16, has_sinks=True),
    "64 window of itself": Shape(64, 2, 2, width=4, window=1),
    "128 shared by 4, split": Shape(128, 2, 4, width=16),
    "128 shared by 3, window, sinks": Shape(128, 1, 3, width=9, window=50, has_sinks=True),
    "128 shared by 5, wide window, split, sinks": Shape(128, 1, 5, width=16, window=200, has_sinks=True),
    "256 shared by 2, window of a block": Shape(256, 1, 2, width=5, window=32),
    "256 shared by 7, split": Shape(256, 1, 7, width=8),
}
DECODE = [
    *((name, shape) for name in SIMPLE[:2] for shape in SHAPES),
    *((name, shape) for name in ALL[2:] for shape in ("64 shared by 8, split, sinks", "128 shared by 3, window, sinks")),
]


@pytest.mark.parametrize(("name", "shape"), DECODE)
def test_a_new_token_attends_to_its_own_sequence_and_is_kept(name: str, shape: str, request: pytest.FixtureRequest) -> None:
    attention, dtype = implementation(name, request)
    s = SHAPES[shape]
    most = s.width * BLOCK_TOKENS - 2  # two tokens more will fill the table
    lengths = [0, 31, 32, 75, most]
    world = World(lengths=lengths, width=s.width, head_dim=s.head_dim, kv_heads=s.kv_heads, dtype=dtype)
    for _ in range(2):
        error = world.decode(attention, shared_by=s.shared_by, window=s.window, has_sinks=s.has_sinks)
        assert error < TOLERANCE[dtype]
        world.check_pool()


@pytest.mark.parametrize("name", ALL)
def test_chunks_are_kept_read_back_and_attended_to(name: str, request: pytest.FixtureRequest) -> None:
    attention, dtype = implementation(name, request)
    world = World(lengths=[0, 40], width=4, head_dim=64, kv_heads=2, dtype=dtype)

    def chunk(row: int, length: int) -> None:
        keys, values = world.some(2, length, 64), world.some(2, length, 64)
        # A model's chunk is a transposed view; it is not all that there is in a pass.
        views = [as_tokens(world.array(array[None])) for array in (keys, values)]
        around = [mx.concatenate([mx.zeros_like(view[:1]), view, view]) for view in views]
        start = world.lengths[row]
        own = Chunks.of([(1, start, start + length)], [world.tables[row].tolist()], room=2)
        attention.write(around[0], around[1], world.pool, own)
        world.append(row, keys, values)

    chunk(0, 45)
    chunk(1, 1)
    world.check_pool()
    assert world.decode(attention, shared_by=2) < TOLERANCE[dtype]
    chunk(0, 33)
    before = attention.gather(world.pool, world.table(0), world.lengths[0])
    held = world.lengths[0], world.keys[0].copy(), world.values[0].copy()
    assert world.decode(attention, shared_by=2) < TOLERANCE[dtype]
    world.check_pool()
    for found, expected in zip(before, held[1:], strict=True):
        assert found.shape == (1, 2, held[0], 64)
        np.testing.assert_array_equal(exact(found)[0], expected)


@pytest.mark.parametrize("name", [*SIMPLE, "metal float16", "cuda bfloat16"])
def test_a_copied_block_is_the_same_and_goes_its_own_way(name: str, request: pytest.FixtureRequest) -> None:
    attention, dtype = implementation(name, request)
    world = World(lengths=[70, 70], width=3, head_dim=64, kv_heads=2, dtype=dtype)
    # The second row forks off the first: it shares the full blocks, and its partial one becomes a copy.
    own = int(world.tables[1, 2])
    world.tables[1, :2] = world.tables[0, :2]
    world.keys[1], world.values[1] = world.keys[0], world.values[0]
    for expected in (world.expected_keys, world.expected_values):
        expected[own] = expected[world.tables[0, 2]]
    attention.copy_block(world.pool, int(world.tables[0, 2]), own)
    world.check_pool()
    assert world.decode(attention, shared_by=2) < TOLERANCE[dtype]
    world.check_pool()


@pytest.mark.parametrize("name", SIMPLE)
def test_a_row_that_fills_up_a_batch_writes_into_the_null_block_alone(name: str, request: pytest.FixtureRequest) -> None:
    attention, dtype = implementation(name, request)
    world = World(lengths=[40, 0, 0], width=2, head_dim=64, kv_heads=2, dtype=dtype)
    world.tables[1:] = 0
    keys, values = world.some(3, 2, 1, 64), world.some(3, 2, 1, 64)
    found = attention.append_and_attend(
        world.array(world.some(3, 2, 1, 64)),
        world.array(keys),
        world.array(values),
        world.pool,
        world.table(0, 1, 2),
        mx.array([40, 0, 0], mx.int32),
        scale=0.125,
    )
    mx.eval(found)
    world.append(0, keys[0], values[0])
    world.check_pool()


def exercise(attention: PagedAttention, pool: Pool) -> None:
    """Every kind of use of a pool; of a row's attention one in parts, one in one."""
    keys = mx.zeros((5, 2, 1, 64))
    one = mx.zeros((1, 2, 1, 64))
    attention.write(keys, keys, pool, Chunks.of([(0, 30, 35)], [[1, 2]]))
    attention.append_and_attend(one, one, one, pool, mx.array([[1, 2]], mx.int32), mx.array([35], mx.int32), scale=1.0)
    attention.write(keys, keys, pool, Chunks.of([(0, 36, 41)], [[1, 2]]))
    attention.gather(pool, mx.array([[1, 2]], mx.int32), 41)
    attention.copy_block(pool, 1, 2)
    attention.append_and_attend(one, one, one, pool, mx.array([[1] * 16], mx.int32), mx.array([100], mx.int32), scale=1.0)


def test_every_use_of_a_pool_depends_on_the_one_before() -> None:
    launches: list[tuple[str, list[mx.array], list[mx.array]]] = []

    def make(**definition: Any) -> Callable[..., list[mx.array]]:
        def launch(*, inputs: list[mx.array], output_shapes: Any, output_dtypes: Any, **_: Any) -> list[mx.array]:
            outputs = [mx.zeros(shape, dtype) for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]
            launches.append((definition["name"].rsplit("_", 1)[0], inputs, outputs))
            return outputs

        return launch

    pool = Pool(mx.zeros((3, 2, 32, 64)), mx.zeros((3, 2, 32, 64)))
    keys, epoch = pool.keys, pool.epoch
    exercise(Kernels("metal", make), pool)
    *launches, reduce = launches
    for _, inputs, outputs in launches:
        assert inputs[-1] is epoch
        epoch = outputs[-1]
    assert pool.epoch is epoch
    assert pool.keys is keys
    assert [name for name, _, _ in launches] == [
        "paged_write",
        "paged_append_and_attend",
        "paged_write",
        "paged_gather",
        "paged_copy_block",
        "paged_append_and_attend",
    ]
    assert reduce[0] == "paged_reduce"
    assert reduce[1][0] is launches[-1][2][0], "what is merged comes from the kernel that wrote"


@pytest.mark.parametrize(("num_chunks", "width", "splits"), [(1, 256, 16), (2, 256, 4), (8, 256, 4), (1, 2, 1)])
def test_pages_are_shared_out_among_the_chunks_that_are_there(num_chunks: int, width: int, splits: int) -> None:
    """With room for more of them than there are, whose groups have nothing to do."""
    parts: list[tuple[int, ...]] = []

    def make(**definition: Any) -> Callable[..., list[mx.array]]:
        def launch(*, output_shapes: Any, output_dtypes: Any, **_: Any) -> list[mx.array]:
            if definition["name"].startswith("paged_attend_chunks"):
                parts.append(output_shapes[0])
            return [mx.zeros(shape, dtype) for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]

        return launch

    pool = Pool(mx.zeros((2, 8, 32, 128), mx.bfloat16), mx.zeros((2, 8, 32, 128), mx.bfloat16))
    chunks = Chunks.of([(2 * i, 40, 42) for i in range(num_chunks)], [[1, 1]] * num_chunks, room=1 if num_chunks == 1 else 8, width=width)
    queries, keys = mx.zeros((32, 32, 1, 128), mx.bfloat16), mx.zeros((32, 8, 1, 128), mx.bfloat16)
    found = Kernels("cuda", make).attend_chunks(queries, keys, keys, pool, chunks, scale=1.0)
    assert found.shape == queries.shape
    assert parts[0][2] == splits


def test_mlx_takes_the_metal_kernels_and_writes_the_signature_that_the_shim_writes(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    expected: list[str] = []

    def make(**definition: Any) -> Callable[..., list[mx.array]]:
        kernel: Any = mx.fast.metal_kernel(**definition)

        def launch(**call: Any) -> list[mx.array]:
            expected.append(metal_source(definition, call["inputs"], call["template"], call["output_dtypes"]))
            return kernel(**call, verbose=True)

        return launch

    def queue(keys: mx.array, values: mx.array, epoch: mx.array) -> mx.array:
        pool = Pool(keys, values, epoch)
        exercise(Kernels("metal", make), pool)
        return pool.epoch

    # While a function is exported, MLX writes Metal without a Mac.
    mx.export_function(str(tmp_path / "kernels"), queue, mx.zeros((3, 2, 32, 64)), mx.zeros((3, 2, 32, 64)), mx.zeros((1,), mx.int32))
    generated = re.findall(r"`:\n```\n(.*?)\ntemplate \[\[host_name", capfd.readouterr().out, flags=re.DOTALL)

    def normal(source: str) -> str:
        return " ".join(re.sub(r"(custom_kernel_\w+?_[0-9a-f]{16})\w*", r"\1", source).split())

    assert [normal(source) for source in generated] == [normal(source) for source in expected]
    assert len(generated) == 7


@pytest.mark.parametrize("name", SIMPLE)
def test_the_self_test_passes(name: str, request: pytest.FixtureRequest) -> None:
    attention, dtype = implementation(name, request)
    assert self_test(attention, dtype=dtype, head_dim=64, query_heads=4, kv_heads=2, window=60, has_sinks=True) is None


class ForgetsTheWindow(Reference):
    def append_and_attend(self, *args: Any, **kwargs: Any) -> mx.array:
        return super().append_and_attend(*args, **{**kwargs, "window": 0})


class MissesAToken(Reference):
    def append_and_attend(self, *args: Any, window: int, **kwargs: Any) -> mx.array:
        return super().append_and_attend(*args, **kwargs, window=window - 1)


class ForgetsTheSinks(Reference):
    def append_and_attend(self, *args: Any, **kwargs: Any) -> mx.array:
        return super().append_and_attend(*args, **{**kwargs, "sinks": None})


class KeepsNoNewToken(Reference):
    def append_and_attend(self, queries: Any, keys: Any, values: Any, pool: Pool, *args: Any, **kwargs: Any) -> mx.array:
        return super().append_and_attend(queries, keys, values, Pool(mx.array(pool.keys), mx.array(pool.values)), *args, **kwargs)


class WritesOneSlotOn(Reference):
    def write(self, keys: Any, values: Any, pool: Pool, chunks: Chunks) -> None:
        super().write(keys, values, pool, replace(chunks, spans=tuple((first, start + 1, stop + 1) for first, start, stop in chunks.spans)))


class WritesWhereNobodyLooks(Reference):
    def write(self, keys: Any, values: Any, pool: Pool, chunks: Chunks) -> None:
        super().write(keys, values, pool, chunks)
        pool.values[:] = mx.where(mx.isnan(pool.values), 0.0, pool.values)


class GathersFromElsewhere(Reference):
    def gather(self, pool: Pool, table: Any, length: int) -> tuple[mx.array, mx.array]:
        return super().gather(pool, table[:, ::-1], length)


class CopiesNothing(Reference):
    def copy_block(self, pool: Pool, source: int, target: int) -> None: ...


class Raises(Reference):
    def gather(self, pool: Pool, table: Any, length: int) -> tuple[mx.array, mx.array]:
        raise RuntimeError("no such kernel")


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (ForgetsTheWindow, "The attention of a batch differs from the reference by"),
        (MissesAToken, "The attention of a batch differs from the reference by"),
        (ForgetsTheSinks, "The attention of a batch differs from the reference by"),
        (KeepsNoNewToken, "The attention of a batch with narrow tables differs from the reference by inf"),
        (WritesOneSlotOn, "The attention of a batch differs from the reference by inf"),
        (WritesWhereNobodyLooks, "The values left in the pool differ from the reference."),
        (GathersFromElsewhere, "The gathered keys differ from the reference."),
        (CopiesNothing, "The attention of a fork differs from the reference by inf"),
        (Raises, "The kernels failed: RuntimeError: no such kernel"),
    ],
)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
def test_the_self_test_finds_what_is_broken(broken: type[Reference], says: str, dtype: mx.Dtype) -> None:
    fault = self_test(broken(), dtype=dtype, head_dim=64, query_heads=4, kv_heads=2, window=100, has_sinks=True)
    assert fault is not None
    assert fault.startswith(says)


@pytest.mark.skipif(paged_attention.backend() is None, reason="there is no GPU")
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernels_pass_their_self_test_on_this_gpu(shape: str, dtype: mx.Dtype) -> None:
    backend = paged_attention.backend()
    assert backend is not None
    s = SHAPES[shape]
    fault = self_test(
        Kernels(backend),
        dtype=dtype,
        head_dim=s.head_dim,
        query_heads=s.kv_heads * s.shared_by,
        kv_heads=s.kv_heads,
        window=s.window,
        has_sinks=s.has_sinks,
    )
    assert fault is None


def test_pages_are_split_until_the_device_is_busy_or_the_parts_get_short() -> None:
    assert num_splits(num_groups=8, num_pages=7) == 1
    assert num_splits(num_groups=8, num_pages=8) == 2
    assert num_splits(num_groups=8, num_pages=1024) == 32
    assert num_splits(num_groups=4096, num_pages=1024) == 1


def test_only_shapes_with_a_kernel_are_supported() -> None:
    assert is_supported(mx.bfloat16, 128, 32, 8)
    assert is_supported(mx.float32, 256, 7, 1)
    assert not is_supported(mx.bfloat16, 80, 32, 8)
    assert not is_supported(mx.bfloat16, 128, 30, 8)
    assert not is_supported(mx.uint32, 128, 32, 8)


def test_a_kernel_is_named_after_its_text() -> None:
    names = [text.definition(backend)["name"] for text in (APPEND_AND_ATTEND, WRITE) for backend in ("cuda", "metal")]
    assert len(set(names)) == 4
    assert all(re.fullmatch(r"paged_\w+_[0-9a-f]{16}", name) for name in names)
