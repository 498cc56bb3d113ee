// What CUDA code is written against: the CUDA toolkit, or threads played on a CPU (on_cpu.h), where
// every access is checked. Device memory and shared memory are reached through `Array` alone.
#pragma once

#include <cstdint>

#ifdef PYNAS_CUDA_ON_CPU
#include "on_cpu.h"
#else
#include <cuda_runtime.h>

namespace pynas {
namespace {

template <typename T>
using Array = T*;

// `count` elements at `data`; the count is what a CPU checks.
template <typename T>
__device__ __forceinline__ T* array(T* data, int64_t) {
  return data;
}

// `count` elements of the block's dynamic shared memory, from element `first`.
template <typename T>
__device__ __forceinline__ T* shared_array(int64_t first, int64_t) {
  extern __shared__ float4 pynas_shared[];
  return reinterpret_cast<T*>(pynas_shared) + first;
}

// Four floats at an index divisible by four.
__device__ __forceinline__ float4 load4(const float* from, int64_t index) {
  return *reinterpret_cast<const float4*>(from + index);
}

__device__ __forceinline__ void store4(float* to, int64_t index, float4 value) {
  *reinterpret_cast<float4*>(to + index) = value;
}

// Launches a kernel, after raising its limit of shared memory where it needs more than 48 KiB.
// Returns null, or what is wrong.
template <typename Kernel, typename... Args>
const char* launch(Kernel kernel, dim3 blocks, int threads, int64_t shared_bytes, void* stream,
                   const Args&... args) {
  if (blocks.x == 0 || blocks.y == 0 || blocks.z == 0) return nullptr;
  if (shared_bytes > 48 * 1024) {
    const cudaError_t raised = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (raised != cudaSuccess) return cudaGetErrorString(raised);
  }
  // clang-format off
  kernel<<<blocks, threads, static_cast<size_t>(shared_bytes), static_cast<cudaStream_t>(stream)>>>(
      args...);
  // clang-format on
  const cudaError_t launched = cudaGetLastError();
  return launched == cudaSuccess ? nullptr : cudaGetErrorString(launched);
}

}  // namespace
}  // namespace pynas

#define PYNAS_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace pynas {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// The first failure of launches that follow each other.
struct Launches {
  const char* failure = nullptr;

  template <typename... Args>
  void operator()(const Args&... args) {
    if (failure == nullptr) failure = launch(args...);
  }
};

template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

__host__ __device__ __forceinline__ int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

}  // namespace
}  // namespace pynas
