// Transposes between torch's order of weights and the order that the products want.
#pragma once

#include "simd.h"

namespace pynas {
namespace {

// The lanes of a and b in turn: of their first halves, or of their second ones.
template <typename T, bool Second>
PYNAS_INLINE Vector<T> zip(Vector<T> a, Vector<T> b) {
  constexpr int kL = kLanes<T>, kFrom = Second ? kL / 2 : 0;
#if defined(__GNUC__) && !defined(__clang__)
  typedef typename Simd<T>::Index Index;
  Index order{};
  PYNAS_UNROLL for (int i = 0; i < kL; ++i) order[i] = kFrom + i / 2 + i % 2 * kL;
  return __builtin_shuffle(a, b, order);
#else
  Vector<T> out{};
  PYNAS_UNROLL for (int i = 0; i < kL; ++i) out[i] = i % 2 ? b[kFrom + i / 2] : a[kFrom + i / 2];
  return out;
#endif
}

// A square block of vectors: after as many rounds as the length has bits, rows are columns.
template <typename T>
PYNAS_INLINE void transpose_block(const T* from, int64_t from_step, T* to, int64_t to_step) {
  constexpr int kL = kLanes<T>;
  Vector<T> rows[kL], next[kL];
  PYNAS_UNROLL for (int i = 0; i < kL; ++i) rows[i] = load(from + i * from_step);
  PYNAS_UNROLL for (int round = 1; round < kL; round *= 2) {
    PYNAS_UNROLL for (int i = 0; i < kL / 2; ++i) {
      next[2 * i] = zip<T, false>(rows[i], rows[i + kL / 2]);
      next[2 * i + 1] = zip<T, true>(rows[i], rows[i + kL / 2]);
    }
    PYNAS_UNROLL for (int i = 0; i < kL; ++i) rows[i] = next[i];
  }
  PYNAS_UNROLL for (int i = 0; i < kL; ++i) store(to + i * to_step, rows[i]);
}

// to[c][r] = from[r][c]
template <typename T>
void transpose(const T* from, int64_t from_step, int64_t rows, int64_t columns, T* to,
               int64_t to_step) {
  constexpr int64_t kL = kLanes<T>;
  for (int64_t r = 0; r < rows; r += kL) {
    for (int64_t c = 0; c < columns; c += kL) {
      const T* block = from + r * from_step + c;
      T* place = to + c * to_step + r;
      if (r + kL <= rows && c + kL <= columns) {
        transpose_block(block, from_step, place, to_step);
        continue;
      }
      for (int64_t j = 0; j < smaller(kL, columns - c); ++j) {
        for (int64_t i = 0; i < smaller(kL, rows - r); ++i) {
          place[j * to_step + i] = block[i * from_step + j];
        }
      }
    }
  }
}

}  // namespace
}  // namespace pynas
