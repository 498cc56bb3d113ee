// The backward pass of depthwise convolutions, of what is before them as well.
#pragma once

#include "mbconv_backward.h"

namespace pynas {
namespace {

// How many output rows a tile of kSide input rows reaches, and from which row before its own.
template <int K, int S>
constexpr int kBefore = K / 2 / S;
template <int K, int S>
constexpr int kReached = (kSide - 1 + K / 2) / S + kBefore<K, S> + 1;

// One row of a tile of input positions of one channel: the gradient of the depthwise convolution's
// input, and the share of the row in that of its weights. g: [kReached^2, kChunk], u: [kSide^2,
// kChunk].
template <int K, int S>
__device__ __forceinline__ void depthwise_gradient_row(Array<const float> g,
                                                       Array<const float> taps,
                                                       const float (&h)[kSide], int lane, int row,
                                                       float (&out)[kSide],
                                                       float (&weights)[K * K]) {
  constexpr int kWide = kReached<K, S>;
#pragma unroll
  for (int i = 0; i < kSide; ++i) out[i] = 0.0f;
#pragma unroll
  for (int ky = 0; ky < K; ++ky) {
    const int numerator = row + K / 2 - ky;  // of the output row, from the tile's first
    if (S == 2 && (numerator & 1) != 0) continue;
    const int reached = (numerator + S * kBefore<K, S>) / S;
#pragma unroll
    for (int i = 0; i < kWide; ++i) {
      const float value = g[(reached * kWide + i) * kChunk + lane];
#pragma unroll
      for (int kx = 0; kx < K; ++kx) {
        const int column = (i - kBefore<K, S>)*S - K / 2 + kx;  // of the input
        if (column < 0 || column >= kSide) continue;
        out[column] = fmaf(value, taps[(ky * K + kx) * kChunk + lane], out[column]);
        weights[ky * K + kx] = fmaf(value, h[column], weights[ky * K + kx]);
      }
    }
  }
}

template <int K, int S>
constexpr int64_t depthwise_gradient_floats(int channels) {
  return expand_floats(channels) +
         (1 + K * K + kReached<K, S> * kReached<K, S> + kSide * kSide) * kChunk;
}

// The gradient behind the first norm's scale and shift: layer.expand_gradient. Its sums, and the
// gradient of the depthwise weights, to partial [rows][hidden + taps].
// Grid: (rows, chunks of hidden channels by input group).
template <int K, int S>
__global__ void __launch_bounds__(kThreads)
    depthwise_gradient(const __grid_constant__ Layer layer) {
  const int lane = lane_of_thread(), warp = warp_of_thread();
  const Chunk chunk = chunk_at(layer, Channels::kHidden, {true, K}, static_cast<int>(blockIdx.y));
  if (chunk.option < 0) return;
  const Option& option = layer.option[chunk.option];
  constexpr int kWide = kReached<K, S>;
  const int each = layer.in_channels / option.groups;
  int64_t at = expand_floats(each);
  const auto w = shared_array<float>(0, at);
  const auto bias = shared_array<float>(at, kChunk);
  const auto taps = shared_array<float>(at += kChunk, K * K * kChunk);
  const auto g = shared_array<float>(at += K * K * kChunk, kWide * kWide * kChunk);
  const auto u = shared_array<float>(at += kWide * kWide * kChunk, kSide * kSide * kChunk);
  load_expand(layer, option, chunk, each, w, bias);
  load_taps<K>(option, chunk, taps);
  const int64_t positions = in_positions(layer), reached = out_positions(layer);
  const auto x = array(layer.x, positions * layer.in_channels);
  const auto v = hidden_part<const float>(layer, layer.depthwise, option, reached);
  const auto hidden_gradient =
      hidden_part<const float>(layer, layer.hidden_gradient, option, reached);
  const auto out = hidden_part(layer, layer.expand_gradient, option, positions);
  const auto sums = array<const float>(layer.sums, 4 * static_cast<int64_t>(layer.hidden));
  const bool real = lane < chunk.count;
  const int i = chunk.group * (option.hidden / option.groups) + chunk.first + (real ? lane : 0);
  const Norm norm = second_norm(layer, option, i);
  const float mean = sums[option.hidden_before + i];
  const float slope = sums[layer.hidden + option.hidden_before + i];
  const int across = (layer.width + kSide - 1) / kSide, down = (layer.height + kSide - 1) / kSide;
  float total = 0.0f, weights[K * K];
#pragma unroll
  for (int tap = 0; tap < K * K; ++tap) weights[tap] = 0.0f;
  for (int64_t tile = blockIdx.x; tile < static_cast<int64_t>(layer.images) * across * down;
       tile += gridDim.x) {
    const Place place(tile, across, down);
    __syncthreads();
    for (int k = warp; k < kWide * kWide; k += kWarps) {
      const int oy = place.y / S - kBefore<K, S> + k / kWide;
      const int ox = place.x / S - kBefore<K, S> + k % kWide;
      float value = 0.0f;
      if (real && oy >= 0 && oy < layer.out_height && ox >= 0 && ox < layer.out_width) {
        const int64_t p =
            ((place.image * layer.out_height + oy) * layer.out_width + ox) * option.hidden + i;
        const float normed = (v[p] - norm.mean) * norm.inverse;
        value = norm.scale * (hidden_gradient[p] - mean - normed * slope);
      }
      g[k * kChunk + lane] = value;
    }
    expand_tile(layer, x, chunk.group * each, each, place.image, place.y, place.x, kSide, w, u,
                [&](float value, int column) { return value + bias[column]; });
    __syncthreads();
    for (int row = warp; row < kSide; row += kWarps) {
      if (place.y + row >= layer.height || !real) continue;
      float before[kSide], h[kSide], gradient[kSide];
#pragma unroll
      for (int c = 0; c < kSide; ++c) {
        const bool inside = place.x + c < layer.width;
        before[c] = u[(row * kSide + c) * kChunk + lane];
        h[c] = inside ? activate(layer.activation, before[c]) : 0.0f;
      }
      depthwise_gradient_row<K, S>(g, taps, h, lane, row, gradient, weights);
      const int64_t p = (place.image * layer.height + place.y + row) * layer.width + place.x;
#pragma unroll
      for (int c = 0; c < kSide; ++c) {
        if (place.x + c >= layer.width) continue;
        const float value = through(layer.activation, gradient[c], before[c]);
        out[(p + c) * option.hidden + i] = value;
        total += value;
      }
    }
  }
  const int64_t pitch = layer.hidden + Weights(layer).taps;
  const auto partial = array(layer.partial, pitch * gridDim.x) + pitch * blockIdx.x;
  const float sum = sum_over_warps(total, u, lane, warp);
  if (warp == 0 && real) partial[option.hidden_before + i] = sum;
  const int64_t tap_at =
      layer.hidden + option.taps_before + static_cast<int64_t>(shuffled(option, i)) * K * K;
#pragma unroll
  for (int tap = 0; tap < K * K; ++tap) {
    const float share_of_tap = sum_over_warps(weights[tap], u, lane, warp);
    if (warp == 0 && real) partial[tap_at + tap] = share_of_tap;
  }
}

// Sums of the depthwise convolutions' weights. A thread for each.
__global__ void __launch_bounds__(kThreads) finish_depthwise(const __grid_constant__ Layer layer) {
  const int64_t size = Weights(layer).taps, pitch = layer.hidden + size;
  const int64_t tap = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (tap >= size) return;
  int found = 0;
  for (int o = 1; o < layer.options; ++o) found = tap >= layer.option[o].taps_before ? o : found;
  const Option& option = layer.option[found];
  if (!option.trained || option.depthwise_out == nullptr) return;
  const auto partial = array<const float>(layer.partial, pitch * layer.rows);
  float total = 0.0f;
  for (int64_t row = 0; row < layer.rows; ++row) total += partial[row * pitch + layer.hidden + tap];
  const int64_t count = static_cast<int64_t>(option.hidden) * option.kernel * option.kernel;
  array(option.depthwise_out, count)[tap - option.taps_before] = total;
}

}  // namespace
}  // namespace pynas
