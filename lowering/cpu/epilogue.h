// What becomes of the integer sums of a product: the epilogue of `fxq.lowering.int8_linear`, in the
// order of the definition, each step rounded by itself (never contracted to fused multiply-adds), so
// that results without an activation function are bit-equal to it, codes included.

#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>

#include "activation.h"

namespace {

constexpr int64_t PANEL = 16;  // output channels

// A value for each row, each channel, or all: steps of 0 or 1. `data` may be none.
template <typename T>
struct Spread {
  const T* data;
  int64_t row_step, channel_step;
};

// Results: int32, fp32, int8 or uint8; as `avx2_linear` numbers them.
enum Kind { WHOLE, REAL, CODES };

// What is added to results: fp32, int8 or uint8, as `avx2_conv.FORMATS` numbers them.
enum Format { NOTHING, FLOATS, SIGNED, UNSIGNED };

struct Residual {
  const void* data;  // [rows, n_out]
  Format format;
  const float* scale;   // one number, of codes
  const int32_t* zero;  // likewise, or none
};

// What the caller gives beside codes, and where results go.
struct Call {
  int32_t shift;  // added to zero-points, as to codes
  Spread<int32_t> x_zero;
  Spread<float> x_scale;
  const float* w_scale;  // [groups], or that for every channel
  int64_t w_step;
  int64_t groups;           // of neighbouring input channels that share a scale
  const int32_t* row_sums;  // [panels, groups, 16], of the weight
  const float* bias;        // none, or one a channel
  const float* apart;    // none, or [rows, n_apart]: channels that have no codes
  const float* w_apart;  // [n_out, n_apart]
  int64_t n_apart;
  int activation;
  Residual residual;
  bool residual_first;  // it is added before the activation function
  Spread<float> out_scale;
  Spread<int32_t> out_zero;
  int code_min, code_max;
  void* out;  // [rows, n_out], of
  int kind;   // this
  int64_t n_out;
  int64_t products;  // of neighbouring output channels, each with input channels of its own

  int64_t of_product() const { return n_out / products; }
  int64_t panels_of_product() const { return (of_product() + PANEL - 1) / PANEL; }
  int64_t panels() const { return products * panels_of_product(); }

  // Whether `finish_panel` is for it.
  bool is_plain() const { return groups == 1 && kind != WHOLE; }
};

// Store the first `n` of eight values that lie in `eight`. Not by masks: they are slow on AMD's
// processors, and so is copying a number of bytes that is not known.
template <typename T, typename Eight>
inline void store_first(int64_t n, const Eight& eight, T* to) {
  static_assert(sizeof(Eight) == 8 * sizeof(T));
  if (n == 8) std::memcpy(to, &eight, sizeof(Eight));
  else std::memcpy(to, &eight, n * sizeof(T));
}

inline __m256 load_first(int64_t n, const float* from) {
  if (n == 8) return _mm256_loadu_ps(from);
  __m256 eight = _mm256_setzero_ps();
  std::memcpy(&eight, from, n * sizeof(float));
  return eight;
}

inline __m128i load_first(int64_t n, const uint8_t* from) {
  int64_t eight = 0;
  if (n == 8) std::memcpy(&eight, from, sizeof(eight));
  else std::memcpy(&eight, from, n);
  return _mm_cvtsi64_si128(eight);
}

// Eight neighbours of what is added.
template <Format FORMAT>
class Values {
 public:
  explicit Values(const Residual& from)
      : data(static_cast<const uint8_t*>(from.data)),
        scale(FORMAT == SIGNED || FORMAT == UNSIGNED ? all(*from.scale) : _mm256_setzero_ps()),
        zero(_mm256_set1_epi32(from.zero == nullptr ? 0 : *from.zero)) {}

  __m256 first(int64_t n, int64_t at) const {
    if (FORMAT == FLOATS) return load_first(n, reinterpret_cast<const float*>(data) + at);
    const __m128i codes = load_first(n, data + at);
    const __m256i wide =
        FORMAT == SIGNED ? _mm256_cvtepi8_epi32(codes) : _mm256_cvtepu8_epi32(codes);
    return _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(wide, zero)), scale);
  }

 private:
  const uint8_t* const data;
  const __m256 scale;
  const __m256i zero;
};

