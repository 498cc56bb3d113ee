// Compiled once per instruction set.
#include "elementwise.h"

#include "../shared/float_math.h"

namespace pynas {
namespace {

void log_all(const float* in, float* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = log_f32(in[i]);
}

void exp_all(const float* in, float* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = exp_f32(in[i]);
}

void gumbel_all(const uint32_t* words, float* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = gumbel_f32(words[i]);
}

}  // namespace

namespace PYNAS_ISA {
const ElementwiseTable elementwise = {log_all, exp_all, gumbel_all};
}
}  // namespace pynas
