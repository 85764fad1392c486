// a b (+ bias) in float32 on the matrix units (AMX) of x86 CPUs, which multiply bfloat16 and add in float32.
//
// A float32 number is the exact sum of three bfloat16 numbers, x = x1 + x2 + x3, each the nearest to what the ones before
// left over. Of the nine products of two such sums the six in
//   a b = a1 b1 + (a1 b2 + a2 b1) + (a1 b3 + a2 b2 + a3 b1) + ...
// are computed; the others are below 2^-26 |a b|. Henry, Tang, Heinecke, "Leveraging the bfloat16 Artificial Intelligence
// Datatype For Higher-Precision Computations", arXiv:1904.06376.
// Sums over k start anew every kMaxChunk, so that they are more accurate than one long sum; their order depends on K only.
// The units take numbers below 2^-126 for zero and could overflow before float32 does. Where the largest magnitude of a
// or b is not in [2^-50, 2^50] (nor zero), or where one is not finite, `matmul` returns false and `out` is not valid.
// a [M, K] and b [K, N] have one stride that is 1; bias [N], out [M, N] contiguous; all float32.
#include "../common.h"
#include "../simd.h"

#if defined(__AVX512F__) && defined(__x86_64__) && defined(__linux__) && __has_include(<amxbf16intrin.h>)
#define JEPA_FAST_HAS_AMX 1
#include <algorithm>
#include <atomic>
#include <cpuid.h>
#include <memory>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace jepa_fast::CPU_CAPABILITY {
#if defined(JEPA_FAST_HAS_AMX)
namespace {

constexpr int kTile = 16;                             // rows of a tile, 64 bytes each
constexpr int kDepth = 32;                            // of k in a tile of bfloat16
constexpr int kPanel = 2 * kTile;                     // rows of a, and columns of b, multiplied at once
constexpr int64_t kMaxChunk = 512;                    // of k in one sum
constexpr int64_t kResidentSteps = 200;               // Steps of the smaller operand that stay in the cache: 1.2 MB
constexpr uint16_t kSmallest = (127 - 50) << 7, kLargest = (127 + 50) << 7;  // 2^-50 and 2^50 in bfloat16

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// 32 of k of a panel: two tiles in each of three bfloat16 planes; a word pairs k with k + 16, in a and b alike
struct Step { alignas(64) uint32_t tiles[3][2][kTile][kTile]; };

struct Operand {  // a, or the transpose of b
  const float* data;
  int64_t rows, depth, row_stride, k_stride;
  bool is_a;
};

inline __mmask16 first_lanes(int64_t n) { return __mmask16(n >= kLanes ? 0xffff : n <= 0 ? 0 : (1 << n) - 1); }

inline UVec take_nearest(Vec& x) {  // the bfloat16 nearest to x, as float32; x keeps the rest
  const UVec nearest = ((UVec)x + 0x8000) & 0xffff0000u;
  x -= (Vec)nearest;
  return nearest;
}
inline UVec pair(UVec low, UVec high) { return low >> 16 | (high & 0xffff0000u); }

class Largest {  // magnitude among bfloat16 numbers
 public:
  void add(UVec pairs) {
    bits_ = _mm512_maskz_max_epu16(0xffffffff, bits_, (__m512i)(pairs & 0x7fff7fff));
  }
  void give(std::atomic<uint16_t>& all) const {
    alignas(64) uint16_t lanes[32];
    std::memcpy(lanes, &bits_, sizeof lanes);
    const uint16_t ours = *std::max_element(lanes, lanes + 32);
    for (uint16_t seen = all.load(); seen < ours && !all.compare_exchange_weak(seen, ours);) {}
  }

