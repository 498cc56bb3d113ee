// Depthwise convolution of one row of one vector of channels, and its gradients.
//
// A row holds its positions one after another, a vector of channels each, with as many zero
// positions before and after as the taps reach beyond. Weights are [kernel * kernel] vectors,
// `step` elements apart. The taps of a dilated convolution are `Dilation` positions apart, and so
// are its rows.
#pragma once

#include "simd.h"

namespace pynas {
namespace {

constexpr int kMostKernel = 7;

// Whether the inputs of a tile stay in registers through a row of taps, beside the sums.
template <int Kernel, int Stride, int Dilation, int Outputs>
constexpr bool inputs_fit() {
  return Stride == 1 && Outputs + (Kernel - 1) * Dilation + Outputs + 2 <= kRegisters;
}

template <typename T, int Kernel, int Stride, int Dilation, int Outputs>
PYNAS_INLINE void depthwise_tile(const T* const* rows, int64_t x, const T* weights, int64_t step,
                                 Vector<T> (&sums)[Outputs]) {
  constexpr int kL = kLanes<T>, kInputs = (Outputs - 1) * Stride + (Kernel - 1) * Dilation + 1;
  PYNAS_UNROLL for (int t = 0; t < Outputs; ++t) sums[t] = Vector<T>{};
  for (int ky = 0; ky < Kernel; ++ky) {
    const T* row = rows[ky] + x * Stride * kL;
    const T* w = weights + ky * Kernel * step;
    if constexpr (inputs_fit<Kernel, Stride, Dilation, Outputs>()) {
      Vector<T> inputs[kInputs];
      PYNAS_UNROLL for (int i = 0; i < kInputs; ++i) inputs[i] = load(row + i * kL);
      PYNAS_UNROLL for (int kx = 0; kx < Kernel; ++kx) {
        const Vector<T> tap = load(w + kx * step);
        PYNAS_UNROLL for (int t = 0; t < Outputs; ++t) {
          sums[t] += inputs[t * Stride + kx * Dilation] * tap;
        }
      }
    } else {
      PYNAS_UNROLL for (int kx = 0; kx < Kernel; ++kx) {
        const Vector<T> tap = load(w + kx * step);
        PYNAS_UNROLL for (int t = 0; t < Outputs; ++t) {
          sums[t] += load(row + (t * Stride + kx * Dilation) * kL) * tap;
        }
      }
    }
  }
}

// Calls put(x, i, value) for every output of a row, the i-th of those that are computed together.
// rows: the `Kernel` input rows that it needs.
template <typename T, int Kernel, int Stride, int Dilation = 1, typename Put>
PYNAS_INLINE void depthwise_row(const T* const* rows, int64_t width, const T* weights, int64_t step,
                                Put&& put) {
  int64_t x = 0;
  const auto some = [&](auto count) {
    constexpr int kCount = decltype(count)::value;
    Vector<T> sums[kCount];
    depthwise_tile<T, Kernel, Stride, Dilation, kCount>(rows, x, weights, step, sums);
    PYNAS_UNROLL for (int t = 0; t < kCount; ++t) put(x + t, t, sums[t]);
    x += kCount;
  };
  if (width % 7 == 0) {  // 7, 14 and 28: as networks for 224 pixels have them
    while (x < width) some(Count<7>{});
    return;
  }
  while (width - x >= 8) some(Count<8>{});
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
template <typename T, int Kernel, int Stride, int Dilation, int First, int Last>
PYNAS_INLINE void weight_rows(const T* const* rows, const T* gradient, int64_t width, T* sums) {
  constexpr int kL = kLanes<T>, kTaps = (Last - First) * Kernel;
  Vector<T> taps[kTaps];
  PYNAS_UNROLL for (int i = 0; i < kTaps; ++i) taps[i] = load(sums + (First * Kernel + i) * kL);
  for (int64_t x = 0; x < width; ++x) {
    const Vector<T> g = load(gradient + x * kL);
    PYNAS_UNROLL for (int ky = First; ky < Last; ++ky) {
      PYNAS_UNROLL for (int kx = 0; kx < Kernel; ++kx) {
        taps[(ky - First) * Kernel + kx] += g * load(rows[ky] + (x * Stride + kx * Dilation) * kL);
      }
    }
  }
  PYNAS_UNROLL for (int i = 0; i < kTaps; ++i) store(sums + (First * Kernel + i) * kL, taps[i]);
}

// Adds one row's part of the gradient of the weights, [taps] vectors. Rows of taps that do not fit
// the registers together, with room for the addresses, take several turns.
template <typename T, int Kernel, int Stride, int Dilation, int First = 0>
PYNAS_INLINE void depthwise_weights_row(const T* const* rows, const T* gradient, int64_t width,
                                        T* sums) {
  constexpr int kFit = larger(1, (kRegisters >= 32 ? 20 : 10) / Kernel);
  constexpr int kTurns = (Kernel + kFit - 1) / kFit, kRows = (Kernel + kTurns - 1) / kTurns;
  constexpr int kLast = smaller(Kernel, First + kRows);
  weight_rows<T, Kernel, Stride, Dilation, First, kLast>(rows, gradient, width, sums);
  if constexpr (kLast < Kernel) {
    depthwise_weights_row<T, Kernel, Stride, Dilation, kLast>(rows, gradient, width, sums);
  }
}

// The input rows around a row of outputs, for some vectors of channels.
template <typename T>
struct DepthwiseInput {
  const T* const* rows;  // of the first vector
  int64_t step;          // elements from a vector's row to the next vector's
  int64_t vectors, width;

  template <int Kernel>
  PYNAS_INLINE void of(int64_t vector, const T* (&to)[Kernel]) const {
    PYNAS_UNROLL for (int i = 0; i < Kernel; ++i) to[i] = rows[i] + vector * step;
  }
};

// The functions above for one kernel size and stride, chosen when the program runs.
template <typename T>
struct Depthwise {
  // One output row of each vector; `step` elements between taps. Adds what it holds more than
  // `shift`, and its square, to sums[v][0] and sums[v][1].
  void (*forward)(const DepthwiseInput<T>& in, const T* weights, int64_t step, T* out,
                  int64_t out_step, const T* shift, T* sums);
  void (*apply)(const DepthwiseInput<T>& in, const T* weights, int64_t step, T* out,
                int64_t out_step);
  void (*add)(const DepthwiseInput<T>& in, const T* weights, int64_t step, T* out,
              int64_t out_step);
  void (*weights)(const DepthwiseInput<T>& in, const T* gradient, int64_t gradient_step, T* sums,
                  int64_t sums_step);
  void (*backward_2)(const T* const* gradients, const int* taps_y, int count_y, int64_t width,
                     const T* weights, int64_t step, T* out);
};

template <typename T, int Kernel, int Stride, int Dilation = 1>
struct DepthwiseOf {
  static void forward(const DepthwiseInput<T>& in, const T* weights, int64_t step, T* out,
                      int64_t out_step, const T* shift, T* sums) {
    constexpr int kL = kLanes<T>;
    for (int64_t v = 0; v < in.vectors; ++v, out += out_step, sums += 2 * kL) {
      const T* rows[Kernel];
      in.of(v, rows);
      const Vector<T> origin = load(shift + v * kL);
      Vector<T> first[2] = {load(sums)}, second[2] = {load(sums + kL)};
      depthwise_row<T, Kernel, Stride, Dilation>(rows, in.width, weights + v * kL, step,
                                                 [&](int64_t x, int i, Vector<T> value) {
                                                   store(out + x * kL, value);
                                                   const Vector<T> more = value - origin;
                                                   first[i % 2] += more;
                                                   second[i % 2] += more * more;
                                                 });
      store(sums, first[0] + first[1]);
      store(sums + kL, second[0] + second[1]);
    }
  }
  static void apply(const DepthwiseInput<T>& in, const T* weights, int64_t step, T* out,
                    int64_t out_step) {
    constexpr int kL = kLanes<T>;
    for (int64_t v = 0; v < in.vectors; ++v, out += out_step) {
      const T* rows[Kernel];
      in.of(v, rows);
      depthwise_row<T, Kernel, Stride, Dilation>(
          rows, in.width, weights + v * kL, step,
          [&](int64_t x, int, Vector<T> value) { store(out + x * kL, value); });
    }
  }
  static void add(const DepthwiseInput<T>& in, const T* weights, int64_t step, T* out,
                  int64_t out_step) {
    constexpr int kL = kLanes<T>;
    for (int64_t v = 0; v < in.vectors; ++v, out += out_step) {
      const T* rows[Kernel];
      in.of(v, rows);
      depthwise_row<T, Kernel, Stride, Dilation>(rows, in.width, weights + v * kL, step,
                                                 [&](int64_t x, int, Vector<T> value) {
                                                   store(out + x * kL, load(out + x * kL) + value);
                                                 });
    }
  }
  static void weights(const DepthwiseInput<T>& in, const T* gradient, int64_t gradient_step,
                      T* sums, int64_t sums_step) {
    for (int64_t v = 0; v < in.vectors; ++v) {
      const T* rows[Kernel];
      in.of(v, rows);
      depthwise_weights_row<T, Kernel, Stride, Dilation>(rows, gradient + v * gradient_step,
                                                         in.width, sums + v * sums_step);
    }
  }
  static constexpr Depthwise<T> kTable = {forward, apply, add, weights,
                                          depthwise_backward_row_2<T, Kernel>};
};

// Calls act(kernel, stride) with numbers that the compiler knows.
template <typename Act>
PYNAS_INLINE auto with_convolution(int64_t kernel, int64_t stride, Act&& act) {
  if (stride == 1) {
    if (kernel == 3) return act(Count<3>{}, Count<1>{});
    return kernel == 5 ? act(Count<5>{}, Count<1>{}) : act(Count<7>{}, Count<1>{});
  }
  if (kernel == 3) return act(Count<3>{}, Count<2>{});
  return kernel == 5 ? act(Count<5>{}, Count<2>{}) : act(Count<7>{}, Count<2>{});
}

template <typename T>
Depthwise<T> depthwise(int64_t kernel, int64_t stride) {
  return with_convolution(kernel, stride, [](auto k, auto s) {
    return DepthwiseOf<T, decltype(k)::value, decltype(s)::value>::kTable;
  });
}

}  // namespace
}  // namespace pynas
