// Layer-norm of target rows, gather, smooth L1 and the statistics of both rows in one pass over memory; its gradient in
// a second one, which recomputes the normalised rows from their saved mean and 1 / std.
//
// A row is read once into the cache and walked three times there: mean; variance, which also tells what rounding the
// mean lost; loss. Rows are summed in double and in their order, so that the number of threads changes nothing.
// prediction [P, D], target [R, D] float32 or bfloat16, target_idx [P], weight, mean, rstd [P] float32, all contiguous.
#include "../common.h"
#include "../simd.h"

#include <algorithm>
#include <optional>
#include <type_traits>

namespace jepa_fast::CPU_CAPABILITY {
namespace {

constexpr int64_t kGrainElements = 1 << 13;  // work below this is not worth another thread

int64_t grain(int64_t D) { return std::max<int64_t>(1, kGrainElements / D); }

// What follows is written once for V = Vec, the whole vectors of a row, and V = double, the values left at its end.
template <typename V, typename T>
inline V read(const T* p) {
  if constexpr (std::is_same_v<V, Vec>) return load(p);
  else return to_float(*p);
}
template <typename T>
inline void write(T* p, Vec v) { store(p, v); }
template <typename T>
inline void write(T* p, double v) { from_float(p, float(v)); }

inline Vec magnitude(Vec x) { return (Vec)((UVec)x & 0x7fffffff); }
inline double magnitude(double x) { return std::fabs(x); }
inline Vec with_sign_of(Vec x, Vec one) { return (Vec)(((UVec)x & 0x80000000u) | (UVec)one); }
inline double with_sign_of(double x, double one) { return std::copysign(one, x); }
inline Vec select(IVec mask, Vec a, Vec b) { return (Vec)((mask & (IVec)a) | (~mask & (IVec)b)); }
inline double select(bool condition, double a, double b) { return condition ? a : b; }
inline double fma(double a, double b, double c) { return a * b + c; }
using CPU_CAPABILITY::fma;

template <typename V>
struct SmoothL1 {
  using Scalar = std::conditional_t<std::is_same_v<V, Vec>, float, double>;
  V beta, half, inverse;
  explicit SmoothL1(double b)
      : beta(V{} + Scalar(b)), half(V{} + Scalar(b / 2)), inverse(V{} + Scalar(b > 0 ? 1 / b : 0)) {}

  V loss(V d) const {  // beta = 0: |d|
    const V a = magnitude(d);
    return select(a < beta, a * (a * inverse) / 2, a - half);
  }
  V slope(V d) const {  // beta = 0: the sign, 0 at 0; NaN stays NaN
    return select(magnitude(d) > beta, with_sign_of(d, V{} + 1), d * inverse);
  }
};

// A sum over a row: a few vectors in float32, then in double, so that what rounding costs does not grow with the row
struct Sum {
  typedef float Half __attribute__((vector_size(kLanes * 2)));
  typedef double Wide __attribute__((vector_size(kLanes * 4)));
  Vec part{};
  Wide low{}, high{};
  double rest = 0;

  void add(Vec v) { part += v; }
  void add(double v) { rest += v; }
  static Wide widen(Half h) {
#if defined(__AVX512F__)
    return _mm512_maskz_cvtps_pd(0xff, h);
#elif defined(__AVX2__)
    return _mm256_cvtps_pd(h);
#else
    return __builtin_convertvector(h, Wide);
#endif
  }
  void flush() {
    Half halves[2];
    std::memcpy(halves, &part, sizeof(part));
    low += widen(halves[0]);
    high += widen(halves[1]);
    part = Vec{};
  }
  double total() const {
    Wide both = low + high;
    for (int width = kLanes / 4; width > 0; width /= 2)
      for (int i = 0; i < width; ++i) both[i] += both[i + width];
    return both[0] + rest;
  }
};

// visit<V>(d) for the values of a row from d on, one V after the other
template <typename Visit, typename... Sums>
inline void walk(int64_t D, Visit visit, Sums&... sums) {
  int64_t d = 0;
  for (; d + 4 * kLanes <= D; d += 4 * kLanes) {
    for (int i = 0; i < 4; ++i) visit.template operator()<Vec>(d + i * kLanes);
    (sums.flush(), ...);
  }
  for (; d + kLanes <= D; d += kLanes) visit.template operator()<Vec>(d);
  (sums.flush(), ...);
  for (; d < D; ++d) visit.template operator()<double>(d);
}

// The mean of a row is rough + shift and its 1 / std is rstd + rest, so that neither loses digits to a rounding that the
// whole row would share: x - rough is exact for x near it.
struct Moments {
  float rough, shift, rstd, rest;
  double var;

