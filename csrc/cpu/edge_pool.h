// 3x3 pools of one image, which see no padding. Images are [vector][position][lane].
#pragma once

#include "depthwise_gradient.h"
#include "edge_image.h"

namespace pynas {
namespace {

// The places, of an axis of `size`, that output o sees: [first, last).
struct PoolAxis {
  int64_t size, stride;
  int64_t first(int64_t o) const { return larger<int64_t>(0, o * stride - 1); }
  int64_t last(int64_t o) const { return smaller(size, o * stride + 2); }
};

template <typename T>
class EdgePools {
 public:
  EdgePools(const EdgeLayout<T>& layout, const Workers& workers)
      : layout_(layout),
        rows_{layout.shape.height, layout.shape.stride},
        columns_{layout.shape.width, layout.shape.stride},
        line_(take<T>(workers, layout.shape.width * kL)),
        largest_(take<T>(workers, kKept * layout.width * kL)),
        which_(take<T>(workers, kKept * layout.width * kL)) {}

  void forward(bool maximum, const T* x, T* y) const {
    for (int64_t v = 0; v < layout_.vectors; ++v, x += in_step(), y += out_step()) {
      if (maximum) {
        for_largest(x, [&](int64_t row, int64_t o, Vector<T> value, Vector<T>, Vector<T>) {
          store(y + (row * layout_.width + o) * kL, value);
        });
      } else {
        average(x, y);
      }
    }
  }

  // Adds the gradient of x to `sum`.
  void backward(bool maximum, const T* x, const NormGradient<T>& norm, const T* gradient,
                const T* read, T* sum) const {
    for (int64_t v = 0; v < layout_.vectors; ++v) {
      const NormGradient<T> of = norm.from(v * kL);
      const Vector<T> times = load(of.times), square = load(of.square),
                      constant = load(of.constant);
      const T *g = gradient + v * out_step(), *r = read + v * out_step();
      const auto at = [&](int64_t row, int64_t o) {
        const int64_t place = (row * layout_.width + o) * kL;
        return load(g + place) * times + (load(r + place) * square + constant);
      };
      T* to = sum + v * in_step();
      maximum ? largest_back(x + v * in_step(), at, to) : average_back(at, to);
    }
  }

 private:
  static constexpr int64_t kL = kLanes<T>;
  static constexpr int64_t kKept = 3;  // rows whose largest values are kept

  int64_t in_step() const { return layout_.shape.height * layout_.shape.width * kL; }
  int64_t out_step() const { return layout_.positions() * kL; }
  T* in_row(T* image, int64_t y) const { return image + y * layout_.shape.width * kL; }
  const T* in_row(const T* image, int64_t y) const { return image + y * layout_.shape.width * kL; }
  Vector<T> share(int64_t row, int64_t o) const {
    const int64_t count =
        (rows_.last(row) - rows_.first(row)) * (columns_.last(o) - columns_.first(o));
    return broadcast(T(1) / static_cast<T>(count));
  }

  void average(const T* x, T* y) const {
    const int64_t width = layout_.shape.width * kL;
    for (int64_t row = 0; row < layout_.height; ++row, y += layout_.width * kL) {
      memcpy(line_, in_row(x, rows_.first(row)), static_cast<size_t>(width) * sizeof(T));
      for (int64_t a = rows_.first(row) + 1; a < rows_.last(row); ++a) {
        for (int64_t i = 0; i < width; i += kL) {
          store(line_ + i, load(line_ + i) + load(in_row(x, a) + i));
        }
      }
      for (int64_t o = 0; o < layout_.width; ++o) {
        Vector<T> sum = load(line_ + columns_.first(o) * kL);
        for (int64_t b = columns_.first(o) + 1; b < columns_.last(o); ++b) {
          sum += load(line_ + b * kL);
        }
        store(y + o * kL, sum * share(row, o));
      }
    }
  }

