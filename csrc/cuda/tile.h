// Pieces of work that a block of 128 threads does on tiles in shared memory.
#pragma once

#include "mbconv.h"

namespace pynas {
namespace {

// Four positions times four channels, the share of a thread in a product.
struct Quad {
  float at[4][4];

  __device__ __forceinline__ Quad() {
#pragma unroll
    for (int p = 0; p < 4; ++p) {
#pragma unroll
      for (int c = 0; c < 4; ++c) at[p][c] = 0.0f;
    }
  }

  // Adds a . b for four values of what is summed over: a of each position, b of each of the four.
  __device__ __forceinline__ void add(const float4 (&a)[4], const float4 (&b)[4]) {
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      add_one(p, a[p].x, b[0]);
      add_one(p, a[p].y, b[1]);
      add_one(p, a[p].z, b[2]);
      add_one(p, a[p].w, b[3]);
    }
  }

  __device__ __forceinline__ void add_one(int p, float a, const float4& b) {
    at[p][0] = fmaf(a, b.x, at[p][0]);
    at[p][1] = fmaf(a, b.y, at[p][1]);
    at[p][2] = fmaf(a, b.z, at[p][2]);
    at[p][3] = fmaf(a, b.w, at[p][3]);
  }

  // Puts it into a tile of rows of kPitch floats.
  __device__ __forceinline__ void store(Array<float> tile, int row, int column) const {
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      store4(tile, (row + p) * kPitch + column,
             make_float4(at[p][0], at[p][1], at[p][2], at[p][3]));
    }
  }
};

// Quad += rows [row, row + 4) of a times columns [column, column + 4) of b, in tiles of kPitch.
__device__ __forceinline__ void multiply(Quad& sum, Array<const float> a, int row,
                                         Array<const float> b, int column, int count) {
  for (int k = 0; k < count; k += 4) {
    float4 left[4], right[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      left[i] = load4(a, (row + i) * kPitch + k);
      right[i] = load4(b, (k + i) * kPitch + column);
    }
    sum.add(left, right);
  }
}

// Sum += A . B over `steps` steps of 32. A thread brings a(step, row) of 16 rows of A's tile in its
// lane's column, and b(step, row) of 8 rows of B's, or with Transposed of 8 columns in its lane's
// row. What the next step needs is on its way while a step is multiplied. Scratch: kProductFloats.
// All threads come.
constexpr int64_t kProductFloats = (kPositions + kChunk) * kPitch;

template <bool Transposed, typename A, typename B>
__device__ __forceinline__ void tile_product(Quad& sum, int steps, Array<float> scratch, const A& a,
                                             const B& b) {
  constexpr int kRowsA = kPositions / kWarps, kRowsB = kChunk / kWarps;
  const int lane = lane_of_thread(), warp = warp_of_thread();
  const int row = static_cast<int>(threadIdx.x) / 8 * 4;
  const int column = static_cast<int>(threadIdx.x) % 8 * 4;
  const Array<float> left = scratch, right = scratch + kPositions * kPitch;
  float next_a[kRowsA], next_b[kRowsB];
#pragma unroll
  for (int i = 0; i < kRowsA; ++i) next_a[i] = a(0, warp + i * kWarps);
#pragma unroll
  for (int i = 0; i < kRowsB; ++i) next_b[i] = b(0, warp + i * kWarps);
  for (int step = 0; step < steps; ++step) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kRowsA; ++i) left[(warp + i * kWarps) * kPitch + lane] = next_a[i];
#pragma unroll
    for (int i = 0; i < kRowsB; ++i) {
      const int at = warp + i * kWarps;
      right[Transposed ? lane * kPitch + at : at * kPitch + lane] = next_b[i];
    }
    __syncthreads();
    if (step + 1 < steps) {
#pragma unroll
      for (int i = 0; i < kRowsA; ++i) next_a[i] = a(step + 1, warp + i * kWarps);
#pragma unroll
      for (int i = 0; i < kRowsB; ++i) next_b[i] = b(step + 1, warp + i * kWarps);
    }
    multiply(sum, left, row, right, column, kChunk);
  }
  __syncthreads();
}

// Lays a product's tile out in rows of kPitch floats of the scratch, for all threads to read.
__device__ __forceinline__ void spread(const Quad& sum, Array<float> scratch) {
  sum.store(scratch, static_cast<int>(threadIdx.x) / 8 * 4, static_cast<int>(threadIdx.x) % 8 * 4);
  __syncthreads();
}

