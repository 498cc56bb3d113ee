// From images to the moments of their patches.
#pragma once

#include "mbconv_rows.h"
#include "patches.h"

namespace pynas {
namespace {

constexpr int64_t kReach = 2;       // of a move
constexpr int64_t kHalfMoves = 13;  // the others are their transposes
constexpr int64_t kLineMoves = 3;   // along a border line, likewise
constexpr int64_t kCorners = 4;

// Row and column of a place, from the middle of the patch.
PYNAS_INLINE int64_t row_of(int64_t place) { return place / 3 - 1; }
PYNAS_INLINE int64_t column_of(int64_t place) { return place % 3 - 1; }

// Products of the image with itself, by move: [move][channel][padded channel].
struct PatchProducts {
  // Of all positions: moves down, and to the right in the same row. Of border lines: top, bottom,
  // left and right. Of corners: top left, top right, bottom left, bottom right.
  static constexpr int64_t kLines = kHalfMoves, kCornersAt = kHalfMoves + 4 * kLineMoves;
  static constexpr int64_t kCount = kCornersAt + kCorners;

  // The place of a move among the first; dy * 5 + dx >= 0.
  static int64_t of_move(int64_t dy, int64_t dx) { return dy == 0 ? dx : 5 * dy + dx; }
  static int64_t of_line(int64_t line, int64_t move) { return kLines + line * kLineMoves + move; }
  static int64_t of_corner(int64_t corner) { return kCornersAt + corner; }
};

template <typename T>
class PatchForwardPass {
 public:
  PatchForwardPass(const PatchForward<T>& args, const Workers& workers)
      : args_(args),
        s_(args.shape),
        workers_(workers),
        room_(padded<T>(s_.channels)),
        step_(s_.width + kReach),
        shares_(larger<int64_t>(1, smaller(smaller(s_.images, kMostShares),
                                           s_.images * s_.height * s_.width / kSharePositions))),
        product_(s_.channels * room_),
        image_(s_.height * s_.width * s_.channels) {
    centre_ = take_zeros<T>(workers, room_);
    products_ = take_zeros<double>(workers, shares_ * PatchProducts::kCount * product_);
    sums_ = take_zeros<double>(workers, shares_ * image_);
  }

  void run() {
    centre();
    // A row of zeros above is not needed: moves go down. Left of a row are the zeros of the row
    // before, and one line of them more stands before the first.
    const int64_t size = (s_.height + kReach + 1) * step_ * room_ + kReach * room_;
    T* rows = take_zeros<T>(workers_, workers_.count * size);
    T* scratch = take<T>(workers_, workers_.count * PatchProducts::kCount * product_);
    parallel(workers_, shares_, [&](int64_t index, int64_t worker) {
      T* image = rows + worker * size + step_ * room_;
      T* found = scratch + worker * PatchProducts::kCount * product_;
      for (int64_t n = index * s_.images / shares_; n < (index + 1) * s_.images / shares_; ++n) {
        read(n, image, sums_ + index * image_);
        memset(found, 0, static_cast<size_t>(PatchProducts::kCount * product_) * sizeof(T));
        multiply(image, found);
        double* to = products_ + index * PatchProducts::kCount * product_;
        for (int64_t i = 0; i < PatchProducts::kCount * product_; ++i) {
          to[i] += static_cast<double>(found[i]);
        }
      }
    });
    add_shares();
    write();
  }

 private:
  // Means of channels, so that products have no large numbers to cancel.
  void centre() {
    const int64_t positions = s_.height * s_.width;
    double* sums = take_zeros<double>(workers_, shares_ * s_.channels);
    parallel(workers_, shares_, [&](int64_t index, int64_t) {
      const int64_t first = index * s_.images / shares_, last = (index + 1) * s_.images / shares_;
      double* sum = sums + index * s_.channels;
      for (int64_t p = first * positions; p < last * positions; ++p) {
        for (int64_t c = 0; c < s_.channels; ++c) {
          sum[c] += static_cast<double>(args_.x[p * s_.channels + c]);
        }
      }
    });
    for (int64_t c = 0; c < s_.channels; ++c) {
      double sum = 0;
      for (int64_t index = 0; index < shares_; ++index) sum += sums[index * s_.channels + c];
      centre_[c] = static_cast<T>(sum / static_cast<double>(s_.images * positions));
    }
  }

