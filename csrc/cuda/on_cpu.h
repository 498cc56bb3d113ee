// Plays CUDA's threads on a CPU, to test kernels where there is no GPU: the same source, compiled
// as C++.
//
// Each thread of a block is a fiber that runs until it meets a barrier or a shuffle; blocks run one
// after another. So a run is exact and repeatable. What it finds: accesses outside an array or off
// its alignment, shared memory that is read before it is written (it is filled with NaN), threads
// that miss a barrier, shuffles of half a warp. `pynas_cuda_order` lets fibers go on in random
// order, so that a missing barrier changes results. It says nothing about speed, nor about races
// between blocks.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#ifndef __x86_64__
#include <ucontext.h>
#endif

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__
#define __grid_constant__
#define PYNAS_EXPORT extern "C" __attribute__((visibility("default")))

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  dim3(unsigned x_, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace pynas_on_cpu {

enum class State { kReady, kBlockBarrier, kWarpBarrier, kDone };

constexpr size_t kStackBytes = 64 * 1024;
constexpr int kLanes = 32;

#ifdef __x86_64__
// Saves the registers that a call keeps, and goes on with another stack.
extern "C" void pynas_switch(void** from, void* to);
asm(R"(
.text
.weak pynas_switch
.type pynas_switch, @function
pynas_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size pynas_switch, .-pynas_switch
)");

struct Context {
  void* stack_pointer = nullptr;

  void start_at(char* stack, void (*entry)()) {
    auto top = reinterpret_cast<uintptr_t>(stack + kStackBytes) & ~uintptr_t{15};
    auto* slots = reinterpret_cast<void**>(top - 16);
    slots[0] = reinterpret_cast<void*>(entry);
    for (int i = 1; i <= 6; ++i) slots[-i] = nullptr;
    stack_pointer = slots - 6;
  }

  void go_on_with(Context& other) { pynas_switch(&stack_pointer, other.stack_pointer); }
};
#else
struct Context {
  ucontext_t context;

  void start_at(char* stack, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }

  void go_on_with(Context& other) { swapcontext(&context, &other.context); }
};
#endif

struct Fiber {
  Context context;
  std::unique_ptr<char[]> stack;
  State state = State::kReady;
  dim3 thread;
  uint64_t word = 0;  // what it shows in a shuffle
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<char> shared;
  Context scheduler;
  void (*body)(void*) = nullptr;
  void* arguments = nullptr;
  size_t running = 0;
  dim3 block, blocks, threads;
  std::string failure;
};

inline thread_local Block* current = nullptr;
inline thread_local uint64_t order = 0;  // of fibers: 0 is theirs, others are seeds
inline thread_local std::string last_failure;

inline Fiber& fiber() { return current->fibers[current->running]; }

inline void wait_in(State state) {
  Fiber& self = fiber();
  self.state = state;
  self.context.go_on_with(current->scheduler);
}

inline void enter() {
  try {
    current->body(current->arguments);
  } catch (const std::exception& error) {
    if (current->failure.empty()) current->failure = error.what();
  }
  for (;;) wait_in(State::kDone);
}

inline void fail(const std::string& what) { throw std::runtime_error(what); }

// Lets waiting threads go on where all that must be there are. Returns whether any may run.
inline bool release(Block& block) {
  bool ready = false;
  const size_t count = block.fibers.size();
  for (size_t first = 0; first < count; first += kLanes) {
    const size_t end = first + kLanes < count ? first + kLanes : count;
    size_t waiting = 0;
    for (size_t i = first; i < end; ++i) waiting += block.fibers[i].state == State::kWarpBarrier;
    if (waiting == end - first) {
      for (size_t i = first; i < end; ++i) block.fibers[i].state = State::kReady;
    }
    ready = ready || waiting == end - first;
  }
  if (ready) return true;
  size_t waiting = 0;
  for (const Fiber& one : block.fibers) waiting += one.state == State::kBlockBarrier;
  if (waiting != count) return false;
  for (Fiber& one : block.fibers) one.state = State::kReady;
  return true;
}

inline uint64_t next_random(uint64_t& state) {
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return state;
}

inline void run_block(Block& block) {
  const size_t count = block.fibers.size();
  std::vector<size_t> turn(count);
  for (size_t i = 0; i < count; ++i) turn[i] = i;
  for (;;) {
    for (size_t i = count - 1; order != 0 && i > 0; --i) {
      std::swap(turn[i], turn[next_random(order) % (i + 1)]);
    }
    bool ran = false;
    for (const size_t i : turn) {
      if (block.fibers[i].state != State::kReady) continue;
      block.running = i;
      block.scheduler.go_on_with(block.fibers[i].context);
      ran = true;
      if (!block.failure.empty()) fail(block.failure);
    }
    size_t done = 0;
    for (const Fiber& one : block.fibers) done += one.state == State::kDone;
    if (done == count) return;
    if (!release(block) && !ran) fail("some threads wait at a barrier that others never reach");
  }
}

constexpr char kPoison = static_cast<char>(0xFF);  // four of them are a NaN
constexpr size_t kGuard = 64;

inline void run_grid(dim3 blocks, int threads, size_t shared_bytes, void (*body)(void*),
                     void* arguments) {
  if (threads < 1 || threads > 1024) fail("a block has 1 to 1024 threads");
  if (shared_bytes > 227 * 1024) fail("a block has at most 227 KiB of shared memory");
  if (blocks.y > 65535 || blocks.z > 65535) fail("a grid is at most 65535 blocks high and deep");
  Block block;
  block.fibers.resize(static_cast<size_t>(threads));
  for (Fiber& one : block.fibers) one.stack.reset(new char[kStackBytes]);
  block.shared.resize(shared_bytes + 2 * kGuard);
  block.body = body;
  block.arguments = arguments;
  block.blocks = blocks;
  block.threads = dim3(static_cast<unsigned>(threads));
  current = &block;
  for (unsigned z = 0; z < blocks.z; ++z) {
    for (unsigned y = 0; y < blocks.y; ++y) {
      for (unsigned x = 0; x < blocks.x; ++x) {
        block.block = dim3(x, y, z);
        memset(block.shared.data(), kPoison, block.shared.size());
        for (size_t i = 0; i < block.fibers.size(); ++i) {
          Fiber& one = block.fibers[i];
          one.state = State::kReady;
          one.thread = dim3(static_cast<unsigned>(i), 0, 0);
          one.context.start_at(one.stack.get(), enter);
        }
        run_block(block);
      }
    }
  }
  current = nullptr;
}

inline char* shared_start() {
  auto start = reinterpret_cast<uintptr_t>(current->shared.data());
  return reinterpret_cast<char*>((start + kGuard - 1) & ~uintptr_t{kGuard - 1});
}

template <typename T>
T shuffle(T value, int lane) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "a shuffle moves eight bytes at most");
  memcpy(&fiber().word, &value, sizeof value);
  wait_in(State::kWarpBarrier);
  const size_t other = current->running / kLanes * kLanes + static_cast<size_t>(lane);
  if (lane < 0 || lane >= kLanes || other >= current->fibers.size()) fail("no such lane");
  T found;
  memcpy(&found, &current->fibers[other].word, sizeof found);
  wait_in(State::kWarpBarrier);
  return found;
}

}  // namespace pynas_on_cpu

