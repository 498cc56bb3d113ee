// Kernels of the backward pass, in the order in which they run; `expand_depthwise` of the forward
// pass, which makes layer.depthwise again, comes before `project_gradient`.
//
// For every norm, with g the gradient of its output, v its normed input and P positions:
//   gradient of the input = scale * (g - sum(g) / P - v * sum(g v) / P) / deviation.
// The sums of the last two norms are taken while g is written. That of the first, and the gradient
// of x, follow from sum(g x) by the algebra of its product: u = W x, so sum(g u) needs no u.
#pragma once

#include "mbconv_forward.h"

namespace pynas {
namespace {

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

// Sums over bands of rows of single images: of the gradient of y, and of it times each option's
// normed products; the last entry of the options has it times x, where x joins the sum.
// Grid: (images * bands, options + 1, chunks of output channels).
__global__ void __launch_bounds__(kThreads) band_sums(const __grid_constant__ Layer layer) {
  const int lane = lane_of_thread(), warp = warp_of_thread();
  const auto scratch = shared_array<float>(0, kThreads);
  const int channel = static_cast<int>(blockIdx.z) * kChunk + lane, outs = layer.out_channels;
  const int index = static_cast<int>(blockIdx.y);
  const bool is_x = index == layer.options, real = channel < outs;
  if (is_x && !has_residual(layer) && layer.identity < 0) return;
  const int64_t positions = out_positions(layer);
  const int64_t each = static_cast<int64_t>(layer.out_height) * layer.out_width;
  const int64_t image = blockIdx.x / layer.bands, band = blockIdx.x % layer.bands;
  const int64_t first = image * each + share(each, band, layer.bands);
  const int64_t end = image * each + share(each, band + 1, layer.bands);
  const auto g = array(layer.y_gradient, positions * outs);
  Norm norm = {0.0f, 1.0f, 1.0f, 0.0f};
  if (real && !is_x) norm = third_norm(layer, index, channel);
  const auto values =
      is_x ? array(layer.x, positions * outs)
           : Array<const float>(output_part<const float>(layer, layer.products, index));
  float sum = 0.0f, product = 0.0f;
  for (int64_t p = first + warp; p < end && real; p += kWarps) {
    const float gradient = g[p * outs + channel];
    sum += gradient;
    product = fmaf(gradient, (values[p * outs + channel] - norm.mean) * norm.inverse, product);
  }
  const float sums = sum_over_warps(sum, scratch, lane, warp);
  const float products = sum_over_warps(product, scratch, lane, warp);
  if (warp != 0 || !real) return;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (layer.options + 1) + index;
  const auto out = array(layer.band_sums, static_cast<int64_t>(layer.images) * layer.bands *
                                              (layer.options + 1) * 2 * outs);
  out[(row * 2 + 0) * outs + channel] = sums;
  out[(row * 2 + 1) * outs + channel] = products;
}

__device__ __forceinline__ Array<const float> sums_of_band(const Layer& layer, int64_t band,
                                                           int index) {
  const int64_t each = 2 * static_cast<int64_t>(layer.out_channels);
  return array<const float>(layer.band_sums, static_cast<int64_t>(layer.images) * layer.bands *
                                                 (layer.options + 1) * each) +
         (band * (layer.options + 1) + index) * each;
}

// The third norms' gradients and layer.output_sums. A warp for each output channel of each option.
__global__ void __launch_bounds__(kThreads) finish_outputs(const __grid_constant__ Layer layer) {
  const int lane = lane_of_thread(), warp = warp_of_thread();
  const int64_t channels = static_cast<int64_t>(layer.options) * layer.out_channels;
  const int64_t all = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  if (all >= channels) return;
  const int index = static_cast<int>(all / layer.out_channels);
  const int channel = static_cast<int>(all % layer.out_channels);
  const Option& option = layer.option[index];
  if (!option.trained) return;
  double sum = 0.0, product = 0.0;
  for (int64_t band = lane; band < static_cast<int64_t>(layer.images) * layer.bands;
       band += kWarp) {
    const auto found = sums_of_band(layer, band, index);
    const double gate = gate_of(layer, band / layer.bands, option.gate);
    sum += gate * found[channel];
    product += gate * found[layer.out_channels + channel];
  }
  sum = warp_sum(sum);
  product = warp_sum(product);
  if (lane != 0) return;
  const double positions = static_cast<double>(out_positions(layer));
  const auto out = array(layer.output_sums, 2 * channels);
  out[all] = static_cast<float>(sum / positions);
  out[channels + all] = static_cast<float>(product / positions);
  if (option.scale3_out == nullptr) return;
  array(option.scale3_out, layer.out_channels)[channel] = static_cast<float>(product);
  array(option.shift3_out, layer.out_channels)[channel] = static_cast<float>(sum);
}

// The gradient of one gate. Grid: (columns, 1 or images).
__global__ void __launch_bounds__(kThreads) gate_gradient(const __grid_constant__ Layer layer) {
  const int lane = lane_of_thread(), warp = warp_of_thread();
  const auto scratch = shared_array<double>(0, kWarps);
  const int column = static_cast<int>(blockIdx.x);
  const int64_t row = blockIdx.y, bands = layer.bands;
  const int64_t first = layer.gates_per_image ? row * bands : 0;
  const int64_t end = layer.gates_per_image ? first + bands : layer.images * bands;
  const int outs = layer.out_channels;
  double total = 0.0;
  for (int o = 0; o <= layer.options; ++o) {
    const bool is_x = o == layer.options;
    if (is_x ? column != layer.identity : column != layer.option[o].gate) continue;
    for (int64_t at = threadIdx.x; at < (end - first) * outs; at += kThreads) {
      const int64_t band = first + at / outs;
      const int channel = static_cast<int>(at % outs);
      if (!is_x) {
        const auto found = sums_of_band(layer, band, o);
        total += static_cast<double>(array(layer.option[o].scale3, outs)[channel]) *
                     found[outs + channel] +
                 static_cast<double>(array(layer.option[o].shift3, outs)[channel]) * found[channel];
      }
      if (is_x || has_residual(layer)) {
        total += sums_of_band(layer, band, layer.options)[outs + channel];
      }
    }
  }
  total = warp_sum(total);
  if (lane == 0) scratch[warp] = total;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kWarps; ++w) total += scratch[w];
  array(layer.gate_gradient,
        static_cast<int64_t>(gridDim.y) * layer.gates)[row * layer.gates + column] =
      static_cast<float>(total);
}

// The gradient of the products: layer.products_gradient. Grid: (blocks of positions, chunks of
// output channels, options).
__global__ void __launch_bounds__(kThreads) products_gradient(const __grid_constant__ Layer layer) {
  const int lane = lane_of_thread(), warp = warp_of_thread();
  const int channel = static_cast<int>(blockIdx.y) * kChunk + lane, outs = layer.out_channels;
  const int index = static_cast<int>(blockIdx.z);
  const Option& option = layer.option[index];
  if (channel >= outs || !option.trained) return;
  const int64_t positions = out_positions(layer),
                channels = static_cast<int64_t>(layer.options) * outs;
  const int64_t each = static_cast<int64_t>(layer.out_height) * layer.out_width;
  const auto g = array(layer.y_gradient, positions * outs);
  const auto z = output_part<const float>(layer, layer.products, index);
  const auto out = output_part(layer, layer.products_gradient, index);
  const auto sums = array<const float>(layer.output_sums, 2 * channels);
  const Norm norm = third_norm(layer, index, channel);
  const float mean = sums[static_cast<int64_t>(index) * outs + channel];
  const float slope = sums[channels + static_cast<int64_t>(index) * outs + channel];
  for (int64_t p = static_cast<int64_t>(blockIdx.x) * kWarps + warp; p < positions;
       p += static_cast<int64_t>(gridDim.x) * kWarps) {
    const int64_t at = p * outs + channel;
    const float normed = (z[at] - norm.mean) * norm.inverse;
    out[at] = norm.scale * (gate_of(layer, p / each, option.gate) * g[at] - mean - normed * slope);
  }
}

// The gradient behind the second norm's scale and shift: layer.hidden_gradient, and its sums to
// partial [rows][2][hidden]. Grid: (rows, chunks of hidden channels by output group).
__global__ void __launch_bounds__(kThreads) project_gradient(const __grid_constant__ Layer layer) {
  const int lane = lane_of_thread(), warp = warp_of_thread();
  const Chunk chunk = chunk_at(layer, Channels::kHidden, {true}, static_cast<int>(blockIdx.y));
  if (chunk.option < 0) return;
  const Option& option = layer.option[chunk.option];
  const int each = option.hidden / option.groups, outs = layer.out_channels / option.groups;
  const auto scratch = shared_array<float>(0, kProductFloats);
  const int64_t positions = out_positions(layer);
  const auto v = hidden_part<const float>(layer, layer.depthwise, option, positions);
  const auto out = hidden_part(layer, layer.hidden_gradient, option, positions);
  const auto g = output_part<const float>(layer, layer.products_gradient, chunk.option);
  const auto weights = array(option.project, static_cast<int64_t>(layer.out_channels) * each);
  const bool real = lane < chunk.count;
  const int j = chunk.group * each + chunk.first + lane;
  const int i = real ? unshuffled(option, j) : 0;
  Norm norm = {0.0f, 0.0f, 0.0f, 0.0f};
  if (real) norm = second_norm(layer, option, i);
  float sum = 0.0f, product = 0.0f;
  for (int64_t start = static_cast<int64_t>(blockIdx.x) * kPositions; start < positions;
       start += static_cast<int64_t>(gridDim.x) * kPositions) {
    Quad total;
    tile_product<false>(
        total, (outs + kChunk - 1) / kChunk, scratch,
        [&](int step, int r) {
          const int k = step * kChunk + lane;
          if (k >= outs || start + r >= positions) return 0.0f;
          return g[(start + r) * layer.out_channels + chunk.group * outs + k];
        },
        [&](int step, int o) {
          const int k = step * kChunk + o;
          if (!real || k >= outs) return 0.0f;
          return weights[static_cast<int64_t>(chunk.group * outs + k) * each + chunk.first + lane];
        });
    spread(total, scratch);
    for (int r = warp; r < kPositions && real; r += kWarps) {
      if (start + r >= positions) break;
      const int64_t at = (start + r) * option.hidden + i;
      const float value = v[at];
      const float gradient = through(layer.activation, scratch[r * kPitch + lane],
                                     fmaf(value, norm.scale, norm.shift));
      out[at] = gradient;
      sum += gradient;
      product = fmaf(gradient, (value - norm.mean) * norm.inverse, product);
    }
  }
  const float sums = sum_over_warps(sum, scratch, lane, warp);
  const float products = sum_over_warps(product, scratch, lane, warp);
  if (warp != 0 || !real) return;
  const auto partial = array(layer.partial, static_cast<int64_t>(gridDim.x) * 2 * layer.hidden) +
                       static_cast<int64_t>(blockIdx.x) * 2 * layer.hidden + option.hidden_before +
                       i;
  partial[0] = sums;
  partial[layer.hidden] = products;
}

// Adds up rows of partial sums of one channel, by a warp.
__device__ inline double add_rows(Array<const float> partial, int rows, int64_t pitch, int lane) {
  double total = 0.0;
  for (int row = lane; row < rows; row += kWarp) total += partial[row * pitch];
  return warp_sum(total);
}

// The second norms' gradients and the first half of layer.sums. A warp for each hidden channel.
__global__ void __launch_bounds__(kThreads) finish_second(const __grid_constant__ Layer layer) {
  const int lane = lane_of_thread(), warp = warp_of_thread();
  const int64_t all = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  if (all >= layer.hidden) return;
  const Option& option = layer.option[option_of_hidden(layer, all)];
  if (!option.trained) return;
  const int64_t pitch = 2 * static_cast<int64_t>(layer.hidden);
  const auto partial = array<const float>(layer.partial, pitch * layer.rows);
  const double sum = add_rows(partial + all, layer.rows, pitch, lane);
  const double product = add_rows(partial + (layer.hidden + all), layer.rows, pitch, lane);
  if (lane != 0) return;
  const double positions = static_cast<double>(out_positions(layer));
  const auto out = array(layer.sums, 4 * static_cast<int64_t>(layer.hidden));
  out[all] = static_cast<float>(sum / positions);
  out[layer.hidden + all] = static_cast<float>(product / positions);
  if (option.scale2_out == nullptr) return;
  const int j = shuffled(option, static_cast<int>(all - option.hidden_before));
  array(option.scale2_out, option.hidden)[j] = static_cast<float>(product);
  array(option.shift2_out, option.hidden)[j] = static_cast<float>(sum);
}

// Number of weights of a kind, of all options.
struct Weights {
  int64_t expand = 0, taps = 0, project = 0;

