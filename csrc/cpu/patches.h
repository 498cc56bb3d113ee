// Mean and covariance of the 3x3 patches of a batch of images, zeros around them; and back.
//
// Every convolution of 3x3 and stride 1 has its outputs' mean and variance from these, so branches
// that are such convolutions are normalised exactly without being computed.
//
// What makes it fast: the covariance of two places in a patch is the image's product with itself,
// moved by their difference, of which there are 25 and, by symmetry, 13. Where a patch reaches
// beyond the image, its border rows, columns and corners are taken off. The way back is one
// convolution of 5x5.
//
// Tensors are dense with channels last; a patch is [place][channel], places row by row. Results
// depend neither on the number of threads nor on their timing.
#pragma once

#include "mbconv.h"

namespace pynas {

constexpr int64_t kPlaces = 9;  // of a patch
constexpr int64_t kMoves = 25;  // from a place to another

struct PatchShape {
  int64_t images, height, width, channels;
};

template <typename T>
struct PatchForward {
  PatchShape shape;
  const T* x;
  T* mean;        // [places, channels]
  T* covariance;  // [places, channels, places, channels], biased
  T* image;       // [height, width, channels]: mean of the images
};

// From gradients of what forward gives to that of x.
template <typename T>
struct PatchBackward {
  PatchShape shape;
  const T *x, *mean;
  const T *mean_gradient, *covariance_gradient, *image_gradient;
  T* x_gradient;
};

template <typename T>
struct PatchFunctions {
  void (*forward)(const PatchForward<T>&, const Workers&);
  void (*backward)(const PatchBackward<T>&, const Workers&);
};

struct PatchTable {
  PatchFunctions<float> f32;
  PatchFunctions<double> f64;
};

PYNAS_DECLARE_TABLE(PatchTable, patches)

}  // namespace pynas
