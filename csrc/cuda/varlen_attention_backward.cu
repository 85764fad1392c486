// The gradient of attention over packed sequences on tensor cores, from the saved log-sum-exp (arXiv:2205.14135,
// appendix B).
//
// Scores are recomputed, 16 x 16 at a time and in registers; nothing is added by atomics, so two runs are bit-equal. A
// block of `keys_kernel` has 16 keys of a head per warp and passes over the queries: its scores are transposed, keys
// by queries, and so are at once the left factors of dv = P^T g and dk = dS^T q. A block of `queries_kernel` has 16
// queries per warp and passes over the keys for dq = dS k. Where d <= 64 and all keys fit 128, one block of
// `keys_kernel` has all of them: dS goes through shared memory to become dq there and then, scores are computed once,
// and rowsum(grad * out) too is made in the block; else `delta_kernel` makes it. dq and dk pass through the transposed
// map of their positions as they are stored. Tiles that frame-causal attention does not see are skipped, in part seen
// ones masked.
//
// Bytes: grad, q, k, v, out read and dq, dk, dv written, 16 P H d, and 4 P H of lse. FLOPs: 10 H d sum n_q n_k (14 in
// two kernels). Exponentials: H sum n_q n_k (twice that). On an H200 (4.3 TB/s, 790 TFLOP/s, 3.7e12 exponentials a
// second):
//   ijepa-h14-b128 predictor, 512 sequences of 114, 16 heads of 24: 362 MB, 25.6 GFLOP, 0.106e9 exponentials: 84 us
//   128 sequences of 256, 16 heads of 80 (the target has no gradient): 673 MB, 150 GFLOP, 0.268e9 exponentials: 190 us
// grad, q, k, v, out and gradients as in varlen_attention.cu; lse and delta [H, P] float32 contiguous.
#include "varlen_attention.cuh"

