// CUDA's language and run time, as far as csrc/cuda uses them, for a C++ compiler: kernels are executed on the host.
//
// The threads of a block are fibers, run in turn; blocks run one after the other, in no monotone order. See emulator.cpp
// for what is checked. Where an instruction involves a whole warp, its lanes meet in `exchange`.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#define CUDART_VERSION 13000
#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ static __attribute__((section("cuda_shared")))  // filled with NaN before each block

#define CUDA_HOST_WHERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

struct uint3 { unsigned x, y, z; };
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
#define CUDA_HOST_VECTORS(T, name)                                                  \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };                                \
  struct name##3 { T x, y, z; };                                                    \
  struct alignas(sizeof(T) < 8 ? 4 * sizeof(T) : 16) name##4 { T x, y, z, w; };     \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                        \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
CUDA_HOST_VECTORS(float, float)
CUDA_HOST_VECTORS(double, double)
CUDA_HOST_VECTORS(int, int)
CUDA_HOST_VECTORS(long long, longlong)
CUDA_HOST_VECTORS(unsigned short, ushort)
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace cuda_host {

void launch(dim3 grid, dim3 block, size_t shared_bytes, size_t shared_limit, const std::function<void()>& thread);
unsigned char* shared_memory();
int lane();
// waits for all threads of the block; the number of those with `predicate`
int barrier(bool predicate, const char* what, const char* file, int line);

constexpr int kSlotBytes = 256;
// waits for all lanes of `mask`; what each of them brought, at kSlotBytes * lane, until the next exchange of this lane
const unsigned char* exchange(unsigned mask, const void* mine, size_t bytes, const char* what, const char* file, int line);

template <typename T>
struct Lanes {
  const unsigned char* slots;
  T operator[](int lane) const {
    T value;
    std::memcpy(&value, slots + kSlotBytes * (lane & 31), sizeof(T));
    return value;
  }
};
template <typename T>
Lanes<T> exchange(unsigned mask, const T& mine, const char* what, CUDA_HOST_WHERE) {
  static_assert(sizeof(T) <= kSlotBytes);
  return {exchange(mask, &mine, sizeof(T), what, file, line)};
}

// asynchronous copies happen when they are waited for: data that is read too early is seen to be missing
void async_copy(void* to, const void* from, size_t bytes, size_t zeros);
void async_commit();
void async_wait(int groups_in_flight);

}  // namespace cuda_host

// ---- threads of a block and of a warp

