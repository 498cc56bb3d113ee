// A block's weights as the products want them, with the first batch norm folded in.
#pragma once

#include "gemm.h"
#include "mbconv_layout.h"

namespace pynas {
namespace {

double sqrt64(double value) { return __builtin_sqrt(value); }

template <typename T>
double rstd_of(T variance, double eps) {
  return 1 / sqrt64(static_cast<double>(variance) + eps);
}

// Where the hidden channel that the depthwise convolution sees as `index` comes from: the shuffle
// reads (groups, n) as (n, groups).
inline int64_t before_shuffle(int64_t index, int64_t hidden, int64_t groups) {
  return index % groups * (hidden / groups) + index / groups;
}

// Positions of one option's numbers in MbSaved::statistics.
template <typename T>
struct Statistics {
  T *mean1, *variance1, *mean2, *variance2, *mean3, *variance3;
  static int64_t elements(int64_t hidden, int64_t out_channels) {
    return 4 * hidden + 2 * out_channels;
  }
  Statistics(T* from, int64_t hidden, int64_t out_channels)
      : mean1(from),
        variance1(from + hidden),
        mean2(from + 2 * hidden),
        variance2(from + 3 * hidden),
        mean3(from + 4 * hidden),
        variance3(from + 4 * hidden + out_channels) {}
};

// Hidden channels stand in the order of the depthwise convolution, padded with zeros.
template <typename T>
struct Packed {
  int64_t hidden = 0, room = 0;  // room: padded hidden channels
  T* expand;                     // [room, padded in]
  T* transposed;                 // [in, room]: expand
  T* covariance;                 // [in, room]: covariance of the input times transposed
  T *scale1, *bias1, *rstd1;     // [room]: the first norm is scale1 * u + bias1
  T* folded;                     // [in, room]: transposed with scale1
  T* folded_rows;                // [room, padded in]: expand with scale1; for backward
  T* depthwise;                  // [taps, room]
  T* flipped;                    // [taps, room]: the taps in reverse; for backward
  T* project;                    // forward: [room, padded out]; backward: [out, room]
  T *scale2, *bias2;             // [room]: the second norm is scale2 * v + bias2

  // Memory for the largest of the options.
  Packed(const MbShape& s, const MbOption<T>* options, const Workers& workers, bool backward) {
    int64_t most = 0, kernel = 0;
    for (int64_t i = 0; i < s.options; ++i) {
      most = larger(most, padded<T>(options[i].hidden));
      kernel = larger(kernel, options[i].kernel);
    }
    const int64_t in = padded<T>(s.in_channels), out = padded<T>(s.out_channels);
    expand = take<T>(workers, most * in);
    transposed = take<T>(workers, s.in_channels * most);
    covariance = take<T>(workers, s.in_channels * most);
    scale1 = take<T>(workers, most);
    bias1 = take<T>(workers, most);
    rstd1 = take<T>(workers, most);
    folded = take<T>(workers, s.in_channels * most);
    folded_rows = backward ? take<T>(workers, most * in) : nullptr;
    depthwise = take<T>(workers, kernel * kernel * most);
    flipped = backward ? take<T>(workers, kernel * kernel * most) : nullptr;
    project = take<T>(workers, most * out);
    scale2 = take<T>(workers, most);
    bias2 = take<T>(workers, most);
  }

  // Everything that needs no statistics.
  void read(const MbShape& s, const MbOption<T>& option, bool backward) {
    hidden = option.hidden;
    room = padded<T>(hidden);
    read_expand(s, option);
    const int64_t taps = option.kernel * option.kernel;
    memset(depthwise, 0, static_cast<size_t>(taps * room) * sizeof(T));
    for (int64_t j = 0; j < hidden; ++j) {
      for (int64_t tap = 0; tap < taps; ++tap) {
        depthwise[tap * room + j] = option.depthwise[j * taps + tap];
      }
    }
    if (backward) {
      for (int64_t tap = 0; tap < taps; ++tap) {
        memcpy(flipped + tap * room, depthwise + (taps - 1 - tap) * room,
               static_cast<size_t>(room) * sizeof(T));
      }
    }
    read_project(s, option, backward);
  }

  // The first norm's mean and variance follow from those of the input.
  void first_statistics(const MbShape& s, const T* mean, const T* input_covariance, T* mean1,
                        T* variance1) {
    multiply_covariance(s, input_covariance);
    constexpr int64_t kL = kLanes<T>;
    for (int64_t j0 = 0; j0 < room; j0 += kL) {
      double m[kL] = {}, v[kL] = {};
      for (int64_t i = 0; i < s.in_channels; ++i) {
        const T *w = transposed + i * room + j0, *c = covariance + i * room + j0;
        for (int64_t lane = 0; lane < kL; ++lane) {
          m[lane] += static_cast<double>(w[lane]) * static_cast<double>(mean[i]);
          v[lane] += static_cast<double>(w[lane]) * static_cast<double>(c[lane]);
        }
      }
      for (int64_t lane = 0; lane < smaller(kL, hidden - j0); ++lane) {
        mean1[j0 + lane] = static_cast<T>(m[lane]);
        variance1[j0 + lane] = static_cast<T>(v[lane] < 0 ? 0 : v[lane]);  // a NaN stays
      }
    }
  }

