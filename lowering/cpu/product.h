// The product of codes on x86-64 with AVX2, exact without VNNI, slab by slab of its rows.
//
// A panel is 16 output channels, two vectors; a step is 4 input channels, whose bytes lie together
// for each output channel, so that one broadcast of 4 activations meets 8 output channels. Input
// channels are padded with zero weights to a multiple of `RUN`, and activations are packed likewise:
// tiles of 6 rows, step by step. What is packed at a time, a slab, is half a megabyte a thread: rows
// of a convolution overlap, and all of them together are many times the image.
//
// `vpmaddubsw` multiplies unsigned with signed bytes and adds pairs of products in int16, where it
// saturates; `vpmaddwd` widens to int32, and both need the multiplier, which is what there is least
// of. With pair-safe weights a pair comes to at most 255 * 128 < 2^15. Signs differ, so that for most
// steps another can be found whose products can be added to theirs in int16, whatever the activations
// (`match_steps.cpp`): then three instructions of the multiplier do for four. Where |w| <= 8 products
// of eight steps come to 32640 < 2^15: nine do for sixteen.

#pragma once
#include "epilogue.h"


namespace {

constexpr int64_t STEP = 4;   // input channels of one instruction
constexpr int64_t STEPS = 8;  // whose sums int16 holds where |w| <= 8
constexpr int64_t RUN = STEP * STEPS;
constexpr int64_t TILE = 6;  // rows: times 2 vectors, 12 accumulators of 16 registers
constexpr int FEW = 3;       // rows: times 2 vectors, 6 accumulators, beside 4 vectors of weight
constexpr int64_t MOST_ROWS = 96;       // of one piece of work
constexpr int64_t WORK = 1 << 21;       // multiply-adds, 20 microseconds: of one, and worth sharing
constexpr int64_t CACHED = 1 << 18;     // bytes of weight of one piece of work
constexpr int64_t MUCH = 1 << 18;       // bytes of activations that several threads pack
constexpr int64_t SLAB = 1 << 19;       // bytes of packed activations for each thread
constexpr int64_t MOST_KEPT = 1 << 24;  // bytes that a thread keeps from call to call

// A sum in the order that is written. Compilers know that integers can be summed in any, and keep
// all terms of a run until its end, in memory.
inline __m256i in_order(__m256i sum) {
  asm("" : "+x"(sum));
  return sum;
}

// A weight in panels, for `groups` of neighbouring input channels each.
struct Weight {
  const int8_t* codes;     // [panels, groups, steps, 16, 4]
  const int32_t* places;   // [panels, groups, steps], bytes of a tile from its group's first step to
                           // that which each meets; or none, and |w| <= 8: they are in order
  const int32_t* matched;  // [panels, groups], how many of the first are added two by two: runs
};

inline __m256i load(const int8_t* codes) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
}

// The four activations of a row, eight times.
inline __m256i spread(const uint8_t* x) {
  int32_t four;
  std::memcpy(&four, x, STEP);
  return _mm256_set1_epi32(four);
}

inline __m256i widen(__m256i pairs) { return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }

// `sums` [2, ROWS] are those of a tile's rows, for the two vectors of a panel. What computes them has its
// own, and copies them when it is done: others would be written to memory at every step.
template <int ROWS>
inline void clear(__m256i (&sums)[2][ROWS]) {
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i)
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) sums[i][r] = in_order(_mm256_setzero_si256());
}

template <int ROWS>
inline void copy(const __m256i (&sums)[2][ROWS], __m256i (&to)[2][ROWS]) {
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i)
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) to[i][r] = sums[i][r];
}

// Two steps, whose products are added in int16, of the rows from `begin` to `end`.
template <int ROWS>
inline void add_two(const uint8_t* first, const uint8_t* second, const int8_t* weight, int begin,
                    int end, __m256i (&sums)[2][ROWS]) {
  const __m256i w[] = {load(weight), load(weight + 32), load(weight + 64), load(weight + 96)};
#pragma GCC unroll 8
  for (int r = begin; r < end; ++r) {
    const __m256i one = spread(first + r * STEP), other = spread(second + r * STEP);
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const __m256i pairs = _mm256_add_epi16(_mm256_maddubs_epi16(one, w[i]),
                                             _mm256_maddubs_epi16(other, w[2 + i]));
      sums[i][r] = in_order(_mm256_add_epi32(sums[i][r], widen(pairs)));
    }
  }
}

