// SIGReg between its two matrix products: sums of cos and sin of the projections, and their gradient in place.
//
// The projections p [V, N, K] come in pieces that fit the cache; nothing of size [N, K, J] exists. A few sines per
// projection, then one rotation per knot (four fused operations). Slices lie along the lanes; rows are added in float32
// up to kBlockRows and in float64 beyond, in a fixed order.
// p contiguous float32; row_mask [V, N] bool contiguous; knots are t_start + j * t_step; [V, 2, J, K] holds cos, then
// sin, with K contiguous.
#include "../common.h"
#include "../simd.h"
#include "../trig.h"

#include <algorithm>
#include <optional>

namespace jepa_fast::CPU_CAPABILITY {
namespace {

constexpr int kRows = kLanes == 16 ? 2 : 1;  // rows in flight: as many as fit the registers
constexpr int kChains = 4;  // knots in flight: knot j + 4 comes from knot j, so that few rounding errors add up
constexpr int64_t kBlockRows = 64;
constexpr int64_t kGrain = 1 << 11;  // projections; fewer are not worth another thread
constexpr int kSlices = 64;          // of the statistic at a time

struct Grid {
  double t_start, t_step;
  int64_t J, padded;  // knots, and up to a multiple of kChains
  Grid(double start, double step, int64_t J)
      : t_start(start), t_step(step), J(J), padded((J + kChains - 1) / kChains * kChains) {}
};

// where one vector of slices of one group lies
struct Strip {
  float* p;           // its first row
  int64_t N, stride;  // rows, floats from one row to the next
  int lanes;          // slices: kLanes but at the end of a row
  const bool* keep;   // rows that count; null for all
  bool has(int64_t row) const { return row < N && (!keep || keep[row]); }
};

inline Vec load_lanes(const float* p, int lanes) { return lanes == kLanes ? load(p) : load_partial(p, lanes); }
inline void store_lanes(float* p, Vec v, int lanes) {
  if (lanes == kLanes) store(p, v);
  else store_partial(p, v, lanes);
}

// e^(i t p) of one row at kChains consecutive knots; a row that does not count is zero everywhere. The step to the next
// kChains knots is made from p itself: from smaller steps it would carry kChains times their error.
struct Phasors {
  Vec cosine[kChains], sine[kChains];
  Rotation stride;

  void start(const Strip& strip, int64_t row, const Grid& grid) {
    const bool is_row = strip.has(row);
    const Vec p = is_row ? load_lanes(strip.p + row * strip.stride, strip.lanes) : Vec{};
    const Rotation one = rotation(p, Split(grid.t_step)), two = doubled(one);
    const Rotation first = grid.t_start == grid.t_step ? one : rotation(p, Split(grid.t_start));
    cosine[0] = is_row ? broadcast(1.f) - first.versine : Vec{};
    sine[0] = is_row ? first.sine : Vec{};
    for (int q = 1; q < kChains; ++q) {
      cosine[q] = cosine[q == 1 ? 0 : q - 2];
      sine[q] = sine[q == 1 ? 0 : q - 2];
      rotate(cosine[q], sine[q], q == 1 ? one : two);
    }
    stride = rotation(p, Split(grid.t_step * kChains));
  }

