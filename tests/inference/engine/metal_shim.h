// What a kernel text needs to run on a CPU: one group at a time, every thread of it a fiber that yields at barriers and shuffles.
// It checks arithmetic, indices and synchronisation; it knows nothing of address spaces, which only the real compilers check.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

typedef unsigned int uint;
typedef unsigned short ushort;
struct uint3 {
  uint x, y, z;
};

typedef _Float16 float16_t;
// Rounds to nearest even, as the hardware does.
struct bfloat16_t {
  uint16_t bits;
  bfloat16_t() = default;
  explicit bfloat16_t(float value) {
    uint32_t raw;
    memcpy(&raw, &value, 4);
    bits = value != value ? 0x7fc0 : (uint16_t)((raw + 0x7fff + ((raw >> 16) & 1)) >> 16);
  }
  explicit operator float() const {
    const uint32_t raw = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &raw, 4);
    return value;
  }
};

namespace shim {

constexpr int MOST_THREADS = 1024;
constexpr size_t STACK = 128 * 1024;

struct Barrier {
  int size, arrived, generation;
};

struct Fiber {
  ucontext_t context;
  uint3 position;  // in its group
  int lane, warp;
  bool ended;
  long shuffles;
};

static Fiber fibers[MOST_THREADS];
static char* stacks = nullptr;
static ucontext_t outside;
static Barrier group_barrier, warp_barriers[MOST_THREADS / 32];
static uint32_t exchanged[MOST_THREADS / 32][2][32];
static int running, num_threads, num_live;
static long waits;  // waits since anything moved: with more than there are fibers, nothing ever will
static bool is_stuck;
static uint3 group, groups, group_size;
static void (*entry)();

inline void go_on_with_another() {
  const int from = running;
  do running = (running + 1) % num_threads;
  while (fibers[running].ended);
  if (running != from) swapcontext(&fibers[from].context, &fibers[running].context);
}

inline void wait(Barrier& barrier) {
  const int generation = barrier.generation;
  if (++barrier.arrived == barrier.size) {
    barrier.arrived = 0;
    ++barrier.generation;
    waits = 0;
    return;
  }
  while (barrier.generation == generation) {
    if (++waits > 4L * num_threads + 4) {
      is_stuck = true;
      setcontext(&outside);
    }
    go_on_with_another();
  }
}

template <typename V>
inline V shuffle_xor(V value, int mask) {
  static_assert(sizeof(V) == 4, "a lane exchanges 32 bits");
  Fiber& fiber = fibers[running];
  // Two buffers in turn: no lane is more than one shuffle ahead of another.
  uint32_t* buffer = exchanged[fiber.warp][fiber.shuffles++ % 2];
  memcpy(&buffer[fiber.lane], &value, 4);
  wait(warp_barriers[fiber.warp]);
  memcpy(&value, &buffer[fiber.lane ^ mask], 4);
  return value;
}

inline void fiber_main() {
  entry();
  fibers[running].ended = true;
  waits = 0;
  if (--num_live == 0) setcontext(&outside);
  go_on_with_another();
}

// Runs `kernel` once for every thread of every group; false if a group's threads wait for each other for ever.
inline bool run_grid(uint3 grid, uint3 size, bool whole_groups, void (*kernel)()) {
  if (!stacks) stacks = (char*)malloc(STACK * MOST_THREADS);
  entry = kernel;
  group_size = size;
  groups = {(grid.x + size.x - 1) / size.x, (grid.y + size.y - 1) / size.y, (grid.z + size.z - 1) / size.z};
  is_stuck = false;
  for (group.z = 0; group.z < groups.z; ++group.z)
    for (group.y = 0; group.y < groups.y; ++group.y)
      for (group.x = 0; group.x < groups.x; ++group.x) {
        // Metal leaves out the threads beyond the grid, CUDA runs them.
        const uint left = grid.x - group.x * size.x;
        num_threads = num_live = (int)(whole_groups || left > size.x ? size.x : left);
        waits = 0;
        group_barrier = {num_threads, 0, 0};
        for (int i = 0; i < num_threads; ++i) {
          Fiber& fiber = fibers[i];
          fiber.position = {(uint)i, 0, 0};
          fiber.lane = i % 32;
          fiber.warp = i / 32;
          fiber.ended = false;
          fiber.shuffles = 0;
          warp_barriers[i / 32] = {32, 0, 0};
          getcontext(&fiber.context);
          fiber.context.uc_stack.ss_sp = stacks + STACK * i;
          fiber.context.uc_stack.ss_size = STACK;
          fiber.context.uc_link = nullptr;
          makecontext(&fiber.context, fiber_main, 0);
        }
        running = 0;
        volatile bool is_back = false;
        getcontext(&outside);
        if (!is_back) {
          is_back = true;
          setcontext(&fibers[0].context);
        }
        if (is_stuck) return false;
      }
  return true;
}

}  // namespace shim

#ifdef SHIM_CUDA
struct uint4 {
  uint32_t x, y, z, w;
};
struct float4 {
  float x, y, z, w;
};
typedef float16_t __half;
typedef bfloat16_t __nv_bfloat16;
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define threadIdx (shim::fibers[shim::running].position)
#define blockIdx (shim::group)
#define blockDim (shim::group_size)
#define gridDim (shim::groups)
#define __syncthreads() shim::wait(shim::group_barrier)
#define __shfl_xor_sync(lanes, value, mask) shim::shuffle_xor((value), (mask))
#define __expf(x) std::exp(x)
#else
namespace metal {
enum class mem_flags { mem_threadgroup };
inline void threadgroup_barrier(mem_flags) { shim::wait(shim::group_barrier); }
inline float simd_shuffle_xor(float value, ushort mask) { return shim::shuffle_xor(value, mask); }
namespace fast {
inline float exp(float x) { return std::exp(x); }
}  // namespace fast
}  // namespace metal
#define device
#define constant
#define thread
#define threadgroup static
#define kernel
#endif