template <int ROWS>
inline void add_one(const uint8_t* x, const int8_t* weight, __m256i (&sums)[2][ROWS]) {
  const __m256i w[] = {load(weight), load(weight + 32)};
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
    const __m256i value = spread(x + r * STEP);
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i)
      sums[i][r] = in_order(
          _mm256_add_epi32(sums[i][r], widen(_mm256_maddubs_epi16(value, w[i]))));
  }
}

// The product of one group: `steps` from `x` on, with the codes from `weight` on. `steps` and
// `matched` are whole runs.
template <int ROWS>
inline void multiply_matched(const uint8_t* x, const int8_t* weight, const int32_t* places,
                             int64_t matched, int64_t steps, __m256i (&out)[2][ROWS]) {
  constexpr int64_t NEXT = PANEL * STEP;
  __m256i sums[2][ROWS];
  clear(sums);
  int64_t s = 0;
  for (; s < matched; s += STEPS, places += STEPS, weight += STEPS * NEXT)
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r += FEW)
#pragma GCC unroll 8
      for (int t = 0; t < STEPS; t += 2)
        add_two(x + places[t], x + places[t + 1], weight + t * NEXT, r, std::min(r + FEW, ROWS), sums);
  for (; s < steps; s += STEPS, places += STEPS, weight += STEPS * NEXT)
#pragma GCC unroll 8
    for (int t = 0; t < STEPS; ++t) add_one(x + places[t], weight + t * NEXT, sums);
  copy(sums, out);
}

// The same where |w| <= 8.
template <int ROWS>
inline void multiply_narrow(const uint8_t* x, const int8_t* weight, int64_t steps,
                            __m256i (&out)[2][ROWS]) {
  __m256i sums[2][ROWS];
  clear(sums);
  for (int64_t s = 0; s < steps; s += STEPS) {
    __m256i run[2][ROWS];
#pragma GCC unroll 8
    for (int t = 0; t < STEPS; ++t, x += TILE * STEP, weight += PANEL * STEP) {
      const __m256i w[] = {load(weight), load(weight + 32)};
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) {
        const __m256i value = spread(x + r * STEP);
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
          const __m256i pairs = _mm256_maddubs_epi16(value, w[i]);
          run[i][r] = t == 0 ? pairs : in_order(_mm256_add_epi16(run[i][r], pairs));
        }
      }
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i)
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) sums[i][r] = _mm256_add_epi32(sums[i][r], widen(run[i][r]));
  }
  copy(sums, out);
}

// Where the results of a panel go: its number, its first channel, and that after its product's last.
struct Place {
  const Call& call;
  const Channels& channels;
  int64_t panel, begin, end;
  bool plain;  // `finish_panel` is for it
  Epilogue half(int i) const { return {call, channels, panel, i, begin, end}; }
};

// What a tile of rows meets: a panel of a weight.
struct Panel {
  const Weight& weight;
  int64_t number, groups, steps;  // `steps` of each group

  template <int ROWS>
  void times(const uint8_t* x, int64_t group, __m256i (&sums)[2][ROWS]) const {
    const int64_t place = number * groups + group;
    const int8_t* codes = weight.codes + place * steps * PANEL * STEP;
    x += group * steps * TILE * STEP;
    if (weight.places == nullptr) return multiply_narrow(x, codes, steps, sums);
    multiply_matched(x, codes, weight.places + place * steps, weight.matched[place], steps, sums);
  }
};

// One tile with one panel, whose channels share a scale.
template <int ROWS>
void tile(const uint8_t* x, const Panel& panel, const Place& to, int64_t row) {
  __m256i sums[2][ROWS];
  panel.times(x, 0, sums);
  if constexpr (ROWS == TILE)
    if (to.plain) {
      const auto finish = to.call.kind == REAL ? finish_panel_with<REAL, ROWS>
                                               : finish_panel_with<CODES, ROWS>;
      return finish(to.call, to.channels, to.panel, to.begin, row, sums);
    }
  for (int i = 0; i < 2; ++i) {
    const Epilogue half = to.half(i);
    half.centre(row, 0, sums[i]);
    half.store(row, sums[i]);
  }
}

