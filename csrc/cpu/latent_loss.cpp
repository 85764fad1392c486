// Layer-norm of target rows, gather, smooth L1 and the statistics of both rows in one pass over memory; its gradient in
// a second one, which recomputes the normalised rows from their saved mean and 1 / std.
//
// A row is read once into the cache and walked three times there: mean; variance, which also corrects the mean to the
// last bit; loss. Sums run in float32 over kBlock vectors and in double beyond, and over rows in their order, so the
// result depends neither on the number of threads nor, to float32, on the number of rows.
// prediction [P, D], target [R, D] float32 or bfloat16, target_idx [P], weight, mean, rstd [P] float32, all contiguous.
#include "../common.h"
#include "../simd.h"

#include <algorithm>
#include <optional>

namespace jepa_fast::CPU_CAPABILITY {
namespace {

constexpr int64_t kGrainElements = 1 << 13;  // work below this is not worth another thread
constexpr int64_t kBlock = 32;               // vectors summed in float32

int64_t grain(int64_t D) { return std::max<int64_t>(1, kGrainElements / D); }

inline Vec abs(Vec x) { return (Vec)((UVec)x & 0x7fffffff); }
inline Vec select(IVec mask, Vec a, Vec b) { return (Vec)((mask & (IVec)a) | (~mask & (IVec)b)); }

struct Beta {
  Vec beta, half, inverse;
  explicit Beta(double b)
      : beta(broadcast(float(b))), half(broadcast(float(0.5 * b))), inverse(broadcast(b > 0 ? float(1 / b) : 0.f)) {}

  Vec loss(Vec d) const {  // beta = 0: |d|
    const Vec a = abs(d);
    return select(a < beta, 0.5f * a * (a * inverse), a - half);
  }
  Vec slope(Vec d) const {  // beta = 0: the sign, 0 at 0; NaN stays NaN
    const Vec sign_one = (Vec)(((UVec)d & 0x80000000u) | (UVec)broadcast(1.f));
    return select(abs(d) > beta, sign_one, d * inverse);
  }
};

// visit(d, n): n = kLanes values from d on, fewer at the end of the row; flush() after each block and at the end
template <typename Visit, typename Flush>
inline void walk(int64_t D, Visit visit, Flush flush) {
  const int64_t whole = D - D % kLanes;
  for (int64_t block = 0; block < whole; block += kBlock * kLanes) {
    const int64_t end = std::min(whole, block + kBlock * kLanes);
    for (int64_t d = block; d < end; d += kLanes) visit(d, kLanes);
    flush();
  }
  if (whole < D) {
    visit(whole, int(D - whole));
    flush();
  }
}

template <typename T>
inline Vec load_some(const T* p, int n, float fill) { return n == kLanes ? load(p) : load_partial(p, n, fill); }

struct Moments { float mean, rstd; double var; };

template <typename T>
Moments moments(const T* row, int64_t D, double eps) {
  Vec sum_vec{}, square_vec{};
  double total = 0, squares = 0;
  walk(D, [&](int64_t d, int n) { sum_vec += load_some(row + d, n, 0.f); },
       [&] { total += sum(sum_vec); sum_vec = Vec{}; });
  const float rough = float(total / D);
  total = 0;
  walk(D, [&](int64_t d, int n) {
         const Vec centred = load_some(row + d, n, rough) - rough;
         sum_vec += centred;
         square_vec = fma(centred, centred, square_vec);
       },
       [&] {
         total += sum(sum_vec);
         squares += sum(square_vec);
         sum_vec = square_vec = Vec{};
       });
  const double shift = total / D, var = std::max(squares / D - shift * shift, 0.0);
  return {float(rough + shift), float(1 / std::sqrt(var + eps)), var};
}

struct RowSums { double loss, cosine, power, std; };

template <typename Z, typename T>
RowSums compare(const Z* z, const T* t, int64_t D, const Moments& m, const Beta& beta) {
  Vec loss_vec{}, product_vec{}, square_vec{};
  double loss = 0, product = 0, square = 0;
  walk(D, [&](int64_t d, int n) {
         const Vec h = (load_some(t + d, n, m.mean) - m.mean) * m.rstd;
         const Vec x = load_some(z + d, n, 0.f);
         loss_vec += beta.loss(x - h);
         product_vec = fma(x, h, product_vec);
         square_vec = fma(x, x, square_vec);
       },
       [&] {
         loss += sum(loss_vec);
         product += sum(product_vec);
         square += sum(square_vec);
         loss_vec = product_vec = square_vec = Vec{};
       });
  // |h|^2 = D var rstd^2; lengths below 1e-8 count as that, as in torch's cosine_similarity
  const double length_h = std::sqrt(D * m.var) * m.rstd, length_z = std::sqrt(square);
  return {loss / D, product / (std::max(length_z, 1e-8) * std::max(length_h, 1e-8)), square / D, std::sqrt(m.var)};
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
  const Beta smooth(beta);
  std::vector<RowSums> rows(P);
  torch::stable::parallel_for(0, P, grain(D), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {  // one prediction
      const T* row = t + (idx ? idx[p] : p) * D;
      const Moments m = moments(row, D, eps);
      rows[p] = compare(z + p * D, row, D, m, smooth);
      means[p] = m.mean;
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
  const Beta smooth(beta);
  const double per_element = double(*floats(grad_loss)) / double(D);
  torch::stable::parallel_for(0, P, grain(D), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const T* row = t + (idx ? idx[p] : p) * D;
      const Vec scale = broadcast(float(per_element * (weight ? weights[p] : 1.0 / P)));
      walk(D, [&](int64_t d, int n) {
             const Vec h = (load_some(row + d, n, 0.f) - means[p]) * rstds[p];
             const Vec g = smooth.slope(load_some(z + p * D + d, n, 0.f) - h) * scale;
             if (n == kLanes) store(grad + p * D + d, g);
             else store_partial(grad + p * D + d, g, n);
           },
           [] {});
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
