// The forward pass of a layer.
#pragma once

#include "mbconv_moments.h"
#include "mbconv_rows.h"

namespace pynas {
namespace {

template <typename T>
class MbForwardPass {
  static constexpr int64_t kBytes = sizeof(T);
  static constexpr int64_t kRingBytes = 256 << 10;  // of hidden rows: a part of the second cache
  static constexpr int64_t kValueBytes = 32 << 20;  // of depthwise outputs between the two passes

 public:
  MbForwardPass(const MbForward<T>& args, const Workers& workers)
      : args_(args),
        s_(args.shape),
        workers_(workers),
        layout_(s_),
        packed_(s_, args.options, workers, false),
        direct_(layout_.direct()) {
    int64_t kernel = 3, most = 0;
    for (int64_t o = 0; o < s_.options; ++o) {
      kernel = larger(kernel, args.options[o].kernel);
      most = larger(most, padded<T>(args.options[o].hidden));
    }
    const int64_t bands = Layout<T>::rows_at_once(layout_.out_height, layout_.out_width);
    kept_ = direct_ ? s_.height : smaller(s_.height, bands * s_.stride + kernel);
    const int64_t room = layout_.row_room(s_.width, kernel / 2),
                  lines = layout_.positions * kLanes<T>;
    const int64_t images = direct_ ? s_.images : layout_.images_at_once();
    const int64_t of_rows = Rows<T>::elements(images, 1, kept_, room);
    group_ = direct_ ? layout_.group(kGroupBytes / kBytes, of_rows + lines, most)
                     : smaller(layout_.group(kRingBytes / kBytes, of_rows, most),
                               layout_.group(kValueBytes / kBytes, lines, most));
    slice_ = smaller(layout_.slice(), group_);
    const int64_t vectors = group_ / kLanes<T>;
    rows_room_ = vectors * of_rows;
    rows_ = take<T>(workers, (direct_ ? 1 : workers.count) * rows_room_);
    zeros_ = Rows<T>::take_zero_row(workers, room);
    scatter_ = take<int32_t>(workers, Expander<T>::scatter_room(layout_));
    band_room_ = layout_.spread(layout_.out_band_room());
    values_ = {take<T>(workers, layout_.positions * group_), vectors, layout_.out_width};
    hidden_ = take<T>(workers, workers.count * band_room_ * slice_);
    const int64_t channels = larger(group_, layout_.out_padded);
    sums_ = {channels, 2, take<double>(workers, layout_.shares * 2 * channels)};
    origins_ = take<T>(workers, layout_.shares * channels);
    mean_ = take<double>(workers, channels);
    squares_ = take<double>(workers, channels);
  }

  void run() {
    if (direct_) {
      const int64_t in = s_.in_channels;
      memset(args_.saved.mean, 0, static_cast<size_t>(in) * sizeof(T));
      memset(args_.saved.covariance, 0, static_cast<size_t>(in * layout_.in_padded) * sizeof(T));
    } else {
      input_moments(s_, layout_, workers_, args_.x, args_.saved.mean, args_.saved.covariance);
    }
    T* statistics = args_.saved.statistics;
    for (int64_t o = 0; o < s_.options; ++o) {
      const MbOption<T>& option = args_.options[o];
      const Statistics<T> of(statistics, option.hidden, s_.out_channels);
      statistics += Statistics<T>::elements(option.hidden, s_.out_channels);
      products_ = args_.saved.products + o * layout_.positions * layout_.out_padded;
      one_option(option, of);
    }
    apply();
  }

 private:
  void one_option(const MbOption<T>& option, const Statistics<T>& of) {
    packed_.read(s_, option, false);
    if (!direct_) {
      packed_.first_statistics(s_, args_.saved.mean, args_.saved.covariance, of.mean1,
                               of.variance1);
      packed_.fold_first(s_, option, of, 0, packed_.room);
    }
    Expander<T>::fill(layout_, rows_of(option, 0), scatter_);
    const Depthwise<T> convolution = depthwise<T>(option.kernel, s_.stride);
    for (int64_t first = 0; first < packed_.room; first += group_) {
      const int64_t channels = smaller(group_, packed_.room - first),
                    wanted = option.hidden - first;
      if (direct_) {
        parallel(workers_, layout_.shares,
                 [&](int64_t share, int64_t) { expand(option, first, channels, share); });
        collect(of.mean1 + first, of.variance1 + first, channels, wanted, layout_.in_image());
        packed_.fold_first(s_, option, of, first, first + channels);
      }
      parallel(workers_, layout_.shares, [&](int64_t share, int64_t worker) {
        values(option, convolution, first, channels, share, worker);
      });
      collect(of.mean2 + first, of.variance2 + first, channels, wanted, layout_.out_image());
      packed_.fold_second(s_, option, of, first, first + channels);
      parallel(workers_, layout_.shares, [&](int64_t share, int64_t worker) {
        project(first, channels, layout_.turn(share, Way::kDown), worker);
      });
    }
    collect(of.mean3, of.variance3, s_.out_channels, s_.out_channels, layout_.out_image());
  }

