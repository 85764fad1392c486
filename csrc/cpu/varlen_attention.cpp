// Attention over packed sequences, and its gradient, without the score matrix in memory.
//
// One task is one head of one sequence (forward: of at most kQueryChunk queries). K, V and Q of a task are copied once
// into float32 tiles that stay in L2; scores of one tile stay in L1. Exponentials are powers of 2, with log2(e) folded
// into the scale.
//   forward   scores lie transposed, [keys, queries]: a query is a lane, so softmax needs no sum across lanes, and
//             neither K nor V is transposed. More than one tile of keys: running maximum and rescaled sums.
//   backward  scores are recomputed, [queries, keys], from the saved log-sum-exp; dK and dV of a tile of keys stay in
//             L2 while all queries pass by. One task writes all of its dq, dk, dv: no atomics, a fixed order of sums.
// Where d is not a multiple of the vector, products whose lanes would run over d are taken transposed.
// q, k, v, out and gradients [P, H, d] with any strides but a contiguous last dimension; lse [H, P] float32 contiguous.
#include "../common.h"
#include "../simd.h"
#include "../tiles.h"

#include <atomic>
#include <limits>
#include <memory>

namespace jepa_fast::CPU_CAPABILITY {
namespace {

constexpr int64_t kQueryChunk = 256;   // queries of one forward task
constexpr int64_t kKeyTile = 256;      // keys whose K and V are in L2 at once
constexpr int64_t kScoreTile = 1 << 13;  // scores of one backward tile: 32 KiB
constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f;

template <typename T>
struct Heads {  // [P, H, d] with its strides
  T* data;
  int64_t token, head;
  explicit Heads(const Tensor& t) : data(static_cast<T*>(t.data_ptr())), token(t.stride(0)), head(t.stride(1)) {}
  T* at(int64_t p, int64_t h) const { return data + p * token + h * head; }
};

struct Scratch {  // float32 memory of one thread, handed out in pieces that begin on a cache line
  float* next;
  static int64_t size(int64_t floats) { return divide_up(floats, 16) * 16; }
  float* take(int64_t floats) {
    next += size(floats);
    return next - size(floats);
  }
};

// scores [keys, width] -> exp2(scores - maximum); moves the running maximum and sum, returns the old sum's factor
inline void softmax_columns(float* scores, int64_t keys, int64_t width, bool is_first, float* maximum, float* total,
                            float* factor) {
  for (int64_t j = 0; j < width; j += kLanes) {
    const float* s = scores + j;
    const Vec before = load(maximum + j);
    Vec high[4] = {is_first ? load(s) : before, load(s), load(s), load(s)};
    int64_t i = 0;
    for (; i + 4 <= keys; i += 4)
      for (int u = 0; u < 4; ++u) high[u] = max(high[u], load(s + (i + u) * width));
    for (; i < keys; ++i) high[0] = max(high[0], load(s + i * width));
    store(maximum + j, max(max(high[0], high[1]), max(high[2], high[3])));
    store(factor + j, is_first ? Vec{} : exp2(before - load(maximum + j)));
    store(total + j, is_first ? Vec{} : load(total + j) * load(factor + j));
  }
  for (int64_t j = 0; j < width; j += kLanes) {
    const Vec high = load(maximum + j);
    Vec sum = load(total + j);
    for (int64_t i = 0; i < keys; ++i) {
      const Vec p = exp2(load(scores + i * width + j) - high);
      store(scores + i * width + j, p);
      sum += p;
    }
    store(total + j, sum);
  }
}

struct Task { int64_t query, num_queries, key, num_keys; };  // rows of q and rows of k

template <typename T>
struct Forward {
  Heads<const T> q, k, v;
  Heads<T> out;
  float* lse;
  int64_t H, d, P;
  float scale;
  bool is_transposed = d % kLanes != 0;
  int64_t width = whole_vectors(d);

  int64_t scratch_floats(int64_t queries, int64_t keys) const {
    const int64_t rows = whole_vectors(queries), tile = std::min(keys, kKeyTile);
    return Scratch::size(rows * d) + Scratch::size(rows * width) + 3 * Scratch::size(rows) +
           Scratch::size(tile * d) + Scratch::size(tile * width) + Scratch::size(tile * 3 * kLanes);
  }