  T* at(T* image, int64_t y, int64_t x) const { return image + (y * step_ + x) * room_; }

  // An image less the means, zeros around; adds it to the sum of images.
  void read(int64_t n, T* image, double* sum) const {
    const T* from = args_.x + n * image_;
    for (int64_t y = 0; y < s_.height; ++y) {
      for (int64_t x = 0; x < s_.width; ++x, from += s_.channels, sum += s_.channels) {
        T* to = at(image, y, x);
        for (int64_t c = 0; c < s_.channels; ++c) {
          to[c] = from[c] - centre_[c];
          sum[c] += static_cast<double>(to[c]);
        }
      }
    }
  }

  // found[which] += sum over `count` positions, `apart` apart, of a times b transposed.
  void add(const T* a, const T* b, int64_t count, int64_t apart, T* found, int64_t which) const {
    const Gemm<T> g{1, count, 1, 0, apart, apart, kLanes<T>, room_, kLanes<T>, nullptr, Then::kAdd};
    gemm(s_.channels, room_ / kLanes<T>, g, a, b, found + which * product_);
  }

  void multiply(T* image, T* found) const {
    const int64_t rows = larger<int64_t>(1, kBandPositions / step_);
    for (int64_t y = 0; y < s_.height; y += rows) {
      const int64_t count = smaller(rows, s_.height - y) * step_;
      for (int64_t dy = 0; dy <= kReach; ++dy) {
        for (int64_t dx = dy ? -kReach : 0; dx <= kReach; ++dx) {
          add(at(image, y, 0), at(image, y + dy, dx), count, room_, found,
              PatchProducts::of_move(dy, dx));
        }
      }
    }
    const int64_t bottom = s_.height - 1, right = s_.width - 1, down = step_ * room_;
    for (int64_t move = 0; move < kLineMoves; ++move) {
      const auto line = [&](int64_t which, int64_t y, int64_t x, bool along) {
        const int64_t length = along ? s_.width : s_.height;
        if (move >= length) return;
        add(at(image, y, x), along ? at(image, y, x + move) : at(image, y + move, x), length - move,
            along ? room_ : down, found, PatchProducts::of_line(which, move));
      };
      line(0, 0, 0, true);
      line(1, bottom, 0, true);
      line(2, 0, 0, false);
      line(3, 0, right, false);
    }
    for (int64_t corner = 0; corner < kCorners; ++corner) {
      const T* of = at(image, corner / 2 * bottom, corner % 2 * right);
      add(of, of, 1, room_, found, PatchProducts::of_corner(corner));
    }
  }

  void add_shares() {
    for (int64_t index = 1; index < shares_; ++index) {
      const double* more = products_ + index * PatchProducts::kCount * product_;
      for (int64_t i = 0; i < PatchProducts::kCount * product_; ++i) products_[i] += more[i];
      for (int64_t i = 0; i < image_; ++i) sums_[i] += sums_[index * image_ + i];
    }
  }

  // Sum over images and over rows [y0, y1), columns [x0, x1) of a channel, less the means.
  double sum(int64_t y0, int64_t y1, int64_t x0, int64_t x1, int64_t c) const {
    const auto corner = [&](int64_t y, int64_t x) {
      return prefix_[(y * (s_.width + 1) + x) * s_.channels + c];
    };
    return corner(y1, x1) - corner(y0, x1) - corner(y1, x0) + corner(y0, x0);
  }

  void write() {
    const double images = static_cast<double>(s_.images);
    for (int64_t i = 0; i < image_; ++i) {
      const T centre = centre_[i % s_.channels];
      args_.image[i] = static_cast<T>(sums_[i] / images + static_cast<double>(centre));
    }
    const int64_t row = (s_.width + 1) * s_.channels;
    prefix_ = take_zeros<double>(workers_, (s_.height + 1) * row);
    for (int64_t y = 0; y < s_.height; ++y) {
      for (int64_t i = 0; i < s_.width * s_.channels; ++i) {
        double* to = prefix_ + (y + 1) * row + s_.channels + i;
        *to = sums_[y * s_.width * s_.channels + i] + to[-s_.channels] + to[-row] -
              to[-row - s_.channels];
      }
    }
    means_ = take<double>(workers_, kPlaces * s_.channels);
    for (int64_t place = 0; place < kPlaces; ++place) write_mean(place);
    parallel(workers_, kPlaces * (kPlaces + 1) / 2, [&](int64_t index, int64_t) {
      int64_t first = 0;
      while (index >= kPlaces - first) index -= kPlaces - first++;
      write_pair(first, first + index);
    });
  }

