// One inverted-bottleneck block in inference, its batch norms folded into its convolutions:
// 1x1 convolution - activation - channel shuffle - depthwise convolution - activation -
// 1x1 convolution, plus its input where asked.
//
// What makes it fast: weights are packed once; hidden channels are made a few vectors and a few
// rows at a time, used, and never leave the caches; sums of the last product grow in the output
// itself; and a grouped block is cut into the parts that its groups connect, which needs no
// shuffle.
//
// Tensors are dense with channels last. Every output is the same sequence of operations wherever
// it lies, so that results depend neither on the number of threads nor on the batch.
#pragma once

#include <cstdint>

#include "mbconv.h"
#include "tables.h"

namespace pynas {

struct MbInferShape {
  int64_t in_channels, hidden, out_channels, kernel, stride, groups;
  Activation activation;
  // Into how many parts inputs and outputs are cut, each 1 or `groups`; `cut` says what is best.
  int64_t in_parts, out_parts;
};

// Weights and biases in torch's order.
template <typename T>
struct MbFolded {
  const T *expand, *expand_bias, *depthwise, *depthwise_bias, *project, *project_bias;
};

template <typename T>
struct MbInfer {
  MbInferShape shape;
  int64_t images, height, width;
  bool adds_input;
  const T* packed;
  const T* x;
  T* y;
};

template <typename T>
struct MbInferFunctions {
  MbInferShape (*cut)(MbInferShape);
  int64_t (*packed_elements)(const MbInferShape&);
  void (*pack)(const MbInferShape&, const MbFolded<T>&, T* packed);
  // False: y holds infinities or NaN that zeros between groups may have spread. Compute it
  // otherwise.
  bool (*run)(const MbInfer<T>&, const Workers&);
};

struct MbInferTable {
  MbInferFunctions<float> f32;
  MbInferFunctions<double> f64;
};

PYNAS_DECLARE_TABLE(MbInferTable, mbconv_infer)

}  // namespace pynas
