// The gradient of attention over packed sequences, from the saved log-sum-exp (arXiv:2205.14135, appendix B).
//
// One task is one head of one sequence and writes all of its dq, dk, dv: no atomics, a fixed order of sums. Scores are
// recomputed, [queries, keys], a block of queries against a tile of keys: K^T, V^T and the sums of dk and dv of a tile
// stay in L2 while all queries pass by; probabilities and their gradients of one block stay in L1. The scale goes into Q,
// as in the forward, so that scores come out equal to the last bit and probabilities add up to 1.
// q, k, v, out, gradients [P, H, d] with any strides but a contiguous last dimension; lse [H, P] float32 contiguous.
#include "../packed_heads.h"

namespace jepa_fast::CPU_CAPABILITY {
namespace {

constexpr int64_t kKeyTile = 256;
constexpr int64_t kScores = 1 << 13;                // scores of a block: 32 KiB
constexpr int64_t kMinQueries = 2 * kMaxRows[2];    // queries of a block, where the tile of keys is wide

template <typename T>
float dot(const T* a, const T* b, int64_t d) {
  Vec total{};
  float rest = 0.f;
  int64_t c = 0;
  for (; c + kLanes <= d; c += kLanes) total = fma(load(a + c), load(b + c), total);
  for (; c < d; ++c) rest += to_float(a[c]) * to_float(b[c]);
  return sum(total) + rest;
}

template <typename T>
struct Backward {
  Heads<const T> grad, q, k, v, out;
  const float* lse;
  Heads<T> dq, dk, dv;
  int64_t P, d;
  float scale;
  int64_t width = whole_vectors(d);

  int64_t scratch_floats(int64_t queries, int64_t keys) const {
    const int64_t tile = whole_vectors(std::min(keys, kKeyTile)), block = std::min(queries, kScores / kLanes);
    return 2 * Scratch::size(tile * d) + 3 * Scratch::size(tile * width) + 2 * (kScores + kMinQueries * tile) +
           2 * Scratch::size(block * width) + Scratch::size(queries * width) + Scratch::size(queries);
  }

  void operator()(const Task& task, const Task* next, Scratch scratch) const {
    const auto [query, n, key, num_keys, h] = task;
    if (num_keys == 0) return write_zeros(dq.at(query, h), dq.token, n, d);
    if (n == 0) {
      write_zeros(dk.at(key, h), dk.token, num_keys, d);
      return write_zeros(dv.at(key, h), dv.token, num_keys, d);
    }
    const int64_t tiles = divide_up(num_keys, kKeyTile), tile = whole_vectors(divide_up(num_keys, tiles));
    const int64_t blocks = divide_up(n, std::max(kMinQueries, kScores / tile)), block = divide_up(n, blocks);
    float *k_columns = scratch.take(tile * d), *v_columns = scratch.take(tile * d),
          *k_rows = scratch.take(tile * width), *dk_sums = scratch.take(tile * width),
          *dv_sums = scratch.take(tile * width), *p = scratch.take(block * tile), *ds = scratch.take(block * tile),
          *q_rows = scratch.take(block * width), *grad_rows = scratch.take(block * width),
          *dq_sums = scratch.take(n * width), *inner = scratch.take(n);
    Prefetch prefetch;
    prefetch.add(dq, query, n, h, d);
    prefetch.add(dk, key, num_keys, h, d);
    prefetch.add(dv, key, num_keys, h, d);
    if (next) {
      prefetch.add(grad, next->query, next->num_queries, next->head, d);
      prefetch.add(out, next->query, next->num_queries, next->head, d);
      prefetch.add(k, next->key, next->num_keys, next->head, d);
      prefetch.add(v, next->key, next->num_keys, next->head, d);
      prefetch.add(q, next->query, next->num_queries, next->head, d);
    }
    const int64_t fetch = divide_up(prefetch.num_rows(), 5 * tiles * blocks);
    for (int64_t i = 0; i < n; ++i) inner[i] = dot(grad.at(query + i, h), out.at(query + i, h), d);
    for (int64_t t = 0, begin = 0; t < tiles; ++t) {
      const int64_t keys = (num_keys - begin) / (tiles - t), w = whole_vectors(keys);
      copy_transposed(k.at(key + begin, h), k.token, keys, d, 1.f, k_columns, w);
      copy_transposed(v.at(key + begin, h), v.token, keys, d, 1.f, v_columns, w);
      copy_rows(k.at(key + begin, h), k.token, keys, d, k_rows, width);
      for (int64_t b = 0, i = 0; b < blocks; ++b) {
        const int64_t rows = (n - i) / (blocks - b);
        copy_rows(q.at(query + i, h), q.token, rows, d, q_rows, width, scale);
        copy_rows(grad.at(query + i, h), grad.token, rows, d, grad_rows, width);
        prefetch.fetch(fetch);
        tile_gemm<false>(rows, w / kLanes, d, {q_rows, width, 1}, {k_columns, w}, {p, w});
        prefetch.fetch(fetch);
        tile_gemm<false>(rows, w / kLanes, d, {grad_rows, width, 1}, {v_columns, w}, {ds, w});
        for (int64_t r = 0; r < rows; ++r) {
          const Vec shift = broadcast(lse[h * P + query + i + r]), row_inner = broadcast(inner[i + r]);
          for (int64_t j = r * w; j < (r + 1) * w; j += kLanes) {
            const Vec probability = exp2((load(p + j) - shift) * kLog2e);
            store(p + j, probability);
            store(ds + j, probability * (load(ds + j) - row_inner));
          }
        }
        const auto add_keys = b == 0 ? tile_gemm<false> : tile_gemm<true>;
        const auto add_queries = t == 0 ? tile_gemm<false> : tile_gemm<true>;
        prefetch.fetch(fetch);
        add_keys(keys, width / kLanes, rows, {p, 1, w}, {grad_rows, width}, {dv_sums, width});
        prefetch.fetch(fetch);
        add_keys(keys, width / kLanes, rows, {ds, 1, w}, {q_rows, width}, {dk_sums, width});
        prefetch.fetch(fetch);
        add_queries(rows, width / kLanes, keys, {ds, w, 1}, {k_rows, width}, {dq_sums + i * width, width});
        i += rows;
      }
      const float one = 1.f;
      write_rows(dv_sums, width, keys, d, &one, 0, dv.at(key + begin, h), dv.token);
      write_rows(dk_sums, width, keys, d, &one, 0, dk.at(key + begin, h), dk.token);
      begin += keys;
    }
    write_rows(dq_sums, width, n, d, &scale, 0, dq.at(query, h), dq.token);
  }
};

template <typename T>
void backward(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
              const Tensor& lse, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, double scale, Tensor& dq,
              Tensor& dk, Tensor& dv) {
  const int64_t P = q.size(0), H = q.size(1), d = q.size(2);
  const Backward<T> kernel{Heads<const T>(grad), Heads<const T>(q), Heads<const T>(k), Heads<const T>(v),
                           Heads<const T>(out), floats(lse), Heads<T>(dq), Heads<T>(dk), Heads<T>(dv), P, d,
                           float(scale)};
  run(kernel, make_tasks(cu_seqlens_q, cu_seqlens_k, H, std::numeric_limits<int32_t>::max()), d);
}

}  // namespace

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

JEPA_FAST_CPU(JEPA_FAST_IMPL(varlen_attention_backward))
