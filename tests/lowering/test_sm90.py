"""What is read from machine code, judged on snippets written by hand."""

import pytest

pytest.importorskip("triton")
from sm90 import EXPONENTIAL, LDGSTS, LOCAL, TMA, Code, read, registers_in


def assemble(*lines: str) -> str:
    """Return lines as `nvdisasm -c` prints them; those that begin with a dot are labels."""
    printed, address = [], 0
    for line in lines:
        if line.startswith("."):
            printed.append(f"{line}:")
        else:
            printed.append(f"        /*{address:04x}*/                   {line} ;")
            address += 16
    return "\n".join(printed)


def code(*lines: str, registers: int = 128, shared_bytes: int = 0, num_warps: int = 8) -> Code:
    """Return what is read from lines."""
    return Code("", *read(assemble(*lines)), registers, shared_bytes, num_warps)


PRODUCT = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24, gsb0"
SERIAL = (
    "LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64]",
    "LDGDEPBAR",
    ".L_x_1",
    "DEPBAR.LE SB0, 0x0",
    PRODUCT,
    "WARPGROUP.DEPBAR.LE gsb0, 0x0",
    "MUFU.EX2 R1, R1",
    "@P0 LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64], P1",
    "@P0 BRA `(.L_x_1)",
    "STG.E desc[UR4][R2.64], R1",
    "EXIT",
    ".L_x_9",
    "BRA `(.L_x_9)",
)


def test_a_loop_that_waits_for_everything_is_seen() -> None:
    found = code(*SERIAL)
    loop = found.main_loop

    assert loop.pending_products == (0,)
    assert loop.pending_copies == (0,)
    assert found.copies_ahead == 0
    assert loop.hidden(EXPONENTIAL) == 0
    assert loop.count(LDGSTS) == 1
    assert len(loop.body) == 6
    assert found.epilogue_instructions == 2


def test_the_same_loop_that_streams_is_seen() -> None:
    lines = [
        line.replace("SB0, 0x0", "SB0, 0x2").replace("gsb0, 0x0", "gsb0, 0x1") for line in SERIAL
    ]

    found = code(*lines)

    assert found.main_loop.pending_products == (1,)
    assert found.main_loop.pending_copies == (2,)
    assert found.copies_ahead == 2
    assert found.main_loop.hidden(EXPONENTIAL) == 1


@pytest.mark.parametrize(
    ("order", "hidden"),
    [
        ("product wait exp exp", 0),
        ("product exp wait exp", 1),
        ("exp product wait exp", 0),
        ("exp wait exp product", 1),  # a product runs on into the next round
    ],
)
def test_what_runs_beside_a_product_is_counted(order: str, hidden: int) -> None:
    words = {
        "product": PRODUCT, "wait": "WARPGROUP.DEPBAR.LE gsb0, 0x0", "exp": "MUFU.EX2 R1, R1",
    }  # fmt: skip

    found = code(".L_x_1", *(words[word] for word in order.split()), "@P0 BRA `(.L_x_1)", "EXIT")

    assert found.main_loop.hidden(EXPONENTIAL) == hidden


def test_copies_of_the_copy_engine_are_counted_from_the_last_wait_in_front_of_the_loop() -> None:
    copy, wait = "UTMALDG.2D [UR8], [UR4]", "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR1], R2"

    found = code(
        copy, wait, copy, copy, copy, copy, ".L_x_1", wait, PRODUCT, copy, copy,
        "@P0 BRA `(.L_x_1)", "EXIT",
    )  # fmt: skip

    assert found.count(TMA) == 7
    assert found.copies_ahead == 2


def test_the_main_loop_is_the_innermost_with_products() -> None:
    found = code(
        ".L_x_0", "NOP", ".L_x_1", "IADD3 R1, R1, 0x1, RZ", "@P1 BRA `(.L_x_1)", ".L_x_2",
        "IGMMA.64x128x32.S8.S8 R24, gdesc[UR4], R24, gsb0", "@!P0 BRA `(.L_x_2)", "STG.E [R2], R1",
        "@P2 BRA `(.L_x_0)", "EXIT",
    )  # fmt: skip

    assert len(found.loops) == 3
    assert [line.split(".")[0] for line in found.main_loop.body] == ["IGMMA", "BRA `("]


def test_a_wait_out_of_the_way_is_no_loop() -> None:
    found = code(
        ".L_x_1", PRODUCT, ".L_x_2", "NOP", "@P0 BRA `(.L_x_1)", "EXIT", ".L_x_3",
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR1], R2", "@!P0 BRA `(.L_x_3)", "BRA `(.L_x_2)",
    )  # fmt: skip

    assert [loop.first for loop in found.loops] == [0, 4]
    assert len(found.main_loop.body) == 3


def test_local_memory_is_counted_in_the_loop_and_in_all() -> None:
    found = code("STL [R1], R2", ".L_x_1", PRODUCT, "@P0 LDL R2, [R1]", "@P0 BRA `(.L_x_1)", "EXIT")

    assert found.local_memory == 2
    assert found.main_loop.count(LOCAL) == 1


@pytest.mark.parametrize("line", ["USETMAXREG.DEALLOC.CTAPOOL 0x18", "@P0 USETMAXREG.ALLOC 0xf0"])
def test_specialized_warps_are_seen(line: str) -> None:
    assert code(line, "EXIT").is_specialized
    assert not code("EXIT").is_specialized


@pytest.mark.parametrize(
    ("registers", "shared_bytes", "num_warps", "blocks"),
    [
        (128, 0, 8, 2),  # 65,536 registers / (128 x 256)
        (129, 0, 8, 1),  # 136 x 256 each, as registers are given out by eights
        (32, 0, 4, 16),  # 2,048 threads / 128
        (32, 115_712, 4, 2),  # 233,472 / (115,712 + 1,024)
        (32, 115_713, 4, 1),
        (255, 232_448, 8, 1),
    ],
)
def test_blocks_per_multiprocessor(
    registers: int, shared_bytes: int, num_warps: int, blocks: int
) -> None:
    found = code("EXIT", registers=registers, shared_bytes=shared_bytes, num_warps=num_warps)

    assert found.blocks_per_sm == blocks


def test_what_no_tool_printed_is_refused() -> None:
    with pytest.raises(ValueError, match="expected machine code"):
        read("nvdisasm fatal: unknown architecture")
    with pytest.raises(ValueError, match="expected REG"):
        registers_in("Function kernel: STACK:0")
    with pytest.raises(ValueError, match="expected a loop with products"):
        _ = code("EXIT").main_loop
    assert registers_in(" Function k:\n  REG:168 STACK:0 SHARED:1024 LOCAL:0") == 168
