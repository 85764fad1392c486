// Patches of images and clips by number, and the adjoint: patches added into place.
//
// Gather copies runs of p_w pixels and reads nothing else; scatter runs over the patches of the output, each of which
// knows the rows that land there, so that repeated indices need no atomics and the order of additions is fixed.
// pixels [B, C, T, H, W] with any strides (an image has T = 1), index [B, K] or [P] or none, contiguous as all the rest.
#include "../common.h"
#include "../simd.h"

#include <algorithm>
#include <optional>

namespace jepa_fast::CPU_CAPABILITY {
namespace {

constexpr int64_t kGrainBytes = 1 << 15;  // work below this is not worth another thread

struct Grid {  // where the patches lie
  int64_t C, N, rows, columns;       // channels, patches per sample, patches per frame axis
  int64_t p_t, p_h, p_w;             // pixels of a patch
  int64_t s_b, s_c, s_t, s_h, s_w;   // strides of the pixels

  Grid(const Tensor& pixels, int64_t p_t, int64_t p_h, int64_t p_w)
      : C(pixels.size(1)), rows(pixels.size(3) / p_h), columns(pixels.size(4) / p_w), p_t(p_t), p_h(p_h), p_w(p_w),
        s_b(pixels.stride(0)), s_c(pixels.stride(1)), s_t(pixels.stride(2)), s_h(pixels.stride(3)),
        s_w(pixels.stride(4)) {
    N = pixels.size(2) / p_t * rows * columns;
  }
  int64_t length() const { return C * p_t * p_h * p_w; }
  int64_t runs() const { return C * p_t * p_h; }
  int64_t first_pixel(int64_t row) const {  // of a patch of the packed batch
    const int64_t token = row % N, t = token / (rows * columns), h = token / columns % rows, w = token % columns;
    return row / N * s_b + t * p_t * s_t + h * p_h * s_h + w * p_w * s_w;
  }
  template <typename Visit>
  void for_each_run(int64_t row, Visit visit) const {  // visit(offset of the run in the pixels)
    const int64_t first = first_pixel(row);
    for (int64_t c = 0; c < C; ++c)
      for (int64_t t = 0; t < p_t; ++t)
        for (int64_t h = 0; h < p_h; ++h) visit(first + c * s_c + t * s_t + h * s_h);
  }
};

struct Rows {  // row of the packed batch that patch p comes from
  const int64_t* index;
  int64_t K, N;  // K = 0: the index counts rows already

