"""`torch.ops.fxq.weight_only_linear` against fp32 `F.linear`, shape by shape.

    python benchmarks/cpu_weight_only_linear.py --threads 1        # about 5 minutes

The limits in `lowering/lower_weight_only.py` and those in `lowering/cpu/weight_only_linear.py` are
read off its lines. Three weights per shape: 8 bits and 4 bits with a scale per output channel, and
4 bits, affine, with a scale for each 32 input channels. Activations are Gaussian. Weights are
cycled through copies that the cache does not hold, each variant's own. With one thread its CPU time
is what counts, so that other processes do not; with more it is the time on the wall.
"""

import argparse
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from common import (
    CACHE_BYTES,
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
from cpu_int8_linear import cycled
from rich.progress import track
from torch import Tensor

from fxq.lowering.weight_only_linear import pack, reference
from fxq.numerics import sqnr_db
from fxq.passes.common.convert import quantize_weight
from fxq.spec import PerChannel, PerGroup, QuantSpec

N_ROWS = (1, 2, 4, 8, 16, 65, 197, 512)
WEIGHTS = ((192, 768), (768, 768), (768, 3072), (2048, 2048), (4096, 4096))  # (K, N)
SPECS = {
    "int8": QuantSpec(granularity=PerChannel(0)),
    "int4": QuantSpec(4, granularity=PerChannel(0)),
    "int4 g32": QuantSpec(4, symmetric=False, granularity=PerGroup(32)),
}
MIN_SQNR_DB = 120.0  # of sums in fp32 against the definition's


def packed_variant(name: str, x: Tensor, weight: Tensor, bias: Tensor) -> Variant:
    """Return the op on one way of quantizing `weight`, to be checked against its definition."""
    packed = pack(*quantize_weight(weight, SPECS[name]))
    tail = (packed.factors, bias, len(weight))
    expected = reference(x, packed.codes, *tail)

    def check(y: Tensor) -> str | None:
        found = sqnr_db(expected, y)
        return None if found >= MIN_SQNR_DB else f"{found:.1f} dB from its definition"

    # `copies_beyond_cache` counts fp32 elements: bytes are four times as many.
    copies = copies_beyond_cache(packed.codes, 4 * CACHE_BYTES)
    return Variant(
        name, cycled(lambda codes: torch.ops.fxq.weight_only_linear(x, codes, *tail), copies), check
    )


def time_shape(
    n_rows: int, n_in: int, n_out: int, args: argparse.Namespace
) -> dict[str, Timing | str]:
    """Time fp32 and every way of quantizing on one shape."""
    x, weight, bias = torch.randn(n_rows, n_in), torch.randn(n_out, n_in), torch.randn(n_out)
    expected = (x.double() @ weight.double().mT + bias).float()

    def check(y: Tensor) -> str | None:
        found = sqnr_db(expected, y)
        return None if found >= MIN_SQNR_DB else f"{found:.1f} dB from fp64"

    copies = copies_beyond_cache(weight)
    variants = [Variant("fp32", cycled(lambda w: F.linear(x, w, bias), copies), check)]
    variants += [packed_variant(name, x, weight, bias) for name in SPECS]
    inputs = {"x": x, "weight": weight, "bias": bias}
    clock = time.process_time if args.threads == 1 else time.perf_counter
    rounds = 2 if args.smoke else args.rounds
    return measure(variants, inputs, rounds, smoke=args.smoke, clock=clock)


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
        row[f"{name} ms"] = timing.median_ms
        if isinstance(base, Timing):
            row[f"{name} speedup"] = timing.speedup_over(base)
            row[f"{name} paired"] = timing.paired_speedup_over(base)
            row[f"{name} best"] = min(base.samples_ms) / min(timing.samples_ms)
    return row


def table_of(rows: Sequence[dict[str, Cell]], machine: Machine, args: argparse.Namespace) -> Table:
    """Return the table, to be published."""
    parts = ("ms", "speedup", "paired", "best")
    return Table(
        name=f"cpu_weight_only_linear_{args.isa}_{args.threads}_threads",
        title=f"fxq::weight_only_linear against fp32 F.linear, {args.isa}, {args.threads} threads",
        settings={
            "rounds": 2 if args.smoke else args.rounds,
            "weight": "Gaussian",
            "clock": "CPU time" if args.threads == 1 else "wall time",
        },
        machine=machine,
        columns=("K", "N", "M", "fp32 ms", *(f"{name} {part}" for name in SPECS for part in parts)),
        rows=tuple(rows),
        notes=(
            "speedup: ratio of medians; paired: median of the ratios within a round; best: ratio "
            "of the fastest samples, which other processes on the machine disturb least.",
        ),
    )


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
        rows = [row_of(*shape, time_shape(*shape, args)) for shape in track(shapes, "timing")]
    publish(table_of(rows, machine, args), smoke=args.smoke)


if __name__ == "__main__":
    main()
