// Context rows and mask tokens with their positions, packed for the predictor in one pass; its gradient in another.
//
// Forward: each row is written once, in packs of 16 bytes of the wider type, widened as it is read; the context and the
// mask token are never joined. Backward: a warp per context row adds its places in their order (places.cuh); the rows of
// the mask token, a good half of all, are added up by blocks over spans of rows and by a second launch over the blocks.
// Both sum in float32 and in fixed order, and read every row of grad once.
// Bytes: R D x 2 + P D x 4, and 16 per row (backward: 8 per row, twice); FLOPs: none that count. vith14-224-b128 (8922
// context rows in bfloat16, 58112 rows of 384 in float32): 97 MB, 22.6 us at 4.3 TB/s; backward 97 MB, 22.6 us.
// context [R, D], mask_token [D], index, position_index [P], positions [L, D], out, grad [P, D], grad_mask_token [D]
// float32, all contiguous. Indices were checked by the caller.
#include "column_sums.cuh"
#include "places.cuh"

#include <algorithm>

namespace jepa_fast::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32, kMostRows = 64;
constexpr int kPacks = 4;                                  // of a row, held by one lane
constexpr int64_t kBackwardRows = 64, kMostBlocks = 1024;  // rows per block at least, blocks of rows at most

// n numbers at a time, V of these per row; rows_per_block rows of the output per block
template <int n, typename C, typename M>
__global__ void __launch_bounds__(kThreads)
    assemble_kernel(const C* __restrict__ context, const M* __restrict__ mask_token, const int64_t* __restrict__ index,
                    const M* __restrict__ positions, const int64_t* __restrict__ position_index, M* __restrict__ out,
                    int64_t P, int64_t R, int V, int rows_per_block) {
  __shared__ int64_t source[kMostRows], position[kMostRows];
  const int64_t first = int64_t(blockIdx.x) * rows_per_block, D = int64_t(V) * n;
  const int rows = int(min(int64_t(rows_per_block), P - first));
  if (int(threadIdx.x) < rows) {
    source[threadIdx.x] = index[first + threadIdx.x];
    position[threadIdx.x] = position_index[first + threadIdx.x] * D;
  }
  __syncthreads();
  for (int i = int(threadIdx.x); i < rows * V; i += kThreads) {
    const int row = i / V, d = (i - row * V) * n;
    const int64_t r = source[row];
    Floats<n> sum = r < R ? load<n>(context + r * D + d) : load<n>(mask_token + d);
    const Floats<n> added = load<n>(positions + position[row] + d);
#pragma unroll
    for (int j = 0; j < n; ++j) sum[j] += added[j];
    store(out + (first + row) * D + d, sum);
  }
}

template <int n>
__device__ inline void add(Floats<n>& sum, const Floats<n>& x) {
#pragma unroll
  for (int j = 0; j < n; ++j) sum[j] += x[j];
}

// a warp per context row and 32 kPacks n numbers of it
template <int n, typename C, typename M>
__global__ void __launch_bounds__(kThreads, 2)
    context_kernel(const M* __restrict__ grad, Places places, C* __restrict__ grad_context, int64_t R, int V) {
  const int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32, D = int64_t(V) * n;
  const int first = int(blockIdx.y) * 32 * kPacks + int(threadIdx.x) % 32;
  if (row >= R) return;  // a whole warp
  Floats<n> sums[kPacks] = {};
  places.for_each(row, [&](int64_t p) {
#pragma unroll
    for (int k = 0; k < kPacks; ++k)
      if (first + 32 * k < V) add(sums[k], load<n>(grad + p * D + (first + 32 * k) * n));
  });
#pragma unroll
  for (int k = 0; k < kPacks; ++k)
    if (first + 32 * k < V) store(grad_context + row * D + (first + 32 * k) * n, sums[k]);
}