  void operator()(Task task, int64_t h, Scratch scratch) const {
    const auto [query, n, key, num_keys] = task;
    if (num_keys == 0) {
      write_zeros(out.at(query, h), out.token, n, d);
      std::fill_n(lse + h * P + query, n, -std::numeric_limits<float>::infinity());
      return;
    }
    const int64_t rows = whole_vectors(n), tile = std::min(num_keys, kKeyTile);
    float *q_columns = scratch.take(rows * d), *sums = scratch.take(rows * width), *maximum = scratch.take(rows),
          *total = scratch.take(rows), *factor = scratch.take(rows), *k_rows = scratch.take(tile * d),
          *v_rows = scratch.take(tile * width), *scores = scratch.take(tile * 3 * kLanes);
    const int64_t tiles = divide_up(num_keys, kKeyTile);
    for (int64_t t = 0, begin = 0; t < tiles; ++t) {
      const int64_t keys = (num_keys - begin) / (tiles - t);
      copy_rows(k.at(key + begin, h), k.token, keys, d, k_rows, d);
      copy_rows(v.at(key + begin, h), v.token, keys, d, v_rows, width);
      for (int64_t i = 0, vecs; i < rows; i += vecs * kLanes) {
        const int64_t left = (rows - i) / kLanes;
        vecs = left == 3 ? 3 : std::min<int64_t>(left, 2);
        const int64_t w = vecs * kLanes;
        float* qi = q_columns + i * d;
        if (t == 0) copy_transposed(q.at(query + i, h), q.token, std::min(w, n - i), d, scale * kLog2e, qi, w);
        tile_gemm<false>(keys, vecs, d, {k_rows, d, 1}, {qi, w}, {scores, w});
        softmax_columns(scores, keys, w, t == 0, maximum + i, total + i, factor + i);
        add_values(t == 0, keys, i, vecs, std::min(w, n - i), scores, v_rows, factor + i, sums);
      }
      begin += keys;
    }
    for (int64_t i = 0; i < rows; i += kLanes) {
      const Vec sum = load(total + i);
      store(factor + i, 1.f / sum);
      store(total + i, (load(maximum + i) + log2(sum)) * kLn2);
    }
    std::memcpy(lse + h * P + query, total, n * sizeof(float));
    if (!is_transposed) return write_rows(sums, width, n, d, factor, 1, out.at(query, h), out.token);
    for (int64_t i = 0, w; i < rows; i += w) {
      const int64_t left = rows - i;
      w = left == 3 * kLanes ? left : std::min<int64_t>(left, 2 * kLanes);
      write_transposed(sums + i * d, w, std::min(w, n - i), d, factor + i, 1, out.at(query + i, h), out.token);
    }
  }

  // sums of i.. += scores^T V: [queries, d], or [d, queries] for each block of queries where d is not whole vectors
  void add_values(bool is_first, int64_t keys, int64_t i, int64_t vecs, int64_t n, float* scores, float* v_rows,
                  const float* factor, float* sums) const {
    const int64_t w = vecs * kLanes;
    if (is_transposed) {
      float* sum = sums + i * d;
      for (int64_t c = 0; c < d && !is_first; ++c)
        for (int64_t j = 0; j < w; j += kLanes) store(sum + c * w + j, load(sum + c * w + j) * load(factor + j));
      const auto product = is_first ? tile_gemm<false> : tile_gemm<true>;
      return product(d, vecs, keys, {v_rows, 1, width}, {scores, w}, {sum, w});
    }
    float* sum = sums + i * width;
    for (int64_t r = 0; r < n && !is_first; ++r)
      for (int64_t c = 0; c < d; c += kLanes) store(sum + r * width + c, load(sum + r * width + c) * factor[r]);
    const auto product = is_first ? tile_gemm<false> : tile_gemm<true>;
    product(n, width / kLanes, keys, {scores, 1, w}, {v_rows, width}, {sum, width});
  }
};

template <typename T>
struct Backward {
  Heads<const T> grad, q, k, v, out;
  const float* lse;
  Heads<T> dq, dk, dv;
  int64_t H, d, P;
  float scale;
  bool is_transposed = d % kLanes != 0;
  int64_t width = whole_vectors(d);

  static int64_t query_block(int64_t keys) {
    return std::max<int64_t>(2 * kMaxRows[2], kScoreTile / whole_vectors(keys));
  }

  int64_t scratch_floats(int64_t queries, int64_t keys) const {
    const int64_t tile = whole_vectors(std::min(keys, kKeyTile)), most = kScoreTile + 2 * kMaxRows[2] * tile;
    const int64_t rows = std::min(queries, std::max<int64_t>(2 * kMaxRows[2], kScoreTile / kLanes));
    return 5 * Scratch::size(tile * width) + 2 * Scratch::size(most) + 2 * Scratch::size(rows * width) +
           Scratch::size(queries * width) + 2 * Scratch::size(queries);
  }

