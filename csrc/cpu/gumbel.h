// Gumbel-softmax gates of all layers of a space, forward and backward.
#pragma once

#include <cstdint>

#include "tables.h"

namespace pynas {

// More options than this do not fit the scratch on the stack.
constexpr int64_t kMostOptions = 256;

// Beyond, float32 divides by 0 or infinity.
constexpr double kLeastTau = 1e-30, kMostTau = 1e30;

// Arrays are dense and row-major; D draws, L layers, O options (1 .. kMostOptions).
template <typename T>
struct GumbelInputs {
  int64_t draws, layers, options;
  const T* theta;       // [L, O]
  const uint8_t* mask;  // [L, O], 1 where the option is allowed
  const T* cost;        // [L, O]
  double tau;
  uint64_t seed, step;
};

template <typename T>
struct GumbelOutputs {
  T* soft;         // [D, L, O]
  int64_t* index;  // [D, L]
  T* log_prob;     // [D, L]
  T* cost;         // [D]
};

// Null stands for a gradient of zeros.
template <typename T>
struct GumbelGradients {
  const T* soft;      // [D, L, O] or null
  const T* log_prob;  // [D, L] or null
  const T* cost;      // [D] or null
  T* theta_out;       // [L, O]
  T* cost_out;        // [L, O], or null where it is not wanted
};

template <typename T>
struct GumbelFunctions {
  // Returns false, and leaves the outputs unspecified, where the values make no sense: a layer
  // without an allowed option, or theta or cost of an allowed option not finite.
  bool (*forward)(const GumbelInputs<T>&, const GumbelOutputs<T>&);
  // Draws the gates again rather than reading them: cheaper than keeping them alive in Python.
  void (*backward)(const GumbelInputs<T>&, const GumbelGradients<T>&);
};

struct GumbelTable {
  GumbelFunctions<float> f32;
  GumbelFunctions<double> f64;
};

PYNAS_DECLARE_TABLE(GumbelTable, gumbel)

}  // namespace pynas
