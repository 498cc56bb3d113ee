// What the backward pass does with a depthwise convolution's results while they are in registers.
//
// g is the gradient of the second norm's output, after the activation behind it: what the last
// convolution hands down, through that activation. Lines and rows hold a vector's positions one
// after another; all functions take some vectors of channels.
#pragma once

#include "activation.h"
#include "depthwise.h"

namespace pynas {
namespace {

// The gradient of what a batch norm reads, by channel: times * g + square * read + constant, with g
// the gradient of what it gives.
template <typename T>
struct NormGradient {
  T *times, *square, *constant;

  NormGradient from(int64_t channel) const {
    return {times + channel, square + channel, constant + channel};
  }
  void clear(int64_t c) const { times[c] = square[c] = constant[c] = 0; }
  // scale: the norm's, with 1 / deviation; sum, against: of g, and of g times what is read less
  // mean.
  void set(int64_t c, T scale, T mean, double rstd, double sum, double against,
           int64_t count) const {
    const double s = static_cast<double>(scale), n = static_cast<double>(count);
    const double q = -s * rstd * rstd * against / n;
    times[c] = scale;
    square[c] = static_cast<T>(q);
    constant[c] = static_cast<T>(-s * sum / n - q * static_cast<double>(mean));
  }
};

// One row of it, of some vectors.
template <typename T>
void norm_back(const NormGradient<T>& norm, int64_t vectors, int64_t width, const T* gradient,
               const T* read, int64_t step, T* to, int64_t to_step) {
  constexpr int64_t kL = kLanes<T>;
  for (int64_t v = 0; v < vectors; ++v, gradient += step, read += step, to += to_step) {
    const Vector<T> times = load(norm.times + v * kL), square = load(norm.square + v * kL);
    const Vector<T> constant = load(norm.constant + v * kL);
    for (int64_t x = 0; x < width * kL; x += kL) {
      store(to + x, load(gradient + x) * times + (load(read + x) * square + constant));
    }
  }
}

// From the gradient of the hidden channels after the second activation, for one row of outputs.
template <typename T>
struct OuterRow {
  DepthwiseInput<T> in;
  const T* weights;
  int64_t step;           // elements between taps
  const T *scale, *bias;  // of the second norm
  T* gradient;            // read
  int64_t gradient_step;  // elements from a vector to the next
  // sums() writes g over `gradient`, what the last convolution read to `hidden`, and the
  // convolution's results to `values` unless that is null.
  T *hidden, *values;
  int64_t hidden_step;  // `values` go with `gradient`
  const T* mean;
  T* sums;  // [vector][2]: of g, and of g times the result's deviation from `mean`
  // back() writes the gradient of the convolution's results.
  NormGradient<T> norm;
  T* back;
  int64_t back_step;
};

// The gradient of a row of the convolution's input (stride 1), through the activation before it.
template <typename T>
struct InnerRow {
  DepthwiseInput<T> in;  // rows of the gradient of its results
  const T* weights;      // the taps in reverse
  int64_t step;
  // Of that activation: results; and slopes, or null where results tell them.
  const T *output, *slopes;
  int64_t output_step;
  // inner_raw() has instead what its norm read: raw * scale + bias went into the activation.
  const T *raw, *scale, *bias, *mean;  // `raw` goes with `output`
  T* out;
  int64_t out_step;
  // [vector][2]: of the gradient, and of that times `output`, or times the deviation of `raw` from
  // `mean`.
  T* sums;
};

template <typename T>
struct DepthwiseGradient {
  void (*sums)(const OuterRow<T>&);
  void (*back)(const OuterRow<T>&);
  void (*inner)(const InnerRow<T>&);  // these two: null at stride 2
  void (*inner_raw)(const InnerRow<T>&);
};

template <typename T, int Kernel, int Stride, Activation Kind>
struct DepthwiseGradientOf {
  static constexpr int kL = kLanes<T>;

