// The backward pass, through the hidden channels of a slice.
#pragma once

#include "mbconv_backward_pass.h"

namespace pynas {
namespace {

// Down to the output of the second norm, whose sums this gathers; and the gradient of the last
// convolution.
template <typename T>
void MbBackwardPass<T>::first_half(const MbOption<T>& option, int64_t first, int64_t channels,
                                   int64_t index, int64_t worker) {
  const int64_t vectors = channels / kLanes<T>, out = s_.out_channels, wide = layout_.out_padded;
  const Expander<T> expander = expander_of(option, first, vectors, worker);
  const Share share = layout_.share(index);
  if (first_slice_) clear_pads(expander.rows, share);
  T* hidden = bands_ + worker * larger(in_room_, out_room_) * slice_;
  T* project_sums = project_sums_ + index * out * slice_;
  memset(project_sums, 0, static_cast<size_t>(out * slice_) * sizeof(T));
  double* of_share = sums_.at(index, 0);
  memset(of_share, 0, static_cast<size_t>(kSums * slice_) * sizeof(double));
  int64_t have = 0;
  layout_.for_out_bands(share, Way::kUp, [&](const Band& band) {
    if (first_slice_) product_gradient(band);
    const Lines<T> values = lines_at(values_, worker, band.first_row());
    const Lines<T> gradients = lines_at(gradients_, worker, band.first_row());
    have = lines_of(option, expander, band, have, values, gradients);
    hidden_gradient(band, first, vectors, values, gradients, hidden, of_share);
    if (!args_.gradients) return;
    const Gemm<T> across{1,          band.positions(),      1,      0,         wide,
                         kLanes<T>,  out_room_ * kLanes<T>, slice_, kLanes<T>, nullptr,
                         Start::kAdd};
    gemm(out, vectors, across, product_gradient_ + band.begin() * wide, hidden, project_sums);
  });
}

// Over a band: gradients of what the last convolution read, and what the depthwise one gives.
// Returns how many hidden rows of the image there are.
template <typename T>
int64_t MbBackwardPass<T>::lines_of(const MbOption<T>& option, const Expander<T>& expander,
                                    const Band& band, int64_t have, const Lines<T>& values,
                                    const Lines<T>& gradients) {
  const int64_t out = s_.out_channels, wide = layout_.out_padded, pad = option.kernel / 2;
  const Gemm<T> down{
      1, out, wide, 0, 1, packed_.room, kLanes<T>, 0, gradients.vector_step(), out_scatter_};
  gemm(band.positions(), expander.vectors, down, product_gradient_ + band.begin() * wide,
       packed_.project + expander.first, gradients.line(band.first_row(), 0));
  const int64_t had = band.y0 == 0 ? 0 : have;
  have = expander.expand_for(band, option.kernel, have, slot(band.n0, band));
  if (slopes_) keep_slopes(band, expander.rows, had, have, expander.vectors);
  const Depthwise<T> convolution = depthwise<T>(option.kernel, s_.stride);
  const T* window[kMostKernel];
  for (int64_t row = 0; row < band.rows(); ++row) {
    const int64_t n = slot(band.n0 + row / (band.y1 - band.y0), band);
    const int64_t y = band.y0 + row % (band.y1 - band.y0);
    for (int64_t v = 0; v < expander.vectors; ++v) {
      expander.rows.window(n, v, y * s_.stride - pad, option.kernel, s_.height, window);
      convolution.apply(window, band.width, packed_.depthwise + expander.first + v * kLanes<T>,
                        packed_.room, values.line(band.first_row() + row, v));
    }
  }
  return have;
}

template <typename T>
Expander<T> MbBackwardPass<T>::expander_of(const MbOption<T>& option, int64_t first,
                                           int64_t vectors, int64_t worker) const {
  return {s_,       args_.x,
          packed_,  first,
          vectors,  hidden_rows(option, worker),
          scatter_, slopes_ ? Activation::kNone : s_.activation};
}

template <typename T>
void MbBackwardPass<T>::clear_pads(const Rows<T>& rows, const Share& share) const {
  const int64_t n0 = stored_ ? share.n0 : 0;
  const int64_t n1 = stored_ ? share.n1 : layout_.images_at_once();
  for (int64_t n = n0; n < n1; ++n) rows.clear_pads(n);
}

// Turns outputs that went through no activation into those that did, and keeps its slopes.
template <typename T>
void MbBackwardPass<T>::keep_slopes(const Band& band, const Rows<T>& rows, int64_t from, int64_t to,
                                    int64_t vectors) {
  Rows<T> slopes = rows;
  slopes.data = slope_rows_ + (rows.data - hidden_rows_);
  for (int64_t n = band.n0; n < band.n1; ++n) {
    for (int64_t v = 0; v < vectors; ++v) {
      for (int64_t y = from; y < to; ++y) {
        T* line = rows.inside(slot(n, band), v, y);
        T* slope_line = slopes.inside(slot(n, band), v, y);
        for (int64_t i = 0; i < s_.width * kLanes<T>; i += kLanes<T>) {
          const Vector<T> t = load(line + i);
          store(slope_line + i, slope<T>(s_.activation, t));
          store(line + i, activate<T>(s_.activation, t));
        }
      }
    }
  }
}

template <typename T>
void MbBackwardPass<T>::hidden_gradient(const Band& band, int64_t first, int64_t vectors,
                                        const Lines<T>& values, const Lines<T>& gradients,
                                        T* hidden, double* of_share) {
  alignas(kVectorBytes) T sums[kMostSlice<T>][2 * kLanes<T>] = {};
  with_activation(s_.activation, [&](auto kind) {
    for (int64_t row = 0; row < band.rows(); ++row) {
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t at = first + v * kLanes<T>;
        const Vector<T> scale = load(packed_.scale2 + at), bias = load(packed_.bias2 + at);
        const Vector<T> mean = load(mean2_ + at);
        const T* value = values.line(band.first_row() + row, v);
        T* gradient = gradients.line(band.first_row() + row, v);
        T* to = hidden + (v * out_room_ + row * band.width) * kLanes<T>;
        Vector<T> sum[2] = {load(sums[v])}, against[2] = {load(sums[v] + kLanes<T>)};
        const auto one = [&](int64_t x,
                             int chain) {  // two chains of sums: neither waits for itself
          const int64_t i = x * kLanes<T>;
          const Vector<T> here = load(value + i), t = here * scale + bias;
          const Vector<T> g = through<T>(kind.value, load(gradient + i), t);
          store(gradient + i, g);
          store(to + i, activate<T>(kind.value, t));
          sum[chain] += g;
          against[chain] += g * (here - mean);
        };
        int64_t x = 0;
        for (; x + 2 <= band.width; x += 2) one(x, 0), one(x + 1, 1);
        if (x < band.width) one(x, 0);
        store(sums[v], sum[0] + sum[1]);
        store(sums[v] + kLanes<T>, against[0] + against[1]);
      }
    }
  });
  for (int64_t v = 0; v < vectors; ++v) {
    add_to<T>(of_share + v * kLanes<T>, load(sums[v]));
    add_to<T>(of_share + slice_ + v * kLanes<T>, load(sums[v] + kLanes<T>));
  }
}

// The same without the sums, where both are computed a second time.
template <typename T>
void MbBackwardPass<T>::mask(const Band& band, int64_t first, int64_t vectors,
                             const Lines<T>& values, const Lines<T>& gradients) {
  with_activation(s_.activation, [&](auto kind) {
    for (int64_t row = 0; row < band.rows(); ++row) {
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t at = first + v * kLanes<T>;
        const Vector<T> scale = load(packed_.scale2 + at), bias = load(packed_.bias2 + at);
        const T* value = values.line(band.first_row() + row, v);
        T* gradient = gradients.line(band.first_row() + row, v);
        for (int64_t i = 0; i < band.width * kLanes<T>; i += kLanes<T>) {
          const Vector<T> t = load(value + i) * scale + bias;
          store(gradient + i, through<T>(kind.value, load(gradient + i), t));
        }
      }
    }
  });
}

