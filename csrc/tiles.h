// Tiles that stay in cache: rows moved in and out of them, and small matrix products C (+)= A B in float32.
//
// In a product A is read one number at a time and broadcast, with any two strides, so A and its transpose cost the same.
// B and C have contiguous rows of whole vectors. A block of C stays in registers over all of K: 14 x 2 or 9 x 3 vectors
// of the 32 that AVX-512 has, 6 x 2 or 4 x 3 of 16. Sums run over k in order, whatever the blocking.
#pragma once

#include "simd.h"

#include <algorithm>
#include <array>
#include <utility>

namespace jepa_fast::CPU_CAPABILITY {

#if defined(__AVX512F__)
constexpr int kMaxRows[4] = {0, 14, 14, 9};  // rows of a register block that is 1, 2 or 3 vectors wide
#else
constexpr int kMaxRows[4] = {0, 6, 6, 4};
#endif

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t whole_vectors(int64_t n) { return divide_up(n, kLanes) * kLanes; }

struct Matrix { const float* data; int64_t row_stride, column_stride; };  // A: any strides
struct Rows { float* data; int64_t stride; };                             // B, C: whole vectors, contiguous

template <int kRows, int kVecs, bool kAdd>
void block_product(int64_t K, const float* a, int64_t row_stride, int64_t column_stride, const float* b,
                   int64_t b_stride, float* c, int64_t c_stride) {
  Vec sum[kRows][kVecs];
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < kVecs; ++n) sum[m][n] = kAdd ? load(c + m * c_stride + n * kLanes) : Vec{};
  for (int64_t k = 0; k < K; ++k, a += column_stride, b += b_stride) {
    Vec row[kVecs];
#pragma GCC unroll 4
    for (int n = 0; n < kVecs; ++n) row[n] = load(b + n * kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
      const Vec x = broadcast(a[m * row_stride]);
#pragma GCC unroll 4
      for (int n = 0; n < kVecs; ++n) sum[m][n] = fma(x, row[n], sum[m][n]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
    for (int n = 0; n < kVecs; ++n) store(c + m * c_stride + n * kLanes, sum[m][n]);
}

using BlockProduct = decltype(&block_product<1, 1, false>);

template <int kVecs, bool kAdd, int... kRowsMinus1>
constexpr auto block_products(std::integer_sequence<int, kRowsMinus1...>) {
  return std::array<BlockProduct, sizeof...(kRowsMinus1)>{block_product<kRowsMinus1 + 1, kVecs, kAdd>...};
}

template <int kVecs, bool kAdd>
void panel_product(int64_t M, int64_t K, Matrix a, const float* b, int64_t b_stride, float* c, int64_t c_stride) {
  static constexpr auto kernels = block_products<kVecs, kAdd>(std::make_integer_sequence<int, kMaxRows[kVecs]>());
  const int64_t blocks = divide_up(M, kMaxRows[kVecs]);
  for (int64_t i = 0, m = 0; i < blocks; ++i) {  // blocks of nearly equal height
    const int64_t rows = (M - m) / (blocks - i);
    kernels[rows - 1](K, a.data + m * a.row_stride, a.row_stride, a.column_stride, b, b_stride, c + m * c_stride,
                      c_stride);
    m += rows;
  }
}

// C [M, vecs * kLanes] = A [M, K] B [K, vecs * kLanes], or += with kAdd
template <bool kAdd>
void tile_gemm(int64_t M, int64_t vecs, int64_t K, Matrix a, Rows b, Rows c) {
  while (vecs > 0) {
    const int64_t width = vecs == 1 || vecs == 3 ? vecs : 2;
    const auto panel = width == 1 ? panel_product<1, kAdd> : width == 2 ? panel_product<2, kAdd>
                                                                        : panel_product<3, kAdd>;
    panel(M, K, a, b.data, b.stride, c.data, c.stride);
    b.data += width * kLanes;
    c.data += width * kLanes;
    vecs -= width;
  }
}

// n rows of d numbers -> float32 rows `width` apart, times a factor
template <typename T>
void copy_rows(const T* src, int64_t stride, int64_t n, int64_t d, float* dst, int64_t width, float factor = 1.f) {
  for (int64_t i = 0; i < n; ++i, src += stride, dst += width) {
    int64_t c = 0;
    for (; c + kLanes <= d; c += kLanes) store(dst + c, load(src + c) * factor);
    if (c < d && d > kLanes) store(dst + d - kLanes, load(src + d - kLanes) * factor);  // again what is there already
    else for (; c < d; ++c) dst[c] = to_float(src[c]) * factor;
  }
}

// n rows of d numbers -> d rows of whole_vectors(n) numbers, `width` apart, times a factor; missing numbers are 0
template <typename T>
void copy_transposed(const T* src, int64_t stride, int64_t n, int64_t d, float factor, float* dst, int64_t width) {
  Vec block[kLanes];
  for (int64_t i = 0; i < n; i += kLanes) {
    for (int64_t next = 0; next < d; next += kLanes) {
      const int64_t c = d < kLanes ? 0 : std::min(next, d - kLanes);
      for (int64_t r = 0; r < kLanes; ++r) {
        const T* row = src + (i + r) * stride + c;
        block[r] = i + r >= n ? Vec{} : d < kLanes ? load_partial(row, int(d)) : load(row);
      }
      transpose(block);
      for (int64_t r = 0; r < std::min<int64_t>(kLanes, d); ++r) store(dst + (c + r) * width + i, block[r] * factor);
    }
  }
}

// float32 rows `width` apart -> n rows of d numbers, times factor[i * step]
template <typename T>
void write_rows(const float* src, int64_t width, int64_t n, int64_t d, const float* factor, int64_t step, T* dst,
                int64_t stride) {
  for (int64_t i = 0; i < n; ++i, src += width, dst += stride) {
    const Vec f = broadcast(factor[i * step]);
    int64_t c = 0;
    for (; c + kLanes <= d; c += kLanes) store(dst + c, load(src + c) * f);
    if (c < d && d > kLanes) store(dst + d - kLanes, load(src + d - kLanes) * f);
    else if (c < d) store_partial(dst + c, load(src + c) * f, int(d - c));
  }
}

template <typename T>
void write_zeros(T* dst, int64_t stride, int64_t n, int64_t d) {
  for (int64_t i = 0; i < n; ++i) std::memset(dst + i * stride, 0, d * sizeof(T));
}

}  // namespace jepa_fast::CPU_CAPABILITY
