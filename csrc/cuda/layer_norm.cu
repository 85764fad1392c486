// Layer normalisation of rows, with the residual sum before it and the cast after it; all gradients in one read.
//
// A row lies in the registers of as many warps as hold it: one up to 1280 numbers (backward: 512), where no barrier is
// needed. The mean is taken twice, of the row and of what is left, so that a row far from zero loses nothing. Arithmetic
// is float32; gradients of weight and bias are summed by each thread over its rows, by a block over its warps, and by a
// second launch over the blocks, in fixed order.
// Bytes: x and out, with a residual also the stream in and out (backward: grad, x, grad_x, the stream's gradient in and,
// where it has a dtype of its own, the branch's out), and 8 P; FLOPs: 11 P D (backward: 14 P D). vith14-224-b128 (32768
// rows of 1280), all bfloat16, alone: 168 MB, 39.0 us at 4.3 TB/s; backward 252 MB, 58.5 us. Branch and out bfloat16,
// stream float32: 503 MB, 117 us; backward 671 MB, 156 us. The blocks' sums are another 14 MB there.
// x, out, grad, ... [P, D], weight, bias [D], mean, rstd [P], grad_affine [2, D], all contiguous; weight and everything
// after it float32, rows in any of three types.
#include "column_sums.cuh"

#include <algorithm>

namespace jepa_fast::cuda {
namespace {

constexpr int kMostWidth = 8192, kMostWarps = 16;
constexpr int kHeld = 40, kHeldBackward = 16;  // numbers of a row per thread
constexpr int kRows = 8;                       // per block, where a row is one warp's
constexpr int kBackwardWarps = 2112;           // in all: 16 for each of an H200's 132 SMs, and the same on every GPU

// blockDim = (threads of a row, rows); visit(k, d) for the packs of a row that are this thread's, a warp's in one piece
template <int n, int held, typename Visit>
__device__ inline void walk(int D, Visit visit) {
  const int first = int(threadIdx.x) / 32 * 32 * held + int(threadIdx.x) % 32 * n;
#pragma unroll
  for (int k = 0; k < held / n; ++k)
    if (first + k * 32 * n < D) visit(k, first + k * 32 * n);
}

// sums over the threads of a row, the same bits in each; two calls in succession need two rooms
template <int n>
__device__ inline Floats<n> row_sum(Floats<n> sum, Floats<n>* room) {
#pragma unroll
  for (int i = 0; i < n; ++i) sum[i] = warp_sum(sum[i]);
  if (blockDim.x == 32) return sum;
  if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = room[0];
  for (int w = 1; w < int(blockDim.x) / 32; ++w)
#pragma unroll
    for (int i = 0; i < n; ++i) sum[i] += room[w][i];
  return sum;
}

struct Written {  // rows of a type that is asked for as they are written: a third of the kernels
  void* first;
  ScalarType dtype;

  explicit Written(const std::optional<Tensor>& t)
      : first(pointer<void>(t)), dtype(t ? t->scalar_type() : ScalarType::Float) {}

