// gelu(x + bias) in one pass over memory; its gradient, and the bias gradient, in a second one, which recomputes x + bias.
//
// With t = |z|:  Phi(-t) = exp(-t^2 / 2) R(t), and R(t) is a polynomial of (t - 1) / (t + 3), minimax by Lawson's
// iteration, relative error 1.1e-8 on [0, 15]. The small tail is what is computed, never 1 minus a number near 1, so
// that gelu keeps its relative accuracy (2e-7 for z > -2, 2e-6 everywhere) where 1 + erf(z / sqrt 2) cancels.
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

// exp(-t^2 / 2) for t in [0, kFarthest], 0 far below 2^-126: relative error at most 1e-7
inline Vec bell_of(Vec t) {
  constexpr float kHigh = 0.721347511f, kLow = 9.62981517e-09f;  // log2(e) / 2 in two floats
  const Vec square = t * t, lost = fma(t, t, -square);           // t^2 in two floats: the power magnifies the second
  Vec n = (square * -kHigh + kRounder) - kRounder;
  Vec f = fma(square, broadcast(-kHigh), -n);                    // in [-1/2, 1/2]
  f = fma(lost, broadcast(-kHigh), fma(square, broadcast(-kLow), f));
  Vec p = broadcast(1.53533616e-4f);                             // 2^f, minimax, exact at 0
  for (float c : {1.33988745e-3f, 9.61843736e-3f, 5.55033247e-2f, 2.40226479e-1f, 6.93147203e-1f, 1.f})
    p = fma(p, f, broadcast(c));
#if !defined(__AVX512F__)
  n = max(broadcast(-127.f), n);
#endif
  return times_power_of_2(p, n);
}

struct Normal { Vec cdf, bell; };  // Phi(z), exp(-z^2 / 2)

inline Normal normal(Vec z) {
  const Vec t = min(broadcast(kFarthest), (Vec)((UVec)z & 0x7fffffff));  // NaN stays NaN
  const Vec bell = bell_of(t), v = (t - 1.f) / (t + 3.f);
  Vec p = broadcast(0.00202506153f);
  for (float c : {-0.0031405562f, -0.005509806f, 0.00513168002f, 0.0280103775f, -0.0153880978f, -0.167504899f,
                  0.44425892f, -0.549455989f, 0.26157829f})
    p = fma(p, v, broadcast(c));
  const Vec tail = bell * p;
  const IVec is_positive = z > 0.f;
  return {(Vec)((is_positive & (IVec)(1.f - tail)) | (~is_positive & (IVec)tail)), bell};
}

inline Vec gelu(Vec z) { return z * normal(z).cdf; }

inline Vec gelu_slope(Vec z) {
  constexpr float kInverseSqrt2Pi = 0.398942280f;
  const Normal n = normal(z);
  return fma(z * kInverseSqrt2Pi, n.bell, n.cdf);
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
