// The Python module pynas._C.
//
// No torch is needed to build. A FastMethod takes tensors, and checks them itself; all others take
// addresses (Tensor.data_ptr()) and sizes, and their callers in pynas/kernels own the arrays and
// have checked shapes, dtypes, devices and strides.
#include <pybind11/pybind11.h>

#include <optional>
#include <string>
#include <vector>

#include "fast_method.h"
#include "kernels.h"
#include "shared/philox.h"
#include "tensors.h"
#include "workers.h"

namespace py = pybind11;

namespace pynas {
namespace {

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

template <typename In, void (*ElementwiseTable::*Function)(const In*, float*, int64_t)>
void map(const Kernels& kernels, uintptr_t in, uintptr_t out, int64_t count) {
  const LongWork work(count);
  (kernels.elementwise.*Function)(at<In>(in), at<float>(out), count);
}

void map_philox(const Kernels& kernels, uintptr_t counters, uint64_t key, uintptr_t out,
                int64_t count) {
  const LongWork work(4 * count);
  kernels.elementwise.philox(at<uint32_t>(counters), key, at<uint32_t>(out), count);
}

void bind_elementwise(py::class_<Kernels>& kernels) {
  kernels.def("log", map<float, &ElementwiseTable::log>)
      .def("exp", map<float, &ElementwiseTable::exp>)
      .def("gumbel", map<uint32_t, &ElementwiseTable::gumbel>)
      .def("philox", map_philox);
}

// What both directions of the Gumbel gates are called with; theta says which T.
struct GumbelArgs {
  const TensorArg &theta, &mask, &cost;
  double tau;
  int64_t seed, step, draws;

  template <typename T>
  GumbelInputs<T> inputs() const {
    return {draws,
            layers(),
            options(),
            theta.data<T>(),
            mask.data<uint8_t>(),
            cost.data<T>(),
            tau,
            static_cast<uint64_t>(seed),
            static_cast<uint64_t>(step)};
  }

  int64_t layers() const { return theta.size(0); }
  int64_t options() const { return theta.size(1); }

