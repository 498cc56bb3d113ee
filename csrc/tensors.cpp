#include "tensors.h"

#include <sys/mman.h>

#include <cstdlib>
#include <new>
#include <stdexcept>
#include <string>

namespace py = pybind11;

namespace pynas {
namespace {

constexpr int kMostDimensions = 4;  // of a new tensor
constexpr size_t kAlignment = 64;   // as torch's own memory
constexpr size_t kLargePage = 2 << 20;

// Never freed: Python may be gone before the module's static objects are.
struct Torch {
  PyTypeObject* type = nullptr;
  py::handle module;
  const dlpack::ExchangeApi* api = nullptr;
} torch;

// A tensor's description and elements in one piece of memory.
struct alignas(kAlignment) Block {
  dlpack::VersionedTensor managed;
  int64_t shape[kMostDimensions], strides[kMostDimensions];

  static void free(dlpack::VersionedTensor* managed) { std::free(managed->context); }
};

// Dimensions from the one whose elements lie next to each other to the outermost.
constexpr int kInner[] = {1, 3, 2, 0};  // of channels last
int inner_to_outer(int i, int dimensions, bool channels_last) {
  return channels_last ? kInner[i] : dimensions - 1 - i;
}

Block* new_block(dlpack::DataType dtype, std::initializer_list<int64_t> shape, bool channels_last) {
  size_t bytes = dtype.bits / 8;
  for (const int64_t size : shape) bytes *= static_cast<size_t>(size);
  bytes = sizeof(Block) + (bytes + kAlignment - 1) / kAlignment * kAlignment;
  const bool large = bytes >= 2 * kLargePage;
  if (large) bytes = (bytes + kLargePage - 1) / kLargePage * kLargePage;
  auto* block = static_cast<Block*>(std::aligned_alloc(large ? kLargePage : kAlignment, bytes));
  if (!block) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  if (large) madvise(block, bytes, MADV_HUGEPAGE);  // a wish: first touches are then few
#endif
  const auto dimensions = static_cast<int32_t>(shape.size());
  block->managed = {
      {dlpack::kMajor, dlpack::kMinor},
      block,
      Block::free,
      0,
      {block + 1, {dlpack::kCpu, 0}, dimensions, dtype, block->shape, block->strides, 0}};
  int64_t stride = 1;
  for (int i = 0; i < dimensions; ++i) {
    const int at = inner_to_outer(i, dimensions, channels_last);
    block->shape[at] = shape.begin()[at];
    block->strides[at] = stride;
    stride *= block->shape[at];
  }
  return block;
}

// The same without the C functions.
NewMemory empty_of_torch(dlpack::DataType dtype, std::initializer_list<int64_t> shape,
                         bool channels_last) {
  py::list sizes;
  for (const int64_t size : shape) sizes.append(size);
  const std::string name =
      (dtype.code == dlpack::kFloat ? "float" : "int") + std::to_string(dtype.bits);
  py::object tensor = torch.module.attr("empty")(
      sizes, py::arg("dtype") = torch.module.attr(name.c_str()), py::arg("device") = "cpu",
      py::arg("memory_format") =
          torch.module.attr(channels_last ? "channels_last" : "contiguous_format"));
  return {tensor, reinterpret_cast<void*>(tensor.attr("data_ptr")().cast<uintptr_t>())};
}

bool dense(const dlpack::Tensor& view, bool channels_last) {
  if (!view.strides) return !channels_last;
  int64_t expected = 1;
  for (int i = 0; i < view.ndim; ++i) {
    const int at = inner_to_outer(i, view.ndim, channels_last);
    if (view.shape[at] != 1 && view.strides[at] != expected) return false;
    expected *= view.shape[at];
  }
  return true;
}

}  // namespace

void connect(const py::module_& module, const py::object& exchange_api) {
  torch.module = module.inc_ref();
  torch.type = reinterpret_cast<PyTypeObject*>(py::object(module.attr("Tensor")).release().ptr());
  torch.api = nullptr;
  if (exchange_api.is_none()) return;
  const auto* api = static_cast<const dlpack::ExchangeApi*>(
      PyCapsule_GetPointer(exchange_api.ptr(), "dlpack_exchange_api"));
  if (!api) throw py::error_already_set();
  if (api->version.major == dlpack::kMajor && api->view_of_python) torch.api = api;
}

bool TensorArg::read(PyObject* from) {
  none_ = from == Py_None;
  if (none_) return true;
  if (!torch.type || !PyObject_TypeCheck(from, torch.type)) {
    PyErr_Format(PyExc_TypeError, "expected a tensor, got %s", Py_TYPE(from)->tp_name);
    return false;
  }
  if (torch.api) return torch.api->view_of_python(from, &view_) == 0;
  try {
    const auto capsule = py::handle(from).attr("detach")().attr("__dlpack__")();
    owner_ = capsule;
    const auto* managed =
        static_cast<const dlpack::ManagedTensor*>(PyCapsule_GetPointer(owner_.ptr(), "dltensor"));
    if (managed) view_ = managed->tensor;
    return managed != nullptr;
  } catch (py::error_already_set& error) {
    error.restore();
    return false;
  }
}

bool TensorArg::is(dlpack::DataType dtype, std::initializer_list<int64_t> shape,
                   bool channels_last) const {
  if (none_ || !same(view_.dtype, dtype) || view_.device.type != dlpack::kCpu ||
      static_cast<size_t>(view_.ndim) != shape.size()) {
    return false;
  }
  bool empty = false;
  for (int i = 0; i < view_.ndim; ++i) {
    if (view_.shape[i] != shape.begin()[i]) return false;
    empty = empty || view_.shape[i] == 0;
  }
  return empty || (view_.data && dense(view_, channels_last));
}

NewMemory new_tensor(dlpack::DataType dtype, std::initializer_list<int64_t> shape,
                     bool channels_last) {
  if (shape.size() > kMostDimensions || (channels_last && shape.size() != 4)) {
    throw std::invalid_argument("a wrong number of dimensions");
  }
  if (!torch.api) return empty_of_torch(dtype, shape, channels_last);
  Block* block = new_block(dtype, shape, channels_last);
  void* tensor = nullptr;
  if (torch.api->to_python(&block->managed, &tensor) != 0) throw py::error_already_set();
  return {py::reinterpret_steal<py::object>(static_cast<PyObject*>(tensor)), block + 1};
}

}  // namespace pynas