// What the caller gives for each channel, panel by panel; zero beyond the last.
struct Channels {
  std::unique_ptr<float[]> w_scale;  // [panels, groups, 16]
  std::unique_ptr<float[]> w_apart;  // [panels, n_apart, 16]
  std::unique_ptr<float[]> bias, inverse, out_zero;  // [panels, 16]; 1 / out_scale
  explicit Channels(const Call& c) {
    const int64_t panels = c.panels();
    w_scale.reset(new float[panels * c.groups * PANEL]());
    w_apart.reset(new float[panels * c.n_apart * PANEL]());
    for (auto* values : {&bias, &inverse, &out_zero}) values->reset(new float[panels * PANEL]());
    // No panel has channels of two products.
    for (int64_t product = 0; product < c.products; ++product)
      for (int64_t i = 0; i < c.of_product(); ++i)
        set(c, product * c.of_product() + i, product * c.panels_of_product() * PANEL + i);
  }

 private:
  // Channel `n`, whose place in panels is `at`.
  void set(const Call& c, int64_t n, int64_t at) {
    const int64_t panel = at / PANEL, lane = at % PANEL;
    for (int64_t g = 0; g < c.groups; ++g)
      w_scale[(panel * c.groups + g) * PANEL + lane] = c.w_scale[n * c.w_step + g];
    for (int64_t j = 0; j < c.n_apart; ++j)
      w_apart[(panel * c.n_apart + j) * PANEL + lane] = c.w_apart[n * c.n_apart + j];
    if (c.bias != nullptr) bias[at] = c.bias[n];
    if (c.out_scale.data != nullptr)
      inverse[at] = 1.0f / c.out_scale.data[n * c.out_scale.channel_step];
    if (c.out_zero.data != nullptr) out_zero[at] = c.out_zero.data[n * c.out_zero.channel_step];
  }
};

// round(y * (1 / scale)) + zero_point, clamped.
inline __m256i rounded(const Call& call, __m256 y, __m256 inverse, __m256 zero) {
  y = _mm256_round_ps(_mm256_mul_ps(y, inverse), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return _mm256_cvtps_epi32(within(call.code_min, _mm256_add_ps(y, zero), call.code_max));
}

// Codes, eight and eight, as bytes.
inline __m128i bytes(const Call& call, __m256i low, __m256i high) {
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0b11011000);
  const __m128i first = _mm256_castsi256_si128(words);
  const __m128i second = _mm256_extracti128_si256(words, 1);
  return call.code_max > 127 ? _mm_packus_epi16(first, second) : _mm_packs_epi16(first, second);
}

// The epilogue for eight neighbouring output channels.
struct Epilogue {
  const Call& call;
  const int64_t first, there;  // the first, and how many there are
  const __m256 bias, inverse, out_zero;
  const float* const w_scale;      // [groups, 16]
  const float* const w_apart;      // [n_apart, 16]
  const int32_t* const row_sums;  // [groups, 16]
  // `begin` is the first channel of the panel, `end` follows the last of its product.
  Epilogue(const Call& c, const Channels& channels, int64_t panel, int half, int64_t begin,
           int64_t end)
      : call(c),
        first(begin + 8 * half),
        there(std::clamp<int64_t>(end - first, 0, 8)),
        bias(_mm256_loadu_ps(channels.bias.get() + panel * PANEL + 8 * half)),
        inverse(_mm256_loadu_ps(channels.inverse.get() + panel * PANEL + 8 * half)),
        out_zero(_mm256_loadu_ps(channels.out_zero.get() + panel * PANEL + 8 * half)),
        w_scale(channels.w_scale.get() + panel * c.groups * PANEL + 8 * half),
        w_apart(channels.w_apart.get() + panel * c.n_apart * PANEL + 8 * half),
        row_sums(c.row_sums + panel * c.groups * PANEL + 8 * half) {}

  __m256 scale(int64_t group) const { return _mm256_loadu_ps(w_scale + group * PANEL); }

