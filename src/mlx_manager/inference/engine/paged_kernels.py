"""The kernels of paged attention: one text, which is CUDA or Metal after a short prelude. No arrays.

MLX writes the signature around a `source`: the inputs as pointers to const, `<name>_shape` of those whose shape the source names,
the outputs, and the template arguments as constants. It looks for Metal's thread attributes in `source` alone, never in `header`;
so the indices are read in the first lines of the source, and everything else that differs is in the header.

Metal puts an input of fewer than eight elements in another address space: only arrays that are never that small (keys, values,
queries, the pool) may be pointed into, all others are indexed by name.
"""

import hashlib
from dataclasses import dataclass
from typing import Any, Literal

Backend = Literal["cuda", "metal"]

_CUDA_HEADER = r"""
#define KDEVICE
#define KSHARED __shared__
#define KBARRIER() __syncthreads()
#define KSHUFFLE_XOR(value, mask) __shfl_xor_sync(0xffffffffu, (value), (mask))
#define KEXP(x) __expf(x)
template <typename T>
__device__ __forceinline__ void kload8(const T* from, float* to) {
  if constexpr (sizeof(T) == 2) {
    const uint4 raw = *reinterpret_cast<const uint4*>(from);
    const T* elements = reinterpret_cast<const T*>(&raw);
#pragma unroll
    for (int i = 0; i < 8; ++i) to[i] = static_cast<float>(elements[i]);
  } else {
    const float4 a = *reinterpret_cast<const float4*>(from);
    const float4 b = *reinterpret_cast<const float4*>(from + 4);
    to[0] = a.x; to[1] = a.y; to[2] = a.z; to[3] = a.w;
    to[4] = b.x; to[5] = b.y; to[6] = b.z; to[7] = b.w;
  }
}
template <typename T>
__device__ __forceinline__ void kcopy8(const T* from, T* to) {
#pragma unroll
  for (int i = 0; i < (int)sizeof(T) / 2; ++i) reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(from)[i];
}
"""

_CUDA_INDICES = r"""
  const int thread_x = (int)threadIdx.x, lane = thread_x % 32, warp = thread_x / 32;
  const int index_x = (int)(blockIdx.x * blockDim.x + threadIdx.x);
  const int group_x = (int)blockIdx.x, group_y = (int)blockIdx.y, group_z = (int)blockIdx.z, num_groups_z = (int)gridDim.z;
"""

_METAL_HEADER = r"""
#define KDEVICE device
#define KSHARED threadgroup
#define KBARRIER() metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup)
#define KSHUFFLE_XOR(value, mask) metal::simd_shuffle_xor((value), (ushort)(mask))
#define KEXP(x) metal::fast::exp(x)
template <typename T>
inline void kload8(const device T* from, thread float* to) {
  for (int i = 0; i < 8; ++i) to[i] = static_cast<float>(from[i]);
}
template <typename T>
inline void kcopy8(const device T* from, device T* to) {
  for (int i = 0; i < 8; ++i) to[i] = from[i];
}
"""

_METAL_INDICES = r"""
  const int thread_x = (int)thread_position_in_threadgroup.x;
  const int lane = (int)thread_index_in_simdgroup, warp = (int)simdgroup_index_in_threadgroup;
  const int index_x = (int)thread_position_in_grid.x;
  const int group_x = (int)threadgroup_position_in_grid.x, group_y = (int)threadgroup_position_in_grid.y;
  const int group_z = (int)threadgroup_position_in_grid.z, num_groups_z = (int)threadgroups_per_grid.z;
"""

# A step of the layer's epoch. Unsigned, because a counter that never stops must be allowed to wrap.
_NEXT_EPOCH = "next_epoch[0] = (int)((unsigned)epoch[0] + 1u);"

# What tensor cores do, for CUDA: c [16, 8] += a [16, 16] b [16, 8], each spread over a warp's lanes. Template: IS_HALF, or else bfloat16.
MULTIPLY_TILES = r"""
  auto multiply_tiles = [&](float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    if constexpr (IS_HALF)
      asm volatile(
          "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
          : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
      asm volatile(
          "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
          : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  };
"""


