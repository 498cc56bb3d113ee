// Python's side of csrc/cpu/edge.h: reads and checks tensors, makes the results.
#include <pybind11/pybind11.h>

#include <vector>

#include "fast_method.h"
#include "kernels.h"
#include "workers.h"

namespace py = pybind11;

namespace pynas {
namespace {

constexpr size_t kNumbers = 5;  // of an option: kind, kernel, dilation, stages, gate
constexpr size_t kBuffers = 3;  // of a norm: running mean, variance and count

enum Kind : int64_t { kConv, kMaxPool, kAveragePool };
enum Wanted : int64_t { kWantsX = 1, kWantsGates = 2, kWantsWeights = 4 };

using Tensors = std::vector<TensorArg>;
using Numbers = std::vector<int64_t>;

// What both directions are called with.
struct EdgeArgs {
  const TensorArg& x;      // [images, height, width, channels]
  const Numbers& layer;    // stride, and whether norms have scale and shift
  const Numbers& numbers;  // of the options, convolutions first
  const Tensors& tensors;  // of the norms: two weights before those of convolutions, scale, shift
  const TensorArg& gates;  // [count], or none
  int64_t identity;
  double eps;

  size_t options() const { return numbers.size() / kNumbers; }
  const int64_t* option(size_t i) const { return &numbers[i * kNumbers]; }
  bool affine() const { return layer[1] != 0; }

  EdgeShape shape() const { return {x.size(0), x.size(1), x.size(2), x.size(3), layer[0], eps}; }
  int64_t out_height() const { return (x.size(1) + layer[0] - 1) / layer[0]; }
  int64_t out_width() const { return (x.size(2) + layer[0] - 1) / layer[0]; }
  int64_t positions() const { return x.size(0) * out_height() * out_width(); }

  size_t norms() const {
    size_t count = 0;
    for (size_t i = 0; i < options(); ++i) {
      count += option(i)[0] == kConv ? static_cast<size_t>(option(i)[3]) : 1;
    }
    return count;
  }
  // act(option, stage, whether it is a convolution's, place of its first tensor): every norm.
  template <typename Act>
  void for_norms(Act&& act) const {
    size_t at = 0;
    for (size_t i = 0; i < options(); ++i) {
      const bool conv = option(i)[0] == kConv;
      for (int64_t stage = 0; stage < (conv ? option(i)[3] : 1); ++stage) {
        act(i, stage, conv, at);
        at += (conv ? 2 : 0) + (affine() ? 2 : 0);
      }
    }
  }
  size_t tensors_needed() const {
    size_t count = 0;
    for_norms(
        [&](size_t, int64_t, bool conv, size_t) { count += (conv ? 2 : 0) + (affine() ? 2 : 0); });
    return count;
  }

  template <typename T>
  bool sound() const {
    if (!x.has<T>(4) || layer.size() != 2 || numbers.empty() || numbers.size() % kNumbers) {
      return false;
    }
    const EdgeShape s = shape();
    if ((s.stride != 1 && s.stride != 2) || s.channels < 1 || positions() < 2 || !(eps > 0) ||
        !x.is<T>({s.images, s.height, s.width, s.channels}) || (identity >= 0 && s.stride != 1)) {
      return false;
    }
    const int64_t gate_count = gates.none() ? 0 : gates.has<T>(1) ? gates.size(0) : -1;
    if (gate_count < 0 ||
        (!gates.none() && (!gates.is<T>({gate_count}) || identity >= gate_count))) {
      return false;
    }
    bool pooled = false;
    for (size_t i = 0; i < options(); ++i) {
      const int64_t* n = option(i);
      const bool conv = n[0] == kConv;
      if (n[0] < kConv || n[0] > kAveragePool || (conv && pooled) || n[4] < 0 ||
          (!gates.none() && n[4] >= gate_count)) {
        return false;
      }
      pooled = pooled || !conv;
      if (conv &&
          ((n[1] != 3 && n[1] != 5 && n[1] != 7) || n[2] < 1 || n[2] > 2 || n[3] < 1 || n[3] > 2)) {
        return false;
      }
    }
    return tensors.size() == tensors_needed() && sound_tensors<T>(s.channels);
  }

