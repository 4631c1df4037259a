// Products with packed weights for x86-64 with AVX2 and FMA (`fxq.lowering.cpu.native` builds it).
//
// A panel is 16 output channels: a step along K meets 16 codes, two vectors of fp32, and one number
// of each row of the activations, which is broadcast. So there are no sums across a vector, and the
// codes of a panel are one sequential stream. Channels beyond the last are zero and not stored.
// Weights are streamed once for few rows; for more, a block of the panel is dequantized into the
// first-level cache and multiplied as a float product is. Sums of a block along K start at zero and
// are added to those of earlier blocks, which keeps rounding errors of long sums small.

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <memory>

namespace {

constexpr int64_t PANEL = 16;    // output channels
constexpr int64_t STEP = 8;      // input channels whose 4-bit codes share a 32-bit word
constexpr int64_t BLOCK = 256;   // input channels summed, and dequantized, at a time: 16 KB of fp32
constexpr int64_t WORK = 1 << 19;  // codes times rows, 20 microseconds, that several threads share
constexpr int64_t MOST_ROWS = 96;  // that share a dequantized block
constexpr int TILE = 6;          // rows times 2 vectors are 12 accumulators of 16 registers

// One panel.
struct Weight {
  const uint8_t* codes;
  const float* factors;  // [groups, parts, 16]: scale and, where there are two, shift
  int64_t parts, n_in, group;
};

// Of the group that input channel k is in.
struct Factors {
  __m256 scale[2], shift[2];
  Factors(const Weight& w, int64_t k) {
    const float* factors = w.factors + k / w.group * w.parts * PANEL;
    for (int i = 0; i < 2; ++i) {
      scale[i] = _mm256_loadu_ps(factors + 8 * i);
      shift[i] = w.parts == 2 ? _mm256_loadu_ps(factors + PANEL + 8 * i) : _mm256_setzero_ps();
    }
  }
};

// Bytes of a panel from its start to input channel k, a multiple of STEP or the last.
template <int BITS>
constexpr int64_t bytes_to(int64_t k) {
  return (k + STEP - 1) / STEP * (STEP * PANEL * BITS / 8);
}

// The codes of input channel i of a step, as fp32. 4 bits: the word of an output channel holds
// those of the step, the first lowest; the shift to the top and back repeats the sign.
template <int BITS>
inline void load(const uint8_t* step, int i, __m256& low, __m256& high) {
  if constexpr (BITS == 8) {
    const __m128i* codes = reinterpret_cast<const __m128i*>(step + i * PANEL);
    low = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(codes)));
    high = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadu_si64(step + i * PANEL + 8)));
  } else {
    const __m256i* words = reinterpret_cast<const __m256i*>(step);
    const auto code = [&](const __m256i* word) {
      const __m256i top = _mm256_slli_epi32(_mm256_loadu_si256(word), 28 - 4 * i);
      return _mm256_cvtepi32_ps(_mm256_srai_epi32(top, 28));
    };
    low = code(words), high = code(words + 1);
  }
}

// Adds bias and stores the channels that there are.
inline void store(float* out, __m256 low, __m256 high, const float* bias, int64_t n) {
  alignas(32) float values[PANEL];
  if (bias != nullptr && n == PANEL) {
    low = _mm256_add_ps(low, _mm256_loadu_ps(bias));
    high = _mm256_add_ps(high, _mm256_loadu_ps(bias + 8));
  }
  if (n == PANEL) {
    _mm256_storeu_ps(out, low);
    _mm256_storeu_ps(out + 8, high);
    return;
  }
  _mm256_store_ps(values, low);
  _mm256_store_ps(values + 8, high);
  for (int64_t i = 0; i < n; ++i) out[i] = values[i] + (bias == nullptr ? 0.0f : bias[i]);
}

