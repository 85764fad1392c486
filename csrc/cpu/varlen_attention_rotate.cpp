// Rotary positions: the first R columns of every head in pairs, x'[c] = x[c] rotary[0, c] + x[c ^ 1] rotary[1, c].
//
// x, out [P, H, d] float32 or bfloat16, rows and heads anywhere, columns contiguous; out may be x.
// rotary [P, 2, R] float32 contiguous, R even.
#include "../common.h"
#include "../simd.h"

#include <algorithm>

namespace jepa_fast::CPU_CAPABILITY {
namespace {

constexpr int64_t kGrainElements = 1 << 14;  // work below this is not worth another thread

template <int... kLane>
inline Vec swapped(Vec v, std::integer_sequence<int, kLane...>) {
  return __builtin_shufflevector(v, v, (kLane ^ 1)...);
}

inline Vec turned(Vec x, Vec kept, Vec crossed) {
  return fma(x, kept, swapped(x, std::make_integer_sequence<int, kLanes>()) * crossed);
}

template <typename T>
void rotate(const Tensor& x, const Tensor& rotary, Tensor& out) {
  const int64_t P = x.size(0), H = x.size(1), d = x.size(2), R = rotary.size(2);
  const auto* src = static_cast<const T*>(x.data_ptr());
  auto* dst = static_cast<T*>(out.data_ptr());
  const float* table = floats(rotary);
  torch::stable::parallel_for(0, P, std::max<int64_t>(1, kGrainElements / (H * d)), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {  // one token
      const float *kept = table + p * 2 * R, *crossed = kept + R;
      for (int64_t h = 0; h < H; ++h) {
        const T* head = src + p * x.stride(0) + h * x.stride(1);
        T* result = dst + p * out.stride(0) + h * out.stride(1);
        int64_t c = 0;
        for (; c + kLanes <= R; c += kLanes) store(result + c, turned(load(head + c), load(kept + c), load(crossed + c)));
        if (const int n = int(R - c)) {
          const Vec v = turned(load_partial(head + c, n), load_partial(kept + c, n), load_partial(crossed + c, n));
          store_partial(result + c, v, n);
        }
        if (result != head) std::copy(head + R, head + d, result + R);
      }
    }
  });
}

}  // namespace

void rotate_heads(const Tensor& x, const Tensor& rotary, Tensor out) {
  if (x.numel() == 0) return;
  switch (x.scalar_type()) {
    case ScalarType::Float: return rotate<float>(x, rotary, out);
    case ScalarType::BFloat16: return rotate<bf16>(x, rotary, out);
    default: STD_TORCH_CHECK(false, "rotate_heads: float32 or bfloat16 expected");
  }
}

}  // namespace jepa_fast::CPU_CAPABILITY

JEPA_FAST_CPU(JEPA_FAST_IMPL(rotate_heads))
