// Running averages of the norms of a layer's blocks, all in one launch.
#include "device.h"

namespace pynas {
namespace {

constexpr int kThreads = 128, kMostBlocks = 16, kNorms = 3;

struct UpdatedNorm {
  float *mean, *variance;
  int64_t* batches;
};

struct Update {
  int32_t options, out_channels;
  int64_t in_positions, out_positions;  // values of a channel in the first norm, and in the others
  float momentum;
  const float* statistics;  // as layer.statistics of mbconv.h
  int32_t hidden[kMostBlocks], groups[kMostBlocks];
  UpdatedNorm norm[kMostBlocks][kNorms];
};

// Grid: (blocks of channels, norms, options).
__global__ void __launch_bounds__(kThreads) update_norms(const __grid_constant__ Update in) {
  const int option = static_cast<int>(blockIdx.z), kind = static_cast<int>(blockIdx.y);
  const int channel = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
  const int hidden = in.hidden[option], channels = kind == 2 ? in.out_channels : hidden;
  const UpdatedNorm& norm = in.norm[option][kind];
  if (channel == 0) array(norm.batches, 1)[0] += 1;
  if (channel >= channels) return;
  int64_t before = 0, all = 0;
  for (int o = 0; o < in.options; ++o) {
    const int64_t size = 4 * static_cast<int64_t>(in.hidden[o]) + 2 * in.out_channels;
    before += o < option ? size : 0;
    all += size;
  }
  before += 2 * static_cast<int64_t>(hidden) * kind;
  // Statistics of the first norm lie in the order after the shuffle.
  const int each = hidden / in.groups[option];
  const int at = kind == 0 ? channel % each * in.groups[option] + channel / each : channel;
  const auto found = array(in.statistics, all) + before;
  const int64_t positions = kind == 0 ? in.in_positions : in.out_positions;
  const float unbiased = static_cast<float>(positions) / static_cast<float>(positions - 1);
  const auto mean = array(norm.mean, channels), variance = array(norm.variance, channels);
  mean[channel] += in.momentum * (found[at] - mean[channel]);
  variance[channel] += in.momentum * (found[channels + at] * unbiased - variance[channel]);
}

}  // namespace
}  // namespace pynas

PYNAS_EXPORT const char* pynas_mbconv_update(const pynas::Update* in, void* stream) {
  pynas::Launches run;
  int32_t most = in->out_channels;
  for (int o = 0; o < in->options; ++o) most = in->hidden[o] > most ? in->hidden[o] : most;
  run(pynas::update_norms,
      dim3(static_cast<unsigned>(pynas::ceil_div(most, pynas::kThreads)), pynas::kNorms,
           static_cast<unsigned>(in->options)),
      pynas::kThreads, 0, stream, *in);
  return run.failure;
}