  __host__ __device__ explicit Weights(const Layer& layer) {
    for (int o = 0; o < layer.options; ++o) {
      const Option& option = layer.option[o];
      expand += static_cast<int64_t>(option.hidden) * (layer.in_channels / option.groups);
      taps += static_cast<int64_t>(option.hidden) * option.kernel * option.kernel;
      project += static_cast<int64_t>(option.hidden) * (layer.out_channels / option.groups);
    }
  }
};

// Gradient of the last convolutions' weights, to weight_partial [slices][weights].
// Grid: (slices of positions, chunks of output channels, chunks of hidden channels of a group).
__global__ void __launch_bounds__(kThreads) project_weights(const __grid_constant__ Layer layer) {
  const int lane = lane_of_thread();
  const Chunk chunk = chunk_at(layer, Channels::kOut, {true}, static_cast<int>(blockIdx.y));
  if (chunk.option < 0) return;
  const Option& option = layer.option[chunk.option];
  const int each = option.hidden / option.groups, outs = layer.out_channels / option.groups;
  const int first = static_cast<int>(blockIdx.z) * kChunk;
  if (first >= each) return;
  const int64_t positions = out_positions(layer);
  const auto v = hidden_part<const float>(layer, layer.depthwise, option, positions);
  const auto g = output_part<const float>(layer, layer.products_gradient, chunk.option);
  const bool real = first + lane < each;
  const int j = chunk.group * each + first + lane, out_first = chunk.group * outs + chunk.first;
  const int i = real ? unshuffled(option, j) : 0;
  Norm norm = {0.0f, 0.0f, 0.0f, 0.0f};
  if (real) norm = second_norm(layer, option, i);
  const int64_t size = Weights(layer).project;
  const auto out = array(layer.weight_partial, size * layer.slices) +
                   (size * blockIdx.x + option.project_before);
  outer_product(
      share(positions, blockIdx.x, layer.slices), share(positions, blockIdx.x + 1, layer.slices),
      shared_array<float>(0, kOuterScratch),
      [&](int64_t p, int m) {
        return m < chunk.count ? g[p * layer.out_channels + out_first + m] : 0.0f;
      },
      [&](int64_t p, int) {
        if (!real) return 0.0f;
        return activate(layer.activation, fmaf(v[p * option.hidden + i], norm.scale, norm.shift));
      },
      [&](int m, int n, float sum) {
        if (m < chunk.count && first + n < each) {
          out[static_cast<int64_t>(out_first + m) * each + first + n] = sum;
        }
      });
}

// Sums of the last convolutions' weight_partial. A thread for each weight.
__global__ void __launch_bounds__(kThreads)
    finish_project_weights(const __grid_constant__ Layer layer) {
  const int64_t size = Weights(layer).project;
  const int64_t weight = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (weight >= size) return;
  int found = 0;
  for (int o = 1; o < layer.options; ++o) {
    found = weight >= layer.option[o].project_before ? o : found;
  }
  const Option& option = layer.option[found];
  if (!option.trained || option.project_out == nullptr) return;
  const auto partial = array<const float>(layer.weight_partial, size * layer.slices);
  float total = 0.0f;
  for (int64_t slice = 0; slice < layer.slices; ++slice) total += partial[slice * size + weight];
  const int64_t count = static_cast<int64_t>(layer.out_channels) * (option.hidden / option.groups);
  array(option.project_out, count)[weight - option.project_before] = total;
}

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
