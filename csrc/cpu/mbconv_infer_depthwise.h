// Depthwise convolution of one or two rows of one vector of channels: bias first, activation last.
#pragma once

#include "mbconv_infer_tile.h"

namespace pynas {
namespace {

constexpr int kWidestTile = 8;  // outputs of a row

// Rows of positions, a vector each, with zeros on both sides. Row i is the one that tap row i of
// the first output row reads; those outside the image are left out.
template <typename T>
struct Window {
  const T* rows[8];
  int64_t begin, end;
};

// sums[t] += taps of one row with inputs t * Stride + kx.
template <typename T, int Kernel, int Stride, bool Half, int Outputs>
PYNAS_INLINE void add_row(const T* row, const T* taps, LaneOf<T, Half> (&sums)[Outputs]) {
  constexpr int kL = kLanes<T>;
  PYNAS_UNROLL for (int kx = 0; kx < Kernel; ++kx) {
    const LaneOf<T, Half> tap = get<Half>(taps + kx * kL);
    PYNAS_UNROLL for (int t = 0; t < Outputs; ++t) {
      sums[t] += get<Half>(row + (t * Stride + kx) * kL) * tap;
    }
  }
}

// The same for two rows of outputs: an input is loaded once.
template <typename T, int Kernel, bool Half, int Outputs>
PYNAS_INLINE void add_row_to_both(const T* row, const T* taps, LaneOf<T, Half> (&first)[Outputs],
                                  LaneOf<T, Half> (&second)[Outputs]) {
  constexpr int kL = kLanes<T>;
  LaneOf<T, Half> now[Kernel], before[Kernel];
  PYNAS_UNROLL for (int kx = 0; kx < Kernel; ++kx) {
    now[kx] = get<Half>(taps + kx * kL);
    before[kx] = get<Half>(taps + (kx - Kernel) * kL);
  }
  PYNAS_UNROLL for (int i = 0; i < Outputs + Kernel - 1; ++i) {
    const LaneOf<T, Half> value = get<Half>(row + i * kL);
    PYNAS_UNROLL for (int kx = 0; kx < Kernel; ++kx) {
      if (i - kx < 0 || i - kx >= Outputs) continue;
      first[i - kx] += value * now[kx];
      second[i - kx] += value * before[kx];
    }
  }
}

template <typename T, bool Half, int Outputs>
PYNAS_INLINE void put_row(Activation activation, const LaneOf<T, Half> (&sums)[Outputs], T* out) {
  by_kind(activation, [&](auto kind) {
    PYNAS_UNROLL for (int t = 0; t < Outputs; ++t) {
      put<Half>(out + t * kLanes<T>, activated<kind.value, T>(sums[t]));
    }
  });
}

// weights: bias, taps [Kernel][Kernel], a vector each.
template <typename T, int Kernel, int Stride, bool Half, int Outputs>
__attribute__((noinline)) void convolve_tile(const Window<T>& window, int64_t x, const T* weights,
                                             Activation activation, T* out) {
  constexpr int kL = kLanes<T>;
  LaneOf<T, Half> sums[Outputs];
  PYNAS_UNROLL for (int t = 0; t < Outputs; ++t) sums[t] = get<Half>(weights);
  for (int64_t i = window.begin; i < window.end; ++i) {
    add_row<T, Kernel, Stride, Half, Outputs>(window.rows[i] + x * Stride * kL,
                                              weights + (1 + i * Kernel) * kL, sums);
  }
  put_row<T, Half, Outputs>(activation, sums, out + x * kL);
}

// Two rows of outputs, of stride 1; `step` elements between them.
template <typename T, int Kernel, bool Half, int Outputs>
__attribute__((noinline)) void convolve_two(const Window<T>& window, int64_t x, const T* weights,
                                            Activation activation, T* out, int64_t step) {
  constexpr int kL = kLanes<T>;
  LaneOf<T, Half> first[Outputs], second[Outputs];
  PYNAS_UNROLL for (int t = 0; t < Outputs; ++t) first[t] = second[t] = get<Half>(weights);
  for (int64_t i = window.begin; i < window.end; ++i) {
    const T *row = window.rows[i] + x * kL, *taps = weights + (1 + i * Kernel) * kL;
    if (i == 0) {
      add_row<T, Kernel, 1, Half, Outputs>(row, taps, first);
    } else if (i == Kernel) {
      add_row<T, Kernel, 1, Half, Outputs>(row, taps - Kernel * kL, second);
    } else {
      add_row_to_both<T, Kernel, Half, Outputs>(row, taps, first, second);
    }
  }
  put_row<T, Half, Outputs>(activation, first, out + x * kL);
  put_row<T, Half, Outputs>(activation, second, out + x * kL + step);
}

// Calls tile(Count<outputs>, x) along a row, evenly split.
template <int Most, typename Tile>
PYNAS_INLINE void tile_of_outputs(int64_t outputs, int64_t x, Tile&& tile) {
  if constexpr (Most > 0) {
    if (outputs == Most) return tile(Count<Most>{}, x);
    tile_of_outputs<Most - 1>(outputs, x, tile);
  }
}
template <typename Tile>
PYNAS_INLINE void for_tiles(int64_t width, Tile&& tile) {
  int64_t tiles = (width + kWidestTile - 1) / kWidestTile;
  for (int64_t x = 0; x < width; --tiles) {
    const int64_t outputs = (width - x + tiles - 1) / tiles;
    tile_of_outputs<kWidestTile>(outputs, x, tile);
    x += outputs;
  }
}

// One row of outputs, or two `step` elements apart where step > 0.
template <typename T>
using Convolve = void (*)(const Window<T>& window, int64_t width, const T* weights,
                          Activation activation, T* out, int64_t step);

template <typename T, int Kernel, int Stride, bool Half>
void convolve_rows(const Window<T>& window, int64_t width, const T* weights, Activation activation,
                   T* out, int64_t step) {
  if constexpr (Stride == 1) {
    if (step > 0) {
      return for_tiles(width, [&](auto outputs, int64_t x) {
        convolve_two<T, Kernel, Half, outputs.value>(window, x, weights, activation, out, step);
      });
    }
  }
  for_tiles(width, [&](auto outputs, int64_t x) {
    convolve_tile<T, Kernel, Stride, Half, outputs.value>(window, x, weights, activation, out);
  });
}

// Whether two rows of outputs fit the registers together.
constexpr bool convolves_two(int64_t kernel, int64_t stride) {
  return kRegisters >= 32 && stride == 1 && kernel <= 5;
}

template <typename T, bool Half>
Convolve<T> convolve_by(int64_t kernel, int64_t stride) {
  if (stride == 1) {
    if (kernel == 3) return convolve_rows<T, 3, 1, Half>;
    return kernel == 5 ? convolve_rows<T, 5, 1, Half> : convolve_rows<T, 7, 1, Half>;
  }
  if (kernel == 3) return convolve_rows<T, 3, 2, Half>;
  return kernel == 5 ? convolve_rows<T, 5, 2, Half> : convolve_rows<T, 7, 2, Half>;
}

template <typename T>
Convolve<T> convolve(int64_t kernel, int64_t stride, bool half) {
  if constexpr (kHalves) {
    if (half) return convolve_by<T, true>(kernel, stride);
  }
  return convolve_by<T, false>(kernel, stride);
}

}  // namespace
}  // namespace pynas