 private:
  __m512i bits_{};
};

// 16 rows and 32 of k of x, from (row, k) on, as three tiles: words of one row beside each other in those of a, one word
// of every row in those of b
template <bool kIsA, bool kIsAlongK>
void pack_tile(const Operand& x, int64_t row, int64_t k, Step& out, int half, Largest& largest) {
  const int64_t rows = x.rows - row, depth = x.depth - k, stride = kIsAlongK ? x.row_stride : x.k_stride;
  const float* p = x.data + row * x.row_stride + k * x.k_stride;
  // vector i is of row i along k, else of k = i along the rows; its pair has the k that is 16 more
  const float* paired = p + kTile * x.k_stride;
  const __mmask16 mask = first_lanes(kIsAlongK ? depth : rows), paired_mask = kIsAlongK ? first_lanes(depth - kTile) : mask;
  const int64_t end = kIsAlongK ? rows : depth, paired_end = kIsAlongK ? rows : depth - kTile;
#pragma GCC unroll 4
  for (int i = 0; i < kTile; ++i) {
    Vec low = _mm512_maskz_loadu_ps(i < end ? mask : 0, p + i * stride);
    Vec high = _mm512_maskz_loadu_ps(i < paired_end ? paired_mask : 0, paired + i * stride);
    const UVec low1 = take_nearest(low), high1 = take_nearest(high), first = pair(low1, high1);
    const UVec low2 = take_nearest(low), high2 = take_nearest(high);
    largest.add(first);
    store((float*)out.tiles[0][half][i], (Vec)first);
    store((float*)out.tiles[1][half][i], (Vec)pair(low2, high2));
    store((float*)out.tiles[2][half][i], (Vec)pair((UVec)low, (UVec)high));  // what is left has 8 bits at most
  }
  if (kIsA == kIsAlongK) return;
  for (int plane = 0; plane < 3; ++plane) {
    Vec rows[kTile];
    for (int i = 0; i < kTile; ++i) rows[i] = load((float*)out.tiles[plane][half][i]);
    transpose(rows);
    for (int i = 0; i < kTile; ++i) store((float*)out.tiles[plane][half][i], rows[i]);
  }
}

template <bool kIsA, bool kIsAlongK>
void pack_as(const Operand& x, int64_t panel, int64_t panels, int64_t k, int64_t steps, Step* out, Largest& largest) {
  const auto pack_step = [&](int64_t i, int64_t s) {
    for (int half = 0; half < 2; ++half)
      pack_tile<kIsA, kIsAlongK>(x, (panel + i) * kPanel + half * kTile, k + s * kDepth, out[i * steps + s], half, largest);
  };
  if (kIsAlongK) {
    for (int64_t i = 0; i < panels; ++i)
      for (int64_t s = 0; s < steps; ++s) pack_step(i, s);
  } else {
    for (int64_t s = 0; s < steps; ++s)
      for (int64_t i = 0; i < panels; ++i) pack_step(i, s);
  }
}

// panels of x from k on, `steps` Steps each
void pack(const Operand& x, int64_t panel, int64_t panels, int64_t k, int64_t steps, Step* out, Largest& largest) {
  const auto pack_it = x.k_stride == 1 ? (x.is_a ? pack_as<true, true> : pack_as<false, true>)
                                       : (x.is_a ? pack_as<true, false> : pack_as<false, false>);
  pack_it(x, panel, panels, k, steps, out, largest);
}

bool is_in_range(uint16_t largest) { return largest == 0 || (kSmallest <= largest && largest <= kLargest); }

// tiles 0 to 3 are 32 x 32 sums, 4 and 5 two tiles of a, 6 and 7 two of b
#define JEPA_FAST_LOAD_A(step, plane) \
  _tile_loadd(4, (step).tiles[plane][0], 64); _tile_loadd(5, (step).tiles[plane][1], 64);
#define JEPA_FAST_LOAD_B(step, plane) \
  _tile_loadd(6, (step).tiles[plane][0], 64); _tile_loadd(7, (step).tiles[plane][1], 64);
#define JEPA_FAST_MULTIPLY \
  _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);

// sums [32, 32] of the product of two packed panels
__attribute__((target("amx-tile,amx-bf16"), noinline))
void multiply(const Step* a, const Step* b, int64_t steps, float* sums) {
  asm volatile("" ::: "memory");  // GCC does not know that tiles read what was packed
  _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
  for (int64_t s = 0; s < steps; ++s) {  // every product after the first loads only one of its sides
    JEPA_FAST_LOAD_A(a[s], 0) JEPA_FAST_LOAD_B(b[s], 2) JEPA_FAST_MULTIPLY
    JEPA_FAST_LOAD_B(b[s], 1) JEPA_FAST_MULTIPLY
    JEPA_FAST_LOAD_A(a[s], 1) JEPA_FAST_MULTIPLY
    JEPA_FAST_LOAD_B(b[s], 0) JEPA_FAST_MULTIPLY
    JEPA_FAST_LOAD_A(a[s], 2) JEPA_FAST_MULTIPLY
    JEPA_FAST_LOAD_A(a[s], 0) JEPA_FAST_MULTIPLY
  }
  _tile_stored(0, sums, 4 * kPanel);
  _tile_stored(1, sums + kTile, 4 * kPanel);
  _tile_stored(2, sums + kTile * kPanel, 4 * kPanel);
  _tile_stored(3, sums + kTile * kPanel + kTile, 4 * kPanel);
}

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
__attribute__((target("amx-tile"))) void configure_tiles() {
  static const TileConfig config;  // GCC takes only its first word for used: on the stack the rest would not be written
  _tile_loadconfig(&config);
}
__attribute__((target("amx-tile"))) void release_tiles() { _tile_release(); }

struct Output {
  float* data;
  int64_t rows, columns;
  const float* bias;

