// What only an extension with CUDA kernels has.
#include "../common.h"

namespace jepa_fast {

std::string cuda_architectures(const Tensor&) { return JEPA_FAST_CUDA_ARCHITECTURES; }

}  // namespace jepa_fast

STABLE_TORCH_LIBRARY_FRAGMENT(jepa_fast_C, m) {
  // what the kernels were compiled for: "80;90a;100a"
  m.def("cuda_architectures(Tensor any) -> str");
}
STABLE_TORCH_LIBRARY_IMPL(jepa_fast_C, CPU, m) {
  m.impl("cuda_architectures", TORCH_BOX(&jepa_fast::cuda_architectures));
}
STABLE_TORCH_LIBRARY_IMPL(jepa_fast_C, CUDA, m) {
  m.impl("cuda_architectures", TORCH_BOX(&jepa_fast::cuda_architectures));
}