@dataclass(frozen=True, slots=True)
class KernelText:
    """A kernel before it is CUDA or Metal. `body` may use the indices of the preludes, the inputs, the outputs and the template
    arguments that the caller passes."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    body: str

    def definition(self, backend: Backend) -> dict[str, Any]:
        """The arguments of `mx.fast.cuda_kernel` and of `mx.fast.metal_kernel`.

        The name ends with a digest of the text: compiled kernels are kept by name, on CUDA also on disk, and MLX has run an old
        text under a new one's name.
        """
        header, indices = (_CUDA_HEADER, _CUDA_INDICES) if backend == "cuda" else (_METAL_HEADER, _METAL_INDICES)
        source = indices + self.body
        digest = hashlib.blake2b((header + source).encode(), digest_size=8).hexdigest()
        return {
            "name": f"{self.name}_{digest}",
            "input_names": list(self.inputs),
            "output_names": list(self.outputs),
            "source": source,
            "header": header,
        }


# Grid: (32 * WARPS, HEADS * GQA / GROUP, rows * splits) in groups of (32 * WARPS, 1, 1).
#
# A group takes GROUP query heads of one key/value head, which share every load, through one split of a row's pages. Its warps take
# turns at the pages; in a warp, D / (8 RUNS) lanes share a token, each with RUNS runs of 8 of its elements. Every lane group keeps a
# softmax of its own (running maximum, weight and weighted sum of values); they are merged in the warp, then in the group, then,
# with several splits, by the reduce kernel.
#
# Slots outside the sequence are never loaded, since what is left in them may be NaN: the nearest one inside stands for them, with no
# weight. The new token is attended to from registers, so nobody reads the slot that is written here. -1e30 stands for "nothing yet":
# subtracting it from itself is 0, where infinities would give NaN.
#
# Template: T (keys, values, queries), OUT (of `out`), SINK (of `sinks`), D, HEADS, GQA, GROUP, RUNS, WARPS, PAGE, WINDOW, SINKS, DIRECT.
APPEND_AND_ATTEND = KernelText(
    name="paged_append_and_attend",
    inputs=("queries", "keys", "values", "pool_keys", "pool_values", "table", "lengths", "scale", "sinks", "epoch"),
    outputs=("out", "statistics", "next_epoch"),
    body=r"""
  constexpr int OWN = 8 * RUNS;        // elements of a token that a lane has
  constexpr int LANES = D / OWN;       // share a token
  constexpr int TOKENS = 32 / LANES;   // seen by a warp at once
  constexpr int ROUNDS = PAGE / TOKENS;
  constexpr int SETS = GQA / GROUP;
  const int part = lane % LANES, lane_group = lane / LANES;
  const int head = group_y / SETS, set = group_y % SETS;
  const int splits = num_groups_z / lengths_shape[0];
  const int row = group_z / splits, split = group_z % splits;
  const int width = table_shape[1];
  const int length = lengths[row];  // tokens in the pool; the new one comes after them
  const int first = (WINDOW > 0 && length + 1 > WINDOW) ? length + 1 - WINDOW : 0;
  const int first_page = first / PAGE;
  const int num_pages = (length + PAGE - 1) / PAGE - first_page;
  const int begin = first_page + num_pages * split / splits, end = first_page + num_pages * (split + 1) / splits;
  const int query_head = head * GQA + set * GROUP;
  const bool has_new_token = split == splits - 1 && warp == 0;

  float query[GROUP][OWN], sum[GROUP][OWN], maximum[GROUP], weight[GROUP];
