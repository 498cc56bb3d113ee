// How a layer is cut: images into shares, shares into bands of rows; channels into groups, which
// wait for their sums over all positions together, and groups into slices.
#pragma once

#include <cstring>
#include <type_traits>

#include "mbconv.h"
#include "simd.h"

namespace pynas {
namespace {

constexpr int64_t kBandPositions = 128;  // that a product of matrices gets at once, about
constexpr int64_t kSliceChannels = 48;
constexpr int64_t kMostShares = 16;
constexpr int64_t kSharePositions = 256;
constexpr int64_t kStoredBytes = 16 << 20;      // of a slice, for all images between two passes
constexpr int64_t kGroupBytes = (3 << 20) / 2;  // of a group, likewise: a part of the second cache
template <typename T>
constexpr int64_t kMostSlice = larger<int64_t>(1, kSliceChannels / kLanes<T>);  // vectors

template <typename T>
T* take(const Workers& workers, int64_t count) {
  return static_cast<T*>(workers.take(workers.self, count * static_cast<int64_t>(sizeof(T))));
}

template <typename T>
T* take_zeros(const Workers& workers, int64_t count) {
  T* memory = take<T>(workers, count);
  memset(memory, 0, static_cast<size_t>(count) * sizeof(T));
  return memory;
}

// Which end of the images a pass begins at. Every other pass goes backwards: it meets first what
// the pass before has left in the caches.
enum class Way { kUp, kDown };

// task(index, worker)
template <typename Task>
void parallel(const Workers& workers, int64_t tasks, Task&& task) {
  using Plain = typename std::remove_reference<Task>::type;
  workers.run(
      workers.self, tasks,
      [](void* context, int64_t index, int64_t worker) {
        (*static_cast<Plain*>(context))(index, worker);
      },
      const_cast<void*>(static_cast<const void*>(&task)));
}

// Rows [y0, y1) of the images [n0, n1): some rows of one image, or all of several small ones.
struct Band {
  int64_t n0, n1, y0, y1, width, height;
  int64_t first_row() const { return n0 * height + y0; }  // of all images
  int64_t rows() const { return (n1 - n0) * (y1 - y0); }
  int64_t begin() const { return first_row() * width; }
  int64_t positions() const { return (n1 - n0) * (y1 - y0) * width; }
};

struct Share {
  int64_t n0, n1;
};

template <typename T>
struct Layout {
  explicit Layout(const MbShape& s)
      : shape(s),
        in_positions(s.images * s.height * s.width),
        out_height((s.height + s.stride - 1) / s.stride),
        out_width((s.width + s.stride - 1) / s.stride),
        positions(s.images * out_height * out_width),
        in_padded(padded<T>(s.in_channels)),
        out_padded(padded<T>(s.out_channels)),
        shares(larger<int64_t>(
            1, smaller(smaller(s.images, kMostShares), in_positions / kSharePositions))) {}

  MbShape shape;
  int64_t in_positions, out_height, out_width, positions, in_padded, out_padded, shares;

  // Index of a share where a pass goes that way.
  int64_t turn(int64_t index, Way way) const {
    return way == Way::kUp ? index : shares - 1 - index;
  }
  Share share(int64_t index) const {
    return {index * shape.images / shares, (index + 1) * shape.images / shares};
  }

  // Positions of a row in memory, with `pad` zeros on both sides. At stride 2 tiles may read
  // beyond. No multiple of four: rows would share the same few places of the caches.
  int64_t row_room(int64_t width, int64_t pad) const {
    const int64_t room = width + 2 * pad + (shape.stride == 2 ? 4 : 0);
    return room + (room % 4 == 0);
  }

  // Positions between the vectors of a band: never a power of two, which would send all of them to
  // the same few places of the caches.
  static int64_t spread(int64_t positions) { return (positions + 7) / 8 * 8 + 5; }

  int64_t in_image() const { return shape.height * shape.width; }
  int64_t out_image() const { return out_height * out_width; }

  // Channels of each slice but the last of a group.
  int64_t slice() const { return kMostSlice<T> * kLanes<T>; }

  // Whether the first norm's statistics are taken from its input, as its convolution gives it, and
  // not from those of the layer's input: a product with the covariance costs channels squared for
  // every hidden channel, however few the positions are.
  bool direct() const {
    return 3 * in_positions < shape.in_channels * shape.in_channels && stores(4);
  }
  // Whether so many arrays of a slice are small enough to be kept from pass to pass.
  bool stores(int64_t arrays) const {
    const int64_t rows = shape.images * shape.height * row_room(shape.width, 2);
    return arrays * rows * slice() * static_cast<int64_t>(sizeof(T)) <= kStoredBytes;
  }

  // As many slices as fit the room for a group, but one at least; in channels. `most`: of a block.
  int64_t group(int64_t room, int64_t of_vector, int64_t most) const {
    const int64_t slices = larger<int64_t>(1, room / of_vector / kMostSlice<T>);
    return smaller(slices * slice(), most);
  }

