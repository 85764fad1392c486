// Boxes of uint8 images resized with antialiasing, mirrored and normalised, one view per thread at a time.
//
// First along the height, one row of the view at a time: whole rows of bytes, interleaved or planar, are weighted and added
// into one row of floats that stays in the cache. Then along the width from that row, many pixels of the view at a time,
// each gathering from where it lies. Nothing else is stored in between.
// images [B, C, H, W] with any strides, or [P, C] contiguous with layout [B, 3]; all else contiguous, boxes float32.
#include "../common.h"
#include "../simd.h"

#include <algorithm>
#include <cmath>
#include <optional>

namespace jepa_fast::CPU_CAPABILITY {
namespace {

struct Taps {  // what the pixels [first, end) of an axis add to each of `count` pixels of the view
  int64_t first, end, max_taps;
  std::vector<int64_t> begin, num;  // relative to first
  std::vector<float> weight;        // [count, max_taps]

  Taps(float start, float length, int64_t size, int64_t count) : begin(count), num(count) {
    first = std::clamp<int64_t>(int64_t(std::ceil(start - 0.5)), 0, size - 1);
    end = std::clamp<int64_t>(int64_t(std::ceil(double(start) + double(length) - 0.5)), first + 1, size);
    const float scale = length / float(count), support = std::max(scale, 1.f), offset = start - float(first);
    max_taps = std::min<int64_t>(end - first, int64_t(2 * support) + 2);
    weight.resize(count * max_taps);
    for (int64_t i = 0; i < count; ++i) {
      const float centre = offset + scale * (float(i) + 0.5f);
      const int64_t last = end - first - 1;
      const int64_t low = std::clamp<int64_t>(int64_t(std::floor(centre - support + 0.5f)), 0, last);
      const int64_t high = std::clamp<int64_t>(int64_t(std::floor(centre + support + 0.5f)), low + 1, last + 1);
      begin[i] = low;
      num[i] = std::min(high - low, max_taps);
      float* w = weight.data() + i * max_taps;
      float total = 0.f;
      for (int64_t k = 0; k < num[i]; ++k) {
        w[k] = std::max(0.f, 1.f - std::abs(float(low + k) + 0.5f - centre) / support);
        total += w[k];
      }
      for (int64_t k = 0; k < num[i]; ++k) w[k] /= total;
    }
  }
};

struct Image {
  const uint8_t* pixels;
  int64_t H, W, s_c, s_h, s_w;
};

void add_row(const uint8_t* src, int64_t stride, int64_t n, float w, bool is_first, float* row) {
  if (stride != 1) {
    for (int64_t j = 0; j < n; ++j) row[j] = (is_first ? 0.f : row[j]) + w * float(src[j * stride]);
  } else if (is_first) {
    for (int64_t j = 0; j < n; ++j) row[j] = w * float(src[j]);
  } else {
    for (int64_t j = 0; j < n; ++j) row[j] += w * float(src[j]);
  }
}

struct Columns {  // the taps along the width, tap by tap, mirrored where the view is
  int64_t width, num;
  std::vector<int32_t> from;  // [width], in floats of the row
  std::vector<float> weight;  // [num, width], 0 beyond a pixel's own taps

