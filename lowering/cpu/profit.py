"""When int8 pays on x86: rules read off `benchmarks/results/cpu_int8_linear_*.md`.

Frozen numbers instead of a timing at compile time: the same program must compile to the same graph
every time. A call costs about 80 microseconds before it multiplies anything. Large weights repay
that at any number of rows, because fp32 has to read four times the bytes; small ones need work.
"""

from fxq.lowering.device import cpu_int8

MIN_MACS = 1 << 23  # with VNNI
MIN_MACS_SATURATING = 48 << 20  # without: the kernel is at most 2.3 times faster than fp32
LARGE_WEIGHT = 1 << 21  # elements: pays at any number of rows
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
        if weight >= HUGE_WEIGHT or (weight >= LARGE_WEIGHT and n_rows <= MAX_ROWS_EXCESS):
            return None
        return (
            f"{shape}: unsafe pairs on a CPU without VNNI, whose sparse excess costs more than "
            "int8 "
            "gains; QuantSpec(pair_safe=True) avoids them"
        )
    enough = MIN_MACS_SATURATING if cpu_int8().saturates else MIN_MACS
    if weight < LARGE_WEIGHT and n_rows * weight < enough:
        return f"{shape} is too small for int8 to pay"
    return None
