// The forward pass of an edge.
#pragma once

#include "edge_pool.h"

namespace pynas {
namespace {

template <typename T>
class EdgeForwardPass {
 public:
  EdgeForwardPass(const EdgeForward<T>& args, const Workers& workers)
      : args_(args),
        options_(args.options),
        workers_(workers),
        layout_(args.shape),
        norms_(layout_, args.options, args.saved, workers),
        pad_(1) {
    for (int64_t i = 0; i < options_.conv_count; ++i) {
      pad_ = larger(pad_, options_.convs[i].kernel / 2 * options_.convs[i].dilation);
    }
    const int64_t at_once = layout_.in.images_at_once(), room = layout_.padded_channels();
    const int64_t out_rows =
        Layout<T>::rows_at_once(layout_.in.out_height, layout_.in.out_width);
    kept_ = (out_rows - 1) * args.shape.stride + 2 * pad_ + 1;
    const int64_t widest =
        larger(layout_.in.row_room(args.shape.width, pad_), layout_.out.row_room(out_width(), pad_));
    rows_room_ = Rows<T>::elements(at_once, layout_.vectors, kept_, widest);
    rows_ = take<T>(workers, workers.count * rows_room_);
    zeros_ = take_zeros<T>(workers, widest * room);
    band_room_ = layout_.in.spread(layout_.in.out_band_room());
    band_ = take<T>(workers, workers.count * band_room_ * room);
    scatter_ = take<int32_t>(workers, layout_.in.out_band_room());
    for (int64_t i = 0; i < layout_.in.out_band_room(); ++i) {
      scatter_[i] = static_cast<int32_t>(i / out_width() * layout_.vectors * out_width() * kL +
                                         i % out_width() * kL);
    }
    sums_ = {room, 2 * norms_.count,
             take_zeros<double>(workers, shares() * 2 * norms_.count * room)};
    origins_ = take<T>(workers, shares() * norms_.count * room);
  }

  void run() {
    first_pass();
    bool second = false;
    for (int64_t i = 0, norm = 0; i < options_.conv_count; norm += options_.convs[i++].stages) {
      second = second || options_.convs[i].stages == 2;
      collect(norm, layout_.in);
    }
    for (int64_t i = 0; i < options_.pool_count; ++i) {
      collect(norms_.count - options_.pool_count + i, layout_.in);
    }
    if (second) second_pass();
    apply();
  }

 private:
  static constexpr int64_t kL = kLanes<T>;

  int64_t out_width() const { return layout_.out.shape.width; }
  int64_t shares() const { return larger(layout_.in.shares, layout_.out.shares); }
  Lines<T> read_of(int64_t norm) const { return layout_.lines(norms_.all[norm].read); }

  Rows<T> rows_for(int64_t worker, int64_t width, int64_t height, int64_t room) const {
    const int64_t kept = smaller(height, kept_);
    return {rows_ + worker * rows_room_,
            kept,
            width,
            pad_,
            room,
            layout_.vectors,
            Rows<T>::elements(1, layout_.vectors, kept, room),
            zeros_};
  }

  // First stages of all convolutions, and the pools.
  void first_pass() {
    const EdgeShape& s = args_.shape;
    EdgeWeights<T>* weights = take<EdgeWeights<T>>(workers_, options_.conv_count);
    for (int64_t i = 0; i < options_.conv_count; ++i) {
      const EdgeConv<T>& conv = options_.convs[i];
      weights[i] = EdgeWeights<T>(conv.stage[0], conv.kernel, s.channels, workers_);
    }
    parallel(workers_, layout_.in.shares, [&](int64_t index, int64_t worker) {
      const ReluRows<T> input{rows_for(worker, s.width, s.height, layout_.in.row_room(s.width, pad_)),
                              s.height};
      for (int64_t n = 0; n < layout_.in.images_at_once(); ++n) input.rows.clear_pads(n);
      int64_t have = 0;
      bool begun = false;
      layout_.in.for_out_bands(layout_.in.share(index), Way::kUp, [&](const Band& band) {
        if (options_.conv_count) {
          have = input.make(band, s.stride, pad_, have, [&](int64_t n, int64_t y, T* line) {
            relu_row(args_.x + (n * s.height + y) * s.width * s.channels, line,
                     input.rows.vector_step());
          });
        }
        int64_t norm = 0;
        for (int64_t i = 0; i < options_.conv_count; norm += options_.convs[i++].stages) {
          stage(options_.convs[i], s.stride, weights[i], input, band, worker, norm);
          sum(norm, band, begun, index);
        }
        for (int64_t i = 0; i < options_.pool_count; ++i, ++norm) {
          pool_band(layout_, options_.pools[i].maximum, args_.x, band, read_of(norm));
          sum(norm, band, begun, index);
        }
        begun = true;
      });
    });
  }

