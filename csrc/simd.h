// A vector of floats as wide as the instruction set this file is compiled for, in the compiler's vector extension.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <utility>

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
#if defined(__AVX512F__)  // one instruction; the compiler takes six for the conversion below
  return (Vec)((UVec)_mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256((const __m256i*)p)) << 16);
#elif defined(__AVX2__)
  return (Vec)((UVec)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)) << 16);
#else
  const HVec h = *reinterpret_cast<const HVecUnaligned*>(p);
  return (Vec)(__builtin_convertvector(h, UVec) << 16);
#endif
}
inline void store(bf16* p, Vec v) {  // round to nearest even; NaN stays NaN
  const UVec u = (UVec)v;
  const UVec rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  const UVec is_nan = (UVec)(v != v);
  const UVec bits = (is_nan & 0x7fc0) | (~is_nan & rounded);
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)bits));
#else
  *reinterpret_cast<HVecUnaligned*>(p) = __builtin_convertvector(bits, HVec);
#endif
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

// 2^x and exp(x): relative error at most 1.2e-7, 0 far below 2^-126, infinity above the range; NaN stays NaN
inline Vec exp2_of_fraction(Vec f) {  // 2^f for f in [0, 1): minimax, exact at 0
  Vec p = broadcast(2.16129153e-4f);
  for (float c : {1.24678463e-3f, 9.67545158e-3f, 5.54852806e-2f, 2.40229306e-1f, 6.93147044e-1f, 1.f})
    p = fma(p, f, broadcast(c));
  return p;
}
constexpr float kRounder = 12582912.f;  // 1.5 * 2^23: adding it rounds to a whole number, kept in the low bits
inline Vec floor(Vec x) {  // for |x| < 2^22
#if defined(__AVX512F__)
  return _mm512_maskz_roundscale_ps(0xffff, x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return _mm256_floor_ps(x);
#else
  const Vec nearest = (x + kRounder) - kRounder;
  return nearest - (Vec)((IVec)(nearest > x) & (IVec)broadcast(1.f));
#endif
}
inline Vec times_power_of_2(Vec x, Vec n) {  // x * 2^n for whole n in [-127, 128]; these ends give 0 and infinity
#if defined(__AVX512F__)
  return _mm512_maskz_scalef_ps(0xffff, x, n);
#else
  return x * (Vec)((IVec)(n + (kRounder + 127.f)) << 23);
#endif
}
inline Vec min(Vec a, Vec b) {  // b where either is NaN
#if defined(__AVX512F__)
  return _mm512_maskz_min_ps(0xffff, a, b);
#elif defined(__AVX2__)
  return _mm256_min_ps(a, b);
#else
  const IVec is_less = a < b;
  return (Vec)(((IVec)a & is_less) | ((IVec)b & ~is_less));
#endif
}
inline Vec max(Vec a, Vec b) {  // b where either is NaN
#if defined(__AVX512F__)
  return _mm512_maskz_max_ps(0xffff, a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  const IVec is_more = a > b;
  return (Vec)(((IVec)a & is_more) | ((IVec)b & ~is_more));
#endif
}
inline Vec exp2(Vec x) {
#if defined(__AVX512F__)
  const Vec f = _mm512_maskz_reduce_ps(0xffff, x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // x - floor(x)
  return times_power_of_2(exp2_of_fraction(f), x);  // takes the floor of x itself
#else
  x = min(broadcast(128.f), max(broadcast(-127.f), x));
  const Vec n = floor(x);
  return times_power_of_2(exp2_of_fraction(x - n), n);
#endif
}
inline Vec exp(Vec x) {
  constexpr float kLog2e = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  x = min(broadcast(89.f), max(broadcast(-150.f), x));
  Vec n = floor(x * kLog2e);
#if !defined(__AVX512F__)
  n = max(broadcast(-127.f), n);
#endif
  const Vec rest = fma(n, broadcast(-kLn2Low), fma(n, broadcast(-kLn2High), x));  // exp(x) = 2^n exp(rest)
  return times_power_of_2(exp2_of_fraction(rest * kLog2e), n);
}

// log2(x) for normal positive x: relative error at most 2.3e-7; NaN stays NaN
inline Vec log2(Vec x) {
  const IVec n = ((IVec)x - 0x3f3504f3) >> 23;       // x = 2^n m with m in [sqrt(1/2), sqrt(2))
  const Vec m = (Vec)((IVec)x - (n << 23)), t = (m - 1.f) / (m + 1.f), t2 = t * t;
  Vec p = broadcast(2.f / 9);                          // log(m) = 2 atanh(t)
  for (float c : {2.f / 7, 2.f / 5, 2.f / 3, 2.f}) p = fma(p, t2, broadcast(c));
  return fma(p * t, broadcast(1.44269504f), __builtin_convertvector(n, Vec)) + (x - x);
}

// rows of a square block become columns: lanes kStep apart change places between rows kStep apart
template <int kStep, int... kLane>
inline void exchange(Vec& a, Vec& b, std::integer_sequence<int, kLane...>) {
#if defined(__clang__)
  const Vec low = __builtin_shufflevector(a, b, (kLane & kStep ? kLanes + kLane - kStep : kLane)...);
  b = __builtin_shufflevector(a, b, (kLane & kStep ? kLanes + kLane : kLane + kStep)...);
#else
  const Vec low = __builtin_shuffle(a, b, IVec{(kLane & kStep ? kLanes + kLane - kStep : kLane)...});
  b = __builtin_shuffle(a, b, IVec{(kLane & kStep ? kLanes + kLane : kLane + kStep)...});
#endif
  a = low;
}
template <int kStep>
inline void transpose_step(Vec* rows) {
  for (int i = 0; i < kLanes; ++i)
    if (!(i & kStep)) exchange<kStep>(rows[i], rows[i + kStep], std::make_integer_sequence<int, kLanes>());
}
inline void transpose(Vec* rows) {
  transpose_step<1>(rows);
  transpose_step<2>(rows);
  transpose_step<4>(rows);
#if defined(__AVX512F__)
  transpose_step<8>(rows);
#endif
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
