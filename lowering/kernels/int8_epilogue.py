"""What both kernels of int8_linear do to an accumulator, and the order in which they walk tiles.

    acc -= x_zero_point * w_sum                        int32, exact
    y    = act(acc * (x_scale * w_scale) + bias) + residual                     fp32
    out  = y, or clamp(rint(y * (1 / out_scale)) + out_zero_point)

Codes must not depend on how a kernel was compiled: the reciprocal is correctly rounded, and
products and sums are not contracted to FMA (`FP_FUSION`), because eager PyTorch does neither. The
error function is the one of libdevice: a shorter polynomial, which the compiler takes step by step
for all elements of a tile, spills.
"""

import triton
import triton.language as tl

ACTIVATION = {"none": 0, "gelu": 1, "gelu_tanh": 2, "silu": 3}
FP_FUSION = False


@triton.jit
def _tanh(x):
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def _activate(y, ACT: tl.constexpr):
    if ACT == 1:
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    elif ACT == 2:
        y = 0.5 * y * (1.0 + _tanh(0.7978845608028654 * (y + 0.044715 * y * y * y)))
    elif ACT == 3:
        y = y / (1.0 + tl.exp(-y))
    return y


@triton.jit
def _codes(y, low, high, zero):
    """Round half to even, add the zero-point, and return int8 codes between two of them."""
    # Bounds first: they are integers, so rounding does not move a value past them. Adding
    # 1.5 * 2^23 leaves no bits after the point, and the low byte of the sum's bits is the code.
    bounded = tl.minimum(tl.maximum(y, (low - zero).to(tl.float32)), (high - zero).to(tl.float32))
    return ((bounded + 12582912.0).to(tl.int32, bitcast=True) + zero).to(tl.int8)


@triton.jit
def tile_of(pid, M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """First row and column of a tile; a group of rows is walked column by column."""
    n_rows, n_cols = tl.cdiv(M, BM), tl.cdiv(N, BN)
    first = pid // (GROUP * n_cols) * GROUP
    height = min(n_rows - first, GROUP)
    inside = pid % (GROUP * n_cols)
    return (first + inside % height) * BM, inside // height * BN


@triton.jit
def finish(
    acc, row0, col0, x_scale_ptr, x_zero_ptr, w_scale_ptr, w_sum_ptr, bias_ptr, residual_ptr,
    out_scale_ptr, out_zero_ptr, M, N, quant_min, quant_max,
    PER_ROW_SCALE: tl.constexpr, PER_ROW_ZERO: tl.constexpr, HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_OUT_SCALE: tl.constexpr,
    PER_COLUMN_OUT: tl.constexpr, HAS_OUT_ZERO: tl.constexpr, ACT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Return a tile of the output of its accumulator: fp32, or int8 codes."""
    rows, cols = row0 + tl.arange(0, BM), col0 + tl.arange(0, BN)
    mask_m, mask_n = rows < M, cols < N
    if HAS_ZERO:
        w_sum = tl.load(w_sum_ptr + cols, mask=mask_n, other=0)
        if PER_ROW_ZERO:
            acc -= tl.load(x_zero_ptr + rows, mask=mask_m, other=0)[:, None] * w_sum[None, :]
        else:
            acc -= (tl.load(x_zero_ptr) * w_sum)[None, :]
    w_scale = tl.load(w_scale_ptr + cols, mask=mask_n, other=0.0)
    if PER_ROW_SCALE:
        x_scale = tl.load(x_scale_ptr + rows, mask=mask_m, other=0.0)
        y = acc.to(tl.float32) * (x_scale[:, None] * w_scale[None, :])
    else:
        y = acc.to(tl.float32) * (tl.load(x_scale_ptr) * w_scale)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + cols, mask=mask_n, other=0.0)[None, :]
    y = _activate(y, ACT)

    if HAS_RESIDUAL:
        base = row0.to(tl.int64) * N + col0
        offs = tl.arange(0, BM)[:, None] * N + tl.arange(0, BN)[None, :]
        mask = mask_m[:, None] & mask_n[None, :]
        y += tl.load(residual_ptr + base + offs, mask=mask, other=0.0).to(tl.float32)
    if HAS_OUT_SCALE:
        if PER_COLUMN_OUT:
            out_scale = tl.load(out_scale_ptr + cols, mask=mask_n, other=1.0)[None, :]
        else:
            out_scale = tl.load(out_scale_ptr)
        zero = tl.load(out_zero_ptr) if HAS_OUT_ZERO else tl.full((), 0, tl.int32)
        y = _codes(y * tl.div_rn(1.0, out_scale), quant_min, quant_max, zero)
    return y
