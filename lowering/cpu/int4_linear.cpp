// int8_linear for weights of 4 bits on x86-64 with AVX2, exact without VNNI
// (`fxq.lowering.cpu.int4_linear`).
//
// `vpmaddubsw` multiplies unsigned with signed bytes and adds pairs of products in int16. Where
// |w| <= 8 a product is at most 255 * 8 = 2040 in magnitude and a pair 4080, so the instruction
// cannot saturate, and eight pairs sum to at most 8 * 4080 = 32640 < 2^15: eight results are added
// in int16 before they are widened. With weights of 8 bits not even one pair is safe, and widening
// every pair costs three instructions where this costs one and an eighth.
//
// A panel is 16 output channels, two vectors; a step is 4 input channels, whose bytes lie together
// for each output channel, so that one broadcast of 4 activations meets 8 output channels. 8 steps
// (`RUN`) are summed in int16, the rest in int32. Input channels are padded with zero weights to a
// multiple of a run, and activations are packed likewise: tiles of 6 rows, step by step.

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>

namespace {

constexpr int64_t PANEL = 16;      // output channels
constexpr int64_t STEP = 4;        // input channels of one instruction
constexpr int64_t STEPS = 8;       // whose sums int16 holds
constexpr int64_t RUN = STEP * STEPS;
constexpr int64_t TILE = 6;        // rows: times 2 vectors, 12 accumulators of 16 registers
constexpr int64_t MOST_ROWS = 96;  // of one piece of work
constexpr int64_t WORK = 1 << 21;  // multiply-adds, 20 microseconds, that several threads share
constexpr int64_t MUCH = 1 << 18;  // bytes of activations that several threads pack

// What the caller gives beside codes, and where results go.
struct Call {
  int32_t shift;          // added to zero-points, as to codes
  const int32_t* x_zero;  // none, one, or one a row
  int64_t zero_step;
  const float* x_scale;  // one, or one a row
  int64_t scale_step;
  const float* w_scale;  // [groups], or that for every channel
  int64_t channel_step;
  int64_t groups;           // of neighbouring input channels that share a scale
  const float* bias;        // none, or one a channel
  const int32_t* row_sums;  // [panels, groups, 16], of the weight
  float* scaled;             // results go here, or
  int32_t* whole;            // there
  int64_t n_out;
};

// What becomes of the sums of a panel: less zero_point * row_sums, whole numbers or scaled.
struct Epilogue {
  const Call& call;
  int64_t first, n;                  // channels
  std::unique_ptr<float[]> w_scale;  // [groups, 16]
  float bias[PANEL] = {};
  Epilogue(const Call& c, int64_t first)
      : call(c),
        first(first),
        n(std::min(PANEL, c.n_out - first)),
        w_scale(new float[c.groups * PANEL]()) {
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t g = 0; g < c.groups; ++g)
        w_scale[g * PANEL + i] = c.w_scale[(first + i) * c.channel_step + g];
      if (c.bias != nullptr) bias[i] = c.bias[first + i];
    }
  }

  // What a row's zero-point is, as the codes in the product have it.
  __m256i zero_point(int64_t row) const {
    return _mm256_set1_epi32(call.shift +
                             (call.x_zero == nullptr ? 0 : call.x_zero[row * call.zero_step]));
  }

  __m256i row_sums(int64_t group, int half) const {
    const int32_t* sums = call.row_sums + first * call.groups + group * PANEL + 8 * half;
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(sums));
  }

  __m256 scale(int64_t group, int half) const {
    return _mm256_loadu_ps(w_scale.get() + group * PANEL + 8 * half);
  }

  // Store what one row and half of the channels come to: `whole`, the sums of all groups, or
  // `scaled`, those of several groups with their scales. In the order of the definition, each step
  // rounded: with one group results are bit-equal to it.
  void store(int64_t row, int half, __m256i whole, __m256 scaled) const {
    const int64_t there = std::clamp<int64_t>(n - 8 * half, 0, 8);
    const int64_t at = row * call.n_out + first + 8 * half;
    if (call.scaled != nullptr) {
      const __m256 x_scale = _mm256_set1_ps(call.x_scale[row * call.scale_step]);
      __m256 y = call.groups > 1 ? _mm256_mul_ps(scaled, x_scale)
                                 : _mm256_mul_ps(_mm256_cvtepi32_ps(whole),
                                                 _mm256_mul_ps(x_scale, scale(0, half)));
      if (call.bias != nullptr) y = _mm256_add_ps(y, _mm256_loadu_ps(bias + 8 * half));
      whole = _mm256_castps_si256(y);
    }
    void* out = call.scaled != nullptr ? static_cast<void*>(call.scaled + at) : call.whole + at;
    if (there == 8) return _mm256_storeu_si256(static_cast<__m256i*>(out), whole);
    alignas(32) int32_t values[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(values), whole);
    std::memcpy(out, values, there * sizeof(int32_t));
  }
};

// A sum in the order that is written. Compilers know that integers can be summed in any, and keep
// all terms of a run until its end, in memory.
inline __m256i in_order(__m256i sum) {
  asm("" : "+x"(sum));
  return sum;
}