  Rows(const std::optional<Tensor>& index, int64_t N)
      : index(index ? index->const_data_ptr<int64_t>() : nullptr), K(index && index->dim() == 2 ? index->size(1) : 0),
        N(N) {}
  int64_t operator[](int64_t p) const { return index ? index[p] + (K ? p / K * N : 0) : p; }
};

int64_t grain(int64_t row_bytes) { return std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(1, row_bytes)); }

template <int64_t kBytes>
void copy_run(char* to, const char* from, int64_t) { std::memcpy(to, from, kBytes); }
template <>
void copy_run<0>(char* to, const char* from, int64_t bytes) { std::memcpy(to, from, bytes); }

template <typename Word, int64_t kBytes>  // the size of a run where it is a common one, so that no call is needed
void gather(const Grid& grid, const Rows& rows, int64_t num_patches, const Tensor& pixels, Tensor& out) {
  const auto* src = static_cast<const Word*>(pixels.data_ptr());
  auto* dst = static_cast<Word*>(out.data_ptr());
  const int64_t length = grid.length();
  torch::stable::parallel_for(0, num_patches, grain(length * sizeof(Word)), [&](int64_t begin, int64_t end) {
    Word* to = dst + begin * length;
    for (int64_t p = begin; p < end; ++p)
      grid.for_each_run(rows[p], [&](int64_t offset) {
        if (grid.s_w == 1)
          copy_run<kBytes>(reinterpret_cast<char*>(to), reinterpret_cast<const char*>(src + offset),
                           grid.p_w * sizeof(Word));
        else
          for (int64_t w = 0; w < grid.p_w; ++w) to[w] = src[offset + w * grid.s_w];
        to += grid.p_w;
      });
  });
}

template <typename Word>
void gather(const Grid& grid, const Rows& rows, int64_t num_patches, const Tensor& pixels, Tensor& out) {
  switch (grid.p_w * sizeof(Word)) {
    case 16: return gather<Word, 16>(grid, rows, num_patches, pixels, out);
    case 28: return gather<Word, 28>(grid, rows, num_patches, pixels, out);
    case 32: return gather<Word, 32>(grid, rows, num_patches, pixels, out);
    case 56: return gather<Word, 56>(grid, rows, num_patches, pixels, out);
    case 64: return gather<Word, 64>(grid, rows, num_patches, pixels, out);
    default: return gather<Word, 0>(grid, rows, num_patches, pixels, out);
  }
}

using CPU_CAPABILITY::from_float;
using CPU_CAPABILITY::to_float;
inline double to_float(double x) { return x; }
inline void from_float(double* p, double x) { *p = x; }

template <typename T, typename Sum>
void scatter(const Grid& grid, const Rows& rows, int64_t num_patches, const Tensor& patches, Tensor& out) {
  const auto* src = static_cast<const T*>(patches.data_ptr());
  auto* dst = static_cast<T*>(out.data_ptr());
  const int64_t length = grid.length(), num_rows = out.size(0) * grid.N;
  // the patches of each row as a chain, lowest first: that is the order in which they are added
  std::vector<int64_t> head(num_rows, -1), next(num_patches);
  for (int64_t p = num_patches - 1; p >= 0; --p) {
    next[p] = head[rows[p]];
    head[rows[p]] = p;
  }
  torch::stable::parallel_for(0, num_rows, grain(length * sizeof(T)), [&](int64_t begin, int64_t end) {
    std::vector<Sum> sums(length);
    for (int64_t row = begin; row < end; ++row) {
      std::fill(sums.begin(), sums.end(), Sum(0));
      for (int64_t p = head[row]; p >= 0; p = next[p])
        for (int64_t i = 0; i < length; ++i) sums[i] += to_float(src[p * length + i]);
      const Sum* from = sums.data();
      grid.for_each_run(row, [&](int64_t offset) {
        for (int64_t w = 0; w < grid.p_w; ++w) from_float(dst + offset + w, from[w]);
        from += grid.p_w;
      });
    }
  });
}

}  // namespace

void gather_patches(const Tensor& pixels, std::optional<Tensor> index, int64_t p_t, int64_t p_h, int64_t p_w,
                    Tensor out) {
  const Grid grid(pixels, p_t, p_h, p_w);
  const Rows rows(index, grid.N);
  const int64_t num_patches = index ? index->numel() : pixels.size(0) * grid.N;
  switch (pixels.element_size()) {
    case 2: return gather<uint16_t>(grid, rows, num_patches, pixels, out);
    case 4: return gather<uint32_t>(grid, rows, num_patches, pixels, out);
    case 8: return gather<uint64_t>(grid, rows, num_patches, pixels, out);
    default: STD_TORCH_CHECK(false, "gather_patches: elements of 2, 4 or 8 bytes expected");
  }
}

void scatter_patches(const Tensor& patches, std::optional<Tensor> index, int64_t p_t, int64_t p_h, int64_t p_w,
                     Tensor out) {
  const Grid grid(out, p_t, p_h, p_w);
  const Rows rows(index, grid.N);
  const int64_t num_patches = index ? index->numel() : out.size(0) * grid.N;
  switch (patches.scalar_type()) {
    case ScalarType::Float: return scatter<float, float>(grid, rows, num_patches, patches, out);
    case ScalarType::BFloat16: return scatter<bf16, float>(grid, rows, num_patches, patches, out);
    case ScalarType::Double: return scatter<double, double>(grid, rows, num_patches, patches, out);
    default: STD_TORCH_CHECK(false, "scatter_patches: float32, bfloat16 or float64 expected");
  }
}

}  // namespace jepa_fast::CPU_CAPABILITY

JEPA_FAST_CPU(JEPA_FAST_IMPL(gather_patches) JEPA_FAST_IMPL(scatter_patches))
