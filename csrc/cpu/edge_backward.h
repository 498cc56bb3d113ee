// The backward pass of an edge.
#pragma once

#include "edge_pool.h"
#include "edge_stage.h"

namespace pynas {
namespace {

template <typename T>
class EdgeBackwardPass {
 public:
  EdgeBackwardPass(const EdgeBackward<T>& args, const Workers& workers)
      : args_(args),
        options_(args.options),
        workers_(workers),
        layout_(args.shape),
        norms_(layout_, args.options, args.saved, workers),
        sums_{
            layout_.room(), 2 * norms_.count + 2,
            take_zeros<double>(workers, layout_.shares * (2 * norms_.count + 2) * layout_.room())},
        rules_(take<NormGradient<T>>(workers, norms_.count)),
        between_(take<T*>(workers, norms_.count)),
        memories_(take<Memory>(workers, workers.count)) {
    const EdgeShape& s = args.shape;
    const int64_t room = layout_.room(), in = s.height * s.width * room;
    T* numbers = take_zeros<T>(workers, norms_.count * 3 * room);
    for (int64_t i = 0; i < norms_.count; ++i) {
      norms_.all[i].fold(s.channels, s.eps);
      T* of = numbers + i * 3 * room;
      rules_[i] = {of, of + room, of + 2 * room};
    }
    for_convs(options_, [&](const EdgeConv<T>& conv, int64_t norm) {
      if (conv.stages == 2) between_[norm] = take<T>(workers, s.images * layout_.elements());
    });
    for (int64_t i = 0; i < workers.count; ++i) {
      memories_[i] = {{layout_, options_, true, workers},
                      {layout_, workers},
                      take<T>(workers, in),
                      take<T>(workers, in)};
    }
  }

  void run() {
    sum_outputs();
    for_last_norms(options_, norms_.count, [&](int64_t norm, int64_t gate) {
      finish(norm, 2 * norms_.count, norms_.all[norm].gate, gate);
    });
    if (args_.gates_gradient && options_.identity >= 0) {
      double sum = 0;
      for (int64_t c = 0; c < layout_.channels(); ++c) {
        sum += sums_.total(layout_.shares, 2 * norms_.count + 1, c);
      }
      args_.gates_gradient[options_.identity] = static_cast<T>(sum);
    }
    if (!args_.x_gradient && !args_.gradients) return;
    second_stages();
    first_stages();
  }

 private:
  static constexpr int64_t kL = kLanes<T>;
  struct Memory {
    EdgeImages<T> images;
    EdgePools<T> pools;
    T *x, *sum;  // [vector][position][lane]: the input, and the sum of what comes back without ReLU
  };

  const T* image(int64_t n) const { return args_.x + n * layout_.in_elements(); }
  const T* read_of(int64_t norm, int64_t n) const {
    return norms_.all[norm].read + n * layout_.elements();
  }
  void read_gradient(const Memory& memory, int64_t n) const {
    to_vectors(args_.y_gradient + n * layout_.out_elements(), layout_.positions(),
               layout_.channels(), layout_.vectors, memory.images.y_gradient);
  }

  // Sums over positions of the output's gradient, of that times what the last norms read less its
  // mean, and of that times the input.
  void sum_outputs() {
    const int64_t block = 2 * kBandPositions;
    parallel(workers_, layout_.shares, [&](int64_t index, int64_t worker) {
      const Memory& memory = memories_[worker];
      const Share share = layout_.share(index);
      for (int64_t n = share.n0; n < share.n1; ++n) {
        read_gradient(memory, n);
        for (int64_t v = 0; v < layout_.vectors; ++v) {
          const T* g = memory.images.y_gradient + v * layout_.positions() * kL;
          for (int64_t p = 0; p < layout_.positions(); p += block) {
            const int64_t last = smaller(p + block, layout_.positions());
            sum_block(index, n, v, g, p, last);
          }
        }
      }
    });
  }