  template <typename V>
  V centre(V x) const { return (x - rough) - shift; }
  template <typename V>
  V difference(V z, V centred) const {  // z - h, where h = centred / std is not rounded on its own
    return fma(centred, V{} - rest, fma(centred, V{} - rstd, z));
  }
};

template <typename T>
Moments moments(const T* row, int64_t D, double eps) {
  Sum all, centred, squared;
  walk(D, [&]<typename V>(int64_t d) { all.add(read<V>(row + d)); }, all);
  const float rough = float(all.total() / D);
  walk(D, [&]<typename V>(int64_t d) {
         const V x = read<V>(row + d) - rough;
         centred.add(x);
         squared.add(x * x);
       }, centred, squared);
  const double shift = centred.total() / D, var = std::max(squared.total() / D - shift * shift, 0.0);
  const double rstd = 1 / std::sqrt(var + eps);
  return {rough, float(shift), float(rstd), float(rstd - float(rstd)), var};
}

struct RowSums { double loss, cosine, power, std; };

template <typename Z, typename T>
RowSums compare(const Z* z, const T* t, int64_t D, const Moments& m, double beta) {
  Sum losses, product, square;
  walk(D, [&]<typename V>(int64_t d) {
         const V x = read<V>(z + d), centred = m.centre(read<V>(t + d));
         losses.add(SmoothL1<V>(beta).loss(m.difference(x, centred)));
         product.add(x * centred);
         square.add(x * x);
       }, losses, product, square);
  // |h|^2 = D var rstd^2; lengths below 1e-8 count as that, as in torch's cosine_similarity
  const double power = square.total() / D, length_z = std::sqrt(D * power), length_h = std::sqrt(D * m.var) * m.rstd;
  const double cosine = product.total() * m.rstd / (std::max(length_z, 1e-8) * std::max(length_h, 1e-8));
  return {losses.total() / D, cosine, power, std::sqrt(m.var)};
}

template <typename Z, typename T>
void forward(const Tensor& prediction, const Tensor& target, const int64_t* idx, const std::optional<Tensor>& weight,
             double beta, double eps, Tensor& loss, Tensor& stats, Tensor& mean, Tensor& rstd) {
  const int64_t P = prediction.size(0), D = prediction.size(1);
  const auto* z = static_cast<const Z*>(prediction.data_ptr());
  const auto* t = static_cast<const T*>(target.data_ptr());
  const auto* weights = weight ? floats(*weight) : nullptr;
  auto* means = mean.mutable_data_ptr<float>();
  auto* rstds = rstd.mutable_data_ptr<float>();
  std::vector<RowSums> rows(P);
  torch::stable::parallel_for(0, P, grain(D), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {  // one prediction
      const T* row = t + (idx ? idx[p] : p) * D;
      const Moments m = moments(row, D, eps);
      rows[p] = compare(z + p * D, row, D, m, beta);
      means[p] = m.rough + m.shift;
      rstds[p] = m.rstd;
    }
  });
  RowSums all{0, 0, 0, 0};
  for (int64_t p = 0; p < P; ++p) {
    all.loss += weight ? weights[p] * rows[p].loss : rows[p].loss;
    all.cosine += rows[p].cosine;
    all.power += rows[p].power;
    all.std += rows[p].std;
  }
  *loss.mutable_data_ptr<float>() = float(weight ? all.loss : all.loss / P);
  auto* s = stats.mutable_data_ptr<float>();
  s[0] = float(all.cosine / P);
  s[1] = float(all.power / P);
  s[2] = float(all.std / P);
}

template <typename Z, typename T>
void backward(const Tensor& grad_loss, const Tensor& prediction, const Tensor& target, const int64_t* idx,
              const std::optional<Tensor>& weight, const Tensor& mean, const Tensor& rstd, double beta, Tensor& out) {
  const int64_t P = prediction.size(0), D = prediction.size(1);
  const auto* z = static_cast<const Z*>(prediction.data_ptr());
  const auto* t = static_cast<const T*>(target.data_ptr());
  const float *means = floats(mean), *rstds = floats(rstd), *weights = weight ? floats(*weight) : nullptr;
  auto* grad = static_cast<Z*>(out.data_ptr());
  const double per_element = double(*floats(grad_loss)) / double(D);
  torch::stable::parallel_for(0, P, grain(D), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const T* row = t + (idx ? idx[p] : p) * D;
      Sum centred;
      walk(D, [&]<typename V>(int64_t d) { centred.add(read<V>(row + d) - means[p]); }, centred);
      const Moments m{means[p], float(centred.total() / D), rstds[p], 0, 0};
      const float scale = float(per_element * (weight ? weights[p] : 1.0 / P));
      walk(D, [&]<typename V>(int64_t d) {
        const V difference = m.difference(read<V>(z + p * D + d), m.centre(read<V>(row + d)));
        write(grad + p * D + d, SmoothL1<V>(beta).slope(difference) * scale);
      });
    }
  });
}

