// What every CPU kernel file needs: the stable-ABI tensor, the thread pool, and the choice of instruction set.
//
// Each csrc/cpu/<op>.cpp is compiled once per instruction set (setup.py) into its own namespace CPU_CAPABILITY.
// All of them register; only the one that this machine can run best does so for real, when the library is loaded.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

namespace jepa_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// "default", "avx2" or "avx512"; PyTorch's own ATEN_CPU_CAPABILITY lowers it, as it does for PyTorch's kernels
const std::string& selected_capability();

inline bool is_selected(const char* unit) { return selected_capability() + "_isa" == unit; }

inline const float* floats(const Tensor& t) { return t.const_data_ptr<float>(); }

}  // namespace jepa_fast

#define JEPA_FAST_STRING_(x) #x
#define JEPA_FAST_STRING(x) JEPA_FAST_STRING_(x)

// JEPA_FAST_CPU(gather_tokens) registers CPU_CAPABILITY::gather_tokens as jepa_fast_C::gather_tokens
#define JEPA_FAST_CPU(...)                                                               \
  STABLE_TORCH_LIBRARY_IMPL(jepa_fast_C, CPU, m) {                                       \
    if (jepa_fast::is_selected(JEPA_FAST_STRING(CPU_CAPABILITY))) { __VA_ARGS__ }         \
  }
#define JEPA_FAST_IMPL(name) m.impl(#name, TORCH_BOX(&jepa_fast::CPU_CAPABILITY::name));
