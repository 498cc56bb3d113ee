// Python's side of csrc/cpu/mbconv.h: reads and checks tensors, makes the results.
#include <pybind11/pybind11.h>

#include <initializer_list>
#include <vector>

#include "fast_method.h"
#include "kernels.h"
#include "workers.h"

namespace py = pybind11;

namespace pynas {
namespace {

constexpr size_t kTensors = 9;  // of an option: weight, scale and shift of three convolutions
constexpr size_t kNumbers = 5;  // of an option: kernel, hidden, groups, gate, trained
constexpr size_t kBuffers = 9;  // of an option: running mean, variance and count of three norms

using Tensors = std::vector<TensorArg>;
using Numbers = std::vector<int64_t>;

// What both directions are called with.
struct MbArgs {
  const TensorArg& x;      // [images, height, width, channels]
  const Numbers& layer;    // stride, out channels, activation
  const Numbers& numbers;  // of the options
  const Tensors& tensors;  // of the options
  const TensorArg& gates;  // [1 or images, count], or none
  int64_t identity;
  double eps;

  size_t options() const { return numbers.size() / kNumbers; }

  bool has_sizes() const {
    return (x.has<float>(4) || x.has<double>(4)) && layer.size() == 3 && layer[1] >= 1;
  }

  MbShape shape() const {
    return {x.size(0),
            x.size(1),
            x.size(2),
            x.size(3),
            layer[1],
            layer[0],
            static_cast<int64_t>(options()),
            static_cast<Activation>(layer[2]),
            eps};
  }

  template <typename T>
  bool sound() const {
    if (!x.has<T>(4) || numbers.size() % kNumbers != 0 || tensors.size() != options() * kTensors ||
        options() == 0) {
      return false;
    }
    const MbShape s = shape();
    const int64_t out_positions =
        s.images * ((s.height + s.stride - 1) / s.stride) * ((s.width + s.stride - 1) / s.stride);
    if ((s.stride != 1 && s.stride != 2) || s.in_channels < 1 || s.out_channels < 1 ||
        layer[2] < 0 || layer[2] > 3 || out_positions < 2 ||
        !x.is<T>({s.images, s.height, s.width, s.in_channels}) || !(s.eps > 0)) {
      return false;
    }
    if (gates.none() ? identity >= 0 : !sound_gates<T>(s)) return false;
    for (size_t i = 0; i < options(); ++i) {
      if (!sound_option<T>(s, i)) return false;
    }
    return true;
  }

  template <typename T>
  MbGates<T> gates_of() const {
    if (gates.none()) return {nullptr, 0, 1, -1};
    return {gates.data<T>(), gates.size(0) == 1 ? 0 : gates.size(1), gates.size(1), identity};
  }

  template <typename T>
  std::vector<MbOption<T>> options_of() const {
    std::vector<MbOption<T>> all;
    for (size_t i = 0; i < options(); ++i) {
      const int64_t* n = &numbers[i * kNumbers];
      const TensorArg* t = &tensors[i * kTensors];
      all.push_back({n[0],
                     n[1],
                     n[2],
                     n[3],
                     n[4] != 0,
                     t[0].data<T>(),
                     {t[1].data<T>(), t[2].data<T>()},
                     t[3].data<T>(),
                     {t[4].data<T>(), t[5].data<T>()},
                     t[6].data<T>(),
                     {t[7].data<T>(), t[8].data<T>()}});
    }
    return all;
  }

  int64_t statistics() const {
    int64_t total = 0;
    for (size_t i = 0; i < options(); ++i) total += 4 * numbers[i * kNumbers + 1] + 2 * layer[1];
    return total;
  }

 private:
  template <typename T>
  bool sound_gates(const MbShape& s) const {
    if (!gates.has<T>(2)) return false;
    const int64_t rows = gates.size(0), count = gates.size(1);
    return (rows == 1 || rows == s.images) && gates.is<T>({rows, count}) && identity < count &&
           (identity < 0 || (s.stride == 1 && s.in_channels == s.out_channels));
  }