// Few rows: every code is converted in registers and used at once. `EARLY` scales before the
// product, which groups and zero-points need; otherwise the one scale multiplies the sum.
template <int BITS, int ROWS, bool EARLY>
void stream(const Weight& w, const float* x, float* out, int64_t n_out, const float* bias,
            int64_t n) {
  constexpr int CHAINS = ROWS == 1 ? 4 : ROWS == 2 ? 2 : 1;  // sums that do not wait for each other
  __m256 total[ROWS][2] = {};
  for (int64_t from = 0; from < w.n_in; from += BLOCK) {
    __m256 acc[ROWS][CHAINS][2];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < CHAINS; ++c) acc[r][c][0] = acc[r][c][1] = _mm256_setzero_ps();
    for (int64_t k = from, to = std::min(from + BLOCK, w.n_in); k < to;) {
      const Factors f(w, k);
      const int64_t end = std::min(to, (k / w.group + 1) * w.group);
      const auto add = [&](int i, int chain) __attribute__((always_inline)) {
        __m256 low, high;
        load<BITS>(w.codes + bytes_to<BITS>(k), i, low, high);
        if constexpr (EARLY) {
          low = _mm256_fmadd_ps(low, f.scale[0], f.shift[0]);
          high = _mm256_fmadd_ps(high, f.scale[1], f.shift[1]);
        }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
          const __m256 value = _mm256_broadcast_ss(x + r * w.n_in + k + i);
          acc[r][chain][0] = _mm256_fmadd_ps(low, value, acc[r][chain][0]);
          acc[r][chain][1] = _mm256_fmadd_ps(high, value, acc[r][chain][1]);
        }
      };
      for (; k + STEP <= end; k += STEP)
#pragma GCC unroll 8
        for (int i = 0; i < STEP; ++i) add(i, i % CHAINS);
      for (int i = 0; i < end - k; ++i) add(i, 0);
      k = end;
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < CHAINS; ++c)
        for (int i = 0; i < 2; ++i) total[r][i] = _mm256_add_ps(total[r][i], acc[r][c][i]);
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
    if constexpr (!EARLY)
      for (int i = 0; i < 2; ++i)
        total[r][i] = _mm256_mul_ps(total[r][i], _mm256_loadu_ps(w.factors + 8 * i));
    store(out + r * n_out, total[r][0], total[r][1], bias, n);
  }
}

template <int BITS>
void dequantize(const Weight& w, int64_t from, int64_t to, float* values) {
  for (int64_t k = from; k < to;) {
    const Factors f(w, k);
    const int64_t end = std::min(to, (k / w.group + 1) * w.group);
    const auto one = [&](int i) __attribute__((always_inline)) {
      __m256 low, high;
      load<BITS>(w.codes + bytes_to<BITS>(k), i, low, high);
      float* value = values + (k - from + i) * PANEL;
      _mm256_store_ps(value, _mm256_fmadd_ps(low, f.scale[0], f.shift[0]));
      _mm256_store_ps(value + 8, _mm256_fmadd_ps(high, f.scale[1], f.shift[1]));
    };
    for (; k + STEP <= end; k += STEP)
#pragma GCC unroll 8
      for (int i = 0; i < STEP; ++i) one(i);
    for (int i = 0; i < end - k; ++i) one(i);
    k = end;
  }
}

// sums[r] += x[0:length, r] @ values, for the first ROWS rows of a tile of packed activations.
template <int ROWS>
void tile(const float* x, const float* values, int64_t length, float* sums) {
  __m256 acc[ROWS][2];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) acc[r][0] = acc[r][1] = _mm256_setzero_ps();
  for (int64_t k = 0; k < length; ++k) {
    const __m256 low = _mm256_load_ps(values + k * PANEL);
    const __m256 high = _mm256_load_ps(values + k * PANEL + 8);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const __m256 value = _mm256_broadcast_ss(x + k * TILE + r);
      acc[r][0] = _mm256_fmadd_ps(low, value, acc[r][0]);
      acc[r][1] = _mm256_fmadd_ps(high, value, acc[r][1]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
    float* sum = sums + r * PANEL;
    _mm256_store_ps(sum, _mm256_add_ps(_mm256_load_ps(sum), acc[r][0]));
    _mm256_store_ps(sum + 8, _mm256_add_ps(_mm256_load_ps(sum + 8), acc[r][1]));
  }
}

void tiles(const float* x, int64_t n_in, const float* values, int64_t length, float* sums,
           int64_t rows) {
  for (; rows >= TILE; rows -= TILE, x += TILE * n_in, sums += TILE * PANEL)
    tile<TILE>(x, values, length, sums);
  switch (rows) {
    case 5: return tile<5>(x, values, length, sums);
    case 4: return tile<4>(x, values, length, sums);
    case 3: return tile<3>(x, values, length, sums);
    case 2: return tile<2>(x, values, length, sums);
    case 1: return tile<1>(x, values, length, sums);
  }
}

