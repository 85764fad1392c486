// Multi-block masks of I-JEPA (arXiv:2301.08243), a whole batch at once; jepa_fast/masking/multiblock_plain.py says
// the same in Python, number for number.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "random.h"

namespace jepa_fast::masking {

using Range = std::array<double, 2>;

struct Settings {
  int64_t rows, columns, num_targets, num_contexts;
  Range target_scale, context_scale, aspect_ratio;
  int64_t min_keep;
  bool allow_overlap;

  int64_t num_blocks() const { return num_targets + num_contexts; }
};

struct Size {
  int64_t height, width;
};

struct Block {
  int64_t top, left, height, width;
  int64_t constraints;  // the tokens of this many target blocks, the first ones, are left out
  int64_t length;       // tokens kept
};

// List-major ragged lists: list l of sample b has lengths[l * B + b] tokens of idx.
struct Lists {
  std::unique_ptr<int64_t[]> idx, lengths;
  int64_t num_lists, num_tokens;
};

struct Masks {
  Lists contexts, targets;
};

constexpr int kAttempts = 20;

inline double between(const Range& range, double u) {
  // volatile: a fused multiply-add would round once where Python rounds twice
  volatile double part = u * (range[1] - range[0]);
  return range[0] + part;
}

// nearbyint rounds half to even, like Python
inline Size block_size(int64_t rows, int64_t columns, double scale, double aspect) {
  const double kept = std::floor(static_cast<double>(rows * columns) * scale);
  return {static_cast<int64_t>(std::nearbyint(std::sqrt(kept * aspect))),
          static_cast<int64_t>(std::nearbyint(std::sqrt(kept / aspect)))};
}

// For every token of one sample, the first target block that covers it.
class Cover {
 public:
  explicit Cover(const Settings& s) : columns_(s.columns), num_targets_(s.num_targets), first_(s.rows * s.columns) {}

  void paint(const Block* targets) {
    std::fill(first_.begin(), first_.end(), static_cast<int32_t>(num_targets_));
    for (int64_t j = num_targets_ - 1; j >= 0; --j)
      for (int64_t row = targets[j].top; row < targets[j].top + targets[j].height; ++row)
        std::fill_n(&first_[row * columns_ + targets[j].left], targets[j].width, static_cast<int32_t>(j));
  }

  int64_t count(const Block& block) const {
    int32_t count = 0;
    const int32_t constraints = static_cast<int32_t>(block.constraints);
    for (int64_t row = block.top; row < block.top + block.height; ++row) {
      const int32_t* first = &first_[row * columns_ + block.left];
      for (int64_t i = 0; i < block.width; ++i) count += first[i] >= constraints;
    }
    return count;
  }

  // the first block.length tokens of the block that are not left out, ascending
  void write(const Block& block, int64_t* out) const {
    int64_t left = block.length;
    for (int64_t row = block.top; left > 0; ++row) {
      const int64_t token = row * columns_ + block.left;
      if (block.constraints == 0) {   // a whole row
        const int64_t width = std::min(block.width, left);
        std::iota(out, out + width, token);
        out += width;
        left -= width;
        continue;
      }
      for (int64_t i = token; i < token + block.width && left > 0; ++i)
        if (first_[i] >= block.constraints) {
          *out++ = i;
          --left;
        }
    }
  }