// those of `rows` rows per block that are the mask token, and 32 n columns; sums [blocks, D]
template <int n, typename M>
__global__ void __launch_bounds__(kThreads)
    mask_token_kernel(const M* __restrict__ grad, const int64_t* __restrict__ index, float* __restrict__ sums, int64_t P,
                      int64_t D, int64_t R, int64_t rows) {
  __shared__ float of_warp[kWarps][32 * n];
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int64_t first = int64_t(blockIdx.y) * 32 * n, d = first + lane * n;
  const int64_t end = min(P, (int64_t(blockIdx.x) + 1) * rows);
  Floats<n> sum = {};
#pragma unroll 4
  for (int64_t p = int64_t(blockIdx.x) * rows + warp; p < end; p += kWarps)
    if (index[p] == R && d < D) add(sum, load<n>(grad + p * D + d));
#pragma unroll
  for (int j = 0; j < n; ++j) of_warp[warp][j * 32 + lane] = sum[j];
  __syncthreads();
  for (int i = int(threadIdx.x); i < 32 * n; i += kThreads) {
    const int64_t column = first + i % 32 * n + i / 32;
    if (column >= D) continue;
    float total = of_warp[0][i];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) total += of_warp[w][i];
    sums[blockIdx.x * D + column] = total;
  }
}

}  // namespace

void assemble_predictor_input(const Tensor& context, const Tensor& mask_token, const Tensor& index,
                              const Tensor& positions, const Tensor& position_index, Tensor out) {
  const int64_t R = context.size(0), D = context.size(1), P = index.size(0);
  if (P * D == 0) return;
  STD_TORCH_CHECK(D < (int64_t(1) << 24), "assemble_predictor_input: D must be below 2^24");
  const OnDevice device(out);
  by_dtype("assemble_predictor_input", context.scalar_type(), [&](auto narrow) {
    by_dtype("assemble_predictor_input", mask_token.scalar_type(), [&](auto type) {
      using C = decltype(narrow);
      using M = decltype(type);
      const auto* src = static_cast<const C*>(context.data_ptr());
      const auto *mask = static_cast<const M*>(mask_token.data_ptr()), *pos = static_cast<const M*>(positions.data_ptr());
      auto* dst = static_cast<M*>(out.data_ptr());
      by_width<C, M>(D, {src, mask, pos, dst}, [&](auto width) {
        constexpr int n = decltype(width)::value;
        const int V = int(D / n), rows = std::clamp(2048 / V, 1, kMostRows);
        launch(assemble_kernel<n, C, M>, dim3(unsigned(ceil_div(P, rows))), kThreads, 0, device.stream, src, mask,
               index.const_data_ptr<int64_t>(), pos, position_index.const_data_ptr<int64_t>(), dst, P, R, V, rows);
      });
    });
  });
}

void assemble_predictor_input_backward(const Tensor& grad, const Tensor& index, Tensor grad_context,
                                       Tensor grad_mask_token) {
  const int64_t P = grad.size(0), D = grad.size(1), R = grad_context.size(0);
  if (D == 0) return;
  STD_TORCH_CHECK(D < (int64_t(1) << 22), "assemble_predictor_input: D must be below 2^22");
  const OnDevice device(grad);
  const int64_t rows = std::max(kBackwardRows, ceil_div(P, kMostBlocks)), blocks = ceil_div(P, rows);
  std::optional<Tensor> spans;
  const Places places = places_of(index, 1, P, R, spans, device.stream);
  Tensor scratch = torch::stable::new_empty(grad, {blocks, D}, ScalarType::Float);
  float* sums = scratch.mutable_data_ptr<float>();
  by_dtype("assemble_predictor_input", grad.scalar_type(), [&](auto type) {
    by_dtype("assemble_predictor_input", grad_context.scalar_type(), [&](auto narrow) {
      using M = decltype(type);
      using C = decltype(narrow);
      const auto* src = static_cast<const M*>(grad.data_ptr());
      auto* dst = static_cast<C*>(grad_context.data_ptr());
      by_width<C, M>(D, {src, dst}, [&](auto width) {
        constexpr int n = decltype(width)::value;
        const int V = int(D / n);
        launch(context_kernel<n, C, M>, dim3(unsigned(ceil_div(R, kWarps)), unsigned(ceil_div(V, 32 * kPacks))), kThreads,
               0, device.stream, src, places, dst, R, V);
        launch(mask_token_kernel<n, M>, dim3(unsigned(blocks), unsigned(ceil_div(D, 32 * n))), kThreads, 0, device.stream,
               src, places.index, sums, P, D, R, rows);
      });
    });
  });
  column_sums(sums, grad_mask_token.mutable_data_ptr<float>(), blocks, D, device.stream);
}

}  // namespace jepa_fast::cuda

JEPA_FAST_CUDA(JEPA_FAST_CUDA_IMPL(assemble_predictor_input) JEPA_FAST_CUDA_IMPL(assemble_predictor_input_backward))
