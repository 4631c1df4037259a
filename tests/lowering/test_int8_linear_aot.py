"""Every configuration that `choose_config` can return, compiled for sm_90 without a GPU: tensor
cores, asynchronous copies, no spills."""

import pytest

pytest.importorskip("triton")
from shipped import LINEAR as PLAIN
from shipped import LINEAR_POINTERS as POINTERS
from shipped import linear as compiled
from sm90 import (
    COPY,
    LDGSTS,
    LOCAL,
    SHARED_BYTES,
    TMA,
    TMA_STORE,
    WARP_GROUP_PRODUCT,
)

from fxq.lowering.kernels.int8_linear import (
    ACTIVATION,
    CONFIGS,
    choose_config,
)

PER_TOKEN = {"PER_ROW_SCALE": True, "PER_ROW_ZERO": True, "HAS_ZERO": True}
REQUANTIZE = {"HAS_OUT_SCALE": True, "HAS_OUT_ZERO": True}
EPILOGUES = {
    "bias": {},
    "per token": PER_TOKEN,
    "per token, silu": PER_TOKEN | {"ACT": ACTIVATION["silu"]},
    "requantize": REQUANTIZE,
    "tanh gelu, requantize": {"ACT": ACTIVATION["gelu_tanh"]} | REQUANTIZE,
    "gelu, requantize per column": REQUANTIZE | {
        "ACT": ACTIVATION["gelu"], "PER_COLUMN_OUT": True,
    },
    "affine, gelu, requantize": {"HAS_ZERO": True, "ACT": ACTIVATION["gelu"]} | REQUANTIZE,
    "everything": PER_TOKEN | REQUANTIZE | {"HAS_RESIDUAL": True, "ACT": ACTIVATION["gelu"]},
}  # fmt: skip
LARGE = ("bias", "per token")  # epilogues that fit the registers beside the largest tile
INSTRUCTIONS = {  # of the whole kernel, the wider of the two Triton tested, and a tenth more
    "bias": 2_900, "per token": 3_700, "per token, silu": 4_700, "requantize": 3_150,
    "tanh gelu, requantize": 6_600, "gelu, requantize per column": 8_700,
    "affine, gelu, requantize": 7_900, "everything": 8_900,
}  # fmt: skip
SHAPES = {  # one per way of choosing
    "large": (4096, 4096, 4096),
    "medium": (197, 768, 768),
    "medium, masked K": (4096, 4096, 4160),
    "rows": (64, 32768, 768),
    "rows, masked K": (64, 32768, 784),
    "rows, narrow": (64, 4096, 4096),
    "rows, odd N": (4096, 1001, 768),
    "few": (16, 16384, 4096),
    "few, narrow": (16, 4096, 4096),
    "few, odd N": (16, 1001, 784),
    "odd K": (4096, 1001, 147),
}


STORED = [
    (epilogue, out)
    for epilogue, flags in EPILOGUES.items()
    for out in (("*i8",) if "HAS_OUT_SCALE" in flags else ("*bf16", "*fp32"))
]
# Each shape and each epilogue twice; `-m slow` has the others.
SHIPPED = [
    pytest.param(
        shape, epilogue, out, marks=[pytest.mark.slow] * ((i + j) % len(SHAPES) not in (0, 5))
    )
    for i, shape in enumerate(SHAPES)
    for j, (epilogue, out) in enumerate(STORED)
]


@pytest.mark.parametrize(
    ("epilogue", "out"),
    [pytest.param(*case, marks=[pytest.mark.slow] * (i % 2)) for i, case in enumerate(STORED)],
)
def test_on_hopper_some_warps_copy_while_others_multiply(epilogue: str, out: str) -> None:
    code = compiled((8192, 8192, 8192), PLAIN | EPILOGUES[epilogue], out, tma=True)
    loop = code.main_loop

    assert code.is_specialized
    assert code.num_warps == 12  # two groups that multiply, one that copies
    assert code.count(TMA) > 0
    assert code.count(LDGSTS) == 0
    assert code.count(TMA_STORE) > 0
    assert code.local_memory == 0
    assert code.shared_bytes <= SHARED_BYTES
    assert code.blocks_per_sm == 1
    assert loop.count(WARP_GROUP_PRODUCT) == (8 if epilogue in LARGE and out == "*bf16" else 4)
    assert len(loop.body) <= 80
    assert len(code.instructions) <= INSTRUCTIONS[epilogue]


def test_the_next_tile_is_copied_under_the_epilogue_of_this_one() -> None:
    code = compiled((8192, 8192, 8192), PLAIN, "*bf16", tma=True)

    # The warp that copies has a loop over tiles of its own, without products or stores in it; each
    # group that multiplies has one with its epilogue, without copies.
    copying = [loop for loop in code.loops if loop.count(TMA)]
    assert len(copying) == 2  # tiles, and rounds inside
    assert not any(loop.count(WARP_GROUP_PRODUCT) + loop.count(TMA_STORE) for loop in copying)
    stores = [loop for loop in code.loops if loop.count(TMA_STORE) == 1]
    groups = [loop for loop in stores if not any(loop.holds(other) for other in stores)]
    assert len(groups) == 2  # triton 3.6 has one more around the first, of what warps are told
    assert all(loop.count(WARP_GROUP_PRODUCT) and not loop.count(TMA) for loop in groups)


