// From gradients of the moments of patches to those of the images.
#pragma once

#include "patches_forward.h"

namespace pynas {
namespace {

template <typename T>
class PatchBackwardPass {
 public:
  PatchBackwardPass(const PatchBackward<T>& args, const Workers& workers)
      : args_(args),
        s_(args.shape),
        workers_(workers),
        room_(padded<T>(s_.channels)),
        step_(s_.width + kReach),
        kernel_(take_zeros<T>(workers, kMoves * s_.channels * room_)),
        lines_(take_zeros<T>(workers, 4 * 5 * s_.channels * room_)),
        corners_(take_zeros<T>(workers, kCorners * s_.channels * room_)),
        constants_(take_zeros<T>(workers, kPlaces * s_.channels)),
        middle_(take_zeros<T>(workers, s_.channels)) {}

  void run() {
    make_kernels();
    make_constants();
    const int64_t size = (s_.height + 2 * kReach + 1) * step_ * room_ + 2 * kReach * room_;
    const int64_t rows = larger<int64_t>(1, kBandPositions / step_);
    T* images = take_zeros<T>(workers_, workers_.count * size);
    T* bands = take<T>(workers_, workers_.count * rows * step_ * room_);
    parallel(workers_, s_.images, [&](int64_t n, int64_t worker) {
      T* image = images + worker * size + kReach * (step_ + 1) * room_;
      read(n, image);
      T* band = bands + worker * rows * step_ * room_;
      for (int64_t y = 0; y < s_.height; y += rows) {
        convolve(image, y, smaller(rows, s_.height - y), band);
        write(n, y, smaller(y + rows, s_.height), band);
      }
      add_borders(n);
    });
  }

 private:
  T scale() const { return T(1) / static_cast<T>(s_.images * s_.height * s_.width); }
  int64_t wide() const { return kPlaces * s_.channels; }
  // The gradient with respect to the product of two places, which stands twice in the covariance.
  T both(int64_t a, int64_t c, int64_t b, int64_t e) const {
    const int64_t first = a * s_.channels + c, second = b * s_.channels + e;
    return args_.covariance_gradient[first * wide() + second] +
           args_.covariance_gradient[second * wide() + first];
  }

  // What a position gets from another is a sum over pairs of places; near a border some of them
  // belong to patches outside.
  void make_kernels() {
    const int64_t channels = s_.channels;
    parallel(workers_, channels, [&](int64_t c, int64_t) {
      for (int64_t a = 0; a < kPlaces; ++a) {
        for (int64_t b = 0; b < kPlaces; ++b) {
          const int64_t dy = row_of(b) - row_of(a), dx = column_of(b) - column_of(a);
          T* to = kernel_ + ((dy + kReach) * 5 + dx + kReach) * channels * room_;
          const int64_t row = dy == 0 ? row_of(a) : 0, column = dx == 0 ? column_of(a) : 0;
          for (int64_t e = 0; e < channels; ++e) {
            const T value = both(a, c, b, e) * scale();
            to[e * room_ + c] += value;
            if (row) line(row > 0 ? 0 : 1, dx)[e * room_ + c] -= value;
            if (column) line(column > 0 ? 2 : 3, dy)[e * room_ + c] -= value;
            if (row && column) {
              corner((row > 0 ? 0 : 2) + (column > 0 ? 0 : 1))[e * room_ + c] += value;
            }
          }
        }
      }
    });
  }
  T* line(int64_t which, int64_t move) const {
    return lines_ + (which * 5 + move + 2) * s_.channels * room_;
  }
  T* corner(int64_t which) const { return corners_ + which * s_.channels * room_; }

  // What every patch adds at one of its places, whatever is in it.
  void make_constants() {
    parallel(workers_, wide(), [&](int64_t i, int64_t) {
      double sum = static_cast<double>(args_.mean_gradient[i]);
      for (int64_t j = 0; j < wide(); ++j) {
        sum -= static_cast<double>(
                   both(i / s_.channels, i % s_.channels, j / s_.channels, j % s_.channels)) *
               static_cast<double>(args_.mean[j]);
      }
      constants_[i] = static_cast<T>(sum * static_cast<double>(scale()));
    });
    for (int64_t i = 0; i < wide(); ++i) middle_[i % s_.channels] += constants_[i];
  }

