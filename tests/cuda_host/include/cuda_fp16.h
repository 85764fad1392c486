// float16 as CUDA has it: conversions round to nearest even.
#pragma once

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
  __half() = default;
  __half(float x) { bits = cuda_host_bits<uint16_t>(static_cast<_Float16>(x)); }
  operator float() const { return static_cast<float>(cuda_host_bits<_Float16>(bits)); }
};
struct alignas(4) __half2 { __half x, y; };

inline float __half2float(__half x) { return x; }
inline __half __float2half(float x) { return x; }
inline __half __float2half_rn(float x) { return x; }
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
inline float2 __half22float2(__half2 v) { return {v.x, v.y}; }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
