// int8_linear on x86-64 with AVX2, exact without VNNI (`fxq.lowering.cpu.avx2_linear`).
//
// `vpmaddubsw` multiplies unsigned with signed bytes and adds pairs of products in int16, where it
// saturates. With pair-safe weights of 8 bits a pair comes to at most 255 * 128 < 2^15; every pair
// is widened to int32 at once, two instructions of the multiplier for one. Where |w| <= 8 a pair is
// at most 4080 in magnitude, eight come to 32640 < 2^15, and are added in int16 before they are
// widened: one instruction and an eighth.
//
// A panel is 16 output channels, two vectors; a step is 4 input channels, whose bytes lie together
// for each output channel, so that one broadcast of 4 activations meets 8 output channels. Input
// channels are padded with zero weights to a multiple of `RUN`, and activations are packed likewise:
// tiles of 6 rows, step by step.

#include "epilogue.h"

namespace {

constexpr int64_t STEP = 4;        // input channels of one instruction
constexpr int64_t STEPS = 8;       // whose sums int16 holds where |w| <= 8
constexpr int64_t RUN = STEP * STEPS;
constexpr int64_t TILE = 6;        // rows: times 2 vectors, 12 accumulators of 16 registers
constexpr int64_t MOST_ROWS = 96;  // of one piece of work
constexpr int64_t WORK = 1 << 21;  // multiply-adds, 20 microseconds, that several threads share
constexpr int64_t CACHED = 1 << 18;  // bytes of weight of one piece of work
constexpr int64_t MUCH = 1 << 18;  // bytes of activations that several threads pack

// A sum in the order that is written. Compilers know that integers can be summed in any, and keep
// all terms of a run until its end, in memory.
inline __m256i in_order(__m256i sum) {
  asm("" : "+x"(sum));
  return sum;
}

// `sums` [ROWS, 2] of the input channels of one group; x and weight move on to the next. `LONG`
// sums of a run fit int16.
template <int ROWS, bool LONG>
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
        if (LONG) {
          acc[r][0] = s == 0 ? a : in_order(_mm256_add_epi16(acc[r][0], a));
          acc[r][1] = s == 0 ? b : in_order(_mm256_add_epi16(acc[r][1], b));
        } else {
          sums[r][0] = in_order(_mm256_add_epi32(sums[r][0], _mm256_madd_epi16(a, ones)));
          sums[r][1] = in_order(_mm256_add_epi32(sums[r][1], _mm256_madd_epi16(b, ones)));
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS && LONG; ++r) {
      sums[r][0] = _mm256_add_epi32(sums[r][0], _mm256_madd_epi16(acc[r][0], ones));
      sums[r][1] = _mm256_add_epi32(sums[r][1], _mm256_madd_epi16(acc[r][1], ones));
    }
  }
}

// One tile with one panel, whose channels share a scale.
template <int ROWS, bool LONG>
void tile(const uint8_t* x, const int8_t* weight, int64_t n_in, const Epilogue (&halves)[2],
          int64_t row) {
  __m256i sums[ROWS][2] = {};
  add_group<ROWS, LONG>(x, weight, n_in, sums);
  for (int i = 0; i < 2; ++i)
    for (int r = 0; r < ROWS; ++r)
      halves[i].store(row + r, halves[i].centred(row + r, 0, sums[r][i]));
}

// The same with several groups of input channels, each with its scale.
template <int ROWS, bool LONG>
void tile_of_groups(const uint8_t* x, const int8_t* weight, int64_t n_in,
                    const Epilogue (&halves)[2], int64_t row) {
  const Call& call = halves[0].call;
  __m256i whole[ROWS][2] = {};
  __m256 scaled[ROWS][2] = {};
  for (int64_t g = 0; g < call.groups; ++g) {
    __m256i sums[ROWS][2] = {};
    add_group<ROWS, LONG>(x, weight, n_in / call.groups, sums);
    for (int i = 0; i < 2; ++i) {
      const __m256 scale = halves[i].scale(g);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) {
        const __m256i centred = halves[i].centred(row + r, g, sums[r][i]);
        whole[r][i] = _mm256_add_epi32(whole[r][i], centred);
        scaled[r][i] =
            _mm256_add_ps(scaled[r][i], _mm256_mul_ps(_mm256_cvtepi32_ps(centred), scale));
      }
    }
  }
  for (int i = 0; i < 2; ++i)
    for (int r = 0; r < ROWS; ++r) {
      if (call.kind == WHOLE) halves[i].store(row + r, whole[r][i]);
      else halves[i].finish(row + r, _mm256_mul_ps(
          scaled[r][i], all(call.x_scale.data[(row + r) * call.x_scale.row_step])));
    }
}

