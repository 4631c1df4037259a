"""int8_linear on CUDA: s8 x s8 -> s32 on tensor cores, with the whole epilogue in registers.

    acc = x @ w.T - x_zero_point * w_sum               int32, exact
    y   = act(acc * (x_scale * w_scale) + bias) + residual                      fp32
    out = y, or clamp(rint(y * (1 / out_scale)) + out_zero_point)

x [M, K] and w [N, K] are int8 and both K-contiguous, as wgmma s8 needs; w_scale, w_sum and bias are
[N], residual and out [M, N]. x_scale and x_zero_point hold one entry, or one per row; out_scale one
or one per column. The accumulator is int32 until the scales are applied; everything after is fp32.
Programs are ordered in groups of rows, so that neighbours share tiles of w in L2.

Where there is a copy engine and the rows are whole multiples of 16 bytes, more than 64 rows are
multiplied by `int8_linear_tma_kernel`; the kernel here takes everything else, and the report says
why (`why_by_pointers`). With few rows all is reading the weight: tiles are as narrow as it takes
for 4096 channels to keep all multiprocessors reading. A product of 16 rows costs no more than one
of a single row, so that a vector has no kernel of its own. Sums are not split along K: that would
pay for fewer than 4000 channels, whose weight is read in a few microseconds.

Not measured yet on a GPU: what `choose_config` returns is proved from its sm_90 code
(tests/lowering/test_int8_linear_aot.py).
"""

import functools
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fxq.errors import FxqWarning
from fxq.lowering.kernels import buffers, hardware
from fxq.lowering.kernels.int8_epilogue import ACTIVATION, FP_FUSION, finish, tile_of
from fxq.lowering.kernels.int8_linear_tma import int8_linear_tma_kernel


class Config(NamedTuple):
    """Tile sizes and launch parameters.

    Args:
        bm, bn, bk: rows, columns and depth of a tile.
        num_warps: of a program; with `tma` of a group that multiplies.
        num_stages: tiles of both operands in shared memory.
        tma: `int8_linear_tma_kernel`.
    """

    bm: int
    bn: int
    bk: int
    num_warps: int
    num_stages: int
    tma: bool = False


CONFIGS = {
    "tma, large": Config(128, 256, 128, 4, 3, True),
    "tma, medium": Config(128, 128, 128, 4, 4, True),
    "large": Config(128, 256, 128, 8, 3),
    "medium": Config(128, 128, 128, 8, 3),
    "rows": Config(64, 128, 128, 4, 4),
    "rows, narrow": Config(64, 32, 256, 4, 4),
    "few": Config(16, 64, 256, 4, 4),
    "few, narrow": Config(16, 32, 512, 4, 4),
    "odd": Config(64, 64, 32, 4, 2),
}
GROUP_M = 8


class Case(NamedTuple):
    """A shape and epilogue that tests and benchmarks run.

    Args:
        m, n, k: sizes.
        per_row: a scale and zero-point per row instead of one.
        zero_point: activations are affine.
        bias: add one.
        activation: a key of `ACTIVATION`.
        residual: add one.
        requantize: return codes.
        per_column: requantize with a scale per column.
    """

    m: int
    n: int
    k: int
    per_row: bool = False
    zero_point: bool = False
    bias: bool = False
    activation: str = "none"
    residual: bool = False
    requantize: bool = False
    per_column: bool = False


CASES = (
    Case(1, 1, 1),
    Case(1, 63, 129, per_row=True, zero_point=True, bias=True),
    Case(63, 129, 63, zero_point=True, bias=True, activation="gelu"),
    Case(129, 64, 256, per_row=True, residual=True),
    Case(7, 80, 528, zero_point=True),
    Case(33, 48, 272, per_row=True, bias=True),
    Case(80, 64, 128, bias=True, activation="silu", residual=True, requantize=True),
    Case(
        17,
        65,
        100,
        per_row=True,
        zero_point=True,
        bias=True,
        activation="gelu_tanh",
        requantize=True,
    ),
    Case(130, 257, 384, zero_point=True, requantize=True),
    Case(65, 129, 64, bias=True, activation="gelu", requantize=True, per_column=True),
)


