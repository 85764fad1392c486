// What every CUDA kernel file needs: the stable-ABI tensor, its device and stream, launches, number types, packs of 16
// bytes.
//
// The same files compile as plain C++ for the host, against tests/cuda_host/include: what differs stands behind
// __CUDACC__, here, in async_copy.cuh, exp2.cuh and mma.cuh only.
#pragma once

#include "../common.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include <initializer_list>
#include <optional>
#include <type_traits>

#ifndef JEPA_FAST_CUDA_LIBRARY
#define JEPA_FAST_CUDA_LIBRARY jepa_fast_C
#define JEPA_FAST_CUDA_KEY CUDA
#endif

// JEPA_FAST_CUDA(JEPA_FAST_CUDA_IMPL(gather_tokens)) registers cuda::gather_tokens as jepa_fast_C::gather_tokens
#define JEPA_FAST_CUDA(...) \
  STABLE_TORCH_LIBRARY_IMPL(JEPA_FAST_CUDA_LIBRARY, JEPA_FAST_CUDA_KEY, m) { __VA_ARGS__ }
#define JEPA_FAST_CUDA_IMPL(name) m.impl(#name, TORCH_BOX(&jepa_fast::cuda::name));

#ifdef __CUDACC__
// in libtorch_cuda, which a CPU build of PyTorch does not have
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);
#endif

namespace jepa_fast::cuda {

using bf16 = __nv_bfloat16;
using half = __half;

inline void check(cudaError_t error) { STD_TORCH_CHECK(error == cudaSuccess, "CUDA: ", cudaGetErrorString(error)); }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The device of a tensor is the current one as long as this lives; `stream` is the current stream there
#ifdef __CUDACC__
struct OnDevice {
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;

  explicit OnDevice(const Tensor& t) : guard(t.get_device_index()) {
    void* current = nullptr;
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream &&
                        aoti_torch_get_current_cuda_stream(t.get_device_index(), &current) == 0,
                    "CUDA: no current stream");
    stream = static_cast<cudaStream_t>(current);
  }
};
#else
struct OnDevice {
  cudaStream_t stream = nullptr;
  explicit OnDevice(const Tensor&) {}
};
#endif

// kernel<<<grid, block, shared_bytes, stream>>>(args...), checked; an empty grid is no launch
template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
            const Args&... args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (shared_bytes > (48 << 10))
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)));
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...));
}

// call(T{}) for the type T of the elements
template <typename Call>
void by_dtype(const char* name, ScalarType dtype, Call call) {
  switch (dtype) {
    case ScalarType::Float: return call(float{});
    case ScalarType::BFloat16: return call(bf16{});
    case ScalarType::Half: return call(half{});
    default: STD_TORCH_CHECK(false, name, ": float32, bfloat16 or float16 expected");
  }
}

inline bool is_aligned(const void* p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

// rows of D values that begin at these addresses can be read and written by 16 bytes of T
template <typename T>
bool by_packs(int64_t D, std::initializer_list<const void*> pointers) {
  bool all = D % (16 / sizeof(T)) == 0;
  for (const void* p : pointers) all = all && is_aligned(p, 16);
  return all;
}

// call(width) with as many values as are read at once from rows of D values in types A and B that begin at these addresses
template <typename A, typename B, typename Call>
void by_width(int64_t D, std::initializer_list<const void*> pointers, Call call) {
  using Wider = std::conditional_t<(sizeof(A) > sizeof(B)), A, B>;
  if (by_packs<Wider>(D, pointers)) call(std::integral_constant<int, 16 / sizeof(Wider)>());
  else call(std::integral_constant<int, 1>());
}

template <typename T>
T* pointer(const std::optional<Tensor>& t) { return t ? static_cast<T*>(t->data_ptr()) : nullptr; }

// ---- on the device

template <typename T>
__device__ T* shared_memory() {  // what the launch asked for, aligned to 16 bytes
#ifdef __CUDACC__
  extern __shared__ __align__(16) unsigned char memory[];
  return reinterpret_cast<T*>(memory);
#else
  return reinterpret_cast<T*>(cuda_host::shared_memory());
#endif
}

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16 x) { return __bfloat162float(x); }
__device__ inline float to_float(half x) { return __half2float(x); }
__device__ inline void from_float(float* p, float x) { *p = x; }
__device__ inline void from_float(bf16* p, float x) { *p = __float2bfloat16_rn(x); }
__device__ inline void from_float(half* p, float x) { *p = __float2half_rn(x); }

template <typename T>
__device__ inline float rounded(float x) {  // to the precision of T
  T y;
  from_float(&y, x);
  return to_float(y);
}

template <typename T, int n>
struct alignas(n * sizeof(T) < 16 ? n * sizeof(T) : 16) Pack {  // n values that are loaded and stored at once
  T value[n];
};
template <int n>
struct Floats {
  float value[n];
  __device__ float& operator[](int i) { return value[i]; }
  __device__ const float& operator[](int i) const { return value[i]; }
};

template <int n, typename T>
__device__ inline Floats<n> load(const T* p) {  // n values, widened; p is aligned as Pack<T, n>
  const auto pack = *reinterpret_cast<const Pack<T, n>*>(p);
  Floats<n> x;
#pragma unroll
  for (int i = 0; i < n; ++i) x[i] = to_float(pack.value[i]);
  return x;
}
template <int n, typename T>
__device__ inline void store(T* p, const Floats<n>& x) {
  Pack<T, n> pack;
#pragma unroll
  for (int i = 0; i < n; ++i) from_float(&pack.value[i], x[i]);
  *reinterpret_cast<Pack<T, n>*>(p) = pack;
}

constexpr unsigned kAllLanes = 0xffffffff;

template <typename T>
__device__ inline T warp_sum(T x) {  // the same bits in every lane
#pragma unroll
  for (int d = 16; d; d /= 2) x += __shfl_xor_sync(kAllLanes, x, d);
  return x;
}

}  // namespace jepa_fast::cuda
