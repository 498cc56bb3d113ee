// One inverted-bottleneck block with its batch norms folded in, in one launch: hidden channels live
// in shared memory alone. csrc/cpu/mbconv_infer.h on a GPU.
//
// A block of threads makes 8 x 8 outputs of up to 128 channels: for 32 hidden channels at a time,
// the first convolution on the tile and its border, the depthwise one, and their share of the last
// one.
#include "tile.h"

namespace pynas {
namespace {

constexpr int kMostOutChunks = 4;  // of 32 channels, that a block of threads makes

struct Folded {
  int32_t images, height, width, in_channels, out_height, out_width, out_channels;
  int32_t kernel, hidden, stride, groups, activation, residual;
  const float* x;                           // [images, height, width, in_channels]
  const float *expand, *expand_bias;        // [hidden, in_channels / groups], [hidden]
  const float *depthwise, *depthwise_bias;  // [hidden, kernel, kernel] after the shuffle
  const float *project, *project_bias;      // [out_channels, hidden / groups]
  float* y;
};

// The layer that the pieces of tile.h know.
__device__ inline Layer layer_of(const Folded& in) {
  Layer layer = {};
  layer.images = in.images;
  layer.height = in.height;
  layer.width = in.width;
  layer.in_channels = in.in_channels;
  return layer;
}

template <int K, int S>
constexpr int64_t folded_floats(int channels) {
  return expand_floats(channels) + (1 + K * K + kTileSide<K, S> * kTileSide<K, S>)*kChunk +
         kPositions * kPitch + kChunk * kPitch;
}

// Hidden channels of an output group that come from one input group, as channels of the first
// convolution: [first, end).
struct Segment {
  int first, end;
};

__device__ __forceinline__ Segment segment_of(const Folded& in, int out_group, int in_group) {
  const int each = in.hidden / in.groups, start = out_group * each - in_group;
  const int before = start <= 0 ? 0 : (start + in.groups - 1) / in.groups;
  return {in_group * each + before, in_group * each + (start + each + in.groups - 1) / in.groups};
}

__device__ __forceinline__ int depthwise_channel(const Folded& in, int i) {
  const int each = in.hidden / in.groups;
  return i % each * in.groups + i / each;
}

// Grid: (tiles, chunks of 32 * Outs output channels of a group, groups).
template <int K, int S, int Outs>
__global__ void __launch_bounds__(kThreads, Outs > 2 ? 3 : 4)
    folded_block(const __grid_constant__ Folded in) {
  const int lane = lane_of_thread(), warp = warp_of_thread();
  constexpr int kIn = kTileSide<K, S>;
  const int channels = in.in_channels / in.groups, outs = in.out_channels / in.groups;
  const int each = in.hidden / in.groups, group = static_cast<int>(blockIdx.z);
  const int first_out = static_cast<int>(blockIdx.y) * Outs * kChunk;
  int64_t at = expand_floats(channels);
  const auto w = shared_array<float>(0, at);
  const auto bias = shared_array<float>(at, kChunk);
  const auto taps = shared_array<float>(at += kChunk, K * K * kChunk);
  const auto h = shared_array<float>(at += K * K * kChunk, kIn * kIn * kChunk);
  const auto a = shared_array<float>(at += kIn * kIn * kChunk, kPositions * kPitch);
  const auto b = shared_array<float>(at += kPositions * kPitch, kChunk * kPitch);
  const Layer layer = layer_of(in);
  const auto x = array(in.x, in_positions(layer) * in.in_channels);
  const auto expand = array(in.expand, static_cast<int64_t>(in.hidden) * channels);
  const auto depthwise = array(in.depthwise, static_cast<int64_t>(in.hidden) * K * K);
  const auto project = array(in.project, static_cast<int64_t>(in.out_channels) * each);
  const Place place(blockIdx.x, (in.out_width + kSide - 1) / kSide,
                    (in.out_height + kSide - 1) / kSide);
  const int row = static_cast<int>(threadIdx.x) / 8 * 4,
            column = static_cast<int>(threadIdx.x) % 8 * 4;
  Quad sum[Outs];
  for (int in_group = 0; in_group < in.groups; ++in_group) {
    const Segment segment = segment_of(in, group, in_group);
    for (int start = segment.first; start < segment.end; start += kChunk) {
      const int i = start + lane;
      const bool real = i < segment.end;
      const int j = real ? depthwise_channel(in, i) : 0;
      for (int c = warp; c < (channels + 3) / 4 * 4; c += kWarps) {
        w[c * kChunk + lane] =
            real && c < channels ? expand[static_cast<int64_t>(i) * channels + c] : 0.0f;
      }
      for (int tap = warp; tap < K * K; tap += kWarps) {
        taps[tap * kChunk + lane] = real ? depthwise[static_cast<int64_t>(j) * K * K + tap] : 0.0f;
      }
      if (warp == 0) bias[lane] = real ? array(in.expand_bias, in.hidden)[i] : 0.0f;
      __syncthreads();
      expand_tile(layer, x, in_group * channels, channels, place.image, place.y * S - K / 2,
                  place.x * S - K / 2, kIn, w, h,
                  [&](float value, int c) { return activate(in.activation, value + bias[c]); });
      __syncthreads();
      const float depthwise_bias = real ? array(in.depthwise_bias, in.hidden)[j] : 0.0f;
      for (int r = warp; r < kSide; r += kWarps) {
        float found[kSide];
        depthwise_row<K, S>(h, taps, lane, r, found);
#pragma unroll
        for (int c = 0; c < kSide; ++c) {
          a[(r * kSide + c) * kPitch + lane] =
              real ? activate(in.activation, found[c] + depthwise_bias) : 0.0f;
        }
      }
#pragma unroll
      for (int part = 0; part < Outs; ++part) {
        if (part > 0) __syncthreads();
        for (int o = warp; o < kChunk; o += kWarps) {
          const int out = first_out + part * kChunk + o;
          b[lane * kPitch + o] =
              real && out < outs
                  ? project[static_cast<int64_t>(group * outs + out) * each + j - group * each]
                  : 0.0f;
        }
        __syncthreads();
        multiply(sum[part], a, row, b, column, kChunk);
      }
    }
  }
  const auto y =
      array(in.y, static_cast<int64_t>(in.images) * in.out_height * in.out_width * in.out_channels);
#pragma unroll
  for (int part = 0; part < Outs; ++part) {
    __syncthreads();
    sum[part].store(a, row, column);
    __syncthreads();
    const int out = first_out + part * kChunk + lane;
    if (out >= outs) continue;
    const int channel = group * outs + out;
    const float shift = array(in.project_bias, in.out_channels)[channel];
    for (int r = warp; r < kPositions; r += kWarps) {
      const int oy = place.y + r / kSide, ox = place.x + r % kSide;
      if (oy >= in.out_height || ox >= in.out_width) continue;
      const int64_t p =
          ((place.image * in.out_height + oy) * in.out_width + ox) * in.out_channels + channel;
      const float value = a[r * kPitch + lane] + shift;
      y[p] = in.residual ? x[p] + value : value;
    }
  }
}

template <int K, int S, int Outs>
const char* launch_folded(const Folded& in, void* stream) {
  const int64_t tiles = static_cast<int64_t>(in.images) * ceil_div(in.out_height, kSide) *
                        ceil_div(in.out_width, kSide);
  const int64_t chunks = ceil_div(in.out_channels / in.groups, kChunk * Outs);
  return launch(folded_block<K, S, Outs>,
                dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(chunks),
                     static_cast<unsigned>(in.groups)),
                kThreads, 4 * folded_floats<K, S>(in.in_channels / in.groups), stream, in);
}

template <int K, int S>
const char* launch_folded(const Folded& in, void* stream) {
  const int64_t chunks = ceil_div(in.out_channels / in.groups, kChunk);
  if (chunks <= 1) return launch_folded<K, S, 1>(in, stream);
  if (chunks <= 2) return launch_folded<K, S, 2>(in, stream);
  return launch_folded<K, S, kMostOutChunks>(in, stream);
}

template <int K>
const char* launch_folded(const Folded& in, void* stream) {
  return in.stride == 1 ? launch_folded<K, 1>(in, stream) : launch_folded<K, 2>(in, stream);
}

}  // namespace
}  // namespace pynas

PYNAS_EXPORT const char* pynas_mbconv_infer(const pynas::Folded* in, void* stream) {
  if (in->kernel == 3) return pynas::launch_folded<3>(*in, stream);
  if (in->kernel == 5) return pynas::launch_folded<5>(*in, stream);
  return pynas::launch_folded<7>(*in, stream);
}
