// The Python module pynas._C, and the only file that knows pybind11.
//
// Tensors come as addresses (Tensor.data_ptr()) and sizes, so that no torch is needed to build and
// a call costs less than a microsecond. The callers in pynas/kernels own the arrays and have
// checked shapes, dtypes, devices and strides.
#include <pybind11/pybind11.h>

#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "cpu/elementwise.h"
#include "cpu/gumbel.h"
#include "cpu/paths.h"
#include "isa.h"

namespace py = pybind11;

namespace pynas {
namespace {

// All kernels of one instruction set.
struct Kernels {
  explicit Kernels(const std::string& name) : isa(isa_named(name)) {}

  Isa isa;
  const ElementwiseTable& elementwise = PYNAS_TABLE(isa, elementwise);
  const GumbelTable& gumbel = PYNAS_TABLE(isa, gumbel);
  const PathTable& paths = PYNAS_TABLE(isa, paths);
};

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Lets other Python threads run, where the work outweighs the switch.
class LongWork {
 public:
  explicit LongWork(int64_t elements) {
    if (elements > 10000) release_.emplace();
  }

 private:
  std::optional<py::gil_scoped_release> release_;
};

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

void read(PyObject* from, int64_t& to) { to = PyLong_AsLongLong(from); }
void read(PyObject* from, uint64_t& to) { to = PyLong_AsUnsignedLongLong(from); }
void read(PyObject* from, double& to) { to = PyFloat_AsDouble(from); }

// A method of Kernels whose arguments are numbers, read without pybind11: it takes longer over a
// dozen of them than a kernel of one step takes to run.
template <auto Function>
struct FastMethod;

template <typename Result, typename... Args, Result (*Function)(const Kernels&, Args...)>
struct FastMethod<Function> {
  // `name` must outlive the class.
  static void add(py::class_<Kernels>& kernels, const char* name) {
    static PyMethodDef definition;
    definition = {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call)),
                  METH_FASTCALL, nullptr};
    auto* type = reinterpret_cast<PyTypeObject*>(kernels.ptr());
    py::setattr(kernels, name,
                py::reinterpret_steal<py::object>(PyDescr_NewMethod(type, &definition)));
  }

 private:
  static PyObject* call(PyObject* self, PyObject* const* args, Py_ssize_t count) {
    constexpr auto kCount = static_cast<Py_ssize_t>(sizeof...(Args));
    if (count != kCount) {
      return PyErr_Format(PyExc_TypeError, "takes %zd arguments, got %zd", kCount, count);
    }
    std::tuple<Args...> numbers;
    std::apply([&](auto&... number) { (read(*args++, number), ...); }, numbers);
    if (PyErr_Occurred()) return nullptr;
    const auto& kernels = py::cast<const Kernels&>(py::handle(self));
    const auto run = [&](auto... number) { return Function(kernels, number...); };
    if constexpr (std::is_void_v<Result>) {
      std::apply(run, numbers);
      Py_RETURN_NONE;
    } else {
      return PyBool_FromLong(std::apply(run, numbers));
    }
  }
};

// Arguments in the order of pynas/kernels/gumbel.py. A zero address stands for an absent array.
template <typename T, GumbelFunctions<T> GumbelTable::* Functions>
bool gumbel_forward(const Kernels& kernels, int64_t draws, int64_t layers, int64_t options,
                    uintptr_t theta, uintptr_t mask, uintptr_t cost, double tau, uint64_t seed,
                    uint64_t step, uintptr_t soft, uintptr_t index, uintptr_t log_prob,
                    uintptr_t expected_cost) {
  const LongWork work(draws * layers * options);
  return (kernels.gumbel.*Functions)
      .forward(
          {draws, layers, options, at<T>(theta), at<uint8_t>(mask), at<T>(cost), tau, seed, step},
          {at<T>(soft), at<int64_t>(index), at<T>(log_prob), at<T>(expected_cost)});
}

template <typename T, GumbelFunctions<T> GumbelTable::* Functions>
void gumbel_backward(const Kernels& kernels, int64_t draws, int64_t layers, int64_t options,
                     uintptr_t theta, uintptr_t mask, uintptr_t cost, double tau, uint64_t seed,
                     uint64_t step, uintptr_t soft_grad, uintptr_t log_prob_grad,
                     uintptr_t cost_grad, uintptr_t theta_out, uintptr_t cost_out) {
  const LongWork work(draws * layers * options);
  (kernels.gumbel.*Functions)
      .backward(
          {draws, layers, options, at<T>(theta), at<uint8_t>(mask), at<T>(cost), tau, seed, step},
          {at<T>(soft_grad), at<T>(log_prob_grad), at<T>(cost_grad), at<T>(theta_out),
           at<T>(cost_out)});
}

void bind_gumbel(py::class_<Kernels>& kernels) {
  FastMethod<gumbel_forward<float, &GumbelTable::f32>>::add(kernels, "gumbel_forward_f32");
  FastMethod<gumbel_forward<double, &GumbelTable::f64>>::add(kernels, "gumbel_forward_f64");
  FastMethod<gumbel_backward<float, &GumbelTable::f32>>::add(kernels, "gumbel_backward_f32");
  FastMethod<gumbel_backward<double, &GumbelTable::f64>>::add(kernels, "gumbel_backward_f64");
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
  module.attr("CUDA") = false;
  module.attr("MOST_OPTIONS") = pynas::kMostOptions;
  module.def("usable_isas", pynas::usable_names,
             "Instruction sets built in that this CPU runs, slowest first.");
  py::class_<pynas::Kernels> kernels(module, "Kernels",
                                     "All kernels, compiled for one instruction set.");
  kernels.def(py::init<const std::string&>(), py::arg("isa") = "");
  kernels.def_property_readonly("isa",
                                [](const pynas::Kernels& k) { return pynas::name_of(k.isa); });
  pynas::bind_elementwise(kernels);
  pynas::bind_gumbel(kernels);
  pynas::bind_paths(kernels);
}