  // Bands of inputs and of outputs hold equally many images.
  int64_t images_at_once() const {
    return larger<int64_t>(1, kBandPositions / (shape.height * shape.width));
  }
  static int64_t rows_at_once(int64_t height, int64_t width) {
    return smaller(height, larger<int64_t>(1, kBandPositions / width));
  }
  int64_t in_band_room() const {
    return images_at_once() * rows_at_once(shape.height, shape.width) * shape.width;
  }
  int64_t out_band_room() const {
    return images_at_once() * rows_at_once(out_height, out_width) * out_width;
  }

  template <typename Do>
  void for_bands(Share share, int64_t height, int64_t width, Way way, Do&& act) const {
    const int64_t images = images_at_once(), rows = rows_at_once(height, width);
    const int64_t groups = (share.n1 - share.n0 + images - 1) / images;
    for (int64_t i = 0; i < groups; ++i) {
      const int64_t n = share.n0 + (way == Way::kUp ? i : groups - 1 - i) * images;
      const int64_t last = smaller(n + images, share.n1);
      for (int64_t y = 0; y < height; y += rows) {
        act(Band{n, last, y, smaller(y + rows, height), width, height});
      }
    }
  }
  template <typename Do>
  void for_in_bands(Share share, Way way, Do&& act) const {
    for_bands(share, shape.height, shape.width, way, act);
  }
  template <typename Do>
  void for_out_bands(Share share, Way way, Do&& act) const {
    for_bands(share, out_height, out_width, way, act);
  }
};

// Some channels of a group.
struct Channels {
  int64_t first;  // the first one's place among the block's channels
  int64_t at;     // the first vector's place in the group
  int64_t vectors;
};

// act(slice) for the slices of a group.
template <typename T, typename Do>
void for_slices(int64_t first, int64_t channels, Do&& act) {
  const int64_t vectors = channels / kLanes<T>;
  for (int64_t at = 0; at < vectors; at += kMostSlice<T>) {
    act(Channels{first + at * kLanes<T>, at, smaller(kMostSlice<T>, vectors - at)});
  }
}

// Rows of hidden channels with zeros on both sides, of which some are kept: enough for a kernel to
// run down one image, or all rows of all images. [image][row][vector][position][lane]: what is used
// together lies together, because caches fetch ahead of long runs only.
template <typename T>
struct Rows {
  T* data;
  int64_t kept, width, pad, room;  // room: positions of a row in memory
  int64_t vectors, image_step;
  const T* zeros;  // rows outside the image

  int64_t vector_step() const { return room * kLanes<T>; }
  int64_t row_step() const { return vectors * vector_step(); }
  static int64_t elements(int64_t images, int64_t vectors, int64_t kept, int64_t room) {
    return images * vectors * kept * room * kLanes<T>;
  }

  // From some vector on; the steps stay.
  Rows from(int64_t vector) const {
    Rows rest = *this;
    rest.data += vector * vector_step();
    return rest;
  }

  // The position before the first of row y, of the first vector.
  T* row(int64_t n, int64_t y) const {
    const auto place = static_cast<uint32_t>(y) % static_cast<uint32_t>(kept);
    return data + n * image_step + place * row_step();
  }
  T* inside(int64_t n, int64_t y) const { return row(n, y) + pad * kLanes<T>; }

  void clear_pads(int64_t n) const {
    for (int64_t line = 0; line < vectors * kept; ++line) {
      T* from = data + n * image_step + line * vector_step();
      memset(from, 0, static_cast<size_t>(pad * kLanes<T>) * sizeof(T));
      memset(from + (pad + width) * kLanes<T>, 0,
             static_cast<size_t>((room - pad - width) * kLanes<T>) * sizeof(T));
    }
  }

  // The `kernel` rows around a window that begins at row `top`, of an image of `height` rows.
  void window(int64_t n, int64_t top, int64_t kernel, int64_t height, const T** rows) const {
    for (int64_t i = 0; i < kernel; ++i) {
      const int64_t y = top + i;
      rows[i] = y < 0 || y >= height ? zeros : row(n, y);
    }
  }
  // What `zeros` points to: a slice's row.
  static T* take_zero_row(const Workers& workers, int64_t room) {
    return take_zeros<T>(workers, room * kMostSlice<T> * kLanes<T>);
  }
};

// Outputs: [row][vector][position][lane], from some row of all images on.
template <typename T>
struct Lines {
  T* data;
  int64_t vectors, width, first = 0;

  int64_t vector_step() const { return width * kLanes<T>; }
  int64_t line_step() const { return vectors * vector_step(); }
  T* line(int64_t row) const { return data + (row - first) * line_step(); }
  Lines from(int64_t vector) const {
    Lines rest = *this;
    rest.data += vector * vector_step();
    return rest;
  }
};

}  // namespace
}  // namespace pynas
