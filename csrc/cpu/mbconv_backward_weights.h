// The backward pass, from sums over positions to the gradients of weights and input.
#pragma once

#include "mbconv_backward_pass.h"

namespace pynas {
namespace {

// Adds all shares to the first one.
template <typename T>
void MbBackwardPass<T>::add_shares(T* sums, int64_t elements) const {
  for (int64_t share = 1; share < layout_.shares; ++share) {
    const T* more = sums + share * elements;
    for (int64_t i = 0; i < elements; ++i) sums[i] += more[i];
  }
}

// Gradients of the convolutions, in torch's order of the weights.
template <typename T>
void MbBackwardPass<T>::weight_gradients(const MbOption<T>& option, const MbGradients<T>* to,
                                         int64_t first, int64_t channels) const {
  constexpr int64_t kL = kLanes<T>;
  const int64_t taps = option.kernel * option.kernel, out = s_.out_channels;
  const int64_t group = packed_.hidden / option.groups, size = out / option.groups;
  add_shares(depthwise_sums_, taps_ * group_);
  add_shares(project_sums_, out * group_);
  const int64_t end = smaller(channels, packed_.hidden - first);
  for (int64_t c = 0; c < end; c += kL) {
    transpose(depthwise_sums_ + c * taps_, kL, taps, smaller(kL, end - c),
              to->depthwise + (first + c) * taps, taps);
  }
  for (int64_t o = 0; o < out; ++o) {
    const int64_t from = o / size * group - first;  // of the hidden channels that reach it
    const int64_t begin = larger<int64_t>(0, from), count = smaller(end, from + group) - begin;
    if (count > 0) {
      memcpy(to->project + o * group + begin - from, project_sums_ + o * group_ + begin,
             static_cast<size_t>(count) * sizeof(T));
    }
  }
  write_expand(option, to, first, end);
}

// Gradients of the first norm, and what it adds to those of the convolution before and of the
// input: with q the share of the normalised input, and both for each channel of the group.
template <typename T>
void MbBackwardPass<T>::first_norm(const MbOption<T>& option, const MbGradients<T>* to,
                                   const Statistics<T>& of, int64_t first, int64_t channels) {
  const auto count = static_cast<double>(layout_.in_positions);
  double* products = products1_;
  if (needs_expand_sums()) expand_products(first, channels, products);
  const FirstNorm& norm = norm_;
  memset(norm.sum, 0, static_cast<size_t>(5 * group_) * sizeof(T));  // channels that pad
  for (int64_t c = 0; c < smaller(channels, packed_.hidden - first); ++c) {
    const int64_t from = before_shuffle(first + c, packed_.hidden, option.groups);
    const auto mean = static_cast<double>(of.mean1[first + c]);
    const auto rstd = static_cast<double>(packed_.rstd1[first + c]);
    const auto scale = static_cast<double>(packed_.scale1[first + c]);
    const double sum = sums_.total(layout_.shares, kGradient1, c);
    // The sum of the gradient times the normalised input, and that times the norm's scale.
    const double normal = (products[c] - mean * sum) * rstd;
    const double scaled = needs_expand_sums()
                              ? scale * normal
                              : (sums_.total(layout_.shares, kAgainst1, c) -
                                 static_cast<double>(option.norm1.shift[from]) * sum) *
                                    rstd;
    const double q = scaled * rstd / count;
    norm.sum[c] = static_cast<T>(sum);
    norm.scale[c] = static_cast<T>(scale);
    norm.factor[c] = static_cast<T>(normal * rstd);
    norm.square[c] = static_cast<T>(-q);
    norm.constant[c] = static_cast<T>(q * mean - scale * sum / count);
    if (to) {
      to->scale1[from] = static_cast<T>(normal);
      to->shift1[from] = static_cast<T>(sum);
    }
  }
  spread_first_norm(norm, first, channels, to != nullptr);
}

// The same where the sums of what the norm read are at hand.
template <typename T>
void MbBackwardPass<T>::direct_norm(const MbOption<T>& option, const MbGradients<T>* to,
                                    const Statistics<T>& of, int64_t first, int64_t channels) {
  for (int64_t c = 0; c < channels; ++c) {
    const int64_t j = first + c;
    norm1_.clear(c);
    if (j >= packed_.hidden) continue;
    const double sum = sums_.total(layout_.shares, kGradient1, c);
    const double against = sums_.total(layout_.shares, kAgainst1, c);
    const double rstd = rstd_of(of.variance1[j], s_.eps);
    norm1_.set(c, packed_.scale1[j], of.mean1[j], rstd, sum, against, layout_.in_positions);
    if (to) {
      const int64_t from = before_shuffle(j, packed_.hidden, option.groups);
      to->scale1[from] = static_cast<T>(against * rstd);
      to->shift1[from] = static_cast<T>(sum);
    }
  }
}

// Of each channel: the sum over inputs of the weight times its sum of gradient times input.
template <typename T>
void MbBackwardPass<T>::expand_products(int64_t first, int64_t channels, double* products) const {
  const int64_t in = s_.in_channels;
  add_shares(expand_sums_, in * group_);
  memset(products, 0, static_cast<size_t>(channels) * sizeof(double));
  for (int64_t i = 0; i < in; ++i) {
    const T *w = packed_.transposed + i * packed_.room + first, *sums = expand_sums_ + i * group_;
    for (int64_t c = 0; c < channels; ++c) {
      products[c] += static_cast<double>(w[c]) * static_cast<double>(sums[c]);
    }
  }
}

// Turns the sums of gradient times input into gradients of weights, if wanted.
template <typename T>
void MbBackwardPass<T>::spread_first_norm(const FirstNorm& norm, int64_t first, int64_t channels,
                                          bool weights) {
  const int64_t room = packed_.room;
  for (int64_t i = 0; i < s_.in_channels; ++i) {
    const T *w = packed_.transposed + i * room + first, mean = args_.saved.mean[i];
    T *scaled = scaled_expand_ + i * room + first, *sums = expand_sums_ + i * group_;
    double more = 0;
    for (int64_t c = 0; c < channels; ++c) {
      scaled[c] = norm.square[c] * w[c];
      more += static_cast<double>(w[c] * norm.constant[c]);
    }
    correction_.constant[i] += static_cast<T>(more);
    if (!weights) continue;
    const T* moved = packed_.covariance + i * room + first;
    for (int64_t c = 0; c < channels; ++c) {
      sums[c] = norm.scale[c] * (sums[c] - norm.sum[c] * mean - norm.factor[c] * moved[c]);
    }
  }
}

// From [in, group] into torch's order, by blocks: few lines of either are in use at once.
template <typename T>
void MbBackwardPass<T>::write_expand(const MbOption<T>& option, const MbGradients<T>* to,
                                     int64_t first, int64_t channels) const {
  constexpr int64_t kBlock = 16;
  const int64_t in = s_.in_channels, size = in / option.groups;
  if (direct_) add_shares(expand_sums_, in * group_);
  if (option.groups == 1) {
    return transpose(expand_sums_, group_, in, channels, to->expand + first * in, in);
  }
  for (int64_t c0 = 0; c0 < channels; c0 += kBlock) {
    for (int64_t i0 = 0; i0 < in; i0 += kBlock) {
      for (int64_t c = c0; c < smaller(channels, c0 + kBlock); ++c) {
        const int64_t from = before_shuffle(first + c, packed_.hidden, option.groups);
        const int64_t begin = from / (packed_.hidden / option.groups) * size;
        const int64_t last = smaller(begin + size, smaller(in, i0 + kBlock));
        for (int64_t i = larger(begin, i0); i < last; ++i) {
          to->expand[from * size + i - begin] = expand_sums_[i * group_ + c];
        }
      }
    }
  }
}

template <typename T>
void MbBackwardPass<T>::correct_input() {
  if (direct_ || !args_.x_gradient) return;
  const int64_t in = s_.in_channels, wide = layout_.in_padded;
  const Gemm<T> g{1,         packed_.room, packed_.room, 0,       1,         wide,
                  kLanes<T>, wide,         kLanes<T>,    nullptr, Then::kAdd};
  gemm(in, wide / kLanes<T>, g, scaled_expand_, packed_.expand, correction_.matrix);
}

template <typename T>
void MbBackwardPass<T>::finish_input() {
  const Columns<T> columns{s_.in_channels};
  const int64_t in = s_.in_channels, wide = layout_.in_padded, image = s_.height * s_.width;
  Gemm<T> g{1, in, in, 0, 1, wide, kLanes<T>, wide, kLanes<T>, nullptr, Then::kAdd};
  const bool adds = residual() || args_.gates.identity >= 0;
  parallel(workers_, layout_.shares, [&](int64_t index, int64_t) {
    const Share share = layout_.share(index);
    for (int64_t n = share.n0; n < share.n1; ++n) {
      double times = args_.gates.identity >= 0 ? gate(n, args_.gates.identity) : 0;
      for (int64_t o = 0; o < s_.options && residual(); ++o) {
        if (args_.options[o].trained) times += gate(n, args_.options[o].gate);
      }
      const Vector<T> factor = broadcast(static_cast<T>(times));
      for (int64_t p0 = n * image; p0 < (n + 1) * image; p0 += kBandPositions) {
        const int64_t p1 = smaller(p0 + kBandPositions, (n + 1) * image);
        T* sums = input_gradient_ + p0 * wide;
        if (!begun_) {
          memset(sums, 0, static_cast<size_t>((p1 - p0) * wide) * sizeof(T));
        } else if (!direct_) {
          gemm(p1 - p0, wide / kLanes<T>, g, args_.x + p0 * in, correction_.matrix, sums);
        }
        for (int64_t v = 0; v < columns.vectors(); ++v) {
          const Vector<T> constant = columns.get(correction_.constant, v);
          for (int64_t p = p0; p < p1; ++p, sums += wide) {
            Vector<T> sum = load(sums + columns.offset(v)) + constant;
            if (adds) sum += factor * columns.get(args_.y_gradient + p * in, v);
            columns.put(args_.x_gradient + p * in, v, sum);
          }
          sums = input_gradient_ + p0 * wide;
        }
      }
    }
  });
}

}  // namespace
}  // namespace pynas