// `sums` [ROWS, 2] of the input channels of one group; x and weight move on to the next.
template <int ROWS>
inline void add_group(const uint8_t*& x, const int8_t*& weight, int64_t length,
                      __m256i (&sums)[ROWS][2]) {
  const __m256i ones = _mm256_set1_epi16(1);
  for (int64_t k = 0; k < length; k += RUN) {
    __m256i acc[ROWS][2];
#pragma GCC unroll 8
    for (int s = 0; s < STEPS; ++s, x += TILE * STEP, weight += PANEL * STEP) {
      const __m256i* w = reinterpret_cast<const __m256i*>(weight);
      const __m256i low = _mm256_loadu_si256(w), high = _mm256_loadu_si256(w + 1);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) {
        int32_t four;
        std::memcpy(&four, x + r * STEP, STEP);
        const __m256i value = _mm256_set1_epi32(four);
        const __m256i a = _mm256_maddubs_epi16(value, low), b = _mm256_maddubs_epi16(value, high);
        acc[r][0] = s == 0 ? a : in_order(_mm256_add_epi16(acc[r][0], a));
        acc[r][1] = s == 0 ? b : in_order(_mm256_add_epi16(acc[r][1], b));
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      sums[r][0] = _mm256_add_epi32(sums[r][0], _mm256_madd_epi16(acc[r][0], ones));
      sums[r][1] = _mm256_add_epi32(sums[r][1], _mm256_madd_epi16(acc[r][1], ones));
    }
  }
}

template <int ROWS>
void tile(const uint8_t* x, const int8_t* weight, int64_t n_in, const Epilogue& e, int64_t row) {
  const int64_t groups = e.call.groups;
  __m256i whole[ROWS][2] = {}, zero[ROWS];
  __m256 scaled[ROWS][2] = {};
  for (int r = 0; r < ROWS; ++r) zero[r] = e.zero_point(row + r);
  for (int64_t g = 0; g < groups; ++g) {
    __m256i sums[ROWS][2] = {};
    add_group<ROWS>(x, weight, n_in / groups, sums);
    for (int i = 0; i < 2; ++i) {
      const __m256i row_sums = e.row_sums(g, i);
      const __m256 scale = e.scale(g, i);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) {
        const __m256i centred =
            _mm256_sub_epi32(sums[r][i], _mm256_mullo_epi32(zero[r], row_sums));
        whole[r][i] = _mm256_add_epi32(whole[r][i], centred);
        scaled[r][i] =
            _mm256_add_ps(scaled[r][i], _mm256_mul_ps(_mm256_cvtepi32_ps(centred), scale));
      }
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int i = 0; i < 2; ++i) e.store(row + r, i, whole[r][i], scaled[r][i]);
}

// Rows `from` to `to` of packed activations, with one panel.
void panel(const uint8_t* x, const int8_t* weight, int64_t n_in, const Epilogue& e, int64_t from,
           int64_t to) {
  for (int64_t row = from; row < to; row += TILE) {
    const uint8_t* rows = x + row * n_in;
    switch (std::min(TILE, to - row)) {
      case 6: tile<6>(rows, weight, n_in, e, row); break;
      case 5: tile<5>(rows, weight, n_in, e, row); break;
      case 4: tile<4>(rows, weight, n_in, e, row); break;
      case 3: tile<3>(rows, weight, n_in, e, row); break;
      case 2: tile<2>(rows, weight, n_in, e, row); break;
      case 1: tile<1>(rows, weight, n_in, e, row); break;
    }
  }
}

// One row of activations to its place in its tile; `flip` makes int8 codes unsigned.
void pack(const uint8_t* x, int64_t n_in, uint32_t flip, uint8_t* packed) {
  int64_t k = 0;
  for (; k + STEP <= n_in; k += STEP, packed += TILE * STEP) {
    uint32_t four;
    std::memcpy(&four, x + k, STEP);
    four ^= flip;
    std::memcpy(packed, &four, STEP);
  }
  for (int64_t i = 0; k < n_in; ++k, ++i) packed[i] = x[k] ^ (flip & 0xFF);
}

}  // namespace

// `x` [rows, n_in], codes, signed where `shift` is 128 and unsigned where it is 0; `weight`
// [panels, padded / 4, 16, 4]; results [rows, n_out].
extern "C" void fxq_int4_linear(const uint8_t* x, int64_t rows, int64_t n_in, int shift,
                                const int32_t* x_zero, int64_t zero_step, const float* x_scale,
                                int64_t scale_step, const int8_t* weight, const int32_t* row_sums,
                                const float* w_scale, int64_t channel_step, int64_t groups,
                                const float* bias,
                                float* scaled, int32_t* whole, int64_t n_out, int threads) {
  const int64_t padded = (n_in + RUN - 1) / RUN * RUN, panels = (n_out + PANEL - 1) / PANEL;
  const int64_t tiles = (rows + TILE - 1) / TILE, pieces = (rows + MOST_ROWS - 1) / MOST_ROWS;
  const Call call{shift,        x_zero, zero_step, x_scale,  scale_step, w_scale,
                  channel_step, groups, bias,      row_sums, scaled,     whole,   n_out};
  const std::unique_ptr<uint8_t[]> packed(new uint8_t[tiles * TILE * padded]());
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * padded > MUCH)
  for (int64_t r = 0; r < rows; ++r)
    pack(x + r * n_in, n_in, shift ? 0x80808080u : 0,
         packed.get() + r / TILE * TILE * padded + r % TILE * STEP);
#pragma omp parallel for num_threads(threads) collapse(2) \
    schedule(dynamic, 1) if (rows * padded * n_out > WORK)
  for (int64_t p = 0; p < panels; ++p)
    for (int64_t piece = 0; piece < pieces; ++piece)
      panel(packed.get(), weight + p * PANEL * padded, padded, Epilogue(call, p * PANEL),
            piece * MOST_ROWS, std::min((piece + 1) * MOST_ROWS, rows));
}