#pragma unroll
  for (int g = 0; g < GROUP; ++g) {
    const KDEVICE T* from = queries + ((long)row * (HEADS * GQA) + query_head + g) * D;
#pragma unroll
    for (int i = 0; i < RUNS; ++i) kload8<T>(from + (i * LANES + part) * 8, &query[g][i * 8]);
#pragma unroll
    for (int e = 0; e < OWN; ++e) {
      query[g][e] *= scale[0];
      sum[g][e] = 0.f;
    }
    maximum[g] = -1e30f;
    weight[g] = 0.f;
    if (SINKS && has_new_token && lane_group == 0) {  // a sink is a score without a value; it must count once
      maximum[g] = static_cast<float>(sinks[query_head + g]);
      weight[g] = 1.f;
    }
  }

  for (int page = begin + warp; page < end; page += WARPS) {
    const long base = ((long)table[row * width + page] * HEADS + head) * (PAGE * D);
    const KDEVICE T* page_keys = pool_keys + base;
    const KDEVICE T* page_values = pool_values + base;
    float score[GROUP][ROUNDS];
#pragma unroll
    for (int r = 0; r < ROUNDS; ++r) {
      const int position = page * PAGE + r * TOKENS + lane_group;
      const int after = position < first ? first : position, nearest = after < length ? after : length - 1;
      float key[OWN];
#pragma unroll
      for (int i = 0; i < RUNS; ++i) kload8<T>(page_keys + (nearest - page * PAGE) * D + (i * LANES + part) * 8, &key[i * 8]);
#pragma unroll
      for (int g = 0; g < GROUP; ++g) {
        float dot = 0.f;
#pragma unroll
        for (int e = 0; e < OWN; ++e) dot += query[g][e] * key[e];
#pragma unroll
        for (int o = 1; o < LANES; o *= 2) dot += KSHUFFLE_XOR(dot, o);
        score[g][r] = position >= first && position < length ? dot : -3e38f;
      }
    }
#pragma unroll
    for (int g = 0; g < GROUP; ++g) {
      float highest = maximum[g];
#pragma unroll
      for (int r = 0; r < ROUNDS; ++r) highest = score[g][r] > highest ? score[g][r] : highest;
      const float shrink = KEXP(maximum[g] - highest);
      float added = 0.f;
#pragma unroll
      for (int r = 0; r < ROUNDS; ++r) {
        score[g][r] = KEXP(score[g][r] - highest);
        added += score[g][r];
      }
      weight[g] = weight[g] * shrink + added;
      maximum[g] = highest;
#pragma unroll
      for (int e = 0; e < OWN; ++e) sum[g][e] *= shrink;
    }
#pragma unroll
    for (int r = 0; r < ROUNDS; ++r) {
      const int position = page * PAGE + r * TOKENS + lane_group;
      const int after = position < first ? first : position, nearest = after < length ? after : length - 1;
      float value[OWN];
#pragma unroll
      for (int i = 0; i < RUNS; ++i) kload8<T>(page_values + (nearest - page * PAGE) * D + (i * LANES + part) * 8, &value[i * 8]);
#pragma unroll
      for (int g = 0; g < GROUP; ++g)
#pragma unroll
        for (int e = 0; e < OWN; ++e) sum[g][e] += score[g][r] * value[e];
    }
  }

  if (has_new_token) {
    const long from = ((long)row * HEADS + head) * D;
    float key[OWN], value[OWN];
#pragma unroll
    for (int i = 0; i < RUNS; ++i) {
      kload8<T>(keys + from + (i * LANES + part) * 8, &key[i * 8]);
      kload8<T>(values + from + (i * LANES + part) * 8, &value[i * 8]);
    }
#pragma unroll
    for (int g = 0; g < GROUP; ++g) {
      float dot = 0.f;
#pragma unroll
      for (int e = 0; e < OWN; ++e) dot += query[g][e] * key[e];
#pragma unroll
      for (int o = 1; o < LANES; o *= 2) dot += KSHUFFLE_XOR(dot, o);
      if (lane_group == 0) {
        const float highest = dot > maximum[g] ? dot : maximum[g];
        const float shrink = KEXP(maximum[g] - highest), own = KEXP(dot - highest);
        weight[g] = weight[g] * shrink + own;
        maximum[g] = highest;
#pragma unroll
        for (int e = 0; e < OWN; ++e) sum[g][e] = sum[g][e] * shrink + own * value[e];
      }
    }
    if (set == 0 && lane_group == 0) {  // the one group of this row and head that writes
      const long to = (((long)table[row * width + length / PAGE] * HEADS + head) * PAGE + length % PAGE) * D;
      KDEVICE T* to_keys = (KDEVICE T*)pool_keys + to;
      KDEVICE T* to_values = (KDEVICE T*)pool_values + to;
#pragma unroll
      for (int i = 0; i < RUNS; ++i) {
        const int run = (i * LANES + part) * 8;
        kcopy8<T>(keys + from + run, to_keys + run);
        kcopy8<T>(values + from + run, to_values + run);
      }
    }
  }

