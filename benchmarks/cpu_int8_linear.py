"""`torch.ops.fxq.int8_linear` against fp32 `F.linear`, shape by shape.

    python benchmarks/cpu_int8_linear.py --isa avx2        # about 10 minutes

The thresholds in `lowering/devices/x86.py` can be read off its last lines: the fewest rows from
which on int8 wins. Two weights per shape: one whose neighbouring codes never saturate (`plain`),
and a full-range one, which needs the sparse excess where the processor lacks VNNI (`excess`; with
VNNI both run the same kernel). Activations arrive as uint8 codes with one scale, as in a statically
quantized model; quantizing them is not timed. Weights are cycled through copies, so that none is
found in the cache for having just been used.
"""

import argparse
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from common import (
    Cell,
    Machine,
    Table,
    Timing,
    Variant,
    add_common_arguments,
    copies_beyond_cache,
    measure,
    publish,
    reexec_with_isa,
)
from rich.progress import track
from torch import Tensor

from fxq.lowering.int8_linear import reference
from fxq.numerics import sqnr_db
from fxq.passes.common.convert import quantize_weight
from fxq.passes.w8a8 import FULL_RANGE, WEIGHT
from fxq.spec import QuantSpec

N_ROWS = (1, 4, 16, 65, 197, 394, 1576)
WEIGHTS = (
    (64, 192),
    (128, 384),
    (192, 768),
    (768, 768),
    (768, 3072),
    (3072, 768),
    (4096, 4096),
)  # (K, N)
SPECS = {"plain": WEIGHT, "excess": FULL_RANGE}
MIN_SQNR_DB = 120.0  # of the op against its definition: integer sums are exact, fp32 scaling is not


@dataclass(frozen=True)
class Activations:
    """uint8 codes `[M, K]`, their scale fp32 `[1, 1]` and zero-point int32 `[1, 1]`."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor


def activations(n_rows: int, n_in: int) -> Activations:
    """Return the codes of Gaussian activations with a range of four standard deviations."""
    scale = torch.tensor([[8 / 255]])
    zero_point = torch.tensor([[121]], dtype=torch.int32)
    codes = torch.round(torch.randn(n_rows, n_in) / scale + zero_point).clamp(0, 255)
    return Activations(codes.to(torch.uint8), scale, zero_point)


def cycled(call: Callable[[Tensor], Tensor], weights: Sequence[Tensor]) -> Callable[[], Tensor]:
    """Return a call without arguments that uses the next of `weights` every time."""
    endless = itertools.cycle(weights)
    return lambda: call(next(endless))


def int8_variant(
    name: str, x: Activations, weight: Tensor, bias: Tensor, spec: QuantSpec
) -> Variant:
    """Return the op on one way of quantizing `weight`, to be checked against its definition."""
    codes, w_scale, _ = quantize_weight(weight, spec)
    head = (x.codes, x.scale, x.zero_point)
    expected = reference(*head, codes, w_scale, bias, torch.float32)

    def call(w: Tensor) -> Tensor:
        return torch.ops.fxq.int8_linear(*head, w, w_scale, bias, torch.float32)

    def check(y: Tensor) -> str | None:
        found = sqnr_db(expected, y)
        return None if found >= MIN_SQNR_DB else f"{found:.1f} dB from its definition"

    copies = copies_beyond_cache(codes)
    for copy in copies:
        call(copy)  # packs it
    return Variant(name, cycled(call, copies), check)


def time_shape(
    n_rows: int, n_in: int, n_out: int, rounds: int, smoke: bool
) -> dict[str, Timing | str]:
    """Time fp32 and both int8 variants on one shape."""
    weight, bias = torch.randn(n_out, n_in), torch.randn(n_out)
    x = activations(n_rows, n_in)
    fp32 = float_variant(x, weight, bias)
    int8 = [int8_variant(name, x, weight, bias, spec) for name, spec in SPECS.items()]
    inputs = {"codes": x.codes, "weight": weight, "bias": bias}
    return measure([fp32, *int8], inputs, rounds, smoke=smoke)


def float_variant(x: Activations, weight: Tensor, bias: Tensor) -> Variant:
    """Return fp32 on the values of `x`, to be checked against fp64."""
    x_float = (x.codes.float() - x.zero_point) * x.scale
    expected = (x_float.double() @ weight.double().mT + bias).float()

    def check_float(y: Tensor) -> str | None:
        found = sqnr_db(expected, y)
        return None if found >= MIN_SQNR_DB else f"{found:.1f} dB from fp64"

    weights = copies_beyond_cache(weight)
    return Variant("fp32", cycled(lambda w: F.linear(x_float, w, bias), weights), check_float)


def row_of(n_rows: int, n_in: int, n_out: int, found: dict[str, Timing | str]) -> dict[str, Cell]:
    """Return the table's row of one shape."""
    base = found["fp32"]
    row: dict[str, Cell] = {"K": n_in, "N": n_out, "M": n_rows}
    row["fp32 ms"] = base if isinstance(base, str) else base.median_ms
    for name in SPECS:
        timing = found[name]
        if isinstance(timing, str):
            row[f"{name} ms"] = timing
            continue
        work = 2e-9 * n_rows * n_in * n_out
        row |= {
            f"{name} ms": timing.median_ms,
            f"{name} p10": timing.p10_ms,
            f"{name} p90": timing.p90_ms,
            f"{name} GOP/s": work / timing.median_ms * 1e3,
        }
        if isinstance(base, Timing):
            row |= {
                f"{name} speedup": timing.speedup_over(base),
                f"{name} paired": timing.paired_speedup_over(base),
            }
    return row


