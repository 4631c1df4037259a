// int8_conv on x86-64 with AVX2 (`fxq.lowering.cpu.avx2_conv`): the product of `product.h`, whose rows
// are positions of the output, gathered from an image with channels last.

#include "product.h"

namespace {

// Where everything lies, in the order of the fields of `avx2_conv.window`. Axes of space are three.
struct Window {
  int64_t rows, size[3], step[4], product_step, n_runs, length;  // those of `Rows`
  int64_t copied;  // the image is a copy of `x` with padding, else `x` itself
  int64_t batch, inner[3], before[3], outer[3];  // sizes without padding, padding, sizes with it
  int64_t groups, channels, wide;  // channels of a group, and bytes that they have in the copy
  int64_t x_step[5];               // bytes of x from one to the next: batch, channel, space
  int64_t line() const { return outer[2] * groups * wide; }       // bytes along the last axis,
  int64_t lines() const { return batch * outer[0] * outer[1]; }  // of the copy
};

// One line along the last axis, without its padding.
void copy_line(const Window& w, const uint8_t* x, uint8_t* to) {
  const int64_t width = w.inner[2], channel = w.x_step[1], position = w.x_step[4];
  const int64_t n_channels = w.groups * w.channels, bytes = w.groups * w.wide;
  if (channel == 1 && w.channels == w.wide && position == n_channels)
    return static_cast<void>(std::memcpy(to, x, width * bytes));
  for (int64_t g = 0; g < w.groups; ++g)
    for (int64_t c = 0; c < w.channels; ++c) {
      const uint8_t* from = x + (g * w.channels + c) * channel;
      for (int64_t i = 0; i < width; ++i) to[i * bytes + g * w.wide + c] = from[i * position];
    }
}

// The image with `zero` around it and between its groups' channels.
void copy_image(const Window& w, const uint8_t* x, uint8_t zero, int threads, uint8_t* image) {
  const int64_t bytes = w.groups * w.wide, line = w.line(), lines = w.lines();
#pragma omp parallel for num_threads(threads) schedule(static) if (lines * line > MUCH)
  for (int64_t i = 0; i < lines; ++i) {
    std::memset(image + i * line, zero, line);
    const int64_t y = i % w.outer[1] - w.before[1];
    const int64_t z = i / w.outer[1] % w.outer[0] - w.before[0], b = i / w.outer[1] / w.outer[0];
    if (y >= 0 && y < w.inner[1] && z >= 0 && z < w.inner[0])
      copy_line(w, x + b * w.x_step[0] + z * w.x_step[2] + y * w.x_step[3],
                image + i * line + w.before[2] * bytes);
  }
}

}  // namespace

// `x`, codes, signed where `shift` is 128; `runs` [n_runs] bytes from a row's first to each run;
// `x_zero` and `x_scale` are one number; `weight`, `places` and `matched` are those of `Weight`.
extern "C" void fxq_avx2_conv(
    const uint8_t* x, const void* window, const int64_t* runs, int shift, const int32_t* x_zero,
    const float* x_scale, const int8_t* weight, const int32_t* places, const int32_t* matched,
    const int32_t* row_sums, const float* w_scale, int64_t w_step, const float* bias,
    int activation, const void* residual, int residual_format, const float* residual_scale,
    const int32_t* residual_zero,
    const float* out_scale, int64_t out_scale_step, const int32_t* out_zero, int64_t out_zero_step,
    int code_min, int code_max, void* out, int kind, int64_t n_out, int64_t products,
    int threads) {
  const Call call{shift,
                  {x_zero, 0, 0},
                  {x_scale, 0, 0},
                  w_scale,
                  w_step,
                  1,
                  row_sums,
                  bias,
                  nullptr,
                  nullptr,
                  0,
                  activation,
                  {residual, static_cast<Format>(residual_format), residual_scale, residual_zero},
                  true,
                  {out_scale, 0, out_scale_step},
                  {out_zero, 0, out_zero_step},
                  code_min,
                  code_max,
                  out,
                  kind,
                  n_out,
                  products};
  const Window& w = *static_cast<const Window*>(window);
  const Workspace<IMAGE> image(w.copied ? w.lines() * w.line() : 0);
  if (w.copied) {
    const uint8_t zero = x_zero == nullptr ? 0 : static_cast<uint8_t>(*x_zero);
    copy_image(w, x, zero, threads, image.data);
    x = image.data;
  }
  const Rows rows{x,
                  shift ? 0x80808080u : 0,
                  w.rows,
                  {w.size[0], w.size[1], w.size[2]},
                  {w.step[0], w.step[1], w.step[2], w.step[3]},
                  w.product_step,
                  runs,
                  w.n_runs,
                  w.length};
  multiply(call, rows, {weight, places, matched}, threads);
}