  Rows<T> rows_of(const MbOption<T>& option, int64_t worker) const {
    const int64_t pad = option.kernel / 2, room = layout_.row_room(s_.width, pad);
    const int64_t vectors = group_ / kLanes<T>;
    return {rows_ + (direct_ ? 0 : worker) * rows_room_, kept_, s_.width, pad, room, vectors,
            Rows<T>::elements(1, vectors, kept_, room),  zeros_};
  }

  Expander<T> expander_of(const Channels& slice, const Rows<T>& rows) const {
    const Rows<T> of_slice = rows.from(slice.at);
    return {s_,       args_.x,  packed_,       slice,
            of_slice, scatter_, s_.activation, direct_ ? of_slice.data : nullptr,
            true};
  }

  // What the first convolution gives for a group of channels, and its sums.
  void expand(const MbOption<T>& option, int64_t first, int64_t channels, int64_t index) {
    const Rows<T> rows = rows_of(option, 0);
    const Share share = layout_.share(index);
    for (int64_t n = share.n0; n < share.n1; ++n) rows.clear_pads(n);
    T* origin = origins_ + index * sums_.channels;
    clear_sums(index);
    bool begun = false;
    layout_.for_in_bands(share, Way::kUp, [&](const Band& band) {
      for_slices<T>(first, channels, [&](const Channels& slice) {
        const Expander<T> expander = expander_of(slice, rows);
        expander.multiply(band.n0, band.n1, band.y0, band.y1,
                          expander.rows.data + band.n0 * rows.image_step, Then::kSet);
        for (int64_t v = 0; v < slice.vectors; ++v) {
          const int64_t channel = (slice.at + v) * kLanes<T>;
          sum_rows(expander.rows.from(v), band, begun, origin + channel,
                   sums_.at(index, 0) + channel);
        }
      });
      begun = true;
    });
  }

  // Sums one vector's positions over a band.
  void sum_rows(const Rows<T>& rows, const Band& band, bool begun, T* origin,
                double* of_share) const {
    if (!begun) store(origin, load(rows.inside(band.n0, band.y0)));
    const Vector<T> shift = load(origin);
    Vector<T> sum{}, squares{};
    for (int64_t n = band.n0; n < band.n1; ++n) {
      for (int64_t y = band.y0; y < band.y1; ++y) {
        const T* line = rows.inside(n, y);
        for (int64_t i = 0; i < band.width * kLanes<T>; i += kLanes<T>) {
          const Vector<T> more = load(line + i) - shift;
          sum += more;
          squares += more * more;
        }
      }
    }
    add_to<T>(of_share, sum);
    add_to<T>(of_share + sums_.channels, squares);
  }

  void clear_sums(int64_t index) {
    memset(sums_.at(index, 0), 0, static_cast<size_t>(2 * sums_.channels) * sizeof(double));
  }

  // Depthwise outputs of a group of channels, and their sums.
  void values(const MbOption<T>& option, const Depthwise<T>& convolution, int64_t first,
              int64_t channels, int64_t index, int64_t worker) {
    const Rows<T> rows = rows_of(option, worker);
    for (int64_t n = 0; !direct_ && n < layout_.images_at_once(); ++n) rows.clear_pads(n);
    clear_sums(index);
    int64_t have = 0;
    bool begun = false;
    layout_.for_out_bands(layout_.share(index), Way::kUp, [&](const Band& band) {
      int64_t now = have;
      for_slices<T>(first, channels, [&](const Channels& slice) {
        const Expander<T> expander = expander_of(slice, rows);
        now = expander.expand_for(band, option.kernel, have, direct_ ? band.n0 : 0);
        values_of_slice(expander, convolution, option.kernel, band, index, begun);
      });
      have = now;
      begun = true;
    });
  }