  template <typename T>
  bool sound_option(const MbShape& s, size_t i) const {
    const int64_t* n = &numbers[i * kNumbers];
    const int64_t kernel = n[0], hidden = n[1], groups = n[2], gate = n[3];
    if ((kernel != 3 && kernel != 5 && kernel != 7) || hidden < 1 || groups < 1 ||
        s.in_channels % groups || hidden % groups || s.out_channels % groups || gate < 0 ||
        (!gates.none() && gate >= gates.size(1))) {
      return false;
    }
    const TensorArg* t = &tensors[i * kTensors];
    return t[0].is<T>({hidden, s.in_channels / groups, 1, 1}) && t[1].is<T>({hidden}) &&
           t[2].is<T>({hidden}) && t[3].is<T>({hidden, 1, kernel, kernel}) &&
           t[4].is<T>({hidden}) && t[5].is<T>({hidden}) &&
           t[6].is<T>({s.out_channels, hidden / groups, 1, 1}) && t[7].is<T>({s.out_channels}) &&
           t[8].is<T>({s.out_channels});
  }
};

struct SavedSizes {
  int64_t in, in_padded, positions, out_padded, statistics;

  SavedSizes(const MbArgs& args, int64_t lanes) {
    const MbShape s = args.shape();
    in = s.in_channels;
    in_padded = (in + lanes - 1) / lanes * lanes;
    positions =
        s.images * ((s.height + s.stride - 1) / s.stride) * ((s.width + s.stride - 1) / s.stride);
    out_padded = (s.out_channels + lanes - 1) / lanes * lanes;
    statistics = args.statistics();
  }
};

template <typename T>
py::object forward_of(const MbFunctions<T>& functions, int64_t lanes, const MbArgs& args,
                      int64_t threads) {
  const MbShape s = args.shape();
  const SavedSizes sizes(args, lanes);
  const NewTensor<T> y({s.images, (s.height + s.stride - 1) / s.stride,
                        (s.width + s.stride - 1) / s.stride, s.out_channels});
  const NewTensor<T> mean({sizes.in}), covariance({sizes.in, sizes.in_padded});
  const NewTensor<T> products({s.options, sizes.positions, sizes.out_padded});
  const NewTensor<T> statistics({sizes.statistics});
  const auto options = args.options_of<T>();
  {
    const LongWork work(sizes.positions * s.out_channels * s.options);
    const CallWorkers workers(threads);
    functions.forward({s,
                       options.data(),
                       args.x.data<T>(),
                       args.gates_of<T>(),
                       y.data,
                       {mean.data, covariance.data, products.data, statistics.data}},
                      workers.get());
  }
  return py::make_tuple(y.tensor, mean.tensor, covariance.tensor, products.tensor,
                        statistics.tensor);
}

py::object mbconv_forward(const Kernels& kernels, const TensorArg& x, const Numbers& layer,
                          const Numbers& numbers, const Tensors& tensors, const TensorArg& gates,
                          int64_t identity, double eps, int64_t threads) {
  const MbArgs args{x, layer, numbers, tensors, gates, identity, eps};
  if (!args.has_sizes()) return py::none();
  const MbTable& table = kernels.mbconv_for(x.size(3), layer[1]);
  if (args.sound<float>()) return forward_of(table.f32, table.lanes32, args, threads);
  if (args.sound<double>()) return forward_of(table.f64, table.lanes64, args, threads);
  return py::none();
}

// Gradients of one option's tensors, in their shapes.
template <typename T>
MbGradients<T> gradients_of(const MbArgs& args, size_t option, py::tuple& out) {
  const int64_t* n = &args.numbers[option * kNumbers];
  const int64_t kernel = n[0], hidden = n[1], groups = n[2], last = args.layer[1];
  size_t at = option * kTensors;
  const auto make = [&](std::initializer_list<int64_t> shape) {
    const NewTensor<T> made(shape);
    out[at++] = made.tensor;
    return made.data;
  };
  MbGradients<T> all;
  all.expand = make({hidden, args.x.size(3) / groups, 1, 1});
  all.scale1 = make({hidden});
  all.shift1 = make({hidden});
  all.depthwise = make({hidden, 1, kernel, kernel});
  all.scale2 = make({hidden});
  all.shift2 = make({hidden});
  all.project = make({last, hidden / groups, 1, 1});
  all.scale3 = make({last});
  all.shift3 = make({last});
  return all;
}

enum Wanted : int64_t { kWantsX = 1, kWantsGates = 2, kWantsWeights = 4 };

// What forward kept: mean, covariance, products, statistics.
template <typename T>
bool sound_saved(const MbArgs& args, const Tensors& saved, int64_t lanes) {
  const SavedSizes sizes(args, lanes);
  return saved.size() == 4 && saved[0].is<T>({sizes.in}) &&
         saved[1].is<T>({sizes.in, sizes.in_padded}) &&
         saved[2].is<T>(
             {static_cast<int64_t>(args.options()), sizes.positions, sizes.out_padded}) &&
         saved[3].is<T>({sizes.statistics});
}

template <typename T>
py::object backward_of(const MbFunctions<T>& functions, int64_t lanes, const MbArgs& args,
                       int64_t threads, const TensorArg& y_gradient, const Tensors& saved,
                       int64_t wanted) {
  const MbShape s = args.shape();
  if (!sound_saved<T>(args, saved, lanes) ||
      !y_gradient.is<T>({s.images, (s.height + s.stride - 1) / s.stride,
                         (s.width + s.stride - 1) / s.stride, s.out_channels})) {
    return py::none();
  }
  py::object x_out = py::none(), gates_out = py::none();
  py::tuple weights_out(wanted & kWantsWeights ? args.options() * kTensors : 0);
  T *x_data = nullptr, *gates_data = nullptr;
  if (wanted & kWantsX) {
    const NewTensor<T> made({s.images, s.height, s.width, s.in_channels});
    x_out = made.tensor;
    x_data = made.data;
  }
  if (wanted & kWantsGates && !args.gates.none()) {
    const NewTensor<T> made({args.gates.size(0), args.gates.size(1)});
    gates_out = made.tensor;
    gates_data = made.data;
  }
  std::vector<MbGradients<T>> gradients;
  for (size_t i = 0; i < args.options() && wanted & kWantsWeights; ++i) {
    if (args.numbers[i * kNumbers + 4]) {
      gradients.push_back(gradients_of<T>(args, i, weights_out));
    } else {
      for (size_t t = 0; t < kTensors; ++t) weights_out[i * kTensors + t] = py::none();
      gradients.push_back({});
    }
  }
  const auto options = args.options_of<T>();
  {
    const LongWork work(y_gradient.size(0) * y_gradient.size(1) * s.out_channels * s.options);
    const CallWorkers workers(threads);
    functions.backward(
        {s,
         options.data(),
         args.x.data<T>(),
         args.gates_of<T>(),
         y_gradient.data<T>(),
         {saved[0].data<T>(), saved[1].data<T>(), saved[2].data<T>(), saved[3].data<T>()},
         x_data,
         gates_data,
         gradients.empty() ? nullptr : gradients.data()},
        workers.get());
  }
  return py::make_tuple(x_out, gates_out, weights_out);
}

py::object mbconv_backward(const Kernels& kernels, const TensorArg& x, const Numbers& layer,
                           const Numbers& numbers, const Tensors& tensors, const TensorArg& gates,
                           int64_t identity, double eps, int64_t threads,
                           const TensorArg& y_gradient, const Tensors& saved, int64_t wanted) {
  const MbArgs args{x, layer, numbers, tensors, gates, identity, eps};
  if (!args.has_sizes()) return py::none();
  const MbTable& table = kernels.mbconv_for(x.size(3), layer[1]);
  if (args.sound<float>()) {
    return backward_of(table.f32, table.lanes32, args, threads, y_gradient, saved, wanted);
  }
  if (args.sound<double>()) {
    return backward_of(table.f64, table.lanes64, args, threads, y_gradient, saved, wanted);
  }
  return py::none();
}

// running = (1 - momentum) * running + momentum * found; the variance is made unbiased.
template <typename T>
void update_norm(const TensorArg* buffers, const T* mean, const T* variance, int64_t channels,
                 int64_t groups, int64_t positions, double momentum) {
  T *running_mean = buffers[0].data<T>(), *running_variance = buffers[1].data<T>();
  const double unbiased = static_cast<double>(positions) / static_cast<double>(positions - 1);
  for (int64_t c = 0; c < channels; ++c) {
    const int64_t to = c % groups * (channels / groups) + c / groups;
    const auto mix = [&](T old, double found) {
      return static_cast<T>((1 - momentum) * static_cast<double>(old) + momentum * found);
    };
    running_mean[to] = mix(running_mean[to], static_cast<double>(mean[c]));
    running_variance[to] = mix(running_variance[to], static_cast<double>(variance[c]) * unbiased);
  }
  ++*buffers[2].data<int64_t>();
}

template <typename T>
bool update_all(const Numbers& numbers, int64_t out, const TensorArg& statistics,
                const Tensors& buffers, double momentum, int64_t in_positions,
                int64_t out_positions) {
  const size_t options = numbers.size() / kNumbers;
  if (!statistics.has<T>(1) || buffers.size() != options * kBuffers) return false;
  int64_t total = 0;
  for (size_t i = 0; i < options; ++i) {
    const int64_t hidden = numbers[i * kNumbers + 1];
    const int64_t channels[] = {hidden, hidden, out};
    for (size_t norm = 0; norm < 3; ++norm) {
      const TensorArg* b = &buffers[i * kBuffers + 3 * norm];
      if (!b[0].is<T>({channels[norm]}) || !b[1].is<T>({channels[norm]}) || !b[2].is<int64_t>({})) {
        return false;
      }
    }
    total += 4 * hidden + 2 * out;
  }
  if (!statistics.is<T>({total})) return false;
  const T* from = statistics.data<T>();
  for (size_t i = 0; i < options; ++i) {
    const int64_t hidden = numbers[i * kNumbers + 1], groups = numbers[i * kNumbers + 2];
    const TensorArg* b = &buffers[i * kBuffers];
    update_norm<T>(b, from, from + hidden, hidden, groups, in_positions, momentum);
    update_norm<T>(b + 3, from + 2 * hidden, from + 3 * hidden, hidden, 1, out_positions, momentum);
    from += 4 * hidden;
    update_norm<T>(b + 6, from, from + out, out, 1, out_positions, momentum);
    from += 2 * out;
  }
  return true;
}

// Moves running statistics towards those that forward found; false where the tensors do not fit.
py::object mbconv_update(const Kernels&, const Numbers& layer, const Numbers& numbers,
                         const TensorArg& statistics, const Tensors& buffers, double momentum,
                         int64_t in_positions, int64_t out_positions) {
  if (layer.size() != 3 || numbers.size() % kNumbers) return py::bool_(false);
  return py::bool_(update_all<float>(numbers, layer[1], statistics, buffers, momentum, in_positions,
                                     out_positions) ||
                   update_all<double>(numbers, layer[1], statistics, buffers, momentum,
                                      in_positions, out_positions));
}

}  // namespace

const MbTable& Kernels::mbconv_for(int64_t in_channels, int64_t out_channels) const {
#ifdef PYNAS_X86
  static const bool narrow = narrow_vectors_keep_up();
  const auto padded = [&](int64_t lanes) {
    return (in_channels + lanes - 1) / lanes * lanes + (out_channels + lanes - 1) / lanes * lanes;
  };
  if (isa == Isa::kAvx512 && narrow && 20 * padded(16) >= 23 * padded(8)) {
    return avx512_narrow::mbconv;
  }
#endif
  return mbconv;
}

void bind_mbconv(py::class_<Kernels>& kernels) {
  FastMethod<mbconv_forward>::add(kernels, "mbconv_forward");
  FastMethod<mbconv_backward>::add(kernels, "mbconv_backward");
  FastMethod<mbconv_update>::add(kernels, "mbconv_update");
  // Channels of saved arrays are padded to these, for float32 and float64.
  kernels.def("mbconv_lanes", [](const Kernels& k, int64_t in_channels, int64_t out_channels) {
    const MbTable& table = k.mbconv_for(in_channels, out_channels);
    return py::make_tuple(table.lanes32, table.lanes64);
  });
}

}  // namespace pynas
