// Copies from global to shared memory that a thread does not wait for (sm_80 and newer).
#pragma once

#include "common.cuh"

namespace jepa_fast::cuda {

// 8 bytes, both sides aligned to 8; zeros where there is nothing to read (`from` must be a valid address all the same)
__device__ inline void async_copy_8(void* shared, const void* from, bool is_there = true) {
#ifdef __CUDACC__
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;\n" ::"r"(unsigned(__cvta_generic_to_shared(shared))),
               "l"(from), "r"(is_there ? 8 : 0)
               : "memory");
#else
  cuda_host::async_copy(shared, from, is_there ? 8 : 0, is_there ? 0 : 8);
#endif
}

__device__ inline void async_copy_16(void* shared, const void* from, bool is_there = true) {  // 16, as above
#ifdef __CUDACC__
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(unsigned(__cvta_generic_to_shared(shared))),
               "l"(from), "r"(is_there ? 16 : 0)
               : "memory");
#else
  cuda_host::async_copy(shared, from, is_there ? 16 : 0, is_there ? 0 : 16);
#endif
}

__device__ inline void async_copy_commit() {  // what was copied since the last one is a group
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;\n" ::: "memory");
#else
  cuda_host::async_commit();
#endif
}

template <int groups_in_flight>  // waits for all groups of this thread but the last ones; a barrier shows it to others
__device__ inline void async_copy_wait() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;\n" ::"n"(groups_in_flight) : "memory");
#else
  cuda_host::async_wait(groups_in_flight);
#endif
}

}  // namespace jepa_fast::cuda