  // The sums of `ROWS` rows and one group, less what their zero-points add to them.
  template <int ROWS>
  void centre(int64_t row, int64_t group, __m256i (&sums)[ROWS]) const {
    const Spread<int32_t>& zero = call.x_zero;
    const __m256i of_weight =
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row_sums + group * PANEL));
    const auto adds = [&](int64_t r) {
      const int32_t value = call.shift + (zero.data == nullptr ? 0 : zero.data[r * zero.row_step]);
      return _mm256_mullo_epi32(_mm256_set1_epi32(value), of_weight);
    };
    __m256i added = adds(row);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      if (r > 0 && zero.row_step) added = adds(row + r);
      sums[r] = _mm256_sub_epi32(sums[r], added);
    }
  }

  // Store whole numbers, the only ones or those of all groups.
  template <int ROWS>
  void store(int64_t row, const __m256i (&whole)[ROWS]) const {
    if (call.kind == WHOLE) {
      for (int r = 0; r < ROWS; ++r)
        store_first(there, whole[r], static_cast<int32_t*>(call.out) + (row + r) * call.n_out + first);
      return;
    }
    __m256 y[ROWS], step = _mm256_mul_ps(x_scale(row), scale(0));
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      if (r > 0 && call.x_scale.row_step) step = _mm256_mul_ps(x_scale(row + r), scale(0));
      y[r] = _mm256_mul_ps(_mm256_cvtepi32_ps(whole[r]), step);
    }
    finish(row, y);
  }

  // Finish and store values in real units, before the bias.
  template <int ROWS>
  void finish(int64_t row, __m256 (&y)[ROWS]) const {
    const int64_t at = row * call.n_out + first;
    if (call.bias != nullptr)
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) y[r] = _mm256_add_ps(y[r], bias);
    for (int64_t j = 0; j < call.n_apart; ++j)
      for (int r = 0; r < ROWS; ++r)
        y[r] = _mm256_fmadd_ps(all(call.apart[(row + r) * call.n_apart + j]),
                               _mm256_loadu_ps(w_apart + j * PANEL), y[r]);
    if (call.residual_first) add_residual(at, y);
    activate(y, call.activation);
    if (!call.residual_first) add_residual(at, y);
    if (call.kind == REAL) {
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r)
        store_first(there, y[r], static_cast<float*>(call.out) + at + r * call.n_out);
      return;
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
      store_first(there, quantized(row + r, y[r]),
                  static_cast<uint8_t*>(call.out) + at + r * call.n_out);
  }

  __m256 x_scale(int64_t row) const {
    return all(call.x_scale.data[row * call.x_scale.row_step]);
  }

 private:
  template <int ROWS>
  void add_residual(int64_t at, __m256 (&y)[ROWS]) const {
    switch (call.residual.format) {
      case NOTHING: return;
      case FLOATS: return add<FLOATS>(at, y);
      case SIGNED: return add<SIGNED>(at, y);
      case UNSIGNED: return add<UNSIGNED>(at, y);
    }
  }

  template <Format FORMAT, int ROWS>
  void add(int64_t at, __m256 (&y)[ROWS]) const {
    const Values<FORMAT> values(call.residual);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
      y[r] = _mm256_add_ps(y[r], values.first(there, at + r * call.n_out));
  }

  // Eight codes.
  int64_t quantized(int64_t row, __m256 y) const {
    const Spread<float>& scale = call.out_scale;
    const Spread<int32_t>& zero = call.out_zero;
    const __m256i codes =
        rounded(call, y, scale.row_step ? all(1.0f / scale.data[row]) : inverse,
                zero.row_step ? all(zero.data[row]) : out_zero);
    return _mm_cvtsi128_si64(bytes(call, codes, codes));
  }
};

// Sixteen neighbours; not inlined, as it is long.
__attribute__((noinline)) void activate_row(__m256 (&y)[2], int activation) {
  activate(y, activation);
}