  template <int n, int held>
  __device__ void write(int64_t row, int D, const Floats<n> (&x)[held / n]) const {
    switch (dtype) {
      case ScalarType::BFloat16: return write_as<n, held, bf16>(row, D, x);
      case ScalarType::Half: return write_as<n, held, half>(row, D, x);
      default: return write_as<n, held, float>(row, D, x);
    }
  }
  template <int n, int held, typename T>
  __device__ void write_as(int64_t row, int D, const Floats<n> (&x)[held / n]) const {
    walk<n, held>(D, [&](int k, int d) { store(static_cast<T*>(first) + row * D + d, x[k]); });
  }
};

template <int n, typename X, typename S>
__global__ void __launch_bounds__(kRows * 32, n == 1 ? 1 : 2)
    layer_norm_kernel(const X* __restrict__ x, const S* __restrict__ residual, const float* __restrict__ weight,
                      const float* __restrict__ bias, Written out, S* __restrict__ summed, float* __restrict__ mean,
                      float* __restrict__ rstd, int64_t P, int D, float eps) {
  __shared__ Floats<1> room_1[kMostWarps];
  __shared__ Floats<2> room_2[kMostWarps];
  const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= P) return;  // all threads of a row
  Floats<n> h[kHeld / n] = {};
  if (residual) {
    walk<n, kHeld>(D, [&](int k, int d) {
      h[k] = load<n>(x + row * D + d);
      const Floats<n> r = load<n>(residual + row * D + d);
#pragma unroll
      for (int j = 0; j < n; ++j) h[k][j] = rounded<S>(h[k][j] + r[j]);
      store(summed + row * D + d, h[k]);
    });
  } else {
    walk<n, kHeld>(D, [&](int k, int d) { h[k] = load<n>(x + row * D + d); });
  }
  Floats<1> all = {};
#pragma unroll
  for (auto& pack : h)
#pragma unroll
    for (int j = 0; j < n; ++j) all[0] += pack[j];
  const float rough = row_sum(all, room_1)[0] / float(D);
  Floats<2> left = {};  // sum of h - rough, and of its square
  walk<n, kHeld>(D, [&](int k, int) {
#pragma unroll
    for (int j = 0; j < n; ++j) {
      h[k][j] -= rough;
      left[0] += h[k][j];
      left[1] += h[k][j] * h[k][j];
    }
  });
  left = row_sum(left, room_2);
  const float shift = left[0] / float(D), var = fmaxf(left[1] / float(D) - shift * shift, 0.f);
  const float scale = 1.f / sqrtf(var + eps);
  walk<n, kHeld>(D, [&](int k, int d) {
#pragma unroll
    for (int j = 0; j < n; ++j) h[k][j] = (h[k][j] - shift) * scale;
    if (weight) {
      const Floats<n> w = load<n>(weight + d);
#pragma unroll
      for (int j = 0; j < n; ++j) h[k][j] *= w[j];
    }
    if (bias) {
      const Floats<n> b = load<n>(bias + d);
#pragma unroll
      for (int j = 0; j < n; ++j) h[k][j] += b[j];
    }
  });
  out.write<n, kHeld>(row, D, h);
  if (threadIdx.x) return;
  mean[row] = rough + shift;
  rstd[row] = scale;
}

// one thread's sums over its rows -> those of the block; all threads of the block come
template <int n>
__device__ inline void add_rows(const Floats<n> (&sum)[kHeldBackward / n], int D, float* to) {
  if (blockDim.y == 1) return walk<n, kHeldBackward>(D, [&](int k, int d) { store(to + d, sum[k]); });
  __shared__ float of_row[kRows][32 * kHeldBackward];
  __syncthreads();
  walk<n, kHeldBackward>(D, [&](int k, int d) { store(&of_row[threadIdx.y][d], sum[k]); });
  __syncthreads();
  for (int d = int(threadIdx.y * 32 + threadIdx.x); d < D; d += kRows * 32) {
    float total = of_row[0][d];
#pragma unroll
    for (int r = 1; r < kRows; ++r) total += of_row[r][d];
    to[d] = total;
  }
}

// every gridDim.x-th row, or eight rows, per block; partial [blocks, 2, D], or null
template <int n, typename G, typename S>
__global__ void __launch_bounds__(kMostWidth / kHeldBackward)
    layer_norm_backward_kernel(const G* __restrict__ grad, const S* __restrict__ grad_summed, const S* __restrict__ x,
                               const float* __restrict__ weight, const float* __restrict__ mean,
                               const float* __restrict__ rstd, S* __restrict__ grad_x, Written grad_branch,
                               float* __restrict__ partial, int64_t P, int D) {
  constexpr int held = kHeldBackward, K = held / n;
  __shared__ Floats<2> room[2][kMostWarps];
  Floats<n> grad_weight[K] = {}, grad_bias[K] = {};
  int turn = 0;
  for (int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y; row < P; row += int64_t(gridDim.x) * blockDim.y) {
    Floats<n> g[K] = {}, z[K] = {}, s[K] = {};  // z: the normalised row
    walk<n, held>(D, [&](int k, int d) {
      g[k] = load<n>(grad + row * D + d);
      z[k] = load<n>(x + row * D + d);
      if (grad_summed) s[k] = load<n>(grad_summed + row * D + d);
    });
    const float m = mean[row], r = rstd[row];
    Floats<2> sum = {};
    walk<n, held>(D, [&](int k, int d) {
      const Floats<n> w = weight ? load<n>(weight + d) : Floats<n>();
#pragma unroll
      for (int j = 0; j < n; ++j) {
        z[k][j] = (z[k][j] - m) * r;
        grad_weight[k][j] += g[k][j] * z[k][j];
        grad_bias[k][j] += g[k][j];
        g[k][j] *= weight ? w[j] : 1.f;
        sum[0] += g[k][j];
        sum[1] += g[k][j] * z[k][j];
      }
    });
    sum = row_sum(sum, room[turn]);
    turn ^= 1;
    const float level = sum[0] / float(D), along = sum[1] / float(D);
    walk<n, held>(D, [&](int k, int d) {
#pragma unroll
      for (int j = 0; j < n; ++j) g[k][j] = fmaf(g[k][j] - level - z[k][j] * along, r, s[k][j]);
      store(grad_x + row * D + d, g[k]);
    });
    if (grad_branch.first) grad_branch.write<n, held>(row, D, g);
  }
  if (!partial) return;
  add_rows<n>(grad_weight, D, partial + int64_t(blockIdx.x) * 2 * D);
  add_rows<n>(grad_bias, D, partial + (int64_t(blockIdx.x) * 2 + 1) * D);
}

dim3 threads_of(int64_t D, int held) {
  STD_TORCH_CHECK(D <= kMostWidth, "layer_norm: rows of at most ", kMostWidth, " numbers");
  const auto threads = unsigned(std::max<int64_t>(ceil_div(D, held * 32), 1)) * 32;
  return dim3(threads, threads == 32 ? kRows : 1);
}

}  // namespace

