// The three steps of a block on tiles that stay in registers: bias first, activation last.
//
// The last vector of channels may be half a vector: on cores that work on 64 bytes in two turns it
// takes one, and it writes no more than half.
#pragma once

#include "mbconv.h"
#include "simd.h"

namespace pynas {
namespace {

constexpr bool kHalves = kVectorBytes == 64;
constexpr int kWidest = kRegisters >= 32 ? 3 : 2;  // vectors of a tile
constexpr int tallest(int vectors) {
  return kRegisters >= 32 ? (vectors == 3 ? 8 : vectors == 2 ? 12 : 14) : (vectors == 2 ? 6 : 12);
}

template <typename T, bool Half>
struct Lane {
  static constexpr int kBytes = Half ? kVectorBytes / 2 : kVectorBytes;
  typedef T Type __attribute__((vector_size(kBytes)));
  typedef T Loose __attribute__((vector_size(kBytes), aligned(sizeof(T)), may_alias));
};
template <typename T, bool Half>
using LaneOf = typename Lane<T, Half>::Type;

template <bool Half, typename T>
PYNAS_INLINE LaneOf<T, Half> get(const T* from) {
  return *reinterpret_cast<const typename Lane<T, Half>::Loose*>(from);
}
template <bool Half, typename T>
PYNAS_INLINE void put(T* to, LaneOf<T, Half> value) {
  *reinterpret_cast<typename Lane<T, Half>::Loose*>(to) = value;
}

// As torch has them: a NaN stays a NaN.
template <Activation Kind, typename T, typename V>
PYNAS_INLINE V activated(V t) {
  const V zero{}, three = T(3) - zero, six = T(6) - zero;
  if (Kind == Activation::kRelu) return t < zero ? zero : t;
  if (Kind == Activation::kRelu6) {
    t = t < zero ? zero : t;
    return t > six ? six : t;
  }
  if (Kind == Activation::kHardswish) {
    V gate = t + three;
    gate = gate < zero ? zero : gate;
    gate = gate > six ? six : gate;
    return t * gate * (T(1) / 6);
  }
  return t;
}

template <Activation Kind>
struct KindOf {
  static constexpr Activation value = Kind;
};

// act(kind) with a kind that the compiler knows.
template <typename Act>
PYNAS_INLINE void by_kind(Activation kind, Act&& act) {
  if (kind == Activation::kRelu) return act(KindOf<Activation::kRelu>{});
  if (kind == Activation::kNone) return act(KindOf<Activation::kNone>{});
  if (kind == Activation::kRelu6) return act(KindOf<Activation::kRelu6>{});
  act(KindOf<Activation::kHardswish>{});
}

// C[r][v] = activation(start[v] + sum over k < depth of A[r][k] * B[k][v]); strides in elements.
//
// After every `run` steps of k, A goes on `hop` elements further. B is dense.
template <typename T>
struct Product {
  int64_t depth, run, hop;
  int64_t row_a, row_c, vector_c;
  Activation activation;
  bool half;                 // the last vector
  const T* bias = nullptr;   // by column; null: C is added to
  const T* input = nullptr;  // by row and column as C, added to the bias; or null
};

// Sums of a tile: full vectors, and half ones instead of the last.
template <typename T, int Rows, int Vectors, bool Half>
struct Sums {
  static constexpr int kFull = Vectors - Half;
  Vector<T> full[Rows][kFull ? kFull : 1];
  LaneOf<T, true> half[Rows];
};

// Row > 0: the elements between rows of A, where the compiler may know them.
template <typename T, int Rows, int Vectors, int Row, bool Half>
PYNAS_INLINE void multiply_up(Sums<T, Rows, Vectors, Half>& sums, const Product<T>& p, const T* a,
                              const T* b) {
  constexpr int kFull = Vectors - Half;
  const int64_t row = Row ? Row : p.row_a;
  for (int64_t left = p.depth; left > 0; left -= p.run) {
    const T *a0 = a, *a3 = a + 3 * row, *a6 = a + 6 * row, *a9 = a + 9 * row, *a12 = a + 12 * row;
    const int64_t run = smaller(left, p.run);
    for (int64_t k = 0; k < run; ++k) {
      Vector<T> bs[Vectors];
      LaneOf<T, true> last{};
      PYNAS_UNROLL for (int v = 0; v < kFull; ++v) bs[v] = load(b + v * kLanes<T>);
      if (Half) last = get<true>(b + kFull * kLanes<T>);
      PYNAS_UNROLL for (int r = 0; r < Rows; ++r) {
        // Addresses of the form base + stride * {0, 1, 2}, or base + constant.
        const T* from = r < 3 ? a0 : r < 6 ? a3 : r < 9 ? a6 : r < 12 ? a9 : a12;
        const T x = Row ? a0[r * Row] : from[(r % 3) * row];
        PYNAS_UNROLL for (int v = 0; v < kFull; ++v) sums.full[r][v] += broadcast(x) * bs[v];
        if (Half) sums.half[r] += (x - LaneOf<T, true>{}) * last;
      }
      ++a0, ++a3, ++a6, ++a9, ++a12;
      b += Vectors * kLanes<T>;
    }
    a += p.hop;
  }
}

template <typename T, int Rows, int Vectors, int Row, bool Half>
__attribute__((noinline)) void product_tile(const Product<T>& p, const T* a, const T* b,
                                            const T* bias, const T* input, T* c) {
  constexpr int kFull = Vectors - Half, kLast = kFull * kLanes<T>;
  Sums<T, Rows, Vectors, Half> sums;
  PYNAS_UNROLL for (int r = 0; r < Rows; ++r) {
    const T* from = input + r * p.row_c;
    T* to = c + r * p.row_c;
    PYNAS_UNROLL for (int v = 0; v < kFull; ++v) {
      sums.full[r][v] = bias ? load(bias + v * kLanes<T>) : load(to + v * p.vector_c);
      if (input) sums.full[r][v] += load(from + v * p.vector_c);
    }
    if (Half) {
      sums.half[r] = bias ? get<true>(bias + kLast) : get<true>(to + kFull * p.vector_c);
      if (input) sums.half[r] += get<true>(from + kFull * p.vector_c);
    }
  }
  multiply_up<T, Rows, Vectors, Row, Half>(sums, p, a, b);
  by_kind(p.activation, [&](auto kind) {
    PYNAS_UNROLL for (int r = 0; r < Rows; ++r) {
      T* to = c + r * p.row_c;
      PYNAS_UNROLL for (int v = 0; v < kFull; ++v) {
        store(to + v * p.vector_c, activated<kind.value, T>(sums.full[r][v]));
      }
      if (Half) put<true>(to + kFull * p.vector_c, activated<kind.value, T>(sums.half[r]));
    }
  });
}

template <typename T, int Rows, int Vectors, int Row, bool Half>
PYNAS_INLINE void product_tile_of(int64_t rows, const Product<T>& p, const T* a, const T* b,
                                  const T* bias, const T* input, T* c) {
  if constexpr (Rows > 0) {
    if (rows == Rows) return product_tile<T, Rows, Vectors, Row, Half>(p, a, b, bias, input, c);
    product_tile_of<T, Rows - 1, Vectors, Row, Half>(rows, p, a, b, bias, input, c);
  }
}

// Rows are split evenly: widths of networks (7, 14, 28, 56) divide well, and no tile is tiny.
template <typename T, int Vectors, int Row, bool Half>
void product_columns(int64_t rows, const Product<T>& p, const T* a, const T* b, const T* bias,
                     const T* input, T* c) {
  constexpr int kMost = tallest(Vectors);
  int64_t tiles = (rows + kMost - 1) / kMost;
  for (int64_t row = 0; row < rows; --tiles) {
    const int64_t count = (rows - row + tiles - 1) / tiles;
    product_tile_of<T, kMost, Vectors, Row, Half>(count, p, a + row * (Row ? Row : p.row_a), b,
                                                  bias, input ? input + row * p.row_c : nullptr,
                                                  c + row * p.row_c);
    row += count;
  }
}

template <typename T, int Vectors, int Row>
PYNAS_INLINE void product_columns_of(bool half, int64_t rows, const Product<T>& p, const T* a,
                                     const T* b, const T* bias, const T* input, T* c) {
  if constexpr (kHalves) {
    if (half) return product_columns<T, Vectors, Row, true>(rows, p, a, b, bias, input, c);
  }
  product_columns<T, Vectors, Row, false>(rows, p, a, b, bias, input, c);
}

// How many of the vectors that are left the next tiles take: never a last one alone after three.
constexpr int64_t next_vectors(int64_t left) {
  return kWidest == 3 && left == 4 ? 2 : smaller<int64_t>(left, kWidest);
}

// B: for each run of next_vectors, [depth][those vectors].
template <typename T, int Row = 0>
void product(int64_t rows, int64_t vectors, const Product<T>& p, const T* a, const T* b, T* c) {
  const T *bias = p.bias, *input = p.input;
  while (vectors > 0) {
    const int64_t now = next_vectors(vectors);
    const bool half = p.half && now == vectors;
    if (now == 3) {
      if constexpr (kWidest == 3)
        product_columns_of<T, 3, Row>(half, rows, p, a, b, bias, input, c);
    } else if (now == 2) {
      product_columns_of<T, 2, Row>(half, rows, p, a, b, bias, input, c);
    } else {
      product_columns_of<T, 1, Row>(half, rows, p, a, b, bias, input, c);
    }
    b += now * kLanes<T> * p.depth;
    c += now * p.vector_c;
    if (bias) bias += now * kLanes<T>;
    if (input) input += now * p.vector_c;
    vectors -= now;
  }
}

}  // namespace
}  // namespace pynas
