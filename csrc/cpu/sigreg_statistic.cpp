// The statistic from its sums: sum over j of w_j ((C_j - phi_j)^2 + S_j^2), and its gradient, in one pass each.
//
// C_j is close to phi_j where the loss is small: means and differences are taken in float64, the tensors are float32.
// sums [V, 2, J, K], count [V] (rows behind each sum; 0 gives 0), knots [2, J] float64 (phi, then weights), all contiguous.
#include "../common.h"

#include <algorithm>

namespace jepa_fast::CPU_CAPABILITY {
namespace {

constexpr int kSlices = 64;  // slices at a time
constexpr int64_t kGrainBlocks = 16;

// work(group, first slice, slices) for every block of slices of every group
template <typename Work>
void for_each_block(int64_t V, int64_t K, const Work& work) {
  const int64_t blocks = (K + kSlices - 1) / kSlices;
  torch::stable::parallel_for(0, V * blocks, kGrainBlocks, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t k = i % blocks * kSlices;
      work(i / blocks, k, int(std::min<int64_t>(kSlices, K - k)));
    }
  });
}

}  // namespace

void sigreg_statistic(const Tensor& sums, const Tensor& count, const Tensor& knots, Tensor out) {
  const int64_t V = sums.size(0), J = sums.size(2), K = sums.size(3);
  const float *in = floats(sums), *rows = floats(count);
  const double *phi = knots.const_data_ptr<double>(), *weight = phi + J;
  float* statistic = out.mutable_data_ptr<float>();
  for_each_block(V, K, [&](int64_t v, int64_t k, int width) {
    const double scale = rows[v] == 0 ? 0 : 1 / double(rows[v]);
    const float *cosine = in + v * 2 * J * K + k, *sine = cosine + J * K;
    double total[kSlices] = {};
    for (int64_t j = 0; j < J; ++j)
      for (int i = 0; i < width; ++i) {
        const double c = cosine[j * K + i] * scale - phi[j], s = sine[j * K + i] * scale;
        total[i] += weight[j] * (c * c + s * s);
      }
    for (int i = 0; i < width; ++i) statistic[v * K + k + i] = rows[v] == 0 ? 0.f : float(total[i]);
  });
}

// grad [V, K] -> out [V, 2, J, K]
void sigreg_statistic_backward(const Tensor& grad, const Tensor& sums, const Tensor& count, const Tensor& knots,
                               Tensor out) {
  const int64_t V = sums.size(0), J = sums.size(2), K = sums.size(3);
  const float *in = floats(sums), *rows = floats(count), *upstream = floats(grad);
  const double *phi = knots.const_data_ptr<double>(), *weight = phi + J;
  float* grad_sums = out.mutable_data_ptr<float>();
  for_each_block(V, K, [&](int64_t v, int64_t k, int width) {
    const double scale = rows[v] == 0 ? 0 : 1 / double(rows[v]);
    const int64_t first = v * 2 * J * K + k;
    const float* g = upstream + v * K + k;
    for (int part = 0; part < 2; ++part)
      for (int64_t j = 0; j < J; ++j) {
        const int64_t at = first + (part * J + j) * K;
        const double target = part == 0 ? phi[j] : 0, factor = 2 * weight[j] * scale;
        for (int i = 0; i < width; ++i)
          grad_sums[at + i] = rows[v] == 0 ? 0.f : float(g[i] * factor * (in[at + i] * scale - target));
      }
  });
}

}  // namespace jepa_fast::CPU_CAPABILITY

JEPA_FAST_CPU(JEPA_FAST_IMPL(sigreg_statistic) JEPA_FAST_IMPL(sigreg_statistic_backward))
