// One stage of a convolution on one image: depthwise and 1x1, forward and backward.
#pragma once

#include "depthwise_gradient.h"
#include "edge_image.h"

namespace pynas {
namespace {

// A stage's weights: taps by vectors of channels, and the 1x1 convolution both ways around.
template <typename T>
struct EdgeWeights {
  T *taps, *flipped;      // [taps][padded channels]
  T *forward, *backward;  // [in][out] and [out][in], padded both ways

  static EdgeWeights make(const EdgeStage<T>& stage, int64_t kernel, int64_t channels,
                          const Workers& workers) {
    const int64_t room = padded<T>(channels), count = kernel * kernel;
    const EdgeWeights made{
        take_zeros<T>(workers, count * room), take_zeros<T>(workers, count * room),
        take_zeros<T>(workers, room * room), take_zeros<T>(workers, room * room)};
    transpose(stage.depthwise, count, channels, count, made.taps, room);
    for (int64_t tap = 0; tap < count; ++tap) {
      memcpy(made.flipped + tap * room, made.taps + (count - 1 - tap) * room,
             static_cast<size_t>(room) * sizeof(T));
    }
    transpose(stage.pointwise, channels, channels, channels, made.forward, room);
    for (int64_t c = 0; c < channels; ++c) {
      memcpy(made.backward + c * room, stage.pointwise + c * channels,
             static_cast<size_t>(channels) * sizeof(T));
    }
    return made;
  }
};

template <typename T, int Dilation>
Depthwise<T> depthwise_of_stride_1(int64_t kernel) {
  if (kernel == 3) return DepthwiseOf<T, 3, 1, Dilation>::kTable;
  return kernel == 5 ? DepthwiseOf<T, 5, 1, Dilation>::kTable
                     : DepthwiseOf<T, 7, 1, Dilation>::kTable;
}

// A stage as it is computed: the one with dilation and stride goes over every second position.
template <typename T>
struct EdgeStep {
  EdgeStep(int64_t size, int64_t of_stride, int64_t of_dilation)
      : kernel(size),
        halved(of_stride == 2 && of_dilation == 2),
        stride(halved ? 1 : of_stride),
        dilation(halved ? 1 : of_dilation),
        reach(kernel / 2 * dilation),
        convolution(dilation == 2 ? depthwise_of_stride_1<T, 2>(kernel)
                                  : depthwise<T>(kernel, stride)) {}

  int64_t kernel;
  bool halved;
  int64_t stride, dilation;
  int64_t reach;  // of its taps, beyond a position
  Depthwise<T> convolution;

  // The input's rows for an output's.
  DepthwiseInput<T> input(const Image<T>& image, int64_t y, int64_t vectors, int64_t width,
                          const T** rows) const {
    image.window(y * stride - reach, reach, kernel, dilation, rows);
    return {rows, image.vector_step(), vectors, width};
  }
};

// Places in memory of one share's part of a stage's weight gradients.
template <typename T>
struct EdgePart {
  T* taps;       // [vector][tap][lane]
  T* pointwise;  // [in][out], padded
};

// One thread's memory for an image at a time.
template <typename T>
class EdgeImages {
 public:
  EdgeImages(const EdgeLayout<T>& layout, const EdgeOptions<T>& options, bool backward,
             const Workers& workers)
      : layout_(layout) {
    int64_t pad = 1;
    for (int64_t i = 0; i < options.conv_count; ++i) {
      const EdgeConv<T>& conv = options.convs[i];
      pad = larger(pad, conv.kernel / 2 * larger<int64_t>(conv.dilation, 1));
    }
    const EdgeShape& s = layout.shape;
    const auto image = [&](int64_t height, int64_t width, int64_t border) {
      const int64_t size = Image<T>::elements(height, width, border, layout.vectors);
      return Image<T>::make(take_zeros<T>(workers, size), height, width, border);
    };
    input = image(s.height, s.width, pad);
    if (s.stride == 2) half = image(layout.height, layout.width, pad);
    middle = image(layout.height, layout.width, pad);
    const int64_t band = Layout<T>::spread(layout.rows_at_once() * layout.width) * kL;
    band_step_ = band;
    between_ = take<T>(workers, band * layout.vectors);
    if (!backward) return;
    input_sum = image(s.height, s.width, 0);
    if (s.stride == 2) half_sum = image(layout.height, layout.width, 0);
    middle_sum = image(layout.height, layout.width, 0);
    gradient_ = image(layout.height, layout.width, pad);
    of_read_ = take<T>(workers, band * layout.vectors);
    line_ = take<T>(workers, Image<T>::row_step(s.width, 0) * kL);
    y_gradient = take<T>(workers, layout.elements());
    scatter_ = take<int32_t>(workers, layout.positions());
    for (int64_t i = 0; i < layout.positions(); ++i) {
      scatter_[i] = static_cast<int32_t>(gradient_.row(0, i / layout.width) +
                                         i % layout.width * kL - gradient_.row(0, 0));
    }
  }

