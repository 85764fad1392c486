// What csrc/cuda/mma.cuh means, value by value: lanes show each other their registers.
#pragma once

#include "cuda_runtime.h"

namespace jepa_fast::cuda {

template <typename T>
float value_of(uint32_t pair, int i) {  // the i-th of the two 16-bit values in a register
  const uint16_t bits = uint16_t(pair >> (16 * i));
  T value;
  std::memcpy(&value, &bits, 2);
  return float(value);
}

template <typename T, int kInner>  // kInner 16 or 8
void mma_host(float (&d)[4], const uint32_t* a, const uint32_t* b, const char* file, int line) {
  struct Registers { uint32_t a[4], b[2]; } mine{};
  for (int i = 0; i < kInner / 4; ++i) mine.a[i] = a[i];
  for (int i = 0; i < kInner / 8; ++i) mine.b[i] = b[i];
  const auto lanes = cuda_host::exchange(0xffffffff, mine, "mma", file, line);
  const int g = cuda_host::lane() / 4, t = cuda_host::lane() % 4;
  for (int e = 0; e < 4; ++e) {
    const int row = g + e / 2 * 8, column = 2 * t + e % 2;
    float sum = 0;
    for (int k = 0; k < kInner; ++k) {
      const Registers of_a = lanes[row % 8 * 4 + k % 8 / 2], of_b = lanes[column * 4 + k % 8 / 2];
      sum += value_of<T>(of_a.a[row / 8 + k / 8 * 2], k % 2) * value_of<T>(of_b.b[k / 8], k % 2);
    }
    d[e] += sum;
  }
}

template <typename T>
void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], CUDA_HOST_WHERE) {
  mma_host<T, 16>(d, a, b, file, line);
}
template <typename T>
void mma_16x8x8(float (&d)[4], const uint32_t (&a)[2], uint32_t b, CUDA_HOST_WHERE) {
  mma_host<T, 8>(d, a, &b, file, line);
}

template <int kCount, bool kTransposed = false>
void load_matrices(uint32_t (&r)[kCount], const void* row, CUDA_HOST_WHERE) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4);
  const auto rows = cuda_host::exchange(0xffffffff, static_cast<const uint16_t*>(row), "load_matrices", file, line);
  const int g = cuda_host::lane() / 4, t = cuda_host::lane() % 4;
  for (int i = 0; i < kCount; ++i) {
    const uint16_t low = kTransposed ? rows[8 * i + 2 * t][g] : rows[8 * i + g][2 * t];
    const uint16_t high = kTransposed ? rows[8 * i + 2 * t + 1][g] : rows[8 * i + g][2 * t + 1];
    r[i] = uint32_t(low) | uint32_t(high) << 16;
  }
  cuda_host::exchange(0xffffffff, 0, "load_matrices", file, line);  // all have read before one goes on to write
}

}  // namespace jepa_fast::cuda
