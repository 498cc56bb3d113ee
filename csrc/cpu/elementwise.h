// The functions of csrc/shared over arrays, so that the tests can sweep them on every instruction
// set.
#pragma once

#include <cstdint>

#include "tables.h"

namespace pynas {

struct ElementwiseTable {
  void (*log)(const float* in, float* out, int64_t count);
  void (*exp)(const float* in, float* out, int64_t count);
  void (*gumbel)(const uint32_t* words, float* out, int64_t count);
  void (*philox)(const uint32_t* counters, uint64_t key, uint32_t* out, int64_t count);  // [n, 4]
};

PYNAS_DECLARE_TABLE(ElementwiseTable, elementwise)

}  // namespace pynas