  // max(x, 0), its every second position, and max(norm, 0) of a first stage; and the sums of what
  // comes back to them.
  Image<T> input, half, middle, input_sum, half_sum, middle_sum;
  T* y_gradient;  // [vector][position][lane]

  void read_input(const T* x, bool halved) const {
    read_image<T, true>(x, layout_.shape, 1, input, layout_.vectors);
    if (halved) read_image<T, true>(x, layout_.shape, 2, half, layout_.vectors);
  }

  // max(norm, 0) of an image's part of what the norm reads.
  void read_middle(const EdgeNorm<T>& norm, int64_t n) const {
    const T* from = norm.read + n * layout_.elements();
    for (int64_t v = 0; v < layout_.vectors; ++v) {
      const Vector<T> scale = load(norm.scale + v * kL), bias = load(norm.bias + v * kL);
      for (int64_t y = 0; y < layout_.height; ++y) {
        T* line = middle.row(v, y);
        for (int64_t i = 0; i < layout_.width * kL; i += kL, from += kL) {
          store(line + i, activate<T>(Activation::kRelu, load(from) * scale + bias));
        }
      }
    }
  }

  static void clear(const Image<T>& sum, int64_t vectors) {
    memset(sum.data, 0, static_cast<size_t>(vectors * sum.vector_step()) * sizeof(T));
  }

  // read: an image's part of what the stage's norm reads. done(y0, y1): rows that have come.
  template <typename Done>
  void forward(const EdgeStep<T>& step, const EdgeWeights<T>& weights, const Image<T>& from,
               T* read, Done&& done) const {
    for_rows([&](int64_t y0, int64_t y1) {
      apply(step, weights, from, y0, y1);
      Gemm<T> g{layout_.vectors,         kL, kL, band_step_, 1, layout_.room(), kL, kL,
                layout_.positions() * kL};
      gemm((y1 - y0) * layout_.width, layout_.vectors, g, between_, weights.forward,
           read + y0 * layout_.width * kL);
      done(y0, y1);
    });
  }

