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

// The gradient of one gate. Grid: (1 or images, columns).
__global__ void __launch_bounds__(kThreads) gate_gradient(const __grid_constant__ Layer layer) {
  const int lane = lane_of_thread(), warp = warp_of_thread();
  const auto scratch = shared_array<double>(0, kWarps);
  const int column = static_cast<int>(blockIdx.y);
  const int64_t row = blockIdx.x, bands = layer.bands;
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
        static_cast<int64_t>(gridDim.x) * layer.gates)[row * layer.gates + column] =
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

}  // namespace
}  // namespace pynas
