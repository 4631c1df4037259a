// Attention of few queries to a cache of int8 codes, for x86-64 with AVX2 and FMA
// (`fxq.lowering.cpu.native` builds it).
//
// Codes are converted in registers, once for up to four queries that share keys, so memory is asked
// for a quarter of what fp32 takes. Scales are by channel and enter elsewhere: those of keys with
// the query, those of values with the result. Only positions from the first to the last that any of
// these queries sees are multiplied. The code of what is not finite is looked for in all of them,
// as NaN times a weight of zero is NaN: in a key it spoils the results of all queries, in a value
// those of its channel.

#include "activation.h"

#include <algorithm>
#include <limits>
#include <memory>

namespace {

constexpr int64_t VECTOR = 8;       // channels at a time, which a head's size is a multiple of
constexpr int64_t MOST_QUERIES = 4;  // that share converted codes
constexpr int64_t BLOCK = 128;      // positions summed at a time: 8 KB of codes with 64 channels
constexpr int64_t WORK = 1 << 18;   // codes, some 20 microseconds, that several threads share
constexpr int8_t NOT_FINITE = -128;
constexpr float INFINITE = std::numeric_limits<float>::infinity();
constexpr float NAN_VALUE = std::numeric_limits<float>::quiet_NaN();

// Codes [length, width] of one head.
struct Codes {
  const int8_t* first;
  int64_t step, length, width;
  const int8_t* at(int64_t position) const { return first + position * step; }
};

// A row of the mask: bytes that are 0 where nothing is seen, or numbers to add; or neither.
struct Mask {
  const uint8_t* seen;
  const float* added;
  bool hides(int64_t i) const {
    return seen != nullptr ? seen[i] == 0 : added != nullptr && added[i] == -INFINITE;
  }
};

inline __m256 load(const int8_t* codes) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
}

// The sums of four vectors.
inline __m128 sums(__m256 a, __m256 b, __m256 c, __m256 d) {
  const __m256 all = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  return _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
}

// Whether a channel has the code of what is not finite, a byte for each: 0 or 255.
void look(const Codes& codes, uint8_t* bad) {
  const __m128i code = _mm_set1_epi8(NOT_FINITE);
  std::fill(bad, bad + codes.width, 0);
  int64_t d = 0;
  for (; d + 64 <= codes.width; d += 64) {
    __m256i found[2] = {};
    for (int64_t i = 0; i < codes.length; ++i)
      for (int v = 0; v < 2; ++v)
        found[v] = _mm256_or_si256(
            found[v],
            _mm256_cmpeq_epi8(
                _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes.at(i) + d + 32 * v)),
                _mm256_broadcastsi128_si256(code)));
    for (int v = 0; v < 2; ++v)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(bad + d + 32 * v), found[v]);
  }
  for (; d < codes.width; d += VECTOR) {
    __m128i found = _mm_setzero_si128();
    for (int64_t i = 0; i < codes.length; ++i)
      found = _mm_or_si128(
          found, _mm_cmpeq_epi8(
                     _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes.at(i) + d)), code));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(bad + d), found);
  }
}