  void operator()(Task task, int64_t h, Scratch scratch) const {
    const auto [query, n, key, num_keys] = task;
    if (num_keys == 0) return write_zeros(dq.at(query, h), dq.token, n, d);
    if (n == 0) {
      write_zeros(dk.at(key, h), dk.token, num_keys, d);
      return write_zeros(dv.at(key, h), dv.token, num_keys, d);
    }
    const int64_t tiles = divide_up(num_keys, kKeyTile), tile = whole_vectors(divide_up(num_keys, tiles));
    const int64_t block = std::min(n, query_block(tile));
    float *k_columns = scratch.take(tile * d), *v_columns = scratch.take(tile * d), *k_rows = scratch.take(tile * width),
          *dk_sums = scratch.take(tile * width), *dv_sums = scratch.take(tile * width),
          *p = scratch.take(block * tile), *ds = scratch.take(block * tile), *q_rows = scratch.take(block * width),
          *grad_rows = scratch.take(block * width), *dq_sums = scratch.take(n * width), *shift = scratch.take(n),
          *inner = scratch.take(n);
    for (int64_t i = 0; i < n; ++i) {
      shift[i] = lse[h * P + query + i] * kLog2e;
      inner[i] = dot(grad.at(query + i, h), out.at(query + i, h));
    }
    for (int64_t t = 0, begin = 0; t < tiles; ++t) {
      const int64_t keys = (num_keys - begin) / (tiles - t), w = whole_vectors(keys), vecs = w / kLanes;
      copy_transposed(k.at(key + begin, h), k.token, keys, d, scale * kLog2e, k_columns, w);
      copy_transposed(v.at(key + begin, h), v.token, keys, d, 1.f, v_columns, w);
      copy_rows(k.at(key + begin, h), k.token, keys, d, k_rows, width);
      const int64_t blocks = divide_up(n, block);
      for (int64_t b = 0, i = 0; b < blocks; ++b) {
        const int64_t rows = (n - i) / (blocks - b);
        copy_rows(q.at(query + i, h), q.token, rows, d, q_rows, width);
        copy_rows(grad.at(query + i, h), grad.token, rows, d, grad_rows, width);
        tile_gemm<false>(rows, vecs, d, {q_rows, width, 1}, {k_columns, w}, {p, w});
        tile_gemm<false>(rows, vecs, d, {grad_rows, width, 1}, {v_columns, w}, {ds, w});
        for (int64_t r = 0; r < rows; ++r) {
          const Vec row_shift = broadcast(shift[i + r]), row_inner = broadcast(inner[i + r]);
          for (int64_t j = r * w; j < (r + 1) * w; j += kLanes) {
            const Vec probability = exp2(load(p + j) - row_shift);
            store(p + j, probability);
            store(ds + j, probability * (load(ds + j) - row_inner));
          }
        }
        add_keys(i == 0, rows, keys, p, grad_rows, dv_sums);
        add_keys(i == 0, rows, keys, ds, q_rows, dk_sums);
        const auto product = t == 0 ? tile_gemm<false> : tile_gemm<true>;
        product(rows, width / kLanes, keys, {ds, w, 1}, {k_rows, width}, {dq_sums + i * width, width});
        i += rows;
      }
      const float one = 1.f;
      const auto write = is_transposed ? write_transposed<T> : write_rows<T>;
      const int64_t stride = is_transposed ? w : width;
      write(dv_sums, stride, keys, d, &one, 0, dv.at(key + begin, h), dv.token);
      write(dk_sums, stride, keys, d, &scale, 0, dk.at(key + begin, h), dk.token);
      begin += keys;
    }
    write_rows(dq_sums, width, n, d, &scale, 0, dq.at(query, h), dq.token);
  }

  // sums [keys, d] += scores^T rows, or transposed [d, keys] where d is not whole vectors
  void add_keys(bool is_first, int64_t n, int64_t keys, float* scores, float* rows, float* sums) const {
    const auto product = is_first ? tile_gemm<false> : tile_gemm<true>;
    const int64_t w = whole_vectors(keys);
    if (is_transposed) product(d, w / kLanes, n, {rows, 1, width}, {scores, w}, {sums, w});
    else product(keys, width / kLanes, n, {scores, 1, w}, {rows, width}, {sums, width});
  }

