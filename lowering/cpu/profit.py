"""When int8 pays on x86: rules read off `benchmarks/results`, so that compiling never makes a layer
slower in silence.

Frozen numbers instead of a timing at compile time: the same program must compile to the same graph
every time.
"""

from fxq.lowering.device import cpu_int8

MIN_MACS = 1 << 21  # a smaller product is dominated by the call's own overhead
MIN_ROWS_SATURATING = 4  # vpmaddubsw kernels do not beat fp32 on matrix-vector products
MIN_ROWS_EXCESS = 64  # the sparse excess costs about as much as the product itself


def slower_than_float(n_rows: int, n_out: int, n_in: int, *, exact: bool) -> str | None:
    """Return why `[n_rows, n_in] @ [n_out, n_in].T` is not faster in int8 here, None where it is.

    Args:
        n_rows: rows of the activations at the example's sizes.
        n_out: output channels.
        n_in: input channels.
        exact: the plain kernel is exact for this weight; otherwise the sparse excess is added.
    """
    if n_rows * n_out * n_in < MIN_MACS:
        return f"[{n_rows}, {n_in}] x [{n_in}, {n_out}] is too small for int8 to pay"
    if cpu_int8().saturates and n_rows < MIN_ROWS_SATURATING:
        return f"int8 without VNNI is slower than float on {n_rows} row(s)"
    if not exact and n_rows < MIN_ROWS_EXCESS:
        return f"the sparse excess of unsafe pairs does not pay on {n_rows} rows"
    return None
