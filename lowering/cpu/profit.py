"""When int8 pays on x86: rules read off `benchmarks/results/cpu_int8_linear_*.md`.

Frozen numbers instead of a timing at compile time: the same program must compile to the same graph
every time. A call costs about 80 microseconds before it multiplies anything. Large weights repay
that at any number of rows, because fp32 has to read four times the bytes; small ones need work.
"""

from typing import NamedTuple

from fxq.lowering.device import cpu_int8


class Thresholds(NamedTuple):
    """Where int8 overtakes fp32.

    Args:
        min_macs: multiply-adds that a product with a smaller weight needs.
        large_weight: elements of a weight that pays at any number of rows.
    """

    min_macs: int
    large_weight: int


WITH_VNNI = Thresholds(16 << 20, 1 << 17)  # up to 7.9 times faster than fp32
WITHOUT_VNNI = Thresholds(48 << 20, 1 << 21)  # up to 2.4 times
HUGE_WEIGHT = 1 << 24  # elements: pays with the sparse excess too
MAX_ROWS_EXCESS = 512  # beyond, the excess of a merely large weight costs more than int8 gains


def slower_than_float(n_rows: int, n_out: int, n_in: int, *, exact: bool) -> str | None:
    """Return why `[n_rows, n_in] @ [n_out, n_in].T` is not faster in int8 here, None where it is.

    Args:
        n_rows: rows of the activations.
        n_out: output channels.
        n_in: input channels.
        exact: the plain kernel is exact for this weight; otherwise the sparse excess is added.
    """
    weight = n_out * n_in
    shape = f"[{n_rows}, {n_in}] x [{n_in}, {n_out}]"
    if not exact:
        few_rows = n_rows <= MAX_ROWS_EXCESS
        if weight >= HUGE_WEIGHT or (weight >= WITHOUT_VNNI.large_weight and few_rows):
            return None
        return (
            f"{shape}: unsafe pairs on a CPU without VNNI, whose sparse excess costs more than "
            "int8 "
            "gains; QuantSpec(pair_safe=True) avoids them"
        )
    limits = WITHOUT_VNNI if cpu_int8().saturates else WITH_VNNI
    if weight < limits.large_weight and n_rows * weight < limits.min_macs:
        return f"{shape} is too small for int8 to pay"
    return None
