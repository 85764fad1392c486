// gelu(x + bias) in one pass over memory; its gradient, and the bias gradient, in a second one, which recomputes x + bias.
//
// Phi(-t) = exp(-t^2 / 2) R(t) with the polynomial R of csrc/cpu/bias_gelu.cpp: the small tail is computed, never 1 minus
// a number near 1. The bias gradient is summed by each thread over its rows, by the block over its warps, and by a second
// launch over the blocks, in float32, float32 and float64 and in fixed order.
// Bytes: 2 P D x element size (backward: 3 P D); FLOPs: 30 P D, in float32. vitl16-224-b64 (12544 rows of 4096, bfloat16):
// 206 MB, 47.8 us at 4.3 TB/s; backward 308 MB, 71.7 us.
// x, grad, out, grad_x [P, D] float32, bfloat16 or float16, bias, grad_bias [D] float32, all contiguous.
#include "column_sums.cuh"

#include <algorithm>
#include <type_traits>

namespace jepa_fast::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kForwardRows = 32;                             // per block
constexpr int64_t kBackwardRows = 64, kMostBlocks = 512;     // rows per block at least, blocks of rows at most
constexpr float kFarthest = 15.f;                            // Phi(-15) < 2^-150

__device__ inline float bell_of(float t) { return exp2f(t * t * -0.721347511f); }  // exp(-t^2 / 2)

__device__ inline float ratio_of(float t) {  // R(t) for t in [0, kFarthest]
  const float v = __fdividef(t - 1.f, t + 3.f), v2 = v * v;
  float odd = 0.00202506153f, even = -0.0031405562f;  // two chains are shorter than one
  odd = fmaf(odd, v2, -0.005509806f);
  odd = fmaf(odd, v2, 0.0280103775f);
  odd = fmaf(odd, v2, -0.167504899f);
  odd = fmaf(odd, v2, -0.549455989f);
  even = fmaf(even, v2, 0.00513168002f);
  even = fmaf(even, v2, -0.0153880978f);
  even = fmaf(even, v2, 0.44425892f);
  even = fmaf(even, v2, 0.26157829f);
  return fmaf(odd, v, even);
}

__device__ inline float gelu(float z) {  // max(z, 0) - |z| Phi(-|z|); NaN stays NaN
  const float t = fminf(fabsf(z), kFarthest);
  return fmaf(-fabsf(z), bell_of(t) * ratio_of(t), fmaxf(z, 0.f));
}

__device__ inline float gelu_slope(float z) {  // s = |z| phi(z) - Phi(-|z|): -s where z <= 0, 1 + s beyond
  const float t = fminf(fabsf(z), kFarthest);
  const float s = bell_of(t) * fmaf(fabsf(z), 0.398942280f, -ratio_of(t));
  return z > 0.f ? 1.f + s : -s;
}

// 32 n columns and kForwardRows rows per block, a lane per n columns
template <typename T, int n>
__global__ void __launch_bounds__(kWarps * 32)
    bias_gelu_kernel(const T* __restrict__ x, const float* __restrict__ bias, T* __restrict__ out, int64_t P, int D) {
  const int d = (int(blockIdx.y) * 32 + int(threadIdx.x) % 32) * n;
  if (d >= D) return;
  const Floats<n> b = load<n>(bias + d);
#pragma unroll
  for (int r = 0; r < kForwardRows / kWarps; ++r) {
    const int64_t p = int64_t(blockIdx.x) * kForwardRows + r * kWarps + threadIdx.x / 32;  // one token
    if (p >= P) return;
    Floats<n> z = load<n>(x + p * D + d);
#pragma unroll
    for (int j = 0; j < n; ++j) z[j] = gelu(z[j] + b[j]);
    store(out + p * D + d, z);
  }
}

