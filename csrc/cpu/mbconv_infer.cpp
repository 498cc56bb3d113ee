// Compiled once per instruction set.
#include "mbconv_infer.h"

#include "mbconv_infer_depthwise.h"
#include "mbconv_infer_plan.h"
#include "mbconv_layout.h"

namespace pynas {
namespace {

constexpr int64_t kStepPositions = 64;   // of outputs, that the second product gets at once, about
constexpr int64_t kTilePositions = 256;  // of several small images whose sums grow together, about
constexpr int64_t kTogetherBytes = 128 << 10;  // of weights that may be read again for every step
constexpr int64_t kRingBytes = 384 << 10;
constexpr int64_t kBandBytes = 512 << 10;  // of sums, where slices come one after another

// Outputs made at once: rows [y0, y1) of the images [n0, n1); of several images, all rows.
struct Step {
  int64_t n0, n1, y0, y1;
  bool first;  // of its tile: no rows are there yet
};

template <typename T>
class InferPass {
 public:
  InferPass(const MbInfer<T>& args, const Workers& workers)
      : args_(args),
        s_(args.shape),
        plan_{args.shape},
        workers_(workers),
        pad_(s_.kernel / 2),
        out_height_((args.height + s_.stride - 1) / s_.stride),
        out_width_((args.width + s_.stride - 1) / s_.stride),
        direct_(plan_.direct()),
        room_((args.width + 2 * pad_ + 8) | 1) {
    plan_.for_slices([&](const Slice&) { ++slices_; });
    list_ = take<Slice>(workers, slices_);
    Slice* next = list_;
    plan_.for_slices([&](const Slice& slice) { *next++ = slice; });
    shape_steps();
    rings_ = take<T>(workers, workers.count * ring_ * rings_kept_);
    hidden_ = take<T>(workers, workers.count * hidden_step_ * kSliceVectors);
    if (!direct_) sums_ = take<T>(workers, workers.count * tile_positions_ * plan_.out_room());
    if (plan_.dense()) finite_ = take<bool>(workers, workers.count);
    for (int64_t i = 0; finite_ && i < workers.count; ++i) finite_[i] = true;
    clear_margins();
  }

  bool run() {
    const int64_t tiles = (args_.images + images_ - 1) / images_;
    parallel(workers_, tiles * bands_, [&](int64_t task, int64_t worker) {
      const int64_t n0 = task / bands_ * images_, n1 = smaller(n0 + images_, args_.images);
      const int64_t band = task % bands_;
      tile(n0, n1, band * out_height_ / bands_, (band + 1) * out_height_ / bands_, worker);
    });
    bool finite = true;
    for (int64_t i = 0; finite_ && i < workers_.count; ++i) finite = finite && finite_[i];
    return finite;
  }

 private:
  void shape_steps() {
    const int64_t positions = out_height_ * out_width_, threads = workers_.count;
    const int64_t bytes = plan_.elements() * static_cast<int64_t>(sizeof(T));
    images_ = larger<int64_t>(1, smaller(kTilePositions / positions, args_.images / threads));
    step_images_ = smaller(images_, larger<int64_t>(1, kStepPositions / positions));
    const int64_t least = two_rows_ ? 2 : 1;
    step_rows_ = larger<int64_t>(least, kStepPositions / out_width_ / least * least);
    if (images_ > 1 || step_rows_ > out_height_) step_rows_ = out_height_;
    chunks_ = images_ > 1 ? 1 : (out_width_ + kStepPositions - 1) / kStepPositions;
    kept_ = smaller(args_.height, (step_rows_ - 1) * s_.stride + s_.kernel);
    ring_ = step_images_ * kept_ * kSliceVectors * room_ * kLanes<T>;
    const int64_t ring_bytes = ring_ * slices_ * static_cast<int64_t>(sizeof(T));
    together_ = bytes <= kTogetherBytes && (images_ > 1 || ring_bytes <= kRingBytes);
    rings_kept_ = together_ && images_ == 1 ? slices_ : 1;
    bands_ = 1;
    if (images_ == 1) {
      const int64_t sums = positions * s_.out_channels * static_cast<int64_t>(sizeof(T));
      if (!together_) bands_ = (sums + kBandBytes - 1) / kBandBytes;
      if (threads > 1 && args_.images < 2 * threads) {
        bands_ = larger(bands_, (2 * threads + args_.images - 1) / args_.images);
      }
      bands_ = larger<int64_t>(1, smaller(bands_, out_height_ / 4));
    }
    const int64_t step = step_images_ * step_rows_ * out_width_;
    const int64_t band_rows = (out_height_ + bands_ - 1) / bands_;
    tile_positions_ = together_ ? step : images_ * band_rows * out_width_;
    const int64_t chunk = (out_width_ + chunks_ - 1) / chunks_;
    hidden_step_ = (step_images_ * step_rows_ * chunk | 1) * kLanes<T>;
  }