  void values_of_slice(const Expander<T>& expander, const Depthwise<T>& convolution, int64_t kernel,
                       const Band& band, int64_t index, bool begun) {
    const Channels& slice = expander.slice;
    const Rows<T>& rows = expander.rows;
    const Lines<T> values = values_.from(slice.at);
    const T* weights = packed_.depthwise + slice.first;
    const int64_t channel = slice.at * kLanes<T>, pad = kernel / 2, slot = direct_ ? band.n0 : 0;
    T* origin = origins_ + index * sums_.channels + channel;
    alignas(kVectorBytes) T sums[kMostSlice<T>][2 * kLanes<T>] = {};
    const T* window[kMostKernel];
    if (!begun) {  // the first output is near enough to the mean
      rows.window(slot, band.y0 * s_.stride - pad, kernel, s_.height, window);
      convolution.apply({window, rows.vector_step(), slice.vectors, 1}, weights, packed_.room,
                        origin, kLanes<T>);
    }
    for (int64_t row = 0; row < band.rows(); ++row) {
      const int64_t n = slot + row / (band.y1 - band.y0);
      const int64_t y = band.y0 + row % (band.y1 - band.y0);
      rows.window(n, y * s_.stride - pad, kernel, s_.height, window);
      convolution.forward({window, rows.vector_step(), slice.vectors, band.width}, weights,
                          packed_.room, values.line(band.first_row() + row), values.vector_step(),
                          origin, sums[0]);
    }
    double* of_share = sums_.at(index, 0) + channel;
    for (int64_t v = 0; v < slice.vectors; ++v) {
      add_to<T>(of_share + v * kLanes<T>, load(sums[v]));
      add_to<T>(of_share + sums_.channels + v * kLanes<T>, load(sums[v] + kLanes<T>));
    }
  }

  // Adds a group's part of the last product, and after the last group sums the product up.
  void project(int64_t first, int64_t channels, int64_t index, int64_t worker) {
    const int64_t wide = layout_.out_padded;
    T* hidden = hidden_ + worker * band_room_ * slice_;
    const bool last = first + channels == packed_.room;
    T* origin = origins_ + index * sums_.channels;
    double* of_share = sums_.at(index, 0);
    clear_sums(index);
    bool begun = false;
    layout_.for_out_bands(layout_.share(index), Way::kDown, [&](const Band& band) {
      T* product = products_ + band.begin() * wide;
      for_slices<T>(first, channels, [&](const Channels& slice) {
        activate_values(slice, band, hidden);
        Gemm<T> g{slice.vectors, kLanes<T>, kLanes<T>, band_room_ * kLanes<T>, 1, wide,
                  kLanes<T>,     wide,      kLanes<T>};
        g.then = slice.first ? Then::kAdd : Then::kSet;
        gemm(band.positions(), wide / kLanes<T>, g, hidden, packed_.project + slice.first * wide,
             product);
      });
      if (!last) return;
      if (!begun) memcpy(origin, product, static_cast<size_t>(wide) * sizeof(T));
      begun = true;
      sum_products(product, band.positions(), origin, of_share);
    });
  }

  // What the last convolution reads.
  void activate_values(const Channels& slice, const Band& band, T* hidden) const {
    const Lines<T> values = values_.from(slice.at);
    with_activation(s_.activation, [&](auto kind) {
      for (int64_t row = 0; row < band.rows(); ++row) {
        const T* line = values.line(band.first_row() + row);
        for (int64_t v = 0; v < slice.vectors; ++v, line += values.vector_step()) {
          const Vector<T> scale = load(packed_.scale2 + slice.first + v * kLanes<T>);
          const Vector<T> bias = load(packed_.bias2 + slice.first + v * kLanes<T>);
          T* to = hidden + (v * band_room_ + row * band.width) * kLanes<T>;
          for (int64_t i = 0; i < band.width * kLanes<T>; i += kLanes<T>) {
            store(to + i, activate<T>(kind.value, load(line + i) * scale + bias));
          }
        }
      }
    });
  }

  void sum_products(const T* product, int64_t count, const T* origin, double* of_share) const {
    const int64_t wide = layout_.out_padded;
    for (int64_t c = 0; c < wide; c += kLanes<T>) {
      const Vector<T> shift = load(origin + c);
      Vector<T> first{}, second{};
      for (int64_t i = 0; i < count; ++i) {
        const Vector<T> more = load(product + i * wide + c) - shift;
        first += more;
        second += more * more;
      }
      add_to<T>(of_share + c, first);
      add_to<T>(of_share + sums_.channels + c, second);
    }
  }

