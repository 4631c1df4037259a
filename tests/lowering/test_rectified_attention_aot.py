"""Every configuration of the attention kernels that can be launched, compiled for sm_90 without a
GPU: nothing spills, copies run on at every wait, softmax runs beside the tensor cores."""

import itertools
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from shipped import ATTENTION as PLAIN
from shipped import MODES, attention
from sm90 import (
    COPY,
    EXPONENTIAL,
    LDGSTS,
    LOCAL,
    PRODUCT,
    SHARED_BYTES,
    TMA,
    WARP_GROUP_PRODUCT,
    Code,
    compile_for,
)

from fxq.lowering.kernels.attend_blocks import Config, choose_config
from fxq.lowering.kernels.pool_blocks import WARPS as POOL_WARPS
from fxq.lowering.kernels.pool_blocks import pool_blocks_kernel
from fxq.lowering.kernels.rectified_attention import is_aligned
from fxq.lowering.kernels.select_blocks import MAX_BLOCKS, WARPS, select_blocks_kernel

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "text": {"HAS_TEXT_LEN": True, "TAIL": True},
    "curve": {"HAS_TEXT_LEN": True, "TAIL": True, "HAS_ORDER": True},
    "causal": {"CAUSAL": True, "TAIL": True},
    "padded": {"PADDED": True, "TAIL": True},
    "everything": {**dict.fromkeys(PLAIN, True), "HAS_ORDER": False},
    "padded, curve": {**dict.fromkeys(PLAIN, True), "CAUSAL": False},
}
# Of the main loop by head dim, and from the last loop to the end: measured, so that more is seen.
LOOP_INSTRUCTIONS = {16: 320, 32: 330, 64: 345, 128: 400}
EPILOGUE_INSTRUCTIONS = 480
# With the default block, per mode and head dim; `-m slow` has the others.
QUICK = {
    ("paper", 128): ("plain", "text", "everything", "padded, curve"),
    ("paper", 64): ("everything",),
    ("online", 128): ("plain", "everything"),
    ("online", 64): ("plain",),
    ("sparse", 128): ("plain", "everything"),
    ("sparse", 64): ("everything",),
}
SHIPPED = [
    pytest.param(
        mode,
        block,
        dim,
        variant,
        marks=() if block == 128 and variant in QUICK.get((mode, dim), ()) else pytest.mark.slow,
    )
    for mode in MODES
    for block in (64, 128)
    for dim in (16, 32, 64, 128)
    for variant in VARIANTS
    if dim >= 64 or variant in ("plain", "everything")
    # One mode more of the variants that touch neither the loop of pseudo-keys nor the epilogue
    # would say nothing new.
    if mode != "sparse" or variant in ("plain", "everything")
]


def compiled(mode: str, block: int, dim: int, variant: str, **options: Any) -> Code:
    """Compile what a launch of a variant would."""
    return attention(mode, block, dim, VARIANTS[variant], **options)


@pytest.mark.parametrize(("mode", "block", "dim", "variant"), SHIPPED)
def test_what_is_shipped_streams_on_sm_90(mode: str, block: int, dim: int, variant: str) -> None:
    code = compiled(mode, block, dim, variant)
    loop = code.main_loop

    assert code.local_memory == 0
    assert code.shared_bytes <= SHARED_BYTES
    assert code.blocks_per_sm >= 1
    assert loop.count(WARP_GROUP_PRODUCT) == loop.count(PRODUCT)
    assert loop.count(TMA) == 2  # the copy engine loads keys and values, threads load nothing
    assert loop.count(LDGSTS) == 0
    assert code.copies_ahead >= 2  # keys and values of the next round
    # One wait a round, and softmax runs beside the products that it waits for, or beside those of
    # another program.
    assert len(loop.pending_products) == 1
    hidden = loop.hidden(EXPONENTIAL) >= 0.7 * loop.count(EXPONENTIAL)
    assert hidden or code.blocks_per_sm >= 2
    assert len(loop.body) <= LOOP_INSTRUCTIONS[dim] * 1.1
    assert code.epilogue_instructions <= EPILOGUE_INSTRUCTIONS


@pytest.mark.parametrize(
    ("mode", "block", "dim", "variant"),
    [
        pytest.param("paper", 128, 128, "plain", marks=pytest.mark.slow),
        ("paper", 128, 128, "everything"),
        pytest.param("paper", 64, 128, "everything", marks=pytest.mark.slow),
        ("paper", 64, 64, "plain"),
        ("online", 128, 128, "everything"),
        pytest.param("sparse", 128, 64, "padded", marks=pytest.mark.slow),
    ],
)
def test_without_the_copy_engine_the_next_block_loads_under_the_products_of_this_one(
    mode: str, block: int, dim: int, variant: str
) -> None:
    code = compiled(mode, block, dim, variant, tma=False)

    assert code.local_memory == 0
    assert code.shared_bytes <= SHARED_BYTES
    assert code.count(TMA) == 0
    assert code.copies_ahead >= 2


LIMITS = (65_536 + 1024, 101_376, 166_912, SHARED_BYTES)
TIGHTEST = {  # shared memory, per choice the least that leads to it
    (block, dim, choose_config(block, dim, online=False, tma=tma, shared_bytes=limit)): limit
    for tma in (True, False)
    for dim in (64, 128)
    for block in (64, 128)
    for limit in reversed(LIMITS)
}


