// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), and how
// pynas counts.
//
// A draw is a pure function of (domain, seed, step, index, item, layer). There is no state, so
// results depend neither on threads nor on the order of work nor on the instruction set. One block
// of four words serves four neighbouring layers:
//
//   counter:  word 0  index, the number of the draw, path or round
//             word 1  (layer / 4) << 16 | item, the option or position
//             word 2  low 32 bits of step
//             word 3  domain << 24 | high 24 bits of step
//   key:      seed
//   result:   the word of a layer is block[layer % 4]
//
// pynas/kernels/noise.py says the same in torch.
#pragma once

#include <cstdint>

#include "portable.h"

namespace pynas {
namespace {

// Each sampler has a domain of its own, so that two samplers with one seed never share a stream.
enum class Domain : uint32_t { kGumbel = 1, kPaths = 2, kFair = 3 };

// How far a counter counts.
constexpr int64_t kIndices = int64_t{1} << 32, kLayers = 1 << 18, kSteps = int64_t{1} << 56;

struct Block {
  uint32_t word[4];
};

constexpr uint32_t kPhiloxM0 = 0xD2511F53, kPhiloxM1 = 0xCD9E8D57;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9, kPhiloxW1 = 0xBB67AE85;

PYNAS_HOST_DEVICE Block philox(Block counter, uint64_t key) {
  uint32_t c0 = counter.word[0], c1 = counter.word[1], c2 = counter.word[2], c3 = counter.word[3];
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
#ifdef __CUDACC__
#pragma unroll
#else
#pragma GCC unroll 10  // unrolled, the loop around a call vectorises
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{kPhiloxM0} * c0;
    const uint64_t p1 = uint64_t{kPhiloxM1} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return {{c0, c1, c2, c3}};
}

PYNAS_HOST_DEVICE Block counter_of(Domain domain, uint64_t step, uint32_t index, uint32_t group,
                                   uint32_t item) {
  return {{index, group << 16 | item, static_cast<uint32_t>(step),
           static_cast<uint32_t>(domain) << 24 | static_cast<uint32_t>(step >> 32)}};
}

// The words of layers 4 * group .. 4 * group + 3.
PYNAS_HOST_DEVICE Block draw(Domain domain, uint64_t seed, uint64_t step, uint32_t index,
                             uint32_t group, uint32_t item) {
  return philox(counter_of(domain, step, index, group, item), seed);
}

}  // namespace
}  // namespace pynas
