// The backward pass, through the hidden channels of a group.
#pragma once

#include "mbconv_backward_pass.h"

namespace pynas {
namespace {

// Down to the output of the second norm, whose sums this gathers; and the gradient of the last
// convolution.
template <typename T>
void MbBackwardPass<T>::first_half(const MbOption<T>& option, int64_t first, int64_t channels,
                                   int64_t index, int64_t worker) {
  const Rows<T> rows = hidden_rows(option, worker);
  const Share share = layout_.share(index);
  // Rows of all images stay clear from group to group. Those of a worker do not: it may come late.
  if (first_group_ || !stored_) clear_pads(rows, share);
  memset(project_sums_ + index * s_.out_channels * group_, 0,
         static_cast<size_t>(s_.out_channels * group_) * sizeof(T));
  memset(sums_.at(index, 0), 0, static_cast<size_t>(kSums * group_) * sizeof(double));
  int64_t have = 0;
  layout_.for_out_bands(share, Way::kUp, [&](const Band& band) {
    if (first_group_) product_gradient(band);
    int64_t now = have;
    for_slices<T>(first, channels, [&](const Channels& slice) {
      const Expander<T> expander = expander_of(slice, rows);
      now = hidden_for(expander, option, band, have);
      first_half_of(expander, option, band, index, worker);
    });
    have = now;
  });
}

template <typename T>
void MbBackwardPass<T>::first_half_of(const Expander<T>& expander, const MbOption<T>& option,
                                      const Band& band, int64_t share, int64_t worker) {
  constexpr int64_t kL = kLanes<T>;
  const Channels& slice = expander.slice;
  const Lines<T> gradients = gradients_at(slice, worker, band.first_row());
  outer_gradient(expander, band, gradients);
  T* hidden = bands_ + worker * larger(in_room_, out_room_) * slice_;
  const DepthwiseGradient<T> act = depthwise_gradient<T>(option.kernel, s_.stride, s_.activation);
  alignas(kVectorBytes) T sums[kMostSlice<T>][2 * kL] = {};
  const T* window[kMostKernel];
  for (int64_t row = 0; row < band.rows(); ++row) {
    OuterRow<T> line = outer_row(expander, band, row, gradients, option.kernel, window);
    line.hidden = hidden + row * band.width * kL;
    line.hidden_step = out_room_ * kL;
    line.values = stored_ ? values_ + (line.gradient - gradients_) : nullptr;
    line.mean = mean2_ + slice.first;
    line.sums = sums[0];
    act.sums(line);
  }
  double* of_share = sums_.at(share, kGradient2) + slice.at * kL;
  for (int64_t v = 0; v < slice.vectors; ++v) {
    add_to<T>(of_share + v * kL, load(sums[v]));
    add_to<T>(of_share + (kAgainst2 - kGradient2) * group_ + v * kL, load(sums[v] + kL));
  }
  if (!args_.gradients) return;
  const int64_t out = s_.out_channels, wide = layout_.out_padded;
  const Gemm<T> across{1,  band.positions(), 1,         0, wide, kL, out_room_ * kL, group_,
                       kL, nullptr,          Then::kAdd};
  gemm(out, slice.vectors, across, product_gradient_ + band.begin() * wide, hidden,
       project_sums_ + share * out * group_ + slice.at * kL);
}

// Gradients of what the last convolution read, over a band.
template <typename T>
void MbBackwardPass<T>::outer_gradient(const Expander<T>& expander, const Band& band,
                                       const Lines<T>& gradients) {
  const int64_t out = s_.out_channels, wide = layout_.out_padded;
  const Gemm<T> down{
      1, out, wide, 0, 1, packed_.room, kLanes<T>, 0, gradients.vector_step(), out_scatter_};
  gemm(band.positions(), expander.slice.vectors, down, product_gradient_ + band.begin() * wide,
       packed_.project + expander.slice.first, gradients.line(band.first_row()));
}

// Makes the hidden rows that a band of outputs needs. Returns how many of the image there are.
template <typename T>
int64_t MbBackwardPass<T>::hidden_for(const Expander<T>& expander, const MbOption<T>& option,
                                      const Band& band, int64_t have) {
  const int64_t now = expander.expand_for(band, option.kernel, have, slot(band.n0, band));
  if (slopes_) keep_slopes(band, expander, band.y0 == 0 ? 0 : have, now);
  return now;
}

// What a row of a band's outputs is computed from.
template <typename T>
OuterRow<T> MbBackwardPass<T>::outer_row(const Expander<T>& expander, const Band& band, int64_t row,
                                         const Lines<T>& gradients, int64_t kernel,
                                         const T** window) const {
  const int64_t n = slot(band.n0 + row / (band.y1 - band.y0), band), first = expander.slice.first;
  const int64_t y = band.y0 + row % (band.y1 - band.y0);
  const Rows<T>& rows = expander.rows;
  rows.window(n, y * s_.stride - kernel / 2, kernel, s_.height, window);
  OuterRow<T> line{};
  line.in = {window, rows.vector_step(), expander.slice.vectors, band.width};
  line.weights = packed_.depthwise + first;
  line.step = packed_.room;
  line.scale = packed_.scale2 + first;
  line.bias = packed_.bias2 + first;
  line.gradient = gradients.line(band.first_row() + row);
  line.gradient_step = gradients.vector_step();
  return line;
}

template <typename T>
Expander<T> MbBackwardPass<T>::expander_of(const Channels& slice, const Rows<T>& rows) const {
  const Rows<T> of_slice = rows.from(slice.at);
  return {s_,
          args_.x,
          packed_,
          slice,
          of_slice,
          scatter_,
          slopes_ ? Activation::kNone : s_.activation,
          direct_ ? second_rows_ + (of_slice.data - hidden_rows_) : nullptr};
}

template <typename T>
void MbBackwardPass<T>::clear_pads(const Rows<T>& rows, const Share& share) const {
  const int64_t n0 = stored_ ? share.n0 : 0;
  const int64_t n1 = stored_ ? share.n1 : layout_.images_at_once();
  for (int64_t n = n0; n < n1; ++n) rows.clear_pads(n);
}

// Turns outputs that went through no activation into those that did, and keeps its slopes.
template <typename T>
void MbBackwardPass<T>::keep_slopes(const Band& band, const Expander<T>& expander, int64_t from,
                                    int64_t to) {
  const Rows<T>& rows = expander.rows;
  for (int64_t n = band.n0; n < band.n1; ++n) {
    for (int64_t y = from; y < to; ++y) {
      for (int64_t v = 0; v < expander.slice.vectors; ++v) {
        T* line = rows.inside(slot(n, band), y) + v * rows.vector_step();
        T* slope_line = second_rows_ + (line - hidden_rows_);
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
void MbBackwardPass<T>::second_norm(const MbGradients<T>* to, const Statistics<T>& of,
                                    int64_t first, int64_t channels) {
  for (int64_t c = 0; c < channels; ++c) {
    const int64_t j = first + c;
    norm2_.clear(c);
    if (j >= packed_.hidden) continue;
    const double sum = sums_.total(layout_.shares, kGradient2, c);
    const double against = sums_.total(layout_.shares, kAgainst2, c);
    const double rstd = rstd_of(of.variance2[j], s_.eps);
    norm2_.set(c, packed_.scale2[j], of.mean2[j], rstd, sum, against, layout_.positions);
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
  const int64_t in = s_.in_channels, pad = option.kernel / 2;
  const Rows<T> rows = hidden_rows(option, worker), gradients = gradient_rows(option, worker);
  for (int64_t n = 0; n < layout_.images_at_once(); ++n) gradients.clear_pads(n);
  if (!stored_) clear_pads(rows, layout_.share(index));
  T* lines = bands_ + worker * larger(in_room_, out_room_) * slice_;
  memset(expand_sums_ + index * in * group_, 0, static_cast<size_t>(in * group_) * sizeof(T));
  memset(depthwise_sums_ + index * taps_ * group_, 0,
         static_cast<size_t>(taps_ * group_) * sizeof(T));
  int64_t done = 0, have = 0;  // rows of this image: of the outputs, and of the hidden channels
  layout_.for_in_bands(layout_.share(index), Way::kDown, [&](const Band& band) {
    if (band.y0 == 0) done = have = 0;
    const int64_t need = smaller(layout_.out_height, (band.y1 - 1 + pad) / s_.stride + 1);
    const Band part{band.n0, band.n1, done, need, layout_.out_width, layout_.out_height};
    int64_t now = have;
    for_slices<T>(first, channels, [&](const Channels& slice) {
      const Expander<T> expander = expander_of(slice, rows);
      const Rows<T> of_slice = gradients.from(slice.at);
      if (need > done) {
        if (!stored_) now = hidden_for(expander, option, part, have);
        convolution_gradient(expander, option, part, of_slice, index, worker);
      }
      input_rows(expander, option, band, of_slice, lines, sums_.at(index, kGradient1));
      if (!direct_) input_products(slice, band, lines, index);
    });
    have = now;
    done = larger(done, need);
  });
}

// Rows of the gradient of the depthwise output, and their part of the gradient of the convolution.
template <typename T>
void MbBackwardPass<T>::convolution_gradient(const Expander<T>& expander, const MbOption<T>& option,
                                             const Band& part, const Rows<T>& to, int64_t share,
                                             int64_t worker) {
  constexpr int64_t kL = kLanes<T>;
  const Channels& slice = expander.slice;
  const DepthwiseGradient<T> act = depthwise_gradient<T>(option.kernel, s_.stride, s_.activation);
  const Depthwise<T> convolution = depthwise<T>(option.kernel, s_.stride);
  const Lines<T> gradients = gradients_at(slice, worker, part.first_row());
  if (!stored_) outer_gradient(expander, part, gradients);
  T* sums = depthwise_sums_ + share * taps_ * group_ + slice.at * taps_ * kL;
  const int64_t channel = slice.at * kL;
  const T* window[kMostKernel];
  for (int64_t row = 0; row < part.rows(); ++row) {
    OuterRow<T> line = outer_row(expander, part, row, gradients, option.kernel, window);
    line.back = to.inside(row / (part.y1 - part.y0), part.y0 + row % (part.y1 - part.y0));
    line.back_step = to.vector_step();
    line.norm = norm2_.from(channel);
    if (stored_) {
      norm_back(line.norm, line.in.vectors, line.in.width, line.gradient,
                values_ + (line.gradient - gradients_), line.gradient_step, line.back,
                line.back_step);
    } else {
      act.back(line);
    }
    if (args_.gradients) {
      convolution.weights(line.in, line.back, line.back_step, sums, taps_ * kL);
    }
  }
}

// Gradient of the first norm's output, over a band of inputs, and its sum.
template <typename T>
void MbBackwardPass<T>::input_rows(const Expander<T>& expander, const MbOption<T>& option,
                                   const Band& band, const Rows<T>& gradients, T* lines,
                                   double* of_share) {
  constexpr int64_t kL = kLanes<T>;
  const Channels& slice = expander.slice;
  const DepthwiseGradient<T> act = depthwise_gradient<T>(option.kernel, s_.stride, s_.activation);
  const T* window[kMostKernel];
  alignas(kVectorBytes) T sums[kMostSlice<T>][2 * kL] = {};
  for (int64_t row = 0; row < band.rows(); ++row) {
    const int64_t n = band.n0 + row / (band.y1 - band.y0);
    const int64_t y = band.y0 + row % (band.y1 - band.y0);
    T* output = expander.rows.inside(slot(n, band), y);
    InnerRow<T> line{};
    line.output = output;
    line.output_step = expander.rows.vector_step();
    line.slopes = slopes_ ? second_rows_ + (output - hidden_rows_) : nullptr;
    line.out = lines + row * band.width * kL;
    line.out_step = in_room_ * kL;
    if (direct_) {  // over the hidden rows, which nobody needs any more
      line.raw = second_rows_ + (output - hidden_rows_);
      line.scale = packed_.scale1 + slice.first;
      line.bias = packed_.bias1 + slice.first;
      line.mean = mean1_ + slice.first;
      line.out = output;
      line.out_step = line.output_step;
    }
    line.sums = sums[0];
    line.in = {window, gradients.vector_step(), slice.vectors, band.width};
    line.step = packed_.room;
    if (s_.stride == 1) {
      gradients.window(n - band.n0, y - option.kernel / 2, option.kernel, layout_.out_height,
                       window);
      line.weights = packed_.flipped + slice.first;
      direct_ ? act.inner_raw(line) : act.inner(line);
    } else {
      line.weights = packed_.depthwise + slice.first;
      inner_row_2(line, option.kernel, gradients, n - band.n0, y);
    }
  }
  of_share += slice.at * kL;
  for (int64_t v = 0; v < slice.vectors; ++v) {
    add_to<T>(of_share + v * kL, load(sums[v]));
    add_to<T>(of_share + (kAgainst1 - kGradient1) * group_ + v * kL, load(sums[v] + kL));
  }
}

// The same for one row at stride 2, whose taps every other row of outputs shares.
template <typename T>
void MbBackwardPass<T>::inner_row_2(const InnerRow<T>& line, int64_t kernel,
                                    const Rows<T>& gradients, int64_t n, int64_t y) const {
  constexpr int64_t kL = kLanes<T>;
  const int64_t pad = kernel / 2, width = line.in.width;
  const Depthwise<T> convolution = depthwise<T>(kernel, 2);
  const T* window[kMostKernel];
  int taps[kMostKernel], count = 0;
  for (int64_t ky = (y + pad) % 2; ky < kernel; ky += 2) {
    const int64_t from = (y + pad - ky) / 2;
    if (y + pad < ky || from >= layout_.out_height) continue;
    taps[count] = static_cast<int>(ky);
    window[count++] = gradients.row(n, from);
  }
  for (int64_t v = 0; v < line.in.vectors; ++v) {
    InnerRow<T> one = line;
    one.out += v * line.out_step;
    one.output += v * line.output_step;
    one.sums += v * 2 * kL;
    convolution.backward_2(window, taps, count, width, line.weights + v * kL, line.step, one.out);
    if (line.raw) {
      one.raw += v * line.output_step;
      one.scale += v * kL, one.bias += v * kL, one.mean += v * kL;
      inner_raw_2(one);
    } else {
      if (line.slopes) one.slopes += v * line.output_step;
      inner_of_2(one);
    }
    for (int i = 0; i < count; ++i) window[i] += line.in.step;
  }
}

// DepthwiseGradient::inner for one vector, whose gradient before the activation stands in `out`.
template <typename T>
void MbBackwardPass<T>::inner_of_2(const InnerRow<T>& line) const {
  constexpr int64_t kL = kLanes<T>;
  Vector<T> sum = load(line.sums), against = load(line.sums + kL);
  for (int64_t i = 0; i < line.in.width * kL; i += kL) {
    const Vector<T> result = load(line.output + i), before = load(line.out + i);
    const Vector<T> g =
        line.slopes ? before * load(line.slopes + i) : through<T>(s_.activation, before, result);
    store(line.out + i, g);
    sum += g;
    against += g * result;
  }
  store(line.sums, sum);
  store(line.sums + kL, against);
}

// The same for DepthwiseGradient::inner_raw.
template <typename T>
void MbBackwardPass<T>::inner_raw_2(const InnerRow<T>& line) const {
  constexpr int64_t kL = kLanes<T>;
  const Vector<T> scale = load(line.scale), bias = load(line.bias), mean = load(line.mean);
  Vector<T> sum = load(line.sums), against = load(line.sums + kL);
  for (int64_t i = 0; i < line.in.width * kL; i += kL) {
    const Vector<T> u = load(line.raw + i);
    const Vector<T> g = through<T>(s_.activation, load(line.out + i), u * scale + bias);
    store(line.out + i, g);
    sum += g;
    against += g * (u - mean);
  }
  store(line.sums, sum);
  store(line.sums + kL, against);
}

// Where the first norm is taken directly: from its gradient, over the hidden rows, to the input.
template <typename T>
void MbBackwardPass<T>::through_first_norm(const MbOption<T>& option, int64_t first,
                                           int64_t channels, int64_t index, int64_t worker) {
  constexpr int64_t kL = kLanes<T>;
  const Rows<T> rows = hidden_rows(option, worker);
  T* lines = bands_ + worker * larger(in_room_, out_room_) * slice_;
  layout_.for_in_bands(layout_.share(index), Way::kUp, [&](const Band& band) {
    for_slices<T>(first, channels, [&](const Channels& slice) {
      const Rows<T> of_slice = rows.from(slice.at);
      for (int64_t row = 0; row < band.rows(); ++row) {
        const T* gradient = of_slice.inside(band.n0 + row / (band.y1 - band.y0),
                                            band.y0 + row % (band.y1 - band.y0));
        norm_back(norm1_.from(slice.at * kL), slice.vectors, band.width, gradient,
                  second_rows_ + (gradient - hidden_rows_), of_slice.vector_step(),
                  lines + row * band.width * kL, in_room_ * kL);
      }
      input_products(slice, band, lines, index);
    });
  });
}

// What a band gives to the gradient of the first convolution and to that of the input.
template <typename T>
void MbBackwardPass<T>::input_products(const Channels& slice, const Band& band, const T* lines,
                                       int64_t share) {
  constexpr int64_t kL = kLanes<T>;
  const int64_t in = s_.in_channels, wide = layout_.in_padded;
  if (needs_expand_sums()) {
    const Gemm<T> across{1,  band.positions(), 1,         0, in, kL, in_room_ * kL, group_,
                         kL, nullptr,          Then::kAdd};
    gemm(in, slice.vectors, across, args_.x + band.begin() * in, lines,
         expand_sums_ + share * in * group_ + slice.at * kL);
  }
  if (args_.x_gradient) {
    const bool adds = begun_ || slice.first > 0;
    const Gemm<T> up{slice.vectors,
                     kL,
                     kL,
                     in_room_ * kL,
                     1,
                     wide,
                     kL,
                     wide,
                     kL,
                     nullptr,
                     adds ? Then::kAdd : Then::kSet};
    gemm(band.positions(), wide / kL, up, lines,
         (direct_ ? packed_.expand : packed_.scaled) + slice.first * wide,
         input_gradient_ + band.begin() * wide);
  }
}

}  // namespace
}  // namespace pynas