// The epilogue of a whole panel, `call.is_plain()`. Row by row: what rows share is read once, and the
// codes of a row are written together.
template <Kind KIND, Format FORMAT, int ROWS>
void finish_panel(const Call& call, const Channels& channels, int64_t panel, int64_t begin,
                  int64_t row, const __m256i (&sums)[2][ROWS]) {
  const int64_t place = panel * PANEL;
  const Values<FORMAT> residual(call.residual);
  const Spread<int32_t>&x_zero = call.x_zero, &out_zero = call.out_zero;
  const Spread<float>&x_scale = call.x_scale, &out_scale = call.out_scale;
  __m256i of_weight[2], added[2];
  __m256 w_scale[2], step[2], bias[2], inverse[2], zero[2];
  for (int i = 0; i < 2; ++i) {
    const int64_t at = place + 8 * i;
    of_weight[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(call.row_sums + at));
    w_scale[i] = _mm256_loadu_ps(channels.w_scale.get() + at);
    bias[i] = _mm256_loadu_ps(channels.bias.get() + at);
    inverse[i] = _mm256_loadu_ps(channels.inverse.get() + at);
    zero[i] = _mm256_loadu_ps(channels.out_zero.get() + at);
  }
  for (int r = 0; r < ROWS; ++r) {
    const int64_t at = (row + r) * call.n_out + begin;
    if (r == 0 || x_zero.row_step) {
      const int32_t value = x_zero.data == nullptr ? 0 : x_zero.data[(row + r) * x_zero.row_step];
      for (int i = 0; i < 2; ++i)
        added[i] = _mm256_mullo_epi32(_mm256_set1_epi32(call.shift + value), of_weight[i]);
    }
    if (r == 0 || x_scale.row_step)
      for (int i = 0; i < 2; ++i)
        step[i] = _mm256_mul_ps(all(x_scale.data[(row + r) * x_scale.row_step]), w_scale[i]);
    __m256 y[2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      y[i] = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(sums[i][r], added[i])), step[i]);
      if (call.bias != nullptr) y[i] = _mm256_add_ps(y[i], bias[i]);
    }
    for (int64_t j = 0; j < call.n_apart; ++j) {
      const __m256 x = all(call.apart[(row + r) * call.n_apart + j]);
      const float* const w = channels.w_apart.get() + (panel * call.n_apart + j) * PANEL;
      for (int i = 0; i < 2; ++i) y[i] = _mm256_fmadd_ps(x, _mm256_loadu_ps(w + 8 * i), y[i]);
    }
    const auto add = [&] {
      for (int i = 0; i < 2; ++i) y[i] = _mm256_add_ps(y[i], residual.first(8, at + 8 * i));
    };
    if (FORMAT != NOTHING && call.residual_first) add();
    if (call.activation == RELU) each(y, [](__m256 one) { return _mm256_max_ps(all(0.0f), one); });
    else if (call.activation != NONE) activate_row(y, call.activation);
    if (FORMAT != NOTHING && !call.residual_first) add();
    if (KIND == REAL) {
      float* const to = static_cast<float*>(call.out) + at;
      for (int i = 0; i < 2; ++i) _mm256_storeu_ps(to + 8 * i, y[i]);
      continue;
    }
    __m256i codes[2];
    if (out_scale.row_step) inverse[0] = inverse[1] = all(1.0f / out_scale.data[row + r]);
    if (out_zero.row_step) zero[0] = zero[1] = all(out_zero.data[row + r]);
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) codes[i] = rounded(call, y[i], inverse[i], zero[i]);
    auto* const to = reinterpret_cast<__m128i*>(static_cast<uint8_t*>(call.out) + at);
    _mm_storeu_si128(to, bytes(call, codes[0], codes[1]));
  }
}

template <Kind KIND, int ROWS>
void finish_panel_with(const Call& call, const Channels& channels, int64_t panel, int64_t begin,
                       int64_t row, const __m256i (&sums)[2][ROWS]) {
  const auto finish = [&](auto function) { function(call, channels, panel, begin, row, sums); };
  switch (call.residual.format) {
    case NOTHING: return finish(finish_panel<KIND, NOTHING, ROWS>);
    case FLOATS: return finish(finish_panel<KIND, FLOATS, ROWS>);
    case SIGNED: return finish(finish_panel<KIND, SIGNED, ROWS>);
    case UNSIGNED: return finish(finish_panel<KIND, UNSIGNED, ROWS>);
  }
}

}  // namespace