namespace jepa_fast::cuda {
namespace {

constexpr int kTile = 64;  // rows of what passes by

template <typename T>
struct Backward {
  Heads<const T> grad, q, k, v, out;
  const float* lse;
  float* delta;
  Heads<T> dq, dk, dv;
  Sequences sequences;
  Rotary rotary_q, rotary_k;
  Rotary turned_q, turned_k;  // for dq and dk, where q and k themselves come turned
  int64_t P;
  int H, d, num_blocks;
  float scale;
  bool by_16_bytes;
};

// what the passing queries bring with them
struct PerQuery {
  float lse[kTile], delta[kTile];  // lse in units of log 2, inf where there is no key: all probabilities are 0
  int visible[kTile];
};

__device__ inline float lse_in_bits(float lse) { return lse == -INFINITY ? INFINITY : lse * kLog2e; }

template <typename T>
using Scores = Rows<T, kTile / 8>;  // dS^T, [keys, queries]

// dq = dS k of a tile of queries in place of q, 16 queries and 16 columns at a time
template <typename T, int kTiles>
__device__ inline void queries_from_scores(const Backward<T>& args, int64_t row, int count_q, int count_k, Scores<T> ds,
                                           Rows<T, kTiles> k, Rows<T, kTiles> q) {
  constexpr int kGroups = kTile / 16, kUnits = kGroups * ((kTiles + 1) / 2);
  const int lane = int(threadIdx.x) % 32;
  for (int unit = int(threadIdx.x) / 32; unit < kUnits; unit += int(blockDim.x) / 32) {
    const int first = unit % kGroups * 16, tile = unit / kGroups * 2;
    if (first >= count_q) continue;
    float dq[2][4];
    set_zero(dq);
#pragma unroll 2
    for (int j = 0; j < count_k; j += 16) {
      uint32_t left[4], right[4];
      load_matrices<4, true>(left, ds.at(j + lane / 16 * 8 + lane % 8, first / 8 + lane / 8 % 2));
      load_matrices<4, true>(right, k.at(j + lane % 16, min(tile + lane / 16, kTiles - 1)));
      mma_16x8x16<T>(dq[0], left, {right[0], right[1]});
      mma_16x8x16<T>(dq[1], left, {right[2], right[3]});
    }
    turn_back(dq, args.scale, args.turned_q, row + first, count_q - first, tile);
    put_rows(q, first, dq, tile);
  }
}

template <typename T, int kTiles, bool kAll>
__global__ void __launch_bounds__(32 * (kAll ? 8 : most_warps(kTiles)), kTiles <= 4 ? 2 : 1)
    keys_kernel(const __grid_constant__ Backward<T> args) {
  constexpr int kStages = kAll ? 1 : 2;
  using Tile = Rows<T, kTiles>;
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  const int rows = int(blockDim.x) / 2;
  const BlockOf at(args.H, args.num_blocks);
  const Sequence sequence(args.sequences, at.sequence);
  const int begin = at.block * rows, count_k = min(sequence.n_k - begin, rows);
  if (!kAll && count_k <= 0) return;
  const Tile k_tile{shared_memory<T>()}, v_tile{k_tile.at(rows)}, q_tiles{v_tile.at(rows)},
      grad_tiles{q_tiles.at(kStages * kTile)};
  auto* per_query = reinterpret_cast<PerQuery*>(grad_tiles.at(kStages * kTile));
  const Scores<T> ds_rows{reinterpret_cast<T*>(per_query + kStages)};  // where kAll: as many rows as keys
  const int first_query = kAll ? 0 : sequence.first_query(begin);
  const auto stage_of = [&](int start) { return (start - first_query) / kTile % kStages; };
  const auto load_queries = [&](int start) {
    const int stage = stage_of(start), count = sequence.n_q - start;
    const int64_t row = sequence.query + start;
    load_rows(Tile{q_tiles.at(stage * kTile)}, kTile, args.q, at.head, row, count, args.d, args.by_16_bytes, args.rotary_q);
    load_rows(Tile{grad_tiles.at(stage * kTile)}, kTile, args.grad, at.head, row, count, args.d, args.by_16_bytes);
    async_copy_commit();
    for (int i = int(threadIdx.x); i < kTile; i += int(blockDim.x)) {
      const int64_t place = at.head * args.P + row + i;
      per_query[stage].lse[i] = i < count ? lse_in_bits(args.lse[place]) : INFINITY;
      if (!kAll) per_query[stage].delta[i] = i < count ? args.delta[place] : 0.f;
      per_query[stage].visible[i] = sequence.visible(start + i);
    }
    if constexpr (kAll) {
      for (int i = int(threadIdx.x) / 4; i < kTile; i += int(blockDim.x) / 4) {
        const int64_t there = i < count ? row + i : row;
        const float sum = dot_of_quad(args.grad.at(there, at.head), args.out.at(there, at.head), args.d);
        if (t == 0) per_query[stage].delta[i] = i < count ? sum : 0.f;
      }
    }
  };
  load_rows(k_tile, rows, args.k, at.head, sequence.key + begin, count_k, args.d, args.by_16_bytes, args.rotary_k);
  load_rows(v_tile, rows, args.v, at.head, sequence.key + begin, count_k, args.d, args.by_16_bytes);
  async_copy_commit();
  if (first_query < sequence.n_q) load_queries(first_query);

  // of this warp, whose lanes have keys first + g and first + g + 8 of the sequence
  const int first = begin + 16 * warp;
  const bool is_idle = first >= sequence.n_k;
  const float scale = args.scale * kLog2e;
  float dk[kTiles][4], dv[kTiles][4];
  set_zero(dk);
  set_zero(dv);
  LeftRows<T, kTiles, kTiles <= 8> k, v;

  for (int start = first_query; start < sequence.n_q; start += kTile) {
    if (!kAll && start + kTile < sequence.n_q) load_queries(start + kTile);
    else async_copy_commit();
    async_copy_wait<1>();
    __syncthreads();
    if (start == first_query) {
      k.load(k_tile, 16 * warp);
      v.load(v_tile, 16 * warp);
    }
    const int stage = stage_of(start), count = sequence.n_q - start;
    const Tile q{q_tiles.at(stage * kTile)}, grad{grad_tiles.at(stage * kTile)};
    const PerQuery& per = per_query[stage];
    const bool is_partial = per.visible[0] < first + 16;
    if (!is_idle) {
#pragma unroll 1
      for (int j = 0; j < min(count, kTile); j += 16) {
        float p[2][4], ds[2][4];
        dot_rows(p[0], p[1], k, q, j);
        dot_rows(ds[0], ds[1], v, grad, j);
#pragma unroll
        for (int u = 0; u < 2; ++u) {
          const int column = j + 8 * u + 2 * t;
          const auto lse = load<2>(per.lse + column), delta = load<2>(per.delta + column);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float& x = p[u][i];
            x = exp2_special(__fmaf_rn(x, scale, -lse[i % 2]));
            if (is_partial && first + g + i / 2 * 8 >= per.visible[column + i % 2]) x = 0.f;
            ds[u][i] = x * (ds[u][i] - delta[i % 2]);
          }
        }
        uint32_t left[4];
        pack_left<T>(left, p[0], p[1]);
        add_product(dv, left, grad, j);
        pack_left<T>(left, ds[0], ds[1]);
        add_product(dk, left, q, j);
        if constexpr (kAll) {
#pragma unroll
          for (int i = 0; i < 4; ++i)
            *reinterpret_cast<uint32_t*>(ds_rows.at(16 * warp + g + i % 2 * 8, j / 8 + i / 2) + 2 * t) = left[i];
        }
      }
    }
    __syncthreads();  // all have read the queries; kAll: dS is there
    if constexpr (kAll) {
      queries_from_scores<T, kTiles>(args, sequence.query + start, count, count_k, ds_rows, k_tile, q);
      __syncthreads();
      store_rows(args.dq, at.head, sequence.query + start, min(count, kTile), args.d, args.by_16_bytes, q,
                 int(threadIdx.x), int(blockDim.x));
      __syncthreads();
      if (start + kTile < sequence.n_q) load_queries(start + kTile);
    }
  }

