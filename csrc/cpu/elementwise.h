// The functions of shared/float_math.h over arrays, so that the tests can sweep them on
// every instruction set.
#pragma once

#include <cstdint>

#include "tables.h"

namespace pynas {

struct ElementwiseTable {
  void (*log)(const float* in, float* out, int64_t count);
  void (*exp)(const float* in, float* out, int64_t count);
  void (*gumbel)(const uint32_t* words, float* out, int64_t count);
};

PYNAS_DECLARE_TABLE(ElementwiseTable, elementwise)

}  // namespace pynas
