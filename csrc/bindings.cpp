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
  m.def("sigreg_add_sums(Tensor p, Tensor? row_mask, float t_start, float t_step, Tensor(a!) sums) -> ()");
  m.def("sigreg_gradient_(Tensor(a!) p, Tensor? row_mask, Tensor grad_sums, float t_start, float t_step) -> ()");
  m.def("sigreg_statistic(Tensor sums, Tensor count, Tensor knots, Tensor(a!) out) -> ()");
  m.def("sigreg_statistic_backward(Tensor grad, Tensor sums, Tensor count, Tensor knots, Tensor(a!) out) -> ()");
  m.def("directions(Tensor step, int seed, Tensor(a!) out) -> ()");
  m.def("philox_words(Tensor step, int seed, int first, Tensor(a!) words) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(jepa_fast_C, CPU, m) {
  m.impl("capability_lanes", TORCH_BOX(&jepa_fast::capability_lanes));
}
