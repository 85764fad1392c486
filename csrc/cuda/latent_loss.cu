// Layer-norm of target rows, gather, smooth L1 and the statistics of both rows in one launch and one pass over memory;
// its gradient in another, which recomputes the normalised rows from their saved mean and 1 / std.
//
// A warp per row, which is read from memory once and from the cache twice more: mean; variance, which also tells what
// rounding the mean lost; loss. Packs are summed in float32 and everything beyond in float64 and in fixed order: rows by
// a warp, warps by a block, blocks by a second, tiny launch.
// Bytes: 2 P D x element size and 16 P (backward: 3 P D); FLOPs: 20 P D. vith14-224-b128 (29184 rows of 1280, bfloat16):
// 149 MB, 34.7 us at 4.3 TB/s; backward 224 MB, 52.1 us.
// prediction [P, D], target [R, D] float32, bfloat16 or float16, target_idx [P], weight, mean, rstd [P] float32, all
// contiguous.
#include "common.cuh"

#include <type_traits>

namespace jepa_fast::cuda {
namespace {

constexpr int kWarps = 8, kRows = 32;  // per block
constexpr int kFinishThreads = 256;

struct Totals {
  double loss = 0, cosine = 0, power = 0, std = 0;
  __device__ void add(const Totals& o) { loss += o.loss, cosine += o.cosine, power += o.power, std += o.std; }
};

struct SmoothL1 {
  float beta, half, inverse;
  explicit SmoothL1(double b) : beta(float(b)), half(float(b / 2)), inverse(float(b > 0 ? 1 / b : 0)) {}

  __device__ float loss(float d) const {  // beta = 0: |d|
    const float a = fabsf(d);
    return a < beta ? a * (a * inverse) / 2 : a - half;
  }
  __device__ float slope(float d) const {  // beta = 0: the sign, 0 at 0; NaN stays NaN
    return fabsf(d) > beta ? copysignf(1.f, d) : d * inverse;
  }
};

// The mean of a row is rough + shift and its 1 / std is rstd + rest, so that neither loses digits to a rounding that the
// whole row would share: x - rough is exact for x near it.
struct Moments {
  float rough, shift, rstd, rest;
  double var;

  __device__ float centre(float x) const { return (x - rough) - shift; }
  __device__ float difference(float z, float centred) const {  // z - centred / std
    return fmaf(centred, -rest, fmaf(centred, -rstd, z));
  }
};

struct Row {  // of the target; its type is asked for as it is read, which halves the number of kernels twice
  const char* first;
  ScalarType dtype;

  template <int n>
  __device__ Floats<n> at(int d) const {
    switch (dtype) {
      case ScalarType::BFloat16: return load<n>(reinterpret_cast<const bf16*>(first) + d);
      case ScalarType::Half: return load<n>(reinterpret_cast<const half*>(first) + d);
      default: return load<n>(reinterpret_cast<const float*>(first) + d);
    }
  }
};
struct Rows {
  const char* first;
  const int64_t* index;  // or null: row p for prediction p
  int64_t bytes;         // of a row
  ScalarType dtype;