  void turn() {
    for (int q = 0; q < kChains; ++q) rotate(cosine[q], sine[q], stride);
  }
};

// sums points at [2, J, K] of the group, at the first slice; partial has room for 2 * padded vectors
void add_strip(const Strip& strip, const Grid& grid, double* sums, int64_t sums_stride, float* partial) {
  for (int64_t block = 0; block < strip.N; block += kBlockRows) {
    std::fill_n(partial, 2 * grid.padded * kLanes, 0.f);
    const int64_t end = std::min(strip.N, block + kBlockRows);
    for (int64_t row = block; row < end; row += kRows) {
      Phasors z[kRows] = {};
      for (int r = 0; r < kRows; ++r) z[r].start(strip, row + r, grid);
      for (float* at = partial; at < partial + 2 * grid.padded * kLanes; at += 2 * kChains * kLanes) {
        for (int q = 0; q < kChains; ++q) {
          Vec cosine = z[0].cosine[q], sine = z[0].sine[q];
          for (int r = 1; r < kRows; ++r) cosine += z[r].cosine[q], sine += z[r].sine[q];
          store(at + 2 * q * kLanes, load(at + 2 * q * kLanes) + cosine);
          store(at + (2 * q + 1) * kLanes, load(at + (2 * q + 1) * kLanes) + sine);
        }
        for (int r = 0; r < kRows; ++r) z[r].turn();
      }
    }
    for (int64_t j = 0; j < grid.J; ++j)
      for (int part = 0; part < 2; ++part)
        for (int lane = 0; lane < strip.lanes; ++lane)
          sums[(part * grid.J + j) * sums_stride + lane] += partial[(2 * j + part) * kLanes + lane];
  }
}

// p becomes sum over j of t_j (grad_sin_j cos(t_j p) - grad_cos_j sin(t_j p)); weights has room for 2 * padded vectors
void gradient_strip(const Strip& strip, const Grid& grid, const float* grad_sums, int64_t sums_stride, float* weights) {
  std::fill_n(weights, 2 * grid.padded * kLanes, 0.f);
  for (int64_t j = 0; j < grid.J; ++j) {
    const float t = float(grid.t_start + double(j) * grid.t_step);
    store(weights + 2 * j * kLanes, load_lanes(grad_sums + (grid.J + j) * sums_stride, strip.lanes) * t);
    store(weights + (2 * j + 1) * kLanes, load_lanes(grad_sums + j * sums_stride, strip.lanes) * -t);
  }
  for (int64_t row = 0; row < strip.N; row += kRows) {
    Phasors z[kRows] = {};
    for (int r = 0; r < kRows; ++r) z[r].start(strip, row + r, grid);
    Vec gradient[kRows] = {};
    for (const float* at = weights; at < weights + 2 * grid.padded * kLanes; at += 2 * kChains * kLanes) {
      for (int q = 0; q < kChains; ++q) {
        const Vec of_cos = load(at + 2 * q * kLanes), of_sin = load(at + (2 * q + 1) * kLanes);
        for (int r = 0; r < kRows; ++r)
          gradient[r] = fma(of_sin, z[r].sine[q], fma(of_cos, z[r].cosine[q], gradient[r]));
      }
      for (int r = 0; r < kRows; ++r) z[r].turn();
    }
    for (int r = 0; r < kRows && row + r < strip.N; ++r)
      store_lanes(strip.p + (row + r) * strip.stride, strip.has(row + r) ? gradient[r] : Vec{}, strip.lanes);
  }
}

// work(strip, group, first slice, scratch of 2 * padded vectors) for every vector of slices of every group
template <typename Work>
void for_each_strip(const Tensor& p, const std::optional<Tensor>& row_mask, const Grid& grid, const Work& work) {
  const int64_t V = p.size(0), N = p.size(1), K = p.size(2), strips = (K + kLanes - 1) / kLanes;
  auto* data = p.mutable_data_ptr<float>();
  const bool* keep = row_mask ? row_mask->const_data_ptr<bool>() : nullptr;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, N * kLanes));
  torch::stable::parallel_for(0, V * strips, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> room(2 * grid.padded * kLanes + 16);
    auto* scratch = room.data() + 16 - reinterpret_cast<uintptr_t>(room.data()) / 4 % 16;  // at a cache line
    for (int64_t i = begin; i < end; ++i) {
      const int64_t v = i / strips, k = i % strips * kLanes;
      const int lanes = int(std::min<int64_t>(kLanes, K - k));
      work(Strip{data + v * N * K + k, N, K, lanes, keep ? keep + v * N : nullptr}, v, k, scratch);
    }
  });
}

// work(group, first slice, slices) for every block of slices of every group
template <typename Work>
void for_each_block(int64_t V, int64_t K, const Work& work) {
  const int64_t blocks = (K + kSlices - 1) / kSlices;
  torch::stable::parallel_for(0, V * blocks, /*grain_size=*/16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t k = i % blocks * kSlices;
      work(i / blocks, k, int(std::min<int64_t>(kSlices, K - k)));
    }
  });
}

}  // namespace

// sums [V, 2, J, K] float64 += the sums over the rows of p [V, N, K]
void sigreg_add_sums(const Tensor& p, std::optional<Tensor> row_mask, double t_start, double t_step, Tensor sums) {
  const Grid grid(t_start, t_step, sums.size(2));
  auto* out = sums.mutable_data_ptr<double>();
  for_each_strip(p, row_mask, grid, [&](const Strip& strip, int64_t v, int64_t k, float* scratch) {
    add_strip(strip, grid, out + v * sums.stride(0) + k, sums.stride(2), scratch);
  });
}

// p [V, N, K] becomes the gradient with respect to p; grad_sums [V, 2, J, K] float32
void sigreg_gradient_(Tensor p, std::optional<Tensor> row_mask, const Tensor& grad_sums, double t_start,
                      double t_step) {
  const Grid grid(t_start, t_step, grad_sums.size(2));
  const float* in = floats(grad_sums);
  for_each_strip(p, row_mask, grid, [&](const Strip& strip, int64_t v, int64_t k, float* scratch) {
    gradient_strip(strip, grid, in + v * grad_sums.stride(0) + k, grad_sums.stride(2), scratch);
  });
}

// The statistic: sum over j of w_j ((C_j - phi_j)^2 + S_j^2) -> out [V, K]. C_j is close to phi_j where the loss is
// small: means and differences are taken in float64. sums [V, 2, J, K] float32, count [V] (rows behind each sum; 0
// gives 0), knots [2, J] float64 (phi, then weights), all contiguous.
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

JEPA_FAST_CPU(JEPA_FAST_IMPL(sigreg_add_sums) JEPA_FAST_IMPL(sigreg_gradient_) JEPA_FAST_IMPL(sigreg_statistic)
              JEPA_FAST_IMPL(sigreg_statistic_backward))