 private:
  int64_t columns_, num_targets_;
  std::vector<int32_t> first_;
};

// ---- official

// One uniform number drives scale and aspect ratio; the last row and column stay out.
inline Size official_size(const Settings& s, const Range& scale, const Range& aspect, double u) {
  const Size size = block_size(s.rows, s.columns, between(scale, u), between(aspect, u));
  return {std::min(size.height, s.rows - 1), std::min(size.width, s.columns - 1)};
}

// Blocks of one group of samples, trimmed together; blocks: [num_samples, M + E].
inline void draw_official(const Settings& s, TorchGenerator& positions, uint64_t counter, int64_t num_samples,
                          Block* blocks) {
  TorchGenerator sizes(counter);
  const Size target = official_size(s, s.target_scale, s.aspect_ratio, sizes.uniform());
  const Size context = official_size(s, s.context_scale, {1.0, 1.0}, sizes.uniform());
  if (std::min(target.height * target.width, context.height * context.width) <= s.min_keep)
    throw std::invalid_argument("these blocks never keep more than min_keep = " + std::to_string(s.min_keep) +
                                " tokens");
  Cover cover(s);
  int64_t keep[2] = {std::numeric_limits<int64_t>::max(), std::numeric_limits<int64_t>::max()};
  for (int64_t b = 0; b < num_samples; ++b) {
    Block* sample = blocks + b * s.num_blocks();
    for (int64_t k = 0; k < s.num_blocks(); ++k) {
      const bool is_context = k >= s.num_targets;
      const Size& size = is_context ? context : target;
      if (k == s.num_targets) cover.paint(sample);
      Block& block = sample[k];
      for (int attempt = 0;; ++attempt) {
        block.top = positions.integer(s.rows - size.height);
        block.left = positions.integer(s.columns - size.width);
        block.height = size.height;
        block.width = size.width;
        const bool is_free = !is_context || s.allow_overlap;
        block.constraints = is_free ? 0 : std::max<int64_t>(s.num_targets - attempt / kAttempts, 0);
        block.length = is_free ? size.height * size.width : cover.count(block);
        if (block.length > s.min_keep) break;
      }
      keep[is_context] = std::min(keep[is_context], block.length);
    }
  }
  for (int64_t i = 0; i < num_samples * s.num_blocks(); ++i)
    blocks[i].length = keep[i % s.num_blocks() >= s.num_targets];
}

// ---- unbiased

// Scale, aspect ratio, top and left, each from its own word; every position is possible.
inline Block place(const Settings& s, const Words& words, bool is_context) {
  const Range &scale = is_context ? s.context_scale : s.target_scale, square = {1.0, 1.0};
  Size size = block_size(s.rows, s.columns, between(scale, unit(words[0])),
                         between(is_context ? square : s.aspect_ratio, unit(words[1])));
  size.height = std::clamp<int64_t>(size.height, 1, s.rows);
  size.width = std::clamp<int64_t>(size.width, 1, s.columns);
  // a target never covers the whole grid: the longer side gives way
  if (!is_context && size.height == s.rows && size.width == s.columns) --(s.rows >= s.columns ? size.height : size.width);
  return {below(words[2], s.rows - size.height + 1), below(words[3], s.columns - size.width + 1),
          size.height, size.width, 0, size.height * size.width};
}

// Blocks of one sample: all are drawn again while a context keeps min_keep tokens or fewer, `kAttempts` times at most.
inline void draw_unbiased(const Settings& s, uint64_t seed, uint32_t step, uint32_t sample, Cover& cover,
                          Block* blocks) {
  Block* contexts = blocks + s.num_targets;
  const int64_t constraints = s.allow_overlap ? 0 : s.num_targets;
  const auto keep_contexts = [&] {
    cover.paint(blocks);
    int64_t shortest = std::numeric_limits<int64_t>::max();
    for (int64_t e = 0; e < s.num_contexts; ++e) {
      contexts[e].constraints = constraints;
      contexts[e].length = cover.count(contexts[e]);
      shortest = std::min(shortest, contexts[e].length);
    }
    return shortest > s.min_keep;
  };
  for (uint32_t attempt = 0; attempt < kAttempts; ++attempt) {
    for (int64_t k = 0; k < s.num_blocks(); ++k)
      blocks[k] = place(s, philox({sample, step, static_cast<uint32_t>(k), attempt}, seed), k >= s.num_targets);
    if (keep_contexts()) return;
  }
  // every token that is no target becomes context; if these are too few, the first block serves as every target
  std::fill_n(contexts, s.num_contexts, Block{0, 0, s.rows, s.columns, 0, 0});
  if (keep_contexts() || s.allow_overlap) return;
  std::fill_n(blocks, s.num_targets, blocks[0]);
  keep_contexts();
}

// ---- blocks to token numbers

inline Lists make_lists(const Block* blocks, int64_t batch_size, int64_t num_blocks, int64_t first, int64_t num_lists) {
  Lists lists{nullptr, std::make_unique<int64_t[]>(num_lists * batch_size), num_lists, 0};
  for (int64_t l = 0; l < num_lists; ++l)
    for (int64_t b = 0; b < batch_size; ++b)
      lists.num_tokens += lists.lengths[l * batch_size + b] = blocks[b * num_blocks + first + l].length;
  lists.idx.reset(new int64_t[lists.num_tokens]);
  return lists;
}

inline Masks write_masks(const Settings& s, const Block* blocks, int64_t batch_size) {
  Masks masks{make_lists(blocks, batch_size, s.num_blocks(), s.num_targets, s.num_contexts),
              make_lists(blocks, batch_size, s.num_blocks(), 0, s.num_targets)};
  std::vector<int64_t*> context_out(s.num_contexts), target_out(s.num_targets);
  const auto set_out = [&](std::vector<int64_t*>& out, const Lists& lists) {
    int64_t* idx = lists.idx.get();
    for (int64_t l = 0; l < lists.num_lists; ++l) {
      out[l] = idx;
      for (int64_t b = 0; b < batch_size; ++b) idx += lists.lengths[l * batch_size + b];
    }
  };
  set_out(context_out, masks.contexts);
  set_out(target_out, masks.targets);
  Cover cover(s);
  for (int64_t b = 0; b < batch_size; ++b) {
    const Block* sample = blocks + b * s.num_blocks();
    cover.paint(sample);
    for (int64_t k = 0; k < s.num_blocks(); ++k) {
      int64_t*& out = k < s.num_targets ? target_out[k] : context_out[k - s.num_targets];
      cover.write(sample[k], out);
      out += sample[k].length;
    }
  }
  return masks;
}

// ---- batches

// The next batch of the official collator, trimmed together.
inline Masks next_official(const Settings& s, TorchGenerator& positions, uint64_t counter, int64_t batch_size) {
  std::vector<Block> blocks(batch_size * s.num_blocks());
  draw_official(s, positions, counter, batch_size, blocks.data());
  return write_masks(s, blocks.data(), batch_size);
}

// Samples first_sample, first_sample + 1, ... of a step; each group of group_size samples is drawn and trimmed whole,
// also where the batch holds a part of it only.
inline Masks sample_official(const Settings& s, int64_t group_size, uint64_t seed, uint32_t step, int64_t first_sample,
                             int64_t batch_size) {
  const int64_t first_group = first_sample / group_size, last_group = (first_sample + batch_size - 1) / group_size;
  const int64_t num_blocks = s.num_blocks();
  std::vector<Block> blocks((last_group - first_group + 1) * group_size * num_blocks);
  for (int64_t group = first_group; group <= last_group; ++group) {
    TorchGenerator positions(philox({static_cast<uint32_t>(group), step, 0, 0}, seed)[0]);
    draw_official(s, positions, step, group_size, &blocks[(group - first_group) * group_size * num_blocks]);
  }
  return write_masks(s, &blocks[(first_sample - first_group * group_size) * num_blocks], batch_size);
}

inline Masks sample_unbiased(const Settings& s, uint64_t seed, uint32_t step, int64_t first_sample,
                             int64_t batch_size) {
  std::vector<Block> blocks(batch_size * s.num_blocks());
  Cover cover(s);
  for (int64_t b = 0; b < batch_size; ++b)
    draw_unbiased(s, seed, step, static_cast<uint32_t>(first_sample + b), cover, &blocks[b * s.num_blocks()]);
  return write_masks(s, blocks.data(), batch_size);
}

}  // namespace jepa_fast::masking
