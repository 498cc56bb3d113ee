// Paths in bulk, without gradient: one option of every layer per path.
#pragma once

#include <cstdint>

#include "tables.h"

namespace pynas {

// A path takes option k of a layer where k of its thresholds are <= the 32-bit word drawn for it.
struct PathInputs {
  int64_t paths, layers, cuts;
  const int64_t* threshold;  // [layers, cuts], rising, 0 .. 2^32; 2^32 is never reached
  uint64_t seed, step;
};

struct FairInputs {
  int64_t rounds, layers, most;  // most: the greatest number of options of a layer
  const int64_t* options;        // [layers], 1 .. most
  uint64_t seed, step;
  uint32_t* scratch;  // fair_scratch(most) words
};

constexpr int64_t kPathLanes = 64;  // paths or rounds that are drawn side by side

constexpr int64_t fair_scratch(int64_t most) { return (2 * 4 + 1) * most * kPathLanes; }

struct PathTable {
  void (*sample)(const PathInputs&, uint8_t* out);  // out: [paths, layers]
  void (*fair)(const FairInputs&, uint8_t* out);    // out: [rounds, most, layers]
};

PYNAS_DECLARE_TABLE(PathTable, paths)

}  // namespace pynas
