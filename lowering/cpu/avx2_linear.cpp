// int8_linear on x86-64 with AVX2 (`fxq.lowering.cpu.avx2_linear`): the product of `product.h`, whose
// rows lie one after the other.

#include "product.h"

// `x` [rows, n_in], codes, signed where `shift` is 128 and unsigned where it is 0; `weight`, `places`
// and `matched` are those of `Weight`.
extern "C" void fxq_avx2_linear(
    const uint8_t* x, int64_t rows, int64_t n_in, int shift, const int32_t* x_zero,
    int64_t x_zero_step, const float* x_scale, int64_t x_scale_step, const int8_t* weight,
    const int32_t* places, const int32_t* matched, const int32_t* row_sums, const float* w_scale,
    int64_t w_step, int64_t groups,
    const float* bias, const float* apart, const float* w_apart, int64_t n_apart, int activation,
    const float* residual, const float* out_scale,
    int64_t out_scale_row_step, int64_t out_scale_channel_step, const int32_t* out_zero,
    int64_t out_zero_row_step, int64_t out_zero_channel_step, int code_min, int code_max,
    void* out, int kind, int64_t n_out, int threads) {
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
                  {residual, residual == nullptr ? NOTHING : FLOATS, nullptr, nullptr},
                  false,
                  {out_scale, out_scale_row_step, out_scale_channel_step},
                  {out_zero, out_zero_row_step, out_zero_channel_step},
                  code_min,
                  code_max,
                  out,
                  kind,
                  n_out,
                  1};
  const int64_t whole = 0;
  const Rows of{x, shift ? 0x80808080u : 0, rows, {1, 1, 1}, {n_in, 0, 0, 0}, 0, &whole, 1, n_in};
  multiply(call, of, {weight, places, matched}, threads);
}
