// Activations and their slopes, as torch has them: a NaN stays a NaN, and where a rule has a corner
// its slope is torch's.
#pragma once

#include "mbconv.h"
#include "simd.h"

namespace pynas {
namespace {

template <typename T>
PYNAS_INLINE Vector<T> activate(Activation kind, Vector<T> t) {
  const Vector<T> zero{}, six = broadcast<T>(6);
  switch (kind) {
    case Activation::kRelu:
      return t < zero ? zero : t;
    case Activation::kRelu6:
      t = t < zero ? zero : t;
      return t > six ? six : t;
    case Activation::kHardswish: {
      Vector<T> gate = t + broadcast<T>(3);
      gate = gate < zero ? zero : gate;
      gate = gate > six ? six : gate;
      return t * gate * broadcast<T>(T(1) / 6);
    }
    default:
      return t;
  }
}

// The slope at t, which is what went into the activation.
template <typename T>
PYNAS_INLINE Vector<T> slope(Activation kind, Vector<T> t) {
  const Vector<T> zero{}, one = broadcast<T>(1);
  switch (kind) {
    case Activation::kRelu:
      return t <= zero ? zero : one;
    case Activation::kRelu6: {
      const Vector<T> rising = t <= zero ? zero : one;
      return t >= broadcast<T>(6) ? zero : rising;
    }
    case Activation::kHardswish: {
      const Vector<T> three = broadcast<T>(3);
      const Vector<T> inner = t * broadcast<T>(T(1) / 3) + broadcast<T>(T(0.5));
      const Vector<T> rising = t > three ? one : inner;
      return t < -three ? zero : rising;
    }
    default:
      return one;
  }
}

// gradient * slope, given what went in.
template <typename T>
PYNAS_INLINE Vector<T> through(Activation kind, Vector<T> gradient, Vector<T> t) {
  const Vector<T> zero{};
  switch (kind) {
    case Activation::kRelu:
      return t <= zero ? zero : gradient;
    case Activation::kRelu6: {
      const Vector<T> rising = t <= zero ? zero : gradient;
      return t >= broadcast<T>(6) ? zero : rising;
    }
    case Activation::kHardswish:
      return gradient * slope<T>(kind, t);
    default:
      return gradient;
  }
}

// Whether the slope can be told from what came out, so that what went in need not be kept.
constexpr bool slope_from_output(Activation kind) { return kind != Activation::kHardswish; }

template <Activation Kind>
struct ActivationOf {
  static constexpr Activation value = Kind;
};

// act(kind) with a kind that the compiler knows, so that it is not asked about in loops.
template <typename Act>
PYNAS_INLINE void with_activation(Activation kind, Act&& act) {
  switch (kind) {
    case Activation::kRelu:
      return act(ActivationOf<Activation::kRelu>{});
    case Activation::kRelu6:
      return act(ActivationOf<Activation::kRelu6>{});
    case Activation::kHardswish:
      return act(ActivationOf<Activation::kHardswish>{});
    default:
      return act(ActivationOf<Activation::kNone>{});
  }
}

}  // namespace
}  // namespace pynas