template <int BITS>
void block(const Weight& w, const float* x, int64_t rows, float* out, int64_t n_out,
           const float* bias, int64_t n) {
  alignas(64) float values[BLOCK * PANEL], sums[MOST_ROWS * PANEL];
  std::fill(sums, sums + rows * PANEL, 0.0f);
  for (int64_t k = 0; k < w.n_in; k += BLOCK) {
    const int64_t end = std::min(k + BLOCK, w.n_in);
    dequantize<BITS>(w, k, end, values);
    tiles(x + k * TILE, w.n_in, values, end - k, sums, rows);
  }
  for (int64_t r = 0; r < rows; ++r)
    store(out + r * n_out, _mm256_load_ps(sums + r * PANEL), _mm256_load_ps(sums + r * PANEL + 8),
          bias, n);
}

template <int BITS, bool EARLY>
void panel(const Weight& w, const float* x, int64_t rows, float* out, int64_t n_out,
           const float* bias, int64_t n) {
  for (; rows >= 4; rows -= 4, x += 4 * w.n_in, out += 4 * n_out)
    stream<BITS, 4, EARLY>(w, x, out, n_out, bias, n);
  if (rows & 2) {
    stream<BITS, 2, EARLY>(w, x, out, n_out, bias, n);
    x += 2 * w.n_in, out += 2 * n_out;
  }
  if (rows & 1) stream<BITS, 1, EARLY>(w, x, out, n_out, bias, n);
}

template <int BITS, bool EARLY>
void linear(const float* x, int64_t rows, int64_t n_in, const uint8_t* codes, const float* factors,
            int64_t parts, int64_t group, const float* bias, float* out, int64_t n_out, int64_t few, int threads) {
  const int64_t panels = (n_out + PANEL - 1) / PANEL, groups = n_in / group;
  // Packed: rows a power of two apart would push each other out of the cache.
  const int64_t n_tiles = rows > few ? (rows + TILE - 1) / TILE : 0;
  const std::unique_ptr<float[]> packed(new float[n_tiles * n_in * TILE]);
#pragma omp parallel num_threads(threads) if ((rows + 1) * n_in * n_out > WORK)
  {
#pragma omp for schedule(static)
    for (int64_t t = 0; t < n_tiles; ++t)
      for (int64_t r = t * TILE; r < std::min(rows, (t + 1) * TILE); ++r)
        for (int64_t k = 0; k < n_in; ++k)
          packed[(t * n_in + k) * TILE + r % TILE] = x[r * n_in + k];
#pragma omp for schedule(dynamic, 4)
    for (int64_t p = 0; p < panels; ++p) {
      const Weight w{codes + p * bytes_to<BITS>(n_in), factors + p * groups * parts * PANEL,
                     parts, n_in, group};
      const int64_t first = p * PANEL, n = std::min(PANEL, n_out - first);
      const float* b = bias == nullptr ? nullptr : bias + first;
      if (rows <= few)
        panel<BITS, EARLY>(w, x, rows, out + first, n_out, b, n);
      else
        for (int64_t r = 0; r < rows; r += MOST_ROWS)
          block<BITS>(w, packed.get() + r * n_in, std::min(MOST_ROWS, rows - r),
                      out + r * n_out + first, n_out, b, n);
    }
  }
}

}  // namespace

// Arguments as in `fxq.lowering.cpu.weight_only_linear`; all of them contiguous.
extern "C" void fxq_weight_only_linear(const float* x, int64_t rows, int64_t n_in,
                                       const uint8_t* codes, int bits, const float* factors,
                                       int64_t group, int parts, const float* bias, float* out,
                                       int64_t n_out, int64_t few, int threads) {
  const bool early = parts == 2 || group < n_in;
  const auto run = bits == 8 ? (early ? linear<8, true> : linear<8, false>)
                             : (early ? linear<4, true> : linear<4, false>);
  run(x, rows, n_in, codes, factors, parts, group, bias, out, n_out, few, threads);
}