  // Of dense channels, as vectors.
  void relu_row(const T* from, T* line, int64_t step) const {
    const int64_t channels = args_.shape.channels, width = args_.shape.width;
    for (int64_t v = 0; v < layout_.vectors; ++v) {
      for (int64_t i = 0; i < width; ++i) {
        store(line + v * step + i * kL,
              activate<T>(Activation::kRelu, get_channels(from + i * channels, v, channels)));
      }
    }
  }

  // Depthwise and 1x1 convolution over a band of outputs.
  void stage(const EdgeConv<T>& conv, int64_t stride, const EdgeWeights<T>& weights,
             const ReluRows<T>& input, const Band& band, int64_t worker, int64_t norm) const {
    const int64_t room = layout_.padded_channels(), dilation = stride_dilation(conv, stride, norm);
    const int64_t pad = conv.kernel / 2 * dilation;
    const Depthwise<T> convolution = depthwise<T>(conv.kernel, stride, dilation);
    const T* window[kMostKernel];
    T* to = band_ + worker * band_room_ * room;
    for (int64_t row = 0; row < band.rows(); ++row) {
      const int64_t y = band.y0 + row % (band.y1 - band.y0);
      input.rows.window(row / (band.y1 - band.y0), y * stride - pad, conv.kernel, input.height,
                        window, dilation);
      for (int64_t i = 0; i < conv.kernel; ++i) window[i] += (pad_ - pad) * kL;
      convolution.apply({window, input.rows.vector_step(), layout_.vectors, band.width},
                        weights.taps, room, to + row * band.width * kL, band_room_ * kL);
    }
    const Gemm<T> g{layout_.vectors, kL, kL, band_room_ * kL, 1, room, kL,
                    0,               out_width() * kL, scatter_};
    gemm(band.positions(), layout_.vectors, g, to, weights.forward,
         read_of(norm).line(band.first_row()));
  }

  // Second stages are not dilated.
  int64_t stride_dilation(const EdgeConv<T>& conv, int64_t, int64_t) const { return conv.dilation; }

  void sum(int64_t norm, const Band& band, bool begun, int64_t index) {
    const int64_t room = layout_.padded_channels();
    sum_lines(read_of(norm), band, begun, origins_ + (index * norms_.count + norm) * room,
              sums_.at(index, 2 * norm), room);
  }

  // Statistics of a norm from the shares' sums, and the norm itself.
  void collect(int64_t norm, const Layout<T>& layout) const {
    const int64_t room = layout_.padded_channels(), channels = args_.shape.channels;
    double* mean = take_zeros<double>(workers_, 2 * room);
    Moments moments{0, mean, mean + room};
    for (int64_t i = 0; i < layout.shares; ++i) {
      const Share share = layout.share(i);
      moments.add((share.n1 - share.n0) * layout.out_image(), sums_.at(i, 2 * norm),
                  sums_.at(i, 2 * norm + 1), origins_ + (i * norms_.count + norm) * room, channels);
    }
    const EdgeNorm<T>& of = norms_.all[norm];
    for (int64_t c = 0; c < channels; ++c) {
      const double v = moments.squares[c] / static_cast<double>(moments.count);
      of.mean[c] = static_cast<T>(mean[c]);
      of.variance[c] = static_cast<T>(v < 0 ? 0 : v);  // a NaN stays
    }
    of.fold(channels, args_.shape.eps);
  }