// Number, mean and sum of squared distances of what a thread saw of one channel. Distances are
// taken from the first value, so that a mean far from zero costs no digits.
struct Moments {
  float count = 0.0f, pivot = 0.0f, sum = 0.0f, squares = 0.0f;

  __device__ __forceinline__ void add(float value) {
    if (count == 0.0f) pivot = value;
    const float distance = value - pivot;
    count += 1.0f;
    sum += distance;
    squares = fmaf(distance, distance, squares);
  }
};

// As it is merged (Chan, Golub and LeVeque, 1979).
struct Merged {
  double count = 0.0, mean = 0.0, squares = 0.0;

  __device__ __forceinline__ void add(double n, double m, double s) {
    if (n == 0.0) return;
    const double total = count + n, distance = m - mean;
    squares += s + distance * distance * (count * n / total);
    mean += distance * (n / total);
    count = total;
  }
};

// Writes the moments of 32 channels, one a lane, that the block's warps saw to row `row` of
// partial [rows][3][channels]. All threads come.
__device__ inline void write_moments(const Moments& own, Array<float> scratch, int lane, int warp,
                                     bool real, Array<float> partial, int64_t row, int64_t channels,
                                     int64_t channel) {
  __syncthreads();
  const float mean = own.count > 0.0f ? own.pivot + own.sum / own.count : 0.0f;
  const float squares = own.count > 0.0f ? own.squares - own.sum * own.sum / own.count : 0.0f;
  scratch[(warp * 3 + 0) * kWarp + lane] = own.count;
  scratch[(warp * 3 + 1) * kWarp + lane] = mean;
  scratch[(warp * 3 + 2) * kWarp + lane] = squares;
  __syncthreads();
  if (warp == 0 && real) {
    Merged all;
    for (int w = 0; w < kWarps; ++w) {
      all.add(scratch[(w * 3 + 0) * kWarp + lane], scratch[(w * 3 + 1) * kWarp + lane],
              scratch[(w * 3 + 2) * kWarp + lane]);
    }
    partial[(row * 3 + 0) * channels + channel] = static_cast<float>(all.count);
    partial[(row * 3 + 1) * channels + channel] = static_cast<float>(all.mean);
    partial[(row * 3 + 2) * channels + channel] = static_cast<float>(all.squares);
  }
}
constexpr int kMomentsScratch = kWarps * 3 * kWarp;

// Adds up what each warp has of each lane; the sum is warp 0's. All threads come.
__device__ inline float sum_over_warps(float own, Array<float> scratch, int lane, int warp) {
  __syncthreads();
  scratch[warp * kWarp + lane] = own;
  __syncthreads();
  float total = 0.0f;
  if (warp == 0) {
    for (int w = 0; w < kWarps; ++w) total += scratch[w * kWarp + lane];
  }
  return total;
}

// Where a share of `total` things starts.
__device__ __forceinline__ int64_t share(int64_t total, int64_t part, int64_t parts) {
  return total * part / parts;
}

// Up to four neighbouring channels of a position, from channel `first` of `end`; zeros behind it,
// and everywhere where `row` is negative.
__device__ __forceinline__ float4 channels4(Array<const float> x, int64_t row, int first, int end,
                                            bool aligned) {
  if (row < 0) return make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  if (aligned && first + 4 <= end) return load4(x, row + first);
  return make_float4(x[row + first], first + 1 < end ? x[row + first + 1] : 0.0f,
                     first + 2 < end ? x[row + first + 2] : 0.0f,
                     first + 3 < end ? x[row + first + 3] : 0.0f);
}

// Geometry of a square tile: where it starts, and how its places map to positions.
struct Place {
  int64_t image;
  int y, x;

  __device__ __forceinline__ Place(int64_t tile, int across, int down) {
    const int64_t each = static_cast<int64_t>(across) * down;
    image = tile / each;
    const int within = static_cast<int>(tile % each);
    y = within / across * kSide;
    x = within % across * kSide;
  }
};