// gradient of the depthwise output = scale2 * g + square2 * value + constant2.
template <typename T>
void MbBackwardPass<T>::second_norm(const MbGradients<T>* to, const Statistics<T>& of,
                                    int64_t first, int64_t channels) {
  const auto count = static_cast<double>(layout_.positions);
  for (int64_t c = 0; c < channels; ++c) {
    const int64_t j = first + c;
    scale2_[c] = packed_.scale2[j];
    square2_[c] = constant2_[c] = 0;
    if (j >= packed_.hidden) continue;
    const double sum = sums_.total(layout_.shares, kGradient2, c);
    const double against = sums_.total(layout_.shares, kAgainst2, c);
    const double rstd = rstd_of(of.variance2[j], s_.eps), scale = static_cast<double>(scale2_[c]);
    const double square = -scale * rstd * rstd * against / count;
    square2_[c] = static_cast<T>(square);
    constant2_[c] =
        static_cast<T>(-scale * sum / count - square * static_cast<double>(of.mean2[j]));
    if (to) {
      to->scale2[j] = static_cast<T>(against * rstd);
      to->shift2[j] = static_cast<T>(sum);
    }
  }
}

// From the depthwise convolution down to the input, and the sums for the weights.
template <typename T>
void MbBackwardPass<T>::second_half(const MbOption<T>& option, int64_t first, int64_t channels,
                                    int64_t index, int64_t worker) {
  const int64_t vectors = channels / kLanes<T>, in = s_.in_channels, wide = layout_.in_padded;
  const Expander<T> expander = expander_of(option, first, vectors, worker);
  const Rows<T> gradients = gradient_rows(option, worker);
  for (int64_t n = 0; n < layout_.images_at_once(); ++n) gradients.clear_pads(n);
  if (!stored_) clear_pads(expander.rows, layout_.share(index));
  T* lines = bands_ + worker * larger(in_room_, out_room_) * slice_;
  T* expand_sums = expand_sums_ + index * in * slice_;
  memset(expand_sums, 0, static_cast<size_t>(in * slice_) * sizeof(T));
  T* depthwise_sums = depthwise_sums_ + index * taps_ * slice_;
  memset(depthwise_sums, 0, static_cast<size_t>(taps_ * slice_) * sizeof(T));
  const Gemm<T> up{vectors, kLanes<T>, kLanes<T>, in_room_ * kLanes<T>, 1, wide, kLanes<T>,
                   wide,    kLanes<T>, nullptr,   Start::kAdd};
  int64_t done = 0, have = 0;  // rows of this image: of the outputs, and of the hidden channels
  layout_.for_in_bands(layout_.share(index), Way::kDown, [&](const Band& band) {
    if (band.y0 == 0) done = have = 0;
    const int64_t need =
        smaller(layout_.out_height, (band.y1 - 1 + option.kernel / 2) / s_.stride + 1);
    if (need > done) {
      const Band part{band.n0, band.n1, done, need, layout_.out_width, layout_.out_height};
      const Lines<T> values = lines_at(values_, worker, part.first_row());
      const Lines<T> outer = lines_at(gradients_, worker, part.first_row());
      if (!stored_) {
        have = lines_of(option, expander, part, have, values, outer);
        mask(part, first, vectors, values, outer);
      }
      convolution_gradient(option, part, vectors, expander.rows, values, outer, gradients,
                           depthwise_sums);
      done = need;
    }
    input_rows(option, band, first, vectors, expander.rows, gradients, lines,
               sums_.at(index, kGradient1));
    if (needs_expand_sums()) {
      const Gemm<T> across{1,          band.positions(),     1,      0,         in,
                           kLanes<T>,  in_room_ * kLanes<T>, slice_, kLanes<T>, nullptr,
                           Start::kAdd};
      gemm(in, vectors, across, args_.x + band.begin() * in, lines, expand_sums);
    }
    if (args_.x_gradient) {
      gemm(band.positions(), wide / kLanes<T>, up, lines, packed_.folded_rows + first * wide,
           input_gradient_ + band.begin() * wide);
    }
  });
}

