// Which steps of a weight (`product.h`) have products that can be added in int16 before they are
// widened: `fxq.lowering.cpu.avx2_linear.match_steps`.
//
// An int16 lane holds the products of one output channel with two input channels of a step, for
// activations from 0 to 255. With another step in the same lane there are four, and whatever the
// activations their sum fits where the positive codes come to at most 128, and the negative ones to
// at least -128. Steps are matched greedily, those with the largest sums first, each with the largest
// that it fits with: a step with small ones fits with most, and waits. The kernel takes `RUN` steps in
// a turn, of one kind.

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

namespace {

constexpr int64_t LANES = 32, SIGNS = 2;  // of a step: 16 output channels, 2 pairs each
constexpr int64_t MOST = 128;             // 255 * 128 < 2^15
constexpr int64_t RUN = 8;                // steps

// The sums of a step's positive and of its negative codes, lane by lane, without their signs.
struct Sums {
  uint8_t of[SIGNS * LANES];
  int64_t largest = 0, total = 0;

  explicit Sums(const int8_t* codes) {
    for (int64_t i = 0; i < LANES; ++i)
      for (int64_t sign = 0; sign < SIGNS; ++sign) {
        int64_t sum = 0;
        for (int64_t k = 0; k < 2; ++k)
          sum += std::max(0, sign ? -codes[2 * i + k] : +codes[2 * i + k]);
        of[sign * LANES + i] = static_cast<uint8_t>(sum);
        largest = std::max(largest, sum);
        total += sum;
      }
  }

  bool fits(const Sums& other) const {
    for (int64_t i = 0; i < SIGNS * LANES; ++i)
      if (of[i] + other.of[i] > MOST) return false;
    return true;
  }
};

// The steps [n, 16, 4] of one panel and group: their order, and how many of the first, in runs, are
// matched.
int32_t match(const int8_t* codes, int64_t n, int32_t* order) {
  std::vector<Sums> sums;
  for (int64_t s = 0; s < n; ++s) sums.emplace_back(codes + s * LANES * 2);
  std::vector<int32_t> left(n);
  std::iota(left.begin(), left.end(), 0);
  std::stable_sort(left.begin(), left.end(), [&](int32_t a, int32_t b) {
    const auto key = [&](int32_t s) { return std::pair(sums[s].largest, sums[s].total); };
    return key(a) > key(b);
  });
  std::vector<int32_t> alone;
  int32_t* end = order;
  while (!left.empty()) {
    const int32_t step = left.front();
    left.erase(left.begin());
    const auto fits = [&](int32_t other) { return sums[step].fits(sums[other]); };
    const auto found = std::find_if(left.begin(), left.end(), fits);
    if (found == left.end()) {
      alone.push_back(step);
      continue;
    }
    *end++ = step;
    *end++ = *found;
    left.erase(found);
  }
  std::copy(alone.begin(), alone.end(), end);
  return static_cast<int32_t>((end - order) / RUN * RUN);
}

}  // namespace

// `codes` [n, steps, 16, 4] of `n` panels and groups, pair-safe; `order` [n, steps]; `matched` [n].
extern "C" void fxq_match_steps(const int8_t* codes, int64_t n, int64_t steps, int32_t* order,
                                int32_t* matched, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
  for (int64_t i = 0; i < n; ++i)
    matched[i] = match(codes + i * steps * LANES * 2, steps, order + i * steps);
}
