"""The Triton int8_linear on a GPU against bfloat16 `linear` and `torch._int_mm`.

    python benchmarks/gpu_int8_linear.py

Every variant is timed in every round; ours only after its result was compared with the definition.
Inputs are random codes. Copies of the weight are cycled through, so that it does not stay in L2.
"""

import argparse
import itertools
from collections.abc import Callable
from typing import Any

import torch
from common import (
    Machine,
    Table,
    Timing,
    Variant,
    add_common_arguments,
    copies_beyond_cache,
    measure,
    publish,
)
from gpu_common import EventClock, gpu_settings, require_cuda
from torch import Tensor

from fxq.lowering.int8_linear import int8_linear, reference
from fxq.lowering.kernels.int8_linear import BENCHMARK_CASES, Case
from fxq.numerics import sqnr_db

COLUMNS = ("case", "variant", "ms", "p90 ms", "TOP/s", "x bfloat16")
L2_BYTES = 1 << 28  # several times the 50 to 60 MB of an H100 or H200


def arguments(case: Case) -> dict[str, Any]:
    """Return the arguments of `int8_linear` for a case, on the GPU."""
    generator = torch.Generator("cuda").manual_seed(0)

    def codes(*shape: int) -> Tensor:
        return torch.randint(-127, 128, shape, generator=generator, device="cuda").to(torch.int8)

    def floats(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device="cuda") + 0.5

    rows = case.m if case.per_row else 1
    return {
        "x": codes(case.m, case.k),
        "x_scale": floats(rows, 1) * 0.01,
        "x_zero_point": codes(rows, 1).int() if case.zero_point else None,
        "weight": codes(case.n, case.k),
        "w_scale": floats(case.n, 1) * 0.01,
        "bias": floats(case.n) if case.bias else None,
        "out_dtype": torch.bfloat16,
        "activation": case.activation,
        "out_scale": floats(1) * 0.05 if case.requantize else None,
        "out_zero_point": torch.full((1,), 3, device="cuda").int() if case.requantize else None,
    }


def cycling(make: Callable[[Tensor], Any], weights: list[Tensor]) -> Callable[[], Tensor]:
    """Return a call that takes the next weight every time."""
    turn = itertools.cycle(weights)
    return lambda: make(next(turn))


def variants_of(args: dict[str, Any]) -> list[Variant]:
    """Return every way of computing a case."""
    weights = copies_beyond_cache(args["weight"], L2_BYTES)
    expected = reference(**args)

    def right(found: Tensor) -> str | None:
        reached = sqnr_db(expected, found)
        return (
            None if reached >= 40 else f"{reached:.1f} dB, expected 40 dB"
        )  # bfloat16 rounds once

    x, rest = args["x"], {k: v for k, v in args.items() if k != "weight"}
    floats = [w.bfloat16() for w in weights]
    x_float, bias = x.bfloat16(), args["bias"]
    bias = None if bias is None else bias.bfloat16()
    return [
        Variant(
            "bfloat16 linear",
            cycling(lambda w: torch.nn.functional.linear(x_float, w, bias), floats),
            lambda _: None,  # another function: the same product without scales and epilogue
        ),
        Variant(
            "torch._int_mm", cycling(lambda w: torch._int_mm(x, w.t()), weights), lambda _: None
        ),
        Variant(
            "fxq int8_linear", cycling(lambda w: int8_linear(weight=w, **rest), weights), right
        ),
    ]


def rows_of(case: Case, rounds: int, smoke: bool) -> list[dict[str, Any]]:
    """Measure a case."""
    args = arguments(case)
    inputs = {"x": args["x"], "weight": args["weight"]}
    timings = measure(variants_of(args), inputs, rounds, smoke=smoke, clock=EventClock())
    base, rows = timings["bfloat16 linear"], []
    for variant, timing in timings.items():
        row: dict[str, Any] = {"case": str(tuple(case)), "variant": variant}
        if isinstance(timing, Timing):
            row |= {"ms": timing.median_ms, "p90 ms": timing.p90_ms}
            row["TOP/s"] = 2 * case.m * case.n * case.k / timing.median_ms / 1e9
            if isinstance(base, Timing):
                row["x bfloat16"] = timing.speedup_over(base)
        else:
            row["variant"] = f"{variant} ({timing})"
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_common_arguments(parser)
    options = parser.parse_args()
    require_cuda()
    rows = [row for case in BENCHMARK_CASES for row in rows_of(case, options.rounds, options.smoke)]
    table = Table(
        name="gpu_int8_linear",
        title="int8_linear on a GPU",
        settings=gpu_settings() | {"rounds": options.rounds},
        machine=Machine.here(),
        columns=COLUMNS,
        rows=tuple(rows),
    )
    publish(table, smoke=options.smoke)


if __name__ == "__main__":
    main()