  // Mean and biased variance from the shares' sums over images of so many positions.
  void collect(T* mean, T* variance, int64_t channels, int64_t wanted, int64_t image) const {
    memset(mean_, 0, static_cast<size_t>(channels) * sizeof(double));
    memset(squares_, 0, static_cast<size_t>(channels) * sizeof(double));
    Moments moments{0, mean_, squares_};
    for (int64_t i = 0; i < layout_.shares; ++i) {
      const Share share = layout_.share(i);
      const int64_t count = (share.n1 - share.n0) * image;
      moments.add(count, sums_.at(i, 0), sums_.at(i, 1), origins_ + i * sums_.channels, channels);
    }
    for (int64_t c = 0; c < smaller(channels, wanted); ++c) {
      mean[c] = static_cast<T>(mean_[c]);
      const double v = squares_[c] / static_cast<double>(moments.count);
      variance[c] = static_cast<T>(v < 0 ? 0 : v);
    }
  }

  bool residual() const { return s_.stride == 1 && s_.in_channels == s_.out_channels; }
  T coefficients(int64_t image, T* scale, T* shift) const;
  void apply() const;

  const MbForward<T>& args_;
  const MbShape& s_;
  const Workers& workers_;
  const Layout<T> layout_;
  Packed<T> packed_;
  bool direct_;
  int64_t group_, slice_, kept_, rows_room_, band_room_;
  Lines<T> values_;
  T *rows_, *zeros_, *hidden_, *origins_, *products_ = nullptr;
  int32_t* scatter_;
  ShareSums sums_;
  double *mean_, *squares_;
};

// What one image's products are multiplied with, [options, out], and what is added, [out]. Returns
// the factor of the input.
template <typename T>
T MbForwardPass<T>::coefficients(int64_t image, T* scale, T* shift) const {
  const int64_t out = s_.out_channels, wide = layout_.out_padded;
  const MbGates<T>& g = args_.gates;
  const T* gates = g.values ? g.values + image * g.image_step : nullptr;
  double input = g.identity >= 0 ? static_cast<double>(gates[g.identity]) : 0;
  memset(shift, 0, static_cast<size_t>(wide) * sizeof(T));
  T* statistics = args_.saved.statistics;
  for (int64_t o = 0; o < s_.options; ++o) {
    const MbOption<T>& option = args_.options[o];
    const Statistics<T> of(statistics, option.hidden, out);
    statistics += Statistics<T>::elements(option.hidden, out);
    const double gate = gates ? static_cast<double>(gates[option.gate]) : 1;
    if (residual()) input += gate;
    for (int64_t c = 0; c < out; ++c) {
      const double a =
          static_cast<double>(option.norm3.scale[c]) * rstd_of(of.variance3[c], s_.eps);
      scale[o * wide + c] = static_cast<T>(gate * a);
      shift[c] += static_cast<T>(gate * (static_cast<double>(option.norm3.shift[c]) -
                                         a * static_cast<double>(of.mean3[c])));
    }
  }
  return static_cast<T>(input);
}

// y = sum of gate * norm3(product), plus the input times the gates of what adds it.
template <typename T>
void MbForwardPass<T>::apply() const {
  const Columns<T> columns{s_.out_channels};
  const int64_t out = s_.out_channels, wide = layout_.out_padded, options = s_.options;
  const int64_t image = layout_.out_height * layout_.out_width;
  const int64_t step = layout_.positions * wide;
  const bool adds = residual() || args_.gates.identity >= 0;
  T* memory = take_zeros<T>(workers_, workers_.count * (options + 1) * wide);
  parallel(workers_, layout_.shares, [&](int64_t index, int64_t worker) {
    T *scale = memory + worker * (options + 1) * wide, *shift = scale + options * wide;
    const Share share = layout_.share(index);
    for (int64_t n = share.n0; n < share.n1; ++n) {
      const Vector<T> times = broadcast(coefficients(n, scale, shift));
      for (int64_t p = n * image; p < (n + 1) * image; ++p) {
        for (int64_t v = 0; v < columns.vectors(); ++v) {
          const int64_t at = columns.offset(v);
          Vector<T> sum = load(shift + at);
          const T* product = args_.saved.products + p * wide + at;
          for (int64_t o = 0; o < options; ++o) {
            sum += load(scale + o * wide + at) * load(product + o * step);
          }
          if (adds) sum += times * columns.get(args_.x + p * out, v);
          columns.put(args_.y + p * out, v, sum);
        }
      }
    }
  });
}

}  // namespace
}  // namespace pynas
