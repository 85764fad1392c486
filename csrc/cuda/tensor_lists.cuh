// One launch over all elements of a list of tensors.
//
// What a kernel must know of each tensor travels as a kernel parameter, not through a table in device memory: nothing
// is allocated or copied, so nothing is waited for, and a CUDA graph that captures the launch holds all of it. Parameters
// have 32,764 bytes since CUDA 12.1 (4,096 before): lists too long for that take several launches.
#pragma once

#include "common.cuh"

#include <algorithm>

namespace jepa_fast::cuda {

#if CUDART_VERSION >= 12010
constexpr size_t kParameterBytes = 32764;
#else
constexpr size_t kParameterBytes = 4096;
#endif
constexpr int kChunk = 4096;  // elements per block
constexpr int kListThreads = 256;

// Scalars are the same for all tensors; Entry has `int64_t size` and whatever the kernel reads of one tensor.
template <typename Entry, typename Scalars>
struct Batch {
  static constexpr int kMost = (kParameterBytes - sizeof(Scalars) - 32) / (sizeof(Entry) + sizeof(int32_t));
  Scalars scalars;
  int count = 0, first = 0;  // tensors here; place of the first in the whole list
  Entry entries[kMost];
  int32_t chunk_end[kMost];  // blocks up to and including those of entry i
};

// kernel(batch) for all entries, a block per chunk
template <typename Entry, typename Scalars>
void launch_over_lists(void (*kernel)(const Batch<Entry, Scalars>), const std::vector<Entry>& entries,
                       const Scalars& scalars, cudaStream_t stream) {
  using B = Batch<Entry, Scalars>;
  static_assert(sizeof(B) <= kParameterBytes);
  for (size_t first = 0; first < entries.size(); first += B::kMost) {
    B batch;
    batch.scalars = scalars;
    batch.first = int(first);
    batch.count = int(std::min<size_t>(B::kMost, entries.size() - first));
    int64_t chunks = 0;
    for (int i = 0; i < batch.count; ++i) {
      batch.entries[i] = entries[first + i];
      chunks += ceil_div(batch.entries[i].size, kChunk);
      STD_TORCH_CHECK(chunks < (int64_t(1) << 31), "a list of tensors has more than 2^43 elements");
      batch.chunk_end[i] = int32_t(chunks);
    }
    launch(kernel, dim3(unsigned(chunks)), dim3(kListThreads), 0, stream, batch);
  }
}

// The entry that this block works on: the first with chunk_end beyond the block
template <typename Entry, typename Scalars>
__device__ inline int entry_of_block(const Batch<Entry, Scalars>& batch) {
  int low = 0, high = batch.count - 1;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (int(blockIdx.x) < batch.chunk_end[middle]) high = middle;
    else low = middle + 1;
  }
  return low;
}

template <int n>
struct Width { static constexpr int value = n; };

// visit(i, Width<4>{}) where i .. i + 3 lie in this block's chunk of entry e, visit(i, Width<1>{}) for what is left
template <typename Entry, typename Scalars, typename Visit>
__device__ inline void for_each_in_chunk(const Batch<Entry, Scalars>& batch, int e, bool by_fours, Visit visit) {
  const int chunk = int(blockIdx.x) - (e ? batch.chunk_end[e - 1] : 0);
  const int64_t begin = int64_t(chunk) * kChunk, rest = batch.entries[e].size - begin;
  const int size = rest < kChunk ? int(rest) : kChunk, whole = by_fours ? size / 4 * 4 : 0;
  for (int i = int(threadIdx.x) * 4; i < whole; i += kListThreads * 4) visit(begin + i, Width<4>{});
  for (int i = whole + int(threadIdx.x); i < size; i += kListThreads) visit(begin + i, Width<1>{});
}

}  // namespace jepa_fast::cuda
