// A whole optimizer step in one launch and one pass over memory: AdamW, the moving average of the new parameters,
// bfloat16 copies.
//
// Every number is read once and written once. The arithmetic is that of csrc/cpu/adamw_ema.cpp operation by operation,
// fused multiply-adds where it has them and nowhere else, so both give the same bits. Bytes: 36 per parameter with an
// average (28 without; 2 less for a 16-bit gradient, 2 more per shadow); FLOPs: 20, nothing. vith14 (631 M parameters,
// float32, average): 22.7 GB, 5280 us at 4.3 TB/s.
//
// What changes from step to step is in the launch (`adamw_ema_`), or in one small tensor on the device that the kernel
// reads (`adamw_ema_scalars_`): a CUDA graph that captured the latter replays it with whatever the tensor holds by then.
// Parameters, moments, averages float32; gradients float32, bfloat16 or float16; shadows bfloat16; all contiguous.
#include "tensor_lists.cuh"

#include <cmath>

namespace jepa_fast::cuda {
namespace {

struct Changing {  // scalars of one tensor that change from step to step; a row of the tensor on the device
  float decay, step_size, correction2, keep, take;
};

struct Entry {  // one tensor; average and shadows may be null
  float *param, *exp_avg, *exp_avg_sq, *average;
  bf16 *shadow, *average_shadow;
  const void* grad;
  int64_t size;
  float decay, step_size, correction2;
  ScalarType grad_dtype;
  bool by_fours;
};

struct Scalars {
  const Changing* changing;  // one per tensor, or null: as in the entries and below
  const float* grad_scale;   // one for all, one per tensor, or null
  float keep, take, lerp, beta2, one_minus_beta2, eps;
  bool scale_each, lerp_from_grad;  // PyTorch's lerp starts from the nearer end
};

template <int n>
__device__ inline void adamw(Floats<n>& param, Floats<n>& exp_avg, Floats<n>& exp_avg_sq, const Floats<n>& grads,
                             float scale, const Changing& c, const Scalars& s) {
#pragma unroll
  for (int j = 0; j < n; ++j) {
    const float grad = __fmul_rn(grads[j], scale), m = exp_avg[j];
    exp_avg[j] = __fmaf_rn(s.lerp, __fsub_rn(grad, m), s.lerp_from_grad ? grad : m);
    exp_avg_sq[j] = __fmaf_rn(__fmul_rn(s.one_minus_beta2, grad), grad, __fmul_rn(exp_avg_sq[j], s.beta2));
    const float denom = __fadd_rn(__fdiv_rn(__fsqrt_rn(exp_avg_sq[j]), c.correction2), s.eps);
    const float step = __fdiv_rn(__fmul_rn(c.step_size, exp_avg[j]), denom);
    param[j] = __fadd_rn(__fmul_rn(param[j], c.decay), step);
  }
}

template <typename G>
__device__ void update(const Batch<Entry, Scalars>& batch, int e) {
  const Scalars& s = batch.scalars;
  const Entry& t = batch.entries[e];
  const int place = batch.first + e;
  const Changing c = s.changing ? s.changing[place] : Changing{t.decay, t.step_size, t.correction2, s.keep, s.take};
  const float scale = s.grad_scale ? s.grad_scale[s.scale_each ? place : 0] : 1.f;
  for_each_in_chunk(batch, e, t.by_fours, [&](int64_t i, auto width) {
    constexpr int n = decltype(width)::value;
    Floats<n> param = load<n>(t.param + i), exp_avg = load<n>(t.exp_avg + i), exp_avg_sq = load<n>(t.exp_avg_sq + i);
    adamw(param, exp_avg, exp_avg_sq, load<n>(static_cast<const G*>(t.grad) + i), scale, c, s);
    store(t.param + i, param);
    store(t.exp_avg + i, exp_avg);
    store(t.exp_avg_sq + i, exp_avg_sq);
    if (t.shadow) store(t.shadow + i, param);
    if (t.average) {
      Floats<n> average = load<n>(t.average + i);
#pragma unroll
      for (int j = 0; j < n; ++j) average[j] = __fadd_rn(__fmul_rn(average[j], c.keep), __fmul_rn(param[j], c.take));
      store(t.average + i, average);
      if (t.average_shadow) store(t.average_shadow + i, average);
    }
  });
}

__global__ void __launch_bounds__(kListThreads) adamw_ema_kernel(const __grid_constant__ Batch<Entry, Scalars> batch) {
  const int e = entry_of_block(batch);
  switch (batch.entries[e].grad_dtype) {
    case ScalarType::BFloat16: return update<bf16>(batch, e);
    case ScalarType::Half: return update<half>(batch, e);
    default: return update<float>(batch, e);
  }
}

template <typename T>
T* pointer(const std::vector<Tensor>& list, size_t i) {
  return i < list.size() ? static_cast<T*>(list[i].data_ptr()) : nullptr;
}

std::vector<Entry> entries_of(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
                              const std::vector<Tensor>& exp_avg, const std::vector<Tensor>& exp_avg_sq,
                              const std::vector<Tensor>& average, const std::vector<Tensor>& shadow,
                              const std::vector<Tensor>& average_shadow) {
  std::vector<Entry> entries;
  for (size_t i = 0; i < params.size(); ++i) {
    const auto dtype = grads[i].scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                    "adamw_ema_: gradients must be float32, bfloat16 or float16");
    Entry t{pointer<float>(params, i), pointer<float>(exp_avg, i), pointer<float>(exp_avg_sq, i),
            pointer<float>(average, i), pointer<bf16>(shadow, i), pointer<bf16>(average_shadow, i), grads[i].data_ptr(),
            params[i].numel(), 0, 0, 0, dtype, true};
    for (const void* p : {t.param, t.exp_avg, t.exp_avg_sq, t.average}) t.by_fours = t.by_fours && is_aligned(p, 16);
    for (const void* p : {t.shadow, t.average_shadow}) t.by_fours = t.by_fours && is_aligned(p, 8);
    t.by_fours = t.by_fours && is_aligned(t.grad, 4 * grads[i].element_size());
    entries.push_back(t);
  }
  return entries;
}

Scalars scalars_of(double beta1, double beta2, double eps, const std::optional<Tensor>& grad_scale) {
  const float weight = float(1 - beta1);
  Scalars s{};
  s.lerp_from_grad = std::fabs(weight) >= 0.5f;
  s.lerp = s.lerp_from_grad ? weight - 1.f : weight;
  s.beta2 = float(beta2);
  s.one_minus_beta2 = float(1 - beta2);
  s.eps = float(eps);
  s.grad_scale = cuda::pointer<const float>(grad_scale);
  s.scale_each = grad_scale && grad_scale->dim() == 1;
  return s;
}

}  // namespace

