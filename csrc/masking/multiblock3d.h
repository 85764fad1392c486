// Multi-block masks of V-JEPA (arXiv:2404.08471) and V-JEPA 2 (arXiv:2506.09985), a whole batch at once;
// jepa_fast/masking/multiblock3d_plain.py says the same in Python, number for number.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "multiblock.h"

namespace jepa_fast::masking {

struct BlockMask {
  int64_t num_blocks;
  Range spatial_scale, temporal_scale, aspect_ratio;
  double max_temporal_keep;
  int64_t max_keep;
  bool full_complement, pred_full_complement, inv_block;
};

struct Settings3D {
  int64_t time, rows, columns;
  std::vector<BlockMask> masks;

  int64_t num_tokens() const { return time * rows * columns; }
  int64_t num_masks() const { return static_cast<int64_t>(masks.size()); }
};

struct Size3D {
  int64_t duration, height, width;
};

struct Block3D {
  int64_t start, top, left;
  Size3D size;
};

struct Kept {
  int64_t context, target;
};

constexpr int kMaxDraws = 10000;

// Which tokens of every clip are targets, a byte each: [masks, num_samples, time * rows * columns].
class Clips {
 public:
  Clips(const Settings3D& s, int64_t num_samples)
      : num_samples_(num_samples),
        num_tokens_(s.num_tokens()),
        periods_(s.num_masks(), s.num_tokens()),
        kept_(s.num_masks() * num_samples),
        is_target_(new uint8_t[s.num_masks() * num_samples * num_tokens_]) {}

  uint8_t* is_target(int64_t mask, int64_t sample) {
    return &is_target_[(mask * num_samples_ + sample) * num_tokens_];
  }
  Kept& kept(int64_t mask, int64_t sample) { return kept_[mask * num_samples_ + sample]; }
  // After so many tokens is_target would repeat, and is not written.
  int64_t& period(int64_t mask) { return periods_[mask]; }

