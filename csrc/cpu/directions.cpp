// Random unit vectors from a counter: Philox4x32-10, Box-Muller, columns divided by their norms.
//
// Element e of the row-major [D, K] normals is word e % 4 of block e / 4, so that any thread can make any part.
#include "../common.h"
#include "../simd.h"

#include <algorithm>
#include <cmath>

namespace jepa_fast::CPU_CAPABILITY {
namespace {

constexpr double kPi = 3.14159265358979323846;

typedef uint64_t ULVec __attribute__((vector_size(kLanes * 8)));

struct Block {
  UVec word[4];
};

inline UVec high(ULVec v) { return __builtin_convertvector(v >> 32, UVec); }

// kLanes consecutive blocks, from `first` on. Salmon et al., SC 2011: Parallel random numbers, as easy as 1, 2, 3.
Block philox(uint64_t first, uint64_t seed, uint64_t step) {
  UVec lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = uint32_t(i);
  const UVec low = lane + uint32_t(first);
  // a carry into the high word where the low one wrapped
  const UVec carry = (UVec)(low < uint32_t(first)) & 1u;
  const UVec zero = {};
  UVec c0 = low, c1 = carry + uint32_t(first >> 32), c2 = zero + uint32_t(seed >> 32), c3 = zero + uint32_t(step >> 32);
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(step);
  for (int round = 0; round < 10; ++round) {
    const ULVec a = __builtin_convertvector(c0, ULVec) * uint64_t(0xD2511F53);
    const ULVec b = __builtin_convertvector(c2, ULVec) * uint64_t(0xCD9E8D57);
    c0 = high(b) ^ c1 ^ k0;
    c1 = __builtin_convertvector(b, UVec);
    c2 = high(a) ^ c3 ^ k1;
    c3 = __builtin_convertvector(a, UVec);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return {{c0, c1, c2, c3}};
}

// The two functions below are float64 to its last bits, by their Taylor series, so that rounded to float32 they agree
// with any other implementation but once in a million.

// natural logarithm of a normal number: x = 2^e m with m in [sqrt(1/2), sqrt(2)), log m = 2 artanh((m - 1) / (m + 1))
inline double logarithm(double x) {
  uint64_t bits;
  std::memcpy(&bits, &x, 8);
  const uint32_t shifted = uint32_t(bits >> 32) - 0x3fe6a09eu;
  const int32_t exponent = int32_t(shifted) >> 20;
  bits = uint64_t((shifted & 0xfffffu) + 0x3fe6a09eu) << 32 | (bits & 0xffffffffu);
  double m;
  std::memcpy(&m, &bits, 8);
  const double s = (m - 1) / (m + 1), z = s * s;
  double q = 1. / 21;
  for (int k = 19; k > 0; k -= 2) q = q * z + 1. / k;
  return exponent * 0.69314718055994530942 + 2 * s * q;
}

// cosine and sine of `turns` full turns in [0, 1)
inline void cos_sin(double turns, double& cosine, double& sine) {
  const int quadrant = int(4 * turns + 0.5);
  const double r = (4 * turns - quadrant) * (kPi / 2), z = r * r;
  double c = 1, s = 1;
  for (int k = 16; k > 0; k -= 2) {
    c = 1 - c * z * (1. / (k * (k - 1)));
    s = 1 - s * z * (1. / (k * (k + 1)));
  }
  s *= r;
  const double x = quadrant & 1 ? s : c, y = quadrant & 1 ? c : s;
  cosine = (quadrant + 1) & 2 ? -x : x;
  sine = quadrant & 2 ? -y : y;
}

// the centre of one of 2^23 intervals of (0, 1)
inline double uniform(uint32_t word) { return (int32_t(word >> 9) + 0.5) * 0x1p-23; }

// two words become two independent normals, for each of kLanes lanes
void box_muller(const uint32_t* a, const uint32_t* b, float* first, float* second) {
  for (int i = 0; i < kLanes; ++i) {
    const double radius = std::sqrt(-2 * logarithm(uniform(a[i])));
    double cosine, sine;
    cos_sin(uniform(b[i]), cosine, sine);
    first[i] = float(radius * cosine);
    second[i] = float(radius * sine);
  }
}

void fill_normal(float* out, int64_t count, uint64_t seed, uint64_t step) {
  const int64_t per_vector = 4 * kLanes, vectors = (count + per_vector - 1) / per_vector;
  torch::stable::parallel_for(0, vectors, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Block block = philox(uint64_t(i) * kLanes, seed, step);
      uint32_t word[4][kLanes];
      float normal[4][kLanes];
      std::memcpy(word, &block, sizeof word);
      box_muller(word[0], word[1], normal[0], normal[1]);
      box_muller(word[2], word[3], normal[2], normal[3]);
      const int64_t first = i * per_vector, n = std::min(count - first, per_vector);
      for (int64_t e = 0; e < n; ++e) out[first + e] = normal[e % 4][e / 4];
    }
  });
}

void normalise_columns(float* a, int64_t D, int64_t K) {
  torch::stable::parallel_for(0, K, 64, [&](int64_t begin, int64_t end) {
    std::vector<double> norm(end - begin);
    for (int64_t d = 0; d < D; ++d)
      for (int64_t k = begin; k < end; ++k) norm[k - begin] += double(a[d * K + k]) * a[d * K + k];
    for (double& n : norm) n = std::max(std::sqrt(n), 1e-30);
    for (int64_t d = 0; d < D; ++d)
      for (int64_t k = begin; k < end; ++k) a[d * K + k] = float(a[d * K + k] / norm[k - begin]);
  });
}

}  // namespace

// out [D, K] float32; step a single int64
void directions(const Tensor& step, int64_t seed, Tensor out) {
  const int64_t D = out.size(0), K = out.size(1);
  float* a = out.mutable_data_ptr<float>();
  fill_normal(a, D * K, uint64_t(seed), uint64_t(*step.const_data_ptr<int64_t>()));
  normalise_columns(a, D, K);
}

// words [n, 4] int64: blocks first, first + 1, ... as they are, for known-answer tests
void philox_words(const Tensor& step, int64_t seed, int64_t first, Tensor words) {
  auto* out = words.mutable_data_ptr<int64_t>();
  for (int64_t block = 0; block < words.size(0); block += kLanes) {
    const auto now = uint64_t(*step.const_data_ptr<int64_t>());
    const Block made = philox(uint64_t(first) + uint64_t(block), uint64_t(seed), now);
    for (int64_t i = 0; i < std::min<int64_t>(kLanes, words.size(0) - block); ++i)
      for (int w = 0; w < 4; ++w) out[(block + i) * 4 + w] = made.word[w][i];
  }
}

}  // namespace jepa_fast::CPU_CAPABILITY

JEPA_FAST_CPU(JEPA_FAST_IMPL(directions) JEPA_FAST_IMPL(philox_words))
