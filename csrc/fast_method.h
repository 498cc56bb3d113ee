// Methods of a bound class that take their arguments without pybind11, which takes longer over a
// dozen of them than a kernel of one step takes to run.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <exception>
#include <new>
#include <tuple>
#include <type_traits>
#include <vector>

#include "tensors.h"

namespace pynas {

// Readers return false with a Python exception set where the type is wrong.

// A number that does not fit is read as -1, which no size, seed or count is.
inline bool read(PyObject* from, int64_t& to) {
  int overflow;
  to = PyLong_AsLongLongAndOverflow(from, &overflow);
  return to != -1 || overflow || !PyErr_Occurred();
}

inline bool read(PyObject* from, double& to) {
  to = PyFloat_AsDouble(from);
  return to != -1.0 || !PyErr_Occurred();
}

inline bool read(PyObject* from, bool& to) {
  const int truth = PyObject_IsTrue(from);
  to = truth == 1;
  return truth >= 0;
}

inline bool read(PyObject* from, TensorArg& to) { return to.read(from); }

// Anything, as it is.
inline bool read(PyObject* from, pybind11::handle& to) {
  to = from;
  return true;
}

// Of a tuple. A vector with no elements stands for None.
template <typename T>
bool read(PyObject* from, std::vector<T>& to) {
  if (from == Py_None) return true;
  if (!PyTuple_Check(from)) {
    PyErr_Format(PyExc_TypeError, "expected a tuple, got %s", Py_TYPE(from)->tp_name);
    return false;
  }
  to.resize(static_cast<size_t>(PyTuple_GET_SIZE(from)));
  for (size_t i = 0; i < to.size(); ++i) {
    if (!read(PyTuple_GET_ITEM(from, static_cast<Py_ssize_t>(i)), to[i])) return false;
  }
  return true;
}

// Makes a method of `Function`, whose first argument is the object. It holds the interpreter's
// lock.
template <auto Function>
struct FastMethod;

template <typename Self, typename... Args, pybind11::object (*Function)(const Self&, Args...)>
struct FastMethod<Function> {
  // `name` must outlive the class.
  static void add(pybind11::class_<Self>& self, const char* name) {
    static PyMethodDef definition;
    definition = {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call)),
                  METH_FASTCALL, nullptr};
    auto* type = reinterpret_cast<PyTypeObject*>(self.ptr());
    pybind11::setattr(
        self, name,
        pybind11::reinterpret_steal<pybind11::object>(PyDescr_NewMethod(type, &definition)));
  }

 private:
  static PyObject* call(PyObject* self, PyObject* const* args, Py_ssize_t count) {
    constexpr auto kCount = static_cast<Py_ssize_t>(sizeof...(Args));
    if (count != kCount) {
      return PyErr_Format(PyExc_TypeError, "takes %zd arguments, got %zd", kCount, count);
    }
    try {
      std::tuple<std::decay_t<Args>...> values;
      const bool good =
          std::apply([&](auto&... value) { return (read(*args++, value) && ...); }, values);
      if (!good) return nullptr;
      const auto& object = pybind11::cast<const Self&>(pybind11::handle(self));
      return std::apply([&](const auto&... value) { return Function(object, value...); }, values)
          .release()
          .ptr();
    } catch (pybind11::error_already_set& error) {
      error.restore();
    } catch (const std::bad_alloc&) {
      PyErr_SetString(PyExc_MemoryError, "There is not enough memory for the results.");
    } catch (const std::exception& error) {
      PyErr_SetString(PyExc_RuntimeError, error.what());
    }
    return nullptr;
  }
};

}  // namespace pynas
