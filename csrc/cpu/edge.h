// An edge of a cell in training, all its options at once: forward and backward.
//
// The input goes through convolutions, pools and the identity; the output is the sum of what they
// give, each times its gate. A convolution has one stage or two, each of them ReLU - depthwise
// convolution - 1x1 convolution - batch norm; a pool is followed by a batch norm.
//
// What makes it fast:
// - An image at a time goes through everything between two norms, so that it stays in the caches.
// - Of each stage only what its norm reads is kept for backward. The rest is computed again.
// - What reads the input shares its ReLU, its border and the sum of its gradients.
// - Every second position of the input, taken once, turns dilated convolutions of stride 2 into
//   plain ones.
//
// Tensors are dense with channels last. Results depend neither on the number of threads nor on
// their timing, as those of mbconv.h.
#pragma once

#include "mbconv.h"

namespace pynas {

struct EdgeShape {
  int64_t images, height, width, channels, stride;
  double eps;
};

// Scale and shift of norms are null where they have none.
template <typename T>
struct EdgeStage {
  const T *depthwise, *pointwise;
  MbNorm<T> norm;
};

template <typename T>
struct EdgeConv {
  int64_t kernel, dilation;  // the dilation is the first stage's
  int64_t stages;
  int64_t gate;  // its place among the gates
  EdgeStage<T> stage[2];
};

template <typename T>
struct EdgePool {
  bool maximum;  // of a window of 3x3; or the average of what of it lies inside the image
  int64_t gate;
  MbNorm<T> norm;
};

template <typename T>
struct EdgeOptions {
  const EdgeConv<T>* convs;
  const EdgePool<T>* pools;
  int64_t conv_count, pool_count;
  int64_t identity;  // place of its gate; negative: it does not run
  const T* gates;    // null: all are one
};

// What forward keeps for backward: of every stage of every convolution, then of every pool, what
// its norm reads, and mean and biased variance of that.
template <typename T>
struct EdgeSaved {
  T* read;        // [norms, images, vectors, positions, lanes]
  T* statistics;  // [norms, 2, channels]
};

template <typename T>
struct EdgeForward {
  EdgeShape shape;
  EdgeOptions<T> options;
  const T* x;
  T* y;
  EdgeSaved<T> saved;
};

// Of what stands before a norm, and of the norm; those that are not there are null.
template <typename T>
struct EdgeGradients {
  T *depthwise, *pointwise, *scale, *shift;
};

template <typename T>
struct EdgeBackward {
  EdgeShape shape;
  EdgeOptions<T> options;
  const T* x;
  const T* y_gradient;
  EdgeSaved<T> saved;
  T* x_gradient;                      // or null
  T* gates_gradient;                  // [count] or null; only those of running options are written
  const EdgeGradients<T>* gradients;  // of each norm, as in EdgeSaved; null: not wanted
};

template <typename T>
struct EdgeFunctions {
  void (*forward)(const EdgeForward<T>&, const Workers&);
  void (*backward)(const EdgeBackward<T>&, const Workers&);
};

struct EdgeTable {
  EdgeFunctions<float> f32;
  EdgeFunctions<double> f64;
  int64_t lanes32, lanes64;  // channels of what is saved are padded to these
};

PYNAS_DECLARE_TABLE(EdgeTable, edge)

}  // namespace pynas