// Rows of the gradient of the depthwise output, and their part of the gradient of the convolution.
template <typename T>
void MbBackwardPass<T>::convolution_gradient(const MbOption<T>& option, const Band& part,
                                             int64_t vectors, const Rows<T>& hidden,
                                             const Lines<T>& values, const Lines<T>& gradients,
                                             const Rows<T>& to, T* sums) {
  const int64_t pad = option.kernel / 2;
  const Depthwise<T> convolution = depthwise<T>(option.kernel, s_.stride);
  const T* window[kMostKernel];
  for (int64_t i = 0; i < part.rows(); ++i) {
    const int64_t n = i / (part.y1 - part.y0), y = part.y0 + i % (part.y1 - part.y0);
    const int64_t row = (part.n0 + n) * part.height + y;
    for (int64_t v = 0; v < vectors; ++v) {
      const Vector<T> scale = load(scale2_ + v * kLanes<T>);
      const Vector<T> square = load(square2_ + v * kLanes<T>);
      const Vector<T> constant = load(constant2_ + v * kLanes<T>);
      const T *gradient = gradients.line(row, v), *value = values.line(row, v);
      T* line = to.inside(n, v, y);
      for (int64_t x = 0; x < part.width * kLanes<T>; x += kLanes<T>) {
        store(line + x, load(gradient + x) * scale + load(value + x) * square + constant);
      }
      if (!args_.gradients) continue;
      hidden.window(slot(part.n0 + n, part), v, y * s_.stride - pad, option.kernel, s_.height,
                    window);
      convolution.weights(window, line, part.width, sums + v * taps_ * kLanes<T>);
    }
  }
}