def columns() -> tuple[str, ...]:
    """Return the table's columns."""
    parts = ("ms", "p10", "p90", "GOP/s", "speedup", "paired")
    return ("K", "N", "M", "fp32 ms", *(f"{name} {part}" for name in SPECS for part in parts))


def winning_from(rows: Sequence[dict[str, Cell]], name: str) -> int | None:
    """Return the smallest M from which on, for every larger M too, int8 is faster; None for none.

    Args:
        rows: those of one weight shape, in order of M.
        name: variant.
    """
    best = None
    for row in reversed(rows):
        speedups = (row.get(f"{name} speedup"), row.get(f"{name} paired"))
        if not all(isinstance(s, float) and s > 1 for s in speedups):
            break
        best = row["M"]
    return best if isinstance(best, int) else None


def wins(rows: Sequence[dict[str, Cell]]) -> list[str]:
    """Return a line per weight shape: the smallest winning M of each variant."""
    lines = []
    for (n_in, n_out), group in itertools.groupby(rows, key=lambda r: (r["K"], r["N"])):
        shape = list(group)
        found = {name: winning_from(shape, name) for name in SPECS}
        text = ", ".join(
            f"{name} from M = {m} ({m * n_in * n_out / 2**20:.3g} Mi MAC)" if m else f"{name} never"
            for name, m in found.items()
        )
        lines.append(f"K = {n_in}, N = {n_out}: {text}")
    return lines


def main() -> None:
    """Time all shapes and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_common_arguments(parser)
    args = parser.parse_args()
    reexec_with_isa(args.isa)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    machine = Machine.here()
    weights, n_rows = (WEIGHTS[:1], N_ROWS[:3]) if args.smoke else (WEIGHTS, N_ROWS)
    shapes = [(m, k, n) for k, n in weights for m in n_rows]
    with torch.no_grad():
        rows = [
            row_of(*shape, time_shape(*shape, 2 if args.smoke else args.rounds, args.smoke))
            for shape in track(shapes, "timing")
        ]
    table = Table(
        name=f"cpu_int8_linear_{args.isa}",
        title=f"fxq::int8_linear against fp32 F.linear, {args.isa}",
        settings={"rounds": 2 if args.smoke else args.rounds, "weight": "Gaussian"},
        machine=machine,
        columns=columns(),
        rows=tuple(rows),
        notes=(
            "speedup: ratio of medians; paired: median of the ratios within a round.",
            *("int8 wins for " + line for line in wins(rows)),
        ),
    )
    publish(table, smoke=args.smoke)


if __name__ == "__main__":
    main()