// The same with several groups of input channels, each with its scale.
template <int ROWS>
void tile_of_groups(const uint8_t* x, const Panel& panel, const Place& to, int64_t row) {
  const Call& call = to.call;
  const Epilogue halves[] = {to.half(0), to.half(1)};
  __m256i whole[2][ROWS] = {};
  __m256 scaled[2][ROWS] = {};
  for (int64_t g = 0; g < call.groups; ++g) {
    __m256i sums[2][ROWS];
    panel.times(x, g, sums);
    for (int i = 0; i < 2; ++i) {
      const __m256 scale = halves[i].scale(g);
      halves[i].centre(row, g, sums[i]);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) {
        whole[i][r] = _mm256_add_epi32(whole[i][r], sums[i][r]);
        scaled[i][r] =
            _mm256_add_ps(scaled[i][r], _mm256_mul_ps(_mm256_cvtepi32_ps(sums[i][r]), scale));
      }
    }
  }
  for (int i = 0; i < 2; ++i) {
    if (call.kind == WHOLE) {
      halves[i].store(row, whole[i]);
    } else {
      for (int r = 0; r < ROWS; ++r)
        scaled[i][r] = _mm256_mul_ps(scaled[i][r], halves[i].x_scale(row + r));
      halves[i].finish(row, scaled[i]);
    }
  }
}

// One tile of packed activations, of `rows` of 6 at most, with one panel.
template <int ROWS>
void meet(int64_t rows, const uint8_t* x, const Panel& panel, const Place& to, int64_t row) {
  if constexpr (ROWS > 1)
    if (rows < ROWS) return meet<ROWS - 1>(rows, x, panel, to, row);
  if (to.call.groups == 1) tile<ROWS>(x, panel, to, row);
  else tile_of_groups<ROWS>(x, panel, to, row);
}

// Rows of codes in memory. Those of a product lie at the corners of a grid with axes for batch and
// up to three of space; each is gathered from runs of neighbouring bytes, which for a linear is one.
struct Rows {
  const uint8_t* x;
  uint32_t flip;            // makes int8 codes unsigned
  int64_t count;            // of all
  int64_t size[3];          // of the axes of space
  int64_t step[4];          // bytes from one to the next along batch and those axes
  int64_t product_step;     // from a product's input channels to those of the next
  const int64_t* runs;      // [n_runs], bytes from the first run of a row to each
  int64_t n_runs, length;   // of each run
  int64_t width() const { return n_runs * length; }
  int64_t padded() const { return (width() + RUN - 1) / RUN * RUN; }

  const uint8_t* at(int64_t row) const {
    const uint8_t* place = x;
    for (int axis = 2; axis >= 0; row /= size[axis], --axis)
      if (size[axis] > 1) place += row % size[axis] * step[axis + 1];
    return place + row * step[0];
  }
};

// Copy `n` bytes, few as a rule.
inline void copy(const uint8_t* from, int64_t n, uint8_t* to) {
  if (n > 128) {
    std::memcpy(to, from, n);
  } else if (n >= 16) {
    for (int64_t i = 0; i < n - 16; i += 16) std::memcpy(to + i, from + i, 16);
    std::memcpy(to + n - 16, from + n - 16, 16);
  } else if (n >= 4) {
    for (int64_t i = 0; i < n - 4; i += 4) std::memcpy(to + i, from + i, 4);
    std::memcpy(to + n - 4, from + n - 4, 4);
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = from[i];
  }
}

// Four steps of a tile's rows, `padded` bytes apart: `to` gets each step of all rows together.
inline void turn(const uint8_t* from, int64_t padded, __m128i flip, uint8_t* to) {
  __m128i rows[TILE];
#pragma GCC unroll 6
  for (int r = 0; r < TILE; ++r)
    rows[r] = _mm_xor_si128(
        flip, _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + r * padded)));
  const __m128i a = _mm_unpacklo_epi32(rows[0], rows[1]), b = _mm_unpackhi_epi32(rows[0], rows[1]);
  const __m128i c = _mm_unpacklo_epi32(rows[2], rows[3]), d = _mm_unpackhi_epi32(rows[2], rows[3]);
  const __m128i e = _mm_unpacklo_epi32(rows[4], rows[5]), f = _mm_unpackhi_epi32(rows[4], rows[5]);
  // Steps 0 and 1 of two rows each are in a, c and e; 2 and 3 in b, d and f.
  const __m128i packed[] = {_mm_unpacklo_epi64(a, c), _mm_unpacklo_epi64(e, _mm_srli_si128(a, 8)),
                            _mm_unpackhi_epi64(c, e), _mm_unpacklo_epi64(b, d),
                            _mm_unpacklo_epi64(f, _mm_srli_si128(b, 8)),
                            _mm_unpackhi_epi64(d, f)};
  std::memcpy(to, packed, sizeof(packed));
}

