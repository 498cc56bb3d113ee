// Compiled once per instruction set. Paths (or rounds) lie side by side in the vector lanes; four
// layers share a Philox block and leave as the four bytes of one word. Integers only, so all
// instruction sets agree.
#include "paths.h"

#include <cstring>

#include "philox_lanes.h"

namespace pynas {
namespace {

constexpr int64_t kLanes = kPathLanes;
constexpr int64_t kLayersPerBlock = 4;

struct Words {
  uint32_t layer[kLayersPerBlock][kLanes];
};

void fill_words(Words& words, Domain domain, uint64_t seed, uint64_t step, uint32_t first,
                uint32_t group, uint32_t item) {
  draw_lanes(domain, seed, step, first, group, item, words.layer);
}

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Stores byte i of packed[lane] at out[lane * stride + i].
void store(const uint32_t* packed, int64_t lanes, int64_t stride, int64_t layers, uint8_t* out) {
  if (layers >= kLayersPerBlock) {
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const uint32_t word = packed[lane];
      const uint8_t bytes[4] = {static_cast<uint8_t>(word), static_cast<uint8_t>(word >> 8),
                                static_cast<uint8_t>(word >> 16), static_cast<uint8_t>(word >> 24)};
      memcpy(out + lane * stride, bytes, sizeof bytes);
    }
    return;
  }
  for (int64_t lane = 0; lane < lanes; ++lane) {
    for (int64_t i = 0; i < layers; ++i) {
      out[lane * stride + i] = static_cast<uint8_t>(packed[lane] >> (8 * i));
    }
  }
}

void sample(const PathInputs& in, uint8_t* out) {
  Words words;
  for (int64_t first = 0; first < in.paths; first += kLanes) {
    for (int64_t layer = 0; layer < in.layers; layer += kLayersPerBlock) {
      fill_words(words, Domain::kPaths, in.seed, in.step, static_cast<uint32_t>(first),
                 static_cast<uint32_t>(layer / kLayersPerBlock), 0);
      uint32_t packed[kLanes] = {};
      const int64_t layers = least(kLayersPerBlock, in.layers - layer);
      for (int64_t i = 0; i < layers; ++i) {
        const int64_t* threshold = in.threshold + (layer + i) * in.cuts;
        const uint32_t one = 1u << (8 * i);
        for (int64_t c = 0; c < in.cuts && threshold[c] <= UINT32_MAX; ++c) {
          const uint32_t cut = static_cast<uint32_t>(threshold[c]);
          for (int64_t lane = 0; lane < kLanes; ++lane) {
            packed[lane] += words.layer[i][lane] >= cut ? one : 0;
          }
        }
      }
      store(packed, least(kLanes, in.paths - first), in.layers, layers,
            out + first * in.layers + layer);
    }
  }
}

// Adds to byte `byte` of packed[slot] the rank of the slot's word among the words of its
// permutation. Ranks of distinct words are a uniform permutation; equal words, one pair in 2^32,
// keep their order.
void add_ranks(const Words* words, int64_t byte, int64_t options, int64_t slots,
               uint32_t (*packed)[kLanes]) {
  const uint32_t one = 1u << (8 * byte);
  for (int64_t slot = 0; slot < slots; ++slot) {
    const int64_t start = slot - slot % options;
    const uint32_t* own = words[slot].layer[byte];
    for (int64_t other = start; other < slot; ++other) {
      const uint32_t* word = words[other].layer[byte];
      for (int64_t i = 0; i < kLanes; ++i) packed[slot][i] += word[i] <= own[i] ? one : 0;
    }
    for (int64_t other = slot + 1; other < start + options; ++other) {
      const uint32_t* word = words[other].layer[byte];
      for (int64_t i = 0; i < kLanes; ++i) packed[slot][i] += word[i] < own[i] ? one : 0;
    }
  }
}

void fair(const FairInputs& in, uint8_t* out) {
  // A layer with k < most options takes whole permutations of k words, less than 2 * most in all.
  auto* words = reinterpret_cast<Words*>(in.scratch);
  auto* packed = reinterpret_cast<uint32_t (*)[kLanes]>(words + 2 * in.most);
  for (int64_t first = 0; first < in.rounds; first += kLanes) {
    for (int64_t layer = 0; layer < in.layers; layer += kLayersPerBlock) {
      const int64_t layers = least(kLayersPerBlock, in.layers - layer);
      int64_t items = in.most;
      for (int64_t i = 0; i < layers; ++i) {
        const int64_t options = in.options[layer + i];
        const int64_t needed = (in.most + options - 1) / options * options;
        items = needed > items ? needed : items;
      }
      for (int64_t item = 0; item < items; ++item) {
        fill_words(words[item], Domain::kFair, in.seed, in.step, static_cast<uint32_t>(first),
                   static_cast<uint32_t>(layer / kLayersPerBlock), static_cast<uint32_t>(item));
      }
      memset(packed, 0, sizeof packed[0] * static_cast<size_t>(in.most));
      for (int64_t i = 0; i < layers; ++i) {
        add_ranks(words, i, in.options[layer + i], in.most, packed);
      }
      for (int64_t slot = 0; slot < in.most; ++slot) {
        store(packed[slot], least(kLanes, in.rounds - first), in.most * in.layers, layers,
              out + (first * in.most + slot) * in.layers + layer);
      }
    }
  }
}

}  // namespace

namespace PYNAS_ISA {
const PathTable paths = {sample, fair};
}
}  // namespace pynas
