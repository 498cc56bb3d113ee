// float32 log, exp and Gumbel noise from plain IEEE multiplies and adds.
//
// The same bits come out on every instruction set and on a GPU, provided that the compiler does not
// contract a * b + c into one fused operation (-ffp-contract=off, --fmad=false), which would make
// the answer depend on the hardware; fusing would save less than a tenth of a step. Without libm
// these functions also vectorise. The coefficients are minimax fits. Greatest error over all
// floats: log 0.87, exp 0.99 units in the last place.
#pragma once

#include <cstdint>
#include <cstring>

#include "portable.h"

namespace pynas {
namespace {

PYNAS_HOST_DEVICE uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

PYNAS_HOST_DEVICE float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// x = 2^exponent * (1 + fraction) with 1 + fraction in [sqrt(1/2), sqrt(2)).
struct Reduced {
  float exponent, fraction;
};

PYNAS_HOST_DEVICE Reduced reduce(float x) {
  constexpr uint32_t kSqrtHalf = 0x3F3504F3;
  const uint32_t offset = bits_of(x) - kSqrtHalf;
  const int32_t exponent = static_cast<int32_t>(offset) >> 23;
  return {static_cast<float>(exponent), float_of((offset & 0x7FFFFF) + kSqrtHalf) - 1.0f};
}

PYNAS_HOST_DEVICE float log_of(Reduced x) {
  // ln 2 in two parts; the first has so few bits that its product with an exponent is exact.
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  const float f = x.fraction;
  float p = -0.07634499669075012f;
  p = p * f + 0.1276157796382904f;
  p = p * f - 0.13160181045532227f;
  p = p * f + 0.14201757311820984f;
  p = p * f - 0.16623356938362122f;
  p = p * f + 0.20001226663589478f;
  p = p * f - 0.2500081956386566f;
  p = p * f + 0.3333333134651184f;
  const float square = f * f;
  const float tail = p * f * square + x.exponent * kLn2Low - 0.5f * square;
  return (f + tail) + x.exponent * kLn2High;
}

// Natural logarithm. x must be positive and normal.
PYNAS_HOST_DEVICE float log_f32(float x) { return log_of(reduce(x)); }

// e^x for x <= 88, minus infinity included. Exactly 0 below x = -87.33, where the result would be
// subnormal.
PYNAS_HOST_DEVICE float exp_f32(float x) {
  constexpr float kLowest = -87.33f, kLog2E = 1.44269504f, kRound = 12582912.0f;  // 1.5 * 2^23
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  const float safe = x < kLowest ? kLowest : x;
  const float shifted = safe * kLog2E + kRound;  // adding 1.5 * 2^23 rounds to the nearest integer
  const float n = shifted - kRound;
  const float r = (safe - n * kLn2High) - n * kLn2Low;
  float p = 0.0013814487028867006f;
  p = p * r + 0.008368780836462975f;
  p = p * r + 0.04166839271783829f;
  p = p * r + 0.1666651964187622f;
  p = p * r + 0.4999999403953552f;
  const float y = (p * (r * r) + r) + 1.0f;
  const float scaled = float_of(bits_of(y) + (bits_of(shifted) << 23));
  return x < kLowest ? 0.0f : scaled;
}

// Gumbel(0, 1) noise -log(-log u) with u = 1 - (word + 1/2) / 2^32, from -3.13 to 22.87.
//
// Near u = 1, where the noise is large, -log u comes from 1 - u, which a float u could not tell
// from 0. So all 32 bits count at both ends, and u is never 0 or 1. Over all words the mean is
// 0.577215665 and the variance 1.6449341, as they should be.
PYNAS_HOST_DEVICE float gumbel_f32(uint32_t word) {
  constexpr float kOneMinusSqrtHalf = 0.29289323f;
  const bool near_one = static_cast<int32_t>(word) >= 0;
  const int32_t magnitude = static_cast<int32_t>(near_one ? word : ~word);
  // The distance from u to the nearer end, in (0, 1/2].
  const float w = (static_cast<float>(magnitude) + 0.5f) * 2.3283064365386963e-10f;
  const bool halved = w > kOneMinusSqrtHalf;
  Reduced u = reduce(w);
  u.fraction = near_one ? (halved ? 1.0f - 2.0f * w : -w) : u.fraction;
  u.exponent = near_one ? (halved ? -1.0f : 0.0f) : u.exponent;
  return -log_f32(-log_of(u));
}

}  // namespace
}  // namespace pynas
