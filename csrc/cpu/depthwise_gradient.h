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

// From the gradient of the hidden channels after the second activation, for one row of outputs.
template <typename T>
struct OuterRow {
  DepthwiseInput<T> in;
  const T* weights;
  int64_t step;            // elements between taps
  const T *scale, *bias;   // of the second norm
  T* gradient;             // read
  int64_t gradient_step;   // elements from a vector to the next
  // sums() writes g over `gradient`, what the last convolution read to `hidden`, and the
  // convolution's results to `values` unless that is null.
  T *hidden, *values;
  int64_t hidden_step;     // `values` go with `gradient`
  const T* mean;
  T* sums;                 // [vector][2]: of g, and of g times the result's deviation from `mean`
  // back() writes the gradient of the convolution's results, times * g + square * result + constant.
  const T *times, *square, *constant;
  T* back;
  int64_t back_step;
};

// The gradient of a row of the convolution's input (stride 1), through the activation before it.
template <typename T>
struct InnerRow {
  DepthwiseInput<T> in;    // rows of the gradient of its results
  const T* weights;        // the taps in reverse
  int64_t step;
  const T *output, *slopes;  // of that activation: results; slopes, or null where results tell them
  int64_t output_step;
  T* out;
  int64_t out_step;
  T* sums;                 // [vector][2]: of the gradient, and of that times `output`
};

template <typename T>
struct DepthwiseGradient {
  void (*sums)(const OuterRow<T>&);
  void (*back)(const OuterRow<T>&);
  void (*inner)(const InnerRow<T>&);
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
      T *gradient = row.gradient + v * row.gradient_step, *hidden = row.hidden + v * row.hidden_step;
      T* values = row.values ? row.values + v * row.gradient_step : nullptr;
      T* to = row.sums + v * 2 * kL;
      // Two chains of sums: neither waits for itself.
      Vector<T> sum[2] = {load(to)}, against[2] = {load(to + kL)};
      depthwise_row<T, Kernel, Stride>(
          rows, row.in.width, row.weights + v * kL, row.step,
          [&](int64_t x, int i, Vector<T> value) {
            const Vector<T> t = value * scale + bias;
            const Vector<T> g = through<T>(Kind, load(gradient + x * kL), t);
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
      const Vector<T> times = load(row.times + v * kL), square = load(row.square + v * kL);
      const Vector<T> constant = load(row.constant + v * kL);
      const T* gradient = row.gradient + v * row.gradient_step;
      T* back = row.back + v * row.back_step;
      depthwise_row<T, Kernel, Stride>(
          rows, row.in.width, row.weights + v * kL, row.step,
          [&](int64_t x, int, Vector<T> value) {
            const Vector<T> g =
                through<T>(Kind, load(gradient + x * kL), value * scale + bias);
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
      depthwise_row<T, Kernel, 1>(
          rows, row.in.width, row.weights + v * kL, row.step,
          [&](int64_t x, int i, Vector<T> value) {
            const Vector<T> result = load(output + x * kL);
            const Vector<T> g =
                slope_from_output(Kind) ? through<T>(Kind, value, result) : value * load(slopes + x * kL);
            store(out + x * kL, g);
            sum[i % 2] += g;
            against[i % 2] += g * result;
          });
      store(to, sum[0] + sum[1]);
      store(to + kL, against[0] + against[1]);
    }
  }

  static constexpr DepthwiseGradient<T> kTable = {sums, back, inner};
};

template <typename T>
DepthwiseGradient<T> depthwise_gradient(int64_t kernel, int64_t stride, Activation kind) {
  DepthwiseGradient<T> found;
  with_activation(kind, [&](auto a) {
    found = with_convolution(kernel, stride, [](auto k, auto s) {
      return DepthwiseGradientOf<T, decltype(k)::value, decltype(s)::value, decltype(a)::value>::kTable;
    });
  });
  return found;
}

}  // namespace
}  // namespace pynas