  template <typename At>
  void average_back(At&& at, T* sum) const {
    const int64_t width = layout_.shape.width * kL;
    for (int64_t row = 0; row < layout_.height; ++row) {
      memset(line_, 0, static_cast<size_t>(width) * sizeof(T));
      for (int64_t o = 0; o < layout_.width; ++o) {
        const Vector<T> each = at(row, o) * share(row, o);
        for (int64_t b = columns_.first(o); b < columns_.last(o); ++b) {
          store(line_ + b * kL, load(line_ + b * kL) + each);
        }
      }
      for (int64_t a = rows_.first(row); a < rows_.last(row); ++a) {
        T* to = in_row(sum, a);
        for (int64_t i = 0; i < width; i += kL) store(to + i, load(to + i) + load(line_ + i));
      }
    }
  }

  // Takes `now` where it is larger than the best so far, or is no number: torch's choice.
  PYNAS_INLINE static void choose(Vector<T> now, Vector<T> place, Vector<T>& best, Vector<T>& at) {
    const auto taken = (now > best) | (now != now);
    best = taken ? now : best;
    at = taken ? place : at;
  }

  // The largest value of each row's three columns, and which that was.
  void across(const T* row, int64_t kept) const {
    for (int64_t o = 0; o < layout_.width; ++o) {
      const int64_t first = columns_.first(o), left = o * layout_.shape.stride - 1;
      Vector<T> best = load(row + first * kL), at = broadcast(static_cast<T>(first - left));
      for (int64_t b = first + 1; b < columns_.last(o); ++b) {
        choose(load(row + b * kL), broadcast(static_cast<T>(b - left)), best, at);
      }
      store(largest_ + (kept * layout_.width + o) * kL, best);
      store(which_ + (kept * layout_.width + o) * kL, at);
    }
  }

  // put(row, o, value, y, x): of the largest value that an output sees, and where in its window.
  template <typename Put>
  void for_largest(const T* image, Put&& put) const {
    int64_t have = 0;
    for (int64_t row = 0; row < layout_.height; ++row) {
      for (; have < rows_.last(row); ++have) across(in_row(image, have), have % kKept);
      const int64_t first = rows_.first(row), top = row * layout_.shape.stride - 1;
      for (int64_t o = 0; o < layout_.width; ++o) {
        const auto place = [&](int64_t a) { return (a % kKept * layout_.width + o) * kL; };
        Vector<T> best = load(largest_ + place(first)), x = load(which_ + place(first));
        Vector<T> y = broadcast(static_cast<T>(first - top));
        for (int64_t a = first + 1; a < rows_.last(row); ++a) {
          const Vector<T> now = load(largest_ + place(a));
          const auto taken = (now > best) | (now != now);
          x = taken ? load(which_ + place(a)) : x;
          choose(now, broadcast(static_cast<T>(a - top)), best, y);
        }
        put(row, o, best, y, x);
      }
    }
  }

  template <typename At>
  void largest_back(const T* image, At&& at, T* sum) const {
    const int64_t stride = layout_.shape.stride;
    for_largest(image, [&](int64_t row, int64_t o, Vector<T>, Vector<T> y, Vector<T> x) {
      const Vector<T> g = at(row, o), zero{};
      for (int64_t a = rows_.first(row); a < rows_.last(row); ++a) {
        const Vector<T> of_row = y == broadcast(static_cast<T>(a - row * stride + 1)) ? g : zero;
        for (int64_t b = columns_.first(o); b < columns_.last(o); ++b) {
          T* to = in_row(sum, a) + b * kL;
          const Vector<T> more = x == broadcast(static_cast<T>(b - o * stride + 1)) ? of_row : zero;
          store(to, load(to) + more);
        }
      }
    });
  }

  EdgeLayout<T> layout_;
  PoolAxis rows_, columns_;
  T *line_, *largest_, *which_;
};

}  // namespace
}  // namespace pynas