def choose_config(
    m: int,
    n: int,
    k: int,
    *,
    light: bool,
    aligned: bool = True,
    tma: bool = False,
    n_sms: int = 132,
    shared_bytes: int = 232_448,
) -> Config:
    """Return the tiles for `[m, k] x [k, n]`.

    Frozen, so that a program compiles to the same code every time.

    Args:
        m: rows of the activations.
        n: output channels.
        k: input channels.
        light: the epilogue fits the registers that a 128 x 256 accumulator leaves (`is_light`).
        aligned: both operands start at a multiple of 16 bytes.
        tma: `int8_linear_tma_kernel` takes the operands.
        n_sms: multiprocessors; as many as an H100 has.
        shared_bytes: what one program may have; as much as on an H100.
    """
    if tma and m > 64:
        large, medium = CONFIGS["tma, large"], CONFIGS["tma, medium"]
        # A round of large tiles takes as long as two of medium ones.
        rounds = [-(-_tiles(m, n, config) // n_sms) for config in (large, medium)]
        return large if light and 2 * rounds[0] <= rounds[1] else medium
    if k % 16 or not aligned:  # byte loads, whose addresses spill in larger tiles
        return CONFIGS["odd"]
    large, name = CONFIGS["large"], "medium"
    if m <= 16:
        name = "few" if _tiles(m, n, CONFIGS["few"]) >= n_sms else "few, narrow"
    elif n % 16:  # stores that are not aligned take registers as well
        name = "rows"
    elif m <= 64:
        name = "rows" if _tiles(m, n, CONFIGS["rows"]) >= n_sms else "rows, narrow"
    elif light and k % large.bk == 0 and _tiles(m, n, large) >= n_sms:
        name = "large" if _fitted(large, shared_bytes) == large else "medium"
    return _fitted(CONFIGS[name], shared_bytes)


def _fitted(config: Config, shared_bytes: int) -> Config:
    """Return a configuration with as many stages as shared memory holds."""
    stage = (config.bm + config.bn) * config.bk
    return config._replace(num_stages=max(1, min(config.num_stages, shared_bytes // stage)))


def _tiles(m: int, n: int, config: Config) -> int:
    return triton.cdiv(m, config.bm) * triton.cdiv(n, config.bn)


def is_light(flags: Mapping[str, Any], out_dtype: torch.dtype, *, tma: bool) -> bool:
    """Tell whether an epilogue compiles without spills in the largest tile, and fits beside it."""
    if tma and (flags["ACT"] or out_dtype == torch.float32):
        return False
    heavy = (ACTIVATION["gelu"], ACTIVATION["gelu_tanh"])
    return not (flags["HAS_RESIDUAL"] or flags["HAS_OUT_SCALE"] or flags["ACT"] in heavy)


@triton.jit
def _accumulate(
    x_ptr, w_ptr, row0, col0, M, N, K,
    EVEN_K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    # One 64-bit base per tile, 32-bit offsets inside: exact for any M and N, and few registers.
    # Rows beyond the end repeat the last one: they load real data and are masked when stored.
    offs_m = tl.minimum(tl.arange(0, BM), M - 1 - row0)
    offs_n = tl.minimum(tl.arange(0, BN), N - 1 - col0)
    offs_k = tl.arange(0, BK)
    x_ptrs = x_ptr + row0.to(tl.int64) * K + (offs_m[:, None] * K + offs_k[None, :])
    w_ptrs = w_ptr + col0.to(tl.int64) * K + (offs_n[None, :] * K + offs_k[:, None])
    acc = tl.zeros((BM, BN), dtype=tl.int32)
    for k in range(0, tl.cdiv(K, BK)):
        if EVEN_K:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs)
        else:
            left = K - k * BK
            x = tl.load(x_ptrs, mask=offs_k[None, :] < left, other=0)
            w = tl.load(w_ptrs, mask=offs_k[:, None] < left, other=0)
        acc = tl.dot(x, w, acc, out_dtype=tl.int32)
        x_ptrs += BK
        w_ptrs += BK
    return acc


@triton.jit
def int8_linear_kernel(
    x_ptr, w_ptr, out_ptr, x_scale_ptr, x_zero_ptr, w_scale_ptr, w_sum_ptr, bias_ptr, residual_ptr,
    out_scale_ptr, out_zero_ptr,
    M, N, K, quant_min, quant_max,
    PER_ROW_SCALE: tl.constexpr, PER_ROW_ZERO: tl.constexpr, HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_OUT_SCALE: tl.constexpr,
    PER_COLUMN_OUT: tl.constexpr, HAS_OUT_ZERO: tl.constexpr, ACT: tl.constexpr,
    EVEN_K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    row0, col0 = tile_of(tl.program_id(0), M, N, BM, BN, GROUP)
    acc = _accumulate(x_ptr, w_ptr, row0, col0, M, N, K, EVEN_K, BM, BN, BK)

    y = finish(
        acc, row0, col0, x_scale_ptr, x_zero_ptr, w_scale_ptr, w_sum_ptr, bias_ptr, residual_ptr,
        out_scale_ptr, out_zero_ptr, M, N, quant_min, quant_max,
        PER_ROW_SCALE, PER_ROW_ZERO, HAS_ZERO, HAS_BIAS, HAS_RESIDUAL, HAS_OUT_SCALE,
        PER_COLUMN_OUT, HAS_OUT_ZERO, ACT, BM, BN,
    )  # fmt: skip
    rows, cols = row0 + tl.arange(0, BM), col0 + tl.arange(0, BN)
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    base = row0.to(tl.int64) * N + col0
    offs = tl.arange(0, BM)[:, None] * N + tl.arange(0, BN)[None, :]
    tl.store(out_ptr + base + offs, y.to(out_ptr.dtype.element_ty), mask=mask)


def launch(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    weight: Tensor,
    w_scale: Tensor,
    w_sum: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    activation: str,
    residual: Tensor | None,
    out_scale: Tensor | None,
    out_zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    config: Config | None = None,
) -> Tensor:
    """Run the kernel. All tensors contiguous and on one device.

    Args:
        x: codes `[M, K]`, int8.
        x_scale: `[1]` or `[M]`, fp32.
        x_zero_point: `[1]` or `[M]`, int32.
        weight: codes `[N, K]`, int8.
        w_scale: `[N]`, fp32.
        w_sum: `[N]`, int32, sums of the weight's rows.
        bias: `[N]`, fp32.
        out_dtype: fp32, fp16 or bf16; ignored with `out_scale`.
        activation: a key of `ACTIVATION`.
        residual: `[M, N]`, any float dtype.
        out_scale: one element or `[N]`, fp32: return int8 codes.
        out_zero_point: one element, int32.
        quant_min: smallest code of the result.
        quant_max: largest code of the result.
        config: tiles; chosen by shape unless given.
    Returns:
        `[M, N]` in `out_dtype`, or int8 codes.
    """
    (m, k), n = x.shape, weight.shape[0]
    flags = epilogue_flags(
        x_scale, x_zero_point, bias, residual, out_scale, out_zero_point, activation
    )
    out = buffers.allocate((m, n), out_dtype if out_scale is None else torch.int8, x.device)
    if out.numel() == 0:
        return out
    tma = why_by_pointers(m, n, k, out.element_size(), x.device) is None
    # Byte loads of a residual would spill.
    described = [x, weight, out, *([] if residual is None else [residual])]
    if tma and not all(map(hardware.can_describe, described)):
        tma = False
        _warn_misaligned()
    n_sms, shared = hardware.multiprocessors(x.device), hardware.shared_bytes(x.device)
    light = is_light(flags, out.dtype, tma=tma)
    aligned = all(map(hardware.starts_aligned, (x, weight)))
    tiles = config or choose_config(
        m, n, k, light=light, aligned=aligned, tma=tma, n_sms=n_sms, shared_bytes=shared
    )
    args = (
        x, weight, out, x_scale, x_zero_point, w_scale, w_sum, bias, residual,
        out_scale, out_zero_point, m, n, k, quant_min, quant_max,
    )  # fmt: skip
    flags |= {"BM": tiles.bm, "BN": tiles.bn, "BK": tiles.bk, "GROUP": GROUP_M}
    options = {"num_stages": tiles.num_stages, "enable_fp_fusion": FP_FUSION}
    options["num_warps"] = tiles.num_warps
    n_tiles = _tiles(m, n, tiles)
    if tiles.tma and tma:
        grid = (min(n_tiles, n_sms),)
        hardware.with_scratch(lambda: int8_linear_tma_kernel[grid](*args, **flags, **options))
    else:
        int8_linear_kernel[(n_tiles,)](*args, **flags, EVEN_K=k % tiles.bk == 0, **options)
    return out


def why_by_pointers(m: int, n: int, k: int, out_bytes: int, device: torch.device) -> str | None:
    """Return why a product of aligned tensors is loaded by pointers, None where warps specialize.

    Args:
        m: rows of the activations.
        n: output channels.
        k: input channels.
        out_bytes: of an element of the result.
        device: to launch on.
    """
    if why := hardware.why_not_specialized(device):
        return why
    if m <= 64:
        return f"{m} rows: as fast as the weight is read"
    for what, row in (("input", k), ("output", n * out_bytes)):
        if row % hardware.ALIGNMENT:
            return f"rows of the {what} are no multiple of 16 bytes, found {row}"
    return None


@functools.cache
def _warn_misaligned() -> None:
    warnings.warn(
        "int8_linear: expected tensors that start at a multiple of 16 bytes, found one that does "
        "not; its product is loaded by pointers, which is slower: clone the view",
        FxqWarning,
        stacklevel=3,
    )


def epilogue_flags(
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    out_scale: Tensor | None,
    out_zero_point: Tensor | None,
    activation: str,
) -> dict[str, Any]:
    """Return the kernel's compile-time flags."""
    return {
        "PER_ROW_SCALE": x_scale.numel() > 1,
        "PER_ROW_ZERO": x_zero_point is not None and x_zero_point.numel() > 1,
        "HAS_ZERO": x_zero_point is not None,
        "HAS_BIAS": bias is not None,
        "HAS_RESIDUAL": residual is not None,
        "HAS_OUT_SCALE": out_scale is not None,
        "PER_COLUMN_OUT": out_scale is not None and out_scale.numel() > 1,
        "HAS_OUT_ZERO": out_zero_point is not None,
        "ACT": ACTIVATION[activation],
    }
