// Enough of CUDA to run a kernel's own source on the CPU, one block after the other.
//
// The threads of a block are fibers of one OS thread: each runs until it meets others (a barrier, a
// ballot, a shuffle) or touches an atomic, and which one runs next is up to a schedule. So a kernel
// that lacks a barrier, or whose result hangs on an order that the GPU does not promise, gives
// other results under another schedule; and one whose threads miss each other is told so.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __shared__ thread_local
#define __launch_bounds__(...)

struct Index {
  unsigned x;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

namespace host {

enum class Meeting { none, barrier, barrier_or, warp, ballot, shuffle_up };
constexpr unsigned kLanes = 32;
constexpr size_t kStackBytes = 64 << 10;

struct Fiber {
  ucontext_t beginning;
  jmp_buf here;
  std::vector<char> stack = std::vector<char>(kStackBytes);
  bool begun = false, done = false;
  Meeting meeting = Meeting::none;  // whom it waits for; none: it can run
  int brought = 0, from = 0, received = 0;
};

inline std::vector<Fiber> fibers;
inline Fiber* current;
inline jmp_buf scheduler;
inline std::function<void()> kernel;
inline Index thread, block, threads, blocks;
inline bool at_random;
inline std::mt19937 random_numbers;

inline void pause() {
  if (!_setjmp(current->here)) _longjmp(scheduler, 1);
}

inline int meet(Meeting meeting, int brought = 0, int from = 0) {
  current->meeting = meeting;
  current->brought = brought;
  current->from = from;
  pause();
  return current->received;
}

inline void life() {
  while (true) {
    kernel();
    current->done = true;
    pause();
  }
}

inline void resume(unsigned index) {
  current = &fibers[index];
  thread = {index};
  if (_setjmp(scheduler)) return;
  if (current->begun) _longjmp(current->here, 1);
  current->begun = true;
  setcontext(&current->beginning);
}

inline bool of_whole_block(Meeting meeting) {
  return meeting == Meeting::barrier || meeting == Meeting::barrier_or;
}

// Lets the threads [begin, end) go on if all of them are at the same meeting.
inline bool release(unsigned begin, unsigned end, bool whole_block) {
  const Meeting meeting = fibers[begin].meeting;
  if (meeting == Meeting::none || of_whole_block(meeting) != whole_block) return false;
  unsigned bits = 0, any = 0;
  for (unsigned i = begin; i < end; ++i) {
    if (fibers[i].meeting != meeting) return false;
    any |= fibers[i].brought != 0;
    bits |= static_cast<unsigned>(fibers[i].brought != 0) << (i - begin) % kLanes;
  }
  for (unsigned i = begin; i < end; ++i) {
    Fiber& fiber = fibers[i];
    const int lane = static_cast<int>(i - begin);
    if (meeting == Meeting::barrier_or) fiber.received = static_cast<int>(any);
    if (meeting == Meeting::ballot) fiber.received = static_cast<int>(bits);
    if (meeting == Meeting::shuffle_up) {
      fiber.received =
          fibers[lane < fiber.from ? i : i - static_cast<unsigned>(fiber.from)].brought;
    }
  }
  for (unsigned i = begin; i < end; ++i) fibers[i].meeting = Meeting::none;
  return true;
}

inline bool can_run(const Fiber& fiber) { return !fiber.done && fiber.meeting == Meeting::none; }

// Runs what can run of a warp, and lets its threads meet.
inline void run_warp(unsigned begin, int schedule) {
  unsigned order[kLanes];
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    order[lane] = begin + (schedule == 1 ? kLanes - 1 - lane : lane);
  }
  if (at_random) std::shuffle(order, order + kLanes, random_numbers);
  for (const unsigned index : order) {
    if (can_run(fibers[index])) resume(index);
  }
  release(begin, begin + kLanes, false);
}

inline void run_block(int schedule) {
  const auto n = static_cast<unsigned>(fibers.size());
  for (Fiber& fiber : fibers) fiber.done = false, fiber.meeting = Meeting::none;
  while (true) {
    // At random, some warps are left behind for a while.
    for (unsigned begin = 0; begin < n; begin += kLanes) {
      const unsigned warp = schedule == 1 ? n - kLanes - begin : begin;
      if (!at_random || random_numbers() % 2) run_warp(warp, schedule);
    }
    if (std::any_of(fibers.begin(), fibers.end(), can_run) || release(0, n, true)) continue;
    if (std::all_of(fibers.begin(), fibers.end(), [](const Fiber& f) { return f.done; })) return;
    throw std::runtime_error("threads wait for others that never come");
  }
}

// Runs a grid; schedule 0 takes threads in order, 1 from the last to the first, others at random.
inline void run(std::function<void()> body, unsigned grid, unsigned block_size, int schedule) {
  if (block_size % kLanes) throw std::runtime_error("a block must be whole warps");
  kernel = std::move(body);
  fibers = std::vector<Fiber>(block_size);
  for (Fiber& fiber : fibers) {
    getcontext(&fiber.beginning);
    fiber.beginning.uc_stack.ss_sp = fiber.stack.data();
    fiber.beginning.uc_stack.ss_size = fiber.stack.size();
    makecontext(&fiber.beginning, life, 0);
  }
  at_random = schedule > 1;
  random_numbers.seed(static_cast<unsigned>(schedule));
  blocks = {grid};
  threads = {block_size};
  std::vector<unsigned> order(grid);
  for (unsigned i = 0; i < grid; ++i) order[i] = schedule == 1 ? grid - 1 - i : i;
  if (at_random) std::shuffle(order.begin(), order.end(), random_numbers);
  for (const unsigned index : order) {
    block = {index};
    run_block(schedule);
  }
}

}  // namespace host

#define threadIdx host::thread
#define blockIdx host::block
#define blockDim host::threads
#define gridDim host::blocks

inline void __syncthreads() { host::meet(host::Meeting::barrier); }
inline int __syncthreads_or(int value) { return host::meet(host::Meeting::barrier_or, value); }
inline void __syncwarp() { host::meet(host::Meeting::warp); }
inline unsigned __ballot_sync(unsigned, int value) {
  return static_cast<unsigned>(host::meet(host::Meeting::ballot, value));
}
inline int __shfl_up_sync(unsigned, int value, unsigned apart) {
  return host::meet(host::Meeting::shuffle_up, value, static_cast<int>(apart));
}
inline int atomicAdd(int* at, int value) {
  if (host::at_random) host::pause();
  const int before = *at;
  *at += value;
  return before;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