  template <typename T>
  bool sound_tensors(int64_t channels) const {
    bool good = true;
    for_norms([&](size_t i, int64_t, bool conv, size_t at) {
      const int64_t kernel = option(i)[1];
      if (conv) {
        good = good && tensors[at].is<T>({channels, 1, kernel, kernel}) &&
               tensors[at + 1].is<T>({channels, channels, 1, 1});
        at += 2;
      }
      if (affine()) {
        good = good && tensors[at].is<T>({channels}) && tensors[at + 1].is<T>({channels});
      }
    });
    return good;
  }
};

// The options as the kernel takes them.
template <typename T>
struct EdgeLists {
  std::vector<EdgeConv<T>> convs;
  std::vector<EdgePool<T>> pools;
  EdgeOptions<T> options;

  explicit EdgeLists(const EdgeArgs& args) {
    args.for_norms([&](size_t i, int64_t stage, bool conv, size_t at) {
      const int64_t* n = args.option(i);
      const size_t norm_at = at + (conv ? 2 : 0);
      MbNorm<T> norm{nullptr, nullptr};
      if (args.affine()) {
        norm = {args.tensors[norm_at].data<T>(), args.tensors[norm_at + 1].data<T>()};
      }
      if (!conv) return pools.push_back({n[0] == kMaxPool, n[4], norm});
      if (stage == 0) convs.push_back({n[1], n[2], n[3], n[4], {}});
      convs.back().stage[stage] = {args.tensors[at].data<T>(), args.tensors[at + 1].data<T>(),
                                   norm};
    });
    options = {convs.data(),
               pools.data(),
               static_cast<int64_t>(convs.size()),
               static_cast<int64_t>(pools.size()),
               args.identity,
               args.gates.none() ? nullptr : args.gates.data<T>()};
  }
};

struct EdgeSizes {
  int64_t norms, read, statistics;
  EdgeSizes(const EdgeArgs& args, int64_t lanes)
      : norms(static_cast<int64_t>(args.norms())),
        read(args.positions() * ((args.x.size(3) + lanes - 1) / lanes * lanes)),
        statistics(norms * 2 * args.x.size(3)) {}
};

template <typename T>
py::object forward_of(const EdgeFunctions<T>& functions, int64_t lanes, const EdgeArgs& args,
                      int64_t threads) {
  const EdgeShape s = args.shape();
  const EdgeSizes sizes(args, lanes);
  const NewTensor<T> y({s.images, args.out_height(), args.out_width(), s.channels});
  const NewTensor<T> read({sizes.norms, sizes.read}), statistics({sizes.statistics});
  const EdgeLists<T> lists(args);
  {
    const LongWork work(sizes.norms * sizes.read);
    const CallWorkers workers(threads);
    functions.forward({s, lists.options, args.x.data<T>(), y.data, {read.data, statistics.data}},
                      workers.get());
  }
  return py::make_tuple(y.tensor, read.tensor, statistics.tensor);
}

py::object edge_forward(const Kernels& kernels, const TensorArg& x, const Numbers& layer,
                        const Numbers& numbers, const Tensors& tensors, const TensorArg& gates,
                        int64_t identity, double eps, int64_t threads) {
  const EdgeArgs args{x, layer, numbers, tensors, gates, identity, eps};
  const EdgeTable& table = kernels.edge;
  if (args.sound<float>()) return forward_of(table.f32, table.lanes32, args, threads);
  if (args.sound<double>()) return forward_of(table.f64, table.lanes64, args, threads);
  return py::none();
}

// New gradients of each norm's tensors, in their shapes; they go to `out`, in order.
template <typename T>
std::vector<EdgeGradients<T>> gradients_of(const EdgeArgs& args, py::tuple& out) {
  std::vector<EdgeGradients<T>> all;
  const int64_t channels = args.x.size(3);
  args.for_norms([&](size_t i, int64_t, bool conv, size_t at) {
    const int64_t kernel = args.option(i)[1];
    const auto make = [&](std::initializer_list<int64_t> shape) {
      const NewTensor<T> made(shape);
      out[at++] = made.tensor;
      return made.data;
    };
    EdgeGradients<T> of{};
    if (conv) {
      of.depthwise = make({channels, 1, kernel, kernel});
      of.pointwise = make({channels, channels, 1, 1});
    }
    if (args.affine()) {
      of.scale = make({channels});
      of.shift = make({channels});
    }
    all.push_back(of);
  });
  return all;
}

template <typename T>
py::object backward_of(const EdgeFunctions<T>& functions, int64_t lanes, const EdgeArgs& args,
                       int64_t threads, const TensorArg& y_gradient, const Tensors& saved,
                       int64_t wanted) {
  const EdgeShape s = args.shape();
  const EdgeSizes sizes(args, lanes);
  if (saved.size() != 2 || !saved[0].is<T>({sizes.norms, sizes.read}) ||
      !saved[1].is<T>({sizes.statistics}) ||
      !y_gradient.is<T>({s.images, args.out_height(), args.out_width(), s.channels})) {
    return py::none();
  }
  py::object x_out = py::none(), gates_out = py::none();
  py::tuple weights_out(wanted & kWantsWeights ? args.tensors.size() : 0);
  T *x_data = nullptr, *gates_data = nullptr;
  if (wanted & kWantsX) {
    const NewTensor<T> made({s.images, s.height, s.width, s.channels});
    x_out = made.tensor;
    x_data = made.data;
  }
  if (wanted & kWantsGates && !args.gates.none()) {
    const NewTensor<T> made({args.gates.size(0)});
    for (int64_t i = 0; i < args.gates.size(0); ++i) made.data[i] = 0;
    gates_out = made.tensor;
    gates_data = made.data;
  }
  std::vector<EdgeGradients<T>> gradients;
  if (wanted & kWantsWeights) gradients = gradients_of<T>(args, weights_out);
  const EdgeLists<T> lists(args);
  {
    const LongWork work(sizes.norms * sizes.read);
    const CallWorkers workers(threads);
    functions.backward({s,
                        lists.options,
                        args.x.data<T>(),
                        y_gradient.data<T>(),
                        {saved[0].data<T>(), saved[1].data<T>()},
                        x_data,
                        gates_data,
                        gradients.empty() ? nullptr : gradients.data()},
                       workers.get());
  }
  return py::make_tuple(x_out, gates_out, weights_out);
}

py::object edge_backward(const Kernels& kernels, const TensorArg& x, const Numbers& layer,
                         const Numbers& numbers, const Tensors& tensors, const TensorArg& gates,
                         int64_t identity, double eps, int64_t threads, const TensorArg& y_gradient,
                         const Tensors& saved, int64_t wanted) {
  const EdgeArgs args{x, layer, numbers, tensors, gates, identity, eps};
  const EdgeTable& table = kernels.edge;
  if (args.sound<float>()) {
    return backward_of(table.f32, table.lanes32, args, threads, y_gradient, saved, wanted);
  }
  if (args.sound<double>()) {
    return backward_of(table.f64, table.lanes64, args, threads, y_gradient, saved, wanted);
  }
  return py::none();
}

template <typename T>
bool update_all(const TensorArg& statistics, const Tensors& buffers, double momentum,
                int64_t positions) {
  if (!statistics.has<T>(1) || buffers.empty() || buffers.size() % kBuffers) return false;
  const int64_t norms = static_cast<int64_t>(buffers.size() / kBuffers);
  const int64_t channels = statistics.size(0) / (2 * norms);
  if (!statistics.is<T>({norms * 2 * channels})) return false;
  for (size_t i = 0; i < buffers.size(); i += kBuffers) {
    if (!buffers[i].is<T>({channels}) || !buffers[i + 1].is<T>({channels}) ||
        !buffers[i + 2].is<int64_t>({})) {
      return false;
    }
  }
  const T* from = statistics.data<T>();
  const double unbiased = static_cast<double>(positions) / static_cast<double>(positions - 1);
  const auto mix = [&](T& old, double found) {
    old = static_cast<T>((1 - momentum) * static_cast<double>(old) + momentum * found);
  };
  for (size_t i = 0; i < buffers.size(); i += kBuffers, from += 2 * channels) {
    T *mean = buffers[i].data<T>(), *variance = buffers[i + 1].data<T>();
    for (int64_t c = 0; c < channels; ++c) {
      mix(mean[c], static_cast<double>(from[c]));
      mix(variance[c], static_cast<double>(from[channels + c]) * unbiased);
    }
    ++*buffers[i + 2].data<int64_t>();
  }
  return true;
}

// Moves running statistics towards those that forward found; false where the tensors do not fit.
py::object edge_update(const Kernels&, const TensorArg& statistics, const Tensors& buffers,
                       double momentum, int64_t positions) {
  return py::bool_(update_all<float>(statistics, buffers, momentum, positions) ||
                   update_all<double>(statistics, buffers, momentum, positions));
}

}  // namespace

void bind_edge(py::class_<Kernels>& kernels) {
  FastMethod<edge_forward>::add(kernels, "edge_forward");
  FastMethod<edge_backward>::add(kernels, "edge_backward");
  FastMethod<edge_update>::add(kernels, "edge_update");
  // Channels of saved arrays are padded to these, for float32 and float64.
  kernels.def("edge_lanes",
              [](const Kernels& k) { return py::make_tuple(k.edge.lanes32, k.edge.lanes64); });
}

}  // namespace pynas
