// Attention over packed sequences on tensor cores: online softmax (arXiv:2205.14135) with the scores in registers.
//
// A block takes one head of one sequence and 16 queries per warp; tiles of 64 keys pass through two buffers in shared
// memory, one read while the other fills. Where d <= 32 and all keys fit 128, they are one tile and nothing is
// rescaled. Queries are turned by their rotary positions as they are loaded, keys too where a sequence has few blocks
// of queries; else `rotate_heads` turns them once into scratch, since the table, 8 R bytes per key, would be read
// again by every block. Frame-causal tiles that no query of a block sees are never loaded; only what is seen in part is
// masked. Long sequences with d <= 32 are bound by the exponential: every fourth tile of 8 scores takes 2^x on the FMA
// pipes.
//
// Bytes: q, k, v read and out written, 8 P H d, and 4 P H of lse. FLOPs: 4 H d sum n_q n_k. Exponentials: H sum n_q n_k.
// On an H200 (4.3 TB/s, 790 TFLOP/s, 3.7e12 exponentials a second):
//   ijepa-h14-b128 predictor, 512 sequences of 114, 16 heads of 24: 183 MB, 10.2 GFLOP, 0.106e9 exponentials: 43 us
//   ijepa-h14-b128 target, 128 sequences of 256, 16 heads of 80: 338 MB, 43 GFLOP, 0.134e9 exponentials: 79 us
// q, k, v, out [P, H, d] bfloat16 or float16, d a multiple of 4 up to 128, any strides in multiples of 4 but a
// contiguous last dimension, aligned to 8 bytes; lse [H, P] float32 and rotary [P, 2, R] float32 contiguous; scale
// above 0.
#include "varlen_attention.cuh"

