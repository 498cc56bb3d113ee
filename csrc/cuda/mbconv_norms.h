// Statistics of batch norms: where they come from, and what is kept of them.
#pragma once

#include "tile.h"

namespace pynas {
namespace {

// Mean of 32 input channels over a range of positions; lane's channel. All threads come.
__device__ inline float range_mean(Array<const float> x, int channels, int channel, int64_t first,
                                   int64_t end, Array<float> scratch) {
  const int lane = lane_of_thread(), warp = warp_of_thread();
  float own = 0.0f;
  for (int64_t p = first + warp; p < end && channel < channels; p += kWarps) {
    own += x[p * channels + channel];
  }
  const float total = sum_over_warps(own, scratch, lane, warp);
  if (warp == 0) scratch[lane] = end > first ? total / static_cast<float>(end - first) : 0.0f;
  __syncthreads();
  const float mean = scratch[lane];
  __syncthreads();
  return mean;
}

// Number, means and centred products of a chunk of positions, for 32 x 32 pairs of channels.
// Grid: (pairs of channel chunks, chunks of positions). Shared: kOuterScratch.
__global__ void __launch_bounds__(kThreads) input_moments(const __grid_constant__ Layer layer) {
  const int lane = lane_of_thread(), warp = warp_of_thread();
  const int channels = layer.in_channels, tiles = (channels + kChunk - 1) / kChunk;
  const int rows = static_cast<int>(blockIdx.x) / tiles * kChunk;
  const int columns = static_cast<int>(blockIdx.x) % tiles * kChunk;
  const int64_t positions = in_positions(layer), size = 1 + channels + channels * channels;
  const int64_t first = share(positions, blockIdx.y, layer.chunks);
  const int64_t end = share(positions, blockIdx.y + 1, layer.chunks);
  const auto x = array(layer.x, positions * channels);
  const auto scratch = shared_array<float>(0, kOuterScratch);
  const auto out = array(layer.moments, size * layer.chunks) + size * blockIdx.y;
  const float row_mean = range_mean(x, channels, rows + lane, first, end, scratch);
  const float column_mean = range_mean(x, channels, columns + lane, first, end, scratch);
  if (columns == 0 && warp == 0 && rows + lane < channels) out[1 + rows + lane] = row_mean;
  if (blockIdx.x == 0 && threadIdx.x == 0) out[0] = static_cast<float>(end - first);
  outer_product(
      first, end, scratch,
      [&](int64_t p, int c) {
        return rows + c < channels ? x[p * channels + rows + c] - row_mean : 0.0f;
      },
      [&](int64_t p, int c) {
        return columns + c < channels ? x[p * channels + columns + c] - column_mean : 0.0f;
      },
      [&](int m, int n, float sum) {
        if (rows + m < channels && columns + n < channels) {
          out[1 + channels + static_cast<int64_t>(rows + m) * channels + columns + n] = sum;
        }
      });
}

// Mean and covariance of the whole input. A thread for each pair of channels.
__global__ void __launch_bounds__(kThreads) finish_moments(const __grid_constant__ Layer layer) {
  const int64_t channels = layer.in_channels, size = 1 + channels + channels * channels;
  const int64_t pair = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (pair >= channels * channels) return;
  const int64_t i = pair / channels, j = pair % channels;
  const auto moments = array<const float>(layer.moments, size * layer.chunks);
  const double count = static_cast<double>(in_positions(layer));
  double mean_i = 0.0, mean_j = 0.0, products = 0.0;
  for (int64_t chunk = 0; chunk < layer.chunks; ++chunk) {
    const auto part = moments + size * chunk;
    mean_i += static_cast<double>(part[0]) * part[1 + i];
    mean_j += static_cast<double>(part[0]) * part[1 + j];
  }
  mean_i /= count;
  mean_j /= count;
  for (int64_t chunk = 0; chunk < layer.chunks; ++chunk) {
    const auto part = moments + size * chunk;
    const double apart = (part[1 + i] - mean_i) * (part[1 + j] - mean_j);
    products += part[1 + channels + pair] + part[0] * apart;
  }
  array(layer.covariance, channels * channels)[pair] = static_cast<float>(products / count);
  if (j == 0) array(layer.mean, channels)[i] = static_cast<float>(mean_i);
}

// The option that a channel of the hidden channels of all options belongs to.
__device__ __forceinline__ int option_of_hidden(const Layer& layer, int64_t channel) {
  int found = 0;
  for (int o = 1; o < layer.options; ++o)
    found = channel >= layer.option[o].hidden_before ? o : found;
  return found;
}

// An option's part of the statistics of all options, to be written.
__device__ __forceinline__ Array<float> statistics_part(const Layer& layer, int index) {
  const Option& option = layer.option[index];
  const int64_t before = 4 * static_cast<int64_t>(option.hidden_before) +
                         2 * static_cast<int64_t>(index) * layer.out_channels;
  const int64_t all = 4 * static_cast<int64_t>(layer.hidden) +
                      2 * static_cast<int64_t>(layer.options) * layer.out_channels;
  return array(layer.statistics, all) + before;
}

// Keeps the first norm of channel i, and its weights with the norm folded in, by a warp.
__device__ inline void keep_first(const Layer& layer, const Option& option, int i, float mean,
                                  float variance, int lane) {
  const int each = layer.in_channels / option.groups;
  const Norm norm = norm_of(mean, variance, array(option.scale1, option.hidden)[i],
                            array(option.shift1, option.hidden)[i], layer.eps);
  const auto w = array(option.expand, static_cast<int64_t>(option.hidden) * each);
  const auto folded = folded_weights(layer);
  for (int c = lane; c < each; c += kWarp) {
    folded[static_cast<int64_t>(c) * layer.hidden + option.hidden_before + i] =
        w[static_cast<int64_t>(i) * each + c] * norm.scale;
  }
  if (lane == 0) keep_norm(layer, option.hidden_before + i, norm);
}

// Keeps the second norm of channel i.
__device__ inline void keep_second(const Layer& layer, const Option& option, int i, float mean,
                                   float variance) {
  const int j = shuffled(option, i);
  keep_norm(layer, static_cast<int64_t>(layer.hidden) + option.hidden_before + i,
            norm_of(mean, variance, array(option.scale2, option.hidden)[j],
                    array(option.shift2, option.hidden)[j], layer.eps));
}

// Keeps the third norm of an output channel.
__device__ inline void keep_third(const Layer& layer, int index, int channel, float mean,
                                  float variance) {
  const Option& option = layer.option[index];
  keep_norm(layer,
            2 * static_cast<int64_t>(layer.hidden) +
                static_cast<int64_t>(index) * layer.out_channels + channel,
            norm_of(mean, variance, array(option.scale3, layer.out_channels)[channel],
                    array(option.shift3, layer.out_channels)[channel], layer.eps));
}

// Statistics of the first norms, from the moments of the input. A warp for each hidden channel.
__global__ void __launch_bounds__(kThreads) first_statistics(const __grid_constant__ Layer layer) {
  const int lane = lane_of_thread(), warp = warp_of_thread();
  const int64_t all = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  if (all >= layer.hidden) return;
  const int index = option_of_hidden(layer, all);
  const Option& option = layer.option[index];
  const int i = static_cast<int>(all - option.hidden_before), channels = layer.in_channels;
  const int each = channels / option.groups, before = i / (option.hidden / option.groups) * each;
  const auto w = array(option.expand, static_cast<int64_t>(option.hidden) * each) +
                 static_cast<int64_t>(i) * each;
  const auto mean = array<const float>(layer.mean, channels);
  const auto covariance =
      array<const float>(layer.covariance, static_cast<int64_t>(channels) * channels);
  double middle = 0.0, square = 0.0;
  for (int c = lane; c < each; c += kWarp) {
    double row = 0.0;
    for (int d = 0; d < each; ++d) {
      row += static_cast<double>(w[d]) *
             covariance[static_cast<int64_t>(before + d) * channels + before + c];
    }
    middle += static_cast<double>(w[c]) * mean[before + c];
    square += static_cast<double>(w[c]) * row;
  }
  const float found = static_cast<float>(warp_sum(middle));
  square = warp_sum(square);
  const float variance = static_cast<float>(square < 0.0 ? 0.0 : square);
  keep_first(layer, option, i, found, variance, lane);
  if (lane != 0) return;
  const auto out = statistics_part(layer, index);
  out[shuffled(option, i)] = found;
  out[option.hidden + shuffled(option, i)] = variance;
}

// Moments of one channel of partial [rows][3][channels], by a warp; the result is every lane's.
__device__ inline Merged merge_rows(Array<const float> partial, int rows, int64_t channels,
                                    int64_t channel, int lane) {
  Merged all;
  for (int row = lane; row < rows; row += kWarp) {
    const auto part = partial + static_cast<int64_t>(row) * 3 * channels + channel;
    all.add(part[0], part[channels], part[2 * channels]);
  }
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const double count = __shfl_xor_sync(kAllLanes, all.count, step);
    const double mean = __shfl_xor_sync(kAllLanes, all.mean, step);
    const double squares = __shfl_xor_sync(kAllLanes, all.squares, step);
    if ((lane & step) == 0) {  // the lower half adds the upper one, so that all lanes agree
      all.add(count, mean, squares);
    } else {
      Merged lower{count, mean, squares};
      lower.add(all.count, all.mean, all.squares);
      all = lower;
    }
  }
  return all;
}

// Statistics of the second norms. A warp for each hidden channel.
__global__ void __launch_bounds__(kThreads) second_statistics(const __grid_constant__ Layer layer) {
  const int lane = lane_of_thread(), warp = warp_of_thread();
  const int64_t all = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  if (all >= layer.hidden) return;
  const int index = option_of_hidden(layer, all);
  const Option& option = layer.option[index];
  const Merged found = merge_rows(
      array<const float>(layer.partial, static_cast<int64_t>(layer.rows) * 3 * layer.hidden),
      layer.rows, layer.hidden, all, lane);
  if (lane != 0) return;
  const int i = static_cast<int>(all - option.hidden_before), j = shuffled(option, i);
  const float mean = static_cast<float>(found.mean);
  const float variance = static_cast<float>(found.squares / found.count);
  const auto out = statistics_part(layer, index) + 2 * option.hidden;
  out[j] = mean;
  out[option.hidden + j] = variance;
  keep_second(layer, option, i, mean, variance);
}

// Statistics of the third norms. A warp for each output channel of each option.
__global__ void __launch_bounds__(kThreads) third_statistics(const __grid_constant__ Layer layer) {
  const int lane = lane_of_thread(), warp = warp_of_thread();
  const int64_t channels = static_cast<int64_t>(layer.options) * layer.out_channels;
  const int64_t all = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  if (all >= channels) return;
  const Merged found =
      merge_rows(array<const float>(layer.partial, static_cast<int64_t>(layer.rows) * 3 * channels),
                 layer.rows, channels, all, lane);
  if (lane != 0) return;
  const int index = static_cast<int>(all / layer.out_channels);
  const int channel = static_cast<int>(all % layer.out_channels);
  const auto out = statistics_part(layer, index) + 4 * layer.option[index].hidden;
  const float mean = static_cast<float>(found.mean);
  const float variance = static_cast<float>(found.squares / found.count);
  out[channel] = mean;
  out[layer.out_channels + channel] = variance;
  keep_third(layer, index, channel, mean, variance);
}

// Makes layer.norms and layer.folded again from the statistics. A warp for each hidden channel,
// then a warp for 32 output channels of an option.
__global__ void __launch_bounds__(kThreads) restore_norms(const __grid_constant__ Layer layer) {
  const int lane = lane_of_thread();
  const int64_t all = static_cast<int64_t>(blockIdx.x) * kWarps + warp_of_thread();
  const int64_t outs = static_cast<int64_t>(layer.options) * layer.out_channels;
  if (all >= layer.hidden) {
    const int64_t channel = (all - layer.hidden) * kWarp + lane;
    if (channel >= outs) return;
    const int index = static_cast<int>(channel / layer.out_channels);
    const int own = static_cast<int>(channel % layer.out_channels);
    const auto found = statistics_part(layer, index) + 4 * layer.option[index].hidden;
    keep_third(layer, index, own, found[own], found[layer.out_channels + own]);
    return;
  }
  const int index = option_of_hidden(layer, all);
  const Option& option = layer.option[index];
  const int i = static_cast<int>(all - option.hidden_before), j = shuffled(option, i);
  const auto found = statistics_part(layer, index);
  keep_first(layer, option, i, found[j], found[option.hidden + j], lane);
  if (lane == 0) {
    keep_second(layer, option, i, found[2 * option.hidden + j], found[3 * option.hidden + j]);
  }
}

}  // namespace
}  // namespace pynas
