// Kernels of the forward pass, in the order in which they run.
#pragma once

#include "mbconv_norms.h"

namespace pynas {
namespace {

// A chunk's weights of the first convolution, with its norm folded in: w [channels rounded up to
// four, kChunk] and bias [kChunk]. Threads must meet before they read them.
__device__ inline void load_expand(const Layer& layer, const Option& option, const Chunk& chunk,
                                   int each, Array<float> w, Array<float> bias) {
  const int lane = lane_of_thread(), warp = warp_of_thread();
  const bool real = lane < chunk.count;
  const int i = chunk.group * (option.hidden / option.groups) + chunk.first + lane;
  const auto folded = folded_weights(layer);
  for (int c = warp; c < (each + 3) / 4 * 4; c += kWarps) {
    const int64_t at = static_cast<int64_t>(c) * layer.hidden + option.hidden_before + i;
    w[c * kChunk + lane] = real && c < each ? folded[at] : 0.0f;
  }
  if (warp == 0) bias[lane] = real ? first_norm(layer, option, i).shift : 0.0f;
}

template <int K>
__device__ inline void load_taps(const Option& option, const Chunk& chunk, Array<float> taps) {
  const int lane = lane_of_thread(), warp = warp_of_thread();
  const auto weights = array(option.depthwise, static_cast<int64_t>(option.hidden) * K * K);
  const int i = chunk.group * (option.hidden / option.groups) + chunk.first + lane;
  for (int tap = warp; tap < K * K; tap += kWarps) {
    taps[tap * kChunk + lane] =
        lane < chunk.count ? weights[static_cast<int64_t>(shuffled(option, i)) * K * K + tap]
                           : 0.0f;
  }
}

template <int K, int S>
constexpr int64_t expand_depthwise_floats(int channels) {
  return expand_floats(channels) + (1 + K * K + kTileSide<K, S> * kTileSide<K, S>)*kChunk;
}

// First and depthwise convolution: layer.depthwise, and the moments of each channel to partial
// [rows][3][hidden] where `moments`. Grid: (rows, chunks of hidden channels by input group).
template <int K, int S>
__global__ void __launch_bounds__(kThreads)
    expand_depthwise(const __grid_constant__ Layer layer, bool trained, bool moments) {
  const int lane = lane_of_thread(), warp = warp_of_thread();
  const Chunk chunk =
      chunk_at(layer, Channels::kHidden, {trained, K}, static_cast<int>(blockIdx.y));
  if (chunk.option < 0) return;
  const Option& option = layer.option[chunk.option];
  constexpr int kIn = kTileSide<K, S>;
  const int each = layer.in_channels / option.groups;
  const auto w = shared_array<float>(0, expand_floats(each));
  const auto bias = shared_array<float>(expand_floats(each), kChunk);
  const auto taps = shared_array<float>(expand_floats(each) + kChunk, K * K * kChunk);
  const auto h =
      shared_array<float>(expand_floats(each) + (1 + K * K) * kChunk, kIn * kIn * kChunk);
  load_expand(layer, option, chunk, each, w, bias);
  load_taps<K>(option, chunk, taps);
  const auto x = array(layer.x, in_positions(layer) * layer.in_channels);
  const auto out = hidden_part(layer, layer.depthwise, option, out_positions(layer));
  const int across = (layer.out_width + kSide - 1) / kSide;
  const int down = (layer.out_height + kSide - 1) / kSide;
  const int i = chunk.group * (option.hidden / option.groups) + chunk.first + lane;
  const int kind = layer.activation;
  Moments own;
  for (int64_t tile = blockIdx.x; tile < static_cast<int64_t>(layer.images) * across * down;
       tile += gridDim.x) {
    const Place place(tile, across, down);
    __syncthreads();  // the last tile has been read, and in the first round weights are there
    expand_tile(layer, x, chunk.group * each, each, place.image, place.y * S - K / 2,
                place.x * S - K / 2, kIn, w, h,
                [&](float value, int column) { return activate(kind, value + bias[column]); });
    __syncthreads();
    for (int row = warp; row < kSide; row += kWarps) {
      if (place.y + row >= layer.out_height || lane >= chunk.count) continue;
      float found[kSide];
      depthwise_row<K, S>(h, taps, lane, row, found);
      const int64_t at =
          (place.image * layer.out_height + place.y + row) * layer.out_width + place.x;
#pragma unroll
      for (int column = 0; column < kSide; ++column) {
        if (place.x + column >= layer.out_width) continue;
        out[(at + column) * option.hidden + i] = found[column];
        own.add(found[column]);
      }
    }
  }
  if (moments) {
    write_moments(own, h, lane, warp, lane < chunk.count,
                  array(layer.partial, static_cast<int64_t>(gridDim.x) * 3 * layer.hidden),
                  blockIdx.x, layer.hidden, option.hidden_before + i);
  }
}

// Second norm, activation and last convolution: layer.products, and the moments of each channel to
// partial [rows][3][options * out_channels]. Grid: (rows, chunks of output channels).
__global__ void __launch_bounds__(kThreads) project(const __grid_constant__ Layer layer) {
  const int lane = lane_of_thread(), warp = warp_of_thread();
  const Chunk chunk = chunk_at(layer, Channels::kOut, {}, static_cast<int>(blockIdx.y));
  if (chunk.option < 0) return;
  const Option& option = layer.option[chunk.option];
  const int each = option.hidden / option.groups, outs = layer.out_channels / option.groups;
  const auto scratch = shared_array<float>(0, kProductFloats);
  const int64_t positions = out_positions(layer);
  const auto hidden = hidden_part<const float>(layer, layer.depthwise, option, positions);
  const auto weights = array(option.project, static_cast<int64_t>(layer.out_channels) * each);
  const auto out = output_part(layer, layer.products, chunk.option);
  const int first_out = chunk.group * outs + chunk.first;
  Moments own;
  for (int64_t start = static_cast<int64_t>(blockIdx.x) * kPositions; start < positions;
       start += static_cast<int64_t>(gridDim.x) * kPositions) {
    Quad sum;
    tile_product<true>(
        sum, (each + kChunk - 1) / kChunk, scratch,
        [&](int step, int r) {
          const int k = step * kChunk + lane;
          if (k >= each || start + r >= positions) return 0.0f;
          const int i = unshuffled(option, chunk.group * each + k);
          const Norm norm = second_norm(layer, option, i);
          const float value = hidden[(start + r) * option.hidden + i];
          return activate(layer.activation, fmaf(value, norm.scale, norm.shift));
        },
        [&](int step, int o) {
          const int k = step * kChunk + lane;
          if (k >= each || o >= chunk.count) return 0.0f;
          return weights[static_cast<int64_t>(first_out + o) * each + k];
        });
    spread(sum, scratch);
    for (int r = warp; r < kPositions && lane < chunk.count; r += kWarps) {
      if (start + r >= positions) break;
      const float value = scratch[r * kPitch + lane];
      out[(start + r) * layer.out_channels + first_out + lane] = value;
      own.add(value);
    }
  }
  const int64_t channels = static_cast<int64_t>(layer.options) * layer.out_channels;
  write_moments(own, scratch, lane, warp, lane < chunk.count,
                array(layer.partial, static_cast<int64_t>(gridDim.x) * 3 * channels), blockIdx.x,
                channels,
                static_cast<int64_t>(chunk.option) * layer.out_channels + first_out + lane);
}

__host__ __device__ __forceinline__ bool has_residual(const Layer& layer) {
  return layer.stride == 1 && layer.in_channels == layer.out_channels;
}

// What x is multiplied with in the output of an image, by options that are on a list.
__device__ __forceinline__ float share_of_x(const Layer& layer, int64_t image, Which which) {
  float total = layer.identity >= 0 ? gate_of(layer, image, layer.identity) : 0.0f;
  for (int o = 0; o < layer.options && has_residual(layer); ++o) {
    if (which.has(layer.option[o])) total += gate_of(layer, image, layer.option[o].gate);
  }
  return total;
}

// Third norms, gates and sum: layer.y. A warp's lanes take neighbouring channels; each thread walks
// over positions. Grid: (blocks of positions, chunks of 32 output channels).
__global__ void __launch_bounds__(kThreads) combine(const __grid_constant__ Layer layer) {
  const int lane = lane_of_thread(), warp = warp_of_thread();
  const int channel = static_cast<int>(blockIdx.y) * kChunk + lane;
  if (channel >= layer.out_channels) return;
  const int64_t positions = out_positions(layer);
  const int64_t each = static_cast<int64_t>(layer.out_height) * layer.out_width;
  const auto y = array(layer.y, positions * layer.out_channels);
  const auto x = array(layer.x, in_positions(layer) * layer.in_channels);
  const auto z = array<const float>(layer.products, positions * layer.out_channels * layer.options);
  const bool joins = has_residual(layer) || layer.identity >= 0;
  float scale[kMostOptions], shift[kMostOptions];
  for (int o = 0; o < kMostOptions; ++o) {
    if (o >= layer.options) break;
    const Norm norm = third_norm(layer, o, channel);
    scale[o] = norm.scale;
    shift[o] = norm.shift;
  }
  for (int64_t p = static_cast<int64_t>(blockIdx.x) * kWarps + warp; p < positions;
       p += static_cast<int64_t>(gridDim.x) * kWarps) {
    const int64_t image = p / each, at = p * layer.out_channels + channel;
    float total = joins ? share_of_x(layer, image, {}) * x[at] : 0.0f;
#pragma unroll
    for (int o = 0; o < kMostOptions; ++o) {
      if (o >= layer.options) break;
      const float value = fmaf(z[positions * layer.out_channels * o + at], scale[o], shift[o]);
      total = fmaf(gate_of(layer, image, layer.option[o].gate), value, total);
    }
    y[at] = total;
  }
}

}  // namespace
}  // namespace pynas
