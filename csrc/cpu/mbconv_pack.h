// A block's weights as the products want them, with the first batch norm folded in.
#pragma once

#include "gemm.h"
#include "mbconv_layout.h"
#include "transpose.h"

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
  const T* expand;               // [room, padded in]
  T* transposed;                 // [in, room]: expand
  T* covariance;                 // [in, room]: covariance of the input times transposed
  T *scale1, *bias1, *rstd1;     // [room]: the first norm is scale1 * u + bias1
  T* scaled;                     // [room, padded in]: expand with scale1; for backward
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
    copy_ = take<T>(workers, most * in);
    transposed = take<T>(workers, s.in_channels * most);
    covariance = take<T>(workers, s.in_channels * most);
    scale1 = take_zeros<T>(workers, most);
    bias1 = take_zeros<T>(workers, most);
    rstd1 = take_zeros<T>(workers, most);
    scaled = backward ? take<T>(workers, most * in) : nullptr;
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
    if (room > hidden) memset(depthwise, 0, static_cast<size_t>(taps * room) * sizeof(T));
    transpose(option.depthwise, taps, hidden, taps, depthwise, room);
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

  // Of the channels [begin, end).
  void fold_first(const MbShape& s, const MbOption<T>& option, const Statistics<T>& of,
                  int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      scale1[j] = bias1[j] = rstd1[j] = 0;
      if (j >= hidden) continue;
      const int64_t from = before_shuffle(j, hidden, option.groups);
      const double rstd = rstd_of(of.variance1[j], s.eps);
      const double scale = rstd * static_cast<double>(option.norm1.scale[from]);
      rstd1[j] = static_cast<T>(rstd);
      scale1[j] = static_cast<T>(scale);
      bias1[j] = static_cast<T>(static_cast<double>(option.norm1.shift[from]) -
                                scale * static_cast<double>(of.mean1[j]));
    }
  }

  void scale_expand(const MbShape& s) {
    const int64_t wide = padded<T>(s.in_channels);
    for (int64_t j = 0; j < room; ++j) {
      for (int64_t i = 0; i < wide; ++i) scaled[j * wide + i] = scale1[j] * expand[j * wide + i];
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
    if (option.groups == 1 && wide == in && room == hidden) {
      expand = option.expand;
    } else {
      if (option.groups > 1 || room > hidden || wide > in) {
        memset(copy_, 0, static_cast<size_t>(room * wide) * sizeof(T));
      }
      for (int64_t j = 0; j < hidden; ++j) {
        const int64_t from = before_shuffle(j, hidden, option.groups);
        const int64_t group = from / (hidden / option.groups);
        memcpy(copy_ + j * wide + group * share, option.expand + from * share,
               static_cast<size_t>(share) * sizeof(T));
      }
      expand = copy_;
    }
    transpose(expand, wide, room, in, transposed, room);
  }

  void read_project(const MbShape& s, const MbOption<T>& option, bool backward) {
    const int64_t out = s.out_channels, share = hidden / option.groups;
    const int64_t wide = padded<T>(out), size = out / option.groups;
    const int64_t elements = backward ? out * room : room * wide;
    memset(project, 0, static_cast<size_t>(elements) * sizeof(T));
    for (int64_t group = 0; group < option.groups; ++group) {
      const T* from = option.project + group * size * share;
      if (!backward) {
        transpose(from, share, size, share, project + group * (share * wide + size), wide);
        continue;
      }
      for (int64_t o = 0; o < size; ++o) {
        memcpy(project + (group * size + o) * room + group * share, from + o * share,
               static_cast<size_t>(share) * sizeof(T));
      }
    }
  }

  T* copy_;
};

}  // namespace
}  // namespace pynas