  // From the gradient of what the stage's norm gives out, by the norm's rule. Adds the gradient of
  // the input to `sum` unless its data is null, and the weights' to `part` unless that is null.
  void backward(const EdgeStep<T>& step, const EdgeWeights<T>& weights, const Image<T>& from,
                const NormGradient<T>& norm, const T* gradient, const T* read,
                const EdgePart<T>* part, const Image<T>& sum) const {
    const int64_t vectors = layout_.vectors, image_step = layout_.positions() * kL;
    for_rows([&](int64_t y0, int64_t y1) {
      const int64_t at = y0 * layout_.width * kL, count = (y1 - y0) * layout_.width;
      norm_back(norm, vectors, count, gradient + at, read + at, image_step, of_read_, band_step_);
      if (part) {
        apply(step, weights, from, y0, y1);
        const Gemm<T> g{1,          count,          1,  0,       kL,        kL,
                        band_step_, layout_.room(), kL, nullptr, Then::kAdd};
        for (int64_t v = 0; v < vectors; ++v) {
          gemm(kL, vectors, g, between_ + v * band_step_, of_read_,
               part->pointwise + v * kL * layout_.room());
        }
      }
      Gemm<T> g{vectors, kL, kL, band_step_, 1, layout_.room(), kL, 0, gradient_.vector_step()};
      g.scatter = scatter_ + y0 * layout_.width;
      gemm(count, vectors, g, of_read_, weights.backward, gradient_.row(0, 0));
    });
    const T* rows[kMostKernel];
    for (int64_t y = 0; y < layout_.height && part; ++y) {
      step.convolution.weights(step.input(from, y, vectors, layout_.width, rows),
                               gradient_.row(0, y), gradient_.vector_step(), part->taps,
                               step.kernel * step.kernel * kL);
    }
    if (sum.data) add_back(step, weights, sum);
  }

 private:
  static constexpr int64_t kL = kLanes<T>;

  template <typename Do>
  void for_rows(Do&& act) const {
    const int64_t rows = layout_.rows_at_once();
    for (int64_t y = 0; y < layout_.height; y += rows) act(y, smaller(y + rows, layout_.height));
  }

  // The depthwise convolution of some rows, into `between_`.
  void apply(const EdgeStep<T>& step, const EdgeWeights<T>& weights, const Image<T>& from,
             int64_t y0, int64_t y1) const {
    const T* rows[kMostKernel];
    for (int64_t y = y0; y < y1; ++y) {
      step.convolution.apply(step.input(from, y, layout_.vectors, layout_.width, rows),
                             weights.taps, layout_.room(), between_ + (y - y0) * layout_.width * kL,
                             band_step_);
    }
  }

  // The depthwise convolution's share of its input's gradient.
  void add_back(const EdgeStep<T>& step, const EdgeWeights<T>& weights, const Image<T>& sum) const {
    const T* rows[kMostKernel];
    for (int64_t y = 0; y < sum.height; ++y) {
      if (step.stride == 2) {
        add_back_2(step, weights, sum, y);
        continue;
      }
      gradient_.window(y - step.reach, step.reach, step.kernel, step.dilation, rows);
      step.convolution.add({rows, gradient_.vector_step(), layout_.vectors, layout_.width},
                           weights.flipped, layout_.room(), sum.row(0, y), sum.vector_step());
    }
  }

  void add_back_2(const EdgeStep<T>& step, const EdgeWeights<T>& weights, const Image<T>& sum,
                  int64_t y) const {
    const T* rows[kMostKernel];
    int taps[kMostKernel], count = 0;
    for (int64_t ky = (y + step.reach) % 2; ky < step.kernel; ky += 2) {
      const int64_t from = (y + step.reach - ky) / 2;
      if (y + step.reach < ky || from >= layout_.height) continue;
      taps[count] = static_cast<int>(ky);
      rows[count++] = gradient_.row(0, from) - step.reach * kL;
    }
    for (int64_t v = 0; v < layout_.vectors; ++v) {
      step.convolution.backward_2(rows, taps, count, sum.width, weights.taps + v * kL,
                                  layout_.room(), line_);
      T* to = sum.row(v, y);
      for (int64_t i = 0; i < sum.width * kL; i += kL)
        store(to + i, load(to + i) + load(line_ + i));
      for (int i = 0; i < count; ++i) rows[i] += gradient_.vector_step();
    }
  }

  EdgeLayout<T> layout_;
  Image<T> gradient_;  // of what the depthwise convolution gives
  int64_t band_step_;
  T *between_, *of_read_, *line_;
  int32_t* scatter_;
};

}  // namespace
}  // namespace pynas
