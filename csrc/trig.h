// Rotations of the plane for vectors of angles: made from an angle, doubled, applied.
#pragma once

#include "simd.h"

namespace jepa_fast::CPU_CAPABILITY {

// A rotation by an angle, kept as 1 - cos and sin: of a small angle both are known to their last bit, so that many
// rotations in a row drift no further than the rounding of the angle itself.
struct Rotation {
  Vec versine, sine;
};

// a double as the sum of two floats
struct Split {
  float high, low;
  explicit Split(double x) : high(float(x)), low(float(x - double(float(x)))) {}
};

inline Vec product_rest(Vec a, Vec b, Vec product) {  // what rounding cut off from a * b
#if defined(__FMA__) || defined(__AVX512F__)
  return fma(a, b, -product);
#else  // halves of 12 bits, whose products are exact (Dekker 1971)
  const Vec a_high = (Vec)((UVec)a & 0xfffff000u), b_high = (Vec)((UVec)b & 0xfffff000u);
  const Vec a_low = a - a_high, b_low = b - b_high;
  return ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low;
#endif
}

// The rotation by t p. NaN and infinity give NaN; beyond |t p| of about 1e6 float32 has no digits left for the phase of
// p itself, and the angle is arbitrary but finite.
inline Rotation rotation(Vec p, Split t) {
  const Vec angle = p * t.high;
  const Vec rest = fma(p, broadcast(t.low), product_rest(p, broadcast(t.high), angle));
  const Vec n = round_nearest(angle * 0.636619772f);  // quarter turns
  Vec r = fma(n, broadcast(-1.5703125f), angle);      // pi/2 in three parts; n times the first, of 8 bits, is exact
  r = fma(n, broadcast(-4.838109016418457e-4f), r);
  r = fma(n, broadcast(-1.58932547e-8f), r) + rest;
  const Vec limit = broadcast(0.7862f);  // pi/4 and a little; NaN passes
  r = r > limit ? limit : r;
  r = r < -limit ? -limit : r;

  // minimax polynomials, error below 4e-9 before rounding
  const Vec z = r * r;
  Vec s = fma(z, broadcast(-1.951461827e-4f), broadcast(8.332155955e-3f));
  s = fma(z, s, broadcast(-1.666665454e-1f));
  s = fma(r * z, s, r);
  Vec v = fma(z, broadcast(-2.447653416e-5f), broadcast(1.388772694e-3f));
  v = fma(z, v, broadcast(-4.166665485e-2f));
  v = fma(z * z, v, z * 0.5f);

  const IVec quarter = __builtin_convertvector(n, IVec);
  const IVec is_odd = (quarter & 1) != 0;
  const UVec sign = (UVec)(quarter & 2) << 30;
  const Vec versine = (is_odd ? broadcast(1.f) : __builtin_convertvector(quarter & 2, Vec)) +
                      (Vec)((UVec)(is_odd ? s : v) ^ sign);
  const Vec sine = (Vec)((UVec)(is_odd ? broadcast(1.f) - v : s) ^ sign);
  return {versine, sine};
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
