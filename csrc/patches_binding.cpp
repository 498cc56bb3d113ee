// Python's side of csrc/cpu/patches.h: reads and checks tensors, makes the results.
#include <pybind11/pybind11.h>

#include "fast_method.h"
#include "kernels.h"
#include "workers.h"

namespace py = pybind11;

namespace pynas {
namespace {

template <typename T>
bool sound(const TensorArg& x) {
  return x.has<T>(4) && x.size(0) * x.size(1) * x.size(2) > 0 && x.size(3) > 0 &&
         x.is<T>({x.size(0), x.size(1), x.size(2), x.size(3)});
}

PatchShape shape_of(const TensorArg& x) { return {x.size(0), x.size(1), x.size(2), x.size(3)}; }

template <typename T>
py::object forward_of(const PatchFunctions<T>& functions, const TensorArg& x, int64_t threads) {
  const PatchShape s = shape_of(x);
  const int64_t wide = kPlaces * s.channels;
  const NewTensor<T> mean({wide}), covariance({wide, wide});
  const NewTensor<T> image({s.height, s.width, s.channels});
  {
    const LongWork work(s.images * s.height * s.width * s.channels);
    const CallWorkers workers(threads);
    functions.forward({s, x.data<T>(), mean.data, covariance.data, image.data}, workers.get());
  }
  return py::make_tuple(mean.tensor, covariance.tensor, image.tensor);
}

// x: [images, height, width, channels]. Mean, covariance and mean image; None where it cannot.
py::object patches_forward(const Kernels& kernels, const TensorArg& x, int64_t threads) {
  if (sound<float>(x)) return forward_of(kernels.patches.f32, x, threads);
  if (sound<double>(x)) return forward_of(kernels.patches.f64, x, threads);
  return py::none();
}

template <typename T>
py::object backward_of(const PatchFunctions<T>& functions, const TensorArg& x,
                       const TensorArg& mean, const TensorArg& of_mean,
                       const TensorArg& of_covariance, const TensorArg& of_image, int64_t threads) {
  const PatchShape s = shape_of(x);
  const int64_t wide = kPlaces * s.channels;
  if (!mean.is<T>({wide}) || !of_mean.is<T>({wide}) || !of_covariance.is<T>({wide, wide}) ||
      !of_image.is<T>({s.height, s.width, s.channels})) {
    return py::none();
  }
  const NewTensor<T> x_gradient({s.images, s.height, s.width, s.channels});
  {
    const LongWork work(s.images * s.height * s.width * s.channels);
    const CallWorkers workers(threads);
    functions.backward({s, x.data<T>(), mean.data<T>(), of_mean.data<T>(), of_covariance.data<T>(),
                        of_image.data<T>(), x_gradient.data},
                       workers.get());
  }
  return x_gradient.tensor;
}

// From x, the mean that forward gave, and the gradients of what it gave.
py::object patches_backward(const Kernels& kernels, const TensorArg& x, const TensorArg& mean,
                            const TensorArg& of_mean, const TensorArg& of_covariance,
                            const TensorArg& of_image, int64_t threads) {
  if (sound<float>(x)) {
    return backward_of(kernels.patches.f32, x, mean, of_mean, of_covariance, of_image, threads);
  }
  if (sound<double>(x)) {
    return backward_of(kernels.patches.f64, x, mean, of_mean, of_covariance, of_image, threads);
  }
  return py::none();
}

}  // namespace

void bind_patches(py::class_<Kernels>& kernels) {
  FastMethod<patches_forward>::add(kernels, "patches_forward");
  FastMethod<patches_backward>::add(kernels, "patches_backward");
}

}  // namespace pynas
