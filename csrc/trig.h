// Sine and cosine of half an angle, and the step of a rotation built from them, for vectors of floats.
#pragma once

#include "simd.h"

namespace jepa_fast::CPU_CAPABILITY {

constexpr double kPi = 3.14159265358979323846;

// |h| <= pi/2; minimax polynomials, error below 1e-8 before rounding
inline Vec sin_quarter(Vec h) {
  const Vec z = h * h;
  Vec q = broadcast(2.60575074e-6f);
  q = fma(q, z, broadcast(-1.98095901e-4f));
  q = fma(q, z, broadcast(8.33306608e-3f));
  q = fma(q, z, broadcast(-1.66666595e-1f));
  return fma(h * z, q, h);
}
inline Vec cos_quarter(Vec h) {
  const Vec z = h * h;
  Vec q = broadcast(-2.60768168e-7f);
  q = fma(q, z, broadcast(2.47618706e-5f));
  q = fma(q, z, broadcast(-1.38884032e-3f));
  q = fma(q, z, broadcast(4.16666407e-2f));
  q = fma(q, z, broadcast(-4.99999995e-1f));
  return fma(q, z, broadcast(1.f));
}

// A rotation by an angle, kept as 1 - cos and sin: for small angles both are known to their last bit, so that a hundred
// rotations in a row drift no further than the rounding of the angle itself.
struct Rotation {
  Vec versine, sine;
};

// a double as the sum of two floats
struct Split {
  float high, low;
  explicit Split(double x) : high(float(x)), low(float(x - double(float(x)))) {}
};

// The rotation by p * 2 * half_t. NaN and infinity give NaN; beyond |p t| of about 1e7 a float32 phase has no digits left
// and the angle is arbitrary, but finite.
inline Rotation rotation(Vec p, Split half_t) {
  const Vec angle = p * half_t.high;
  const Vec rest = fma(p, broadcast(half_t.low), fma(p, broadcast(half_t.high), -angle));  // what rounding cut off
  const Vec n = round_nearest(angle * float(1 / kPi));
  Vec h = fma(n, broadcast(-3.140625f), angle);  // pi in three parts; the first has 8 bits, n times it is exact
  h = fma(n, broadcast(-9.676218032836914e-4f), h);
  h = fma(n, broadcast(-3.1786509e-8f), h) + rest;
  const Vec limit = broadcast(float(kPi / 2));
  h = h > limit ? limit : h;
  h = h < -limit ? -limit : h;
  const Vec s = sin_quarter(h), twice = s + s;
  return {twice * s, twice * cos_quarter(h)};
}

inline Rotation doubled(Rotation r) {
  const Vec twice = r.sine + r.sine;
  return {twice * r.sine, fma(-twice, r.versine, twice)};
}

inline void rotate(Vec& cosine, Vec& sine, Rotation by) {
  const Vec c = cosine, s = sine;
  cosine = fma(-by.sine, s, fma(-by.versine, c, c));
  sine = fma(by.sine, c, fma(-by.versine, s, s));
}

}  // namespace jepa_fast::CPU_CAPABILITY