 private:
  int64_t num_samples_, num_tokens_;
  std::vector<int64_t> periods_;
  std::vector<Kept> kept_;
  std::unique_ptr<uint8_t[]> is_target_;
};

// Size of a block from three numbers in [0, 1); the full grid at most, and no rows or columns where it is very small.
inline Size3D block_size(const Settings3D& s, const BlockMask& mask, double u_time, double u_space, double u_aspect) {
  const auto duration = static_cast<int64_t>(static_cast<double>(s.time) * between(mask.temporal_scale, u_time));
  const Size size = block_size(s.rows, s.columns, between(mask.spatial_scale, u_space),
                               between(mask.aspect_ratio, u_aspect));
  return {std::max<int64_t>(duration, 1), std::min(size.height, s.rows), std::min(size.width, s.columns)};
}

// Time steps that a context may use, the first ones.
inline int64_t context_duration(const Settings3D& s, const BlockMask& mask) {
  return std::max<int64_t>(static_cast<int64_t>(static_cast<double>(s.time) * mask.max_temporal_keep), 1);
}

// Whether all official blocks of a mask last the whole clip, so that its time steps are alike: the published case.
inline bool is_tube(const Settings3D& s, const BlockMask& mask) {
  return mask.temporal_scale[0] >= 1 && mask.max_temporal_keep >= 1 && !mask.full_complement &&
         !mask.pred_full_complement;
}

// A clip before its blocks: only what no context may use is target.
inline void clear(const Settings3D& s, const BlockMask& mask, uint8_t* is_target) {
  const int64_t usable = context_duration(s, mask) * s.rows * s.columns;
  std::memset(is_target, 0, usable);
  std::memset(is_target + usable, 1, s.num_tokens() - usable);
}

inline void paint(const Settings3D& s, const Block3D& block, uint8_t* is_target) {
  for (int64_t t = block.start; t < block.start + block.size.duration; ++t)
    for (int64_t row = block.top; row < block.top + block.size.height; ++row)
      std::memset(is_target + (t * s.rows + row) * s.columns + block.left, 1, block.size.width);
}

// The lengths of a painted clip; false where no context is left.
inline bool count(const Settings3D& s, const uint8_t* is_target, Kept& kept) {
  kept.target = std::accumulate(is_target, is_target + s.num_tokens(), int64_t{0});
  kept.context = s.num_tokens() - kept.target;
  return kept.context > 0;
}

// ---- official

// Cuts the lists of `num_samples` clips to the shortest; the first tokens stay.
inline void trim(const Settings3D& s, int64_t m, int64_t first, int64_t num_samples, Clips& clips) {
  const BlockMask& mask = s.masks[m];
  Kept keep{mask.max_keep, s.num_tokens()};
  for (int64_t b = first; b < first + num_samples; ++b) {
    keep.context = std::min(keep.context, clips.kept(m, b).context);
    keep.target = std::min(keep.target, clips.kept(m, b).target);
  }
  // what is cut from one list goes to the other where that is its full complement
  const auto move_rest = [&](bool from_target, int64_t keep_first) {
    for (int64_t b = first; b < first + num_samples; ++b) {
      uint8_t* is_target = clips.is_target(m, b);
      for (int64_t i = 0, seen = 0; i < s.num_tokens(); ++i)
        if (is_target[i] == from_target && seen++ >= keep_first) is_target[i] = !from_target;
    }
  };
  if (mask.full_complement) {
    move_rest(false, keep.context);
    keep.target = s.num_tokens() - keep.context;
  } else if (mask.pred_full_complement) {
    move_rest(true, keep.target);
    keep.context = s.num_tokens() - keep.target;
  }
  for (int64_t b = first; b < first + num_samples; ++b) clips.kept(m, b) = keep;
}

// Clips first, first + 1, ... of a group, trimmed together.
inline void draw_official(const Settings3D& s, TorchGenerator& positions, uint64_t counter, int64_t first,
                          int64_t num_samples, Clips& clips) {
  for (int64_t m = 0; m < s.num_masks(); ++m) {
    const BlockMask& mask = s.masks[m];
    // of a tube, the first time step stands for all
    const int64_t repeats = is_tube(s, mask) ? s.time : 1;
    Settings3D drawn = s;
    drawn.time = s.time / repeats;
    clips.period(m) = drawn.num_tokens();
    TorchGenerator sizes(counter);
    // one after the other: the order of arguments is not the order of evaluation
    const double u_time = sizes.uniform(), u_space = sizes.uniform(), u_aspect = sizes.uniform();
    const Size3D size = block_size(s, mask, u_time, u_space, u_aspect);
    for (int64_t b = first; b < first + num_samples; ++b) {
      uint8_t* is_target = clips.is_target(m, b);
      int draws = 0;
      do {
        if (draws++ == kMaxDraws)
          throw std::invalid_argument("masks[" + std::to_string(m) + "] never leaves a context: " +
                                      std::to_string(mask.num_blocks) + " blocks covered the grid " +
                                      std::to_string(kMaxDraws) + " times in a row; use fewer or smaller blocks");
        clear(drawn, mask, is_target);
        for (int64_t k = 0; k < mask.num_blocks; ++k) {
          Block3D block{0, 0, 0, size};
          block.top = positions.integer(s.rows - size.height + 1);
          block.left = positions.integer(s.columns - size.width + 1);
          block.start = positions.integer(s.time - size.duration + 1);
          block.size.duration /= repeats;
          paint(drawn, block, is_target);
        }
      } while (!count(drawn, is_target, clips.kept(m, b)));
      clips.kept(m, b).context *= repeats;
      clips.kept(m, b).target *= repeats;
    }
    trim(s, m, first, num_samples, clips);
  }
}

// ---- unbiased

// Duration, area, aspect ratio and position, each from its own word; every position is possible.
inline Block3D place(const Settings3D& s, const BlockMask& mask, const Words& sizes, const Words& positions) {
  Size3D size = block_size(s, mask, unit(sizes[0]), unit(sizes[1]), unit(sizes[2]));
  size.height = std::max<int64_t>(size.height, 1);
  size.width = std::max<int64_t>(size.width, 1);
  // a block never covers all that a context may use: the longest side gives way
  const int64_t usable = context_duration(s, mask);
  if (size.duration >= usable && size.height == s.rows && size.width == s.columns) {
    if (usable >= std::max(s.rows, s.columns))
      size.duration = usable - 1;
    else
      --(s.rows >= s.columns ? size.height : size.width);
  }
  return {below(positions[0], s.time - size.duration + 1), below(positions[1], s.rows - size.height + 1),
          below(positions[2], s.columns - size.width + 1), size};
}

// All blocks of a clip are drawn again while no context is left, `kAttempts` times at most; then the first one counts.
inline void draw_unbiased(const Settings3D& s, uint64_t seed, uint32_t step, uint32_t sample, int64_t m,
                          uint8_t* is_target, Kept& kept) {
  const BlockMask& mask = s.masks[m];
  Block3D first{};
  for (uint32_t attempt = 0; attempt < kAttempts; ++attempt) {
    clear(s, mask, is_target);
    for (int64_t k = 0; k < mask.num_blocks; ++k) {
      const uint32_t number = static_cast<uint32_t>(m << 16 | k << 1);
      const Block3D block = place(s, mask, philox({sample, step, number, attempt}, seed),
                                  philox({sample, step, number + 1, attempt}, seed));
      if (k == 0) first = block;
      paint(s, block, is_target);
    }
    if (count(s, is_target, kept)) return;
  }
  clear(s, mask, is_target);
  paint(s, first, is_target);
  count(s, is_target, kept);
}

// ---- clips to token numbers

inline Lists write_lists(const Settings3D& s, Clips& clips, int64_t first, int64_t batch_size, bool is_target_list) {
  const auto length = [&](int64_t m, int64_t b) {
    const Kept& kept = clips.kept(m, first + b);
    return is_target_list != s.masks[m].inv_block ? kept.target : kept.context;
  };
  Lists lists{nullptr, std::make_unique<int64_t[]>(s.num_masks() * batch_size), s.num_masks(), 0};
  for (int64_t m = 0; m < s.num_masks(); ++m)
    for (int64_t b = 0; b < batch_size; ++b)
      lists.num_tokens += lists.lengths[m * batch_size + b] = length(m, b);
  lists.idx.reset(new int64_t[lists.num_tokens]);
  int64_t* out = lists.idx.get();
  for (int64_t m = 0; m < s.num_masks(); ++m)
    for (int64_t b = 0; b < batch_size; ++b) {
      const uint8_t* is_target = clips.is_target(m, first + b);
      const uint8_t wanted = is_target_list != s.masks[m].inv_block;
      const int64_t* begin = out;
      const int64_t* end = out + length(m, b);
      const int64_t period = clips.period(m);
      // without a branch: a token that is not wanted is written over by the next
      for (int64_t token = 0; token < period && out < end; ++token) {
        *out = token;
        out += is_target[token] == wanted;
      }
      const int64_t count = out - begin;
      for (int64_t offset = period; out < end; offset += period) {
        const int64_t rest = std::min<int64_t>(count, end - out);
        for (int64_t i = 0; i < rest; ++i) out[i] = begin[i] + offset;
        out += rest;
      }
    }
  return lists;
}

inline Masks write_masks(const Settings3D& s, Clips& clips, int64_t first, int64_t batch_size) {
  return {write_lists(s, clips, first, batch_size, false), write_lists(s, clips, first, batch_size, true)};
}

// ---- batches

// The next batch of the official collator, trimmed together.
inline Masks next_official(const Settings3D& s, TorchGenerator& positions, uint64_t counter, int64_t batch_size) {
  Clips clips(s, batch_size);
  draw_official(s, positions, counter, 0, batch_size, clips);
  return write_masks(s, clips, 0, batch_size);
}

// Samples first_sample, first_sample + 1, ... of a step; each group of group_size samples is drawn and trimmed whole,
// also where the batch holds a part of it only.
inline Masks sample_official(const Settings3D& s, int64_t group_size, uint64_t seed, uint32_t step,
                             int64_t first_sample, int64_t batch_size) {
  const int64_t first_group = first_sample / group_size, last_group = (first_sample + batch_size - 1) / group_size;
  Clips clips(s, (last_group - first_group + 1) * group_size);
  for (int64_t group = first_group; group <= last_group; ++group) {
    TorchGenerator positions(philox({static_cast<uint32_t>(group), step, 0, 0}, seed)[0]);
    draw_official(s, positions, step, (group - first_group) * group_size, group_size, clips);
  }
  return write_masks(s, clips, first_sample - first_group * group_size, batch_size);
}

inline Masks sample_unbiased(const Settings3D& s, uint64_t seed, uint32_t step, int64_t first_sample,
                             int64_t batch_size) {
  Clips clips(s, batch_size);
  for (int64_t m = 0; m < s.num_masks(); ++m)
    for (int64_t b = 0; b < batch_size; ++b)
      draw_unbiased(s, seed, step, static_cast<uint32_t>(first_sample + b), m, clips.is_target(m, b), clips.kept(m, b));
  return write_masks(s, clips, 0, batch_size);
}

}  // namespace jepa_fast::masking