  // Sum of the constants of patches that lie inside, for a position.
  T constant(int64_t y, int64_t x, int64_t c) const {
    T sum = 0;
    for (int64_t place = 0; place < kPlaces; ++place) {
      const int64_t row = y - row_of(place), column = x - column_of(place);
      if (row >= 0 && row < s_.height && column >= 0 && column < s_.width) {
        sum += constants_[place * s_.channels + c];
      }
    }
    return sum;
  }

  void read(int64_t n, T* image) const {
    const T* from = args_.x + n * s_.height * s_.width * s_.channels;
    for (int64_t y = 0; y < s_.height; ++y) {
      for (int64_t x = 0; x < s_.width; ++x, from += s_.channels) {
        memcpy(image + (y * step_ + x) * room_, from, static_cast<size_t>(s_.channels) * sizeof(T));
      }
    }
  }

  // Rows [y, y + count) of the convolution; between rows, positions that nobody reads.
  void convolve(const T* image, int64_t y, int64_t count, T* band) const {
    for (int64_t dy = -kReach; dy <= kReach; ++dy) {
      const Gemm<T> g{5,
                      s_.channels,
                      room_,
                      room_,
                      1,
                      room_,
                      kLanes<T>,
                      room_,
                      kLanes<T>,
                      nullptr,
                      dy == -kReach ? Then::kSet : Then::kAdd};
      gemm(count * step_, room_ / kLanes<T>, g, image + ((y + dy) * step_ - kReach) * room_,
           kernel_ + (dy + kReach) * 5 * s_.channels * room_, band);
    }
  }

  // The convolution, the constants and the mean image's gradient.
  void write(int64_t n, int64_t y0, int64_t y1, const T* band) const {
    const int64_t channels = s_.channels;
    const T of_image = T(1) / static_cast<T>(s_.images);
    for (int64_t y = y0; y < y1; ++y) {
      for (int64_t x = 0; x < s_.width; ++x) {
        const bool middle = y > 0 && y < s_.height - 1 && x > 0 && x < s_.width - 1;
        const int64_t at = (y * s_.width + x) * channels;
        const T* from = band + ((y - y0) * step_ + x) * room_;
        T* to = args_.x_gradient + n * s_.height * s_.width * channels + at;
        for (int64_t c = 0; c < channels; ++c) {
          const T rest = middle ? middle_[c] : constant(y, x, c);
          to[c] = from[c] + (rest + args_.image_gradient[at + c] * of_image);
        }
      }
    }
  }

  // What the convolution has from patches that lie outside, taken off.
  void add_borders(int64_t n) const {
    const int64_t channels = s_.channels, image = s_.height * s_.width * channels;
    const T* x = args_.x + n * image;
    T* to = args_.x_gradient + n * image;
    const int64_t bottom = s_.height - 1, right = s_.width - 1;
    const auto along = [&](int64_t which, int64_t y, int64_t x0, int64_t length, int64_t apart) {
      for (int64_t move = -2; move <= 2; ++move) {
        for (int64_t i = larger<int64_t>(0, -move); i < smaller(length, length - move); ++i) {
          const int64_t at = (y * s_.width + x0) * channels + i * apart;
          multiply_add(line(which, move), x + at + move * apart, to + at);
        }
      }
    };
    along(0, 0, 0, s_.width, channels);
    along(1, bottom, 0, s_.width, channels);
    along(2, 0, 0, s_.height, s_.width * channels);
    along(3, 0, right, s_.height, s_.width * channels);
    for (int64_t which = 0; which < kCorners; ++which) {
      const int64_t at = (which / 2 * bottom * s_.width + which % 2 * right) * channels;
      multiply_add(corner(which), x + at, to + at);
    }
  }

  // to += matrix transposed times from, of one position.
  void multiply_add(const T* matrix, const T* from, T* to) const {
    for (int64_t e = 0; e < s_.channels; ++e) {
      const T value = from[e];
      for (int64_t c = 0; c < s_.channels; ++c) to[c] += value * matrix[e * room_ + c];
    }
  }

  const PatchBackward<T>& args_;
  const PatchShape& s_;
  const Workers& workers_;
  int64_t room_, step_;  // padded channels; positions from a row to the next
  // Matrices [from][padded to]: of moves; of border lines, by line and move; of corners.
  T *kernel_, *lines_, *corners_;
  T *constants_, *middle_;  // [place][channel]; [channel]: of a position inside
};

}  // namespace
}  // namespace pynas
