// The raw schemas of the compiled ops. Python owns the public ones (jepa_fast/ops); these are called by them, with
// arguments already checked and contiguous where the comment in the kernel file says so.
#include "common.h"

#include <cstdlib>

namespace jepa_fast {
namespace {

std::string choose_capability() {
  std::string best = "default";
#if defined(__x86_64__) && defined(__GNUC__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = "avx2";
  if (best == "avx2" && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    best = "avx512";
  if (const char* asked = std::getenv("ATEN_CPU_CAPABILITY")) {
    const std::string name = asked;
    if (name == "default" || (name == "avx2" && best == "avx512")) best = name;
  }
#endif
  return best;
}

}  // namespace

const std::string& selected_capability() {
  static const std::string name = choose_capability();
  return name;
}

int64_t capability_lanes(const Tensor&) {
  const auto& name = selected_capability();
  return name == "avx512" ? 16 : name == "avx2" ? 8 : 4;
}

}  // namespace jepa_fast

STABLE_TORCH_LIBRARY(jepa_fast_C, m) {
  // floats per vector of the chosen instruction set: 4, 8 or 16
  m.def("capability_lanes(Tensor any) -> int");
  m.def("gather_tokens(Tensor x, Tensor index, Tensor? positions, Tensor? position_index, Tensor(a!) out) -> ()");
  m.def("scatter_tokens(Tensor values, Tensor index, Tensor? fill, Tensor? positions, Tensor(a!) out) -> ()");
  m.def("gather_patches(Tensor pixels, Tensor? index, int p_t, int p_h, int p_w, Tensor(a!) out) -> ()");
  m.def("scatter_patches(Tensor patches, Tensor? index, int p_t, int p_h, int p_w, Tensor(a!) out) -> ()");
  // q, k, v, out, gradients [P, H, d], last dimension contiguous; lse [H, P] float32; cu_seqlens int32 on the CPU
  m.def("varlen_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, float scale, "
        "Tensor(a!) out, Tensor(b!) lse) -> ()");
  m.def("varlen_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
        "Tensor cu_seqlens_q, Tensor cu_seqlens_k, float scale, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv) -> ()");
  m.def("ema_update_(Tensor(a!)[] target, Tensor[] source, float momentum) -> ()");
  m.def("adamw_ema_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, "
        "Tensor(d!)[] average, Tensor(e!)[] shadow, Tensor(f!)[] average_shadow, float[] lr, float[] weight_decay, "
        "int[] step, float beta1, float beta2, float eps, float momentum, Tensor? grad_scale) -> ()");
  m.def("latent_loss(Tensor prediction, Tensor target, Tensor? target_idx, Tensor? weight, float beta, float eps, "
        "Tensor(a!) loss, Tensor(b!) stats, Tensor(c!) mean, Tensor(d!) rstd) -> ()");
  m.def("latent_loss_backward(Tensor grad_loss, Tensor prediction, Tensor target, Tensor? target_idx, Tensor? weight, "
        "Tensor mean, Tensor rstd, float beta, Tensor(a!) out) -> ()");
  m.def("sigreg_add_sums(Tensor p, Tensor? row_mask, float t_start, float t_step, Tensor(a!) sums) -> ()");
  m.def("sigreg_gradient_(Tensor(a!) p, Tensor? row_mask, Tensor grad_sums, float t_start, float t_step) -> ()");
  m.def("sigreg_statistic(Tensor sums, Tensor count, Tensor knots, Tensor(a!) out) -> ()");
  m.def("sigreg_statistic_backward(Tensor grad, Tensor sums, Tensor count, Tensor knots, Tensor(a!) out) -> ()");
  m.def("directions(Tensor step, int seed, Tensor(a!) out) -> ()");
  m.def("philox_words(Tensor step, int seed, int first, Tensor(a!) words) -> ()");
  m.def("bias_gelu(Tensor x, Tensor bias, Tensor(a!) out) -> ()");
  m.def("bias_gelu_backward(Tensor grad, Tensor x, Tensor bias, Tensor(a!) grad_x, Tensor(b!) grad_bias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(jepa_fast_C, CPU, m) {
  m.impl("capability_lanes", TORCH_BOX(&jepa_fast::capability_lanes));
}
