// 2^x by the special function unit (16 a clock and multiprocessor), and by the FMA pipes (128, in 8 instructions).
#pragma once

#include "common.cuh"

namespace jepa_fast::cuda {

__device__ inline float exp2_special(float x) {  // relative error 2^-22, numbers below 2^-126 are 0
#ifdef __CUDACC__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::exp2(x);
#endif
}

__device__ inline float max_nan(float a, float b) {  // NaN if one of them is
#ifdef __CUDACC__
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
#else
  return a != a || b != b ? a + b : std::fmax(a, b);
#endif
}

// For x <= 127: x = n + f with n whole and |f| <= 1/2, 2^f by the cubic of least relative error with 2^0 = 1, 1.02e-4
// (a fifth of a rounding to float16), then at most 2^-126 too low: 0 where x <= -126, NaN of NaN.
__device__ inline float exp2_polynomial(float x) {
  x = max_nan(x, -126.f);
  const float shifted = __fadd_rn(x, 12582912.f);                   // 1.5 * 2^23: n in the low bits
  const float f = __fadd_rn(x, -__fadd_rn(shifted, -12582912.f));
  const float y = __fmaf_rn(__fmaf_rn(__fmaf_rn(0.0550089329f, f, 0.242210999f), f, 0.693282902f), f, 1.f);
  return __fmaf_rn(y, __uint_as_float((__float_as_uint(shifted) << 23) + 0x3f800000u), -1.17549435e-38f);
}

}  // namespace jepa_fast::cuda