  Rows(const Tensor& target, const std::optional<Tensor>& target_idx)
      : first(static_cast<const char*>(target.data_ptr())), index(pointer<const int64_t>(target_idx)),
        bytes(target.size(1) * int64_t(target.element_size())), dtype(target.scalar_type()) {
    STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                    "latent_loss: target must be float32, bfloat16 or float16");
  }
  __device__ Row operator[](int64_t p) const { return {first + (index ? index[p] : p) * bytes, dtype}; }
};

template <int n, typename Visit>
__device__ inline void walk(int D, Visit visit) {  // visit(d) for the packs of a row that are this lane's
  for (int d = int(threadIdx.x) % 32 * n; d < D; d += 32 * n) visit(d);
}

template <int n>
__device__ Moments moments(const Row& row, int D, double eps) {
  double all = 0, centred = 0, squared = 0;
  walk<n>(D, [&](int d) {
    const Floats<n> x = row.at<n>(d);
    float part = 0;
#pragma unroll
    for (int j = 0; j < n; ++j) part += x[j];
    all += part;
  });
  const float rough = float(warp_sum(all) / D);
  walk<n>(D, [&](int d) {
    const Floats<n> x = row.at<n>(d);
    float part = 0, square = 0;
#pragma unroll
    for (int j = 0; j < n; ++j) {
      const float c = x[j] - rough;
      part += c;
      square += c * c;
    }
    centred += part;
    squared += square;
  });
  const double shift = warp_sum(centred) / D, var = max(warp_sum(squared) / D - shift * shift, 0.0);
  const double rstd = 1 / sqrt(var + eps);
  return {rough, float(shift), float(rstd), float(rstd - double(float(rstd))), var};
}

template <int n, typename Z>
__device__ Totals compare(const Z* z, const Row& row, int D, const Moments& m, const SmoothL1& smooth) {
  double losses = 0, product = 0, square = 0;
  walk<n>(D, [&](int d) {
    const Floats<n> x = load<n>(z + d), y = row.at<n>(d);
    float part_loss = 0, part_product = 0, part_square = 0;
#pragma unroll
    for (int j = 0; j < n; ++j) {
      const float centred = m.centre(y[j]);
      part_loss += smooth.loss(m.difference(x[j], centred));
      part_product += x[j] * centred;
      part_square += x[j] * x[j];
    }
    losses += part_loss;
    product += part_product;
    square += part_square;
  });
  // |h|^2 = D var rstd^2; lengths below 1e-8 count as that, as in torch's cosine_similarity
  const double power = warp_sum(square) / D, rstd = double(m.rstd) + m.rest, std = sqrt(m.var);
  const double lengths = max(sqrt(D * power), 1e-8) * max(sqrt(double(D)) * std * rstd, 1e-8);
  return {warp_sum(losses) / D, warp_sum(product) * rstd / lengths, power, std};
}

// totals [blocks]
template <int n, typename Z>
__global__ void __launch_bounds__(kWarps * 32, 3)
    latent_loss_kernel(const Z* __restrict__ prediction, const Rows target, const float* __restrict__ weight,
                       float* mean, float* rstd, Totals* totals, int64_t P, int D, double eps, SmoothL1 smooth) {
  __shared__ double sums[kWarps][4];
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  Totals mine;
  for (int r = warp; r < kRows; r += kWarps) {
    const int64_t p = int64_t(blockIdx.x) * kRows + r;  // one prediction
    if (p >= P) break;
    const Row row = target[p];
    const Moments m = moments<n>(row, D, eps);
    Totals of_row = compare<n>(prediction + p * D, row, D, m, smooth);
    if (weight) of_row.loss *= weight[p];
    mine.add(of_row);
    if (lane == 0) {
      mean[p] = m.rough + m.shift;
      rstd[p] = m.rstd;
    }
  }
  if (lane == 0) {
    sums[warp][0] = mine.loss, sums[warp][1] = mine.cosine;
    sums[warp][2] = mine.power, sums[warp][3] = mine.std;
  }
  __syncthreads();
  if (threadIdx.x) return;
  for (int w = 1; w < kWarps; ++w) mine.add({sums[w][0], sums[w][1], sums[w][2], sums[w][3]});
  totals[blockIdx.x] = mine;
}

__global__ void __launch_bounds__(kFinishThreads)
    finish_kernel(const Totals* totals, int64_t blocks, int64_t P, bool is_weighted, float* loss, float* stats) {
  __shared__ double sums[kFinishThreads][4];
  const int i = int(threadIdx.x);
  Totals mine;
  for (int64_t b = i; b < blocks; b += kFinishThreads) mine.add(totals[b]);
  sums[i][0] = mine.loss, sums[i][1] = mine.cosine, sums[i][2] = mine.power, sums[i][3] = mine.std;
  for (int half = kFinishThreads / 2; half; half /= 2) {
    __syncthreads();
    if (i < half)
      for (int k = 0; k < 4; ++k) sums[i][k] += sums[i + half][k];
  }
  if (i) return;
  *loss = float(is_weighted ? sums[0][0] : sums[0][0] / double(P));  // no rows: NaN, as the mean of nothing
  for (int k = 0; k < 3; ++k) stats[k] = float(sums[0][k + 1] / double(P));
}

template <int n, typename Z>
__global__ void __launch_bounds__(kWarps * 32, 3)
    latent_loss_backward_kernel(const float* __restrict__ grad_loss, const Z* __restrict__ prediction,
                                const Rows target, const float* __restrict__ weight, const float* __restrict__ mean,
                                const float* __restrict__ rstd, Z* __restrict__ out, int64_t P, int D, SmoothL1 smooth) {
  const int64_t p = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (p >= P) return;  // a whole warp
  const Row row = target[p];
  double centred = 0;
  walk<n>(D, [&](int d) {
    const Floats<n> x = row.at<n>(d);
    float part = 0;
#pragma unroll
    for (int j = 0; j < n; ++j) part += x[j] - mean[p];
    centred += part;
  });
  const Moments m{mean[p], float(warp_sum(centred) / D), rstd[p], 0, 0};
  const float scale = float(double(*grad_loss) / D * (weight ? double(weight[p]) : 1.0 / double(P)));
  walk<n>(D, [&](int d) {
    const Floats<n> x = load<n>(prediction + p * D + d), y = row.at<n>(d);
    Floats<n> grad;
#pragma unroll
    for (int j = 0; j < n; ++j) grad[j] = smooth.slope(m.difference(x[j], m.centre(y[j]))) * scale;
    store(out + p * D + d, grad);
  });
}

// call(z, width): the type of prediction, and as many elements as are read at once
template <typename Call>
void by_type(const Tensor& prediction, const Tensor& target, const Tensor& other, Call call) {
  by_dtype("latent_loss", prediction.scalar_type(), [&](auto z) {
    using Z = decltype(z);
    constexpr int n = 16 / sizeof(Z);
    const bool is_wide = by_packs<Z>(prediction.size(1), {prediction.data_ptr(), target.data_ptr(), other.data_ptr()});
    if (is_wide) call(z, std::integral_constant<int, n>());
    else call(z, std::integral_constant<int, 1>());
  });
}

}  // namespace

