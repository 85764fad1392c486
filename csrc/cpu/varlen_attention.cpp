// Attention over packed sequences without the score matrix in memory.
//
// One task is one head of one sequence, at most kQueryChunk of its queries. Its Q, and its K and V a tile of keys at a
// time, are copied once into float32 rows that stay in L2; the scores of one tile stay in L1. They lie transposed,
// [keys, queries]: a query is a lane, so softmax needs no sum across lanes and neither K nor V is transposed.
// With more than one tile of keys a running maximum rescales the sums (arXiv:2205.14135).
// q, k, v, out [P, H, d] with any strides but a contiguous last dimension; lse [H, P] float32 contiguous.
#include "../packed_heads.h"

namespace jepa_fast::CPU_CAPABILITY {
namespace {

constexpr int64_t kQueryChunk = 256;
constexpr int64_t kKeyTile = 256;
constexpr int64_t kMaxVecs = 3;  // vectors of queries in a tile of scores

// scores [keys, width] -> exp(scores - maximum); moves the running maximum and sum, returns the old sum's factor
void softmax_columns(float* scores, int64_t keys, int64_t width, bool is_first, float* maximum, float* total,
                     float* factor) {
  for (int64_t j = 0; j < width; j += kLanes) {
    const float* s = scores + j;
    const Vec before = is_first ? load(s) : load(maximum + j);
    Vec high[4] = {before, load(s), load(s), load(s)};
    int64_t i = 0;
    for (; i + 4 <= keys; i += 4)
      for (int u = 0; u < 4; ++u) high[u] = max(high[u], load(s + (i + u) * width));
    for (; i < keys; ++i) high[0] = max(high[0], load(s + i * width));
    const Vec after = max(max(high[0], high[1]), max(high[2], high[3]));
    store(maximum + j, after);
    store(factor + j, is_first ? Vec{} : exp2((before - after) * kLog2e));
  }
  for (int64_t j = 0; j < width; j += kLanes) {
    const Vec high = load(maximum + j);
    Vec sum = is_first ? Vec{} : load(total + j) * load(factor + j);
    for (int64_t i = 0; i < keys; ++i) {
      const Vec p = exp2((load(scores + i * width + j) - high) * kLog2e);
      store(scores + i * width + j, p);
      sum += p;
    }
    store(total + j, sum);
  }
}

template <typename T>
struct Forward {
  Heads<const T> q, k, v;
  Heads<T> out;
  float* lse;
  int64_t P, d;
  float scale;
  int64_t width = whole_vectors(d);

  int64_t scratch_floats(int64_t queries, int64_t keys) const {
    const int64_t rows = whole_vectors(queries), tile = std::min(keys, kKeyTile);
    return Scratch::size(rows * d) + Scratch::size(rows * width) + 3 * Scratch::size(rows) + Scratch::size(tile * d) +
           Scratch::size(tile * width) + Scratch::size(tile * kMaxVecs * kLanes);
  }

  void operator()(const Task& task, const Task* next, Scratch scratch) const {
    const auto [query, n, key, num_keys, h] = task;
    if (n == 0) return;
    if (num_keys == 0) {
      write_zeros(out.at(query, h), out.token, n, d);
      std::fill_n(lse + h * P + query, n, -std::numeric_limits<float>::infinity());
      return;
    }
    const int64_t rows = whole_vectors(n), tiles = divide_up(num_keys, kKeyTile), tile = divide_up(num_keys, tiles);
    float *q_columns = scratch.take(rows * d), *sums = scratch.take(rows * width), *maximum = scratch.take(rows),
          *total = scratch.take(rows), *factor = scratch.take(rows), *k_rows = scratch.take(tile * d),
          *v_rows = scratch.take(tile * width), *scores = scratch.take(tile * kMaxVecs * kLanes);
    Prefetch prefetch;
    prefetch.add(out, query, n, h, d);
    if (next) {
      prefetch.add(k, next->key, next->num_keys, next->head, d);
      prefetch.add(v, next->key, next->num_keys, next->head, d);
      prefetch.add(q, next->query, next->num_queries, next->head, d);
    }
    const int64_t fetch = divide_up(prefetch.num_rows(), 3 * tiles * divide_up(rows, 2 * kLanes));
    for (int64_t t = 0, begin = 0; t < tiles; ++t) {
      const int64_t keys = (num_keys - begin) / (tiles - t);
      copy_rows(k.at(key + begin, h), k.token, keys, d, k_rows, d);
      copy_rows(v.at(key + begin, h), v.token, keys, d, v_rows, width);
      for (int64_t i = 0, vecs; i < rows; i += vecs * kLanes) {
        const int64_t left = (rows - i) / kLanes;
        vecs = left == 3 ? 3 : std::min<int64_t>(left, 2);
        const int64_t w = vecs * kLanes, queries = std::min(w, n - i);
        float* qi = q_columns + i * d;
        if (t == 0) copy_transposed(q.at(query + i, h), q.token, queries, d, scale, qi, w);
        prefetch.fetch(fetch);
        tile_gemm<false>(keys, vecs, d, {k_rows, d, 1}, {qi, w}, {scores, w});
        prefetch.fetch(fetch);
        softmax_columns(scores, keys, w, t == 0, maximum + i, total + i, factor + i);
        prefetch.fetch(fetch);
        float* sum = sums + i * width;
        if (t == 0) {
          tile_gemm<false>(queries, width / kLanes, keys, {scores, 1, w}, {v_rows, width}, {sum, width});
        } else {
          for (int64_t r = 0; r < queries; ++r)
            for (int64_t c = r * width; c < (r + 1) * width; c += kLanes)
              store(sum + c, load(sum + c) * factor[i + r]);
          tile_gemm<true>(queries, width / kLanes, keys, {scores, 1, w}, {v_rows, width}, {sum, width});
        }
      }
      begin += keys;
    }
    for (int64_t i = 0; i < rows; i += kLanes) {
      const Vec sum = load(total + i);
      store(factor + i, 1.f / sum);
      store(total + i, fma(log2(sum), broadcast(kLn2), load(maximum + i)));
    }
    std::memcpy(lse + h * P + query, total, n * sizeof(float));
    write_rows(sums, width, n, d, factor, 1, out.at(query, h), out.token);
  }
};

template <typename T>
void forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
             double scale, Tensor& out, Tensor& lse) {
  const int64_t P = q.size(0), H = q.size(1), d = q.size(2);
  const Forward<T> kernel{Heads<const T>(q), Heads<const T>(k), Heads<const T>(v), Heads<T>(out),
                          static_cast<float*>(lse.data_ptr()), P, d, float(scale)};
  run(kernel, make_tasks(cu_seqlens_q, cu_seqlens_k, H, kQueryChunk), d);
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

}  // namespace jepa_fast::CPU_CAPABILITY

JEPA_FAST_CPU(JEPA_FAST_IMPL(varlen_attention))
