// Vectors as wide as the instruction set has them, in GCC's and Clang's vector extensions.
//
// Everything here lives in an anonymous namespace: each CPU file is compiled once per instruction
// set, and its copies must not share symbols.
#pragma once

#include <cstdint>

#define PYNAS_INLINE inline __attribute__((always_inline))
#define PYNAS_UNROLL _Pragma("GCC unroll 64")

namespace pynas {
namespace {

#if defined(__AVX512F__)
#ifdef PYNAS_NARROW
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 64;
#endif
constexpr int kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16;
constexpr int kRegisters = 32;
#else
constexpr int kVectorBytes = 16;
constexpr int kRegisters = 16;
#endif

template <int Bytes>
struct IndexOf;
template <>
struct IndexOf<4> {
  typedef int32_t type;
};
template <>
struct IndexOf<8> {
  typedef int64_t type;
};

template <typename T>
struct Simd {
  typedef typename IndexOf<sizeof(T)>::type Index __attribute__((vector_size(kVectorBytes)));
  typedef T Vector __attribute__((vector_size(kVectorBytes)));
  typedef T Loose __attribute__((vector_size(kVectorBytes), aligned(sizeof(T)), may_alias));
  static constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));
};

template <typename T>
using Vector = typename Simd<T>::Vector;
template <typename T>
constexpr int kLanes = Simd<T>::kLanes;

template <typename T>
PYNAS_INLINE Vector<T> load(const T* from) {
  return *reinterpret_cast<const typename Simd<T>::Loose*>(from);
}

template <typename T>
PYNAS_INLINE void store(T* to, Vector<T> value) {
  *reinterpret_cast<typename Simd<T>::Loose*>(to) = value;
}

// scalar - 0 and not scalar + 0: the sum would turn -0 into 0, so compilers keep the addition.
template <typename T>
PYNAS_INLINE Vector<T> broadcast(T scalar) {
  return scalar - Vector<T>{};
}

template <typename T>
PYNAS_INLINE void add_to(double* sums, Vector<T> value) {
  for (int lane = 0; lane < kLanes<T>; ++lane) sums[lane] += static_cast<double>(value[lane]);
}

// Smallest multiple of the vector length that holds so many channels.
template <typename T>
constexpr int64_t padded(int64_t channels) {
  return (channels + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

// A number as a type, for loops whose length the compiler must know.
template <int Value>
struct Count {
  static constexpr int value = Value;
};

template <typename I>
constexpr I smaller(I a, I b) {
  return a < b ? a : b;
}

template <typename I>
constexpr I larger(I a, I b) {
  return a < b ? b : a;
}

}  // namespace
}  // namespace pynas