  // Second stages, each from what the first one's norm reads.
  void second_pass() {
    const int64_t width = out_width(), height = layout_.out.shape.height;
    for (int64_t i = 0, norm = 0; i < options_.conv_count; norm += options_.convs[i++].stages) {
      const EdgeConv<T>& conv = options_.convs[i];
      if (conv.stages != 2) continue;
      const EdgeWeights<T> weights(conv.stage[1], conv.kernel, args_.shape.channels, workers_);
      const EdgeNorm<T>& before = norms_.all[norm];
      parallel(workers_, layout_.out.shares, [&](int64_t index, int64_t worker) {
        const ReluRows<T> input{rows_for(worker, width, height, layout_.out.row_room(width, pad_)),
                                height};
        for (int64_t n = 0; n < layout_.out.images_at_once(); ++n) input.rows.clear_pads(n);
        int64_t have = 0;
        bool begun = false;
        layout_.out.for_out_bands(layout_.out.share(index), Way::kUp, [&](const Band& band) {
          have = input.make(band, 1, pad_, have, [&](int64_t n, int64_t y, T* line) {
            normalised_row(before, layout_.lines(before.read).line(n * height + y), line,
                           input.rows.vector_step());
          });
          stage(conv, 1, weights, input, band, worker, norm + 1);
          sum(norm + 1, band, begun, index);
          begun = true;
        });
      });
      collect(norm + 1, layout_.out);
    }
  }

  // max(norm, 0) of a line.
  void normalised_row(const EdgeNorm<T>& norm, const T* from, T* line, int64_t step) const {
    const int64_t width = out_width();
    for (int64_t v = 0; v < layout_.vectors; ++v) {
      const Vector<T> scale = load(norm.scale + v * kL), bias = load(norm.bias + v * kL);
      for (int64_t i = 0; i < width * kL; i += kL) {
        store(line + v * step + i,
              activate<T>(Activation::kRelu, load(from + v * width * kL + i) * scale + bias));
      }
    }
  }

  // y = sum of gate * norm, and the input times its gate.
  void apply() {
    const int64_t room = layout_.padded_channels(), width = out_width();
    const int64_t channels = args_.shape.channels;
    const T** reads = take<const T*>(workers_, norms_.count);
    T* scale = take<T>(workers_, norms_.count * room);
    T* shift = take_zeros<T>(workers_, room);
    int64_t count = 0;
    const auto add = [&](int64_t norm, int64_t gate) {
      const EdgeNorm<T>& of = norms_.all[norm];
      const T g = options_.gates[gate];
      for (int64_t c = 0; c < room; ++c) {
        scale[count * room + c] = g * of.scale[c];
        shift[c] += g * of.bias[c];
      }
      reads[count++] = of.read;
    };
    int64_t norm = 0;
    for (int64_t i = 0; i < options_.conv_count; ++i) {
      norm += options_.convs[i].stages;
      add(norm - 1, options_.convs[i].gate);
    }
    for (int64_t i = 0; i < options_.pool_count; ++i) add(norm++, options_.pools[i].gate);
    const bool identity = options_.identity >= 0;
    const Vector<T> times = broadcast(identity ? options_.gates[options_.identity] : T(0));
    parallel(workers_, layout_.out.shares, [&](int64_t index, int64_t) {
      const Share share = layout_.out.share(index);
      const int64_t height = layout_.out.shape.height;
      for (int64_t row = share.n0 * height; row < share.n1 * height; ++row) {
        for (int64_t v = 0; v < layout_.vectors; ++v) {
          const int64_t at = (row * layout_.vectors + v) * width * kL;
          for (int64_t i = 0; i < width; ++i) {
            Vector<T> sum = load(shift + v * kL);
            for (int64_t k = 0; k < count; ++k) {
              sum += load(scale + k * room + v * kL) * load(reads[k] + at + i * kL);
            }
            const int64_t position = (row * width + i) * channels;
            if (identity) sum += times * get_channels(args_.x + position, v, channels);
            put_channels(args_.y + position, v, channels, sum);
          }
        }
      }
    });
  }

  const EdgeForward<T>& args_;
  const EdgeOptions<T>& options_;
  const Workers& workers_;
  const EdgeLayout<T> layout_;
  const EdgeNorms<T> norms_;
  int64_t pad_, kept_, rows_room_, band_room_;
  T *rows_, *zeros_, *band_, *origins_;
  int32_t* scatter_;
  ShareSums sums_;
};

}  // namespace
}  // namespace pynas