#pragma unroll
  for (int g = 0; g < GROUP; ++g) {
#pragma unroll
    for (int o = LANES; o < 32; o *= 2) {
      const float other_maximum = KSHUFFLE_XOR(maximum[g], o), other_weight = KSHUFFLE_XOR(weight[g], o);
      const float highest = other_maximum > maximum[g] ? other_maximum : maximum[g];
      const float shrink = KEXP(maximum[g] - highest), other_shrink = KEXP(other_maximum - highest);
      weight[g] = weight[g] * shrink + other_weight * other_shrink;
#pragma unroll
      for (int e = 0; e < OWN; ++e) {
        const float other_sum = KSHUFFLE_XOR(sum[g][e], o);
        sum[g][e] = sum[g][e] * shrink + other_sum * other_shrink;
      }
      maximum[g] = highest;
    }
  }

  KSHARED float warp_sum[WARPS * GROUP * D];
  KSHARED float warp_maximum[WARPS * GROUP];
  KSHARED float warp_weight[WARPS * GROUP];
  if (lane_group == 0) {
#pragma unroll
    for (int g = 0; g < GROUP; ++g) {
      const int at = warp * GROUP + g;
      if (part == 0) {
        warp_maximum[at] = maximum[g];
        warp_weight[at] = weight[g];
      }
#pragma unroll
      for (int e = 0; e < OWN; ++e) warp_sum[at * D + (e / 8 * LANES + part) * 8 + e % 8] = sum[g][e];
    }
  }
  KBARRIER();
  for (int x = thread_x; x < GROUP * D; x += WARPS * 32) {
    const int g = x / D, d = x % D;
    float highest = -1e30f;
    for (int w = 0; w < WARPS; ++w) highest = warp_maximum[w * GROUP + g] > highest ? warp_maximum[w * GROUP + g] : highest;
    float total_weight = 0.f, total = 0.f;
    for (int w = 0; w < WARPS; ++w) {
      const float shrink = KEXP(warp_maximum[w * GROUP + g] - highest);
      total_weight += warp_weight[w * GROUP + g] * shrink;
      total += warp_sum[(w * GROUP + g) * D + d] * shrink;
    }
    const long at = (long)row * (HEADS * GQA) + query_head + g;
    if (DIRECT) {
      out[at * D + d] = static_cast<OUT>(total / total_weight);
    } else {
      out[(at * splits + split) * D + d] = static_cast<OUT>(total);
      if (d == 0) {
        statistics[(at * splits + split) * 2] = highest;
        statistics[(at * splits + split) * 2 + 1] = total_weight;
      }
    }
  }
  if (thread_x == 0 && group_y == 0 && group_z == 0) """
    + _NEXT_EPOCH
    + "\n",
)

# Grid: (rows * query heads * D, 1, 1) in groups of (D, 1, 1). Template: T, D.
REDUCE = KernelText(
    name="paged_reduce",
    inputs=("partial", "statistics"),
    outputs=("out",),
    body=r"""
  const int splits = partial_shape[2];
  const long row = (long)group_x * splits;
  float highest = -1e30f;
  for (int s = 0; s < splits; ++s) highest = statistics[(row + s) * 2] > highest ? statistics[(row + s) * 2] : highest;
  float weight = 0.f, sum = 0.f;
  for (int s = 0; s < splits; ++s) {
    const float shrink = KEXP(statistics[(row + s) * 2] - highest);
    weight += statistics[(row + s) * 2 + 1] * shrink;
    sum += partial[(row + s) * D + thread_x] * shrink;
  }
  out[(long)group_x * D + thread_x] = static_cast<T>(sum / weight);