  async_copy_wait<0>();
  __syncthreads();  // without queries, k and v may still be on their way
  if (is_idle) return;
  const int count = min(sequence.n_k - first, 16);
  turn_back(dk, args.scale, args.turned_k, sequence.key + first, count);
  put_rows(k_tile, 16 * warp, dk);
  put_rows(v_tile, 16 * warp, dv);
  __syncwarp();
  store_rows(args.dk, at.head, sequence.key + first, count, args.d, args.by_16_bytes, Tile{k_tile.at(16 * warp)}, lane, 32);
  store_rows(args.dv, at.head, sequence.key + first, count, args.d, args.by_16_bytes, Tile{v_tile.at(16 * warp)}, lane, 32);
}

template <typename T, int kTiles>
__global__ void __launch_bounds__(32 * most_warps(kTiles), kTiles <= 4 ? 2 : 1)
    queries_kernel(const __grid_constant__ Backward<T> args) {
  using Tile = Rows<T, kTiles>;
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  const int rows = int(blockDim.x) / 2;
  const BlockOf at(args.H, args.num_blocks);
  const Sequence sequence(args.sequences, at.sequence);
  const int begin = (args.num_blocks - 1 - at.block) * rows;  // frame-causal: the longest loops first
  if (begin >= sequence.n_q) return;
  const Tile q_tile{shared_memory<T>()}, grad_tile{q_tile.at(rows)}, k_tiles{grad_tile.at(rows)},
      v_tiles{k_tiles.at(2 * kTile)};
  const auto load_keys = [&](int start) {
    const int stage = start / kTile % 2 * kTile, count = sequence.n_k - start;
    load_rows(Tile{k_tiles.at(stage)}, kTile, args.k, at.head, sequence.key + start, count, args.d, args.by_16_bytes,
              args.rotary_k);
    load_rows(Tile{v_tiles.at(stage)}, kTile, args.v, at.head, sequence.key + start, count, args.d, args.by_16_bytes);
    async_copy_commit();
  };
  load_rows(q_tile, rows, args.q, at.head, sequence.query + begin, sequence.n_q - begin, args.d, args.by_16_bytes,
            args.rotary_q);
  load_rows(grad_tile, rows, args.grad, at.head, sequence.query + begin, sequence.n_q - begin, args.d, args.by_16_bytes);
  load_keys(0);

  // of this warp, whose lanes have queries g and g + 8
  const int first = begin + 16 * warp, count_q = min(sequence.n_q - first, 16);
  const int end = sequence.visible(min(begin + rows, sequence.n_q) - 1);
  const int visible_all = sequence.visible(first), visible_any = count_q > 0 ? sequence.visible(first + count_q - 1) : 0;
  const float scale = args.scale * kLog2e;
  int visible[2];
  float lse[2], delta[2], dq[kTiles][4];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const bool is_there = g + 8 * r < count_q;
    const int64_t place = at.head * args.P + sequence.query + first + g + 8 * r;
    visible[r] = sequence.visible(first + g + 8 * r);
    lse[r] = is_there ? lse_in_bits(args.lse[place]) : INFINITY;
    delta[r] = is_there ? args.delta[place] : 0.f;
  }
  set_zero(dq);
  LeftRows<T, kTiles> q, grad;

