// Which entries of an index name a row: what scatters run over, so that repeated indices need no atomics on floats and
// the order of additions is fixed.
#pragma once

#include "common.cuh"

namespace jepa_fast::cuda {

constexpr int kSpan = 256;         // indices per span
constexpr int64_t kFewPlaces = 1024;  // fewer are looked through without spans

// An index [B, K] of rows of samples of N, with the least and the greatest row of each span of kSpan indices: an index in
// ascending order, as that of packed masks, is then searched in constant time per row, any other one in K / 32 steps.
// Entries from N on name no row.
struct Places {
  const int64_t* index;
  const int64_t* spans;  // [B, ceil(K / kSpan), 2], or null
  int64_t K, N;

  // visit(p) for all p with index[b, p - b K] = n where row = b N + n, in ascending order, by a whole warp
  template <typename Visit>
  __device__ void for_each(int64_t row, Visit visit) const {
    const int lane = int(threadIdx.x) % 32;
    const int64_t b = row / N, n = row - b * N, num_spans = (K + kSpan - 1) / kSpan;
    for (int64_t first = 0; first < num_spans; first += 32) {
      bool may_hold = first + lane < num_spans;
      if (may_hold && spans) {
        const int64_t* span = spans + (b * num_spans + first + lane) * 2;
        may_hold = span[0] <= n && n <= span[1];
      }
      for (unsigned left = __ballot_sync(kAllLanes, may_hold); left; left &= left - 1) {
        const int64_t begin = (first + __ffs(int(left)) - 1) * kSpan, rest = K - begin;
        for (int64_t i = 0; i < (rest < kSpan ? rest : kSpan); i += 32) {
          const int64_t k = begin + i + lane;
          unsigned hits = __ballot_sync(kAllLanes, k < K && index[b * K + k] == n);
          for (; hits; hits &= hits - 1) visit(b * K + begin + i + __ffs(int(hits)) - 1);
        }
      }
    }
  }
};

namespace {

__global__ void __launch_bounds__(kSpan) spans_kernel(const int64_t* index, int64_t* spans, int64_t K, int64_t N) {
  __shared__ int64_t low[kSpan / 32], high[kSpan / 32];
  const int64_t b = blockIdx.y, k = int64_t(blockIdx.x) * kSpan + threadIdx.x;
  int64_t least = k < K ? index[b * K + k] : N, greatest = least < N ? least : -1;
  for (int d = 16; d; d /= 2) {
    least = min(least, __shfl_xor_sync(kAllLanes, least, d));
    greatest = max(greatest, __shfl_xor_sync(kAllLanes, greatest, d));
  }
  if (threadIdx.x % 32 == 0) low[threadIdx.x / 32] = least, high[threadIdx.x / 32] = greatest;
  __syncthreads();
  if (threadIdx.x) return;
  for (int w = 1; w < kSpan / 32; ++w) least = min(least, low[w]), greatest = max(greatest, high[w]);
  spans[(b * gridDim.x + blockIdx.x) * 2] = least;
  spans[(b * gridDim.x + blockIdx.x) * 2 + 1] = greatest;
}

// `scratch` must live until the kernels that use the result are launched
inline Places places_of(const Tensor& index, int64_t B, int64_t K, int64_t N, std::optional<Tensor>& scratch,
                        cudaStream_t stream) {
  Places places{index.const_data_ptr<int64_t>(), nullptr, K, N};
  if (K <= kFewPlaces || B > 65535) return places;
  scratch = torch::stable::new_empty(index, {B, ceil_div(K, kSpan), 2});
  int64_t* spans = scratch->mutable_data_ptr<int64_t>();
  launch(spans_kernel, dim3(unsigned(ceil_div(K, kSpan)), unsigned(B)), kSpan, 0, stream, places.index, spans, K, N);
  places.spans = spans;
  return places;
}

}  // namespace
}  // namespace jepa_fast::cuda
