"""`torch.ops.fxq.int8_conv` against fp32 `F.conv2d`, shape by shape.

    python benchmarks/cpu_int8_conv.py --isa avx2 --threads 1       # about 5 minutes

The thresholds in `lowering/devices/x86.py` are read off its table. fp32 is timed in both orders of
memory, and the faster counts: Inductor calls the same kernels. Weights are pair-safe. Activations
arrive as uint8 codes with one scale, as in a statically quantized model; quantizing them is not
timed. Weights are cycled through copies, so that none is found in the cache for having just been
used. With one thread its CPU time is what counts, so that other processes do not.
"""

import argparse
import itertools
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

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

from fxq.lowering.devices.x86 import conv_slower_than_float
from fxq.lowering.int8_conv import reference
from fxq.numerics import sqnr_db
from fxq.passes.common.convert import quantize_weight
from fxq.passes.w8a8 import WEIGHT

MIN_SQNR_DB = 120.0  # of the op against its definition: integer sums are exact, fp32 scaling is not
MIN_FLOAT_DB = 110.0  # of fp32, whose sums of thousands of products are not
COLUMNS = (
    "layer", "C", "N", "size", "kernel", "stride", "groups", "Mi MAC", "fp32 ms",
    "fp32 channels last ms", "int8 ms", "int8 p10", "int8 p90", "int8 GOP/s", "speedup", "paired",
    "rule",
)  # fmt: skip