void latent_loss(const Tensor& prediction, const Tensor& target, std::optional<Tensor> target_idx,
                 std::optional<Tensor> weight, double beta, double eps, Tensor loss, Tensor stats, Tensor mean,
                 Tensor rstd) {
  const int64_t P = prediction.size(0), D = prediction.size(1), blocks = ceil_div(P, kRows);
  STD_TORCH_CHECK(D < (int64_t(1) << 31) - 256, "latent_loss: D must be below 2^31");
  const OnDevice device(prediction);
  Tensor scratch = torch::stable::new_empty(prediction, {blocks, 4}, ScalarType::Double);
  auto* totals = static_cast<Totals*>(scratch.data_ptr());
  by_type(prediction, target, prediction, [&](auto z, auto width) {
    using Z = decltype(z);
    launch(latent_loss_kernel<decltype(width)::value, Z>, dim3(unsigned(blocks)), kWarps * 32, 0, device.stream,
           static_cast<const Z*>(prediction.data_ptr()), Rows(target, target_idx), pointer<const float>(weight),
           mean.mutable_data_ptr<float>(), rstd.mutable_data_ptr<float>(), totals, P, int(D), eps, SmoothL1(beta));
  });
  launch(finish_kernel, 1, kFinishThreads, 0, device.stream, totals, blocks, P, weight.has_value(),
         loss.mutable_data_ptr<float>(), stats.mutable_data_ptr<float>());
}

void latent_loss_backward(const Tensor& grad_loss, const Tensor& prediction, const Tensor& target,
                          std::optional<Tensor> target_idx, std::optional<Tensor> weight, const Tensor& mean,
                          const Tensor& rstd, double beta, Tensor out) {
  const int64_t P = prediction.size(0), D = prediction.size(1);
  const OnDevice device(prediction);
  by_type(prediction, target, out, [&](auto z, auto width) {
    using Z = decltype(z);
    launch(latent_loss_backward_kernel<decltype(width)::value, Z>, dim3(unsigned(ceil_div(P, kWarps))), kWarps * 32, 0,
           device.stream, floats(grad_loss), static_cast<const Z*>(prediction.data_ptr()), Rows(target, target_idx),
           pointer<const float>(weight), floats(mean), floats(rstd), static_cast<Z*>(out.data_ptr()), P, int(D),
           SmoothL1(beta));
  });
}

}  // namespace jepa_fast::cuda

JEPA_FAST_CUDA(JEPA_FAST_CUDA_IMPL(latent_loss) JEPA_FAST_CUDA_IMPL(latent_loss_backward))
