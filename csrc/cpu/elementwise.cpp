// Compiled once per instruction set.
#include "elementwise.h"

#include <cstring>

#include "../shared/float_math.h"
#include "../shared/philox.h"

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

void philox_all(const uint32_t* counters, uint64_t key, uint32_t* out, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    Block block;
    memcpy(&block, counters + 4 * i, sizeof block);
    block = philox(block, key);
    memcpy(out + 4 * i, &block, sizeof block);
  }
}

}  // namespace

namespace PYNAS_ISA {
const ElementwiseTable elementwise = {log_all, exp_all, gumbel_all, philox_all};
}
}  // namespace pynas
