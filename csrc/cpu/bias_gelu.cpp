// gelu(x + bias) in one pass over memory; its gradient, and the bias gradient, in a second one, which recomputes x + bias.
//
// With t = |z|:  Phi(-t) = exp(-t^2 / 2) R(t), and R(t) is a polynomial of (t - 1) / (t + 3), minimax by Lawson's
// iteration, relative error 1.1e-8 on [0, 15]. The small tail is what is computed, never 1 minus a number near 1, so
// that gelu keeps its relative accuracy (4e-7 for z > -2, 1e-5 everywhere) where 1 + erf(z / sqrt 2) cancels. As with
// PyTorch's vectors, infinity gives NaN.
// The bias gradient is summed in float32 over kBlockRows rows and in double over the blocks, in their order: the result
// does not depend on the number of threads.
// x, grad, out, grad_x [P, D] float32 or bfloat16, bias, grad_bias [D] float32, all contiguous.
#include "../common.h"
#include "../simd.h"

#include <algorithm>
#include <memory>

namespace jepa_fast::CPU_CAPABILITY {
namespace {

constexpr int64_t kGrainElements = 1 << 13;  // work below this is not worth another thread
constexpr int64_t kBlockRows = 32;           // rows summed in float32
constexpr float kFarthest = 15.f;            // Phi(-15) < 2^-150

int64_t grain(int64_t elements) { return std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, elements)); }

inline Vec bell_of(Vec t) {  // exp(-t^2 / 2) for t in [0, kFarthest], 0 far below 2^-126
  constexpr float kHalfLog2e = 0.721347511f;
  const Vec square = t * t;
  Vec n = round_nearest(square * -kHalfLog2e);
  const Vec f = fma(square, broadcast(-kHalfLog2e), -n);  // in [-1/2, 1/2]
  Vec p = broadcast(1.53533616e-4f);                      // 2^f, minimax, exact at 0
  for (float c : {1.33988745e-3f, 9.61843736e-3f, 5.55033247e-2f, 2.40226479e-1f, 6.93147203e-1f, 1.f})
    p = fma(p, f, broadcast(c));
#if !defined(__AVX512F__)
  n = max(broadcast(-127.f), n);
#endif
  return times_power_of_2(p, n);
}

inline Vec ratio_of(Vec t) {  // R(t) for t in [0, kFarthest]
  const Vec v = (t - 1.f) / (t + 3.f);
  const Vec v2 = v * v;
  Vec odd = broadcast(0.00202506153f), even = broadcast(-0.0031405562f);  // two chains are shorter than one
  for (float c : {-0.005509806f, 0.0280103775f, -0.167504899f, -0.549455989f}) odd = fma(odd, v2, broadcast(c));
  for (float c : {0.00513168002f, -0.0153880978f, 0.44425892f, 0.26157829f}) even = fma(even, v2, broadcast(c));
  return fma(odd, v, even);
}

inline Vec magnitude(Vec z) { return (Vec)((UVec)z & 0x7fffffff); }

inline Vec gelu(Vec z) {  // max(z, 0) - |z| Phi(-|z|)
  const Vec t = min(broadcast(kFarthest), magnitude(z));  // NaN stays NaN
  return fma(-magnitude(z), bell_of(t) * ratio_of(t), max(z, Vec{}));
}

inline Vec gelu_slope(Vec z) {  // s = |z| phi(z) - Phi(-|z|) where z <= 0 with the other sign, and 1 + s beyond
  constexpr float kInverseSqrt2Pi = 0.398942280f;
  const Vec t = min(broadcast(kFarthest), magnitude(z));
  const Vec s = bell_of(t) * fma(magnitude(z), broadcast(kInverseSqrt2Pi), -ratio_of(t));
  const IVec is_positive = z > 0.f;
  return (Vec)((UVec)s ^ (~(UVec)is_positive & 0x80000000u)) + (Vec)(is_positive & (IVec)broadcast(1.f));
}