  template <typename T>
  bool sound() const {
    return theta.has<T>(2) && options() >= 1 && options() <= kMostOptions && layers() < kLayers &&
           theta.is<T>({layers(), options()}) && mask.is<bool>({layers(), options()}) &&
           cost.is<T>({layers(), options()}) && tau >= kLeastTau && tau <= kMostTau && seed >= 0 &&
           step >= 0 && step < kSteps && draws >= 1 && draws <= kIndices;
  }
};

// None where the arguments are not sound or the values make no sense: Python knows what to say.
template <typename T>
py::object forward_of(const GumbelFunctions<T>& functions, const GumbelArgs& args) {
  const auto in = args.inputs<T>();
  const NewTensor<T> soft({in.draws, in.layers, in.options});
  const NewTensor<int64_t> index({in.draws, in.layers});
  const NewTensor<T> log_prob({in.draws, in.layers});
  const NewTensor<T> cost({in.draws});
  bool done;
  {
    const LongWork work(in.draws * in.layers * in.options);
    done = functions.forward(in, {soft.data, index.data, log_prob.data, cost.data});
  }
  if (!done) return py::none();
  return py::make_tuple(soft.tensor, index.tensor, log_prob.tensor, cost.tensor);
}

py::object gumbel_forward(const Kernels& kernels, const TensorArg& theta, const TensorArg& mask,
                          const TensorArg& cost, double tau, int64_t seed, int64_t step,
                          int64_t draws) {
  const GumbelArgs args{theta, mask, cost, tau, seed, step, draws};
  if (args.sound<float>()) return forward_of(kernels.gumbel.f32, args);
  if (args.sound<double>()) return forward_of(kernels.gumbel.f64, args);
  return py::none();
}

// Gradients of theta and, where it is wanted, of cost; None where an array is not dense.
template <typename T>
py::object backward_of(const GumbelFunctions<T>& functions, const GumbelArgs& args,
                       const TensorArg& soft, const TensorArg& log_prob, const TensorArg& cost,
                       bool wants_cost) {
  const auto in = args.inputs<T>();
  if (!(soft.none() || soft.is<T>({in.draws, in.layers, in.options})) ||
      !(log_prob.none() || log_prob.is<T>({in.draws, in.layers})) ||
      !(cost.none() || cost.is<T>({in.draws}))) {
    return py::none();
  }
  const NewTensor<T> theta_out({in.layers, in.options});
  std::optional<NewTensor<T>> cost_out;
  if (wants_cost) cost_out.emplace(std::initializer_list<int64_t>{in.layers, in.options});
  {
    const LongWork work(in.draws * in.layers * in.options);
    functions.backward(in, {soft.data<T>(), log_prob.data<T>(), cost.data<T>(), theta_out.data,
                            cost_out ? cost_out->data : nullptr});
  }
  return py::make_tuple(theta_out.tensor, cost_out ? cost_out->tensor : py::none());
}

py::object gumbel_backward(const Kernels& kernels, const TensorArg& theta, const TensorArg& mask,
                           const TensorArg& cost, double tau, int64_t seed, int64_t step,
                           int64_t draws, const TensorArg& soft_grad,
                           const TensorArg& log_prob_grad, const TensorArg& cost_grad,
                           bool wants_cost) {
  const GumbelArgs args{theta, mask, cost, tau, seed, step, draws};
  const auto run = [&](const auto& functions) {
    return backward_of(functions, args, soft_grad, log_prob_grad, cost_grad, wants_cost);
  };
  if (args.sound<float>()) return run(kernels.gumbel.f32);
  if (args.sound<double>()) return run(kernels.gumbel.f64);
  return py::none();
}

void bind_gumbel(py::class_<Kernels>& kernels) {
  FastMethod<gumbel_forward>::add(kernels, "gumbel_forward");
  FastMethod<gumbel_backward>::add(kernels, "gumbel_backward");
}

void sample_paths(const Kernels& kernels, int64_t paths, int64_t layers, int64_t cuts,
                  uintptr_t threshold, uint64_t seed, uint64_t step, uintptr_t out) {
  const LongWork work(paths * layers);
  kernels.paths.sample({paths, layers, cuts, at<int64_t>(threshold), seed, step}, at<uint8_t>(out));
}

void fair_paths(const Kernels& kernels, int64_t rounds, int64_t layers, int64_t most,
                uintptr_t options, uint64_t seed, uint64_t step, uintptr_t out) {
  const LongWork work(rounds * most * layers);
  std::vector<uint32_t> scratch(static_cast<size_t>(fair_scratch(most)));
  kernels.paths.fair({rounds, layers, most, at<int64_t>(options), seed, step, scratch.data()},
                     at<uint8_t>(out));
}

void bind_paths(py::class_<Kernels>& kernels) {
  kernels.def("sample_paths", sample_paths).def("fair_paths", fair_paths);
}

py::list usable_names() {
  py::list names;
  for (const Isa isa : usable_isas()) names.append(name_of(isa));
  return names;
}

}  // namespace
}  // namespace pynas

PYBIND11_MODULE(_C, module) {
  module.doc() = "Kernels of pynas. Use them through pynas.kernels.";
  module.attr("COMPILER") = PYNAS_COMPILER;
  module.attr("BUILT_ISAS") = PYNAS_BUILT_ISAS;
  module.attr("MOST_OPTIONS") = pynas::kMostOptions;
  module.def("usable_isas", pynas::usable_names,
             "Instruction sets built in that this CPU runs, slowest first.");
  module.def("connect", pynas::connect, "Must be called before any kernel that takes tensors.",
             py::arg("torch"), py::arg("exchange_api"));
  py::class_<pynas::Kernels> kernels(module, "Kernels",
                                     "All kernels, compiled for one instruction set.");
  kernels.def(py::init<const std::string&>(), py::arg("isa") = "");
  kernels.def_property_readonly("isa",
                                [](const pynas::Kernels& k) { return pynas::name_of(k.isa); });
  pynas::bind_elementwise(kernels);
  pynas::bind_gumbel(kernels);
  pynas::bind_paths(kernels);
  pynas::bind_mbconv(kernels);
  pynas::bind_mbconv_infer(kernels);
  pynas::bind_edge(kernels);
  pynas::bind_patches(kernels);
  module.def("scratch_bytes", pynas::scratch_bytes, "Memory that kernels keep for this thread.");
  module.def("release_scratch", pynas::release_scratch, "Gives that memory back.");
}
