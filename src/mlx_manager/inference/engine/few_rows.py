"""Products of a few rows with a layer's weights, on CUDA: a kernel of our own, without a line of a model changed.

MLX plans and captures each product of cuBLAS anew, which takes its host 20 us where another operation takes 5. A pass has seven of them a
layer, and with a few rows the device is done before the host has queued the next. This kernel is queued like any other, and reads the
weights at about the same speed (measured on an H200, table in decisions/0022).
"""
# pyright: basic

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import mlx.core as mx
from mlx import nn

from mlx_manager.inference.engine.paged_kernels import MULTIPLY_TILES, KernelText

log = logging.getLogger(__name__)

# Grid: (32 * WARPS, ceil(N / (16 * HEIGHT)), 1) in groups of (32 * WARPS, 1, 1).
#
# x [.., .., K] has up to 8 * TILES rows, and weights [N, K]. A group makes 16 * HEIGHT columns of what comes out; its warps share out K
# and add up what they have at the end. Weights are the first factor of `mma.m16n8k16` and rows the second, with K in an order of its
# own, the same for both: a lane has 8 elements that lie together, of 32, where the instruction is told that they are 2 and 2 of two
# times 16. So both come straight into registers, 16 bytes a lane: weights past the first cache, since nobody needs them twice, and with
# AHEAD before those that came the turn before are multiplied. What is read for rows that are not there is never written.
#
# Template: T (all of them), K, TILES, HEIGHT, WARPS, RUNS (of 32 elements at a turn), AHEAD, HAS_BIAS, IS_HALF.
FEW_ROWS = KernelText(
    name="few_rows",
    inputs=("x", "weights", "bias"),
    outputs=("out",),
    body=r"""
  constexpr int STRIDE = 20;  // of 16 columns, so that lanes write to different banks
  constexpr int TURN = WARPS * RUNS * 32;
  __shared__ float parts[WARPS * TILES * 8 * STRIDE];
  const int num_rows = x_shape[0] * x_shape[1], num_columns = weights_shape[0];
  const int own = lane / 4, run = lane % 4;
  const int first = min(group_y * HEIGHT, num_columns / 16 - HEIGHT);
  const T* from = weights + ((long)first * 16 + own) * K + run * 8;
  const T* row[TILES];
#pragma unroll
  for (int i = 0; i < TILES; ++i) row[i] = x + min(i * 8 + own, num_rows - 1) * K + run * 8;

  float sum[HEIGHT][TILES][4];
#pragma unroll
  for (int h = 0; h < HEIGHT; ++h)
#pragma unroll
    for (int i = 0; i < TILES; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[h][i][e] = 0.f;

  uint4 weight[2][RUNS][HEIGHT][2];
  auto read = [&](const T* address) {
    uint4 got;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(got.x), "=r"(got.y), "=r"(got.z), "=r"(got.w)
                 : "l"(address));
    return got;
  };
  auto load = [&](int k, int stage) {
#pragma unroll
    for (int r = 0; r < RUNS; ++r)
#pragma unroll
      for (int h = 0; h < HEIGHT; ++h) {
        weight[stage][r][h][0] = read(from + h * 16 * K + k + r * 32);
        weight[stage][r][h][1] = read(from + (h * 16 + 8) * K + k + r * 32);
      }
  };
"""
    + MULTIPLY_TILES
    + r"""
  auto multiply = [&](int k, int stage) {
    uint4 values[RUNS][TILES];
#pragma unroll
    for (int r = 0; r < RUNS; ++r)
#pragma unroll
      for (int i = 0; i < TILES; ++i) values[r][i] = __ldg(reinterpret_cast<const uint4*>(row[i] + k + r * 32));
#pragma unroll
    for (int r = 0; r < RUNS; ++r)
#pragma unroll
      for (int h = 0; h < HEIGHT; ++h)
#pragma unroll
        for (int i = 0; i < TILES; ++i) {
          const uint4 &a = weight[stage][r][h][0], &b = weight[stage][r][h][1], &c = values[r][i];
          multiply_tiles(sum[h][i], {a.x, b.x, a.y, b.y}, c.x, c.y);
          multiply_tiles(sum[h][i], {a.z, b.z, a.w, b.w}, c.z, c.w);
        }
  };

  int k = warp * RUNS * 32;
  if constexpr (AHEAD) {
    if (k < K) load(k, 0);
    for (; k < K; k += 2 * TURN) {
#pragma unroll
      for (int stage = 0; stage < 2; ++stage) {
        const int here = k + stage * TURN;
        if (here + TURN < K) load(here + TURN, stage ^ 1);
        if (here < K) multiply(here, stage);
      }
    }
  } else {
    for (; k < K; k += TURN) {
      load(k, 0);
      multiply(k, 0);
    }
  }

#pragma unroll
  for (int h = 0; h < HEIGHT; ++h) {
    if (h > 0) __syncthreads();
#pragma unroll
    for (int i = 0; i < TILES; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) parts[((warp * TILES + i) * 8 + run * 2 + e % 2) * STRIDE + own + e / 2 * 8] = sum[h][i][e];
    __syncthreads();
    for (int at = thread_x; at < num_rows * 16; at += WARPS * 32) {
      const int to_row = at / 16, column = (first + h) * 16 + at % 16;
      float total = HAS_BIAS ? static_cast<float>(bias[column]) : 0.f;
#pragma unroll
      for (int w = 0; w < WARPS; ++w) total += parts[(w * TILES * 8 + to_row) * STRIDE + at % 16];
      out[(long)to_row * num_columns + column] = static_cast<T>(total);
    }
  }
""",
)