template <typename T>
void forward(const Tensor& x, const float* bias, Tensor& out) {
  const int64_t D = x.size(1);
  const auto* src = static_cast<const T*>(x.data_ptr());
  auto* dst = static_cast<T*>(out.data_ptr());
  torch::stable::parallel_for(0, x.size(0), grain(D), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {  // one token
      const T* row = src + p * D;
      T* result = dst + p * D;
      int64_t d = 0;
      for (; d + kLanes <= D; d += kLanes) store(result + d, gelu(load(row + d) + load(bias + d)));
      if (const int n = int(D - d)) store_partial(result + d, gelu(load_partial(row + d, n) + load_partial(bias + d, n)), n);
    }
  });
}

// sums [D] become, or grow by, the row of the gradient
template <typename T>
void backward_row(const T* grad, const T* x, const float* bias, T* grad_x, float* sums, bool is_first, int64_t D) {
  int64_t d = 0;
  for (; d + kLanes <= D; d += kLanes) {
    const Vec g = load(grad + d) * gelu_slope(load(x + d) + load(bias + d));
    store(grad_x + d, g);
    store(sums + d, is_first ? g : load(sums + d) + g);
  }
  if (const int n = int(D - d)) {
    const Vec g = load_partial(grad + d, n) * gelu_slope(load_partial(x + d, n) + load_partial(bias + d, n));
    store_partial(grad_x + d, g, n);
    store_partial(sums + d, is_first ? g : load_partial(sums + d, n) + g, n);
  }
}

template <typename T>
void backward(const Tensor& grad, const Tensor& x, const float* bias, Tensor& grad_x, float* grad_bias) {
  const int64_t P = x.size(0), D = x.size(1), blocks = (P + kBlockRows - 1) / kBlockRows;
  const auto* g = static_cast<const T*>(grad.data_ptr());
  const auto* src = static_cast<const T*>(x.data_ptr());
  auto* dst = static_cast<T*>(grad_x.data_ptr());
  const std::unique_ptr<float[]> sums(new float[blocks * D]);  // of each block
  torch::stable::parallel_for(0, blocks, grain(kBlockRows * D), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin * kBlockRows; p < std::min(P, end * kBlockRows); ++p)
      backward_row(g + p * D, src + p * D, bias, dst + p * D, sums.get() + (p / kBlockRows) * D, p % kBlockRows == 0, D);
  });
  torch::stable::parallel_for(0, D, grain(blocks), [&](int64_t begin, int64_t end) {
    std::vector<double> total(end - begin, 0.0);
    for (int64_t block = 0; block < blocks; ++block)
      for (int64_t d = begin; d < end; ++d) total[d - begin] += sums[block * D + d];
    for (int64_t d = begin; d < end; ++d) grad_bias[d] = float(total[d - begin]);
  });
}

}  // namespace

void bias_gelu(const Tensor& x, const Tensor& bias, Tensor out) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return forward<float>(x, floats(bias), out);
    case ScalarType::BFloat16: return forward<bf16>(x, floats(bias), out);
    default: STD_TORCH_CHECK(false, "bias_gelu: float32 or bfloat16 expected");
  }
}

void bias_gelu_backward(const Tensor& grad, const Tensor& x, const Tensor& bias, Tensor grad_x, Tensor grad_bias) {
  auto* sums = grad_bias.mutable_data_ptr<float>();
  switch (x.scalar_type()) {
    case ScalarType::Float: return backward<float>(grad, x, floats(bias), grad_x, sums);
    case ScalarType::BFloat16: return backward<bf16>(grad, x, floats(bias), grad_x, sums);
    default: STD_TORCH_CHECK(false, "bias_gelu: float32 or bfloat16 expected");
  }
}

}  // namespace jepa_fast::CPU_CAPABILITY

JEPA_FAST_CPU(JEPA_FAST_IMPL(bias_gelu) JEPA_FAST_IMPL(bias_gelu_backward))
