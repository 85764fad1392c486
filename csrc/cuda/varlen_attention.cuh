// What the kernels of attention share: rows of a head in shared memory, products of them by a warp.
//
// A head of width d takes kTiles = ceil(d / 8) tiles of 8 columns: 24 is 16 + 8, never 32. A product over columns runs
// in steps of 16 (m16n8k16) and, where kTiles is odd, a last one of 8 (m16n8k8). A row in shared memory takes an odd
// number of 16-byte pieces, so that the 8 rows of a matrix lie in different banks.
// The scores of 16 rows and 16 columns that a warp has as two accumulators are, once rounded, the left factor of the
// next product, without a way through memory.
#pragma once

#include "async_copy.cuh"
#include "exp2.cuh"
#include "mma.cuh"

#include <cmath>
#include <limits>
#include <type_traits>

namespace jepa_fast::cuda {

constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f;

// ---- in global memory

template <typename T>
struct Heads {  // [P, H, d] with its strides, the last one 1
  T* data;
  int64_t token, head;
  explicit Heads(const Tensor& t)
      : data(static_cast<std::remove_const_t<T>*>(t.data_ptr())), token(t.stride(0)), head(t.stride(1)) {}
  bool is_aligned_16() const { return is_aligned(data, 16) && token % 8 == 0 && head % 8 == 0; }
  __device__ T* at(int64_t row, int h) const { return data + row * token + h * head; }
};

struct Rotary {  // [P, 2, R]; data is null where nothing is turned
  const float* data = nullptr;
  int R = 0;
};
inline Rotary rotary_of(const std::optional<Tensor>& t) { return {pointer<const float>(t), t ? int(t->size(2)) : 0}; }

// x'[c] = x[c] kept[c] + x[c ^ 1] crossed[c] for columns c and c + 1, c even, or transposed; `kept` begins the row of
// the table
template <bool kTransposed = false>
__device__ inline void rotate_pair(float& x0, float& x1, const float* kept, int R, int c) {
  const auto k = load<2>(kept + c), s = load<2>(kept + R + c);
  const float y0 = x0, y1 = x1;
  x0 = y0 * k[0] + y1 * s[kTransposed ? 1 : 0];
  x1 = y1 * k[1] + y0 * s[kTransposed ? 0 : 1];
}

struct Sequences {
  const int32_t *cu_seqlens_q, *cu_seqlens_k;
  int frame_size;
};

struct Sequence {
  int64_t query, key;  // its first rows
  int n_q, n_k, frame_size;
  __device__ Sequence(const Sequences& all, int s)
      : query(all.cu_seqlens_q[s]), key(all.cu_seqlens_k[s]), n_q(all.cu_seqlens_q[s + 1] - int(query)),
        n_k(all.cu_seqlens_k[s + 1] - int(key)), frame_size(all.frame_size) {}
  __device__ int visible(int i) const {  // so many keys, from the first, query i attends to; rises with i
    if (frame_size == 0) return n_k;
    return min(max(i + n_k - n_q + frame_size, 0) / frame_size * frame_size, n_k);
  }
  __device__ int first_query(int j) const {  // the first that attends to key j
    return frame_size == 0 ? 0 : max(j / frame_size * frame_size - (n_k - n_q), 0);
  }
};

// ---- in shared memory

template <typename T, int kTiles>
struct Rows {
  static constexpr int kStride = (kTiles | 1) * 8;
  T* data;
  __device__ T* at(int row, int tile = 0) const { return data + row * kStride + tile * 8; }
};

// rows row, row + 1, ... of a head, zero from `count` up to `rows` and beyond column d: on their way when this returns,
// unless they are turned. In pieces of 16 bytes where all is aligned to that, else of 8: d is a multiple of 4
template <typename T, int kTiles>
__device__ inline void load_rows(Rows<T, kTiles> to, int rows, const Heads<const T>& x, int h, int64_t row, int count, int d,
                                 bool by_16_bytes, const Rotary& rotary = {}) {
  for (int i = int(threadIdx.x); i < rows * kTiles; i += int(blockDim.x)) {
    const int r = i / kTiles, c = i % kTiles * 8;
    const bool is_there = r < count;
    const T* from = x.at(is_there ? row + r : row, h) + c;
    T* target = to.at(r) + c;
    if (rotary.data != nullptr) {
#pragma unroll
      for (int half = 0; half < 8; half += 4) {
        Floats<4> values{};
        if (is_there && c + half < d) {
          values = load<4>(from + half);
          const float* kept = rotary.data + (row + r) * 2 * rotary.R;
          if (c + half < rotary.R) rotate_pair(values[0], values[1], kept, rotary.R, c + half);
          if (c + half + 2 < rotary.R) rotate_pair(values[2], values[3], kept, rotary.R, c + half + 2);
        }
        store(target + half, values);
      }
    } else if (by_16_bytes) {
      async_copy_16(target, from, is_there && c < d);
    } else {
      async_copy_8(target, from, is_there && c < d);
      async_copy_8(target + 4, from + 4, is_there && c + 4 < d);
    }
  }
}

// the first `count` rows of `from` to rows row, row + 1, ... of a head, by threads 0 .. threads - 1
template <typename T, int kTiles>
__device__ inline void store_rows(const Heads<T>& x, int h, int64_t row, int count, int d, bool by_16_bytes,
                                  Rows<T, kTiles> from, int thread, int threads) {
  for (int i = thread; i < count * kTiles; i += threads) {
    const int r = i / kTiles, c = i % kTiles * 8;
    const T* piece = from.at(r) + c;
    T* to = x.at(row + r, h) + c;
    if (by_16_bytes) {
      if (c < d) *reinterpret_cast<Pack<T, 8>*>(to) = *reinterpret_cast<const Pack<T, 8>*>(piece);
    } else {
      if (c < d) *reinterpret_cast<Pack<T, 4>*>(to) = *reinterpret_cast<const Pack<T, 4>*>(piece);
      if (c + 4 < d) *reinterpret_cast<Pack<T, 4>*>(to + 4) = *reinterpret_cast<const Pack<T, 4>*>(piece + 4);
    }
  }
}

// ---- in the registers of a warp: lane = 4 g + t

template <typename T>
__device__ inline uint32_t pack(float low, float high) {
  if constexpr (std::is_same_v<T, bf16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
}

// two accumulators [16, 8] | [16, 8], rounded, as a left factor [16, 16]
template <typename T>
__device__ inline void pack_left(uint32_t (&a)[4], const float (&left)[4], const float (&right)[4]) {
  a[0] = pack<T>(left[0], left[1]);
  a[1] = pack<T>(left[2], left[3]);
  a[2] = pack<T>(right[0], right[1]);
  a[3] = pack<T>(right[2], right[3]);
}

// 16 rows as the left factor of products over columns; kept in registers, or read again for each product
template <typename T, int kTiles, bool kKept = true>
struct LeftRows {
  uint32_t pairs[kKept ? kTiles / 2 : 1][4], rest[2];
  const T* lane_row;
  __device__ void load(Rows<T, kTiles> rows, int row) {
    const int lane = int(threadIdx.x) % 32;
    lane_row = rows.at(row + lane % 16);
    if constexpr (kKept) {
#pragma unroll
      for (int c = 0; c < kTiles / 2; ++c) load_matrices<4>(pairs[c], lane_row + (2 * c + lane / 16) * 8);
      if constexpr (kTiles % 2) load_matrices<2>(rest, lane_row + (kTiles - 1) * 8);
    }
  }
  __device__ void load_pair(uint32_t (&a)[4], int c) const {
    const int lane = int(threadIdx.x) % 32;
    if constexpr (!kKept) load_matrices<4>(a, lane_row + (2 * c + lane / 16) * 8);
    else
      for (int i = 0; i < 4; ++i) a[i] = pairs[c][i];
  }
  __device__ void load_rest(uint32_t (&a)[2]) const {
    if constexpr (!kKept) load_matrices<2>(a, lane_row + (kTiles - 1) * 8);
    else
      for (int i = 0; i < 2; ++i) a[i] = rest[i];
  }
};

// s0 | s1 = a b^T, 16 rows of a and rows row .. row + 15 of b
template <typename T, int kTiles, bool kKept>
__device__ inline void dot_rows(float (&s0)[4], float (&s1)[4], const LeftRows<T, kTiles, kKept>& a, Rows<T, kTiles> b,
                                int row) {
  const int lane = int(threadIdx.x) % 32;
#pragma unroll
  for (int i = 0; i < 4; ++i) s0[i] = s1[i] = 0.f;
  const T* lane_row = b.at(row + lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
  for (int c = 0; c < kTiles / 2; ++c) {
    uint32_t left[4], right[4];
    a.load_pair(left, c);
    load_matrices<4>(right, lane_row + 16 * c);
    mma_16x8x16<T>(s0, left, {right[0], right[1]});
    mma_16x8x16<T>(s1, left, {right[2], right[3]});
  }
  if constexpr (kTiles % 2) {
    uint32_t left[2], right[2];
    a.load_rest(left);
    load_matrices<2>(right, b.at(row + lane % 16, kTiles - 1));
    mma_16x8x8<T>(s0, left, right[0]);
    mma_16x8x8<T>(s1, left, right[1]);
  }
}

// sums += a b, a [16, 16], b rows row .. row + 15
template <typename T, int kTiles>
__device__ inline void add_product(float (&sums)[kTiles][4], const uint32_t (&a)[4], Rows<T, kTiles> b, int row) {
  const int lane = int(threadIdx.x) % 32;
#pragma unroll
  for (int c = 0; c + 1 < kTiles; c += 2) {
    uint32_t right[4];
    load_matrices<4, true>(right, b.at(row + lane % 16, c + lane / 16));
    mma_16x8x16<T>(sums[c], a, {right[0], right[1]});
    mma_16x8x16<T>(sums[c + 1], a, {right[2], right[3]});
  }
  if constexpr (kTiles % 2) {
    uint32_t right[2];
    load_matrices<2, true>(right, b.at(row + lane % 16, kTiles - 1));
    mma_16x8x16<T>(sums[kTiles - 1], a, right);
  }
}

template <int kTiles>
__device__ inline void set_zero(float (&sums)[kTiles][4]) {
#pragma unroll
  for (int c = 0; c < kTiles; ++c)
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[c][i] = 0.f;
}

// 16 rows of sums, rounded, to rows row .. row + 15 in shared memory
template <typename T, int kTiles, int kCount>
__device__ inline void put_rows(Rows<T, kTiles> to, int row, const float (&sums)[kCount][4], int first_tile = 0) {
  const int g = int(threadIdx.x) % 32 / 4, t = int(threadIdx.x) % 4;
#pragma unroll
  for (int c = 0; c < kCount; ++c) {
    if (first_tile + c >= kTiles) continue;
    *reinterpret_cast<uint32_t*>(to.at(row + g, first_tile + c) + 2 * t) = pack<T>(sums[c][0], sums[c][1]);
    *reinterpret_cast<uint32_t*>(to.at(row + g + 8, first_tile + c) + 2 * t) = pack<T>(sums[c][2], sums[c][3]);
  }
}

// sums of the gradient of 16 rows, of which `count` are there, times scale and through the transposed map of their positions
template <int kTiles>
__device__ inline void turn_back(float (&sums)[kTiles][4], float scale, const Rotary& rotary, int64_t row, int count,
                                 int first_tile = 0) {
  const int g = int(threadIdx.x) % 32 / 4, t = int(threadIdx.x) % 4;
#pragma unroll
  for (int c = 0; c < kTiles; ++c) {
    const int column = (first_tile + c) * 8 + 2 * t;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float &x0 = sums[c][2 * half], &x1 = sums[c][2 * half + 1];
      x0 *= scale;
      x1 *= scale;
      if (column < rotary.R && g + 8 * half < count)
        rotate_pair<true>(x0, x1, rotary.data + (row + g + 8 * half) * 2 * rotary.R, rotary.R, column);
    }
  }
}

// sum of a[c] * b[c] over d columns, by the four lanes with one g
template <typename T>
__device__ inline float dot_of_quad(const T* a, const T* b, int d) {
  float sum = 0.f;
  for (int c = int(threadIdx.x) % 4 * 4; c < d; c += 16) {
    const auto x = load<4>(a + c), y = load<4>(b + c);
#pragma unroll
    for (int i = 0; i < 4; ++i) sum += x[i] * y[i];
  }
  sum += __shfl_xor_sync(0xffffffff, sum, 1);
  return sum + __shfl_xor_sync(0xffffffff, sum, 2);
}

// ---- launches

template <int n>
struct Tiles { static constexpr int value = n; };

// call(Tiles<n>{}) for the first n among those compiled with 8 n >= d, d at most 128
template <typename Call>
void by_width(int64_t d, Call call) {
  switch ((d + 7) / 8) {
    case 1: case 2: return call(Tiles<2>{});
    case 3: return call(Tiles<3>{});
    case 4: return call(Tiles<4>{});
    case 5: case 6: case 7: case 8: return call(Tiles<8>{});
    case 9: case 10: return call(Tiles<10>{});
    case 11: return call(Tiles<11>{});
    case 12: return call(Tiles<12>{});
    case 13: return call(Tiles<13>{});
    case 14: case 15: case 16: return call(Tiles<16>{});
    default: STD_TORCH_CHECK(false, "varlen_attention: a head width of at most 128 expected");
  }
}

template <typename Call>
void by_half_dtype(ScalarType dtype, Call call) {
  switch (dtype) {
    case ScalarType::BFloat16: return call(bf16{});
    case ScalarType::Half: return call(half{});
    default: STD_TORCH_CHECK(false, "varlen_attention: bfloat16 or float16 expected");
  }
}

// of a block: as many as have two blocks of 8 or three of 4 in a multiprocessor's registers
constexpr int most_warps(int tiles) { return tiles <= 4 ? 8 : 4; }

inline int num_warps(int64_t max_seqlen, int most) {  // 16 rows for each
  return int(std::max<int64_t>(1, std::min<int64_t>(most, ceil_div(max_seqlen, 16))));
}

inline dim3 num_blocks(int64_t sequences, int64_t heads, int64_t blocks) {
  STD_TORCH_CHECK(sequences * heads * blocks < (int64_t(1) << 31), "varlen_attention: more than 2^31 blocks");
  return dim3(unsigned(sequences * heads * blocks));
}

inline int frame_tokens(int64_t frame_size) { return int(std::min<int64_t>(frame_size, 1 << 30)); }

// Block of a grid with neighbouring heads side by side: they share cache lines of q, k, v and all of the rotary table
struct BlockOf {
  int head, block, sequence;
  __device__ BlockOf(int num_heads, int num_blocks)
      : head(int(blockIdx.x) % num_heads), block(int(blockIdx.x) / num_heads % num_blocks),
        sequence(int(blockIdx.x) / num_heads / num_blocks) {}
};

}  // namespace jepa_fast::cuda
