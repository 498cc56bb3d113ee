// How a block's hidden channels are cut into slices, and where their weights lie when packed.
#pragma once

#include "mbconv_infer.h"
#include "mbconv_infer_tile.h"

namespace pynas {
namespace {

constexpr int64_t kSliceVectors = 6;
constexpr int64_t kMostParts = 8;

// Where element (k, column) of a matrix lies that product() reads, of so many rows and vectors.
template <typename T>
int64_t panel_at(int64_t depth, int64_t vectors, int64_t k, int64_t column) {
  int64_t at = 0;
  for (;;) {
    const int64_t now = next_vectors(vectors), wide = now * kLanes<T>;
    if (column < wide) return at + k * wide + column;
    at += depth * wide;
    column -= wide;
    vectors -= now;
  }
}

// Whether half of the last vector is enough for so many channels.
template <typename T>
constexpr bool half_last(int64_t channels) {
  return kHalves && padded<T>(channels) - channels >= kLanes<T> / 2;
}

// Some hidden channels that read the same inputs and feed the same outputs.
//
// Packed: bias and taps of each vector of the depthwise convolution together.
//   expand [in_share][vectors] as product() wants it, its bias [vectors],
//   depthwise: for each vector: bias, taps [kernel * kernel],
//   project [channels][out_vectors] as product() wants it.
struct Slice {
  int64_t in_part, out_part;
  int64_t first, channels;  // of its part, in their order
  int64_t vectors;
  bool half;                                 // the last vector
  bool begins;                               // the sums of its part of the outputs
  int64_t expand, bias, depthwise, project;  // offsets in what is packed
};

template <typename T>
struct Plan {
  MbInferShape shape;

  // Whether zeros stand where groups do not connect.
  bool dense() const { return shape.in_parts < shape.groups || shape.out_parts < shape.groups; }
  int64_t taps() const { return shape.kernel * shape.kernel; }
  int64_t in_share() const { return shape.in_channels / shape.in_parts; }
  int64_t out_share() const { return shape.out_channels / shape.out_parts; }
  int64_t out_vectors() const { return padded<T>(out_share()) / kLanes<T>; }
  bool half_out() const { return half_last<T>(out_share()); }
  // Whether stores of whole vectors, or a half one, are stores of whole outputs.
  bool direct() const { return out_share() % (kHalves ? kLanes<T> / 2 : kLanes<T>) == 0; }
  int64_t out_room() const { return padded<T>(out_share()) * shape.out_parts; }

  // Whether the hidden channel that the depthwise convolution sees as `j` belongs there. The
  // shuffle reads (groups, n) as (n, groups).
  bool in_block(int64_t j, int64_t in_part, int64_t out_part) const {
    return (shape.in_parts == 1 || j % shape.groups == in_part) &&
           (shape.out_parts == 1 || j / (shape.hidden / shape.groups) == out_part);
  }
  int64_t block_channels(int64_t in_part, int64_t out_part) const {
    const int64_t g = shape.groups, share = shape.hidden / g;
    const int64_t begin = shape.out_parts == 1 ? 0 : out_part * share;
    const int64_t end = shape.out_parts == 1 ? shape.hidden : begin + share;
    if (shape.in_parts == 1) return end - begin;
    const auto below = [&](int64_t j) { return (j - in_part + g - 1) / g; };  // j' < j of this part
    return below(end) - below(begin);
  }

  int64_t slice_elements(const Slice& s) const {
    return (in_share() + 2 + taps()) * s.vectors * kLanes<T> +
           s.channels * out_vectors() * kLanes<T>;
  }

  template <typename Do>
  void for_slices(Do&& act) const {
    int64_t at = out_room();
    for (int64_t h = 0; h < shape.out_parts; ++h) {
      bool begins = true;
      for (int64_t a = 0; a < shape.in_parts; ++a) {
        const int64_t channels = block_channels(a, h);
        int64_t vectors = padded<T>(channels) / kLanes<T>;
        int64_t pieces = (vectors + kSliceVectors - 1) / kSliceVectors;
        for (int64_t first = 0; first < channels; --pieces) {
          const int64_t now = (vectors + pieces - 1) / pieces;
          const int64_t some = smaller(now * kLanes<T>, channels - first);
          Slice s{a, h, first, some, now, half_last<T>(some), begins, 0, 0, 0, 0};
          s.expand = at;
          s.bias = s.expand + in_share() * now * kLanes<T>;
          s.depthwise = s.bias + now * kLanes<T>;
          s.project = s.depthwise + (1 + taps()) * now * kLanes<T>;
          at += slice_elements(s);
          act(s);
          first += s.channels;
          vectors -= now;
          begins = false;
        }
      }
    }
  }

