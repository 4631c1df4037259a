"""W4A8 without VNNI: `torch.ops.fxq.int8_linear` with 4-bit weights against fp32 `F.linear`.

    python benchmarks/cpu_int4_linear.py --threads 1        # about 2 minutes

Beside it the same op with 8-bit pair-safe weights, which the same kernel multiplies. Activations
arrive as uint8 codes with one scale; quantizing them is not timed. Weights are cycled through
copies, so that none is found in the cache for having just been used. With one thread its CPU time
is what counts, so that other processes do not; with more it is the time on the wall.
"""

import argparse
import math
import time
from collections.abc import Sequence

import torch
from common import (
    Cell,
    Machine,
    Table,
    Timing,
    add_common_arguments,
    measure,
    publish,
    reexec_with_isa,
)
from cpu_int8_linear import activations, float_variant, int8_variant
from rich.progress import track

from fxq.passes.w8a8 import WEIGHT
from fxq.spec import PerChannel, QuantSpec

# (M, K, N): those whose mean is the mark, then few rows and small weights.
MARK = ((197, 768, 768), (197, 768, 3072), (197, 3072, 768), (1024, 1024, 1024))
OTHERS = (
    *((m, 4096, 4096) for m in (1, 4, 16)),
    *((m, 768, 768) for m in (1, 16, 65)),
    *((m, 192, 768) for m in (1, 16, 65, 197)),
)
SPECS = {"int4": QuantSpec(4, granularity=PerChannel(0)), "int8": WEIGHT}
PARTS = ("ms", "GOP/s", "speedup", "paired", "best")


def time_shape(shape: tuple[int, int, int], args: argparse.Namespace) -> dict[str, Timing | str]:
    """Time fp32 and both widths on one shape."""
    n_rows, n_in, n_out = shape
    weight, bias, x = torch.randn(n_out, n_in), torch.randn(n_out), activations(n_rows, n_in)
    variants = [float_variant(x, weight, bias)]
    variants += [int8_variant(name, x, weight, bias, spec) for name, spec in SPECS.items()]
    inputs = {"codes": x.codes, "weight": weight, "bias": bias}
    clock = time.process_time if args.threads == 1 else time.perf_counter
    rounds = 2 if args.smoke else args.rounds
    return measure(variants, inputs, rounds, smoke=args.smoke, clock=clock)


def row_of(shape: tuple[int, int, int], found: dict[str, Timing | str]) -> dict[str, Cell]:
    """Return the table's row of one shape."""
    base, (n_rows, n_in, n_out) = found["fp32"], shape
    row: dict[str, Cell] = {"M": n_rows, "K": n_in, "N": n_out}
    row["fp32 ms"] = base if isinstance(base, str) else base.median_ms
    for name in SPECS:
        timing = found[name]
        if isinstance(timing, str) or isinstance(base, str):
            row[f"{name} ms"] = timing if isinstance(timing, str) else timing.median_ms
            continue
        row |= {
            f"{name} ms": timing.median_ms,
            f"{name} GOP/s": 2e-6 * math.prod(shape) / timing.median_ms,
            f"{name} speedup": timing.speedup_over(base),
            f"{name} paired": timing.paired_speedup_over(base),
            f"{name} best": min(base.samples_ms) / min(timing.samples_ms),
        }
    return row


def mean_line(rows: Sequence[dict[str, Cell]]) -> str:
    """Return the geometric means over the shapes of `MARK`."""
    means = []
    for name in SPECS:
        for part in ("speedup", "paired", "best"):
            values = [r.get(f"{name} {part}") for r in rows[: len(MARK)]]
            logs = [math.log(v) for v in values if isinstance(v, float)]
            if len(logs) == len(MARK):
                means.append(f"{name} {part} {math.exp(sum(logs) / len(logs)):.2f}")
    return f"geometric means over the first {len(MARK)} shapes: {', '.join(means)}."


def main() -> None:
    """Time all shapes and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_common_arguments(parser)
    args = parser.parse_args()
    reexec_with_isa(args.isa)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    machine = Machine.here()
    shapes = OTHERS[-2:] if args.smoke else (*MARK, *OTHERS)
    with torch.no_grad():
        rows = [row_of(shape, time_shape(shape, args)) for shape in track(shapes, "timing")]
    clock = "CPU time" if args.threads == 1 else "wall time"
    table = Table(
        name=f"cpu_int4_linear_{args.isa}_{args.threads}_threads",
        title=f"fxq::int8_linear with 4-bit weights, {args.isa}, {args.threads} threads",
        settings={"rounds": 2 if args.smoke else args.rounds, "weight": "Gaussian", "clock": clock},
        machine=machine,
        columns=("M", "K", "N", "fp32 ms", *(f"{n} {part}" for n in SPECS for part in PARTS)),
        rows=tuple(rows),
        notes=(
            mean_line(rows),
            "speedup: ratio of medians; paired: median of the ratios within a round; best: ratio "
            "of the fastest samples, which other processes on the machine disturb least.",
        ),
    )
    publish(table, smoke=args.smoke)


if __name__ == "__main__":
    main()
