"""Every shipped configuration, compiled for sm_90 without a GPU: tensor cores, asynchronous copies,
no spills."""

import pytest

pytest.importorskip("triton")
from fxq.lowering.aot import AotReport, compile_for
from fxq.lowering.kernels.int8_linear import (
    ACTIVATION,
    CONFIGS,
    GROUP_M,
    int8_linear_kernel,
    is_light,
)

PLAIN = {
    "PER_ROW_SCALE": False, "PER_ROW_ZERO": False, "HAS_ZERO": False, "HAS_BIAS": True,
    "HAS_RESIDUAL": False, "HAS_OUT_SCALE": False, "HAS_OUT_ZERO": False, "ACT": 0,
}  # fmt: skip
EPILOGUES = {
    "bias": {},
    "per token": {"PER_ROW_SCALE": True},
    "tanh gelu, requantize": {"ACT": ACTIVATION["gelu_tanh"], "HAS_OUT_SCALE": True},
    "affine, gelu, requantize": {
        "HAS_ZERO": True, "ACT": ACTIVATION["gelu"], "HAS_OUT_SCALE": True, "HAS_OUT_ZERO": True,
    },
    "everything": {
        "PER_ROW_SCALE": True, "PER_ROW_ZERO": True, "HAS_ZERO": True, "HAS_RESIDUAL": True,
        "HAS_OUT_SCALE": True, "HAS_OUT_ZERO": True, "ACT": ACTIVATION["gelu"],
    },
}  # fmt: skip
POINTERS = {
    "x_ptr": "*i8", "w_ptr": "*i8", "x_scale_ptr": "*fp32", "x_zero_ptr": "*i32",
    "w_scale_ptr": "*fp32", "w_sum_ptr": "*i32", "bias_ptr": "*fp32", "residual_ptr": "*bf16",
    "out_scale_ptr": "*fp32", "out_zero_ptr": "*i32",
}  # fmt: skip
SIZES = ("M", "N", "K", "quant_min", "quant_max")


def compiled(config: str, flags: dict[str, object]) -> AotReport:
    tiles = CONFIGS[config]
    constants = flags | {
        "EVEN_K": True, "BM": tiles.bm, "BN": tiles.bn, "BK": tiles.bk, "GROUP": GROUP_M,
    }  # fmt: skip
    signature = dict.fromkeys(int8_linear_kernel.arg_names, "constexpr")
    signature |= POINTERS | dict.fromkeys(SIZES, "i32")
    signature["out_ptr"] = "*i8" if flags["HAS_OUT_SCALE"] else "*bf16"
    return compile_for(
        int8_linear_kernel,
        signature,
        constants,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        divisible_by_16=(*POINTERS, "out_ptr", "N", "K"),
    )


SHIPPED = [
    (config, epilogue)
    for config in CONFIGS
    for epilogue, flags in EPILOGUES.items()
    if config != "large" or is_light(PLAIN | flags)
]


@pytest.mark.parametrize(("config", "epilogue"), SHIPPED)
def test_every_configuration_compiles_for_sm_90_without_spills(config: str, epilogue: str) -> None:
    report = compiled(config, PLAIN | EPILOGUES[epilogue])

    assert report.spill_bytes == 0
    assert report.registers <= 255
    assert report.has_async_copy
    assert not report.serialized
    # A warp group multiplies 64 rows at least: below that the older tensor-core instruction is
    # right.
    assert report.has_wgmma == (CONFIGS[config].bm >= 64)
    if report.has_wgmma:
        assert "s32.s8.s8" in report.ptx


def test_a_heavy_epilogue_in_the_largest_tile_would_spill() -> None:
    report = compiled("large", PLAIN | EPILOGUES["everything"])

    assert report.spill_bytes > 0
