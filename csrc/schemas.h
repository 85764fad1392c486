// The raw schemas of the compiled ops, the same for C++ and CUDA. Python owns the public ones (jepa_fast/ops); these are
// called by them, with arguments already checked and contiguous where the comment in the kernel file says so.
#pragma once

#include "common.h"

namespace jepa_fast {

template <typename Library>
void define_ops(Library& m) {
  m.def("gather_tokens(Tensor x, Tensor index, Tensor? positions, Tensor? position_index, Tensor(a!) out) -> ()");
  m.def("scatter_tokens(Tensor values, Tensor index, Tensor? fill, Tensor? positions, Tensor(a!) out) -> ()");
  m.def("gather_patches(Tensor pixels, Tensor? index, int p_t, int p_h, int p_w, Tensor(a!) out) -> ()");
  m.def("scatter_patches(Tensor patches, Tensor? index, int p_t, int p_h, int p_w, Tensor(a!) out) -> ()");
  m.def("crop_resize(Tensor images, Tensor? layout, Tensor boxes, Tensor image_index, Tensor? flips, Tensor? mean, "
        "Tensor? std, Tensor(a!) out) -> ()");
  // q, k, v, out, gradients [P, H, d], last dimension contiguous; lse [H, P] float32; cu_seqlens int32 on the CPU
  m.def("varlen_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, float scale, "
        "Tensor(a!) out, Tensor(b!) lse) -> ()");
  m.def("varlen_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
        "Tensor cu_seqlens_q, Tensor cu_seqlens_k, float scale, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv) -> ()");
  // the same in CUDA: cu_seqlens on the device, rotary [P, 2, R] float32; delta [H, P] float32 is scratch
  m.def("varlen_attention_cuda(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? rotary_q, "
        "Tensor? rotary_k, int max_seqlen_q, int max_seqlen_k, float scale, int frame_size, Tensor(a!) out, "
        "Tensor(b!) lse) -> ()");
  m.def("varlen_attention_backward_cuda(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
        "Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? rotary_q, Tensor? rotary_k, bool is_turned, int max_seqlen_q, "
        "int max_seqlen_k, float scale, int frame_size, Tensor(a!) delta, Tensor(b!) dq, Tensor(c!) dk, Tensor(d!) dv) "
        "-> ()");
  m.def("rotate_heads(Tensor x, Tensor rotary, Tensor(a!) out) -> ()");
  m.def("ema_update_(Tensor(a!)[] target, Tensor[] source, float momentum) -> ()");
  m.def("adamw_ema_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, "
        "Tensor(d!)[] average, Tensor(e!)[] shadow, Tensor(f!)[] average_shadow, float[] lr, float[] weight_decay, "
        "int[] step, float beta1, float beta2, float eps, float momentum, Tensor? grad_scale) -> ()");
  // CUDA only: what changes from step to step comes from a tensor, [len(params), 5], see csrc/cuda/adamw_ema.cu
  m.def("adamw_ema_scalars_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, "
        "Tensor(d!)[] average, Tensor(e!)[] shadow, Tensor(f!)[] average_shadow, Tensor scalars, float beta1, "
        "float beta2, float eps, Tensor? grad_scale) -> ()");
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
  // CPU only; false: out of range, and out is not valid, see csrc/cpu/matmul.cpp
  m.def("has_amx(Tensor any) -> bool");
  m.def("matmul(Tensor a, Tensor b, Tensor? bias, Tensor(a!) out) -> bool");
  // CUDA only, as what follows: rows [P, D]; residual and summed, grad_summed and grad_x are of the stream, see
  // csrc/cuda/layer_norm.cu
  m.def("layer_norm(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, Tensor(a!) out, "
        "Tensor(b!)? summed, Tensor(c!) mean, Tensor(d!) rstd) -> ()");
  m.def("layer_norm_backward(Tensor grad, Tensor? grad_summed, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, "
        "Tensor(a!) grad_x, Tensor(b!)? grad_branch, Tensor(c!)? grad_affine) -> ()");
  m.def("assemble_predictor_input(Tensor context, Tensor mask_token, Tensor index, Tensor positions, "
        "Tensor position_index, Tensor(a!) out) -> ()");
  m.def("assemble_predictor_input_backward(Tensor grad, Tensor index, Tensor(a!) grad_context, "
        "Tensor(b!) grad_mask_token) -> ()");
}

}  // namespace jepa_fast