  // Positions whose patches have all given places inside the image: [y0, y1) and [x0, x1).
  struct Window {
    int64_t y0, y1, x0, x1;
    int64_t area() const { return y1 > y0 && x1 > x0 ? (y1 - y0) * (x1 - x0) : 0; }
  };
  Window window(int64_t a, int64_t b) const {
    const int64_t top = smaller(row_of(a), row_of(b)), low = larger(row_of(a), row_of(b));
    const int64_t left = smaller(column_of(a), column_of(b));
    const int64_t right = larger(column_of(a), column_of(b));
    return {larger<int64_t>(0, -top), smaller(s_.height, s_.height - low),
            larger<int64_t>(0, -left), smaller(s_.width, s_.width - right)};
  }
  double sum(const Window& w, int64_t place, int64_t c) const {
    if (!w.area()) return 0;
    return sum(w.y0 + row_of(place), w.y1 + row_of(place), w.x0 + column_of(place),
               w.x1 + column_of(place), c);
  }
  double count() const { return static_cast<double>(s_.images * s_.height * s_.width); }

  void write_mean(int64_t place) {
    const Window w = window(place, place);
    for (int64_t c = 0; c < s_.channels; ++c) {
      const double centred = sum(w, place, c);
      const double all =
          centred + static_cast<double>(s_.images * w.area()) * static_cast<double>(centre_[c]);
      means_[place * s_.channels + c] = all / count();
      args_.mean[place * s_.channels + c] = static_cast<T>(all / count());
    }
  }

  // Of the products, with signs, that make up those of two places.
  struct Term {
    const double* of;
    double sign;
  };

  void write_pair(int64_t a, int64_t b) const {
    // b does not come before a: b - a is a move down, or to the right in the same row.
    const int64_t dy = row_of(b) - row_of(a), dx = column_of(b) - column_of(a);
    Term terms[4];
    int64_t terms_count = 0;
    const auto put = [&](int64_t which, double sign) {
      terms[terms_count++] = {products_ + which * product_, sign};
    };
    put(PatchProducts::of_move(dy, dx), 1);
    const int64_t row = dy == 0 ? row_of(a) : 0, column = dx == 0 ? column_of(a) : 0;
    if (row) put(PatchProducts::of_line(row > 0 ? 0 : 1, dx), -1);
    if (column) put(PatchProducts::of_line(column > 0 ? 2 : 3, dy), -1);
    if (row && column) {
      put(PatchProducts::of_corner((row > 0 ? 0 : 2) + (column > 0 ? 0 : 1)), 1);
    }
    const Window w = window(a, b);
    const int64_t channels = s_.channels, wide = kPlaces * channels;
    const double area = static_cast<double>(s_.images * w.area());
    for (int64_t c = 0; c < channels; ++c) {
      const double sum_a = sum(w, a, c), centre_a = static_cast<double>(centre_[c]);
      const double mean_a = means_[a * channels + c];
      for (int64_t e = 0; e < channels; ++e) {
        double total = 0;
        for (int64_t t = 0; t < terms_count; ++t)
          total += terms[t].sign * terms[t].of[c * room_ + e];
        const double centre_b = static_cast<double>(centre_[e]);
        total += sum_a * centre_b + centre_a * (sum(w, b, e) + centre_b * area);
        const T value = static_cast<T>(total / count() - mean_a * means_[b * channels + e]);
        args_.covariance[(a * channels + c) * wide + b * channels + e] = value;
        args_.covariance[(b * channels + e) * wide + a * channels + c] = value;
      }
    }
  }

  const PatchForward<T>& args_;
  const PatchShape& s_;
  const Workers& workers_;
  int64_t room_, step_;  // padded channels; positions from a row to the next
  int64_t shares_, product_, image_;
  T* centre_;
  double *products_, *sums_, *prefix_ = nullptr, *means_ = nullptr;
};

}  // namespace
}  // namespace pynas
