// One pass over memory for a whole optimizer step: AdamW, the moving average of the new parameters, bfloat16 copies.
//
// 36 bytes per parameter with an average instead of about 100: every number is read once and written once.
// The arithmetic follows torch.optim.AdamW operation by operation, fused multiply-adds where PyTorch has them and
// nowhere else (setup.py compiles with -ffp-contract=off). Only the square root differs from PyTorch's, which is not
// always correctly rounded; this one is.
// Parameters, moments, averages float32; gradients float32 or bfloat16; shadows bfloat16; all contiguous.
#include "../common.h"
#include "../simd.h"
#include "../tensor_lists.h"

#include <cmath>
#include <optional>

namespace jepa_fast::CPU_CAPABILITY {
namespace {

Vec sqrt(Vec x) {
#if defined(__AVX512F__)
  return _mm512_maskz_sqrt_ps(0xffff, x);  // the unmasked one makes GCC 12 warn
#elif defined(__AVX2__)
  return _mm256_sqrt_ps(x);
#else
  for (int i = 0; i < kLanes; ++i) x[i] = std::sqrt(x[i]);
  return x;
#endif
}

struct Scalars {  // of one tensor, computed in float64 and rounded once, as PyTorch does
  Vec decay, lerp_coeff, beta2, one_minus_beta2, correction2, eps, step_size, keep, take, grad_scale;
  bool lerp_from_grad;  // PyTorch's lerp starts from the nearer end

  Scalars(double lr, double weight_decay, int64_t step, double beta1, double b2, double e, double momentum,
          float scale) {
    const float weight = float(1 - beta1);
    lerp_from_grad = std::fabs(weight) >= 0.5f;
    lerp_coeff = broadcast(lerp_from_grad ? weight - 1.f : weight);
    decay = broadcast(float(1 - lr * weight_decay));
    beta2 = broadcast(float(b2));
    one_minus_beta2 = broadcast(float(1 - b2));
    correction2 = broadcast(float(std::pow(1 - std::pow(b2, double(step)), 0.5)));
    eps = broadcast(float(e));
    step_size = broadcast(float(-(lr / (1 - std::pow(beta1, double(step))))));
    keep = broadcast(float(momentum));
    take = broadcast(float(1. - momentum));
    grad_scale = broadcast(scale);
  }
};

struct Values { Vec param, exp_avg, exp_avg_sq; };

inline Values adamw(Values x, Vec grad, const Scalars& s) {
  grad = grad * s.grad_scale;
  x.param = x.param * s.decay;
  x.exp_avg = fma(s.lerp_coeff, grad - x.exp_avg, s.lerp_from_grad ? grad : x.exp_avg);
  x.exp_avg_sq = fma(s.one_minus_beta2 * grad, grad, x.exp_avg_sq * s.beta2);
  const Vec denom = sqrt(x.exp_avg_sq) / s.correction2 + s.eps;
  x.param = x.param + s.step_size * x.exp_avg / denom;
  return x;
}

template <typename G>
struct Pointers {  // of one tensor; average and shadows may be null
  float *param, *exp_avg, *exp_avg_sq, *average;
  bf16 *shadow, *average_shadow;
  const G* grad;
};

struct Whole {
  template <typename T> Vec get(const T* p) const { return load(p); }
  template <typename T> void put(T* p, Vec v) const { store(p, v); }
};
struct Part {  // the last n lanes of a tensor
  int n;
  template <typename T> Vec get(const T* p) const { return load_partial(p, n); }
  template <typename T> void put(T* p, Vec v) const { store_partial(p, v, n); }
};

template <bool kAverage, typename G, typename Lanes>
inline void update_lanes(const Pointers<G>& t, int64_t i, const Scalars& s, Lanes lanes) {
  const Values old = {lanes.get(t.param + i), lanes.get(t.exp_avg + i), lanes.get(t.exp_avg_sq + i)};
  const Values x = adamw(old, lanes.get(t.grad + i), s);
  lanes.put(t.param + i, x.param);
  lanes.put(t.exp_avg + i, x.exp_avg);
  lanes.put(t.exp_avg_sq + i, x.exp_avg_sq);
  if (t.shadow) lanes.put(t.shadow + i, x.param);
  if constexpr (kAverage) {
    const Vec average = lanes.get(t.average + i) * s.keep + x.param * s.take;
    lanes.put(t.average + i, average);
    if (t.average_shadow) lanes.put(t.average_shadow + i, average);
  }
}

template <bool kAverage, typename G>
void update(const Pointers<G>& t, int64_t begin, int64_t end, const Scalars& s) {
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) update_lanes<kAverage>(t, i, s, Whole{});
  if (i < end) update_lanes<kAverage>(t, i, s, Part{int(end - i)});
}

template <typename T>
T* pointer(const std::vector<Tensor>& list, size_t i) {
  return i < list.size() ? static_cast<T*>(list[i].data_ptr()) : nullptr;
}

}  // namespace

void adamw_ema_(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avg,
                std::vector<Tensor> exp_avg_sq, std::vector<Tensor> average, std::vector<Tensor> shadow,
                std::vector<Tensor> average_shadow, std::vector<double> lr, std::vector<double> weight_decay,
                std::vector<int64_t> step, double beta1, double beta2, double eps, double momentum,
                std::optional<Tensor> grad_scale) {
  const float* scales = grad_scale ? floats(*grad_scale) : nullptr;
  const bool scale_each = grad_scale && grad_scale->dim() == 1;
  std::vector<int64_t> sizes, bytes;
  std::vector<Scalars> scalars;
  std::vector<Pointers<float>> pointers;
  std::vector<const bf16*> half_grads;
  for (size_t i = 0; i < params.size(); ++i) {
    const bool is_half = grads[i].scalar_type() == ScalarType::BFloat16;
    sizes.push_back(params[i].numel());
    bytes.push_back((is_half ? 26 : 28) + (i < average.size() ? 8 : 0));
    scalars.emplace_back(lr[i], weight_decay[i], step[i], beta1, beta2, eps, momentum,
                         scales ? scales[scale_each ? i : 0] : 1.f);
    pointers.push_back({pointer<float>(params, i), pointer<float>(exp_avg, i), pointer<float>(exp_avg_sq, i),
                        pointer<float>(average, i), pointer<bf16>(shadow, i), pointer<bf16>(average_shadow, i),
                        is_half ? nullptr : pointer<const float>(grads, i)});
    half_grads.push_back(is_half ? pointer<const bf16>(grads, i) : nullptr);
  }
  parallel_for_lists(sizes, bytes, [&](size_t i, int64_t begin, int64_t end) {
    const auto run = [&](auto t) {
      if (t.average) update<true>(t, begin, end, scalars[i]);
      else update<false>(t, begin, end, scalars[i]);
    };
    const auto& p = pointers[i];
    if (half_grads[i])
      run(Pointers<bf16>{p.param, p.exp_avg, p.exp_avg_sq, p.average, p.shadow, p.average_shadow, half_grads[i]});
    else run(p);
  });
}

}  // namespace jepa_fast::CPU_CAPABILITY

JEPA_FAST_CPU(JEPA_FAST_IMPL(adamw_ema_))