// scores[r][i] = queries[r] . keys[i], for some positions from i on.
template <int ROWS, int KEYS>
inline void products(const Codes& keys, const float* queries, int64_t i, float* scores) {
  __m256 acc[ROWS][4];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
    for (int k = 0; k < 4; ++k) acc[r][k] = _mm256_setzero_ps();
  for (int64_t d = 0; d < keys.width; d += VECTOR) {
    __m256 key[KEYS];
#pragma GCC unroll 8
    for (int k = 0; k < KEYS; ++k) key[k] = load(keys.at(i + k) + d);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const __m256 query = _mm256_loadu_ps(queries + r * keys.width + d);
#pragma GCC unroll 8
      for (int k = 0; k < KEYS; ++k) acc[r][k] = _mm256_fmadd_ps(key[k], query, acc[r][k]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
    alignas(16) float found[4];
    _mm_store_ps(found, sums(acc[r][0], acc[r][1], acc[r][2], acc[r][3]));
    for (int k = 0; k < KEYS; ++k) scores[r * keys.length + i + k] = found[k];
  }
}

template <int ROWS>
void score(const Codes& keys, const float* queries, int64_t from, int64_t to, float* scores) {
  constexpr int KEYS = ROWS <= 2 ? 4 : 2;  // with 4 queries, 8 sums and 2 keys fill the registers
  int64_t i = from;
  for (; i + KEYS <= to; i += KEYS) products<ROWS, KEYS>(keys, queries, i, scores);
  for (; i < to; ++i) products<ROWS, 1>(keys, queries, i, scores);
}

// The weights of one query in the place of its scores, and their sum; 0 where it sees nothing.
float weigh(float* scores, const Mask& mask, int64_t from, int64_t to) {
  float most = -INFINITE;
  if (mask.seen != nullptr)
    for (int64_t i = from; i < to; ++i) scores[i] = mask.seen[i] ? scores[i] : -INFINITE;
  if (mask.added != nullptr)
    for (int64_t i = from; i < to; ++i) scores[i] += mask.added[i];
  for (int64_t i = from; i < to; ++i) most = std::max(most, scores[i]);
  bool none = most == -INFINITE;
  for (int64_t i = from; none && i < to; ++i) none = scores[i] == -INFINITE;  // NaN is not less
  if (none) {
    std::fill(scores + from, scores + to, 0.0f);
    return 0.0f;
  }
  double total = 0;
  for (int64_t i = from; i < to; i += BLOCK) {
    const int64_t end = std::min(i + BLOCK, to);
    int64_t k = i;
    __m256 sum = _mm256_setzero_ps();
    for (; k + VECTOR <= end; k += VECTOR) {  // what is hidden weighs 2^-126
      const __m256 e = exponential(_mm256_sub_ps(_mm256_loadu_ps(scores + k), all(most)));
      _mm256_storeu_ps(scores + k, e);
      sum = _mm256_add_ps(sum, e);
    }
    alignas(32) float lanes[VECTOR] = {};
    std::copy(scores + k, scores + end, lanes);
    _mm256_store_ps(lanes, exponential(_mm256_sub_ps(_mm256_load_ps(lanes), all(most))));
    std::copy(lanes, lanes + (end - k), scores + k);
    std::fill(lanes + (end - k), lanes + VECTOR, 0.0f);
    sum = _mm256_add_ps(sum, _mm256_load_ps(lanes));
    const __m128 halves = sums(sum, _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps());
    total += _mm_cvtss_f32(halves);
  }
  return static_cast<float>(total);
}

// out[r] += weights[r] . values over a block of positions, for some vectors of channels.
template <int ROWS, int VECTORS>
inline void mix(const Codes& values, const float* weights, int64_t from, int64_t to, int64_t d,
                float* out) {
  __m256 acc[ROWS][VECTORS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) acc[r][v] = _mm256_setzero_ps();
  for (int64_t i = from; i < to; ++i) {
    __m256 weight[ROWS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
      weight[r] = _mm256_broadcast_ss(weights + r * values.length + i);
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) {
      const __m256 value = load(values.at(i) + d + v * VECTOR);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) acc[r][v] = _mm256_fmadd_ps(value, weight[r], acc[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) {
      float* sum = out + r * values.width + d + v * VECTOR;
      _mm256_storeu_ps(sum, _mm256_add_ps(_mm256_loadu_ps(sum), acc[r][v]));
    }
}

template <int ROWS>
void mix_all(const Codes& values, const float* weights, int64_t from, int64_t to, float* out) {
  constexpr int VECTORS = ROWS == 1 ? 8 : ROWS == 2 ? 4 : 2;
  for (int64_t i = from; i < to; i += BLOCK) {
    const int64_t end = std::min(i + BLOCK, to);
    int64_t d = 0;
    for (; d + VECTORS * VECTOR <= values.width; d += VECTORS * VECTOR)
      mix<ROWS, VECTORS>(values, weights, i, end, d, out);
    for (; d < values.width; d += VECTOR) mix<ROWS, 1>(values, weights, i, end, d, out);
  }
}

// Some queries of a head and of those that share its keys; `queries` are scaled, `out` is zero.
template <int ROWS>
void attend(const Codes& keys, const Codes& values, const float* queries, const Mask* masks,
            float* scores, float* totals, float* out) {
  int64_t from = keys.length, to = 0;
  for (int r = 0; r < ROWS; ++r) {
    int64_t first = 0, last = keys.length;
    while (first < last && masks[r].hides(first)) ++first;
    while (first < last && masks[r].hides(last - 1)) --last;
    if (first < last) from = std::min(from, first), to = std::max(to, last);
  }
  from = std::min(from, to);
  score<ROWS>(keys, queries, from, to, scores);
  for (int r = 0; r < ROWS; ++r)
    totals[r] = weigh(scores + r * keys.length, masks[r], from, to);
  mix_all<ROWS>(values, scores, from, to, out);
}

}  // namespace

// Arguments as in `fxq.lowering.cpu.cache_attention`; last axes are contiguous.
//   shape    batch, heads, heads of keys, queries, positions, channels of keys, of values
//   steps    of query (batch, head, query), of keys and of values (batch, head, position), of the
//            mask (batch, head, query); in elements
extern "C" void fxq_cache_attention(const int64_t* shape, const int64_t* steps, const float* query,
                                    const int8_t* keys, const float* key_scale,
                                    const int8_t* values, const float* value_scale,
                                    const void* mask, int mask_is_float, float scale, float* out,
                                    int threads) {
  const int64_t batch = shape[0], heads = shape[1], shared = shape[2], n_queries = shape[3];
  const int64_t length = shape[4], width = shape[5], out_width = shape[6];
  const int64_t together = heads / shared, rows = together * n_queries;
  const int64_t parts = (rows + MOST_QUERIES - 1) / MOST_QUERIES, units = batch * shared * parts;
#pragma omp parallel num_threads(threads) if (units > 1 && units * length * (width + out_width) > WORK)
  {
    const std::unique_ptr<float[]> memory(
        new float[MOST_QUERIES * (length + width + out_width)]);
    const std::unique_ptr<uint8_t[]> bad(new uint8_t[std::max(width, out_width)]);
    float *const scores = memory.get(), *const scaled = scores + MOST_QUERIES * length;
    float* const mixed = scaled + MOST_QUERIES * width;
#pragma omp for schedule(static)
    for (int64_t unit = 0; unit < units; ++unit) {
      const int64_t b = unit / parts / shared, h = unit / parts % shared;
      const int64_t first = unit % parts * MOST_QUERIES, n = std::min(MOST_QUERIES, rows - first);
      const Codes k{keys + b * steps[3] + h * steps[4], steps[5], length, width};
      const Codes v{values + b * steps[6] + h * steps[7], steps[8], length, out_width};
      Mask masks[MOST_QUERIES] = {};
      float totals[MOST_QUERIES];
      float* results[MOST_QUERIES];
      for (int64_t r = 0; r < n; ++r) {
        const int64_t head = h * together + (first + r) / n_queries, t = (first + r) % n_queries;
        const float* from = query + b * steps[0] + head * steps[1] + t * steps[2];
        for (int64_t d = 0; d < width; ++d)
          scaled[r * width + d] = from[d] * scale * key_scale[h * width + d];
        const int64_t at = b * steps[9] + head * steps[10] + t * steps[11];
        if (mask != nullptr && mask_is_float)
          masks[r].added = static_cast<const float*>(mask) + at;
        else if (mask != nullptr)
          masks[r].seen = static_cast<const uint8_t*>(mask) + at;
        results[r] = out + ((b * heads + head) * n_queries + t) * out_width;
      }
      std::fill(mixed, mixed + n * out_width, 0.0f);
      look(k, bad.get());
      const bool spoilt = std::any_of(bad.get(), bad.get() + width, [](uint8_t x) { return x; });
      int64_t r = 0;
      const auto some = [&](auto attend_some, int64_t count) {
        attend_some(k, v, scaled + r * width, masks + r, scores, totals + r, mixed + r * out_width);
        r += count;
      };
      if (n == 4) some(attend<4>, 4);
      if (n - r >= 2) some(attend<2>, 2);
      if (n - r >= 1) some(attend<1>, 1);
      look(v, bad.get());
      for (r = 0; r < n; ++r)
        for (int64_t d = 0; d < out_width; ++d) {
          const float sum = mixed[r * out_width + d] * value_scale[h * out_width + d];
          const float mean = totals[r] == 0.0f ? 0.0f : sum / totals[r];
          results[r][d] = spoilt || bad[d] ? NAN_VALUE : mean;
        }
    }
  }
}
