// How an edge is cut, and what it makes of one image.
#pragma once

#include "edge.h"
#include "mbconv_rows.h"

namespace pynas {
namespace {

// Images are dealt into shares by the shape alone.
template <typename T>
struct EdgeLayout {
  explicit EdgeLayout(const EdgeShape& s)
      : shape(s),
        height((s.height + s.stride - 1) / s.stride),
        width((s.width + s.stride - 1) / s.stride),
        vectors(padded<T>(s.channels) / kLanes<T>),
        shares(larger<int64_t>(1, smaller(smaller(s.images, kMostShares),
                                          s.images * height * width / kSharePositions))) {}

  EdgeShape shape;
  int64_t height, width;  // of the output
  int64_t vectors, shares;

  int64_t channels() const { return shape.channels; }
  int64_t room() const { return vectors * kLanes<T>; }  // of a number by channel
  int64_t positions() const { return height * width; }  // of an output image
  int64_t elements() const { return positions() * room(); }
  int64_t in_elements() const { return shape.height * shape.width * shape.channels; }
  int64_t out_elements() const { return positions() * shape.channels; }
  Share share(int64_t index) const {
    return {index * shape.images / shares, (index + 1) * shape.images / shares};
  }
  // Rows of outputs that a product of matrices gets at once.
  int64_t rows_at_once() const {
    return smaller(height, larger<int64_t>(1, 2 * kBandPositions / width));
  }
};

// One image with zeros around: [vector][row][position][lane]. Rows are a little longer than needed:
// tiles of a stride 2 read beyond, and no power of two keeps them out of each other's places in the
// caches.
template <typename T>
struct Image {
  T* data;
  int64_t height, width, pad, step;  // step: positions of a row

  static int64_t row_step(int64_t width, int64_t pad) {
    const int64_t step = width + 2 * pad + 4;
    return step + (step % 4 == 0);
  }
  static int64_t elements(int64_t height, int64_t width, int64_t pad, int64_t vectors) {
    return vectors * (height + 2 * pad) * row_step(width, pad) * kLanes<T>;
  }
  static Image make(T* data, int64_t height, int64_t width, int64_t pad) {
    return {data, height, width, pad, row_step(width, pad)};
  }

  int64_t vector_step() const { return (height + 2 * pad) * step * kLanes<T>; }
  // The first position inside row y of a vector, which may be one of the border.
  T* row(int64_t vector, int64_t y) const {
    return data + vector * vector_step() + ((y + pad) * step + pad) * kLanes<T>;
  }
  // The same image for taps that reach `reach` beyond it: its border begins there.
  void window(int64_t top, int64_t reach, int64_t kernel, int64_t dilation, const T** rows) const {
    for (int64_t i = 0; i < kernel; ++i) rows[i] = row(0, top + i * dilation) - reach * kLanes<T>;
  }
};

// Vector v of one position's channels, the last one filled with zeros.
template <typename T>
PYNAS_INLINE Vector<T> get_channels(const T* position, int64_t v, int64_t channels) {
  constexpr int64_t kL = kLanes<T>;
  if ((v + 1) * kL <= channels) return load(position + v * kL);
  alignas(kVectorBytes) T some[kL] = {};
  memcpy(some, position + v * kL, static_cast<size_t>(channels - v * kL) * sizeof(T));
  return load(some);
}

template <typename T>
PYNAS_INLINE void put_channels(T* position, int64_t v, int64_t channels, Vector<T> value) {
  constexpr int64_t kL = kLanes<T>;
  if ((v + 1) * kL <= channels) return store(position + v * kL, value);
  alignas(kVectorBytes) T some[kL];
  store(some, value);
  memcpy(position + v * kL, some, static_cast<size_t>(channels - v * kL) * sizeof(T));
}

// to: every `stride`-th position of a dense image, through ReLU or as it is.
template <typename T, bool Relu>
void read_image(const T* x, const EdgeShape& s, int64_t stride, const Image<T>& to,
                int64_t vectors) {
  constexpr int64_t kL = kLanes<T>;
  for (int64_t v = 0; v < vectors; ++v) {
    for (int64_t y = 0; y < to.height; ++y) {
      const T* from = x + y * stride * s.width * s.channels;
      T* line = to.row(v, y);
      for (int64_t i = 0; i < to.width; ++i) {
        const Vector<T> t = get_channels(from + i * stride * s.channels, v, s.channels);
        store(line + i * kL, Relu ? activate<T>(Activation::kRelu, t) : t);
      }
    }
  }
}

// to: [vector][position][lane] of dense [position][channel].
template <typename T>
void to_vectors(const T* from, int64_t positions, int64_t channels, int64_t vectors, T* to) {
  constexpr int64_t kL = kLanes<T>;
  for (int64_t v = 0; v < vectors; ++v, to += positions * kL) {
    for (int64_t i = 0; i < positions; ++i) {
      store(to + i * kL, get_channels(from + i * channels, v, channels));
    }
  }
}

// A norm of an edge: what it reads, its numbers by channel padded with zeros, and their gradients.
template <typename T>
struct EdgeNorm {
  T* read;             // [image][vector][position][lane]
  T *mean, *variance;  // in EdgeSaved, not padded
  T gate;              // of what it gives; of what goes on to another stage, one
  MbNorm<T> norm;
  T *scale, *bias, *centre;  // it gives scale * read + bias; centre: padded mean

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
            const Workers& workers)
      : count(options.pool_count) {
    for (int64_t i = 0; i < options.conv_count; ++i) count += options.convs[i].stages;
    all = take<EdgeNorm<T>>(workers, count);
    const int64_t room = layout.room(), channels = layout.channels();
    T* numbers = take_zeros<T>(workers, count * 3 * room);
    int64_t next = 0;
    const auto add = [&](const MbNorm<T>& norm, int64_t gate) {
      T *statistics = saved.statistics + next * 2 * channels, *n = numbers + next * 3 * room;
      const T value = gate >= 0 && options.gates ? options.gates[gate] : T(1);
      all[next] = {saved.read + next * layout.shape.images * layout.elements(),
                   statistics,
                   statistics + channels,
                   value,
                   norm,
                   n,
                   n + room,
                   n + 2 * room};
      ++next;
    };
    for (int64_t i = 0; i < options.conv_count; ++i) {
      const EdgeConv<T>& conv = options.convs[i];
      if (conv.stages == 2) add(conv.stage[0].norm, -1);
      add(conv.stage[conv.stages - 1].norm, conv.gate);
    }
    for (int64_t i = 0; i < options.pool_count; ++i)
      add(options.pools[i].norm, options.pools[i].gate);
  }

  int64_t count;
  EdgeNorm<T>* all;
};

// act(conv, norm): every convolution, and the place of its first norm.
template <typename T, typename Act>
void for_convs(const EdgeOptions<T>& options, Act&& act) {
  int64_t norm = 0;
  for (int64_t i = 0; i < options.conv_count; norm += options.convs[i++].stages) {
    act(options.convs[i], norm);
  }
}

// act(norm, gate): every norm whose result goes to the output.
template <typename T, typename Act>
void for_last_norms(const EdgeOptions<T>& options, int64_t norms, Act&& act) {
  for_convs(options,
            [&](const EdgeConv<T>& conv, int64_t norm) { act(norm + conv.stages - 1, conv.gate); });
  for (int64_t i = 0; i < options.pool_count; ++i) {
    act(norms - options.pool_count + i, options.pools[i].gate);
  }
}

}  // namespace
}  // namespace pynas