  Columns(const Taps& taps, int64_t width, int64_t step, bool is_flipped)
      : width(width), num(*std::max_element(taps.num.begin(), taps.num.end())), from(width), weight(num * width) {
    for (int64_t x = 0; x < width; ++x) {
      const int64_t to = is_flipped ? width - 1 - x : x;
      from[to] = int32_t(taps.begin[x] * step);
      for (int64_t k = 0; k < taps.num[x]; ++k) weight[k * width + to] = taps.weight[x * taps.max_taps + k];
    }
  }
  void apply(const float* row, int64_t step, float* __restrict total) const {
    const int32_t* at = from.data();
    for (int64_t k = 0; k < num; ++k) {
      const float *w = weight.data() + k * width, *shifted = row + k * step;
      if (k == 0)
        for (int64_t x = 0; x < width; ++x) total[x] = w[x] * shifted[at[x]];
      else
        for (int64_t x = 0; x < width; ++x) total[x] += w[x] * shifted[at[x]];
    }
  }
};

template <typename T>
void resize(const Image& image, const Taps& rows, const Taps& columns, int64_t C, bool is_flipped, const float* scale,
            const float* shift, int64_t height, int64_t width, std::vector<float>& buffer, T* out) {
  const int64_t n = columns.end - columns.first;
  const bool is_interleaved = image.s_c == 1 && image.s_w == C;
  const int64_t step = is_interleaved ? C : 1;
  const Columns along(columns, width, step, is_flipped);
  // taps of weight 0 may lie beyond the row: zeros, for NaN times 0 is NaN
  buffer.assign((n + along.num) * C + width, 0.f);
  float *row = buffer.data(), *total = row + (n + along.num) * C;
  for (int64_t y = 0; y < height; ++y) {
    for (int64_t k = 0; k < rows.num[y]; ++k) {
      const uint8_t* src = image.pixels + (rows.first + rows.begin[y] + k) * image.s_h + columns.first * image.s_w;
      const float w = rows.weight[y * rows.max_taps + k];
      if (is_interleaved)
        add_row(src, 1, n * C, w, k == 0, row);
      else
        for (int64_t c = 0; c < C; ++c) add_row(src + c * image.s_c, image.s_w, n, w, k == 0, row + c * n);
    }
    for (int64_t c = 0; c < C; ++c) {
      along.apply(row + (is_interleaved ? c : c * n), step, total);
      T* to = out + (c * height + y) * width;
      for (int64_t x = 0; x < width; ++x) from_float(to + x, total[x] * scale[c] + shift[c]);
    }
  }
}

template <typename T>
void crop_resize(const Tensor& images, const int64_t* layout, const float* boxes, const int64_t* index, const bool* flips,
                 const std::vector<float>& scale, const std::vector<float>& shift, Tensor& out) {
  const auto* pixels = static_cast<const uint8_t*>(images.data_ptr());
  auto* dst = static_cast<T*>(out.data_ptr());
  const int64_t C = out.size(1), height = out.size(2), width = out.size(3);
  torch::stable::parallel_for(0, out.size(0), 1, [&](int64_t begin, int64_t end) {
    std::vector<float> buffer;
    for (int64_t view = begin; view < end; ++view) {
      const int64_t i = index[view], *where = layout + 3 * i;
      const Image image = layout ? Image{pixels + where[0] * C, where[1], where[2], 1, where[2] * C, C}
                                 : Image{pixels + i * images.stride(0), images.size(2), images.size(3), images.stride(1),
                                         images.stride(2), images.stride(3)};
      const float* box = boxes + 4 * view;
      const Taps rows(box[0], box[2], image.H, height), columns(box[1], box[3], image.W, width);
      resize(image, rows, columns, C, flips && flips[view], scale.data(), shift.data(), height, width, buffer,
             dst + view * C * height * width);
    }
  });
}

}  // namespace

void crop_resize(const Tensor& images, std::optional<Tensor> layout, const Tensor& boxes, const Tensor& image_index,
                 std::optional<Tensor> flips, std::optional<Tensor> mean, std::optional<Tensor> std, Tensor out) {
  std::vector<float> scale(out.size(1), 1.f / 255), shift(out.size(1), 0.f);
  if (mean)
    for (int64_t c = 0; c < out.size(1); ++c) {
      scale[c] = float(1 / (255. * floats(*std)[c]));
      shift[c] = float(-double(floats(*mean)[c]) / floats(*std)[c]);
    }
  const int64_t* where = layout ? layout->const_data_ptr<int64_t>() : nullptr;
  const bool* mirrored = flips ? flips->const_data_ptr<bool>() : nullptr;
  const int64_t* index = image_index.const_data_ptr<int64_t>();
  switch (out.scalar_type()) {
    case ScalarType::Float: return crop_resize<float>(images, where, floats(boxes), index, mirrored, scale, shift, out);
    case ScalarType::BFloat16: return crop_resize<bf16>(images, where, floats(boxes), index, mirrored, scale, shift, out);
    default: STD_TORCH_CHECK(false, "crop_resize: float32 or bfloat16 expected");
  }
}

}  // namespace jepa_fast::CPU_CAPABILITY

JEPA_FAST_CPU(JEPA_FAST_IMPL(crop_resize))