  void multiply_covariance(const MbShape& s, const T* input_covariance) {
    const int64_t in = s.in_channels;
    const Gemm<T> g{1, in, padded<T>(in), 0, 1, room, kLanes<T>, room, kLanes<T>};
    gemm(in, room / kLanes<T>, g, input_covariance, transposed, covariance);
  }

  void fold(const MbShape& s, const MbOption<T>& option, const Statistics<T>& of, bool backward) {
    const int64_t in = s.in_channels;
    memset(scale1, 0, static_cast<size_t>(room) * sizeof(T));
    memset(bias1, 0, static_cast<size_t>(room) * sizeof(T));
    memset(rstd1, 0, static_cast<size_t>(room) * sizeof(T));
    for (int64_t j = 0; j < hidden; ++j) {
      const int64_t from = before_shuffle(j, hidden, option.groups);
      const double rstd = rstd_of(of.variance1[j], s.eps);
      const double scale = rstd * static_cast<double>(option.norm1.scale[from]);
      rstd1[j] = static_cast<T>(rstd);
      scale1[j] = static_cast<T>(scale);
      bias1[j] = static_cast<T>(static_cast<double>(option.norm1.shift[from]) -
                                scale * static_cast<double>(of.mean1[j]));
    }
    for (int64_t i = 0; i < in; ++i) {
      for (int64_t j = 0; j < room; ++j) {
        folded[i * room + j] = scale1[j] * transposed[i * room + j];
      }
    }
    if (!backward) return;
    const int64_t wide = padded<T>(in);
    for (int64_t j = 0; j < room; ++j) {
      for (int64_t i = 0; i < wide; ++i) {
        folded_rows[j * wide + i] = scale1[j] * expand[j * wide + i];
      }
    }
  }

  void fold_second(const MbShape& s, const MbOption<T>& option, const Statistics<T>& of,
                   int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      double scale = 0, bias = 0;
      if (j < hidden) {
        scale = rstd_of(of.variance2[j], s.eps) * static_cast<double>(option.norm2.scale[j]);
        bias =
            static_cast<double>(option.norm2.shift[j]) - scale * static_cast<double>(of.mean2[j]);
      }
      scale2[j] = static_cast<T>(scale);
      bias2[j] = static_cast<T>(bias);
    }
  }

 private:
  void read_expand(const MbShape& s, const MbOption<T>& option) {
    const int64_t in = s.in_channels, share = in / option.groups;
    const int64_t wide = padded<T>(in);
    memset(expand, 0, static_cast<size_t>(room * wide) * sizeof(T));
    for (int64_t j = 0; j < hidden; ++j) {
      const int64_t from = before_shuffle(j, hidden, option.groups);
      const int64_t group = from / (hidden / option.groups);
      memcpy(expand + j * wide + group * share, option.expand + from * share,
             static_cast<size_t>(share) * sizeof(T));
    }
    for (int64_t j0 = 0; j0 < room; j0 += kLanes<T>) {
      for (int64_t i = 0; i < in; ++i) {
        for (int64_t j = j0; j < j0 + kLanes<T>; ++j) {
          transposed[i * room + j] = expand[j * wide + i];
        }
      }
    }
  }

  void read_project(const MbShape& s, const MbOption<T>& option, bool backward) {
    const int64_t out = s.out_channels, share = hidden / option.groups;
    const int64_t by_out = backward ? room : 1, by_hidden = backward ? 1 : padded<T>(out);
    const int64_t elements = backward ? out * room : room * by_hidden;
    memset(project, 0, static_cast<size_t>(elements) * sizeof(T));
    const int64_t group = out / option.groups, block = smaller<int64_t>(16, group);
    for (int64_t o0 = 0; o0 < out;
         o0 += block) {  // by blocks, so that few lines are written at once
      const int64_t first = o0 / group * share;
      const int64_t end = smaller(o0 + block, (o0 / group + 1) * group);
      for (int64_t j = 0; j < share; ++j) {
        for (int64_t o = o0; o < end; ++o) {
          project[o * by_out + (first + j) * by_hidden] = option.project[o * share + j];
        }
      }
      o0 -= block - (end - o0);
    }
  }
};

}  // namespace
}  // namespace pynas
