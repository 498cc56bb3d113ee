// 3x3 pools of an edge, which see no padding.
#pragma once

#include "edge_parts.h"

namespace pynas {
namespace {

// The inputs of one output: rows [y0, y1) and columns [x0, x1).
struct PoolWindow {
  int64_t y0, y1, x0, x1;
  PoolWindow(const EdgeShape& s, int64_t y, int64_t x)
      : y0(larger<int64_t>(0, y * s.stride - 1)),
        y1(smaller(s.height, y * s.stride + 2)),
        x0(larger<int64_t>(0, x * s.stride - 1)),
        x1(smaller(s.width, x * s.stride + 2)) {}
  int64_t count() const { return (y1 - y0) * (x1 - x0); }
};

// The largest input of a window, and which it was: torch's, for which a NaN is the largest.
template <typename T>
struct Largest {
  Vector<T> value, at;

  template <typename Get>
  Largest(const PoolWindow& window, Get&& get) : at{} {
    bool first = true;
    T index = 0;
    for (int64_t y = window.y0; y < window.y1; ++y) {
      for (int64_t x = window.x0; x < window.x1; ++x, index += 1) {
        const Vector<T> now = get(y, x);
        if (first) {
          value = now;
          first = false;
          continue;
        }
        const Vector<T> place = broadcast(index);
        const auto stays = (now <= value);  // false where either is a NaN
        const auto nan = (now != now);
        const auto was_nan = (value != value);
        at = nan ? place : (was_nan ? at : (stays ? at : place));
        value = nan ? now : (was_nan ? value : (stays ? value : now));
      }
    }
  }
};

// Results of a pool over a band of outputs.
template <typename T>
void pool_band(const EdgeLayout<T>& layout, bool maximum, const T* x, const Band& band,
               const Lines<T>& to) {
  constexpr int64_t kL = kLanes<T>;
  const EdgeShape& s = layout.shape;
  for (int64_t row = 0; row < band.rows(); ++row) {
    const int64_t n = band.n0 + row / (band.y1 - band.y0);
    const int64_t y = band.y0 + row % (band.y1 - band.y0);
    const T* image = x + n * s.height * s.width * s.channels;
    for (int64_t v = 0; v < layout.vectors; ++v) {
      T* line = to.from(v).line(band.first_row() + row);
      const auto get = [&](int64_t i, int64_t j) {
        return get_channels(image + (i * s.width + j) * s.channels, v, s.channels);
      };
      for (int64_t i = 0; i < band.width; ++i) {
        const PoolWindow window(s, y, i);
        if (maximum) {
          store(line + i * kL, Largest<T>(window, get).value);
          continue;
        }
        Vector<T> sum{};
        for (int64_t a = window.y0; a < window.y1; ++a) {
          for (int64_t b = window.x0; b < window.x1; ++b) sum += get(a, b);
        }
        store(line + i * kL, sum / broadcast(static_cast<T>(window.count())));
      }
    }
  }
}

// Adds the gradient of one row of a pool's outputs to rows of its inputs. gradient: the vectors of
// that row, `step` elements apart.
template <typename T>
void pool_back(const EdgeLayout<T>& layout, bool maximum, const T* x, int64_t n, int64_t y,
               const T* gradient, int64_t step, const Rows<T>& to, int64_t slot) {
  constexpr int64_t kL = kLanes<T>;
  const EdgeShape& s = layout.shape;
  const T* image = x + n * s.height * s.width * s.channels;
  for (int64_t v = 0; v < layout.vectors; ++v) {
    const Rows<T> rows = to.from(v);
    const auto get = [&](int64_t i, int64_t j) {
      return get_channels(image + (i * s.width + j) * s.channels, v, s.channels);
    };
    for (int64_t i = 0; i < layout.out.shape.width; ++i) {
      const PoolWindow window(s, y, i);
      Vector<T> g = load(gradient + v * step + i * kL);
      if (!maximum) g = g / broadcast(static_cast<T>(window.count()));
      const Vector<T> at = maximum ? Largest<T>(window, get).at : Vector<T>{};
      T index = 0;
      for (int64_t a = window.y0; a < window.y1; ++a) {
        T* row = rows.inside(slot, a);
        for (int64_t b = window.x0; b < window.x1; ++b, index += 1) {
          const Vector<T> share = maximum ? (at == broadcast(index) ? g : Vector<T>{}) : g;
          store(row + b * kL, load(row + b * kL) + share);
        }
      }
    }
  }
}

}  // namespace
}  // namespace pynas
