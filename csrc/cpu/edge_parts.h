// What both directions of an edge share: its norms, its weights as products want them, and rows.
#pragma once

#include "depthwise_gradient.h"
#include "mbconv_rows.h"
#include "edge.h"
#include "transpose.h"

namespace pynas {
namespace {

// Channels of one position that make up vector v, padded with zeros.
template <typename T>
PYNAS_INLINE Vector<T> get_channels(const T* line, int64_t v, int64_t channels) {
  constexpr int64_t kL = kLanes<T>;
  if ((v + 1) * kL <= channels) return load(line + v * kL);
  alignas(kVectorBytes) T some[kL] = {};
  memcpy(some, line + v * kL, static_cast<size_t>(channels - v * kL) * sizeof(T));
  return load(some);
}

template <typename T>
PYNAS_INLINE void put_channels(T* line, int64_t v, int64_t channels, Vector<T> value) {
  constexpr int64_t kL = kLanes<T>;
  if ((v + 1) * kL <= channels) return store(line + v * kL, value);
  alignas(kVectorBytes) T some[kL];
  store(some, value);
  memcpy(line + v * kL, some, static_cast<size_t>(channels - v * kL) * sizeof(T));
}

// How the edge is cut: by its input, and by its output.
template <typename T>
struct EdgeLayout {
  explicit EdgeLayout(const EdgeShape& s)
      : shape(s),
        in(mb(s, s.height, s.width, s.stride)),
        out(mb(s, in.out_height, in.out_width, 1)),
        vectors(in.in_padded / kLanes<T>) {}

  EdgeShape shape;
  Layout<T> in, out;
  int64_t vectors;

  int64_t channels() const { return shape.channels; }
  int64_t padded_channels() const { return vectors * kLanes<T>; }
  // Elements of what a norm reads.
  int64_t elements() const { return out.in_positions * padded_channels(); }
  Lines<T> lines(T* data) const { return {data, vectors, out.shape.width}; }

 private:
  static MbShape mb(const EdgeShape& s, int64_t height, int64_t width, int64_t stride) {
    return {s.images, height, width, s.channels, s.channels, stride, 1, Activation::kRelu, s.eps};
  }
};

// A norm of an edge: where what it reads stands, and its numbers by channel, padded with zeros.
template <typename T>
struct EdgeNorm {
  T* read;  // lines
  T *mean, *variance;  // in EdgeSaved
  MbNorm<T> norm;
  T *scale, *bias, *centre;  // the norm gives scale * read + bias; centre: padded mean

  double rstd(int64_t c, double eps) const { return rstd_of(variance[c], eps); }
  double weight(int64_t c) const { return norm.scale ? static_cast<double>(norm.scale[c]) : 1; }
  void fold(int64_t channels, double eps) const {
    for (int64_t c = 0; c < channels; ++c) {
      const double s = weight(c) * rstd(c, eps);
      const double shift = norm.shift ? static_cast<double>(norm.shift[c]) : 0;
      scale[c] = static_cast<T>(s);
      bias[c] = static_cast<T>(shift - s * static_cast<double>(mean[c]));
      centre[c] = mean[c];
    }
  }
};

// All norms of an edge, in the order of EdgeSaved.
template <typename T>
struct EdgeNorms {
  EdgeNorms(const EdgeLayout<T>& layout, const EdgeOptions<T>& options, const EdgeSaved<T>& saved,
            const Workers& workers) {
    count = options.pool_count;
    for (int64_t i = 0; i < options.conv_count; ++i) count += options.convs[i].stages;
    all = take<EdgeNorm<T>>(workers, count);
    const int64_t room = layout.padded_channels();
    T* numbers = take_zeros<T>(workers, count * 3 * room);
    int64_t next = 0;
    const auto add = [&](const MbNorm<T>& norm) {
      T *statistics = saved.statistics + next * 2 * layout.channels(), *n = numbers + next * 3 * room;
      all[next] = {saved.read + next * layout.elements(),
                   statistics,
                   statistics + layout.channels(),
                   norm,
                   n,
                   n + room,
                   n + 2 * room};
      ++next;
    };
    for (int64_t i = 0; i < options.conv_count; ++i) {
      for (int64_t s = 0; s < options.convs[i].stages; ++s) add(options.convs[i].stage[s].norm);
    }
    for (int64_t i = 0; i < options.pool_count; ++i) add(options.pools[i].norm);
  }

  int64_t count;
  EdgeNorm<T>* all;
};

// A stage's weights: taps by vectors of channels, and the 1x1 convolution both ways around.
template <typename T>
struct EdgeWeights {
  T *taps, *flipped;     // [taps][padded channels]
  T *forward, *backward; // [in][out] and [out][in], padded both ways

  EdgeWeights(const EdgeStage<T>& stage, int64_t kernel, int64_t channels, const Workers& workers) {
    const int64_t room = padded<T>(channels), count = kernel * kernel;
    taps = take_zeros<T>(workers, count * room);
    flipped = take_zeros<T>(workers, count * room);
    forward = take_zeros<T>(workers, room * room);
    backward = take_zeros<T>(workers, room * room);
    transpose(stage.depthwise, count, channels, count, taps, room);
    for (int64_t tap = 0; tap < count; ++tap) {
      memcpy(flipped + tap * room, taps + (count - 1 - tap) * room,
             static_cast<size_t>(room) * sizeof(T));
    }
    transpose(stage.pointwise, channels, channels, channels, forward, room);
    for (int64_t c = 0; c < channels; ++c) {
      memcpy(backward + c * room, stage.pointwise + c * channels,
             static_cast<size_t>(channels) * sizeof(T));
    }
  }
};

// Rows of max(value, 0), with zeros around, made as they are wanted. fill(n, y, line) writes row y
// of image n; a line holds all vectors, `step` elements apart.
template <typename T>
struct ReluRows {
  Rows<T> rows;
  int64_t height;

  // What a kernel reaching `pad` beyond needs for the outputs of a band; `have`: rows that are
  // there. Returns how many are then.
  template <typename Fill>
  int64_t make(const Band& band, int64_t stride, int64_t pad, int64_t have, Fill&& fill) const {
    const bool whole = band.n1 - band.n0 > 1;
    const int64_t need = whole ? height : smaller(height, (band.y1 - 1) * stride + pad + 1);
    if (band.y0 == 0 || whole) have = 0;
    for (int64_t n = band.n0; n < band.n1; ++n) {
      for (int64_t y = have; y < need; ++y) fill(n, y, rows.inside(n - band.n0, y));
    }
    return larger(have, need);
  }
};

// Sum and sum of squares, less an origin, of lines over a band, for the moments of a norm.
template <typename T>
void sum_lines(const Lines<T>& lines, const Band& band, bool begun, T* origin, double* sums,
               int64_t step) {
  constexpr int64_t kL = kLanes<T>;
  for (int64_t v = 0; v < lines.vectors; ++v) {
    const Lines<T> of = lines.from(v);
    if (!begun) store(origin + v * kL, load(of.line(band.first_row())));
    const Vector<T> shift = load(origin + v * kL);
    Vector<T> sum{}, squares{};
    for (int64_t row = 0; row < band.rows(); ++row) {
      const T* line = of.line(band.first_row() + row);
      for (int64_t i = 0; i < band.width * kL; i += kL) {
        const Vector<T> more = load(line + i) - shift;
        sum += more;
        squares += more * more;
      }
    }
    add_to<T>(sums + v * kL, sum);
    add_to<T>(sums + step + v * kL, squares);
  }
}

}  // namespace
}  // namespace pynas
