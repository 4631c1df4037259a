"""The throughput model: arithmetic on loops written by hand, and what shipped kernels reach."""

import pytest

pytest.importorskip("triton")
import shipped
import throughput
from test_sm90 import code

EXP, WAIT = "MUFU.EX2 R1, R1", "WARPGROUP.DEPBAR.LE gsb0, 0x0"
PRODUCT = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24, gsb0"


def test_softmax_beside_products_takes_no_time_of_its_own_and_after_them_does() -> None:
    # One program to a multiprocessor: 200 registers of 256 threads.
    beside = code(".L_x_1", PRODUCT, *[EXP] * 40, WAIT, "BRA `(.L_x_1)", "EXIT", registers=200)
    after = code(".L_x_1", PRODUCT, WAIT, *[EXP] * 40, "BRA `(.L_x_1)", "EXIT", registers=200)

    hidden, exposed = (throughput.attention(found, 128, 64, 128) for found in (beside, after))

    # 4 * 128 * 64 * 128 operations, 4096 a cycle; 40 exponentials of 2 warps, 8 cycles each.
    assert hidden.tensor == hidden.total == 1024
    assert exposed.total == 1024 + 640
    assert hidden.per_second == pytest.approx(4096 * 132 * 1.755e9)


def test_a_product_counts_rounds_of_tiles_and_what_they_draw_from_l2() -> None:
    found = code(".L_x_1", PRODUCT, WAIT, "BRA `(.L_x_1)", "EXIT", num_warps=4, registers=255)

    # 132 * 2 programs fit at once: 264 tiles take one round, 265 two.
    one, two = (
        throughput.int8_linear(found, (128 * rows, 128 * columns, 4096), (128, 128), 128)
        for rows, columns in ((12, 22), (5, 53))
    )

    assert one.tensor == 32 * (2 * 128**3 / 8192)
    # Copies, 1024 cycles a round of the loop, take longer than products and 3 instructions; then
    # the return, 1 instruction of 1 warp to a scheduler.
    assert one.total == 32 * 1024 + 1
    assert two.per_second / one.per_second == pytest.approx(265 / 264 / 2)


def test_a_product_of_one_row_takes_as_long_as_reading_its_weight() -> None:
    found = code(".L_x_1", PRODUCT, WAIT, "BRA `(.L_x_1)", "EXIT", num_warps=4, registers=64)

    expected = throughput.int8_linear(found, (1, 4096, 4096), (16, 32), 512)

    # 16 MiB of weight, 4 KiB of activations and 8 KiB of output at 4.3 TB/s; 2 operations a code.
    n_bytes = 4096 * 4096 + 4096 + 2 * 4096
    assert expected.per_second == pytest.approx(2 * 4096 * 4096 / (n_bytes / 4.3e12))


def test_shipped_kernels_should_reach_what_is_asked_of_them() -> None:
    size = (8192, 8192, 8192)
    product = shipped.linear(size, shipped.LINEAR, "*bf16", tma=True)
    heads = shipped.attention("paper", 128, 128, {})

    assert throughput.int8_linear(product, size, (128, 256), 128).per_second >= 1100e12
    assert throughput.attention(heads, 128, 64, 128).per_second >= 450e12