# HEIGHT, WARPS, RUNS and AHEAD for so many TILES, by how many columns each multiprocessor (132 of them) has to make: up to 16, up to 32, or
# more. Chosen of some fifty on an H200, for the products of Llama 3 8B.
_MULTIPROCESSORS = 132
_SHAPES = {
    1: ((1, 16, 2, True), (2, 8, 2, True), (2, 4, 2, True)),
    2: ((1, 16, 2, True), (2, 8, 2, True), (2, 4, 2, True)),
    4: ((1, 16, 2, True), (2, 16, 2, False), (2, 4, 1, True)),
}
MOST_ROWS = 8 * max(_SHAPES)
_RUNS_OF = 64  # elements that K must be whole runs of
_FEWEST_COLUMNS = 32
_TOLERANCE = 1e-2  # of a row's length; what one element too many or too few changes is more


class FewRows:
    """The kernel, once for all models (`kernel`). Tests hand in what stands for `mx.fast.cuda_kernel`."""

    def __init__(self, make_kernel: Callable[..., Any] | None = None) -> None:
        make: Callable[..., Any] = make_kernel or mx.fast.cuda_kernel
        self._kernel = make(**FEW_ROWS.definition("cuda"))
        self._faults: dict[tuple[Any, ...], str | None] = {}

    def fault(self, weights: mx.array, bias: mx.array | None) -> str | None:
        """What is wrong with products with weights like these, if anything is; it is tried once."""
        kind = weights.shape, weights.dtype, bias is not None
        if kind not in self._faults:
            self._faults[kind] = self_test(self, weights, bias)
        return self._faults[kind]

    def multiply(self, x: mx.array, weights: mx.array, bias: mx.array | None) -> mx.array:
        """`x` [A, B, K] of up to `MOST_ROWS` rows, `weights` [N, K] and `bias` [N] → [A, B, N]. All have one type, of 16 bits."""
        num_columns, size = weights.shape
        tiles = next(tiles for tiles in _SHAPES if x.size // size <= 8 * tiles)
        height, warps, runs, ahead = _SHAPES[tiles][min(2, (num_columns - 1) // (16 * _MULTIPROCESSORS))]
        return self._kernel(
            inputs=[x, weights, weights if bias is None else bias],
            template=[
                ("T", x.dtype),
                ("K", size),
                ("TILES", tiles),
                ("HEIGHT", height),
                ("WARPS", warps),
                ("RUNS", runs),
                ("AHEAD", ahead),
                ("HAS_BIAS", bias is not None),
                ("IS_HALF", x.dtype == mx.float16),
            ],
            grid=(32 * warps, -(-num_columns // (16 * height)), 1),
            threadgroup=(32 * warps, 1, 1),
            output_shapes=[(*x.shape[:-1], num_columns)],
            output_dtypes=[x.dtype],
        )[0]


@cache
def kernel() -> FewRows:
    return FewRows()


def install(model: Any, few_rows: FewRows | None = None) -> None:
    """Has a model's linear layers multiply few rows so, if it works for all their shapes on this device. Others go on as they are:
    quantized ones, those of odd sizes, those in 32 bits, and experts. Before `head.install`, which has to come first in a call."""
    if not hasattr(model, "named_modules"):
        return
    layers = [(module, method) for _, module in model.named_modules() if (method := _method(module)) is not None]
    if not layers:
        return
    few_rows = few_rows or kernel()
    kinds = {(module.weight.shape, module.weight.dtype, "bias" in module): module for module, _ in layers}
    for module in kinds.values():
        if (fault := few_rows.fault(module.weight, module.get("bias"))) is not None:
            log.warning("products of few rows stay with MLX: %s", fault)
            return
    for module, method in layers:
        module.weight = mx.contiguous(module.weight)  # some are kept the other way round, and would be copied each time
        mx.eval(module.weight)  # one at a time: a copy takes room beside what it is of
        module.__class__ = _multiplying(type(module), method, few_rows)


def _method(module: Any) -> str | None:
    """What multiplies with a layer's weights, if it can be ours: that of a class of its own, or one that cuts already, cannot."""
    if not isinstance(module, nn.Linear | nn.Embedding):
        return None
    kind, method = (nn.Embedding, "as_linear") if isinstance(module, nn.Embedding) else (nn.Linear, "__call__")
    if getattr(type(module), method) is not getattr(kind, method):
        return None
    weights, bias = module.weight, module.get("bias")
    num_columns, size = weights.shape
    if num_columns % 16 != 0 or num_columns < _FEWEST_COLUMNS or size % _RUNS_OF != 0 or weights.dtype not in (mx.float16, mx.bfloat16):
        return None
    if bias is not None and bias.dtype != weights.dtype:
        return None
    return method


@cache
def _multiplying(kind: type, method: str, few_rows: FewRows) -> type:
    def multiply(self: Any, x: mx.array) -> mx.array:
        weights = self.weight
        if x.ndim == 3 and 1 < x.shape[0] * x.shape[1] <= MOST_ROWS and x.dtype == weights.dtype:
            return few_rows.multiply(x, weights, self.get("bias"))
        return getattr(kind, method)(self, x)

    return type(kind.__name__, (kind,), {method: multiply})


def self_test(few_rows: FewRows, weights: mx.array, bias: mx.array | None) -> str | None:
    """None if products with these weights are those of MLX, for each number of tiles; else a sentence that says what is wrong."""
    size = weights.shape[1]
    try:
        for tiles in _SHAPES:
            x = mx.random.normal((8 * tiles - 1, 1, size), key=mx.random.key(tiles)).astype(weights.dtype)
            expected = x @ weights.T if bias is None else mx.addmm(bias, x, weights.T)
            found, expected = (a.astype(mx.float32) for a in (few_rows.multiply(x, weights, bias), expected))
            errors, lengths = mx.linalg.norm(found - expected, axis=-1), mx.linalg.norm(expected, axis=-1)
            if not mx.all(errors <= _TOLERANCE * lengths).item():
                return (
                    f"{x.shape[0]} rows with weights {weights.shape} differ by {mx.max(errors).item():.1e} of {mx.max(lengths).item():.1e}"
                )
    except Exception as error:  # noqa: BLE001 - whatever goes wrong in here would go wrong in service
        return f"{type(error).__name__}: {error}"
    return None
