// Philox blocks of neighbouring indices, one per vector lane: the numbers of shared/philox.h about
// twice as fast as GCC 12 vectorises it. The even and the odd lanes run in two vectors of 64-bit
// elements: a widening multiply takes their low halves as they are, and nobody reads the high ones.
#pragma once

#include <cstdint>
#include <cstring>

#include "../shared/philox.h"

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace pynas {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

using Wide = uint64_t __attribute__((vector_size(kVectorBytes)));
using Narrow = uint32_t __attribute__((vector_size(kVectorBytes)));

// The low halves of a, times factor.
inline Wide multiply_low(Wide a, uint32_t factor) {
#if defined(__AVX512F__)
  const __m512i b = _mm512_set1_epi64(factor);
  // The masked form, because GCC 12 warns about the undefined vector inside the plain one.
  return reinterpret_cast<Wide>(_mm512_maskz_mul_epu32(0xFF, reinterpret_cast<__m512i>(a), b));
#elif defined(__AVX2__)
  const __m256i b = _mm256_set1_epi64x(factor);
  return reinterpret_cast<Wide>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), b));
#elif defined(__SSE2__)
  const __m128i b = _mm_set1_epi64x(factor);
  return reinterpret_cast<Wide>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), b));
#elif defined(__ARM_NEON)
  return reinterpret_cast<Wide>(vmull_n_u32(vmovn_u64(reinterpret_cast<uint64x2_t>(a)), factor));
#else
  return (a & 0xFFFFFFFF) * factor;
#endif
}

struct Half {
  Wide c0, c1, c2, c3;
};

inline Half philox(Half c, uint64_t key) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const Wide p0 = multiply_low(c.c0, kPhiloxM0), p1 = multiply_low(c.c2, kPhiloxM1);
    c = {p1 >> 32 ^ c.c1 ^ k0, p1, p0 >> 32 ^ c.c3 ^ k1, p0};
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return c;
}

inline void store_interleaved(Wide even, Wide odd, uint32_t* out) {
  const Wide both = (even & 0xFFFFFFFF) | odd << 32;
  memcpy(out, &both, sizeof both);
}

// Word i of the block of index first + lane goes to out[i][lane].
template <int kLanes>
inline void draw_lanes(Domain domain, uint64_t seed, uint64_t step, uint32_t first, uint32_t group,
                       uint32_t item, uint32_t (*out)[kLanes]) {
  constexpr int kWidth = kVectorBytes / 4;
  const Block counter = counter_of(domain, step, first, group, item);
  Narrow index;
  for (int i = 0; i < kWidth; ++i) index[i] = first + i;
  for (int lane = 0; lane < kLanes; lane += kWidth, index += kWidth) {
    const Wide c0 = reinterpret_cast<Wide>(index);
    const Wide c1 = Wide{} + counter.word[1], c2 = Wide{} + counter.word[2],
               c3 = Wide{} + counter.word[3];
    const Half even = philox({c0, c1, c2, c3}, seed);
    const Half odd = philox({c0 >> 32, c1, c2, c3}, seed);
    store_interleaved(even.c0, odd.c0, out[0] + lane);
    store_interleaved(even.c1, odd.c1, out[1] + lane);
    store_interleaved(even.c2, odd.c2, out[2] + lane);
    store_interleaved(even.c3, odd.c3, out[3] + lane);
  }
}

}  // namespace
}  // namespace pynas