namespace jepa_fast::cuda {
namespace {

template <typename T>
struct Forward {
  Heads<const T> q, k, v;
  Heads<T> out;
  float* lse;
  Sequences sequences;
  Rotary rotary_q, rotary_k;
  int64_t P;
  int H, d, num_blocks;
  float scale;
  bool by_16_bytes;
};

// 2^x for score i (a tile of 8) of a query
template <int kTiles>
__device__ inline float exp2_of_tile(float x, int i) {
  return kTiles <= 4 && i % 4 == 3 ? exp2_polynomial(x) : exp2_special(x);
}

template <typename T, int kTiles, bool kShort>
__global__ void __launch_bounds__(32 * most_warps(kTiles), kTiles <= 4 ? 2 : 1)
    forward_kernel(const __grid_constant__ Forward<T> args) {
  constexpr int kKeys = kShort ? 128 : 64, kStages = kShort ? 1 : 2;
  using Tile = Rows<T, kTiles>;
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  const int rows = int(blockDim.x) / 2;
  const BlockOf at(args.H, args.num_blocks);
  const Sequence sequence(args.sequences, at.sequence);
  const int begin = (args.num_blocks - 1 - at.block) * rows;  // frame-causal: the longest loops first
  if (begin >= sequence.n_q) return;
  const Tile q_tile{shared_memory<T>()}, k_tiles{q_tile.at(rows)}, v_tiles{k_tiles.at(kStages * kKeys)};
  const auto load_keys = [&](int start) {
    const int stage = start / kKeys % kStages * kKeys, count = sequence.n_k - start;
    const int rows = min((count + 15) / 16 * 16, kKeys);
    load_rows(Tile{k_tiles.at(stage)}, rows, args.k, at.head, sequence.key + start, count, args.d, args.by_16_bytes,
              args.rotary_k);
    load_rows(Tile{v_tiles.at(stage)}, rows, args.v, at.head, sequence.key + start, count, args.d, args.by_16_bytes);
    async_copy_commit();
  };
  const int end = sequence.visible(min(begin + rows, sequence.n_q) - 1);
  load_rows(q_tile, rows, args.q, at.head, sequence.query + begin, sequence.n_q - begin, args.d, args.by_16_bytes,
            args.rotary_q);
  load_keys(0);

  // of this warp, whose lanes have queries g and g + 8
  const int first = begin + 16 * warp, count_q = min(sequence.n_q - first, 16);
  const int visible_all = sequence.visible(first), visible_any = count_q > 0 ? sequence.visible(first + count_q - 1) : 0;
  const int visible[2] = {sequence.visible(first + g), sequence.visible(first + g + 8)};
  const float scale = args.scale * kLog2e;
  float maximum[2] = {-INFINITY, -INFINITY}, total[2] = {0.f, 0.f}, sums[kTiles][4];
  set_zero(sums);
  LeftRows<T, kTiles> q;

  for (int start = 0; start == 0 || start < end; start += kKeys) {
    if (!kShort && start + kKeys < end) load_keys(start + kKeys);
    else async_copy_commit();
    async_copy_wait<1>();
    __syncthreads();
    if (start == 0) q.load(q_tile, 16 * warp);
    const Tile k{k_tiles.at(start / kKeys % kStages * kKeys)}, v{v_tiles.at(start / kKeys % kStages * kKeys)};
    const int count = min(visible_any - start, kKeys);
    float s[kKeys / 8][4];  // [16, kKeys], and then probabilities
#pragma unroll
    for (int j = 0; j < kKeys; j += 16)
      if (j < count) {
        dot_rows(s[j / 8], s[j / 8 + 1], q, k, j);
        if (start + j + 16 <= visible_all) continue;
#pragma unroll
        for (int i = 0; i < 8; ++i)
          if (start + j + i / 4 * 8 + 2 * t + i % 2 >= visible[i % 4 / 2]) s[j / 8 + i / 4][i % 4] = -INFINITY;
      }
    float shift[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float high = -INFINITY;
#pragma unroll
      for (int j = 0; j < kKeys; j += 8)
        if (j / 16 * 16 < count) high = fmaxf(high, fmaxf(s[j / 8][2 * r], s[j / 8][2 * r + 1]));
      high = fmaxf(high, __shfl_xor_sync(0xffffffff, high, 1));
      high = fmaxf(high, __shfl_xor_sync(0xffffffff, high, 2));
      const float before = maximum[r];
      maximum[r] = fmaxf(before, high);
      shift[r] = maximum[r] == -INFINITY ? 0.f : maximum[r] * scale;  // no key yet: 2^(-inf - 0) is 0
      if constexpr (!kShort) {
        const float factor = exp2_special(__fmaf_rn(before, scale, -shift[r]));
        total[r] *= factor;
#pragma unroll
        for (int c = 0; c < kTiles; ++c) {
          sums[c][2 * r] *= factor;
          sums[c][2 * r + 1] *= factor;
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kKeys; j += 16)
      if (j < count) {
#pragma unroll
        for (int u = 0; u < 2; ++u)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float& p = s[j / 8 + u][i];
            p = exp2_of_tile<kTiles>(__fmaf_rn(p, scale, -shift[i / 2]), j / 8 + u);
            total[i / 2] += p;
          }
        uint32_t p[4];
        pack_left<T>(p, s[j / 8], s[j / 8 + 1]);
        add_product(sums, p, v, j);
      }
    __syncthreads();  // the next round fills what was read here
  }

#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sum = total[r];
    sum += __shfl_xor_sync(0xffffffff, sum, 1);
    sum += __shfl_xor_sync(0xffffffff, sum, 2);
    const float factor = sum == 0.f ? 0.f : 1.f / sum;
#pragma unroll
    for (int c = 0; c < kTiles; ++c) {
      sums[c][2 * r] *= factor;
      sums[c][2 * r + 1] *= factor;
    }
    const float lse = sum == 0.f ? -INFINITY : __fmaf_rn(maximum[r], args.scale, log2f(sum) * kLn2);
    if (t == 0 && g + 8 * r < count_q) args.lse[at.head * args.P + sequence.query + first + g + 8 * r] = lse;
  }
  put_rows(q_tile, 16 * warp, sums);  // no other warp reads these rows
  __syncwarp();
  store_rows(args.out, at.head, sequence.query + first, count_q, args.d, args.by_16_bytes, Tile{q_tile.at(16 * warp)}, lane,
             32);
}

template <typename T>
struct Rotate {
  Heads<const T> x;
  Heads<T> out;
  Rotary rotary;
  int64_t pairs;  // P H d / 2
  int H, d;
};

template <typename T>
__global__ void __launch_bounds__(256) rotate_kernel(const __grid_constant__ Rotate<T> args) {
  const int64_t i = int64_t(blockIdx.x) * 256 + threadIdx.x;
  if (i >= args.pairs) return;
  const int half = args.d / 2, c = int(i % half) * 2, h = int(i / half % args.H);
  const int64_t row = i / half / args.H;
  auto x = load<2>(args.x.at(row, h) + c);
  if (c < args.rotary.R) rotate_pair(x[0], x[1], args.rotary.data + row * 2 * args.rotary.R, args.rotary.R, c);
  store(args.out.at(row, h) + c, x);
}

template <typename T, int kTiles, bool kShort>
void launch_forward(const Forward<T>& args, int warps, int64_t sequences, cudaStream_t stream) {
  const int rows = 16 * warps + 2 * (kShort ? 128 : 2 * 64);
  launch(forward_kernel<T, kTiles, kShort>, num_blocks(sequences, args.H, args.num_blocks), dim3(unsigned(32 * warps)),
         rows * Rows<T, kTiles>::kStride * sizeof(T), stream, args);
}

}  // namespace

void varlen_attention_cuda(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q,
                           const Tensor& cu_seqlens_k, std::optional<Tensor> rotary_q, std::optional<Tensor> rotary_k,
                           int64_t max_seqlen_q, int64_t max_seqlen_k, double scale, int64_t frame_size, Tensor out,
                           Tensor lse) {
  const OnDevice device(q);
  by_half_dtype(q.scalar_type(), [&](auto element) {
    by_width(q.size(2), [&](auto tiles) {
      using T = decltype(element);
      constexpr int kTiles = decltype(tiles)::value;
      const int warps = num_warps(max_seqlen_q, most_warps(kTiles));
      Forward<T> args{Heads<const T>(q), Heads<const T>(k), Heads<const T>(v), Heads<T>(out),
                      static_cast<float*>(lse.data_ptr()),
                      {cu_seqlens_q.const_data_ptr<int32_t>(), cu_seqlens_k.const_data_ptr<int32_t>(),
                       frame_tokens(frame_size)},
                      rotary_of(rotary_q), rotary_of(rotary_k), q.size(0), int(q.size(1)), int(q.size(2)),
                      int(ceil_div(max_seqlen_q, 16 * warps)), float(scale), false};
      args.by_16_bytes = args.d % 8 == 0 && args.q.is_aligned_16() && args.k.is_aligned_16() && args.v.is_aligned_16() &&
                         args.out.is_aligned_16();
      const int64_t sequences = cu_seqlens_q.size(0) - 1;
      if constexpr (kTiles <= 4)
        if (max_seqlen_k <= 128) return launch_forward<T, kTiles, true>(args, warps, sequences, device.stream);
      launch_forward<T, kTiles, false>(args, warps, sequences, device.stream);
    });
  });
}

void rotate_heads(const Tensor& x, const Tensor& rotary, Tensor out) {
  const OnDevice device(x);
  by_half_dtype(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const Rotate<T> args{Heads<const T>(x), Heads<T>(out), rotary_of(rotary), x.numel() / 2, int(x.size(1)), int(x.size(2))};
    launch(rotate_kernel<T>, dim3(unsigned(ceil_div(args.pairs, 256))), dim3(256), 0, device.stream, args);
  });
}

}  // namespace jepa_fast::cuda

JEPA_FAST_CUDA(JEPA_FAST_CUDA_IMPL(varlen_attention_cuda) JEPA_FAST_CUDA_IMPL(rotate_heads))
