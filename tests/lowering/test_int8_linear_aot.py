"""Every configuration that `choose_config` can return, compiled for sm_90 without a GPU: tensor
cores, asynchronous copies, no spills."""

import pytest

pytest.importorskip("triton")
from sm90 import COPY, WARP_GROUP_PRODUCT, Code, compile_for

from fxq.lowering.kernels.int8_linear import (
    ACTIVATION,
    CONFIGS,
    FP_FUSION,
    GROUP_M,
    choose_config,
    int8_linear_kernel,
    is_light,
)

PLAIN = {
    "PER_ROW_SCALE": False, "PER_ROW_ZERO": False, "HAS_ZERO": False, "HAS_BIAS": True,
    "HAS_RESIDUAL": False, "HAS_OUT_SCALE": False, "PER_COLUMN_OUT": False, "HAS_OUT_ZERO": False,
    "ACT": 0,
}  # fmt: skip
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
POINTERS = {
    "x_ptr": "*i8", "w_ptr": "*i8", "x_scale_ptr": "*fp32", "x_zero_ptr": "*i32",
    "w_scale_ptr": "*fp32", "w_sum_ptr": "*i32", "bias_ptr": "*fp32", "residual_ptr": "*bf16",
    "out_scale_ptr": "*fp32", "out_zero_ptr": "*i32",
}  # fmt: skip
SIZES = ("M", "N", "K", "quant_min", "quant_max")
SHAPES = {  # one per way of choosing
    "large": (4096, 4096, 4096),
    "medium": (197, 768, 768),
    "medium, masked K": (4096, 4096, 4160),
    "rows": (64, 768, 768),
    "rows, masked K": (64, 768, 784),
    "rows, odd N": (4096, 1001, 768),
    "few": (16, 4096, 4096),
    "few, odd N": (16, 1001, 784),
    "odd K": (4096, 1001, 147),
}


def compiled(
    shape: tuple[int, int, int], flags: dict[str, object], out: str, **fixed: int
) -> Code:
    """Compile what a launch of this shape would; Triton makes arguments equal to 1 `fixed`."""
    m, n, k = shape
    tiles = choose_config(m, n, k, light=is_light(flags))
    constants = flags | {
        "EVEN_K": k % tiles.bk == 0, "BM": tiles.bm, "BN": tiles.bn, "BK": tiles.bk,
        "GROUP": GROUP_M, **fixed,
    }  # fmt: skip
    signature = dict.fromkeys(int8_linear_kernel.arg_names, "constexpr")
    signature |= POINTERS | {size: "i32" for size in SIZES if size not in fixed}
    signature["out_ptr"] = out
    aligned = [name for name, size in (("N", n), ("K", k)) if size % 16 == 0]
    return compile_for(
        int8_linear_kernel,
        signature,
        constants,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        divisible_by_16=(*POINTERS, "out_ptr", *aligned),
        fp_fusion=FP_FUSION,
    )


SHIPPED = [
    (shape, epilogue, out)
    for shape in SHAPES
    for epilogue, flags in EPILOGUES.items()
    for out in (("*i8",) if "HAS_OUT_SCALE" in flags else ("*bf16", "*fp32"))
]


@pytest.mark.parametrize(("shape", "epilogue", "out"), SHIPPED)
def test_what_is_shipped_compiles_for_sm_90_without_spills(
    shape: str, epilogue: str, out: str
) -> None:
    code = compiled(SHAPES[shape], PLAIN | EPILOGUES[epilogue], out)

    assert code.local_memory == 0
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


def test_one_row_of_one_channel_compiles() -> None:
    code = compiled((1, 1, 1), PLAIN | PER_TOKEN, "*fp32", M=1, N=1, K=1)

    assert code.local_memory == 0


def test_shapes_reach_every_configuration() -> None:
    chosen = {choose_config(*shape, light=True) for shape in SHAPES.values()}

    assert chosen == set(CONFIGS.values())


def test_a_heavy_epilogue_in_the_largest_tile_would_spill(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.is_light", lambda flags: True)

    code = compiled(SHAPES["large"], PLAIN | EPILOGUES["everything"], "*i8")

    assert code.local_memory > 0