""",
)

# CUDA alone, for 16-bit keys of 64 or 128: chunks of prompts attend to the pages of their sequences through tensor cores. Metal's own
# attention serves any shape at once; that of CUDA plans anew for each length, which takes longer than the attention itself.
#
# Grid: (128, ceil(tokens * GQA / 64), HEADS * chunks * splits) in groups of (128, 1, 1): as many as if all tokens were of one chunk.
#
# A group takes 64 rows of one key/value head and one chunk, a row being a token and one of the query heads that share the head; each of
# its four warps takes 16. The pages that they see come one after the other into shared memory, the next one while this one is computed,
# in pieces of 16 bytes whose place is turned by their token, so that eight tokens' pieces lie in different banks. Scores and results stay
# in registers, laid out as `mma.m16n8k16` has them: a lane has rows lane / 4 and lane / 4 + 8, and two columns of every eight.
# Scores are in powers of two. Slots behind the last token are filled with zeros, since what is left in them may be NaN. With several
# splits each takes a part of the pages, and leaves what the reduce kernel merges.
#
# Template: T (keys, values, queries), OUT (of `out`), SINK, D, HEADS, GQA, PAGE, WINDOW, SINKS, IS_HALF, DIRECT.
ATTEND_CHUNKS = KernelText(
    name="paged_attend_chunks",
    inputs=("queries", "pool_keys", "pool_values", "table", "spans", "scale", "sinks", "epoch"),
    outputs=("out", "statistics", "next_epoch"),
    body=r"""
  constexpr int PIECES = D / 8;
  constexpr int STEPS = D / 16;
  constexpr int KEY_TILES = PAGE / 8;
  constexpr float LOG2E = 1.4426950408889634f;
  __shared__ __align__(128) T shared_keys[2][PAGE * D];
  __shared__ __align__(128) T shared_values[2][PAGE * D];
  if (thread_x == 0 && group_y == 0 && group_z == 0) """
    + _NEXT_EPOCH
    + r"""
  const int chunks = table_shape[0], splits = num_groups_z / (HEADS * chunks);
  const int head = group_z % HEADS, chunk = group_z / HEADS % chunks, split = group_z / (HEADS * chunks);
  const int first = spans[chunk * 3], begin = spans[chunk * 3 + 1], stop = spans[chunk * 3 + 2];
  const int num_rows = (stop - begin) * GQA;
  const int tile = (int)gridDim.y - 1 - group_y;  // the longest first
  if (tile * 64 >= num_rows) return;
  const int pages = chunk * table_shape[1];
  const int top = tile * 64 + warp * 16 + lane / 4;
  const int rows[2] = {top, top + 8};
  int positions[2];
  long places[2], offsets[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = min(rows[i], num_rows - 1);
    positions[i] = begin + row / GQA;
    places[i] = (long)(first + row / GQA) * HEADS * GQA + head * GQA + row % GQA;
    offsets[i] = places[i] * D + (lane % 4) * 2;
  }

  unsigned query[STEPS][4];
#pragma unroll
  for (int s = 0; s < STEPS; ++s) {
    query[s][0] = *reinterpret_cast<const unsigned*>(queries + offsets[0] + s * 16);
    query[s][1] = *reinterpret_cast<const unsigned*>(queries + offsets[1] + s * 16);
    query[s][2] = *reinterpret_cast<const unsigned*>(queries + offsets[0] + s * 16 + 8);
    query[s][3] = *reinterpret_cast<const unsigned*>(queries + offsets[1] + s * 16 + 8);
  }
  float sum[PIECES][4], maximum[2], weight[2];
#pragma unroll
  for (int t = 0; t < PIECES; ++t)
#pragma unroll
    for (int e = 0; e < 4; ++e) sum[t][e] = 0.f;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    maximum[i] = -1e30f;
    weight[i] = 0.f;
    if (SINKS && split == 0) {
      maximum[i] = static_cast<float>(sinks[head * GQA + min(rows[i], num_rows - 1) % GQA]) * LOG2E;
      weight[i] = lane % 4 == 0 ? 1.f : 0.f;
    }
  }

  const int first_position = begin + tile * 64 / GQA;
  const int last_position = begin + min(tile * 64 + 63, num_rows - 1) / GQA;
  const int first_page = (WINDOW > 0 && first_position + 1 > WINDOW) ? (first_position + 1 - WINDOW) / PAGE : 0;
  const int num_pages = last_position / PAGE + 1 - first_page;
  const int from_page = first_page + num_pages * split / splits, end_page = first_page + num_pages * (split + 1) / splits;

  auto fetch = [&](int page, int stage) {
    const long base = ((long)table[pages + page] * HEADS + head) * (PAGE * D);
#pragma unroll
    for (int i = thread_x; i < PAGE * PIECES; i += 128) {
      const int slot = i / PIECES, piece = i % PIECES;
      const int at = slot * D + (piece ^ (slot & 7)) * 8;
      const int num_bytes = page * PAGE + slot < stop ? 16 : 0;
      const unsigned to_key = (unsigned)__cvta_generic_to_shared(&shared_keys[stage][at]);
      const unsigned to_value = (unsigned)__cvta_generic_to_shared(&shared_values[stage][at]);
      const long from = base + slot * D + piece * 8;
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to_key), "l"(pool_keys + from), "r"(num_bytes));
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to_value), "l"(pool_values + from), "r"(num_bytes));
    }
    asm volatile("cp.async.commit_group;");
  };