// One tile of packed activations, of `rows` of 6 at most, with one panel.
template <int ROWS, bool LONG>
void meet(int64_t rows, const uint8_t* x, const int8_t* weight, int64_t n_in,
          const Epilogue (&halves)[2], int64_t row) {
  if constexpr (ROWS > 1)
    if (rows < ROWS) return meet<ROWS - 1, LONG>(rows, x, weight, n_in, halves, row);
  if (halves[0].call.groups == 1) tile<ROWS, LONG>(x, weight, n_in, halves, row);
  else tile_of_groups<ROWS, LONG>(x, weight, n_in, halves, row);
}

// One row of activations to its place in its tile, with zeros to a whole run; `flip` makes int8
// codes unsigned.
void pack(const uint8_t* x, int64_t n_in, int64_t padded, uint32_t flip, uint8_t* packed) {
  int64_t k = 0;
  for (; k + STEP <= n_in; k += STEP, packed += TILE * STEP) {
    uint32_t four;
    std::memcpy(&four, x + k, STEP);
    four ^= flip;
    std::memcpy(packed, &four, STEP);
  }
  for (; k < padded; k += STEP, packed += TILE * STEP)
    for (int64_t i = 0; i < STEP; ++i) packed[i] = k + i < n_in ? x[k + i] ^ (flip & 0xFF) : 0;
}

}  // namespace

// `x` [rows, n_in], codes, signed where `shift` is 128 and unsigned where it is 0; `weight`
// [panels, padded / 4, 16, 4], of codes up to 8 in magnitude where `narrow`.
extern "C" void fxq_avx2_linear(
    const uint8_t* x, int64_t rows, int64_t n_in, int shift, const int32_t* x_zero,
    int64_t x_zero_step, const float* x_scale, int64_t x_scale_step, const int8_t* weight,
    const int32_t* row_sums, int narrow, const float* w_scale, int64_t w_step, int64_t groups,
    const float* bias, const float* apart, const float* w_apart, int64_t n_apart, int activation,
    const float* residual, const float* out_scale,
    int64_t out_scale_row_step, int64_t out_scale_channel_step, const int32_t* out_zero,
    int64_t out_zero_row_step, int64_t out_zero_channel_step, int code_min, int code_max,
    void* out, int kind, int64_t n_out, int threads) {
  const int64_t padded = (n_in + RUN - 1) / RUN * RUN, panels = (n_out + PANEL - 1) / PANEL;
  const int64_t tiles = (rows + TILE - 1) / TILE, pieces = (rows + MOST_ROWS - 1) / MOST_ROWS;
  const Call call{shift,
                  {x_zero, x_zero_step, 0},
                  {x_scale, x_scale_step, 0},
                  w_scale,
                  w_step,
                  groups,
                  row_sums,
                  bias,
                  apart,
                  w_apart,
                  n_apart,
                  activation,
                  residual,
                  {out_scale, out_scale_row_step, out_scale_channel_step},
                  {out_zero, out_zero_row_step, out_zero_channel_step},
                  code_min,
                  code_max,
                  out,
                  kind,
                  n_out};
  const Channels channels(call);
  const std::unique_ptr<uint8_t[]> packed(new uint8_t[tiles * TILE * padded]);
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * padded > MUCH)
  for (int64_t r = 0; r < rows; ++r)
    pack(x + r * n_in, n_in, padded, shift ? 0x80808080u : 0,
         packed.get() + r / TILE * TILE * padded + r % TILE * STEP);
  // Panels that the second-level cache holds meet a tile of rows, one by one, then the next tile:
  // what is written lies together.
  const int64_t block = std::max<int64_t>(1, CACHED / (PANEL * padded));
  const int64_t blocks = (panels + block - 1) / block;
#pragma omp parallel for num_threads(threads) collapse(2) \
    schedule(dynamic, 1) if (rows * padded * n_out > WORK)
  for (int64_t b = 0; b < blocks; ++b)
    for (int64_t piece = 0; piece < pieces; ++piece)
      for (int64_t row = piece * MOST_ROWS; row < std::min((piece + 1) * MOST_ROWS, rows);
           row += TILE)
        for (int64_t p = b * block; p < std::min((b + 1) * block, panels); ++p)
          (narrow ? meet<TILE, true> : meet<TILE, false>)(
              rows - row, packed.get() + row * padded, weight + p * PANEL * padded, padded,
              {{call, channels, p, 0}, {call, channels, p, 1}}, row);
}