  int64_t elements() const {
    int64_t total = out_room();
    for_slices([&](const Slice& s) { total += slice_elements(s); });
    return total;
  }

  // Cycles per position, about: half a vector saves a third of one, products read and write what
  // they make, and sums in other places are copied. Fitted to blocks of 16 to 352 channels.
  double cost() const {
    const auto out = static_cast<double>(out_vectors());
    double total = direct() ? 0 : 12 * out * static_cast<double>(shape.out_parts);
    for_slices([&](const Slice& s) {
      const auto v = static_cast<double>(s.vectors);
      total += (v - 0.35 * s.half) * static_cast<double>(in_share() + taps()) +
               (out - 0.35 * half_out()) * static_cast<double>(s.channels) + 6 * (v + out);
    });
    return total;
  }
};

// A grouped block is cut by the groups of its first product, of its second, of both or of none:
// where channels are few, zeros cost less than narrow slices.
template <typename T>
MbInferShape cut(MbInferShape shape) {
  shape.in_parts = shape.out_parts = 1;
  if (shape.groups == 1 || shape.groups > kMostParts) return shape;
  const int64_t g = shape.groups, cuts[3][2] = {{g, 1}, {1, g}, {g, g}};
  double least = Plan<T>{shape}.cost();
  MbInferShape best = shape;
  for (const auto& parts : cuts) {
    shape.in_parts = parts[0], shape.out_parts = parts[1];
    const double found = Plan<T>{shape}.cost();
    if (found < least) least = found, best = shape;
  }
  return best;
}

template <typename T>
int64_t packed_elements(const MbInferShape& shape) {
  return Plan<T>{shape}.elements();
}

// Copies a block's weights to where a slice wants them, with zeros between groups.
template <typename T>
class Packer {
 public:
  Packer(const MbInferShape& shape, const MbFolded<T>& from, T* to)
      : plan_{shape}, s_(shape), from_(from), to_(to) {}

  void run() {
    for (int64_t i = 0, n = plan_.elements(); i < n; ++i) to_[i] = 0;
    const int64_t room = plan_.out_vectors() * kLanes<T>, share = plan_.out_share();
    for (int64_t o = 0; o < s_.out_channels; ++o) {
      to_[o / share * room + o % share] = from_.project_bias[o];
    }
    plan_.for_slices([&](const Slice& slice) { pack(slice); });
  }

 private:
  void pack(const Slice& s) {
    int64_t seen = 0;
    for (int64_t j = 0; j < s_.hidden; ++j) {
      if (!plan_.in_block(j, s.in_part, s.out_part)) continue;
      const int64_t at = seen++ - s.first;
      if (at >= 0 && at < s.channels) pack_channel(s, j, at);
    }
  }

  void pack_channel(const Slice& s, int64_t j, int64_t at) {
    const int64_t taps = plan_.taps(), g = s_.groups;
    const int64_t before = j % g * (s_.hidden / g) + j / g;  // the shuffle
    const int64_t ins = s_.in_channels / g, group = before / (s_.hidden / g);
    for (int64_t i = 0; i < ins; ++i) {
      const int64_t k = group * ins + i - s.in_part * plan_.in_share();
      to_[s.expand + panel_at<T>(plan_.in_share(), s.vectors, k, at)] =
          from_.expand[before * ins + i];
    }
    to_[s.bias + at] = from_.expand_bias[before];
    T* lane = to_ + s.depthwise + at / kLanes<T> * (1 + taps) * kLanes<T> + at % kLanes<T>;
    lane[0] = from_.depthwise_bias[j];
    for (int64_t t = 0; t < taps; ++t) lane[(t + 1) * kLanes<T>] = from_.depthwise[j * taps + t];
    pack_outputs(s, j, at);
  }

  void pack_outputs(const Slice& s, int64_t j, int64_t at) {
    const int64_t share = s_.hidden / s_.groups, outs = s_.out_channels / s_.groups;
    const int64_t first = j / share * outs - s.out_part * plan_.out_share();
    for (int64_t o = 0; o < outs; ++o) {
      if (first + o < 0 || first + o >= plan_.out_share()) continue;
      to_[s.project + panel_at<T>(s.channels, plan_.out_vectors(), at, first + o)] =
          from_.project[(j / share * outs + o) * share + j % share];
    }
  }

  const Plan<T> plan_;
  const MbInferShape& s_;
  const MbFolded<T>& from_;
  T* to_;
};

}  // namespace
}  // namespace pynas
