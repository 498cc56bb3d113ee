// Inverted-bottleneck blocks on a GPU, one or all those of a choice layer, in training and folded.
//
// The mathematics is csrc/cpu/mbconv.h's, and so is the order of tensors: dense, channels last.
// What makes it fast on a GPU is bytes: plain PyTorch writes and reads the hidden tensor some
// thirteen times forward and some twenty times backward. Here the hidden tensor is written once
// forward (what the depthwise convolution gives, because its batch norm needs all of it before the
// next product) and three times backward; for a later backward pass only the input and the last
// products are kept.
//
// - Statistics of the first norms follow from mean and covariance of the input, shared by all
//   blocks.
// - All blocks of a layer run in the same launches; a launch's second dimension walks over chunks
//   of 32 channels of all of them. Small layers cost launches, not work.
// - Sums over positions are kept per block of threads and added by a second kernel in their order:
//   no atomics, so results repeat.
// - A channel shuffle is another index.
//
// float32 only; sums of sums are taken in double.
#pragma once

#include "device.h"

namespace pynas {

constexpr int kMostOptions = 16;
constexpr int kMostChannels = 256;  // of input and output
constexpr int kThreads = 128, kWarps = kThreads / kWarp;
constexpr int kChunk = 32;      // channels of a tile
constexpr int kPositions = 64;  // positions of a tile
constexpr int kPitch = 36;  // floats between its rows: aligned to four, and free of bank conflicts
constexpr int kSide = 8;    // of a square tile of positions

enum Activation : int32_t { kNone, kRelu, kRelu6, kHardswish };

// One block. Weights are dense in torch's order; channel i of the first convolution goes to channel
// `shuffled(i)` of the depthwise one.
struct Option {
  int32_t kernel, hidden, groups, gate, trained;
  int32_t hidden_before;   // hidden channels of the options before this one
  int64_t expand_before;   // weights of their first convolutions
  int64_t taps_before;     // of their depthwise convolutions
  int64_t project_before;  // of their last ones
  const float *expand, *scale1, *shift1;
  const float *depthwise, *scale2, *shift2;
  const float *project, *scale3, *shift3;
  const float* statistics;  // mean and biased variance of the three norms in turn
  float *expand_out, *scale1_out, *shift1_out;
  float *depthwise_out, *scale2_out, *shift2_out;
  float *project_out, *scale3_out, *shift3_out;
};

// A layer and the memory of a pass. The same struct serves both directions; what a pass does not
// use is null.
struct Layer {
  int32_t images, height, width, in_channels, out_height, out_width, out_channels;
  int32_t stride, activation, options;
  int32_t hidden;           // of all options
  int32_t gates, identity;  // columns; the identity's, or -1
  int32_t gates_per_image;  // 0: one draw for the whole batch
  int32_t most_rows;        // of partial sums; 0 leaves it to the pass
  int32_t rows;             // blocks of threads that share the positions
  int32_t chunks;           // of the input's positions, for its moments
  int32_t slices;           // of positions, for gradients of weights
  int32_t bands;            // of an image's output positions, for sums over single images
  int32_t splits;           // of the hidden channels, for the gradient of x
  float eps;
  const float* x;            // [positions, in_channels]
  const float* gate;         // [1 or images, gates], or null: one
  float* y;                  // [out positions, out_channels]
  float *mean, *covariance;  // of x; saved
  float* products;           // [options][out positions, out_channels], before the last norm; saved
  float* statistics;         // of all options; what Option::statistics points into
  float* moments;            // [chunks][1 + in_channels + in_channels^2]
  float* norms;              // [2 * hidden + options * out_channels][4]: Norm of every channel;
                             // hidden ones lie in the first convolution's order
  float* folded;             // [most input channels of a group][hidden]: the first convolutions'
                             // weights times their norm's scale
  float* depthwise;          // [options][out positions, hidden]: what depthwise convolutions give
  float* partial;            // sums of norms, see each kernel
  const float* y_gradient;   // [out positions, out_channels]
  float* products_gradient;  // as products
  float* hidden_gradient;    // as `depthwise`: before the second norm, behind its scale and shift
  float* expand_gradient;    // [options][positions, hidden]: the same of the first norm
  float* sums;               // [4][hidden]: means of a norm's gradient, and of it times the
                             // normed value, for the second norm and then the first
  float* output_sums;        // [2][options][out_channels]: the same for the third
  float* band_sums;          // [images * bands][options + 1][2][out_channels]
  float* weight_partial;     // [slices][weights of a kind]
  float* correction;         // [options + 1][in_channels, in_channels] and [in_channels]
  float* input_partial;      // [splits][positions, in_channels]
  float *x_gradient, *gate_gradient;
  Option option[kMostOptions];
};

namespace {

__device__ __forceinline__ int lane_of_thread() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ __forceinline__ int warp_of_thread() { return static_cast<int>(threadIdx.x) / kWarp; }

// Channel of the depthwise convolution that channel i of the first one becomes.
__device__ __forceinline__ int shuffled(const Option& option, int i) {
  const int each = option.hidden / option.groups;
  return i % each * option.groups + i / each;
}

__device__ __forceinline__ int unshuffled(const Option& option, int j) {
  return j % option.groups * (option.hidden / option.groups) + j / option.groups;
}

// 32 channels, or what is left, of one group of one option.
struct Chunk {
  int option, group, first, count;
};

// What a list of chunks walks over.
enum class Channels { kHidden, kOut };

__device__ __forceinline__ int of_group(const Layer& layer, const Option& option, Channels kind) {
  return (kind == Channels::kHidden ? option.hidden : layer.out_channels) / option.groups;
}

// Which options are on a list: all, or those that are trained, or have a kernel size.
struct Which {
  bool trained = false;
  int kernel = 0;  // 0: any

