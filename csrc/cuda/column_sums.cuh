// Sums over rows in two stages of fixed order, without atomics: each block adds up its rows, and here the blocks' sums are
// added.
#pragma once

#include "common.cuh"

namespace jepa_fast::cuda {
namespace {

constexpr int kColumns = 32, kGroups = 32;  // columns per block, threads per column

// sums [blocks, D] -> out [D], in float64 and rounded once
__global__ void __launch_bounds__(kColumns * kGroups)
    column_sums_kernel(const float* __restrict__ sums, float* __restrict__ out, int64_t blocks, int64_t D) {
  __shared__ double of_group[kGroups][kColumns];
  const int lane = int(threadIdx.x) % kColumns, group = int(threadIdx.x) / kColumns;
  const int64_t d = int64_t(blockIdx.x) * kColumns + lane;
  double total = 0;
  if (d < D) {
#pragma unroll 4
    for (int64_t b = group; b < blocks; b += kGroups) total += sums[b * D + d];
  }
  of_group[group][lane] = total;
  __syncthreads();
  if (group || d >= D) return;
  for (int k = 1; k < kGroups; ++k) total += of_group[k][lane];
  out[d] = float(total);
}

inline void column_sums(const float* sums, float* out, int64_t blocks, int64_t D, cudaStream_t stream) {
  launch(column_sums_kernel, dim3(unsigned(ceil_div(D, kColumns))), kColumns * kGroups, 0, stream, sums, out, blocks, D);
}

}  // namespace
}  // namespace jepa_fast::cuda