// The tile from `row` on of one product; what is beyond its rows and runs meets no weight but zeros.
void pack(const Rows& rows, int64_t product, int64_t row, uint8_t* scratch, uint8_t* packed) {
  const int64_t padded = rows.padded();
  for (int64_t r = 0; r < std::min(TILE, rows.count - row); ++r) {
    const uint8_t* place = rows.at(row + r) + product * rows.product_step;
    uint8_t* to = scratch + r * padded;
    for (int64_t j = 0; j < rows.n_runs; ++j, to += rows.length)
      copy(place + rows.runs[j], rows.length, to);
  }
  const __m128i flip = _mm_set1_epi32(static_cast<int32_t>(rows.flip));
  for (int64_t k = 0; k < padded; k += 4 * STEP)
    turn(scratch + k, padded, flip, packed + k * TILE);
}

// The products of a slab of `count` packed rows, from `first` on, with all panels. Panels that the
// second-level cache holds meet a tile of rows, one by one, then the next tile: what is written lies
// together.
void multiply_slab(const Call& call, const Channels& channels, const Weight& weight, int64_t padded,
                   const uint8_t* packed, int64_t first, int64_t count, int threads) {
  const int64_t panels = call.panels(), panel_bytes = PANEL * padded;
  const int64_t most = std::max<int64_t>(1, CACHED / panel_bytes);
  const int64_t blocks = (panels + most - 1) / most, block = (panels + blocks - 1) / blocks;
  // A piece of work is some tiles with a block of panels: small, so that threads end together.
  const int64_t tiles = std::clamp<int64_t>(WORK / (block * panel_bytes) / TILE, 1, MOST_ROWS / TILE);
  const int64_t piece = tiles * TILE;
  const int64_t wide = call.of_product(), per = call.panels_of_product();
  const bool plain = call.is_plain();
#pragma omp parallel for num_threads(threads) collapse(2) \
    schedule(dynamic, 1) if (count * panels * panel_bytes > WORK)
  for (int64_t b = 0; b < blocks; ++b)
    for (int64_t begun = 0; begun < count; begun += piece)
      for (int64_t row = begun; row < std::min(begun + piece, count); row += TILE)
        for (int64_t p = b * block; p < std::min((b + 1) * block, panels); ++p) {
          const int64_t product = call.products == 1 ? 0 : p / per;
          const int64_t begin = product * wide + (p - product * per) * PANEL;
          const int64_t end = (product + 1) * wide;
          meet<TILE>(count - row, packed + (row * call.products + product * TILE) * padded,
                     {weight, p, call.groups, padded / STEP / call.groups},
                     {call, channels, p, begin, end, plain && end - begin >= PANEL}, first + row);
        }
}

// Memory for what a call packs, or copies, kept by the thread that calls unless it is much: fresh
// memory of this size comes from the system page by page, at every call, which can take as long as a
// small product.
enum Use { PACKED, IMAGE };

template <Use>
class Workspace {
 public:
  explicit Workspace(int64_t bytes) {
    static thread_local std::unique_ptr<uint8_t[]> kept;
    static thread_local int64_t size = 0;
    if (bytes > MOST_KEPT) {
      once.reset(new uint8_t[bytes]);
    } else if (bytes > size) {
      kept.reset(new uint8_t[bytes]);
      size = bytes;
    }
    data = once ? once.get() : kept.get();
  }
  uint8_t* data;

 private:
  std::unique_ptr<uint8_t[]> once;
};

// All of a call.
void multiply(const Call& call, const Rows& rows, const Weight& weight, int threads) {
  const int64_t padded = rows.padded(), row_bytes = padded * call.products;
  const int64_t most = std::max<int64_t>(1, threads * SLAB / (row_bytes * MOST_ROWS)) * MOST_ROWS;
  const Channels channels(call);
  if (!rows.count) return;
  const int64_t slabs = (rows.count + most - 1) / most;  // of the same size, in whole tiles
  const int64_t slab = ((rows.count + slabs - 1) / slabs + TILE - 1) / TILE * TILE;
  const Workspace<PACKED> workspace(slab * row_bytes);
  uint8_t* const packed = workspace.data;
  for (int64_t first = 0; first < rows.count; first += slab) {
    const int64_t count = std::min(slab, rows.count - first), tiles = (count + TILE - 1) / TILE;
#pragma omp parallel num_threads(threads) if (count * row_bytes > MUCH)
    {
      const std::unique_ptr<uint8_t[]> scratch(new uint8_t[TILE * padded]());
#pragma omp for schedule(static)
      for (int64_t i = 0; i < tiles * call.products; ++i)
        pack(rows, i % call.products, first + i / call.products * TILE, scratch.get(),
             packed + i * TILE * padded);
    }
    multiply_slab(call, channels, weight, padded, packed, first, count, threads);
  }
}

}  // namespace
