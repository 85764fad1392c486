// Random numbers for the mask samplers: PyTorch's CPU generator, and Philox for numbers that depend on nothing before.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <random>
#include <vector>

namespace jepa_fast::masking {

// mt19937 read the way PyTorch reads it on the CPU; `draws` counts the numbers taken, so that a run can resume.
class TorchGenerator {
 public:
  explicit TorchGenerator(uint64_t seed, uint64_t draws = 0) : engine_(static_cast<uint32_t>(seed)), draws_(draws) {
    engine_.discard(draws);
  }

  // goes on where a generator of PyTorch's stands: its 624 words, of which `used` have been taken
  TorchGenerator(const std::vector<uint32_t>& words, size_t used) : draws_(0) {
    Seeds seeds{words};
    // the words as an older state: the engine makes new ones at its first number; what is left of them is kept aside
    engine_.seed(seeds);
    for (size_t i = words.size(); i > used; --i) left_.push_back(temper(words[i - 1]));
  }

  // torch.randint(0, n, (1,)) for n < 2^28
  int64_t integer(int64_t n) { return next() % n; }

  // torch.rand(1), exact in double
  double uniform() { return (next() & 0xFFFFFF) * 0x1p-24; }

  uint64_t draws() const { return draws_; }

 private:
  uint32_t next() {
    ++draws_;
    if (left_.empty()) return static_cast<uint32_t>(engine_());
    const uint32_t word = left_.back();
    left_.pop_back();
    return word;
  }

  static uint32_t temper(uint32_t y) {
    y ^= y >> 11;
    y ^= (y << 7) & 0x9D2C5680;
    y ^= (y << 15) & 0xEFC60000;
    return y ^ (y >> 18);
  }

  // a seed sequence that is the state itself
  struct Seeds {
    using result_type = uint32_t;
    const std::vector<uint32_t>& words;
    template <typename Iterator>
    void generate(Iterator begin, Iterator end) {
      std::copy_n(words.begin(), end - begin, begin);
    }
  };

  std::mt19937 engine_;
  std::vector<uint32_t> left_;  // the next number last
  uint64_t draws_;
};

using Words = std::array<uint32_t, 4>;

// Philox4x32-10: four random words that depend on the counter and the seed only.
// Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (2011).
inline Words philox(Words counter, uint64_t seed) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53} * counter[0], product1 = uint64_t{0xCD9E8D57} * counter[2];
    counter = {static_cast<uint32_t>(product1 >> 32) ^ counter[1] ^ key0, static_cast<uint32_t>(product1),
               static_cast<uint32_t>(product0 >> 32) ^ counter[3] ^ key1, static_cast<uint32_t>(product0)};
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
  return counter;
}

// a word as a number in [0, 1), on the same 2^24 steps as torch.rand
inline double unit(uint32_t word) { return (word >> 8) * 0x1p-24; }

// a word as an integer in [0, n)
inline int64_t below(uint32_t word, int64_t n) { return static_cast<int64_t>((uint64_t{word} * n) >> 32); }

}  // namespace jepa_fast::masking