  float dot(const T* a, const T* b) const {
    Vec total{};
    int64_t c = 0;
    for (; c + kLanes <= d; c += kLanes) total = fma(load(a + c), load(b + c), total);
    float rest = 0.f;
    for (; c < d; ++c) rest += to_float(a[c]) * to_float(b[c]);
    return sum(total) + rest;
  }
};

// every task on every head, handed to threads as they become free; a task's result does not depend on who computes it
template <typename Kernel>
void run(const Kernel& kernel, const std::vector<Task>& tasks) {
  int64_t queries = 0, keys = 0, work = 0;
  for (const Task& task : tasks) {
    queries = std::max(queries, task.num_queries);
    keys = std::max(keys, task.num_keys);
    work += (task.num_queries + 1) * (task.num_keys + 1) * kernel.H * kernel.d;
  }
  constexpr int64_t kWorth = 1 << 17;  // multiplications that are worth another thread
  const int64_t count = int64_t(tasks.size()) * kernel.H, floats = kernel.scratch_floats(queries, keys);
  if (count == 0) return;
  const int64_t threads = std::min<int64_t>({count, work / kWorth + 1, torch::stable::get_num_threads()});
  const int64_t step = std::max<int64_t>(1, count / (threads * 8));
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    const std::unique_ptr<float[]> memory(new float[floats + 16]());
    const Scratch scratch{memory.get() + 16 - reinterpret_cast<uintptr_t>(memory.get()) / 4 % 16};
    for (int64_t begin; (begin = next.fetch_add(step)) < count;)
      for (int64_t i = begin; i < std::min(begin + step, count); ++i) kernel(tasks[i / kernel.H], i % kernel.H, scratch);
  });
}

// each sequence, its queries in chunks of nearly equal size
std::vector<Task> make_tasks(const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, int64_t most_queries) {
  const auto *q = cu_seqlens_q.const_data_ptr<int32_t>(), *k = cu_seqlens_k.const_data_ptr<int32_t>();
  std::vector<Task> tasks;
  for (int64_t s = 0; s + 1 < cu_seqlens_q.size(0); ++s) {
    const int64_t queries = q[s + 1] - q[s], chunks = std::max<int64_t>(1, divide_up(queries, most_queries));
    for (int64_t i = 0, begin = 0; i < chunks; ++i) {
      const int64_t rows = std::min(queries - begin, whole_vectors(divide_up(queries - begin, chunks - i)));
      tasks.push_back({q[s] + begin, rows, k[s], k[s + 1] - k[s]});
      begin += rows;
    }
  }
  return tasks;
}

template <typename T>
void forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
             double scale, Tensor& out, Tensor& lse) {
  const Forward<T> kernel{Heads<const T>(q), Heads<const T>(k), Heads<const T>(v), Heads<T>(out),
                          static_cast<float*>(lse.data_ptr()), q.size(1), q.size(2), q.size(0), float(scale)};
  run(kernel, make_tasks(cu_seqlens_q, cu_seqlens_k, kQueryChunk));
}

template <typename T>
void backward(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
              const Tensor& lse, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, double scale, Tensor& dq,
              Tensor& dk, Tensor& dv) {
  const Backward<T> kernel{Heads<const T>(grad), Heads<const T>(q), Heads<const T>(k), Heads<const T>(v),
                           Heads<const T>(out), floats(lse), Heads<T>(dq), Heads<T>(dk), Heads<T>(dv), q.size(1),
                           q.size(2), q.size(0), float(scale)};
  run(kernel, make_tasks(cu_seqlens_q, cu_seqlens_k, std::numeric_limits<int32_t>::max()));
}

}  // namespace

void varlen_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q,
                      const Tensor& cu_seqlens_k, double scale, Tensor out, Tensor lse) {
  switch (q.scalar_type()) {
    case ScalarType::Float: return forward<float>(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, out, lse);
    case ScalarType::BFloat16: return forward<bf16>(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, out, lse);
    default: STD_TORCH_CHECK(false, "varlen_attention: float32 or bfloat16 expected");
  }
}

void varlen_attention_backward(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                               const Tensor& lse, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, double scale,
                               Tensor dq, Tensor dk, Tensor dv) {
  switch (q.scalar_type()) {
    case ScalarType::Float:
      return backward<float>(grad, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, scale, dq, dk, dv);
    case ScalarType::BFloat16:
      return backward<bf16>(grad, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, scale, dq, dk, dv);
    default: STD_TORCH_CHECK(false, "varlen_attention_backward: float32 or bfloat16 expected");
  }
}

}  // namespace jepa_fast::CPU_CAPABILITY

JEPA_FAST_CPU(JEPA_FAST_IMPL(varlen_attention) JEPA_FAST_IMPL(varlen_attention_backward))