UNALIGNED = tuple(name for name in POINTERS if name not in ("x_ptr", "w_ptr", "residual_ptr"))


@pytest.mark.parametrize("epilogue", [pytest.param("bias", marks=pytest.mark.slow), "everything"])
def test_what_the_epilogue_reads_may_start_anywhere(epilogue: str) -> None:
    out = "*i8" if epilogue == "everything" else "*bf16"

    code = compiled(
        (8192, 8192, 8192), PLAIN | EPILOGUES[epilogue], out, tma=True, unaligned=UNALIGNED
    )

    assert code.is_specialized
    assert code.local_memory == 0


def test_operands_that_start_anywhere_compile_without_spills() -> None:
    code = compiled(SHAPES["large"], PLAIN, "*bf16", unaligned=("x_ptr", "w_ptr", "out_ptr"))

    assert code.local_memory == 0
    assert code.count(COPY) == 0


def test_tiles_of_a_round_decide_between_large_and_medium() -> None:
    large, medium = CONFIGS["tma, large"], CONFIGS["tma, medium"]

    assert choose_config(8192, 8192, 8192, light=True, tma=True) == large
    assert choose_config(8192, 8192, 8192, light=False, tma=True) == medium
    # 156 large tiles are two rounds, as long as four of the medium ones, whose 312 take three.
    assert choose_config(1576, 3072, 768, light=True, tma=True) == medium
    assert not choose_config(64, 4096, 4096, light=True, tma=True).tma


@pytest.mark.parametrize("rows", [1, 16, 17, 64])
def test_few_rows_keep_the_multiprocessors_busy(rows: int) -> None:
    narrow = choose_config(rows, 4096, 4096, light=True)

    programs = 4096 // narrow.bn
    assert rows <= narrow.bm
    assert programs >= 0.95 * 132
    # What is on its way from memory: as much as 4.3 TB/s fetch in the 0.7 us that it takes.
    assert programs * (narrow.num_stages - 1) * narrow.bn * narrow.bk >= 4.3e12 * 0.7e-6
    assert choose_config(rows, 32768, 4096, light=True).bn > narrow.bn


@pytest.mark.parametrize("shared", [65_536, 101_376, 166_912, SHARED_BYTES])
@pytest.mark.parametrize("shape", SHAPES)
def test_tiles_fit_the_shared_memory_that_there_is(shape: str, shared: int) -> None:
    tiles = choose_config(*SHAPES[shape], light=True, shared_bytes=shared)

    assert (tiles.bm + tiles.bn) * tiles.bk * tiles.num_stages <= shared


@pytest.mark.parametrize(("shape", "epilogue", "out"), SHIPPED)
def test_what_is_shipped_compiles_for_sm_90_without_spills(
    shape: str, epilogue: str, out: str
) -> None:
    code = compiled(SHAPES[shape], PLAIN | EPILOGUES[epilogue], out)

    assert not any(loop.count(LOCAL) for loop in code.loops)
    assert code.local_memory <= 2  # a register, once: all of the epilogue in a narrow tile
    # A warp group multiplies 64 rows at least: below that the older tensor-core instruction is
    # right.
    wide = code.count(WARP_GROUP_PRODUCT) > 0
    assert wide == (not shape.startswith("few"))
    if wide:
        assert "s32.s8.s8" in code.ptx
        assert len(code.main_loop.pending_products) == 1  # ptxas did not serialize them
    # cp.async moves 4 bytes at least, and rows of odd length are aligned to one.
    assert (code.count(COPY) > 0) == (shape != "odd K")


def test_codes_do_not_depend_on_how_the_kernel_is_compiled() -> None:
    code = compiled(SHAPES["medium"], PLAIN | EPILOGUES["requantize"], "*i8")

    assert "fma.rn.f32" not in code.ptx  # a product and a sum round twice, as in PyTorch
    assert "div.full.f32" not in code.ptx
    assert "rcp.rn.f32" in code.ptx or "div.rn.f32" in code.ptx


def test_two_bit_codes_compile() -> None:
    code = compiled(SHAPES["medium"], PLAIN | EPILOGUES["requantize"], "*i8", quant_max=1)

    assert code.local_memory == 0


def test_two_bit_codes_without_a_zero_point_compile() -> None:
    flags = PLAIN | {"HAS_OUT_SCALE": True}

    assert compiled(SHAPES["medium"], flags, "*i8", quant_max=1).local_memory == 0


def test_one_row_of_one_channel_compiles() -> None:
    code = compiled((1, 1, 1), PLAIN | PER_TOKEN, "*fp32", M=1, N=1, K=1)

    assert code.local_memory == 0


def test_shapes_reach_every_configuration() -> None:
    chosen = {choose_config(*shape, light=True) for shape in SHAPES.values()}
    chosen |= {choose_config(8192, 8192, 8192, light=light, tma=True) for light in (False, True)}

    assert chosen == set(CONFIGS.values())


@pytest.mark.slow
@pytest.mark.parametrize("tma", [False, True])
def test_a_heavy_epilogue_in_the_largest_tile_would_spill(tma: bool) -> None:
    flags = PLAIN | EPILOGUES["everything"]

    code = compiled(SHAPES["large"], flags, "*i8", tma=tma, light=True)

    assert code.local_memory > 0
