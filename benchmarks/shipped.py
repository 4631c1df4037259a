"""What a launch of the shipped kernels would compile for sm_90: for tests and expected figures."""

from typing import Any

import torch
from sm90 import SHARED_BYTES, Code, compile_for

from fxq.lowering.kernels import attend_blocks, int8_linear
from fxq.lowering.kernels.attend_blocks import attend_blocks_kernel
from fxq.lowering.kernels.int8_linear import FP_FUSION, GROUP_M, int8_linear_kernel, is_light
from fxq.lowering.kernels.int8_linear_tma import int8_linear_tma_kernel

LINEAR = {
    "PER_ROW_SCALE": False, "PER_ROW_ZERO": False, "HAS_ZERO": False, "HAS_BIAS": True,
    "HAS_RESIDUAL": False, "HAS_OUT_SCALE": False, "PER_COLUMN_OUT": False, "HAS_OUT_ZERO": False,
    "ACT": 0,
}  # fmt: skip
LINEAR_POINTERS = {
    "x_ptr": "*i8", "w_ptr": "*i8", "x_scale_ptr": "*fp32", "x_zero_ptr": "*i32",
    "w_scale_ptr": "*fp32", "w_sum_ptr": "*i32", "bias_ptr": "*fp32", "residual_ptr": "*bf16",
    "out_scale_ptr": "*fp32", "out_zero_ptr": "*i32",
}  # fmt: skip
LINEAR_SIZES = ("M", "N", "K", "quant_min", "quant_max")
DTYPES = {"*i8": torch.int8, "*bf16": torch.bfloat16, "*fp32": torch.float32}
STRIDES = tuple(f"{x}_{of}" for x in ("q", "k", "v", "out") for of in "bhs")
ATTENTION = {
    "HAS_TEXT_LEN": False, "HAS_ORDER": False, "CAUSAL": False, "TAIL": False, "PADDED": False,
}  # fmt: skip
ATTENTION_POINTERS = {
    "lse_ptr": "*fp32", "count_ptr": "*i32", "list_ptr": "*i32", "ratio_ptr": "*fp32",
    "correction_ptr": "*fp32", "bias_ptr": "*fp32", "text_len_ptr": "*i32", "index_ptr": "*i64",
}  # fmt: skip
ATTENTION_SIZES = (
    *STRIDES, "H", "GROUP", "S", "T", "N", "D", "DV", "visual_start", "text_start", "text_size",
)  # fmt: skip
MODES = {"paper": 0, "online": 1, "sparse": 2}


def linear_tiles(
    shape: tuple[int, int, int],
    flags: dict[str, Any],
    out: str,
    tma: bool = False,
    light: bool | None = None,
    unaligned: tuple[str, ...] = (),
) -> int8_linear.Config:
    """Return the tiles that a launch of int8_linear would choose; arguments: `linear`."""
    if light is None:
        light = is_light(flags, DTYPES[out], tma=tma)
    aligned = "x_ptr" not in unaligned
    return int8_linear.choose_config(*shape, light=light, tma=tma, aligned=aligned)


def linear(
    shape: tuple[int, int, int],
    flags: dict[str, Any],
    out: str,
    tma: bool = False,
    light: bool | None = None,
    unaligned: tuple[str, ...] = (),
    **fixed: int,
) -> Code:
    """Compile what a launch of int8_linear would.

    Args:
        shape: M, N and K.
        flags: of the epilogue, as `LINEAR` has them.
        out: Triton's type of the output, a key of `DTYPES`.
        tma: the copy engine takes the operands.
        light: as `is_light` says unless given.
        unaligned: pointers that start anywhere.
        fixed: sizes that are constants: Triton makes arguments equal to 1 so.
    """
    _, n, k = shape
    tiles = linear_tiles(shape, flags, out, tma, light, unaligned)
    kernel = int8_linear_tma_kernel if tiles.tma else int8_linear_kernel
    constants = flags | {
        "EVEN_K": k % tiles.bk == 0, "BM": tiles.bm, "BN": tiles.bn, "BK": tiles.bk,
        "GROUP": GROUP_M, **fixed,
    }  # fmt: skip
    signature = LINEAR_POINTERS | {size: "i32" for size in LINEAR_SIZES if size not in fixed}
    signature |= {"out_ptr": out}
    signature = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    aligned = [name for name, size in (("N", n), ("K", k)) if size % 16 == 0]
    return compile_for(
        kernel,
        signature,
        {name: value for name, value in constants.items() if name in signature},
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        divisible_by_16=tuple({*LINEAR_POINTERS, "out_ptr", *aligned} - {*unaligned}),
        fp_fusion=FP_FUSION,
    )


def attention_tiles(mode: str, block: int, dim: int, tma: bool = True) -> attend_blocks.Config:
    """Return the tiles of a launch of attend_blocks on sm_90."""
    return attend_blocks.choose_config(
        block, dim, online=mode == "online", tma=tma, shared_bytes=SHARED_BYTES
    )


def attention(
    mode: str,
    block: int,
    dim: int,
    flags: dict[str, Any],
    dtype: str = "bf16",
    tiles: attend_blocks.Config | None = None,
    aligned: tuple[str, ...] = (*STRIDES, "D", "DV"),
    ones: tuple[str, ...] = ("GROUP",),
    tma: bool = True,
) -> Code:
    """Compile what a launch of attend_blocks would.

    Args:
        mode: a key of `MODES`.
        block: visual tokens per block.
        dim: D, a power of two.
        flags: what differs from `ATTENTION`.
        dtype: of query, key, value and output.
        tiles: as chosen unless given.
        aligned: sizes that are multiples of 16.
        ones: sizes that are one, which Triton makes constants.
        tma: the copy engine loads keys and values.
    """
    tiles = tiles or attention_tiles(mode, block, dim, tma)
    constants = ATTENTION | flags | {
        "MODE": MODES[mode], "BLOCK": block, "BN": tiles.bn, "BD": dim, "TMA": tiles.tma,
        **dict.fromkeys(ones, 1),
    }  # fmt: skip
    signature = dict.fromkeys(attend_blocks_kernel.arg_names, "constexpr")
    signature |= ATTENTION_POINTERS | {n: "i32" for n in ATTENTION_SIZES if n not in ones}
    values = ("q_ptr", "k_ptr", "v_ptr", "out_ptr", "pooled_k_ptr", "pooled_v_ptr")
    signature |= {"scale": "fp32"} | dict.fromkeys(values, f"*{dtype}")
    if tiles.tma:
        described = f"tensordesc<{dtype}[1, 1, {tiles.bn}, {dim}]>"
        signature |= {"k_desc": described, "v_desc": described}
    else:
        constants |= {"k_desc": None, "v_desc": None}
    return compile_for(
        attend_blocks_kernel,
        signature,
        constants,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        divisible_by_16=(*ATTENTION_POINTERS, *values, *aligned),
    )
