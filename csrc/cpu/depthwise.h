// Depthwise convolution of one row of one vector of channels, and its gradients.
//
// A row holds its positions one after another, a vector of channels each, with kernel / 2 zero
// positions before and after. Weights are [kernel * kernel] vectors, `step` elements apart.
#pragma once

#include "simd.h"

namespace pynas {
namespace {

constexpr int kMostKernel = 7;

template <typename T, int Kernel, int Stride, int Outputs>
PYNAS_INLINE void depthwise_tile(const T* const* rows, int64_t x, const T* weights, int64_t step,
                                 Vector<T> (&sums)[Outputs]) {
  constexpr int kL = kLanes<T>;
  PYNAS_UNROLL for (int t = 0; t < Outputs; ++t) sums[t] = Vector<T>{};
  for (int ky = 0; ky < Kernel; ++ky) {
    const T* row = rows[ky] + x * Stride * kL;
    const T* w = weights + ky * Kernel * step;
    PYNAS_UNROLL for (int kx = 0; kx < Kernel; ++kx) {
      const Vector<T> tap = load(w + kx * step);
      PYNAS_UNROLL for (int t = 0; t < Outputs; ++t) {
        sums[t] += load(row + (t * Stride + kx) * kL) * tap;
      }
    }
  }
}

// Calls put(x, value) for every output of a row. rows: the `Kernel` input rows that it needs.
template <typename T, int Kernel, int Stride, typename Put>
PYNAS_INLINE void depthwise_row(const T* const* rows, int64_t width, const T* weights, int64_t step,
                                Put&& put) {
  int64_t x = 0;
  const auto some = [&](auto count) {
    constexpr int kCount = decltype(count)::value;
    Vector<T> sums[kCount];
    depthwise_tile<T, Kernel, Stride, kCount>(rows, x, weights, step, sums);
    PYNAS_UNROLL for (int t = 0; t < kCount; ++t) put(x + t, sums[t]);
    x += kCount;
  };
  while (width - x >= 8) some(Count<8>{});
  if (width - x >= 7) some(Count<7>{});
  if (width - x >= 4) some(Count<4>{});
  if (width - x >= 2) some(Count<2>{});
  if (width - x >= 1) some(Count<1>{});
}

// Gradient of one row of the input of a convolution of stride 2, before masking.
//
// Output position o was reached from input position i through tap i + pad - 2 o, so positions of
// one parity share their taps: every second one, or the ones between.
template <typename T, int Kernel>
void depthwise_backward_row_2(const T* const* gradients, const int* taps_y, int count_y,
                              int64_t width, const T* weights, int64_t step, T* out) {
  constexpr int kL = kLanes<T>, kPad = Kernel / 2, kTile = 4;
  for (int parity = 0; parity < 2; ++parity) {
    const int first = (parity + kPad) % 2;
    const int64_t outputs = (width - parity + 1) / 2, shift = (parity + kPad - first) / 2 + kPad;
    for (int64_t t0 = 0; t0 < outputs; t0 += kTile) {
      Vector<T> sums[kTile] = {};
      for (int i = 0; i < count_y; ++i) {
        for (int kx = first; kx < Kernel; kx += 2) {
          const Vector<T> tap = load(weights + (taps_y[i] * Kernel + kx) * step);
          const T* from = gradients[i] + (t0 + shift - kx / 2) * kL;
          PYNAS_UNROLL for (int t = 0; t < kTile; ++t) sums[t] += load(from + t * kL) * tap;
        }
      }
      const int64_t count = smaller<int64_t>(kTile, outputs - t0);
      for (int64_t t = 0; t < count; ++t) store(out + (2 * (t0 + t) + parity) * kL, sums[t]);
    }
  }
}

// sums[ky][kx] += gradient * input over one row of outputs, for the rows of taps First .. Last - 1.
template <typename T, int Kernel, int Stride, int First, int Last>
PYNAS_INLINE void weight_rows(const T* const* rows, const T* gradient, int64_t width, T* sums) {
  constexpr int kL = kLanes<T>, kTaps = (Last - First) * Kernel;
  Vector<T> taps[kTaps];
  PYNAS_UNROLL for (int i = 0; i < kTaps; ++i) taps[i] = load(sums + (First * Kernel + i) * kL);
  for (int64_t x = 0; x < width; ++x) {
    const Vector<T> g = load(gradient + x * kL);
    PYNAS_UNROLL for (int ky = First; ky < Last; ++ky) {
      PYNAS_UNROLL for (int kx = 0; kx < Kernel; ++kx) {
        taps[(ky - First) * Kernel + kx] += g * load(rows[ky] + (x * Stride + kx) * kL);
      }
    }
  }
  PYNAS_UNROLL for (int i = 0; i < kTaps; ++i) store(sums + (First * Kernel + i) * kL, taps[i]);
}

// Adds one row's part of the gradient of the weights, [taps] vectors. Rows of taps that do not fit
// the registers together, with room for the addresses, take several turns.
template <typename T, int Kernel, int Stride, int First = 0>
PYNAS_INLINE void depthwise_weights_row(const T* const* rows, const T* gradient, int64_t width,
                                        T* sums) {
  constexpr int kFit = larger(1, (kRegisters >= 32 ? 20 : 10) / Kernel);
  constexpr int kTurns = (Kernel + kFit - 1) / kFit, kRows = (Kernel + kTurns - 1) / kTurns;
  constexpr int kLast = smaller(Kernel, First + kRows);
  weight_rows<T, Kernel, Stride, First, kLast>(rows, gradient, width, sums);
  if constexpr (kLast < Kernel) {
    depthwise_weights_row<T, Kernel, Stride, kLast>(rows, gradient, width, sums);
  }
}

// The functions above for one kernel size and stride, chosen when the program runs.
template <typename T>
struct Depthwise {
  // One output row. Adds what it holds more than `shift`, and its square, to sums[0] and sums[1].
  void (*forward)(const T* const* rows, int64_t width, const T* weights, int64_t step, T* out,
                  const T* shift, T* sums);
  void (*apply)(const T* const* rows, int64_t width, const T* weights, int64_t step, T* out);
  void (*weights)(const T* const* rows, const T* gradient, int64_t width, T* sums);
  void (*backward_2)(const T* const* gradients, const int* taps_y, int count_y, int64_t width,
                     const T* weights, int64_t step, T* out);
};

template <typename T, int Kernel, int Stride>
struct DepthwiseOf {
  static void forward(const T* const* rows, int64_t width, const T* weights, int64_t step, T* out,
                      const T* shift, T* sums) {
    const Vector<T> origin = load(shift);
    Vector<T> first = load(sums), second = load(sums + kLanes<T>);
    depthwise_row<T, Kernel, Stride>(rows, width, weights, step, [&](int64_t x, Vector<T> value) {
      store(out + x * kLanes<T>, value);
      const Vector<T> more = value - origin;
      first += more;
      second += more * more;
    });
    store(sums, first);
    store(sums + kLanes<T>, second);
  }
  static void apply(const T* const* rows, int64_t width, const T* weights, int64_t step, T* out) {
    depthwise_row<T, Kernel, Stride>(rows, width, weights, step, [&](int64_t x, Vector<T> value) {
      store(out + x * kLanes<T>, value);
    });
  }
  static void weights(const T* const* rows, const T* gradient, int64_t width, T* sums) {
    depthwise_weights_row<T, Kernel, Stride>(rows, gradient, width, sums);
  }
  static constexpr Depthwise<T> kTable = {forward, apply, weights,
                                          depthwise_backward_row_2<T, Kernel>};
};

template <typename T>
Depthwise<T> depthwise(int64_t kernel, int64_t stride) {
  if (stride == 1) {
    if (kernel == 3) return DepthwiseOf<T, 3, 1>::kTable;
    return kernel == 5 ? DepthwiseOf<T, 5, 1>::kTable : DepthwiseOf<T, 7, 1>::kTable;
  }
  if (kernel == 3) return DepthwiseOf<T, 3, 2>::kTable;
  return kernel == 5 ? DepthwiseOf<T, 5, 2>::kTable : DepthwiseOf<T, 7, 2>::kTable;
}

}  // namespace
}  // namespace pynas
