// A vector of floats as wide as the instruction set this file is compiled for, in the compiler's vector extension.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace jepa_fast::CPU_CAPABILITY {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;  // two 128-bit halves where there is no AVX
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IVec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t UVec __attribute__((vector_size(kLanes * 4)));
typedef uint16_t HVec __attribute__((vector_size(kLanes * 2)));
typedef float VecUnaligned __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint16_t HVecUnaligned __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));

struct bf16 { uint16_t bits; };

inline Vec broadcast(float x) { return x - Vec{}; }

inline Vec fma(Vec a, Vec b, Vec c) {  // a * b + c, fused where the hardware can
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

inline Vec load(const float* p) { return *reinterpret_cast<const VecUnaligned*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<VecUnaligned*>(p) = v; }

inline Vec load(const bf16* p) {
  const HVec h = *reinterpret_cast<const HVecUnaligned*>(p);
  return (Vec)(__builtin_convertvector(h, UVec) << 16);
}
inline void store(bf16* p, Vec v) {  // round to nearest even; NaN stays NaN
  const UVec u = (UVec)v;
  const UVec rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  const UVec is_nan = (UVec)(v != v);
  const UVec bits = (is_nan & 0x7fc0) | (~is_nan & rounded);
  *reinterpret_cast<HVecUnaligned*>(p) = __builtin_convertvector(bits, HVec);
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
  const uint32_t u = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline void from_float(float* p, float x) { *p = x; }
inline void from_float(bf16* p, float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  p->bits = x != x ? 0x7fc0 : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

// the last, partial vector of a row: lanes beyond n read as `fill` and are not written
template <typename T>
inline Vec load_partial(const T* p, int n, float fill = 0.f) {
  float buffer[kLanes];
  for (int i = 0; i < kLanes; ++i) buffer[i] = i < n ? to_float(p[i]) : fill;
  return load(buffer);
}
template <typename T>
inline void store_partial(T* p, Vec v, int n) {
  for (int i = 0; i < n; ++i) from_float(p + i, v[i]);
}

inline float sum(Vec v) {
  float total = 0.f;
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) v[i] += v[i + width];
  total = v[0];
  return total;
}

inline Vec round_nearest(Vec v) {  // to whole numbers, ties to even; exact below 2^22 everywhere
#if defined(__AVX512F__)
  return _mm512_maskz_roundscale_ps(0xffff, v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const Vec shift = broadcast(12582912.f);  // 1.5 * 2^23: no room left for a fraction
  return (v + shift) - shift;
#endif
}

inline Vec square_root(Vec v) {
#if defined(__AVX512F__)
  return _mm512_maskz_sqrt_ps(0xffff, v);
#elif defined(__AVX2__)
  return _mm256_sqrt_ps(v);
#else
  for (int i = 0; i < kLanes; ++i) v[i] = std::sqrt(v[i]);
  return v;
#endif
}

}  // namespace jepa_fast::CPU_CAPABILITY
