// Inverted-bottleneck blocks, one or all those of a choice layer, in training: forward and
// backward.
//
// A block is 1x1 convolution - batch norm - activation - channel shuffle - depthwise convolution -
// batch norm - activation - 1x1 convolution - batch norm, plus its input where shapes agree. The
// layer's output is the sum of its blocks', each times its gate; the gate of an identity may join.
//
// What makes it fast:
// - Statistics of the first batch norm follow from mean and covariance of the layer's input, which
//   all blocks share; so its convolution, norm and activation are one product. Where there are few
//   positions for the channels they are summed up from that product, which is then cheaper.
// - Batch norm needs no other channels: a group of hidden channels goes through all images before
//   the next one, in bands of rows and slices of channels, and what is between lives in the caches.
// - What a depthwise convolution gives is used while it is in registers.
// - For backward only the input and the blocks' last products are kept. The rest is computed again.
// - A channel shuffle is another order of the rows of the first convolution.
//
// Tensors are dense with channels last. Results depend neither on the number of threads nor on
// their timing: images are dealt into shares by the shape alone, and shares are summed in order.
#pragma once

#include <cstdint>

#include "tables.h"

namespace pynas {

enum class Activation : int64_t { kNone, kRelu, kRelu6, kHardswish };

// Threads and memory, which code of one instruction set does not make itself.
struct Workers {
  int64_t count;  // of threads
  void* self;
  // Memory for this call, aligned to 64 bytes, not initialised.
  void* (*take)(void* self, int64_t bytes);
  // Calls task(context, i, worker) for all i below `tasks`, and waits; worker is below `count`.
  void (*run)(void* self, int64_t tasks, void (*task)(void*, int64_t, int64_t), void* context);
};

struct MbShape {
  int64_t images, height, width, in_channels, out_channels, stride, options;
  Activation activation;
  double eps;
};

template <typename T>
struct MbNorm {
  const T *scale, *shift;
};

// One block. Weights are dense in torch's order.
template <typename T>
struct MbOption {
  int64_t kernel, hidden, groups;
  int64_t gate;  // its column of the gates
  bool trained;  // or its output is a constant for everything but its gate
  const T* expand;
  MbNorm<T> norm1;
  const T* depthwise;
  MbNorm<T> norm2;
  const T* project;
  MbNorm<T> norm3;
};

// Where each gate lies, or one where `values` is null.
template <typename T>
struct MbGates {
  const T* values;
  int64_t image_step;  // 0: one draw for the whole batch
  int64_t count;       // options of the choice, run or not
  int64_t identity;    // column of the identity; negative: none runs
};

// What forward keeps for backward. Mean and covariance are zero where the first norms' statistics
// did not follow from them.
template <typename T>
struct MbSaved {
  T* mean;        // [in_channels] of the input
  T* covariance;  // [in_channels, padded in_channels]
  T* products;    // [options, positions, padded out_channels], before the last batch norm
  // Of each option: mean and biased variance of the first norm, [hidden] each in depthwise order,
  // those of the second, and those of the third, [out_channels] each.
  T* statistics;
};

template <typename T>
struct MbForward {
  MbShape shape;
  const MbOption<T>* options;
  const T* x;
  MbGates<T> gates;
  T* y;
  MbSaved<T> saved;
};

// Gradients of an option's tensors, as they lie in MbOption.
template <typename T>
struct MbGradients {
  T *expand, *scale1, *shift1, *depthwise, *scale2, *shift2, *project, *scale3, *shift3;
};

template <typename T>
struct MbBackward {
  MbShape shape;
  const MbOption<T>* options;
  const T* x;
  MbGates<T> gates;
  const T* y_gradient;
  MbSaved<T> saved;
  T* x_gradient;                    // or null
  T* gates_gradient;                // [count], or [images, count]; or null
  const MbGradients<T>* gradients;  // of each option; null: not wanted
};

template <typename T>
struct MbFunctions {
  void (*forward)(const MbForward<T>&, const Workers&);
  void (*backward)(const MbBackward<T>&, const Workers&);
};

struct MbTable {
  MbFunctions<float> f32;
  MbFunctions<double> f64;
  int64_t lanes32, lanes64;  // channels of saved arrays are padded to these
};

PYNAS_DECLARE_TABLE(MbTable, mbconv)
#ifdef PYNAS_X86
// AVX-512's registers in vectors of 32 bytes: 24 channels then need no padding.
namespace avx512_narrow {
extern const MbTable mbconv;
}
#endif

}  // namespace pynas