  __host__ __device__ __forceinline__ bool has(const Option& option) const {
    return (!trained || option.trained) && (kernel == 0 || option.kernel == kernel);
  }
};

// Entry `index` of the list of chunks of options; option -1 behind its end. `first` counts within
// the group.
__device__ inline Chunk chunk_at(const Layer& layer, Channels kind, Which which, int index) {
  for (int o = 0; o < layer.options; ++o) {
    const Option& option = layer.option[o];
    if (!which.has(option)) continue;
    const int each = of_group(layer, option, kind), chunks = (each + kChunk - 1) / kChunk;
    if (index < chunks * option.groups) {
      const int first = index % chunks * kChunk;
      return {o, index / chunks, first, each - first < kChunk ? each - first : kChunk};
    }
    index -= chunks * option.groups;
  }
  return {-1, 0, 0, 0};
}

inline int chunks_of(const Layer& layer, Channels kind, Which which) {
  int total = 0;
  for (int o = 0; o < layer.options; ++o) {
    const Option& option = layer.option[o];
    if (!which.has(option)) continue;
    const int all = kind == Channels::kHidden ? option.hidden : layer.out_channels;
    total += (all / option.groups + kChunk - 1) / kChunk * option.groups;
  }
  return total;
}

__host__ __device__ __forceinline__ int64_t in_positions(const Layer& layer) {
  return static_cast<int64_t>(layer.images) * layer.height * layer.width;
}

__host__ __device__ __forceinline__ int64_t out_positions(const Layer& layer) {
  return static_cast<int64_t>(layer.images) * layer.out_height * layer.out_width;
}

// A batch norm of one channel: y = scale * value + shift.
struct Norm {
  float mean, inverse, scale, shift;
};

// What a norm does, given its statistics.
__device__ __forceinline__ Norm norm_of(float mean, float variance, float scale, float shift,
                                        float eps) {
  const float inverse = 1.0f / sqrtf(variance + eps);
  return {mean, inverse, scale * inverse, shift - mean * scale * inverse};
}

__device__ __forceinline__ int64_t norms_of(const Layer& layer) {
  return 2 * static_cast<int64_t>(layer.hidden) +
         static_cast<int64_t>(layer.options) * layer.out_channels;
}

__device__ __forceinline__ Norm norm_at(const Layer& layer, int64_t index) {
  const float4 found = load4(array<const float>(layer.norms, 4 * norms_of(layer)), 4 * index);
  return {found.x, found.y, found.z, found.w};
}

__device__ __forceinline__ void keep_norm(const Layer& layer, int64_t index, const Norm& norm) {
  store4(array(layer.norms, 4 * norms_of(layer)), 4 * index,
         make_float4(norm.mean, norm.inverse, norm.scale, norm.shift));
}

// Of channel i of the first convolution.
__device__ __forceinline__ Norm first_norm(const Layer& layer, const Option& option, int i) {
  return norm_at(layer, option.hidden_before + i);
}

// Of the channel of the depthwise convolution that channel i becomes.
__device__ __forceinline__ Norm second_norm(const Layer& layer, const Option& option, int i) {
  return norm_at(layer, static_cast<int64_t>(layer.hidden) + option.hidden_before + i);
}

__device__ __forceinline__ Norm third_norm(const Layer& layer, int option, int channel) {
  return norm_at(layer, 2 * static_cast<int64_t>(layer.hidden) +
                            static_cast<int64_t>(option) * layer.out_channels + channel);
}

// Most input channels of a group, which is how many rows `folded` has.
__host__ __device__ __forceinline__ int folded_rows(const Layer& layer) {
  int most = 1;
  for (int o = 0; o < layer.options; ++o) {
    const int found = layer.in_channels / layer.option[o].groups;
    most = found > most ? found : most;
  }
  return most;
}

// The weights of all first convolutions with their norms folded in: channel c of a group for
// hidden channel h lies at c * layer.hidden + h.
__device__ __forceinline__ Array<float> folded_weights(const Layer& layer) {
  return array(layer.folded, static_cast<int64_t>(folded_rows(layer)) * layer.hidden);
}

__device__ __forceinline__ float gate_of(const Layer& layer, int64_t image, int column) {
  if (layer.gate == nullptr) return 1.0f;
  const int64_t rows = layer.gates_per_image ? layer.images : 1;
  return array(layer.gate,
               rows * layer.gates)[(layer.gates_per_image ? image * layer.gates : 0) + column];
}

// An option's part of an array [options][positions, hidden].
template <typename T>
__device__ __forceinline__ Array<T> hidden_part(const Layer& layer, T* all, const Option& option,
                                                int64_t positions) {
  return array(all, positions * layer.hidden) + positions * option.hidden_before;
}

// An option's part of an array [options][out positions, out_channels].
template <typename T>
__device__ __forceinline__ Array<T> output_part(const Layer& layer, T* all, int option) {
  const int64_t each = out_positions(layer) * layer.out_channels;
  return array(all, each * layer.options) + each * option;
}

// Activations and their slopes as torch has them: a NaN stays a NaN.
__device__ __forceinline__ float activate(int kind, float t) {
  if (kind == kNone) return t;
  if (kind == kHardswish) {
    float gate = t + 3.0f;
    gate = gate < 0.0f ? 0.0f : gate;
    return t * (gate > 6.0f ? 6.0f : gate) * (1.0f / 6.0f);
  }
  t = t < 0.0f ? 0.0f : t;
  return kind == kRelu6 && t > 6.0f ? 6.0f : t;
}

// gradient * slope, given what went in.
__device__ __forceinline__ float through(int kind, float gradient, float t) {
  if (kind == kNone) return gradient;
  if (kind == kHardswish) {
    if (t < -3.0f) return 0.0f;
    return t > 3.0f ? gradient : gradient * (t * (1.0f / 3.0f) + 0.5f);
  }
  return t <= 0.0f || (kind == kRelu6 && t >= 6.0f) ? 0.0f : gradient;
}

}  // namespace
}  // namespace pynas