template <typename Z, typename Call>
void by_target(const Tensor& target, Call call) {
  switch (target.scalar_type()) {
    case ScalarType::Float: return call.template operator()<Z, float>();
    case ScalarType::BFloat16: return call.template operator()<Z, bf16>();
    default: STD_TORCH_CHECK(false, "latent_loss: target must be float32 or bfloat16");
  }
}

template <typename Call>  // call<Z, T>() for the types of prediction and target
void by_types(const Tensor& prediction, const Tensor& target, Call call) {
  switch (prediction.scalar_type()) {
    case ScalarType::Float: return by_target<float>(target, call);
    case ScalarType::BFloat16: return by_target<bf16>(target, call);
    default: STD_TORCH_CHECK(false, "latent_loss: prediction must be float32 or bfloat16");
  }
}

}  // namespace

void latent_loss(const Tensor& prediction, const Tensor& target, std::optional<Tensor> target_idx,
                 std::optional<Tensor> weight, double beta, double eps, Tensor loss, Tensor stats, Tensor mean,
                 Tensor rstd) {
  const auto* idx = target_idx ? target_idx->const_data_ptr<int64_t>() : nullptr;
  by_types(prediction, target, [&]<typename Z, typename T>() {
    forward<Z, T>(prediction, target, idx, weight, beta, eps, loss, stats, mean, rstd);
  });
}

void latent_loss_backward(const Tensor& grad_loss, const Tensor& prediction, const Tensor& target,
                          std::optional<Tensor> target_idx, std::optional<Tensor> weight, const Tensor& mean,
                          const Tensor& rstd, double beta, Tensor out) {
  const auto* idx = target_idx ? target_idx->const_data_ptr<int64_t>() : nullptr;
  by_types(prediction, target, [&]<typename Z, typename T>() {
    backward<Z, T>(grad_loss, prediction, target, idx, weight, mean, rstd, beta, out);
  });
}

}  // namespace jepa_fast::CPU_CAPABILITY

JEPA_FAST_CPU(JEPA_FAST_IMPL(latent_loss) JEPA_FAST_IMPL(latent_loss_backward))