// Gradient of the first norm's output, over a band of inputs, and its sum.
template <typename T>
void MbBackwardPass<T>::input_rows(const MbOption<T>& option, const Band& band, int64_t first,
                                   int64_t vectors, const Rows<T>& hidden, const Rows<T>& gradients,
                                   T* lines, double* of_share) {
  const int64_t pad = option.kernel / 2, kernel = option.kernel;
  const Depthwise<T> convolution = depthwise<T>(kernel, s_.stride);
  const T* window[kMostKernel];
  alignas(kVectorBytes) T sums[kMostSlice<T>][2 * kLanes<T>] = {};
  for (int64_t row = 0; row < band.rows(); ++row) {
    const int64_t n = band.n0 + row / (band.y1 - band.y0);
    const int64_t y = band.y0 + row % (band.y1 - band.y0);
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t at = first + v * kLanes<T>;
      T* line = lines + (v * in_room_ + row * band.width) * kLanes<T>;
      if (s_.stride == 1) {
        gradients.window(n - band.n0, v, y - pad, kernel, layout_.out_height, window);
        convolution.apply(window, band.width, packed_.flipped + at, packed_.room, line);
      } else {
        int taps[kMostKernel], count = 0;
        for (int64_t ky = (y + pad) % 2; ky < kernel; ky += 2) {
          const int64_t from = (y + pad - ky) / 2;
          if (y + pad < ky || from >= layout_.out_height) continue;
          taps[count] = static_cast<int>(ky);
          window[count++] = gradients.row(n - band.n0, v, from);
        }
        convolution.backward_2(window, taps, count, band.width, packed_.depthwise + at,
                               packed_.room, line);
      }
      const T* output = hidden.inside(slot(n, band), v, y);
      const T* slopes = slopes_ ? slope_rows_ + (output - hidden_rows_) : nullptr;
      Vector<T> sum = load(sums[v]), against = load(sums[v] + kLanes<T>);
      for (int64_t i = 0; i < band.width * kLanes<T>; i += kLanes<T>) {
        const Vector<T> result = load(output + i);
        const Vector<T> g = slopes ? load(line + i) * load(slopes + i)
                                   : through<T>(s_.activation, load(line + i), result);
        store(line + i, g);
        sum += g;
        against += g * result;
      }
      store(sums[v], sum);
      store(sums[v] + kLanes<T>, against);
    }
  }
  for (int64_t v = 0; v < vectors; ++v) {
    add_to<T>(of_share + v * kLanes<T>, load(sums[v]));
    add_to<T>(of_share + slice_ + v * kLanes<T>, load(sums[v] + kLanes<T>));
  }
}

}  // namespace
}  // namespace pynas