  void sum_block(int64_t index, int64_t n, int64_t v, const T* g, int64_t p0, int64_t p1) {
    const auto total = [&](int64_t line, auto&& get) {
      Vector<T> sum[2] = {};
      for (int64_t p = p0; p < p1; ++p) sum[p % 2] += get(p);
      add_to<T>(sums_.at(index, line) + v * kL, sum[0] + sum[1]);
    };
    total(2 * norms_.count, [&](int64_t p) { return load(g + p * kL); });
    if (options_.identity >= 0 && args_.gates_gradient) {
      const int64_t channels = layout_.channels();
      total(2 * norms_.count + 1, [&](int64_t p) {
        return load(g + p * kL) * get_channels(image(n) + p * channels, v, channels);
      });
    }
    for_last_norms(options_, norms_.count, [&](int64_t norm, int64_t) {
      const T* read = read_of(norm, n) + v * layout_.positions() * kL;
      const Vector<T> mean = load(norms_.all[norm].centre + v * kL);
      total(2 * norm + 1,
            [&](int64_t p) { return load(g + p * kL) * (load(read + p * kL) - mean); });
    });
  }

  // From a norm's sums: its rule, and the gradients of its scale, shift and gate. first: the line
  // of the plain sum.
  void finish(int64_t norm, int64_t first, T gate, int64_t column) {
    const EdgeNorm<T>& of = norms_.all[norm];
    const int64_t count = layout_.shape.images * layout_.positions();
    double gate_sum = 0;
    for (int64_t c = 0; c < layout_.channels(); ++c) {
      const double rstd = of.rstd(c, args_.shape.eps);
      const double sum = sums_.total(layout_.shares, first, c);
      const double against = sums_.total(layout_.shares, 2 * norm + 1, c);
      const double g = static_cast<double>(gate);
      rules_[norm].set(c, static_cast<T>(g * of.weight(c) * rstd), of.mean[c], rstd, sum, against,
                       count);
      const double shift = of.norm.shift ? static_cast<double>(of.norm.shift[c]) : 0;
      gate_sum += of.weight(c) * rstd * against + shift * sum;
      if (!args_.gradients) continue;
      const EdgeGradients<T>& to = args_.gradients[norm];
      if (to.scale) to.scale[c] = static_cast<T>(g * rstd * against);
      if (to.shift) to.shift[c] = static_cast<T>(g * sum);
    }
    if (column >= 0 && args_.gates_gradient)
      args_.gates_gradient[column] = static_cast<T>(gate_sum);
  }

  // What all convolutions need of one of their stages.
  struct Stages {
    EdgeWeights<T>* weights;  // [convolutions]
    EdgePart<T>* parts;       // [shares, convolutions]; null: not wanted
    bool any, halved;
  };

  Stages prepare(int64_t number) const {
    const int64_t count = options_.conv_count, room = layout_.room();
    Stages made{take<EdgeWeights<T>>(workers_, count),
                args_.gradients ? take<EdgePart<T>>(workers_, layout_.shares * count) : nullptr,
                false, false};
    for (int64_t i = 0; i < count; ++i) {
      const EdgeConv<T>& conv = options_.convs[i];
      if (number >= conv.stages) continue;
      made.any = true;
      made.halved = made.halved || step(conv, number).halved;
      made.weights[i] =
          EdgeWeights<T>::make(conv.stage[number], conv.kernel, layout_.channels(), workers_);
      for (int64_t share = 0; share < layout_.shares && made.parts; ++share) {
        made.parts[share * count + i] = {take_zeros<T>(workers_, conv.kernel * conv.kernel * room),
                                         take_zeros<T>(workers_, room * room)};
      }
    }
    return made;
  }

  EdgeStep<T> step(const EdgeConv<T>& conv, int64_t number) const {
    return {conv.kernel, number ? 1 : args_.shape.stride, number ? 1 : conv.dilation};
  }