  for (int start = 0; start == 0 || start < end; start += kTile) {
    if (start + kTile < end) load_keys(start + kTile);
    else async_copy_commit();
    async_copy_wait<1>();
    __syncthreads();
    if (start == 0) {
      q.load(q_tile, 16 * warp);
      grad.load(grad_tile, 16 * warp);
    }
    const Tile k{k_tiles.at(start / kTile % 2 * kTile)}, v{v_tiles.at(start / kTile % 2 * kTile)};
#pragma unroll 1
    for (int j = 0; j < min(visible_any - start, kTile); j += 16) {
      const bool is_partial = start + j + 16 > visible_all;
      float p[2][4], ds[2][4];
      dot_rows(p[0], p[1], q, k, j);
      dot_rows(ds[0], ds[1], grad, v, j);
#pragma unroll
      for (int u = 0; u < 2; ++u)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float x = exp2_special(__fmaf_rn(p[u][i], scale, -lse[i / 2]));
          if (is_partial && start + j + 8 * u + 2 * t + i % 2 >= visible[i / 2]) x = 0.f;
          ds[u][i] = x * (ds[u][i] - delta[i / 2]);
        }
      uint32_t left[4];
      pack_left<T>(left, ds[0], ds[1]);
      add_product(dq, left, k, j);
    }
    __syncthreads();  // the next round fills what was read here
  }

  turn_back(dq, args.scale, args.turned_q, sequence.query + first, count_q);
  put_rows(q_tile, 16 * warp, dq);  // no other warp reads these rows
  __syncwarp();
  store_rows(args.dq, at.head, sequence.query + first, count_q, args.d, args.by_16_bytes, Tile{q_tile.at(16 * warp)}, lane,
             32);
}

template <typename T>
__global__ void __launch_bounds__(256) delta_kernel(const __grid_constant__ Backward<T> args) {
  const int64_t i = (int64_t(blockIdx.x) * 256 + threadIdx.x) / 4, last = args.P * args.H - 1, there = i < last ? i : last;
  const int64_t row = there / args.H;
  const int h = int(there % args.H);
  const float sum = dot_of_quad(args.grad.at(row, h), args.out.at(row, h), args.d);
  if (i <= last && threadIdx.x % 4 == 0) args.delta[h * args.P + row] = sum;
}