@pytest.mark.parametrize(
    ("block", "dim", "tiles", "shared"),
    [
        pytest.param(*chosen, limit, marks=() if chosen[1] == 128 else pytest.mark.slow)
        for chosen, limit in TIGHTEST.items()
    ],
)
def test_tiles_fit_the_shared_memory_that_there_is(
    block: int, dim: int, tiles: Config, shared: int
) -> None:
    code = compiled("paper", block, dim, "plain", tiles=tiles)

    assert code.shared_bytes <= shared


@pytest.mark.parametrize("mode", ["paper", "online"])
def test_float16_compiles_like_bfloat16(mode: str) -> None:
    code = compiled(mode, 128, 128, "text", dtype="fp16")

    assert code.local_memory == 0
    assert ".f16.f16" in code.ptx


@pytest.mark.parametrize("tma", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_four_warps_would_spill(tma: bool) -> None:
    code = compiled("paper", 128, 128, "text", tiles=Config(64, 4, 3, tma))

    assert code.local_memory > 0


def test_rows_that_are_not_aligned_would_spill_and_are_therefore_copied() -> None:
    code = compiled("paper", 128, 128, "padded", aligned=(), tma=False)

    assert code.local_memory > 0
    assert code.count(COPY) == 0
    x = torch.zeros(2, 3, 5, 80)
    assert is_aligned(x)
    assert is_aligned(x.transpose(1, 2))
    assert not is_aligned(torch.zeros(2, 3, 5, 72))
    assert not is_aligned(x[..., 1:65])
    assert not is_aligned(x.transpose(2, 3))
    assert not is_aligned(torch.zeros(2 * 3 * 5 * 80 + 1)[1:].view(x.shape))


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("order", [False, True])
def test_pooling_compiles_without_spills(order: bool, block: int, dim: int) -> None:
    signature = dict.fromkeys(pool_blocks_kernel.arg_names, "i32")
    signature |= {"x_ptr": "*bf16", "copied_ptr": "*bf16", "index_ptr": "*i64"}
    signature |= {"mean_ptr": "*fp32", "deviation_ptr": "*fp32"}
    constants = {
        "HAS_ORDER": order, "HAS_DEVIATION": True, "BLOCK": block, "ROWS": block, "BD": dim,
    }  # fmt: skip
    signature |= dict.fromkeys(constants, "constexpr")

    code = compile_for(
        pool_blocks_kernel,
        signature,
        constants,
        num_warps=POOL_WARPS,
        num_stages=1,
        divisible_by_16=("x_ptr", "copied_ptr", "stride_b", "stride_h", "stride_s", "D"),
    )

    assert code.local_memory == 0
    assert "ld.global.v4" in code.ptx or "ld.global.v2.b64" in code.ptx  # 16 bytes at a time


ONES = (
    ("GROUP", "H", "S", "T", "N"),
    ("N", "T", "text_start", "text_size"),
    ("N", "T", "visual_start", "text_size", "H"),
)


@pytest.mark.parametrize(
    ("mode", "variant", "ones"),
    [
        pytest.param(mode, variant, ones, marks=[pytest.mark.slow] * (i % 5 > 0))
        for i, (mode, variant, ones) in enumerate(
            itertools.product(("paper", "online"), ("text", "everything"), ONES)
        )
    ],
)
def test_sequences_of_a_token_or_two_compile(
    mode: str, variant: str, ones: tuple[str, ...]
) -> None:
    assert compiled(mode, 64, 64, variant, ones=ones).local_memory == 0


SELECTIONS = {
    "plain": {},
    "no text": {"HAS_TEXT": False},
    "causal, critical mass": {"CAUSAL": True, "CRITICAL": True, "HAS_ADJACENCY": False},
    "no gate, all": {"GATE": False, "CENTER": False, "ALL": True},
    "not centred": {"CENTER": False},
}


@pytest.mark.parametrize(
    ("n_blocks", "mode", "options"),
    [
        pytest.param(*case, marks=[pytest.mark.slow] * (i % 4 > 0))
        for i, case in enumerate(itertools.product((1, MAX_BLOCKS), (0, 1, 2), SELECTIONS))
    ],
)
def test_selection_compiles_without_spills_in_its_loops(
    n_blocks: int, mode: int, options: str
) -> None:
    signature = dict.fromkeys(select_blocks_kernel.arg_names, "*fp32")
    signature |= {"adjacency_ptr": "*i8", "count_ptr": "*i32", "list_ptr": "*i32"}
    signature |= {"N": "i32", "T": "i32", "scale": "fp32", "top_p": "fp32"}
    constants = {
        "HAS_TEXT": True, "HAS_ADJACENCY": True, "GATE": True, "CENTER": True, "CAUSAL": False,
        "MODE": mode, "CRITICAL": False, "ALL": False, "BLOCK": 128, "BN": n_blocks,
        **SELECTIONS[options],
    }  # fmt: skip
    if n_blocks == 1:
        constants["N"] = 1
    signature |= dict.fromkeys(constants, "constexpr")

    code = compile_for(select_blocks_kernel, signature, constants, num_warps=WARPS, num_stages=1)

    # ptxas moves three registers out of the way once, for the sake of a fourth program beside it.
    assert code.local_memory <= 6
    assert all(loop.count(LOCAL) == 0 for loop in code.loops)


@pytest.mark.parametrize("tma", [False, True])
def test_products_of_fp32_are_not_tf32(tma: bool) -> None:
    code = compiled("online", 64, 64, "text", dtype="fp32", tiles=Config(16, 4, 2, tma))

    assert "tf32" not in code.ptx