// The first convolution of 32 channels on a tile of side x side positions that starts at (y, x) and
// may reach outside the image, where it is zero: into h [side * side, kChunk], after `finish`,
// which is told value and channel of the chunk.
//
// w: [channels rounded up to four, kChunk] in shared memory. x: from the chunk's first input
// channel.
template <typename Finish>
__device__ __forceinline__ void expand_tile(const Layer& layer, Array<const float> x,
                                            int first_channel, int channels, int64_t image, int y,
                                            int left, int side, Array<const float> w,
                                            Array<float> h, const Finish& finish) {
  const int places = side * side, items = (places + 3) / 4 * (kChunk / 4);
  const bool aligned = layer.in_channels % 4 == 0 && first_channel % 4 == 0;
  for (int item = static_cast<int>(threadIdx.x); item < items; item += kThreads) {
    const int column = item % (kChunk / 4) * 4, place = item / (kChunk / 4) * 4;
    int64_t rows[4];
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      const int at = place + p, iy = y + at / side, ix = left + at % side;
      const bool inside =
          at < places && iy >= 0 && iy < layer.height && ix >= 0 && ix < layer.width;
      rows[p] = inside ? ((image * layer.height + iy) * layer.width + ix) * layer.in_channels +
                             first_channel
                       : -1;
    }
    Quad sum;
    for (int c = 0; c < channels; c += 4) {
      float4 a[4], b[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        a[i] = channels4(x, rows[i], c, channels, aligned);
        b[i] = load4(w, (c + i) * kChunk + column);
      }
      sum.add(a, b);
    }
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      if (place + p >= places) break;
      float4 value = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (rows[p] >= 0) {
        value = make_float4(finish(sum.at[p][0], column), finish(sum.at[p][1], column + 1),
                            finish(sum.at[p][2], column + 2), finish(sum.at[p][3], column + 3));
      }
      store4(h, (place + p) * kChunk + column, value);
    }
  }
}

// Side of the tile that kSide outputs read.
template <int K, int S>
constexpr int kTileSide = (kSide - 1) * S + K;

// Floats of a chunk's weights of the first convolution.
__host__ __device__ constexpr int64_t expand_floats(int channels) {
  return static_cast<int64_t>(channels + 3) / 4 * 4 * kChunk;
}

// Output row `row` of a tile of kSide outputs of one channel, by one thread: out[kSide].
template <int K, int S>
__device__ __forceinline__ void depthwise_row(Array<const float> h, Array<const float> taps,
                                              int lane, int row, float (&out)[kSide]) {
  constexpr int kIn = (kSide - 1) * S + K;
#pragma unroll
  for (int i = 0; i < kSide; ++i) out[i] = 0.0f;
#pragma unroll
  for (int ky = 0; ky < K; ++ky) {
    float weights[K];
#pragma unroll
    for (int kx = 0; kx < K; ++kx) weights[kx] = taps[(ky * K + kx) * kChunk + lane];
#pragma unroll
    for (int i = 0; i < kIn; ++i) {
      const float value = h[((row * S + ky) * kIn + i) * kChunk + lane];
#pragma unroll
      for (int kx = 0; kx < K; ++kx) {
        if (i >= kx && (i - kx) % S == 0 && (i - kx) / S < kSide) {
          out[(i - kx) / S] = fmaf(value, weights[kx], out[(i - kx) / S]);
        }
      }
    }
  }
}

// Sums over positions [first, end) of a(position, m) times b(position, n), for m and n in a chunk:
// told to write(m, n, sum). scratch: kOuterScratch floats. All threads come.
constexpr int kOuterScratch = 3 * kChunk * kPitch;

template <typename A, typename B, typename Write>
__device__ __forceinline__ void outer_product(int64_t first, int64_t end, Array<float> scratch,
                                              const A& a, const B& b, const Write& write) {
  const int lane = lane_of_thread(), warp = warp_of_thread();
  const int half = static_cast<int>(threadIdx.x) / 64, quad = static_cast<int>(threadIdx.x) % 64;
  const int row = quad / 8 * 4, column = quad % 8 * 4;
  const Array<float> left = scratch, right = scratch + kChunk * kPitch;
  const Array<float> other = scratch + 2 * kChunk * kPitch;
  Quad sum;
  for (int64_t start = first; start < end; start += kChunk) {
    for (int r = warp; r < kChunk; r += kWarps) {
      const bool inside = start + r < end;
      left[r * kPitch + lane] = inside ? a(start + r, lane) : 0.0f;
      right[r * kPitch + lane] = inside ? b(start + r, lane) : 0.0f;
    }
    __syncthreads();
    for (int r = half; r < kChunk; r += 2) {
      const float4 m = load4(left, r * kPitch + row), n = load4(right, r * kPitch + column);
      sum.add_one(0, m.x, n);
      sum.add_one(1, m.y, n);
      sum.add_one(2, m.z, n);
      sum.add_one(3, m.w, n);
    }
    __syncthreads();
  }
  if (half == 1) sum.store(other, row, column);
  __syncthreads();
  if (half == 0) {
#pragma unroll
    for (int m = 0; m < 4; ++m) {
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        write(row + m, column + n, sum.at[m][n] + other[(row + m) * kPitch + column + n]);
      }
    }
  }
}

}  // namespace
}  // namespace pynas
