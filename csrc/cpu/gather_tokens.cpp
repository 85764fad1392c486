// Rows of x by index, with positions added, and the adjoint: rows added into place.
//
// One pass over memory: gather reads and writes each kept row once, scatter writes each row of the output once.
// Scatter runs over rows of the output, so that repeated indices need no atomics and the order of additions is fixed.
// x [B, N, D], index [B, K] (packed: B = 1), positions [R, D], all contiguous. Indices were checked by the caller.
#include "../common.h"
#include "../simd.h"

#include <algorithm>
#include <optional>

namespace jepa_fast::CPU_CAPABILITY {
namespace {

constexpr int64_t kGrainBytes = 1 << 15;  // work below this is not worth another thread

template <typename T>
void add_row(T* out, const T* a, const T* b, int64_t D) {
  int64_t d = 0;
  for (; d + kLanes <= D; d += kLanes) store(out + d, load(a + d) + load(b + d));
  for (; d < D; ++d) from_float(out + d, to_float(a[d]) + to_float(b[d]));
}
void add_row(double* out, const double* a, const double* b, int64_t D) {
  for (int64_t d = 0; d < D; ++d) out[d] = a[d] + b[d];
}

template <typename T>
void add_to_row(float* sum, const T* row, int64_t D) {
  int64_t d = 0;
  for (; d + kLanes <= D; d += kLanes) store(sum + d, load(sum + d) + load(row + d));
  for (; d < D; ++d) sum[d] += to_float(row[d]);
}
void add_to_row(double* sum, const double* row, int64_t D) {
  for (int64_t d = 0; d < D; ++d) sum[d] += row[d];
}

template <typename T> struct Accumulator { using type = float; };
template <> struct Accumulator<double> { using type = double; };

template <typename T>
void round_row(T* out, const float* sum, int64_t D) {
  int64_t d = 0;
  for (; d + kLanes <= D; d += kLanes) store(out + d, load(sum + d));
  for (; d < D; ++d) from_float(out + d, sum[d]);
}
void round_row(double* out, const double* sum, int64_t D) { std::memcpy(out, sum, D * sizeof(double)); }

int64_t grain(int64_t row_bytes) { return std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(1, row_bytes)); }

template <typename T>
void gather(const Tensor& x, const Tensor& index, const std::optional<Tensor>& positions,
            const std::optional<Tensor>& position_index, Tensor& out) {
  const int64_t B = x.size(0), N = x.size(1), D = x.size(2), K = index.size(1);
  const auto* src = static_cast<const T*>(x.data_ptr());
  const auto* idx = index.const_data_ptr<int64_t>();
  const auto* pos = positions ? static_cast<const T*>(positions->data_ptr()) : nullptr;
  const auto* pos_idx = position_index ? position_index->const_data_ptr<int64_t>() : nullptr;
  const int64_t R = positions ? positions->size(0) : 1;
  auto* dst = static_cast<T*>(out.data_ptr());
  torch::stable::parallel_for(0, B * K, grain(D * sizeof(T)), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {  // one kept token
      const T* row = src + ((p / K) * N + idx[p]) * D;
      if (pos) add_row(dst + p * D, row, pos + (pos_idx ? pos_idx[p] : idx[p] % R) * D, D);
      else std::memcpy(dst + p * D, row, D * sizeof(T));
    }
  });
}

template <typename T>
void scatter(const Tensor& values, const Tensor& index, const std::optional<Tensor>& fill,
             const std::optional<Tensor>& positions, Tensor& out) {
  using Acc = typename Accumulator<T>::type;
  const int64_t B = out.size(0), N = out.size(1), D = out.size(2), K = index.size(1);
  const auto* src = static_cast<const T*>(values.data_ptr());
  const auto* idx = index.const_data_ptr<int64_t>();
  const auto* mask = fill ? static_cast<const T*>(fill->data_ptr()) : nullptr;
  const auto* pos = positions ? static_cast<const T*>(positions->data_ptr()) : nullptr;
  const int64_t R = positions ? positions->size(0) : 1;
  auto* dst = static_cast<T*>(out.data_ptr());
  // no more chunks than threads: each one reads the whole index of its samples
  const int64_t rows = B * N, threads = torch::stable::get_num_threads();
  const int64_t chunk = std::max(grain(D * sizeof(T)), (rows + threads - 1) / std::max<int64_t>(1, threads));
  torch::stable::parallel_for(0, rows, chunk, [&](int64_t begin, int64_t end) {
    std::vector<Acc> sums((end - begin) * D, Acc(0));
    std::vector<char> is_written(end - begin, 0);
    const int64_t first = begin / N, last = (end + N - 1) / N;  // samples whose tokens may land here
    for (int64_t p = first * K; p < last * K; ++p) {
      const int64_t row = (p / K) * N + idx[p];
      if (row < begin || row >= end) continue;
      add_to_row(sums.data() + (row - begin) * D, src + p * D, D);
      is_written[row - begin] = 1;
    }
    for (int64_t row = begin; row < end; ++row) {
      Acc* sum = sums.data() + (row - begin) * D;
      if (mask && !is_written[row - begin]) add_to_row(sum, mask, D);
      if (pos) add_to_row(sum, pos + (row % R) * D, D);
      round_row(dst + row * D, sum, D);
    }
  });
}

}  // namespace

void gather_tokens(const Tensor& x, const Tensor& index, std::optional<Tensor> positions,
                   std::optional<Tensor> position_index, Tensor out) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return gather<float>(x, index, positions, position_index, out);
    case ScalarType::BFloat16: return gather<bf16>(x, index, positions, position_index, out);
    case ScalarType::Double: return gather<double>(x, index, positions, position_index, out);
    default: STD_TORCH_CHECK(false, "gather_tokens: float32, bfloat16 or float64 expected");
  }
}

void scatter_tokens(const Tensor& values, const Tensor& index, std::optional<Tensor> fill,
                    std::optional<Tensor> positions, Tensor out) {
  switch (values.scalar_type()) {
    case ScalarType::Float: return scatter<float>(values, index, fill, positions, out);
    case ScalarType::BFloat16: return scatter<bf16>(values, index, fill, positions, out);
    case ScalarType::Double: return scatter<double>(values, index, fill, positions, out);
    default: STD_TORCH_CHECK(false, "scatter_tokens: float32, bfloat16 or float64 expected");
  }
}

}  // namespace jepa_fast::CPU_CAPABILITY

JEPA_FAST_CPU(JEPA_FAST_IMPL(gather_tokens) JEPA_FAST_IMPL(scatter_tokens))