  // Adds up the shares' gradients of the weights of a stage.
  void write_weights(int64_t number, const Stages& of) const {
    if (!of.parts) return;
    const int64_t channels = layout_.channels(), count = options_.conv_count;
    for_convs(options_, [&](const EdgeConv<T>& conv, int64_t norm) {
      if (number >= conv.stages) return;
      const int64_t taps = conv.kernel * conv.kernel, index = &conv - options_.convs;
      const EdgeGradients<T>& to = args_.gradients[norm + number];
      const auto total = [&](auto&& get) {
        double sum = 0;
        for (int64_t share = 0; share < layout_.shares; ++share) {
          sum += static_cast<double>(get(of.parts[share * count + index]));
        }
        return static_cast<T>(sum);
      };
      for (int64_t c = 0; c < channels; ++c) {
        for (int64_t tap = 0; tap < taps; ++tap) {
          to.depthwise[c * taps + tap] = total([&](const EdgePart<T>& part) {
            return part.taps[(c / kL * taps + tap) * kL + c % kL];
          });
        }
        for (int64_t in = 0; in < channels; ++in) {
          to.pointwise[c * channels + in] = total(
              [&](const EdgePart<T>& part) { return part.pointwise[in * layout_.room() + c]; });
        }
      }
    });
  }

  void second_stages() {
    const Stages of = prepare(1);
    if (!of.any) return;
    parallel(workers_, layout_.shares, [&](int64_t index, int64_t worker) {
      const Memory& memory = memories_[worker];
      const EdgeImages<T>& images = memory.images;
      const Share share = layout_.share(index);
      for (int64_t n = share.n0; n < share.n1; ++n) {
        read_gradient(memory, n);
        for_convs(options_, [&](const EdgeConv<T>& conv, int64_t norm) {
          if (conv.stages != 2) return;
          const int64_t i = &conv - options_.convs;
          images.read_middle(norms_.all[norm], n);
          EdgeImages<T>::clear(images.middle_sum, layout_.vectors);
          images.backward(step(conv, 1), of.weights[i], images.middle, rules_[norm + 1],
                          images.y_gradient, read_of(norm + 1, n),
                          of.parts ? of.parts + index * options_.conv_count + i : nullptr,
                          images.middle_sum);
          through_middle(images, norm, index, n);
        });
      }
    });
    for_convs(options_, [&](const EdgeConv<T>& conv, int64_t norm) {
      if (conv.stages == 2) finish(norm, 2 * norm, 1, -1);
    });
    write_weights(1, of);
  }

  // The gradient of what a first stage's norm gives out, and its sums.
  void through_middle(const EdgeImages<T>& images, int64_t norm, int64_t index, int64_t n) {
    T* to = between_[norm] + n * layout_.elements();
    const T* read = read_of(norm, n);
    for (int64_t v = 0; v < layout_.vectors; ++v) {
      const Vector<T> mean = load(norms_.all[norm].centre + v * kL);
      for (int64_t y = 0; y < layout_.height; ++y) {
        const T *sum = images.middle_sum.row(v, y), *result = images.middle.row(v, y);
        Vector<T> first{}, against{};
        for (int64_t i = 0; i < layout_.width * kL; i += kL, to += kL, read += kL) {
          const Vector<T> g = through<T>(Activation::kRelu, load(sum + i), load(result + i));
          store(to, g);
          first += g;
          against += g * (load(read) - mean);
        }
        add_to<T>(sums_.at(index, 2 * norm) + v * kL, first);
        add_to<T>(sums_.at(index, 2 * norm + 1) + v * kL, against);
      }
    }
  }

