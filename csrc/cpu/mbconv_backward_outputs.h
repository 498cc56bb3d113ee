// The backward pass, from the layer's output to the blocks' last products.
#pragma once

#include "mbconv_backward_pass.h"

namespace pynas {
namespace {

template <typename T>
void MbBackwardPass<T>::sum_outputs() {
  const Columns<T> columns{s_.out_channels};
  const int64_t out = s_.out_channels, wide = layout_.out_padded, options = s_.options;
  const int64_t image = layout_.out_height * layout_.out_width;
  const bool dots = args_.gates_gradient && (residual() || args_.gates.identity >= 0);
  parallel(workers_, layout_.shares, [&](int64_t index, int64_t) {
    const Share share = layout_.share(index);
    for (int64_t n = share.n0; n < share.n1; ++n) {
      double* sums = image_sums_ + n * (1 + options) * out;
      for (int64_t p0 = n * image; p0 < (n + 1) * image; p0 += kBandPositions) {
        const int64_t p1 = smaller(p0 + kBandPositions, (n + 1) * image);
        for (int64_t v = 0; v < columns.vectors(); ++v) {
          const int64_t at = columns.offset(v);
          const auto flush = [&](double* to, Vector<T> sum) {
            for (int64_t lane = columns.seen(v); lane < smaller<int64_t>(kLanes<T>, out); ++lane) {
              to[at + lane] += static_cast<double>(sum[lane]);
            }
          };
          Vector<T> sum{}, dot{};
          for (int64_t p = p0; p < p1; ++p) {
            const Vector<T> g = columns.get(args_.y_gradient + p * out, v);
            sum += g;
            if (dots) dot += g * columns.get(args_.x + p * out, v);
          }
          flush(sums, sum);
          for (int64_t lane = columns.seen(v); lane < smaller<int64_t>(kLanes<T>, out); ++lane) {
            image_dots_[n] += static_cast<double>(dot[lane]);
          }
          for (int64_t o = 0; o < options; ++o) {
            const T* product = args_.saved.products + o * layout_.positions * wide + at;
            const Vector<T> mean = columns.get(statistics_of(o).mean3, v);
            Vector<T> against{};
            for (int64_t p = p0; p < p1; ++p) {
              against +=
                  columns.get(args_.y_gradient + p * out, v) * (load(product + p * wide) - mean);
            }
            flush(sums + (1 + o) * out, against);
          }
        }
      }
    }
  });
}

template <typename T>
void MbBackwardPass<T>::gate_gradients() {
  if (!args_.gates_gradient) return;
  const int64_t out = s_.out_channels, count = args_.gates.count;
  const bool by_image = args_.gates.image_step != 0;
  double* total = take_zeros<double>(workers_, (by_image ? s_.images : 1) * count);
  for (int64_t n = 0; n < s_.images; ++n) {
    double* to = total + (by_image ? n * count : 0);
    const double* sums = image_sums_ + n * (1 + s_.options) * out;
    for (int64_t o = 0; o < s_.options; ++o) {
      const MbNorm<T>& norm = args_.options[o].norm3;
      const Statistics<T> of = statistics_of(o);
      double sum = residual() ? image_dots_[n] : 0;
      for (int64_t c = 0; c < out; ++c) {
        sum += static_cast<double>(norm.scale[c]) * rstd_of(of.variance3[c], s_.eps) *
                   sums[(1 + o) * out + c] +
               static_cast<double>(norm.shift[c]) * sums[c];
      }
      to[args_.options[o].gate] += sum;
    }
    if (args_.gates.identity >= 0) to[args_.gates.identity] += image_dots_[n];
  }
  for (int64_t i = 0; i < (by_image ? s_.images : 1) * count; ++i) {
    args_.gates_gradient[i] = static_cast<T>(total[i]);
  }
}

// dL/dproduct = gate * scale3 * y_gradient + square3 * product + constant3.
template <typename T>
void MbBackwardPass<T>::third_norm(int64_t index, const Statistics<T>& of) {
  const MbOption<T>& option = args_.options[index];
  const auto count = static_cast<double>(layout_.positions);
  const int64_t out = s_.out_channels;
  for (int64_t c = 0; c < out; ++c) {
    double sum = 0, against = 0;
    for (int64_t n = 0; n < s_.images; ++n) {
      const double* sums = image_sums_ + n * (1 + s_.options) * out;
      sum += gate(n, option.gate) * sums[c];
      against += gate(n, option.gate) * sums[(1 + index) * out + c];
    }
    const double rstd = rstd_of(of.variance3[c], s_.eps);
    const double scale = static_cast<double>(option.norm3.scale[c]) * rstd;
    const double square = -scale * rstd * rstd * against / count;
    scale3_[c] = static_cast<T>(scale);
    square3_[c] = static_cast<T>(square);
    constant3_[c] =
        static_cast<T>(-scale * sum / count - square * static_cast<double>(of.mean3[c]));
    if (args_.gradients) {
      args_.gradients[index].scale3[c] = static_cast<T>(against * rstd);
      args_.gradients[index].shift3[c] = static_cast<T>(sum);
    }
  }
}

template <typename T>
void MbBackwardPass<T>::product_gradient(const Band& band) {
  const Columns<T> columns{s_.out_channels};
  const int64_t out = s_.out_channels, wide = layout_.out_padded;
  const int64_t image = (band.y1 - band.y0) * band.width;
  for (int64_t n = band.n0; n < band.n1; ++n) {
    const int64_t begin = band.begin() + (n - band.n0) * image;
    const Vector<T> times = broadcast(static_cast<T>(gate(n, option_->gate)));
    for (int64_t v = 0; v < columns.vectors(); ++v) {
      const int64_t at = columns.offset(v);
      const Vector<T> scale = columns.get(scale3_, v) * times;
      const Vector<T> square = columns.get(square3_, v), constant = columns.get(constant3_, v);
      for (int64_t p = begin; p < begin + image; ++p) {
        store(product_gradient_ + p * wide + at,
              columns.get(args_.y_gradient + p * out, v) * scale +
                  load(products_ + p * wide + at) * square + constant);
      }
    }
  }
}

}  // namespace
}  // namespace pynas