void layer_norm(const Tensor& x, std::optional<Tensor> residual, std::optional<Tensor> weight, std::optional<Tensor> bias,
                double eps, Tensor out, std::optional<Tensor> summed, Tensor mean, Tensor rstd) {
  const int64_t P = x.size(0), D = x.size(1);
  const dim3 threads = threads_of(D, kHeld);
  const OnDevice device(x);
  const auto run = [&](auto branch, auto stream) {
    using X = decltype(branch);
    using S = decltype(stream);
    const auto* src = static_cast<const X*>(x.data_ptr());
    const auto* res = pointer<const S>(residual);
    auto* sum = pointer<S>(summed);
    const auto *w = pointer<const float>(weight), *b = pointer<const float>(bias);
    by_width<X, S>(D, {src, res, w, b, out.data_ptr(), sum}, [&](auto width) {
      launch(layer_norm_kernel<decltype(width)::value, X, S>, dim3(unsigned(ceil_div(P, threads.y))), threads, 0,
             device.stream, src, res, w, b, Written(out), sum, mean.mutable_data_ptr<float>(),
             rstd.mutable_data_ptr<float>(), P, int(D), float(eps));
    });
  };
  by_dtype("layer_norm", x.scalar_type(), [&](auto type) {
    const bool is_one_type = !residual || residual->scalar_type() == x.scalar_type();
    STD_TORCH_CHECK(is_one_type || residual->scalar_type() == ScalarType::Float,
                    "layer_norm: residual must be float32 or in the dtype of x");
    if (is_one_type) run(type, type);
    else run(type, float());
  });
}

void layer_norm_backward(const Tensor& grad, std::optional<Tensor> grad_summed, const Tensor& x,
                         std::optional<Tensor> weight, const Tensor& mean, const Tensor& rstd, Tensor grad_x,
                         std::optional<Tensor> grad_branch, std::optional<Tensor> grad_affine) {
  const int64_t P = x.size(0), D = x.size(1);
  const OnDevice device(x);
  by_dtype("layer_norm", x.scalar_type(), [&](auto stream) {
    by_dtype("layer_norm", grad.scalar_type(), [&](auto type) {
      using S = decltype(stream);
      using G = decltype(type);
      const auto* g = static_cast<const G*>(grad.data_ptr());
      const auto *s = pointer<const S>(grad_summed), *src = static_cast<const S*>(x.data_ptr());
      const auto* w = pointer<const float>(weight);
      auto* dst = static_cast<S*>(grad_x.data_ptr());
      by_width<G, S>(D, {g, s, src, w, dst, pointer<const void>(grad_branch)}, [&](auto width) {
        constexpr int n = decltype(width)::value;
        const dim3 threads = threads_of(D, kHeldBackward);
        const int64_t blocks = std::min(ceil_div(P, threads.y), ceil_div(kBackwardWarps * 32, threads.x * threads.y));
        std::optional<Tensor> scratch;
        if (grad_affine) scratch = torch::stable::new_empty(x, {blocks, 2, D}, ScalarType::Float);
        float* partial = pointer<float>(scratch);
        launch(layer_norm_backward_kernel<n, G, S>, dim3(unsigned(blocks)), threads, 0, device.stream, g, s, src, w,
               floats(mean), floats(rstd), dst, Written(grad_branch), partial, P, int(D));
        if (grad_affine) column_sums(partial, grad_affine->mutable_data_ptr<float>(), blocks, 2 * D, device.stream);
      });
    });
  });
}

}  // namespace jepa_fast::cuda

JEPA_FAST_CUDA(JEPA_FAST_CUDA_IMPL(layer_norm) JEPA_FAST_CUDA_IMPL(layer_norm_backward))