template <typename T, int kTiles, bool kAll>
void launch_keys(Backward<T> args, int64_t max_seqlen_k, int64_t sequences, cudaStream_t stream) {
  const int warps = num_warps(max_seqlen_k, kAll ? 8 : most_warps(kTiles)), stages = kAll ? 1 : 2;
  args.num_blocks = kAll ? 1 : int(ceil_div(max_seqlen_k, 16 * warps));
  const size_t elements = (32 * warps + 2 * stages * kTile) * Rows<T, kTiles>::kStride +
                          (kAll ? 16 * warps * Scores<T>::kStride : 0);
  launch(keys_kernel<T, kTiles, kAll>, num_blocks(sequences, args.H, args.num_blocks), dim3(unsigned(32 * warps)),
         elements * sizeof(T) + stages * sizeof(PerQuery), stream, args);
}

template <typename T, int kTiles>
void launch_queries(Backward<T> args, int64_t max_seqlen_q, int64_t sequences, cudaStream_t stream) {
  const int warps = num_warps(max_seqlen_q, most_warps(kTiles));
  args.num_blocks = int(ceil_div(max_seqlen_q, 16 * warps));
  launch(queries_kernel<T, kTiles>, num_blocks(sequences, args.H, args.num_blocks), dim3(unsigned(32 * warps)),
         (32 * warps + 4 * kTile) * Rows<T, kTiles>::kStride * sizeof(T), stream, args);
}

}  // namespace

// rotary_q and rotary_k turn dq and dk back; q and k come as they were, or, where is_turned, turned already
void varlen_attention_backward_cuda(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                                    const Tensor& lse, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                    std::optional<Tensor> rotary_q, std::optional<Tensor> rotary_k, bool is_turned,
                                    int64_t max_seqlen_q, int64_t max_seqlen_k, double scale, int64_t frame_size,
                                    Tensor delta, Tensor dq, Tensor dk, Tensor dv) {
  const OnDevice device(q);
  by_half_dtype(q.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const Rotary turn_q = rotary_of(rotary_q), turn_k = rotary_of(rotary_k);
    Backward<T> args{Heads<const T>(grad), Heads<const T>(q), Heads<const T>(k), Heads<const T>(v), Heads<const T>(out),
                     floats(lse), static_cast<float*>(delta.data_ptr()), Heads<T>(dq), Heads<T>(dk), Heads<T>(dv),
                     {cu_seqlens_q.const_data_ptr<int32_t>(), cu_seqlens_k.const_data_ptr<int32_t>(),
                      frame_tokens(frame_size)},
                     is_turned ? Rotary{} : turn_q, is_turned ? Rotary{} : turn_k, turn_q, turn_k, q.size(0),
                     int(q.size(1)), int(q.size(2)), 0, float(scale), false};
    args.by_16_bytes = args.d % 8 == 0 && args.grad.is_aligned_16() && args.q.is_aligned_16() && args.k.is_aligned_16() &&
                       args.v.is_aligned_16() && args.dq.is_aligned_16() && args.dk.is_aligned_16() &&
                       args.dv.is_aligned_16();
    const int64_t sequences = cu_seqlens_q.size(0) - 1;
    by_width(args.d, [&](auto tiles) {
      constexpr int kTiles = decltype(tiles)::value;
      if constexpr (kTiles <= 8)
        if (max_seqlen_k <= 128) return launch_keys<T, kTiles, true>(args, max_seqlen_k, sequences, device.stream);
      launch(delta_kernel<T>, dim3(unsigned(ceil_div(args.P * args.H, 64))), dim3(256), 0, device.stream, args);
      launch_keys<T, kTiles, false>(args, max_seqlen_k, sequences, device.stream);
      launch_queries<T, kTiles>(args, max_seqlen_q, sequences, device.stream);
    });
  });
}

}  // namespace jepa_fast::cuda

JEPA_FAST_CUDA(JEPA_FAST_CUDA_IMPL(varlen_attention_backward_cuda))
