// Python's side of csrc/cpu/mbconv_infer.h: reads and checks tensors, makes the results.
#include <pybind11/pybind11.h>

#include <cstring>
#include <initializer_list>
#include <vector>

#include "fast_method.h"
#include "kernels.h"
#include "workers.h"

namespace py = pybind11;

namespace pynas {
namespace {

using Numbers = std::vector<int64_t>;

// numbers: in, hidden and out channels, kernel, stride, groups, activation; of what is packed, also
// the parts that inputs and outputs are cut into. False where they make no sense.
bool read_shape(const Numbers& numbers, size_t wanted, MbInferShape& shape) {
  if (numbers.size() != wanted) return false;
  const auto& n = numbers;
  const auto divides = [&](int64_t parts) {
    return n[0] % parts + n[1] % parts + n[2] % parts == 0;
  };
  if (n[0] < 1 || n[1] < 1 || n[2] < 1 || (n[3] != 3 && n[3] != 5 && n[3] != 7) ||
      (n[4] != 1 && n[4] != 2) || n[5] < 1 || !divides(n[5]) || n[6] < 0 || n[6] > 3) {
    return false;
  }
  shape = {n[0], n[1], n[2], n[3], n[4], n[5], static_cast<Activation>(n[6]), 1, 1};
  if (wanted == 7) return true;
  shape.in_parts = n[7];
  shape.out_parts = n[8];
  const auto known = [&](int64_t parts) { return parts == 1 || parts == n[5]; };
  return known(n[7]) && known(n[8]);
}

template <typename T>
bool sound_weights(const MbInferShape& s, const std::vector<TensorArg>& w) {
  return w.size() == 6 && w[0].is<T>({s.hidden, s.in_channels / s.groups, 1, 1}) &&
         w[1].is<T>({s.hidden}) && w[2].is<T>({s.hidden, 1, s.kernel, s.kernel}) &&
         w[3].is<T>({s.hidden}) && w[4].is<T>({s.out_channels, s.hidden / s.groups, 1, 1}) &&
         w[5].is<T>({s.out_channels});
}

template <typename T>
py::object pack_of(const MbInferFunctions<T>& functions, const MbInferShape& shape,
                   const std::vector<TensorArg>& w) {
  const MbInferShape cut = functions.cut(shape);
  const NewTensor<T> packed({functions.packed_elements(cut)});
  functions.pack(cut,
                 {w[0].data<T>(), w[1].data<T>(), w[2].data<T>(), w[3].data<T>(), w[4].data<T>(),
                  w[5].data<T>()},
                 packed.data);
  return py::make_tuple(packed.tensor, cut.in_parts, cut.out_parts);
}

// Weights for mbconv_infer, and into how many parts its inputs and outputs are cut.
py::object mbconv_infer_pack(const Kernels& kernels, const Numbers& numbers,
                             const std::vector<TensorArg>& weights) {
  MbInferShape shape;
  if (!read_shape(numbers, 7, shape)) return py::none();
  if (sound_weights<float>(shape, weights)) {
    return pack_of(kernels.mbconv_infer.f32, shape, weights);
  }
  if (sound_weights<double>(shape, weights)) {
    return pack_of(kernels.mbconv_infer.f64, shape, weights);
  }
  return py::none();
}

// Images as (images, height, width, channels), or as torch has them with channels last in memory.
enum class Order { kAsStored, kTorch };

template <typename T>
py::object infer_of(const MbInferFunctions<T>& functions, const MbInferShape& s, const TensorArg& x,
                    Order order, const TensorArg& packed, bool adds_input, int64_t threads) {
  const bool as_torch = order == Order::kTorch;
  const int64_t images = x.size(0), height = x.size(as_torch ? 2 : 1);
  const int64_t width = x.size(as_torch ? 3 : 2);
  const int64_t out_height = (height + s.stride - 1) / s.stride;
  const int64_t out_width = (width + s.stride - 1) / s.stride;
  const bool fits = as_torch ? x.is_channels_last<T>({images, s.in_channels, height, width})
                             : x.is<T>({images, height, width, s.in_channels});
  if (!fits || !packed.is<T>({functions.packed_elements(s)}) ||
      (adds_input && (s.stride != 1 || s.in_channels != s.out_channels))) {
    return py::none();
  }
  const NewTensor<T> y = as_torch
                             ? NewTensor<T>({images, s.out_channels, out_height, out_width}, true)
                             : NewTensor<T>({images, out_height, out_width, s.out_channels});
  bool done = true;
  if (images * height * width > 0) {
    const LongWork work(images * height * width * s.hidden);
    const CallWorkers workers(threads);
    done =
        functions.run({s, images, height, width, adds_input, packed.data<T>(), x.data<T>(), y.data},
                      workers.get());
  }
  return done ? y.tensor : py::bool_(false);
}

py::object infer_any(const Kernels& kernels, const TensorArg& x, Order order,
                     const Numbers& numbers, const TensorArg& packed, bool adds_input,
                     int64_t threads) {
  MbInferShape shape;
  if (!read_shape(numbers, 9, shape)) return py::none();
  const MbInferTable& table = kernels.mbconv_infer;
  if (x.has<float>(4)) return infer_of(table.f32, shape, x, order, packed, adds_input, threads);
  if (x.has<double>(4)) return infer_of(table.f64, shape, x, order, packed, adds_input, threads);
  return py::none();
}

// None: the arguments do not fit. False: zeros between groups have met infinities or NaN.
py::object mbconv_infer(const Kernels& kernels, const TensorArg& x, const Numbers& numbers,
                        const TensorArg& packed, bool adds_input, int64_t threads) {
  return infer_any(kernels, x, Order::kAsStored, numbers, packed, adds_input, threads);
}

// Mixes a tensor's address and some of its elements into `stamp`.
template <typename T, typename Bits>
bool mix(const TensorArg& tensor, std::initializer_list<int64_t> shape, uint64_t& stamp) {
  if (!tensor.is<T>(shape)) return false;
  constexpr int64_t kSamples = 3;  // each may be a cache miss
  int64_t elements = 1;
  for (const int64_t size : shape) elements *= size;
  const T* data = tensor.data<T>();
  const auto add = [&](uint64_t value) {
    stamp = (stamp ^ value) * 0x9E3779B97F4A7C15u;
    stamp ^= stamp >> 29;
  };
  add(static_cast<uint64_t>(reinterpret_cast<uintptr_t>(data)));
  for (int64_t i = 0; i < kSamples && elements > 0; ++i) {
    Bits bits;
    std::memcpy(&bits, data + i * (elements - 1) / (kSamples - 1), sizeof bits);
    add(bits);
  }
  return true;
}

template <typename T, typename Bits>
bool mix_weights(const TensorArg& t, uint64_t& stamp) {
  if (t.has<T>(1)) return mix<T, Bits>(t, {t.size(0)}, stamp);
  return t.has<T>(4) && mix<T, Bits>(t, {t.size(0), t.size(1), t.size(2), t.size(3)}, stamp);
}

// Mixes how often torch has written to a tensor. False where it does not count that: made in
// inference mode.
bool mix_version(PyObject* tensor, uint64_t& stamp) {
  static PyObject* const name = PyUnicode_InternFromString("_version");
  const auto version = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor, name));
  if (!version) {
    PyErr_Clear();
    return false;
  }
  stamp = stamp * 31 + static_cast<uint64_t>(PyLong_AsLongLong(version.ptr()));
  return true;
}

