// The last kernels of the backward pass: what the first convolutions and x get.
#pragma once

#include "mbconv_backward.h"

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
// times x less its mean. layer.correction: the matrix [in_channels, in_channels], transposed, and
// the constant. A thread for each pair of channels.
__global__ void __launch_bounds__(kThreads) input_correction(const __grid_constant__ Layer layer) {
  const int64_t channels = layer.in_channels;
  const int64_t pair = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (pair >= channels * channels) return;
  const int c = static_cast<int>(pair % channels), d = static_cast<int>(pair / channels);
  const auto sums = array<const float>(layer.sums, 4 * static_cast<int64_t>(layer.hidden));
  double matrix = 0.0, constant = 0.0;
  for (int o = 0; o < layer.options; ++o) {
    const Option& option = layer.option[o];
    const int each = layer.in_channels / option.groups, hidden = option.hidden / option.groups;
    const int group = c / each;
    if (!option.trained || (d / each != group && d != 0)) continue;
    const auto w = array(option.expand, static_cast<int64_t>(option.hidden) * each);
    for (int i = group * hidden; i < (group + 1) * hidden; ++i) {
      const Norm norm = first_norm(layer, option, i);
      const int64_t all = option.hidden_before + i;
      const double scaled =
          static_cast<double>(w[static_cast<int64_t>(i) * each + c % each]) * norm.scale;
      const double slope = static_cast<double>(sums[3 * layer.hidden + all]) * norm.inverse;
      if (d / each == group)
        matrix += scaled * slope * w[static_cast<int64_t>(i) * each + d % each];
      if (d == 0) constant += scaled * sums[2 * layer.hidden + all];
    }
  }
  const auto out = array(layer.correction, channels * channels + channels);
  out[pair] = static_cast<float>(matrix);
  if (d == 0) out[channels * channels + c] = static_cast<float>(constant);
}

// The gradient of x. Grid: (blocks of positions, chunks of input channels).
__global__ void __launch_bounds__(kThreads) input_gradient(const __grid_constant__ Layer layer) {
  const int lane = lane_of_thread(), warp = warp_of_thread();
  const auto a = shared_array<float>(0, kPositions * kPitch);
  const auto b = shared_array<float>(kPositions * kPitch, kChunk * kPitch);
  const int channels = layer.in_channels, first = static_cast<int>(blockIdx.y) * kChunk;
  const int channel = first + lane;
  const bool real = channel < channels;
  const int64_t positions = in_positions(layer);
  const int64_t start = static_cast<int64_t>(blockIdx.x) * kPositions;
  const int row = static_cast<int>(threadIdx.x) / 8 * 4;
  const int column = static_cast<int>(threadIdx.x) % 8 * 4;
  Quad sum;
  for (int o = 0; o < layer.options; ++o) {
    const Option& option = layer.option[o];
    if (!option.trained) continue;
    const int each = channels / option.groups, hidden = option.hidden / option.groups;
    const auto g = hidden_part<const float>(layer, layer.expand_gradient, option, positions);
    const auto w = array(option.expand, static_cast<int64_t>(option.hidden) * each);
    const int last = (first + kChunk < channels ? first + kChunk : channels) - 1;
    const int end = (last / each + 1) * hidden;
    for (int k = first / each * hidden; k < end; k += kChunk) {
      __syncthreads();
      for (int r = warp; r < kPositions; r += kWarps) {
        const bool inside = k + lane < end && start + r < positions;
        a[r * kPitch + lane] = inside ? g[(start + r) * option.hidden + k + lane] : 0.0f;
      }
      for (int r = warp; r < kChunk; r += kWarps) {
        const int i = k + r;
        float value = 0.0f;
        if (real && i < end && i / hidden == channel / each) {
          value = w[static_cast<int64_t>(i) * each + channel % each] *
                  first_norm(layer, option, i).scale;
        }
        b[r * kPitch + lane] = value;
      }
      __syncthreads();
      multiply(sum, a, row, b, column, kChunk);
    }
  }
  const auto x = array(layer.x, positions * channels);
  const auto mean = array<const float>(layer.mean, channels);
  const auto correction =
      array<const float>(layer.correction, static_cast<int64_t>(channels) * channels + channels);
  for (int k = 0; k < channels; k += kChunk) {
    __syncthreads();
    for (int r = warp; r < kPositions; r += kWarps) {
      const bool inside = k + lane < channels && start + r < positions;
      a[r * kPitch + lane] = inside ? x[(start + r) * channels + k + lane] - mean[k + lane] : 0.0f;
    }
    for (int r = warp; r < kChunk; r += kWarps) {
      const bool inside = real && k + r < channels;
      b[r * kPitch + lane] =
          inside ? -correction[static_cast<int64_t>(k + r) * channels + channel] : 0.0f;
    }
    __syncthreads();
    multiply(sum, a, row, b, column, kChunk);
  }
  __syncthreads();
  sum.store(a, row, column);
  __syncthreads();
  if (!real) return;
  const bool joins = has_residual(layer) || layer.identity >= 0;
  const auto out = array(layer.x_gradient, positions * channels);
  const auto g = array(layer.y_gradient, out_positions(layer) * layer.out_channels);
  const int64_t each = static_cast<int64_t>(layer.height) * layer.width;
  const float constant = correction[static_cast<int64_t>(channels) * channels + channel];
  for (int r = warp; r < kPositions && start + r < positions; r += kWarps) {
    const int64_t at = (start + r) * channels + channel;
    const float direct = joins ? share_of_x(layer, (start + r) / each) * g[at] : 0.0f;
    out[at] = a[r * kPitch + lane] - constant + direct;
  }
}

}  // namespace
}  // namespace pynas