  // Rows of hidden channels have zeros on both sides, where only this writes.
  void clear_margins() {
    const int64_t lines = workers_.count * rings_kept_ * step_images_ * kept_ * kSliceVectors;
    const int64_t line = room_ * kLanes<T>, begin = pad_ * kLanes<T>;
    const int64_t end = (pad_ + args_.width) * kLanes<T>;
    for (int64_t i = 0; i < lines; ++i) {
      memset(rings_ + i * line, 0, static_cast<size_t>(begin) * sizeof(T));
      memset(rings_ + i * line + end, 0, static_cast<size_t>(line - end) * sizeof(T));
    }
  }

  template <typename Do>
  void for_steps(int64_t n0, int64_t n1, int64_t y0, int64_t y1, Do&& act) const {
    for (int64_t n = n0; n < n1; n += step_images_) {
      for (int64_t y = y0; y < y1; y += step_rows_) {
        act(Step{n, smaller(n + step_images_, n1), y, smaller(y + step_rows_, y1), y == y0});
      }
    }
  }

  void tile(int64_t n0, int64_t n1, int64_t y0, int64_t y1, int64_t worker) {
    const int64_t origin = position(n0, y0);
    if (together_) {
      for_steps(n0, n1, y0, y1, [&](const Step& step) {
        for (int64_t i = 0; i < slices_; ++i) {
          slice_step(list_[i], i % rings_kept_, step, position(step.n0, step.y0), worker);
        }
        finish(position(step.n0, step.y0), positions(step), worker);
      });
      return;
    }
    for (int64_t i = 0; i < slices_; ++i) {
      for_steps(n0, n1, y0, y1,
                [&](const Step& step) { slice_step(list_[i], 0, step, origin, worker); });
    }
    finish(origin, (n1 - n0) * (y1 - y0) * out_width_, worker);
  }

  int64_t position(int64_t n, int64_t y) const { return (n * out_height_ + y) * out_width_; }
  int64_t positions(const Step& s) const { return (s.n1 - s.n0) * (s.y1 - s.y0) * out_width_; }

  T* row(T* ring, int64_t n, int64_t y, int64_t vectors) const {
    return ring + (n * kept_ + y % kept_) * vectors * room_ * kLanes<T>;
  }

  void slice_step(const Slice& slice, int64_t ring_index, const Step& step, int64_t origin,
                  int64_t worker) {
    T* ring = rings_ + (worker * rings_kept_ + ring_index) * ring_;
    T* hidden = hidden_ + worker * hidden_step_ * kSliceVectors;
    expand(slice, step, ring);
    for (int64_t i = 0; i < chunks_; ++i) {
      const int64_t x0 = i * out_width_ / chunks_, x1 = (i + 1) * out_width_ / chunks_;
      convolve_chunk(slice, step, x0, x1, ring, hidden);
      project(slice, step, x0, x1, hidden, origin, worker);
    }
  }

  void expand(const Slice& slice, const Step& step, T* ring) const {
    const int64_t begin =
        step.first ? larger<int64_t>(0, step.y0 * s_.stride - pad_) : last_row(step.y0);
    const int64_t end = last_row(step.y1), in = s_.in_channels;
    const Product<T> p{plan_.in_share(),
                       plan_.in_share(),
                       0,
                       in,
                       kLanes<T>,
                       room_ * kLanes<T>,
                       s_.activation,
                       slice.half,
                       args_.packed + slice.bias};
    for (int64_t n = step.n0; n < step.n1; ++n) {
      for (int64_t y = begin; y < end; ++y) {
        const T* from =
            args_.x + (n * args_.height + y) * args_.width * in + slice.in_part * plan_.in_share();
        product<T>(args_.width, slice.vectors, p, from, args_.packed + slice.expand,
                   row(ring, n - step.n0, y, slice.vectors) + pad_ * kLanes<T>);
      }
    }
  }

  // Rows of hidden channels that outputs above row `y` want: as many, from the first.
  int64_t last_row(int64_t y) const {
    return smaller(args_.height, (y - 1) * s_.stride - pad_ + s_.kernel);
  }

  // Outputs of the depthwise convolution: columns [x0, x1) of a step.
  void convolve_chunk(const Slice& slice, const Step& step, int64_t x0, int64_t x1, T* ring,
                      T* hidden) const {
    const int64_t line = (1 + plan_.taps()) * kLanes<T>, out_row = (x1 - x0) * kLanes<T>;
    Window<T> window;
    for (int64_t v = 0; v < slice.vectors; ++v) {
      const Convolve<T> act = convolve_[slice.half && v + 1 == slice.vectors];
      T* out = hidden + v * hidden_step_;
      for (int64_t n = 0; n < step.n1 - step.n0; ++n) {
        for (int64_t y = step.y0; y < step.y1;) {
          const int64_t count = two_rows_ && y + 1 < step.y1 ? 2 : 1;
          const int64_t top = y * s_.stride - pad_;
          window.begin = larger<int64_t>(0, -top);
          window.end = smaller(args_.height - top, s_.kernel + count - 1);
          for (int64_t i = window.begin; i < window.end; ++i) {
            window.rows[i] =
                row(ring, n, top + i, slice.vectors) + (v * room_ + x0 * s_.stride) * kLanes<T>;
          }
          act(window, x1 - x0, args_.packed + slice.depthwise + v * line, s_.activation, out,
              count == 2 ? out_row : 0);
          out += count * out_row;
          y += count;
        }
      }
    }
  }

