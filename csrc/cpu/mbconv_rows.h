// The hidden rows of a slice, made from the input as they are wanted; and sums over channels.
#pragma once

#include "depthwise.h"
#include "mbconv_pack.h"

namespace pynas {
namespace {

// First half of a block, for one slice: rows of activation(norm1(expand x)).
template <typename T>
struct Expander {
  const MbShape& shape;
  const T* x;
  const Packed<T>& packed;
  Channels slice;
  Rows<T> rows;            // of the slice
  const int32_t* scatter;  // where a position of one image, or of a band of images, goes
  Activation activation;
  // Where expand x itself lies, in the places of `rows`, or null: not kept.
  T* raw = nullptr;
  bool multiplied = false;  // it is there already

  // Elements of the table for `scatter`.
  static int64_t scatter_room(const Layout<T>& layout) {
    return layout.shape.height * layout.shape.width * layout.images_at_once();
  }
  static void fill(const Layout<T>& layout, const Rows<T>& rows, int32_t* scatter) {
    for (int64_t n = 0; n < layout.images_at_once(); ++n) {
      for (int64_t y = 0; y < layout.shape.height; ++y) {
        for (int64_t x = 0; x < layout.shape.width; ++x) {
          *scatter++ = static_cast<int32_t>(rows.inside(n, y) + x * kLanes<T> - rows.data);
        }
      }
    }
  }

  // Rows [y0, y1) of the images [n0, n1), into the places of the images from `slot` on.
  void expand(int64_t n0, int64_t n1, int64_t y0, int64_t y1, int64_t slot) const {
    if (!raw) return multiply(n0, n1, y0, y1, rows.data + slot * rows.image_step, Then::kNorm);
    if (!multiplied) multiply(n0, n1, y0, y1, raw + slot * rows.image_step, Then::kSet);
    normalise(slot, slot + n1 - n0, y0, y1);
  }

  void multiply(int64_t n0, int64_t n1, int64_t y0, int64_t y1, T* to, Then then) const {
    const int64_t count = ((n1 - n0 - 1) * shape.height + y1 - y0) * shape.width;
    if (count <= 0) return;
    Gemm<T> g{1, shape.in_channels, shape.in_channels, 0, 1, packed.room, kLanes<T>,
              0, rows.vector_step()};
    g.scatter = scatter + y0 * shape.width;
    g.then = then;
    g.scale = packed.scale1 + slice.first;
    g.bias = packed.bias1 + slice.first;
    g.activation = activation;
    gemm(count, slice.vectors, g, x + (n0 * shape.height + y0) * shape.width * shape.in_channels,
         packed.transposed + slice.first, to);
  }

  // From `raw` to `rows`, of the images in these slots.
  void normalise(int64_t n0, int64_t n1, int64_t y0, int64_t y1) const {
    with_activation(activation, [&](auto kind) {
      for (int64_t n = n0; n < n1; ++n) {
        for (int64_t y = y0; y < y1; ++y) {
          T* line = rows.inside(n, y);
          for (int64_t v = 0; v < slice.vectors; ++v, line += rows.vector_step()) {
            const Vector<T> scale = load(packed.scale1 + slice.first + v * kLanes<T>);
            const Vector<T> bias = load(packed.bias1 + slice.first + v * kLanes<T>);
            const T* from = raw + (line - rows.data);
            for (int64_t i = 0; i < shape.width * kLanes<T>; i += kLanes<T>) {
              store(line + i, activate<T>(kind.value, load(from + i) * scale + bias));
            }
          }
        }
      }
    });
  }

  // What a band of outputs needs, beyond the `have` rows that are there. Returns how many are.
  int64_t expand_for(const Band& band, int64_t kernel, int64_t have, int64_t slot) const {
    const int64_t pad = kernel / 2;
    if (band.n1 - band.n0 > 1) {
      expand(band.n0, band.n1, 0, shape.height, slot);
      return shape.height;
    }
    const int64_t need = smaller(shape.height, (band.y1 - 1) * shape.stride - pad + kernel);
    if (band.y0 == 0) have = 0;
    if (need > have) expand(band.n0, band.n1, have, need, slot);
    return larger(need, have);
  }
};

// Mean and sum of squared deviations of channels, gathered relative to an origin near their mean,
// so that a large mean costs no digits.
struct Moments {
  int64_t count;
  double *mean, *squares;  // [channels]

  // Adds another part (Chan, Golub and LeVeque).
  template <typename T>
  void add(int64_t more, const double* sum, const double* sum_of_squares, const T* origin,
           int64_t channels) {
    if (!more) return;
    const double a = static_cast<double>(count), b = static_cast<double>(more);
    for (int64_t c = 0; c < channels; ++c) {
      const double other = static_cast<double>(origin[c]) + sum[c] / b;
      const double apart = other - mean[c];
      squares[c] += sum_of_squares[c] - sum[c] * sum[c] / b + apart * apart * a * b / (a + b);
      mean[c] += apart * b / (a + b);
    }
    count += more;
  }
};

// Sums of shares by channel, each in its own place: added up in order, whoever made them.
struct ShareSums {
  int64_t channels, lines;
  double* data;  // [shares, lines, channels]

  double* at(int64_t share, int64_t line) const { return data + (share * lines + line) * channels; }
  double total(int64_t shares, int64_t line, int64_t channel) const {
    double sum = 0;
    for (int64_t share = 0; share < shares; ++share) sum += at(share, line)[channel];
    return sum;
  }
};

// Offsets at which vectors cover some dense channels: the last one overlaps the one before where
// the channels are no multiple of the vector. With fewer channels than a vector, copies pad.
template <typename T>
struct Columns {
  int64_t channels;

  int64_t vectors() const { return (channels + kLanes<T> - 1) / kLanes<T>; }
  bool narrow() const { return channels < kLanes<T>; }
  int64_t offset(int64_t v) const {
    return narrow() ? 0 : smaller(v * kLanes<T>, channels - kLanes<T>);
  }
  // Lanes of vector v that the vector before holds already.
  int64_t seen(int64_t v) const { return narrow() ? 0 : v * kLanes<T> - offset(v); }

  Vector<T> get(const T* line, int64_t v) const {
    if (!narrow()) return load(line + offset(v));
    alignas(kVectorBytes) T some[kLanes<T>] = {};
    memcpy(some, line, static_cast<size_t>(channels) * sizeof(T));
    return load(some);
  }
  void put(T* line, int64_t v, Vector<T> value) const {
    if (!narrow()) return store(line + offset(v), value);
    alignas(kVectorBytes) T some[kLanes<T>];
    store(some, value);
    memcpy(line, some, static_cast<size_t>(channels) * sizeof(T));
  }
};

}  // namespace
}  // namespace pynas
