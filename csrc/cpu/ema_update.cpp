// target = target * m, then + (1 - m) * source, for a list of tensors in one pass over memory.
//
// Bit-equal to PyTorch's `t.mul_(m).add_((1 - m) * s)`: every product is rounded before the sum (no fused
// multiply-add; setup.py compiles with -ffp-contract=off), and 1 - m is taken in float64.
// target float32, source float32 or bfloat16, same sizes pairwise, all contiguous.
#include "../common.h"
#include "../simd.h"
#include "../tensor_lists.h"

namespace jepa_fast::CPU_CAPABILITY {
namespace {

template <typename S>
void update(float* target, const S* source, int64_t n, Vec keep, Vec take) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(target + i, load(target + i) * keep + load(source + i) * take);
  if (i < n) {
    const int rest = n - i;
    store_partial(target + i, load_partial(target + i, rest) * keep + load_partial(source + i, rest) * take, rest);
  }
}

}  // namespace

void ema_update_(std::vector<Tensor> target, std::vector<Tensor> source, double momentum) {
  std::vector<int64_t> sizes, bytes;
  std::vector<float*> targets;
  std::vector<const void*> sources;
  std::vector<bool> is_half;
  for (size_t i = 0; i < target.size(); ++i) {
    sizes.push_back(target[i].numel());
    is_half.push_back(source[i].scalar_type() == ScalarType::BFloat16);
    bytes.push_back(is_half.back() ? 10 : 12);
    targets.push_back(static_cast<float*>(target[i].data_ptr()));
    sources.push_back(source[i].data_ptr());
  }
  const Vec keep = broadcast(float(momentum)), take = broadcast(float(1. - momentum));
  parallel_for_lists(sizes, bytes, [&](size_t i, int64_t begin, int64_t end) {
    float* t = targets[i] + begin;
    if (is_half[i]) update(t, static_cast<const bf16*>(sources[i]) + begin, end - begin, keep, take);
    else update(t, static_cast<const float*>(sources[i]) + begin, end - begin, keep, take);
  });
}

}  // namespace jepa_fast::CPU_CAPABILITY

JEPA_FAST_CPU(JEPA_FAST_IMPL(ema_update_))
