// The last kernels of the backward pass: what the first convolutions and x get.
#pragma once

#include "mbconv_depthwise.h"

namespace pynas {
namespace {

// Sums of layer.expand_gradient times x less its mean, to weight_partial [slices][weights].
// Grid: (slices of positions, chunks of hidden channels by input group, chunks of input channels of
// a group).
__global__ void __launch_bounds__(kThreads) expand_weights(const __grid_constant__ Layer layer) {
  const Chunk chunk = chunk_at(layer, Channels::kHidden, {true}, static_cast<int>(blockIdx.y));
  if (chunk.option < 0) return;
  const Option& option = layer.option[chunk.option];
  const int each = layer.in_channels / option.groups;
  const int first = static_cast<int>(blockIdx.z) * kChunk;
  if (first >= each) return;
  const int i = chunk.group * (option.hidden / option.groups) + chunk.first;
  const int64_t positions = in_positions(layer), size = Weights(layer).expand;
  const auto g = hidden_part<const float>(layer, layer.expand_gradient, option, positions);
  const auto x = array(layer.x, positions * layer.in_channels);
  const int lane = lane_of_thread(), channel = chunk.group * each + first + lane;
  const bool real = first + lane < each;
  const float mean = real ? array<const float>(layer.mean, layer.in_channels)[channel] : 0.0f;
  const auto out =
      array(layer.weight_partial, size * layer.slices) + (size * blockIdx.x + option.expand_before);
  outer_product(
      share(positions, blockIdx.x, layer.slices), share(positions, blockIdx.x + 1, layer.slices),
      shared_array<float>(0, kOuterScratch),
      [&](int64_t p, int m) { return m < chunk.count ? g[p * option.hidden + i + m] : 0.0f; },
      [&](int64_t p, int) { return real ? x[p * layer.in_channels + channel] - mean : 0.0f; },
      [&](int m, int n, float sum) {
        if (m < chunk.count && first + n < each) {
          out[static_cast<int64_t>(i + m) * each + first + n] = sum;
        }
      });
}

// Gradients of the first convolutions and their norms, and the second half of layer.sums. A warp
// for each hidden channel.
__global__ void __launch_bounds__(kThreads) finish_first(const __grid_constant__ Layer layer) {
  const int lane = lane_of_thread(), warp = warp_of_thread();
  const int64_t all = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  if (all >= layer.hidden) return;
  const Option& option = layer.option[option_of_hidden(layer, all)];
  if (!option.trained) return;
  const int i = static_cast<int>(all - option.hidden_before), channels = layer.in_channels;
  const int each = channels / option.groups, before = i / (option.hidden / option.groups) * each;
  const Weights sizes(layer);
  const int64_t pitch = layer.hidden + sizes.taps;
  const int64_t weight = option.expand_before + static_cast<int64_t>(i) * each;
  const int64_t count = static_cast<int64_t>(option.hidden) * each;
  const auto w = array(option.expand, count) + static_cast<int64_t>(i) * each;
  const auto partial =
      array<const float>(layer.weight_partial, sizes.expand * layer.slices) + weight;
  const double sum = add_rows(array<const float>(layer.partial, pitch * layer.rows) + all,
                              layer.rows, pitch, lane);
  const Norm norm = first_norm(layer, option, i);
  double product = 0.0;
  for (int c = lane; c < each; c += kWarp) {
    double total = 0.0;
    for (int64_t slice = 0; slice < layer.slices; ++slice)
      total += partial[slice * sizes.expand + c];
    product += total * w[c];
  }
  product = norm.inverse * warp_sum(product);
  const double positions = static_cast<double>(in_positions(layer));
  if (lane == 0) {
    const auto sums = array(layer.sums, 4 * static_cast<int64_t>(layer.hidden));
    sums[2 * layer.hidden + all] = static_cast<float>(sum / positions);
    sums[3 * layer.hidden + all] = static_cast<float>(product / positions);
    if (option.scale1_out != nullptr) {
      array(option.scale1_out, option.hidden)[i] = static_cast<float>(product);
      array(option.shift1_out, option.hidden)[i] = static_cast<float>(sum);
    }
  }
  if (option.expand_out == nullptr) return;
  const auto covariance =
      array<const float>(layer.covariance, static_cast<int64_t>(channels) * channels);
  const auto out = array(option.expand_out, count) + static_cast<int64_t>(i) * each;
  for (int c = lane; c < each; c += kWarp) {
    double total = 0.0, row = 0.0;
    for (int64_t slice = 0; slice < layer.slices; ++slice)
      total += partial[slice * sizes.expand + c];
    for (int d = 0; d < each; ++d) {
      row += static_cast<double>(w[d]) *
             covariance[static_cast<int64_t>(before + d) * channels + before + c];
    }
    out[c] = static_cast<float>(norm.scale * (total - product * norm.inverse * row));
  }
}

// What the first norms' sums take from the gradient of x: it is W' g minus a constant and a matrix
// times x less its mean. One option's matrix, transposed, to entry 1 + option of layer.correction.
// Grid: (pairs of chunks of input channels, options).
__global__ void __launch_bounds__(kThreads) input_correction(const __grid_constant__ Layer layer) {
  const Option& option = layer.option[blockIdx.y];
  const int channels = layer.in_channels, tiles = (channels + kChunk - 1) / kChunk;
  const int rows = static_cast<int>(blockIdx.x) / tiles * kChunk;
  const int columns = static_cast<int>(blockIdx.x) % tiles * kChunk;
  const int each = channels / option.groups, hidden = option.hidden / option.groups;
  const int d = rows + lane_of_thread(), c = columns + lane_of_thread();
  const auto w = array(option.expand, static_cast<int64_t>(option.hidden) * each);
  const auto folded = folded_weights(layer);
  const auto sums = array<const float>(layer.sums, 4 * static_cast<int64_t>(layer.hidden));
  const int64_t size = static_cast<int64_t>(channels) * channels;
  const auto out = array(layer.correction, size * (layer.options + 1) + channels) +
                   size * (1 + static_cast<int64_t>(blockIdx.y));
  outer_product(
      0, option.trained ? option.hidden : 0, shared_array<float>(0, kOuterScratch),
      [&](int64_t i, int) {
        if (d >= channels || i / hidden != d / each) return 0.0f;
        const int64_t all = option.hidden_before + i;
        const float slope = sums[3 * static_cast<int64_t>(layer.hidden) + all] *
                            first_norm(layer, option, static_cast<int>(i)).inverse;
        return w[i * each + d % each] * slope;
      },
      [&](int64_t i, int) {
        if (c >= channels || i / hidden != c / each) return 0.0f;
        return folded[static_cast<int64_t>(c % each) * layer.hidden + option.hidden_before + i];
      },
      [&](int m, int n, float sum) {
        if (rows + m < channels && columns + n < channels) {
          out[static_cast<int64_t>(rows + m) * channels + columns + n] = sum;
        }
      });
}

// Sums of all options' matrices, by a thread each, and behind them the constants, by a warp each.
__global__ void __launch_bounds__(kThreads) finish_correction(const __grid_constant__ Layer layer) {
  const int64_t channels = layer.in_channels, size = channels * channels;
  const int64_t matrices = ceil_div(size, kThreads);
  const auto all = array(layer.correction, size * (layer.options + 1) + channels);
  if (blockIdx.x < matrices) {
    const int64_t pair = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (pair >= size) return;
    float total = 0.0f;
    for (int64_t o = 0; o < layer.options; ++o) {
      if (layer.option[o].trained) total += all[size * (1 + o) + pair];
    }
    all[pair] = total;
    return;
  }
  const int64_t c = (blockIdx.x - matrices) * kWarps + warp_of_thread();
  if (c >= channels) return;
  const auto folded = folded_weights(layer);
  const auto sums = array<const float>(layer.sums, 4 * static_cast<int64_t>(layer.hidden));
  double total = 0.0;
  for (int o = 0; o < layer.options; ++o) {
    const Option& option = layer.option[o];
    if (!option.trained) continue;
    const int64_t each = channels / option.groups, hidden = option.hidden / option.groups;
    for (int64_t i = lane_of_thread(); i < hidden; i += kWarp) {
      const int64_t h = option.hidden_before + c / each * hidden + i;
      total += static_cast<double>(folded[c % each * layer.hidden + h]) *
               sums[2 * static_cast<int64_t>(layer.hidden) + h];
    }
  }
  total = warp_sum(total);
  if (lane_of_thread() == 0) all[size * (layer.options + 1) + c] = static_cast<float>(total);
}

// Hidden channels of an option that input channels [first, last] have a part in.
__device__ __forceinline__ int first_hidden(const Layer& layer, const Option& option, int first) {
  return first / (layer.in_channels / option.groups) * (option.hidden / option.groups);
}

__device__ __forceinline__ int end_hidden(const Layer& layer, const Option& option, int last) {
  return (last / (layer.in_channels / option.groups) + 1) * (option.hidden / option.groups);
}

// A share of the products that make the gradient of x, to layer.input_partial [splits].
// Grid: (blocks of positions, chunks of input channels, splits).
__global__ void __launch_bounds__(kThreads) input_products(const __grid_constant__ Layer layer) {
  const int lane = lane_of_thread(), warp = warp_of_thread();
  const auto scratch = shared_array<float>(0, kProductFloats);
  const int channels = layer.in_channels, first = static_cast<int>(blockIdx.y) * kChunk;
  const int channel = first + lane, split = static_cast<int>(blockIdx.z);
  const int last = (first + kChunk < channels ? first + kChunk : channels) - 1;
  const bool real = channel < channels;
  const int64_t positions = in_positions(layer);
  const int64_t start = static_cast<int64_t>(blockIdx.x) * kPositions;
  const auto folded = folded_weights(layer);
  Quad sum;
  int before = 0;  // steps of all options so far
  for (int o = 0; o < layer.options; ++o) {
    const Option& option = layer.option[o];
    if (!option.trained) continue;
    const int each = channels / option.groups, hidden = option.hidden / option.groups;
    const auto g = hidden_part<const float>(layer, layer.expand_gradient, option, positions);
    const int low = first_hidden(layer, option, first), end = end_hidden(layer, option, last);
    const int steps = (end - low + kChunk - 1) / kChunk;
    const int skip = (layer.splits - before % layer.splits + split) % layer.splits;
    before += steps;
    const int own = steps > skip ? (steps - skip + layer.splits - 1) / layer.splits : 0;
    tile_product<true>(
        sum, own, scratch,
        [&](int step, int r) {
          const int h = low + (skip + step * layer.splits) * kChunk + lane;
          if (h >= end || start + r >= positions) return 0.0f;
          return g[(start + r) * option.hidden + h];
        },
        [&](int step, int n) {
          const int h = low + (skip + step * layer.splits) * kChunk + lane, c = first + n;
          if (h >= end || c > last || h / hidden != c / each) return 0.0f;
          return folded[static_cast<int64_t>(c % each) * layer.hidden + option.hidden_before + h];
        });
  }
  if (split == 0) {
    const auto x = array(layer.x, positions * channels);
    const auto mean = array<const float>(layer.mean, channels);
    const auto correction =
        array<const float>(layer.correction, static_cast<int64_t>(channels) * channels);
    tile_product<false>(
        sum, (channels + kChunk - 1) / kChunk, scratch,
        [&](int step, int r) {
          const int k = step * kChunk + lane;
          if (k >= channels || start + r >= positions) return 0.0f;
          return mean[k] - x[(start + r) * channels + k];
        },
        [&](int step, int r) {
          const int k = step * kChunk + r;
          if (!real || k >= channels) return 0.0f;
          return correction[static_cast<int64_t>(k) * channels + channel];
        });
  }
  spread(sum, scratch);
  if (!real) return;
  const auto out = array(layer.input_partial, positions * channels * layer.splits) +
                   positions * channels * split;
  for (int r = warp; r < kPositions && start + r < positions; r += kWarps) {
    out[(start + r) * channels + channel] = scratch[r * kPitch + lane];
  }
}

// The gradient of x: all shares, and what comes to x without a block. A thread for each element.
__global__ void __launch_bounds__(kThreads) input_gradient(const __grid_constant__ Layer layer) {
  const int64_t channels = layer.in_channels, count = in_positions(layer) * channels;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= count) return;
  const auto partial = array<const float>(layer.input_partial, count * layer.splits);
  const int64_t size = channels * channels * (layer.options + 1);
  float total = -array<const float>(layer.correction, size + channels)[size + at % channels];
  for (int64_t split = 0; split < layer.splits; ++split) total += partial[split * count + at];
  if (has_residual(layer) || layer.identity >= 0) {
    const int64_t each = static_cast<int64_t>(layer.height) * layer.width * channels;
    total += share_of_x(layer, at / each, {true}) * array(layer.y_gradient, count)[at];
  }
  array(layer.x_gradient, count)[at] = total;
}

}  // namespace
}  // namespace pynas
