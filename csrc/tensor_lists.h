// One parallel loop over all elements of a list of tensors, so that small tensors do not cost a dispatch each.
#pragma once

#include "common.h"

#include <algorithm>

namespace jepa_fast::CPU_CAPABILITY {

// sizes[i] elements of tensor i, each touching bytes[i] bytes of memory; body(i, begin, end) gets a range of elements.
// Threads get equal shares of the bytes. A tensor is cut only at multiples of 64 elements: whole cache lines.
template <typename Body>
void parallel_for_lists(const std::vector<int64_t>& sizes, const std::vector<int64_t>& bytes, const Body& body) {
  constexpr int64_t kGrainBytes = 1 << 17, kCut = 64;
  std::vector<int64_t> starts(sizes.size() + 1, 0);
  for (size_t i = 0; i < sizes.size(); ++i) starts[i + 1] = starts[i] + sizes[i] * bytes[i];
  torch::stable::parallel_for(0, starts.back(), kGrainBytes, [&](int64_t begin, int64_t end) {
    size_t i = std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin() - 1;
    for (; i < sizes.size() && starts[i] < end; ++i) {
      const auto element = [&](int64_t byte) {
        return byte >= starts[i + 1] ? sizes[i] : std::max<int64_t>(0, byte - starts[i]) / bytes[i] / kCut * kCut;
      };
      if (element(begin) < element(end)) body(i, element(begin), element(end));
    }
  });
}

}  // namespace jepa_fast::CPU_CAPABILITY