  static void sums(const OuterRow<T>& row) {
    for (int64_t v = 0; v < row.in.vectors; ++v) {
      const T* rows[Kernel];
      row.in.of(v, rows);
      const Vector<T> scale = load(row.scale + v * kL), bias = load(row.bias + v * kL);
      const Vector<T> mean = load(row.mean + v * kL);
      T *gradient = row.gradient + v * row.gradient_step,
        *hidden = row.hidden + v * row.hidden_step;
      T* values = row.values ? row.values + v * row.gradient_step : nullptr;
      T* to = row.sums + v * 2 * kL;
      // Two chains of sums: neither waits for itself.
      Vector<T> sum[2] = {load(to)}, against[2] = {load(to + kL)};
      depthwise_row<T, Kernel, Stride>(rows, row.in.width, row.weights + v * kL, row.step,
                                       [&](int64_t x, int i, Vector<T> value) {
                                         const Vector<T> t = value * scale + bias;
                                         const Vector<T> g =
                                             through<T>(Kind, load(gradient + x * kL), t);
                                         store(gradient + x * kL, g);
                                         store(hidden + x * kL, activate<T>(Kind, t));
                                         if (values) store(values + x * kL, value);
                                         sum[i % 2] += g;
                                         against[i % 2] += g * (value - mean);
                                       });
      store(to, sum[0] + sum[1]);
      store(to + kL, against[0] + against[1]);
    }
  }

  static void back(const OuterRow<T>& row) {
    for (int64_t v = 0; v < row.in.vectors; ++v) {
      const T* rows[Kernel];
      row.in.of(v, rows);
      const Vector<T> scale = load(row.scale + v * kL), bias = load(row.bias + v * kL);
      const Vector<T> times = load(row.norm.times + v * kL),
                      square = load(row.norm.square + v * kL);
      const Vector<T> constant = load(row.norm.constant + v * kL);
      const T* gradient = row.gradient + v * row.gradient_step;
      T* back = row.back + v * row.back_step;
      depthwise_row<T, Kernel, Stride>(
          rows, row.in.width, row.weights + v * kL, row.step, [&](int64_t x, int, Vector<T> value) {
            const Vector<T> g = through<T>(Kind, load(gradient + x * kL), value * scale + bias);
            store(back + x * kL, g * times + (value * square + constant));
          });
    }
  }

  static void inner(const InnerRow<T>& row) {
    for (int64_t v = 0; v < row.in.vectors; ++v) {
      const T* rows[Kernel];
      row.in.of(v, rows);
      const T* output = row.output + v * row.output_step;
      const T* slopes = row.slopes ? row.slopes + v * row.output_step : nullptr;
      T *out = row.out + v * row.out_step, *to = row.sums + v * 2 * kL;
      Vector<T> sum[2] = {load(to)}, against[2] = {load(to + kL)};
      depthwise_row<T, Kernel, 1>(rows, row.in.width, row.weights + v * kL, row.step,
                                  [&](int64_t x, int i, Vector<T> value) {
                                    const Vector<T> result = load(output + x * kL);
                                    const Vector<T> g = slope_from_output(Kind)
                                                            ? through<T>(Kind, value, result)
                                                            : value * load(slopes + x * kL);
                                    store(out + x * kL, g);
                                    sum[i % 2] += g;
                                    against[i % 2] += g * result;
                                  });
      store(to, sum[0] + sum[1]);
      store(to + kL, against[0] + against[1]);
    }
  }

  static void inner_raw(const InnerRow<T>& row) {
    for (int64_t v = 0; v < row.in.vectors; ++v) {
      const T* rows[Kernel];
      row.in.of(v, rows);
      const Vector<T> scale = load(row.scale + v * kL), bias = load(row.bias + v * kL);
      const Vector<T> mean = load(row.mean + v * kL);
      const T* raw = row.raw + v * row.output_step;
      T *out = row.out + v * row.out_step, *to = row.sums + v * 2 * kL;
      Vector<T> sum[2] = {load(to)}, against[2] = {load(to + kL)};
      depthwise_row<T, Kernel, 1>(rows, row.in.width, row.weights + v * kL, row.step,
                                  [&](int64_t x, int i, Vector<T> value) {
                                    const Vector<T> u = load(raw + x * kL);
                                    const Vector<T> g = through<T>(Kind, value, u * scale + bias);
                                    store(out + x * kL, g);
                                    sum[i % 2] += g;
                                    against[i % 2] += g * (u - mean);
                                  });
      store(to, sum[0] + sum[1]);
      store(to + kL, against[0] + against[1]);
    }
  }

  static DepthwiseGradient<T> table() {
    if constexpr (Stride == 2) {
      return {sums, back, nullptr, nullptr};
    } else {
      return {sums, back, inner, inner_raw};
    }
  }
};

template <typename T>
DepthwiseGradient<T> depthwise_gradient(int64_t kernel, int64_t stride, Activation kind) {
  DepthwiseGradient<T> found;
  with_activation(kind, [&](auto a) {
    found = with_convolution(kernel, stride, [](auto k, auto s) {
      return DepthwiseGradientOf<T, decltype(k)::value, decltype(s)::value,
                                 decltype(a)::value>::table();
    });
  });
  return found;
}

}  // namespace
}  // namespace pynas