inline void __syncthreads(CUDA_HOST_WHERE) { cuda_host::barrier(false, "__syncthreads", file, line); }
inline int __syncthreads_count(int p, CUDA_HOST_WHERE) { return cuda_host::barrier(p, "__syncthreads_count", file, line); }
inline int __syncthreads_or(int p, CUDA_HOST_WHERE) { return cuda_host::barrier(p, "__syncthreads_or", file, line) > 0; }
inline int __syncthreads_and(int p, CUDA_HOST_WHERE) { return !cuda_host::barrier(!p, "__syncthreads_and", file, line); }
inline void __syncwarp(unsigned mask = 0xffffffff, CUDA_HOST_WHERE) {
  cuda_host::exchange(mask, 0, "__syncwarp", file, line);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, CUDA_HOST_WHERE) {
  const int lane = cuda_host::lane();
  return cuda_host::exchange(mask, value, "__shfl_sync", file, line)[lane / width * width + (source & (width - 1))];
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, CUDA_HOST_WHERE) {
  const int lane = cuda_host::lane(), source = lane ^ bits;
  return cuda_host::exchange(mask, value, "__shfl_xor_sync", file, line)[source < lane / width * width + width ? source : lane];
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_HOST_WHERE) {
  const int lane = cuda_host::lane(), source = lane % width + int(delta) < width ? lane + int(delta) : lane;
  return cuda_host::exchange(mask, value, "__shfl_down_sync", file, line)[source];
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_HOST_WHERE) {
  const int lane = cuda_host::lane(), source = lane % width >= int(delta) ? lane - int(delta) : lane;
  return cuda_host::exchange(mask, value, "__shfl_up_sync", file, line)[source];
}
inline unsigned __ballot_sync(unsigned mask, int predicate, CUDA_HOST_WHERE) {
  const auto lanes = cuda_host::exchange(mask, predicate != 0, "__ballot_sync", file, line);
  unsigned result = 0;
  for (int i = 0; i < 32; ++i) result |= (mask >> i & 1) && lanes[i] ? 1u << i : 0u;
  return result;
}
inline int __any_sync(unsigned mask, int predicate, CUDA_HOST_WHERE) {
  return __ballot_sync(mask, predicate, file, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, CUDA_HOST_WHERE) {
  return __ballot_sync(mask, !predicate, file, line) == 0;
}
#define CUDA_HOST_REDUCE(name, first, expression)                                    \
  template <typename T>                                                              \
  T name(unsigned mask, T value, CUDA_HOST_WHERE) {                                  \
    const auto lanes = cuda_host::exchange(mask, value, #name, file, line);          \
    T a = first;                                                                     \
    for (int i = 0; i < 32; ++i)                                                     \
      if (mask >> i & 1) { const T b = lanes[i]; a = expression; }                   \
    return a;                                                                        \
  }
CUDA_HOST_REDUCE(__reduce_add_sync, T(0), a + b)
CUDA_HOST_REDUCE(__reduce_min_sync, value, std::min(a, b))
CUDA_HOST_REDUCE(__reduce_max_sync, value, std::max(a, b))
CUDA_HOST_REDUCE(__reduce_or_sync, T(0), a | b)

// ---- memory

template <typename T> T __ldg(const T* p) { return *p; }
template <typename T> T __ldcs(const T* p) { return *p; }
template <typename T> void __stcs(T* p, T value) { *p = value; }
inline void __threadfence() {}
inline void __threadfence_block() {}
inline size_t __cvta_generic_to_shared(const void* p) { return reinterpret_cast<size_t>(p); }

// integers only: sums of floats by atomics would depend on the order of threads
#define CUDA_HOST_ATOMICS(T)                                                         \
  inline T atomicAdd(T* p, T value) { const T old = *p; *p = old + value; return old; } \
  inline T atomicMin(T* p, T value) { const T old = *p; *p = std::min(old, value); return old; } \
  inline T atomicMax(T* p, T value) { const T old = *p; *p = std::max(old, value); return old; } \
  inline T atomicExch(T* p, T value) { const T old = *p; *p = value; return old; }   \
  inline T atomicOr(T* p, T value) { const T old = *p; *p = old | value; return old; } \
  inline T atomicCAS(T* p, T compare, T value) { const T old = *p; if (old == compare) *p = value; return old; }
CUDA_HOST_ATOMICS(int)
CUDA_HOST_ATOMICS(unsigned)
CUDA_HOST_ATOMICS(unsigned long long)

// ---- arithmetic; compile with -ffp-contract=off

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dsqrt_rn(double a) { return std::sqrt(a); }
inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
inline double rsqrt(double x) { return 1. / std::sqrt(x); }
inline void sincospi(double x, double* sine, double* cosine) {
  *sine = std::sin(3.14159265358979323846 * x);
  *cosine = std::cos(3.14159265358979323846 * x);
}
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __sinf(float x) { return std::sin(x); }
inline float __cosf(float x) { return std::cos(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.f / x; }
inline float __saturatef(float x) { return x > 0.f ? (x < 1.f ? x : 1.f) : 0.f; }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((uint64_t(a) * b) >> 32); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }

template <typename To, typename From>
To cuda_host_bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}
inline unsigned __float_as_uint(float x) { return cuda_host_bits<unsigned>(x); }
inline int __float_as_int(float x) { return cuda_host_bits<int>(x); }
inline float __uint_as_float(unsigned x) { return cuda_host_bits<float>(x); }
inline float __int_as_float(int x) { return cuda_host_bits<float>(x); }
inline long long __double_as_longlong(double x) { return cuda_host_bits<long long>(x); }
inline double __longlong_as_double(long long x) { return cuda_host_bits<double>(x); }

#define CUDA_HOST_MIN_MAX(T)                                \
  inline T min(T a, T b) { return a < b ? a : b; }          \
  inline T max(T a, T b) { return a > b ? a : b; }
CUDA_HOST_MIN_MAX(int)
CUDA_HOST_MIN_MAX(unsigned)
CUDA_HOST_MIN_MAX(long)
CUDA_HOST_MIN_MAX(unsigned long)
CUDA_HOST_MIN_MAX(long long)
CUDA_HOST_MIN_MAX(unsigned long long)
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }
inline double min(double a, double b) { return std::fmin(a, b); }
inline double max(double a, double b) { return std::fmax(a, b); }

// ---- the run time

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline const char* cudaGetErrorString(cudaError_t) { return "error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributePreferredSharedMemoryCarveout };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                      cudaDevAttrComputeCapabilityMajor };
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? 3 : attribute == cudaDevAttrComputeCapabilityMajor ? 9 : 227 << 10;
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) { *device = 0; return cudaSuccess; }

namespace cuda_host {
template <typename... Params>
size_t& shared_limit(void (*kernel)(Params...)) {  // of this kernel; what cudaFuncSetAttribute raises
  static std::vector<std::pair<void (*)(Params...), size_t>> limits;
  for (auto& [key, limit] : limits)
    if (key == kernel) return limit;
  limits.reserve(1024);
  return limits.emplace_back(kernel, size_t(48 << 10)).second;
}
}  // namespace cuda_host

template <typename... Params>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Params...), cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) cuda_host::shared_limit(kernel) = size_t(value);
  return cudaSuccess;
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  void* attrs = nullptr;
  unsigned numAttrs = 0;
};

template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args&&... args) {
  cuda_host::launch(config->gridDim, config->blockDim, config->dynamicSmemBytes, cuda_host::shared_limit(kernel),
                    [&] { kernel(static_cast<Params>(args)...); });
  return cudaSuccess;
}
