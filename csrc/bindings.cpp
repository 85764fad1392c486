// The library of compiled ops, and the choice of instruction set for those on the CPU.
#include "schemas.h"

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
  jepa_fast::define_ops(m);
}

STABLE_TORCH_LIBRARY_IMPL(jepa_fast_C, CPU, m) {
  m.impl("capability_lanes", TORCH_BOX(&jepa_fast::capability_lanes));
}