  // sums [32, 32] go to (row, column), with the bias, or are added to what is there
  void write(const float* sums, int64_t row, int64_t column, bool is_first) const {
    const __mmask16 masks[] = {first_lanes(columns - column), first_lanes(columns - column - kTile)};
    for (int64_t i = 0; i < std::min<int64_t>(rows - row, kPanel); ++i)
      for (int half = 0; half < 2; ++half) {
        float* p = data + (row + i) * columns + column + half * kTile;
        Vec v = load(sums + i * kPanel + half * kTile);
        if (!is_first) v += (Vec)_mm512_maskz_loadu_ps(masks[half], p);
        else if (bias) v += (Vec)_mm512_maskz_loadu_ps(masks[half], bias + column + half * kTile);
        _mm512_mask_storeu_ps(p, masks[half], v);
      }
  }
};

// chunk by chunk of k: the smaller operand is packed once for all, then the larger one a panel at a time by the thread
// that multiplies it
struct Product {
  Operand large, small;
  Output out;

  // one panel of large with the panels [first, last) of small
  void multiply_panel(int64_t panel, const Step* packed, int64_t first, int64_t last, const Step* packed_small,
                      int64_t steps, bool is_first_chunk) const {
    alignas(64) float sums[kPanel * kPanel];
    for (int64_t j = first; j < last; ++j) {
      const Step* theirs = packed_small + j * steps;
      const int64_t row = (large.is_a ? panel : j) * kPanel, column = (large.is_a ? j : panel) * kPanel;
      multiply(large.is_a ? packed : theirs, large.is_a ? theirs : packed, steps, sums);
      out.write(sums, row, column, is_first_chunk);
    }
  }

  bool run() const {
    const int64_t K = small.depth, small_panels = divide_up(small.rows, kPanel), large_panels = divide_up(large.rows, kPanel);
    const int64_t chunk_steps = divide_up(divide_up(K, divide_up(K, kMaxChunk)), kDepth);  // of equal size
    const int64_t groups = divide_up(small_panels * chunk_steps, kResidentSteps);
    const int64_t group_panels = divide_up(small_panels, groups);
    const std::unique_ptr<Step[]> packed_small(new Step[small_panels * chunk_steps]);
    std::atomic<uint16_t> largest_small{0}, largest_large{0};
    for (int64_t k = 0; k < K; k += chunk_steps * kDepth) {
      const int64_t steps = std::min(chunk_steps, divide_up(K - k, kDepth));
      torch::stable::parallel_for(0, small_panels, 1, [&](int64_t begin, int64_t end) {
        Largest largest;
        pack(small, begin, end - begin, k, steps, packed_small.get() + begin * steps, largest);
        largest.give(largest_small);
      });
      if (largest_small > kLargest) return false;
      // an item is a panel of large with a group of panels of small, which stay in the cache for the next item
      torch::stable::parallel_for(0, groups * large_panels, 1, [&](int64_t begin, int64_t end) {
        const std::unique_ptr<Step[]> packed(new Step[steps]);
        Largest largest;
        configure_tiles();
        for (int64_t item = begin; item < end; ++item) {
          const int64_t first = item / large_panels * group_panels, panel = item % large_panels;
          pack(large, panel, 1, k, steps, packed.get(), largest);
          multiply_panel(panel, packed.get(), first, std::min(small_panels, first + group_panels), packed_small.get(),
                         steps, k == 0);
        }
        release_tiles();
        largest.give(largest_large);
      });
    }
    return is_in_range(largest_small) && is_in_range(largest_large);
  }
};

bool ask_for_amx() {  // does the CPU have it, and does the kernel let this process use it?
  unsigned eax, ebx, ecx, edx = 0;
  constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24, kRequestPermission = 0x1023, kTileData = 18;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & kBf16) && (edx & kTiles) &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace

bool has_amx(const Tensor&) {
  static const bool is_there = ask_for_amx();
  return is_there;
}

bool matmul(const Tensor& a, const Tensor& b, const std::optional<Tensor>& bias, Tensor out) {
  const Operand left{floats(a), a.size(0), a.size(1), a.stride(0), a.stride(1), true};
  const Operand right{floats(b), b.size(1), b.size(0), b.stride(1), b.stride(0), false};
  const Output output{out.mutable_data_ptr<float>(), left.rows, right.rows, bias ? floats(*bias) : nullptr};
  return (left.rows < right.rows ? Product{right, left, output} : Product{left, right, output}).run();
}

#else

bool has_amx(const Tensor&) { return false; }

bool matmul(const Tensor&, const Tensor&, const std::optional<Tensor>&, Tensor) {
  STD_TORCH_CHECK(false, "matmul: compiled without AMX");
}

#endif
}  // namespace jepa_fast::CPU_CAPABILITY

JEPA_FAST_CPU(JEPA_FAST_IMPL(has_amx) JEPA_FAST_IMPL(matmul))