"""
    + MULTIPLY_TILES
    + r"""
  auto packed = [&](float low, float high) {
    T pair[2] = {static_cast<T>(low), static_cast<T>(high)};
    return *reinterpret_cast<unsigned*>(pair);
  };

  if (from_page < end_page) fetch(from_page, 0);
  for (int page = from_page; page < end_page; ++page) {
    const int stage = (page - from_page) & 1;
    if (page + 1 < end_page) {
      fetch(page + 1, stage ^ 1);
      asm volatile("cp.async.wait_group 1;");
    } else {
      asm volatile("cp.async.wait_group 0;");
    }
    __syncthreads();

    float score[KEY_TILES][4];
#pragma unroll
    for (int j = 0; j < KEY_TILES; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) score[j][e] = 0.f;
#pragma unroll
    for (int s = 0; s < STEPS; ++s) {
#pragma unroll
      for (int j = 0; j < KEY_TILES; j += 2) {
        const int slot = (j + lane / 16) * 8 + lane % 8, piece = s * 2 + lane / 8 % 2;
        const int at = slot * D + (piece ^ (slot & 7)) * 8;
        const unsigned from = (unsigned)__cvta_generic_to_shared(&shared_keys[stage][at]);
        unsigned b[4];
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                     : "r"(from));
        multiply_tiles(score[j], query[s], b[0], b[1]);
        multiply_tiles(score[j + 1], query[s], b[2], b[3]);
      }
    }

    float highest[2] = {maximum[0], maximum[1]};
#pragma unroll
    for (int j = 0; j < KEY_TILES; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int position = page * PAGE + j * 8 + (lane % 4) * 2 + e % 2, mine = positions[e / 2];
        const bool is_seen = position <= mine && (WINDOW == 0 || position > mine - WINDOW);
        score[j][e] = is_seen ? score[j][e] * (scale[0] * LOG2E) : -3e38f;
        highest[e / 2] = fmaxf(highest[e / 2], score[j][e]);
      }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      highest[i] = fmaxf(highest[i], KSHUFFLE_XOR(highest[i], 1));
      highest[i] = fmaxf(highest[i], KSHUFFLE_XOR(highest[i], 2));
      const float shrink = exp2f(maximum[i] - highest[i]);
      maximum[i] = highest[i];
      weight[i] *= shrink;
#pragma unroll
      for (int t = 0; t < PIECES; ++t) {
        sum[t][i * 2] *= shrink;
        sum[t][i * 2 + 1] *= shrink;
      }
    }
#pragma unroll
    for (int j = 0; j < KEY_TILES; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        score[j][e] = exp2f(score[j][e] - maximum[e / 2]);
        weight[e / 2] += score[j][e];
      }

#pragma unroll
    for (int k = 0; k < KEY_TILES / 2; ++k) {
      const unsigned a[4] = {
          packed(score[2 * k][0], score[2 * k][1]), packed(score[2 * k][2], score[2 * k][3]),
          packed(score[2 * k + 1][0], score[2 * k + 1][1]), packed(score[2 * k + 1][2], score[2 * k + 1][3])};
#pragma unroll
      for (int t = 0; t < PIECES; t += 2) {
        const int slot = k * 16 + lane / 8 % 2 * 8 + lane % 8, piece = t + lane / 16;
        const int at = slot * D + (piece ^ (slot & 7)) * 8;
        const unsigned from = (unsigned)__cvta_generic_to_shared(&shared_values[stage][at]);
        unsigned b[4];
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                     : "r"(from));
        multiply_tiles(sum[t], a, b[0], b[1]);
        multiply_tiles(sum[t + 1], a, b[2], b[3]);
      }
    }
    __syncthreads();
  }

