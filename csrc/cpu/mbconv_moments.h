// Mean and covariance of a layer's input.
#pragma once

#include "mbconv_rows.h"

namespace pynas {
namespace {

template <typename T>
void input_mean(const MbShape& s, const Layout<T>& layout, const Workers& workers, const T* x,
                T* mean) {
  const int64_t in = s.in_channels, shares = layout.shares, image = s.height * s.width;
  const ShareSums sums{in, 1, take_zeros<double>(workers, shares * in)};
  parallel(workers, shares, [&](int64_t index, int64_t) {
    const Share share = layout.share(index);
    double* sum = sums.at(index, 0);
    for (int64_t p = share.n0 * image; p < share.n1 * image; ++p) {
      for (int64_t c = 0; c < in; ++c) sum[c] += static_cast<double>(x[p * in + c]);
    }
  });
  for (int64_t c = 0; c < in; ++c) {
    mean[c] = static_cast<T>(sums.total(shares, 0, c) / static_cast<double>(layout.in_positions));
  }
}

// Sums of products of two channels' deviations from the mean, of one share. Of the symmetric result
// only what lies above the diagonal, by whole vectors.
template <typename T>
void add_products(const MbShape& s, const Layout<T>& layout, const Share& share, const T* x,
                  const T* mean, T* centred, T* sums) {
  const int64_t in = s.in_channels, wide = layout.in_padded, image = s.height * s.width;
  constexpr int64_t kStep = kMostVectors * kLanes<T>;
  for (int64_t p = share.n0 * image; p < share.n1 * image; p += kBandPositions) {
    const int64_t count = smaller(kBandPositions, share.n1 * image - p);
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t c = 0; c < in; ++c) centred[i * wide + c] = x[(p + i) * in + c] - mean[c];
    }
    const Gemm<T> g{1, count, 1, 0, wide, wide, kLanes<T>, wide, kLanes<T>, nullptr, Then::kAdd};
    for (int64_t c = 0; c < wide; c += kStep) {
      const int64_t last = smaller(wide, c + kStep);
      gemm(smaller(in, last), (last - c) / kLanes<T>, g, centred, centred + c, sums + c);
    }
  }
}

// mean: [in]; covariance: [in, padded in], biased, zero where padded.
template <typename T>
void input_moments(const MbShape& s, const Layout<T>& layout, const Workers& workers, const T* x,
                   T* mean, T* covariance) {
  const int64_t in = s.in_channels, wide = layout.in_padded, shares = layout.shares;
  input_mean(s, layout, workers, x, mean);
  T* centred = take_zeros<T>(workers, workers.count * kBandPositions * wide);
  T* parts = take_zeros<T>(workers, shares * in * wide);
  parallel(workers, shares, [&](int64_t index, int64_t worker) {
    add_products(s, layout, layout.share(index), x, mean, centred + worker * kBandPositions * wide,
                 parts + index * in * wide);
  });
  for (int64_t a = 0; a < in; ++a) {
    for (int64_t b = 0; b < wide; ++b) {
      double sum = 0;
      const int64_t low = smaller(a, b), high = larger(a, b);
      for (int64_t share = 0; share < shares && high < in; ++share) {
        sum += static_cast<double>(parts[(share * in + low) * wide + high]);
      }
      covariance[a * wide + b] = static_cast<T>(sum / static_cast<double>(layout.in_positions));
    }
  }
}

}  // namespace
}  // namespace pynas