  void first_stages() {
    const Stages of = prepare(0);
    parallel(workers_, layout_.shares, [&](int64_t index, int64_t worker) {
      const Memory& memory = memories_[worker];
      const EdgeImages<T>& images = memory.images;
      const Share share = layout_.share(index);
      for (int64_t n = share.n0; n < share.n1; ++n) {
        read_gradient(memory, n);
        if (of.any) images.read_input(image(n), of.halved);
        EdgeImages<T>::clear(images.input_sum, layout_.vectors);
        if (of.halved) EdgeImages<T>::clear(images.half_sum, layout_.vectors);
        for_convs(options_, [&](const EdgeConv<T>& conv, int64_t norm) {
          const EdgeStep<T> first = step(conv, 0);
          const int64_t i = &conv - options_.convs;
          Image<T> sum = first.halved ? images.half_sum : images.input_sum;
          if (!args_.x_gradient) sum.data = nullptr;
          images.backward(
              first, of.weights[i], first.halved ? images.half : images.input, rules_[norm],
              conv.stages == 2 ? between_[norm] + n * layout_.elements() : images.y_gradient,
              read_of(norm, n), of.parts ? of.parts + index * options_.conv_count + i : nullptr,
              sum);
        });
        if (args_.x_gradient) write_input(memory, n, of.any, of.halved);
      }
    });
    write_weights(0, of);
  }

  // The input's gradient of one image: of identity and pools, and through ReLU of convolutions.
  void write_input(const Memory& memory, int64_t n, bool convs, bool halved) const {
    const EdgeShape& s = args_.shape;
    const EdgeImages<T>& images = memory.images;
    const int64_t in = s.height * s.width;
    if (options_.identity >= 0) {
      const Vector<T> gate = broadcast(options_.gates ? options_.gates[options_.identity] : T(1));
      for (int64_t i = 0; i < in * layout_.room(); i += kL) {
        store(memory.sum + i, load(images.y_gradient + i) * gate);
      }
    } else {
      memset(memory.sum, 0, static_cast<size_t>(in * layout_.room()) * sizeof(T));
    }
    if (options_.pool_count) to_vectors(image(n), in, s.channels, layout_.vectors, memory.x);
    for (int64_t i = 0; i < options_.pool_count; ++i) {
      const int64_t norm = norms_.count - options_.pool_count + i;
      memory.pools.backward(options_.pools[i].maximum, memory.x, rules_[norm], images.y_gradient,
                            read_of(norm, n), memory.sum);
    }
    if (halved) spread(images);
    T* to = args_.x_gradient + n * layout_.in_elements();
    for (int64_t v = 0; v < layout_.vectors; ++v) {
      const T* sum = memory.sum + v * in * kL;
      for (int64_t y = 0; y < s.height; ++y) {
        const T *back = images.input_sum.row(v, y), *result = images.input.row(v, y);
        for (int64_t i = 0; i < s.width; ++i, sum += kL) {
          Vector<T> g = load(sum);
          if (convs) {
            g += through<T>(Activation::kRelu, load(back + i * kL), load(result + i * kL));
          }
          put_channels(to + (y * s.width + i) * s.channels, v, s.channels, g);
        }
      }
    }
  }

  // Gradients of every second position, to where they belong.
  void spread(const EdgeImages<T>& images) const {
    for (int64_t v = 0; v < layout_.vectors; ++v) {
      for (int64_t y = 0; y < layout_.height; ++y) {
        const T* from = images.half_sum.row(v, y);
        T* to = images.input_sum.row(v, 2 * y);
        for (int64_t i = 0; i < layout_.width * kL; i += kL) {
          store(to + 2 * i, load(to + 2 * i) + load(from + i));
        }
      }
    }
  }

  const EdgeBackward<T>& args_;
  const EdgeOptions<T>& options_;
  const Workers& workers_;
  const EdgeLayout<T> layout_;
  const EdgeNorms<T> norms_;
  // By norm: of the gradient, and of that times what is read less its mean; then of the output's
  // gradient, and of that times the input.
  ShareSums sums_;
  NormGradient<T>* rules_;
  T** between_;  // of each first stage of two: the gradient of what its norm gives out
  Memory* memories_;
};

}  // namespace
}  // namespace pynas