#define threadIdx (pynas_on_cpu::fiber().thread)
#define blockIdx (pynas_on_cpu::current->block)
#define blockDim (pynas_on_cpu::current->threads)
#define gridDim (pynas_on_cpu::current->blocks)

inline void __syncthreads() { pynas_on_cpu::wait_in(pynas_on_cpu::State::kBlockBarrier); }
inline void __syncwarp() { pynas_on_cpu::wait_in(pynas_on_cpu::State::kWarpBarrier); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return pynas_on_cpu::shuffle(value, static_cast<int>(threadIdx.x % pynas_on_cpu::kLanes) ^ mask);
}

// Fibers go on in random order after every barrier; 0 puts them back into their own.
PYNAS_EXPORT __attribute__((weak)) void pynas_cuda_order(uint64_t seed) {
  pynas_on_cpu::order = seed;
}

namespace pynas {
namespace {

template <typename T>
class Array {
 public:
  Array(T* data, int64_t count) : data_(data), count_(count) {}
  template <typename U>
  Array(const Array<U>& other) : data_(other.data()), count_(other.count()) {}

  T& operator[](int64_t index) const {
    if (index < 0 || index >= count_ || data_ == nullptr) outside(index);
    return data_[index];
  }
  Array operator+(int64_t first) const { return Array(data_ + first, count_ - first); }
  T* data() const { return data_; }
  int64_t count() const { return count_; }

 private:
  void outside(int64_t index) const {
    pynas_on_cpu::fail("element " + std::to_string(index) + " of an array of " +
                       std::to_string(count_) + (data_ == nullptr ? " without memory" : ""));
  }
  T* data_;
  int64_t count_;
};

template <typename T>
Array<T> array(T* data, int64_t count) {
  return Array<T>(data, count);
}

template <typename T>
Array<T> shared_array(int64_t first, int64_t count) {
  const size_t bytes = pynas_on_cpu::current->shared.size() - 2 * pynas_on_cpu::kGuard;
  if (first < 0 || static_cast<size_t>(first + count) * sizeof(T) > bytes) {
    pynas_on_cpu::fail("a block uses more shared memory than it asked for");
  }
  return Array<T>(reinterpret_cast<T*>(pynas_on_cpu::shared_start()) + first, count);
}

inline void check_four(const float* data, int64_t index) {
  if (reinterpret_cast<uintptr_t>(data + index) % sizeof(float4) != 0) {
    pynas_on_cpu::fail("four floats at an index that is not aligned");
  }
}

inline float4 load4(Array<const float> from, int64_t index) {
  check_four(from.data(), index);
  return make_float4(from[index], from[index + 1], from[index + 2], from[index + 3]);
}

inline void store4(Array<float> to, int64_t index, float4 value) {
  check_four(to.data(), index);
  to[index] = value.x;
  to[index + 1] = value.y;
  to[index + 2] = value.z;
  to[index + 3] = value.w;
}

template <typename Kernel, typename... Args>
const char* launch(Kernel kernel, dim3 blocks, int threads, int64_t shared_bytes, void*,
                   const Args&... args) {
  auto call = [&] { kernel(args...); };
  try {
    pynas_on_cpu::run_grid(
        blocks, threads, static_cast<size_t>(shared_bytes),
        [](void* self) { (*static_cast<decltype(call)*>(self))(); }, &call);
  } catch (const std::exception& error) {
    pynas_on_cpu::current = nullptr;
    pynas_on_cpu::last_failure = error.what();
    return pynas_on_cpu::last_failure.c_str();
  }
  return nullptr;
}

}  // namespace
}  // namespace pynas
