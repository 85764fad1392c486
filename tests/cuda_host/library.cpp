// The raw ops of csrc/cuda for CPU tensors, in a library of their own.
#include "schemas.h"

STABLE_TORCH_LIBRARY(jepa_fast_cuda_host, m) { jepa_fast::define_ops(m); }