void adamw_ema_(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avg,
                std::vector<Tensor> exp_avg_sq, std::vector<Tensor> average, std::vector<Tensor> shadow,
                std::vector<Tensor> average_shadow, std::vector<double> lr, std::vector<double> weight_decay,
                std::vector<int64_t> step, double beta1, double beta2, double eps, double momentum,
                std::optional<Tensor> grad_scale) {
  auto entries = entries_of(params, grads, exp_avg, exp_avg_sq, average, shadow, average_shadow);
  for (size_t i = 0; i < entries.size(); ++i) {  // in float64 and rounded once, as PyTorch does
    entries[i].decay = float(1 - lr[i] * weight_decay[i]);
    entries[i].step_size = float(-(lr[i] / (1 - std::pow(beta1, double(step[i])))));
    entries[i].correction2 = float(std::pow(1 - std::pow(beta2, double(step[i])), 0.5));
  }
  Scalars s = scalars_of(beta1, beta2, eps, grad_scale);
  s.keep = float(momentum);
  s.take = float(1. - momentum);
  const OnDevice device(params[0]);
  launch_over_lists(adamw_ema_kernel, entries, s, device.stream);
}

// scalars [len(params), 5] float32 on the device: decay, step_size, correction2, keep, take
void adamw_ema_scalars_(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> exp_avg,
                        std::vector<Tensor> exp_avg_sq, std::vector<Tensor> average, std::vector<Tensor> shadow,
                        std::vector<Tensor> average_shadow, const Tensor& scalars, double beta1, double beta2, double eps,
                        std::optional<Tensor> grad_scale) {
  const auto entries = entries_of(params, grads, exp_avg, exp_avg_sq, average, shadow, average_shadow);
  Scalars s = scalars_of(beta1, beta2, eps, grad_scale);
  s.changing = reinterpret_cast<const Changing*>(scalars.data_ptr());
  const OnDevice device(params[0]);
  launch_over_lists(adamw_ema_kernel, entries, s, device.stream);
}

}  // namespace jepa_fast::cuda

JEPA_FAST_CUDA(JEPA_FAST_CUDA_IMPL(adamw_ema_) JEPA_FAST_CUDA_IMPL(adamw_ema_scalars_))
