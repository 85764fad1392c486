// Random unit vectors from a counter: Philox4x32-10, Box-Muller, columns divided by their norms.
//
// Element e of the row-major [D, K] normals is word e % 4 of block e / 4: a thread per block of four, then a column by 32
// threads; the numbers are those of csrc/cpu/directions.cpp but for a last bit once in a million. The step is read on the
// device. Bytes: 16 D K, most of them in the cache; FLOPs: 60 D K in float64. lejepa-512-4096: 34 MB, 7.8 us at 4.3 TB/s.
#include "common.cuh"

#include <algorithm>

namespace jepa_fast::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kColumns = 32, kGroups = 8;  // columns per block, threads per column

struct Block { uint32_t word[4]; };

// Salmon et al., SC 2011: Parallel random numbers, as easy as 1, 2, 3.
__device__ inline Block philox(uint64_t block, uint64_t seed, uint64_t step) {
  uint32_t c0 = uint32_t(block), c1 = uint32_t(block >> 32), c2 = uint32_t(seed >> 32), c3 = uint32_t(step >> 32);
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(step);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(c0) * 0xD2511F53u, b = uint64_t(c2) * 0xCD9E8D57u;
    c0 = uint32_t(b >> 32) ^ c1 ^ k0;
    c1 = uint32_t(b);
    c2 = uint32_t(a >> 32) ^ c3 ^ k1;
    c3 = uint32_t(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// the centre of one of 2^23 intervals of (0, 1)
__device__ inline double uniform(uint32_t word) { return ((word >> 9) + 0.5) * 0x1p-23; }

// two words become two independent normals
__device__ inline void box_muller(uint32_t a, uint32_t b, float* normal) {
  const double radius = sqrt(-2 * log(uniform(a)));
  double sine, cosine;
  sincospi(2 * uniform(b), &sine, &cosine);
  normal[0] = float(radius * cosine);
  normal[1] = float(radius * sine);
}

__global__ void __launch_bounds__(kThreads)
    fill_kernel(const int64_t* __restrict__ step, uint64_t seed, float* __restrict__ out, int64_t count) {
  const int64_t block = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (4 * block >= count) return;
  const Block made = philox(uint64_t(block), seed, uint64_t(*step));
  Floats<4> normal;
  box_muller(made.word[0], made.word[1], normal.value);
  box_muller(made.word[2], made.word[3], normal.value + 2);
  if (4 * block + 4 <= count) return store(out + 4 * block, normal);
  for (int w = 0; 4 * block + w < count; ++w) out[4 * block + w] = normal[w];
}

__global__ void __launch_bounds__(kColumns * kGroups) normalise_kernel(float* a, int64_t D, int64_t K) {
  __shared__ double sums[kGroups][kColumns];
  const int lane = int(threadIdx.x) % kColumns, group = int(threadIdx.x) / kColumns;
  const int64_t k = int64_t(blockIdx.x) * kColumns + lane;
  double sum = 0;
  if (k < K)
    for (int64_t d = group; d < D; d += kGroups) sum += double(a[d * K + k]) * a[d * K + k];
  sums[group][lane] = sum;
  __syncthreads();
  if (k >= K) return;
  sum = 0;
  for (int g = 0; g < kGroups; ++g) sum += sums[g][lane];
  const double norm = max(sqrt(sum), 1e-30);
  for (int64_t d = group; d < D; d += kGroups) a[d * K + k] = float(a[d * K + k] / norm);
}

__global__ void __launch_bounds__(kThreads)
    words_kernel(const int64_t* step, uint64_t seed, uint64_t first, int64_t* words, int64_t count) {
  const int64_t block = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (block >= count) return;
  const Block made = philox(first + uint64_t(block), seed, uint64_t(*step));
  for (int w = 0; w < 4; ++w) words[block * 4 + w] = made.word[w];
}

}  // namespace

// out [D, K] float32, aligned to 16 bytes; step a single int64
void directions(const Tensor& step, int64_t seed, Tensor out) {
  const int64_t D = out.size(0), K = out.size(1);
  const OnDevice device(out);
  float* a = out.mutable_data_ptr<float>();
  launch(fill_kernel, dim3(unsigned(ceil_div(D * K, 4 * kThreads))), kThreads, 0, device.stream,
         step.const_data_ptr<int64_t>(), uint64_t(seed), a, D * K);
  launch(normalise_kernel, dim3(unsigned(ceil_div(K, kColumns))), kColumns * kGroups, 0, device.stream, a, D, K);
}

// words [n, 4] int64: blocks first, first + 1, ... as they are, for known-answer tests
void philox_words(const Tensor& step, int64_t seed, int64_t first, Tensor words) {
  const OnDevice device(words);
  launch(words_kernel, dim3(unsigned(ceil_div(words.size(0), kThreads))), kThreads, 0, device.stream,
         step.const_data_ptr<int64_t>(), uint64_t(seed), uint64_t(first), words.mutable_data_ptr<int64_t>(), words.size(0));
}

}  // namespace jepa_fast::cuda

JEPA_FAST_CUDA(JEPA_FAST_CUDA_IMPL(directions) JEPA_FAST_CUDA_IMPL(philox_words))
