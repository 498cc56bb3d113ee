// The forward pass of an edge.
#pragma once

#include "edge_pool.h"
#include "edge_stage.h"

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
        sums_{layout_.room(), 2 * norms_.count,
              take_zeros<double>(workers, layout_.shares * 2 * norms_.count * layout_.room())},
        origins_(take<T>(workers, layout_.shares * norms_.count * layout_.room())) {
    memories_ = take<Memory>(workers, workers.count);
    for (int64_t i = 0; i < workers.count; ++i) {
      memories_[i] = {{layout_, options_, false, workers},
                      {layout_, workers},
                      take<T>(workers, options_.pool_count ? in_vectors() : 0)};
    }
  }

  void run() {
    stages(0);
    pools();
    stages(1);
    apply();
  }

 private:
  static constexpr int64_t kL = kLanes<T>;
  struct Memory {
    EdgeImages<T> images;
    EdgePools<T> pools;
    T* x;
  };

  int64_t in_vectors() const { return args_.shape.height * args_.shape.width * layout_.room(); }
  const T* image(int64_t n) const { return args_.x + n * layout_.in_elements(); }
  T* read_of(int64_t norm, int64_t n) const {
    return norms_.all[norm].read + n * layout_.elements();
  }

  // First or second stages of all convolutions that have such.
  void stages(int64_t number) {
    const EdgeShape& s = args_.shape;
    const int64_t stride = number ? 1 : s.stride;
    EdgeWeights<T>* weights = take<EdgeWeights<T>>(workers_, options_.conv_count);
    bool any = false, halved = false;
    for (int64_t i = 0; i < options_.conv_count; ++i) {
      const EdgeConv<T>& conv = options_.convs[i];
      if (number >= conv.stages) continue;
      any = true;
      halved = halved || EdgeStep<T>(conv.kernel, stride, conv.dilation).halved;
      weights[i] = EdgeWeights<T>::make(conv.stage[number], conv.kernel, s.channels, workers_);
    }
    if (!any) return;
    parallel(workers_, layout_.shares, [&](int64_t index, int64_t worker) {
      const EdgeImages<T>& images = memories_[worker].images;
      const Share share = layout_.share(index);
      for (int64_t n = share.n0; n < share.n1; ++n) {
        if (number == 0) images.read_input(image(n), halved);
        for_convs(options_, [&](const EdgeConv<T>& conv, int64_t norm) {
          if (number >= conv.stages) return;
          if (number) images.read_middle(norms_.all[norm], n);
          const EdgeStep<T> step(conv.kernel, stride, number ? 1 : conv.dilation);
          const Image<T>& from = number ? images.middle : step.halved ? images.half : images.input;
          images.forward(step, weights[&conv - options_.convs], from, read_of(norm + number, n),
                         [&](int64_t y0, int64_t y1) {
                           sum(norm + number, index, n, y0, y1, n == share.n0 && y0 == 0);
                         });
        });
      }
    });
    for_convs(options_, [&](const EdgeConv<T>& conv, int64_t norm) {
      if (number < conv.stages) collect(norm + number);
    });
  }

  void pools() {
    if (!options_.pool_count) return;
    const int64_t first = norms_.count - options_.pool_count;
    parallel(workers_, layout_.shares, [&](int64_t index, int64_t worker) {
      const Memory& memory = memories_[worker];
      const Share share = layout_.share(index);
      for (int64_t n = share.n0; n < share.n1; ++n) {
        to_vectors(image(n), args_.shape.height * args_.shape.width, args_.shape.channels,
                   layout_.vectors, memory.x);
        for (int64_t i = 0; i < options_.pool_count; ++i) {
          memory.pools.forward(options_.pools[i].maximum, memory.x, read_of(first + i, n));
          const int64_t rows = layout_.rows_at_once();
          for (int64_t y = 0; y < layout_.height; y += rows) {
            sum(first + i, index, n, y, smaller(y + rows, layout_.height), n == share.n0 && !y);
          }
        }
      }
    });
    for (int64_t i = 0; i < options_.pool_count; ++i) collect(first + i);
  }

  // Sums of some rows of what a norm reads, less the first value that its share has.
  void sum(int64_t norm, int64_t index, int64_t n, int64_t y0, int64_t y1, bool begins) const {
    T* origin = origins_ + (index * norms_.count + norm) * layout_.room();
    for (int64_t v = 0; v < layout_.vectors; ++v) {
      const T* from = read_of(norm, n) + (v * layout_.positions() + y0 * layout_.width) * kL;
      if (begins) store(origin + v * kL, load(from));
      const Vector<T> shift = load(origin + v * kL);
      Vector<T> first[2] = {}, second[2] = {};
      const int64_t count = (y1 - y0) * layout_.width;
      for (int64_t i = 0; i < count; ++i) {
        const Vector<T> more = load(from + i * kL) - shift;
        first[i % 2] += more;
        second[i % 2] += more * more;
      }
      add_to<T>(sums_.at(index, 2 * norm) + v * kL, first[0] + first[1]);
      add_to<T>(sums_.at(index, 2 * norm + 1) + v * kL, second[0] + second[1]);
    }
  }

  // Statistics of a norm from the shares' sums, and the norm itself.
  void collect(int64_t norm) const {
    const int64_t room = layout_.room(), channels = layout_.channels();
    double* numbers = take_zeros<double>(workers_, 2 * room);
    Moments moments{0, numbers, numbers + room};
    for (int64_t i = 0; i < layout_.shares; ++i) {
      const Share share = layout_.share(i);
      moments.add((share.n1 - share.n0) * layout_.positions(), sums_.at(i, 2 * norm),
                  sums_.at(i, 2 * norm + 1), origins_ + (i * norms_.count + norm) * room, channels);
    }
    const EdgeNorm<T>& of = norms_.all[norm];
    for (int64_t c = 0; c < channels; ++c) {
      const double v = moments.squares[c] / static_cast<double>(moments.count);
      of.mean[c] = static_cast<T>(moments.mean[c]);
      of.variance[c] = static_cast<T>(v < 0 ? 0 : v);  // a NaN stays
    }
    of.fold(channels, args_.shape.eps);
  }

  // The sum of what the norms give and of the input, each times its gate.
  void apply() const {
    const int64_t room = layout_.room(), channels = layout_.channels();
    const T** reads = take<const T*>(workers_, norms_.count);
    T *scale = take<T>(workers_, norms_.count * room), *bias = take_zeros<T>(workers_, room);
    int64_t count = 0;
    for_last_norms(options_, norms_.count, [&](int64_t norm, int64_t) {
      const EdgeNorm<T>& of = norms_.all[norm];
      for (int64_t c = 0; c < room; ++c) {
        scale[count * room + c] = of.gate * of.scale[c];
        bias[c] += of.gate * of.bias[c];
      }
      reads[count++] = of.read;
    });
    const bool identity = options_.identity >= 0;
    const Vector<T> times =
        broadcast(identity && options_.gates ? options_.gates[options_.identity] : T(1));
    parallel(workers_, layout_.shares, [&](int64_t index, int64_t) {
      const Share share = layout_.share(index);
      for (int64_t n = share.n0; n < share.n1; ++n) {
        T* y = args_.y + n * layout_.out_elements();
        for (int64_t v = 0; v < layout_.vectors; ++v) {
          const int64_t at = n * layout_.elements() + v * layout_.positions() * kL;
          for (int64_t i = 0; i < layout_.positions(); ++i) {
            Vector<T> sum = load(bias + v * kL);
            for (int64_t k = 0; k < count; ++k) {
              sum += load(scale + k * room + v * kL) * load(reads[k] + at + i * kL);
            }
            if (identity) sum += times * get_channels(image(n) + i * channels, v, channels);
            put_channels(y + i * channels, v, channels, sum);
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
  ShareSums sums_;
  T* origins_;
  Memory* memories_;
};

}  // namespace
}  // namespace pynas