#pragma unroll
  for (int i = 0; i < 2; ++i) {
    weight[i] += KSHUFFLE_XOR(weight[i], 1);
    weight[i] += KSHUFFLE_XOR(weight[i], 2);
    if (rows[i] >= num_rows) continue;
    if constexpr (DIRECT) {
#pragma unroll
      for (int t = 0; t < PIECES; ++t)
        *reinterpret_cast<unsigned*>(out + offsets[i] + t * 8) = packed(sum[t][i * 2] / weight[i], sum[t][i * 2 + 1] / weight[i]);
    } else {
      const long at = places[i] * splits + split;
#pragma unroll
      for (int t = 0; t < PIECES; ++t)
        *reinterpret_cast<float2*>(out + at * D + (lane % 4) * 2 + t * 8) = make_float2(sum[t][i * 2], sum[t][i * 2 + 1]);
      if (lane % 4 == 0) {
        statistics[at * 2] = maximum[i] / LOG2E;
        statistics[at * 2 + 1] = weight[i];
      }
    }
  }
""",
)

# The kernels below move runs of 8 elements, one a thread. CUDA rounds a grid up to whole groups, so each thread checks its place.
# Grid: (tokens * D / 8, HEADS, chunks), as many as if all tokens were of one chunk. Template: T, D, HEADS, PAGE.
WRITE = KernelText(
    name="paged_write",
    inputs=("keys", "values", "pool_keys", "pool_values", "table", "spans", "epoch"),
    outputs=("next_epoch",),
    body=r"""
  constexpr int RUNS = D / 8;
  const int token = index_x / RUNS, run = index_x % RUNS;
  const int position = spans[group_z * 3 + 1] + token;
  if (position < spans[group_z * 3 + 2]) {
    const int page = table[group_z * table_shape[1] + position / PAGE];
    const long from = ((long)(spans[group_z * 3] + token) * HEADS + group_y) * D + run * 8;
    const long to = (((long)page * HEADS + group_y) * PAGE + position % PAGE) * D + run * 8;
    kcopy8<T>(keys + from, (KDEVICE T*)pool_keys + to);
    kcopy8<T>(values + from, (KDEVICE T*)pool_values + to);
  }
  if (index_x == 0 && group_y == 0 && group_z == 0) """
    + _NEXT_EPOCH
    + "\n",
)

# Grid: (tokens * D / 8, HEADS, 1). Template: T, D, HEADS, PAGE.
GATHER = KernelText(
    name="paged_gather",
    inputs=("pool_keys", "pool_values", "table", "length", "epoch"),
    outputs=("keys", "values", "next_epoch"),
    body=r"""
  constexpr int RUNS = D / 8;
  const int num_tokens = length[0];
  const int token = index_x / RUNS, run = index_x % RUNS;
  if (token < num_tokens) {
    const long from = (((long)table[token / PAGE] * HEADS + group_y) * PAGE + token % PAGE) * D + run * 8;
    const long to = ((long)group_y * num_tokens + token) * D + run * 8;
    kcopy8<T>(pool_keys + from, keys + to);
    kcopy8<T>(pool_values + from, values + to);
  }
  if (index_x == 0 && group_y == 0) """
    + _NEXT_EPOCH
    + "\n",
)

# Grid: (HEADS * PAGE * D / 8, 1, 1). Template: T, D, HEADS, PAGE.
COPY_BLOCK = KernelText(
    name="paged_copy_block",
    inputs=("pool_keys", "pool_values", "blocks", "epoch"),
    outputs=("next_epoch",),
    body=r"""
  constexpr int SIZE = HEADS * PAGE * D;
  if (index_x < SIZE / 8) {
    const long from = (long)blocks[0] * SIZE + index_x * 8, to = (long)blocks[1] * SIZE + index_x * 8;
    kcopy8<T>(pool_keys + from, (KDEVICE T*)pool_keys + to);
    kcopy8<T>(pool_values + from, (KDEVICE T*)pool_values + to);
  }
  if (index_x == 0) """
    + _NEXT_EPOCH
    + "\n",
)