// the same with `rows` rows per block; sums [blocks of rows, D]
template <typename T, int n>
__global__ void __launch_bounds__(kWarps * 32, 3)
    bias_gelu_backward_kernel(const T* __restrict__ grad, const T* __restrict__ x, const float* __restrict__ bias,
                              T* __restrict__ grad_x, float* __restrict__ sums, int64_t P, int D, int64_t rows) {
  __shared__ float of_warp[kWarps][32 * n];
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int first = int(blockIdx.y) * 32 * n, d = first + lane * n;
  Floats<n> sum = {};
  if (d < D) {
    const Floats<n> b = load<n>(bias + d);
    const int64_t end = min(P, (int64_t(blockIdx.x) + 1) * rows);
#pragma unroll 2
    for (int64_t p = int64_t(blockIdx.x) * rows + warp; p < end; p += kWarps) {
      Floats<n> g = load<n>(grad + p * D + d);
      const Floats<n> z = load<n>(x + p * D + d);
#pragma unroll
      for (int j = 0; j < n; ++j) {
        g[j] *= gelu_slope(z[j] + b[j]);
        sum[j] += g[j];
      }
      store(grad_x + p * D + d, g);
    }
  }
#pragma unroll
  for (int j = 0; j < n; ++j) of_warp[warp][j * 32 + lane] = sum[j];
  __syncthreads();
  for (int i = int(threadIdx.x); i < 32 * n; i += kWarps * 32) {
    const int column = first + i % 32 * n + i / 32;
    if (column >= D) continue;
    float total = of_warp[0][i];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) total += of_warp[w][i];
    sums[int64_t(blockIdx.x) * D + column] = total;
  }
}

// call(T{}, width): the type, and as many elements as are read at once
template <typename Call>
void by_type(const Tensor& x, std::initializer_list<const void*> pointers, Call call) {
  by_dtype("bias_gelu", x.scalar_type(), [&](auto type) {
    using T = decltype(type);
    constexpr int n = 16 / sizeof(T);
    if (by_packs<T>(x.size(1), pointers)) call(type, std::integral_constant<int, n>());
    else call(type, std::integral_constant<int, 1>());
  });
}

}  // namespace

void bias_gelu(const Tensor& x, const Tensor& bias, Tensor out) {
  const int64_t P = x.size(0), D = x.size(1);
  STD_TORCH_CHECK(D < (int64_t(1) << 21), "bias_gelu: D must be below 2^21");
  const OnDevice device(x);
  by_type(x, {x.data_ptr(), bias.data_ptr(), out.data_ptr()}, [&](auto type, auto width) {
    using T = decltype(type);
    constexpr int n = decltype(width)::value;
    const dim3 grid(unsigned(ceil_div(P, kForwardRows)), unsigned(ceil_div(D, 32 * n)));
    launch(bias_gelu_kernel<T, n>, grid, kWarps * 32, 0, device.stream, static_cast<const T*>(x.data_ptr()), floats(bias),
           static_cast<T*>(out.data_ptr()), P, int(D));
  });
}

void bias_gelu_backward(const Tensor& grad, const Tensor& x, const Tensor& bias, Tensor grad_x, Tensor grad_bias) {
  const int64_t P = x.size(0), D = x.size(1), rows = std::max(kBackwardRows, ceil_div(P, kMostBlocks));
  const int64_t blocks = ceil_div(P, rows);
  STD_TORCH_CHECK(D < (int64_t(1) << 21), "bias_gelu: D must be below 2^21");
  const OnDevice device(x);
  Tensor scratch = torch::stable::new_empty(x, {blocks, D}, ScalarType::Float);
  float* sums = scratch.mutable_data_ptr<float>();
  by_type(x, {grad.data_ptr(), x.data_ptr(), bias.data_ptr(), grad_x.data_ptr()}, [&](auto type, auto width) {
    using T = decltype(type);
    constexpr int n = decltype(width)::value;
    launch(bias_gelu_backward_kernel<T, n>, dim3(unsigned(blocks), unsigned(ceil_div(D, 32 * n))), kWarps * 32, 0,
           device.stream, static_cast<const T*>(grad.data_ptr()), static_cast<const T*>(x.data_ptr()), floats(bias),
           static_cast<T*>(grad_x.data_ptr()), sums, P, int(D), rows);
  });
  column_sums(sums, grad_bias.mutable_data_ptr<float>(), blocks, D, device.stream);
}

}  // namespace jepa_fast::cuda

JEPA_FAST_CUDA(JEPA_FAST_CUDA_IMPL(bias_gelu) JEPA_FAST_CUDA_IMPL(bias_gelu_backward))