class Shape(NamedTuple):
    """A 2d convolution of one image with padding of half the kernel."""

    layer: str
    n_in: int
    n_out: int
    size: int
    kernel: int = 3
    stride: int = 1
    groups: int = 1

    @property
    def n_outputs(self) -> int:
        """Positions of one output channel."""
        return int(((self.size - 1) // self.stride + 1) ** 2)

    @property
    def n_macs(self) -> int:
        """Multiply-adds."""
        return self.n_outputs * self.n_out * self.n_in // self.groups * self.kernel**2


SHAPES = (
    Shape("first", 3, 64, 224, 7, 2),
    Shape("first", 3, 32, 224, 3, 2),
    Shape("first", 4, 320, 32),
    Shape("ResNet-50", 64, 64, 56, 1),
    Shape("ResNet-50", 64, 64, 56),
    Shape("ResNet-50", 64, 256, 56, 1),
    Shape("ResNet-50", 256, 64, 56, 1),
    Shape("ResNet-50", 128, 128, 56, 3, 2),
    Shape("ResNet-50", 128, 512, 28, 1),
    Shape("ResNet-50", 128, 128, 28),
    Shape("ResNet-50", 256, 512, 56, 1, 2),
    Shape("ResNet-50", 256, 256, 14),
    Shape("ResNet-50", 1024, 256, 14, 1),
    Shape("ResNet-50", 512, 512, 7),
    Shape("ResNet-50", 512, 2048, 7, 1),
    Shape("UNet", 64, 64, 32),
    Shape("UNet", 128, 128, 32),
    Shape("UNet", 320, 320, 32),
    Shape("UNet", 64, 64, 16),
    Shape("UNet", 128, 128, 16),
    Shape("UNet", 320, 320, 16),
    Shape("UNet", 640, 320, 16),
    Shape("last", 320, 4, 32),
    Shape("depthwise", 32, 32, 112, 3, 1, 32),
    Shape("depthwise", 144, 144, 56, 3, 1, 144),
    Shape("depthwise", 384, 384, 14, 3, 1, 384),
    Shape("depthwise", 960, 960, 7, 3, 1, 960),
    Shape("MobileNetV2", 32, 16, 112, 1),
    Shape("MobileNetV2", 24, 144, 56, 1),
    Shape("MobileNetV2", 144, 32, 28, 1),
    Shape("MobileNetV2", 64, 384, 14, 1),
    Shape("MobileNetV2", 384, 64, 14, 1),
    Shape("MobileNetV2", 160, 960, 7, 1),
    Shape("MobileNetV2", 960, 160, 7, 1),
    Shape("groups", 128, 128, 56, 3, 1, 32),
    Shape("groups", 256, 256, 28, 3, 1, 32),
    Shape("groups", 512, 512, 14, 3, 1, 32),
    Shape("groups", 66, 66, 28, 3, 1, 3),
    Shape("small", 8, 8, 16),
    Shape("small", 16, 16, 16),
    Shape("small", 32, 32, 16),
    Shape("small", 16, 16, 32),
    Shape("small", 32, 32, 32),
    Shape("small", 8, 32, 64),
)


def cycled(call: Callable[[Tensor], Tensor], weights: Sequence[Tensor]) -> Callable[[], Tensor]:
    """Return a call without arguments that uses the next of `weights` every time."""
    endless = itertools.cycle(weights)
    return lambda: call(next(endless))


def near(expected: Tensor, from_what: str, at_least: float) -> Callable[[Tensor], str | None]:
    """Return a check that an output is within so many dB of `expected`."""

    def check(y: Tensor) -> str | None:
        found = sqnr_db(expected, y)
        return None if found >= at_least else f"{found:.1f} dB from {from_what}"

    return check


def time_shape(shape: Shape, rounds: int, smoke: bool) -> tuple[dict[str, Timing | str], str]:
    """Time fp32 in both orders of memory and int8; return also what the rule says of the shape."""
    kernel, stride, pad, groups = shape.kernel, shape.stride, shape.kernel // 2, shape.groups
    weight = torch.randn(shape.n_out, shape.n_in // groups, kernel, kernel)
    bias, scale = torch.randn(shape.n_out), torch.tensor([8 / 255])
    zero = torch.tensor([121], dtype=torch.int32)
    gaussian = torch.randn(1, shape.n_in, shape.size, shape.size) / scale + zero
    codes = torch.round(gaussian).clamp(0, 255).to(torch.uint8)
    codes = codes.to(memory_format=torch.channels_last)
    x = (codes.float() - zero) * scale
    exact = F.conv2d(x.double(), weight.double(), bias.double(), stride, pad, 1, groups)
    variants = []
    for name, order in (("fp32", torch.contiguous_format), ("fp32 last", torch.channels_last)):
        ordered = x.contiguous(memory_format=order)

        def convolve(w: Tensor, ordered: Tensor = ordered) -> Tensor:
            return F.conv2d(ordered, w, bias, stride, pad, 1, groups)

        weights = [w.contiguous(memory_format=order) for w in copies_beyond_cache(weight, most=16)]
        check = near(exact.float(), "fp64", MIN_FLOAT_DB)
        variants.append(Variant(name, cycled(convolve, weights), check))
    w_codes, w_scale, _ = quantize_weight(weight, WEIGHT)
    geometry = ([stride] * 2, [pad] * 4, [1, 1], groups)
    expected = reference(codes, scale, zero, w_codes, w_scale, bias, *geometry)

    def int8(w: Tensor) -> Tensor:
        return torch.ops.fxq.int8_conv(codes, scale, zero, w, w_scale, bias, *geometry)

    copies = copies_beyond_cache(w_codes, most=16)
    for copy in copies:
        int8(copy)  # packs it
    check = near(expected, "its definition", MIN_SQNR_DB)
    variants.append(Variant("int8", cycled(int8, copies), check))
    inputs = {"codes": codes, "weight": weight, "bias": bias}
    said = conv_slower_than_float(shape.n_outputs, w_codes, groups)
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    timings = measure(variants, inputs, rounds, smoke=smoke, clock=clock)
    return timings, "float" if said else "int8"


def row_of(shape: Shape, found: dict[str, Timing | str], rule: str) -> dict[str, Cell]:
    """Return the table's row of one shape."""
    row: dict[str, Cell] = {
        "layer": shape.layer, "C": shape.n_in, "N": shape.n_out, "size": shape.size,
        "kernel": shape.kernel, "stride": shape.stride, "groups": shape.groups,
        "Mi MAC": shape.n_macs / 2**20, "rule": rule,
    }  # fmt: skip
    for column, name in (("fp32 ms", "fp32"), ("fp32 channels last ms", "fp32 last")):
        timing = found[name]
        row[column] = timing if isinstance(timing, str) else timing.median_ms
    int8 = found["int8"]
    if isinstance(int8, str):
        return row | {"int8 ms": int8}
    row |= {
        "int8 ms": int8.median_ms,
        "int8 p10": int8.p10_ms,
        "int8 p90": int8.p90_ms,
        "int8 GOP/s": 2e-6 * shape.n_macs / int8.median_ms,
    }
    floats = [timing for name in ("fp32", "fp32 last") if isinstance(timing := found[name], Timing)]
    if len(floats) == 2:
        best = min(floats, key=lambda timing: timing.median_ms)
        row |= {"speedup": int8.speedup_over(best), "paired": int8.paired_speedup_over(best)}
    return row


def main() -> None:
    """Time all shapes and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_common_arguments(parser)
    args = parser.parse_args()
    reexec_with_isa(args.isa)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    machine = Machine.here()
    rounds = 2 if args.smoke else args.rounds
    shapes = SHAPES[-3:] if args.smoke else SHAPES
    with torch.no_grad():
        rows = [
            row_of(shape, *time_shape(shape, rounds, args.smoke))
            for shape in track(shapes, "timing")
        ]
    table = Table(
        name=f"cpu_int8_conv_{args.isa}",
        title=f"fxq::int8_conv against fp32 F.conv2d, {args.isa}",
        settings={
            "rounds": rounds,
            "weight": "Gaussian, pair-safe",
            "batch": 1,
            "clock": "CPU time" if args.threads == 1 else "wall",
        },
        machine=machine,
        columns=COLUMNS,
        rows=tuple(rows),
        notes=(
            "speedup: ratio of medians, over the faster order of memory in fp32; paired: median of "
            "the ratios within a round.",
            "rule: what the x86 rule makes of such a layer.",
        ),
    )
    publish(table, smoke=args.smoke)


if __name__ == "__main__":
    main()