// A number that changes when weights do: what torch writes in place, and, because optimisers that
// fuse their step and writes to Tensor.data count as no versions, some elements of each, of which
// training moves all. False where it cannot be told.
bool stamp_of(const py::handle& tensors, uint64_t& stamp) {
  stamp = 0;
  if (!PyTuple_Check(tensors.ptr())) return false;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tensors.ptr()); ++i) {
    PyObject* tensor = PyTuple_GET_ITEM(tensors.ptr(), i);
    TensorArg t;
    if (!t.read(tensor)) throw py::error_already_set();
    if (t.none() || !mix_version(tensor, stamp)) return false;
    if (!mix_weights<float, uint32_t>(t, stamp) && !mix_weights<double, uint64_t>(t, stamp) &&
        !mix<int64_t, uint64_t>(t, {}, stamp)) {
      return false;
    }
  }
  stamp >>= 1;  // fits a signed number
  return true;
}

// None where a tensor is not dense or has no version.
py::object mbconv_infer_stamp(const Kernels&, const py::handle& tensors) {
  uint64_t stamp;
  if (!stamp_of(tensors, stamp)) return py::none();
  return py::int_(stamp);
}

// Whether dictionaries[i][keys[i]] is things[i], for all i.
bool all_are(const py::handle& dictionaries, const py::handle& keys, const py::handle& things) {
  PyObject *d = dictionaries.ptr(), *k = keys.ptr(), *t = things.ptr();
  if (!PyTuple_Check(d) || !PyTuple_Check(k) || !PyTuple_Check(t)) return false;
  const Py_ssize_t count = PyTuple_GET_SIZE(d);
  if (PyTuple_GET_SIZE(k) != count || PyTuple_GET_SIZE(t) != count) return false;
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* holder = PyTuple_GET_ITEM(d, i);
    if (!PyDict_Check(holder) ||
        PyDict_GetItemWithError(holder, PyTuple_GET_ITEM(k, i)) != PyTuple_GET_ITEM(t, i)) {
      return false;
    }
  }
  return true;
}

// mbconv_infer for x in torch's order, if what was packed still stands: dictionaries, keys and
// things, see all_are, and the stamp of the tensors among them. None where it does not.
py::object mbconv_infer_prepared(const Kernels& kernels, const TensorArg& x,
                                 const py::handle& dictionaries, const py::handle& keys,
                                 const py::handle& things, const py::handle& tensors,
                                 int64_t stamped, const Numbers& numbers, const TensorArg& packed,
                                 bool adds_input, int64_t threads) {
  uint64_t stamp;
  if (!all_are(dictionaries, keys, things) || !stamp_of(tensors, stamp) ||
      stamp != static_cast<uint64_t>(stamped)) {
    return py::none();
  }
  return infer_any(kernels, x, Order::kTorch, numbers, packed, adds_input, threads);
}

}  // namespace

void bind_mbconv_infer(py::class_<Kernels>& kernels) {
  FastMethod<mbconv_infer_pack>::add(kernels, "mbconv_infer_pack");
  FastMethod<mbconv_infer>::add(kernels, "mbconv_infer");
  FastMethod<mbconv_infer_stamp>::add(kernels, "mbconv_infer_stamp");
  FastMethod<mbconv_infer_prepared>::add(kernels, "mbconv_infer_prepared");
}

}  // namespace pynas
