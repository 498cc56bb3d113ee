// Reads and makes torch's tensors without torch's headers, through DLPack.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <type_traits>
#include <utility>

#include "dlpack.h"

namespace pynas {

// Must be called before any other function here.
//
// torch: the module.
// exchange_api: torch.Tensor.__dlpack_c_exchange_api__; None, for a torch older than 2.10, goes
// through Python's half of the protocol, which takes microseconds per tensor.
void connect(const pybind11::module_& torch, const pybind11::object& exchange_api);

template <typename T>
constexpr dlpack::DataType dtype_of() {
  constexpr uint8_t code = std::is_same_v<T, bool>       ? dlpack::kBool
                           : std::is_floating_point_v<T> ? dlpack::kFloat
                                                         : dlpack::kInt;
  return {code, 8 * sizeof(T), 1};
}

// A tensor that Python passed, or None. Valid as long as the caller's reference.
class TensorArg {
 public:
  // Returns false with a Python exception set where `from` is neither a tensor with memory nor
  // None.
  bool read(PyObject* from);

  bool none() const { return none_; }

  // Whether it has this data type, shape and dense memory on the CPU.
  template <typename T>
  bool is(std::initializer_list<int64_t> shape) const {
    return is(dtype_of<T>(), shape);
  }

  // The same with channels last in memory, for a shape (images, channels, height, width).
  template <typename T>
  bool is_channels_last(std::initializer_list<int64_t> shape) const {
    return is(dtype_of<T>(), shape, true);
  }

  // Whether its number of dimensions is this and its data type that of T.
  template <typename T>
  bool has(int32_t dimensions) const {
    return !none_ && view_.ndim == dimensions && same(view_.dtype, dtype_of<T>());
  }

  int64_t size(int dimension) const { return view_.shape[dimension]; }

  // The elements; null where Python passed None.
  template <typename T>
  T* data() const {
    return reinterpret_cast<T*>(static_cast<char*>(view_.data) + view_.byte_offset);
  }

 private:
  static bool same(dlpack::DataType a, dlpack::DataType b) {
    return a.code == b.code && a.bits == b.bits && a.lanes == b.lanes;
  }
  bool is(dlpack::DataType dtype, std::initializer_list<int64_t> shape,
          bool channels_last = false) const;

  dlpack::Tensor view_{};
  bool none_ = true;
  pybind11::object owner_;  // of what view_ points to, where it is not the tensor itself
};

struct NewMemory {
  pybind11::object tensor;
  void* data;
};

NewMemory new_tensor(dlpack::DataType dtype, std::initializer_list<int64_t> shape,
                     bool channels_last = false);

// A new dense tensor on the CPU, and its elements, which are not initialised.
template <typename T>
struct NewTensor {
  // channels_last: in memory, for a shape (images, channels, height, width).
  explicit NewTensor(std::initializer_list<int64_t> shape, bool channels_last = false)
      : NewTensor(new_tensor(dtype_of<T>(), shape, channels_last)) {}
  explicit NewTensor(NewMemory&& from)
      : tensor(std::move(from.tensor)), data(static_cast<T*>(from.data)) {}

  pybind11::object tensor;
  T* data;
};

}  // namespace pynas