  // Adds a slice's part to the sums: y itself where its channels fill vectors.
  void project(const Slice& slice, const Step& step, int64_t x0, int64_t x1, const T* hidden,
               int64_t origin, int64_t worker) const {
    const int64_t vectors = plan_.out_vectors();
    const int64_t column = slice.out_part * (direct_ ? plan_.out_share() : vectors * kLanes<T>);
    const int64_t wide = direct_ ? s_.out_channels : plan_.out_room();
    Product<T> p{slice.channels, kLanes<T>, hidden_step_,      kLanes<T>,
                 wide,           kLanes<T>, Activation::kNone, plan_.half_out()};
    if (slice.begins) p.bias = args_.packed + slice.out_part * vectors * kLanes<T>;
    const int64_t lines = chunks_ > 1 ? step.y1 - step.y0 : 1;
    const int64_t count = chunks_ > 1 ? x1 - x0 : positions(step);
    for (int64_t i = 0; i < lines; ++i) {
      const int64_t at = position(step.n0, step.y0 + i) + x0;
      if (slice.begins && direct_ && args_.adds_input) p.input = args_.x + at * wide + column;
      T* to = direct_ ? args_.y + at * wide : worker_sums(worker) + (at - origin) * wide;
      product<T, kLanes<T>>(count, vectors, p, hidden + i * count * kLanes<T>,
                            args_.packed + slice.project, to + column);
    }
  }

  T* worker_sums(int64_t worker) const {
    return sums_ + worker * tile_positions_ * plan_.out_room();
  }

  void finish(int64_t begin, int64_t count, int64_t worker) const {
    T* y = args_.y + begin * s_.out_channels;
    if (!direct_) {
      const T* x = args_.adds_input ? args_.x + begin * s_.out_channels : nullptr;
      const int64_t share = plan_.out_share(), room = plan_.out_vectors() * kLanes<T>;
      const T* from = worker_sums(worker);
      for (int64_t i = 0; i < count * plan_.shape.out_parts; ++i) {
        finish_part(from + i * room, x ? x + i * share : nullptr, y + i * share, share);
      }
    }
    if (finite_) check(y, count * s_.out_channels, worker);
  }

  // The last vector overlaps the one before it.
  static void finish_part(const T* from, const T* x, T* y, int64_t channels) {
    if (channels < kLanes<T>) {
      for (int64_t c = 0; c < channels; ++c) y[c] = x ? from[c] + x[c] : from[c];
      return;
    }
    for (int64_t c = 0; c < channels; c += kLanes<T>) {
      const int64_t at = smaller(c, channels - kLanes<T>);
      Vector<T> value = load(from + at);
      if (x) value += load(x + at);
      store(y + at, value);
    }
  }

  void check(const T* y, int64_t count, int64_t worker) const {
    Vector<T> zeros{};
    int64_t i = 0;
    for (; i + kLanes<T> <= count; i += kLanes<T>) zeros += load(y + i) * T(0);
    T sum = 0;
    for (; i < count; ++i) sum += y[i] * T(0);
    for (int lane = 0; lane < kLanes<T>; ++lane) sum += zeros[lane];
    if (!(sum == 0)) finite_[worker] = false;
  }

  const MbInfer<T>& args_;
  const MbInferShape& s_;
  const Plan<T> plan_;
  const Workers& workers_;
  const int64_t pad_, out_height_, out_width_;
  const bool direct_;
  const int64_t room_;
  const bool two_rows_ = convolves_two(s_.kernel, s_.stride);
  const Convolve<T> convolve_[2] = {convolve<T>(s_.kernel, s_.stride, false),
                                    convolve<T>(s_.kernel, s_.stride, true)};
  int64_t slices_ = 0, images_, step_images_, step_rows_, kept_, ring_, rings_kept_, bands_,
          chunks_;
  int64_t tile_positions_, hidden_step_;
  bool together_;
  Slice* list_;
  T *rings_, *hidden_, *sums_ = nullptr;
  bool* finite_ = nullptr;
};

template <typename T>
void pack(const MbInferShape& shape, const MbFolded<T>& from, T* packed) {
  Packer<T>(shape, from, packed).run();
}

template <typename T>
bool run(const MbInfer<T>& args, const Workers& workers) {
  return InferPass<T>(args, workers).run();
}

}  // namespace

namespace PYNAS_ISA {
const MbInferTable mbconv_infer = {
    {cut<float>, packed_elements<float>, pack<float>, run<float>},
    {cut<double>, packed_elements<double>, pack<double>, run<double>}};
}
}  // namespace pynas
