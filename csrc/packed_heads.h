// Heads of packed sequences as tasks: what the attention kernels share.
#pragma once

#include "common.h"
#include "tiles.h"

#include <atomic>
#include <limits>
#include <memory>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace jepa_fast::CPU_CAPABILITY {

constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f;

template <typename T>
struct Heads {  // [P, H, d] with its strides
  T* data;
  int64_t token, head;
  explicit Heads(const Tensor& t) : data(static_cast<T*>(t.data_ptr())), token(t.stride(0)), head(t.stride(1)) {}
  T* at(int64_t row, int64_t h) const { return data + row * token + h * head; }
};

struct Task { int64_t query, num_queries, key, num_keys, head; };  // rows of q and rows of k, of one head

// every head of each sequence, its queries in chunks of nearly equal size
inline std::vector<Task> make_tasks(const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, int64_t num_heads,
                                    int64_t most_queries) {
  const auto *q = cu_seqlens_q.const_data_ptr<int32_t>(), *k = cu_seqlens_k.const_data_ptr<int32_t>();
  std::vector<Task> tasks;
  for (int64_t s = 0; s + 1 < cu_seqlens_q.size(0); ++s) {
    const int64_t queries = q[s + 1] - q[s], chunks = std::max<int64_t>(1, divide_up(queries, most_queries));
    for (int64_t i = 0, begin = 0; i < chunks; ++i) {
      const int64_t rows = std::min(queries - begin, whole_vectors(divide_up(queries - begin, chunks - i)));
      for (int64_t h = 0; h < num_heads; ++h) tasks.push_back({q[s] + begin, rows, k[s], k[s + 1] - k[s], h});
      begin += rows;
    }
  }
  return tasks;
}

struct Scratch {  // float32 memory of one thread, handed out in pieces that begin on a cache line
  float* next;
  static int64_t size(int64_t floats) { return divide_up(floats, 16) * 16; }
  float* take(int64_t floats) {
    next += size(floats);
    return next - size(floats);
  }
};

// rows that the next task reads or this one writes, fetched a few at a time while there is arithmetic to do: with rows
// of a head far apart, neither the hardware's prefetcher nor the reorder buffer keeps enough of them on their way
class Prefetch {
 public:
  template <typename T>
  void add(const Heads<T>& heads, int64_t row, int64_t n, int64_t h, int64_t d) {
    if (n == 0) return;
    const auto first = reinterpret_cast<uintptr_t>(heads.at(row, h)) / kLine, step = heads.token * sizeof(T);
    const auto last = (reinterpret_cast<uintptr_t>(heads.at(row, h) + d) - 1) / kLine;
    parts_[num_parts_++] = {reinterpret_cast<const char*>(first * kLine), int64_t(step), n, int64_t(last - first + 1),
                            !std::is_const_v<T>};
    num_rows_ += n;
  }
  int64_t num_rows() const { return num_rows_; }
  void fetch(int64_t rows) {
    for (; rows > 0 && part_ < num_parts_; --rows) {
      Part& part = parts_[part_];
      for (int64_t i = 0; i < part.lines; ++i) {
        if (part.is_write) __builtin_prefetch(part.row + i * kLine, 1, 2);
        else __builtin_prefetch(part.row + i * kLine, 0, 2);
      }
      part.row += part.step;
      if (--part.rows == 0) ++part_;
    }
  }

 private:
  static constexpr int64_t kLine = 64;
  struct Part { const char* row; int64_t step, rows, lines; bool is_write; } parts_[8];
  int64_t num_parts_ = 0, part_ = 0, num_rows_ = 0;
};

// numbers below 2^-126 are 0 while one of these lives: probabilities of saturated scores come out that small, and
// arithmetic on them takes a hundred times as long
class FlushDenormals {
 public:
#if defined(__SSE2__)
  FlushDenormals() { _mm_setcsr(before_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(before_); }

 private:
  unsigned before_ = _mm_getcsr();
#endif
};

// tasks handed to threads as they become free; what a task computes does not depend on who computes it
template <typename Kernel>
void run(const Kernel& kernel, const std::vector<Task>& tasks, int64_t d) {
  int64_t queries = 0, keys = 0, work = 0;
  for (const Task& task : tasks) {
    queries = std::max(queries, task.num_queries);
    keys = std::max(keys, task.num_keys);
    work += (task.num_queries + 1) * (task.num_keys + 1) * d;
  }
  constexpr int64_t kWorth = 1 << 17;  // multiplications that are worth another thread
  const int64_t count = tasks.size(), floats = kernel.scratch_floats(queries, keys);
  if (count == 0) return;
  const int64_t threads = std::min<int64_t>({count, work / kWorth + 1, torch::stable::get_num_threads()});
  const int64_t step = std::max<int64_t>(1, count / (threads * 8));
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    const std::unique_ptr<float[]> memory(new float[floats + 16]());
    [[maybe_unused]] const FlushDenormals flush;
    const Scratch scratch{memory.get() + 16 - reinterpret_cast<uintptr_t>(memory.get()) / 4 % 16};
    for (int64_t begin; (begin = next.fetch_add(step)) < count;)
      for (int64_t i = begin, end = std::min(begin + step, count); i < end; ++i)
        kernel(tasks[i], i + 1 < end ? &tasks[i + 1] : nullptr, scratch);
  });
}

}  // namespace jepa_fast::CPU_CAPABILITY
