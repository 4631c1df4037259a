"""The two kernels of `torch.ops.fxq.int8_conv` on x86 against fp32 `F.conv2d`, shape by shape.

    python benchmarks/cpu_int8_conv.py --isa avx2 --threads 1       # about 6 minutes

The thresholds in `lowering/devices/x86.py`, and where fxq's own kernel is faster than oneDNN's
(`lowering/cpu/avx2_conv.py`), are read off its table. Both give fp32 results here; fxq's own would
give codes of an activation function's results in about the same time, oneDNN not. fp32 is timed in
both orders of memory, and the faster counts: Inductor calls the same kernels. Weights are
pair-safe. Activations arrive as uint8 codes with one scale, as in a statically quantized model;
quantizing them is not timed. Weights are cycled through copies, so that none is found in the cache
for having just been used. With one thread its CPU time is what counts, so that other processes do
not.
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

from fxq.lowering.cpu import avx2_conv
from fxq.lowering.cpu import int8_conv as onednn_conv
from fxq.lowering.devices.x86 import conv_slower_than_float, own_conv_pays
from fxq.lowering.int8_conv import reference
from fxq.numerics import sqnr_db
from fxq.passes.common.convert import quantize_weight
from fxq.passes.w8a8 import WEIGHT

SCALE, ZERO = torch.tensor([8 / 255]), torch.tensor([121], dtype=torch.int32)  # of activations
MIN_SQNR_DB = 120.0  # of the op against its definition: integer sums are exact, fp32 scaling is not
MIN_FLOAT_DB = 110.0  # of fp32, whose sums of thousands of products are not
COLUMNS = (
    "layer", "C", "N", "size", "kernel", "stride", "groups", "Mi MAC", "fp32 ms",
    "fp32 channels last ms", "int8 ms", "int8 p10", "int8 p90", "int8 GOP/s", "speedup", "paired",
    "oneDNN ms", "over oneDNN", "rule",
)  # fmt: skip


class Shape(NamedTuple):
    """A 2d convolution of one image with padding of half the kernel, or of patches without it."""

    layer: str
    n_in: int
    n_out: int
    size: int
    kernel: int = 3
    stride: int = 1
    groups: int = 1

    @property
    def padding(self) -> int:
        """On every side."""
        return self.kernel // 2 if self.stride < self.kernel else 0

    @property
    def n_outputs(self) -> int:
        """Positions of one output channel."""
        return int(((self.size + 2 * self.padding - self.kernel) // self.stride + 1) ** 2)

    @property
    def n_macs(self) -> int:
        """Multiply-adds."""
        return self.n_outputs * self.n_out * self.n_in // self.groups * self.kernel**2


SHAPES = (
    Shape("first", 3, 64, 224, 7, 2),
    Shape("first", 3, 32, 224, 3, 2),
    Shape("first", 4, 320, 32),
    Shape("patches", 3, 96, 224, 4, 4),
    Shape("patches", 3, 384, 224, 14, 14),
    Shape("patches", 3, 768, 224, 16, 16),
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
    Shape("groups", 96, 96, 28, 3, 1, 6),
    Shape("groups", 208, 208, 14, 3, 1, 13),
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


def float_variants(shape: Shape, x: Tensor, weight: Tensor, bias: Tensor) -> list[Variant]:
    """Return fp32 in both orders of memory."""
    geometry = (shape.stride, shape.padding, 1, shape.groups)
    exact = F.conv2d(x.double(), weight.double(), bias.double(), *geometry)
    variants = []
    for name, order in (("fp32", torch.contiguous_format), ("fp32 last", torch.channels_last)):
        ordered = x.contiguous(memory_format=order)

        def convolve(w: Tensor, ordered: Tensor = ordered) -> Tensor:
            return F.conv2d(ordered, w, bias, *geometry)

        weights = [w.contiguous(memory_format=order) for w in copies_beyond_cache(weight, most=16)]
        check = near(exact.float(), "fp64", MIN_FLOAT_DB)
        variants.append(Variant(name, cycled(convolve, weights), check))
    return variants


def int8_variants(shape: Shape, codes: Tensor, weight: Tensor, bias: Tensor) -> list[Variant]:
    """Return fxq's own kernel, where there is one here, and oneDNN's."""
    w_codes, w_scale, _ = quantize_weight(weight, WEIGHT)
    pad, dilation, groups = shape.padding, [1, 1], shape.groups
    stride, ends = [shape.stride] * 2, (w_scale, bias)
    geometry = (stride, [pad] * 4, dilation)
    expected = reference(codes, SCALE, ZERO, w_codes, *ends, *geometry, groups)

    def own(w: Tensor) -> Tensor:
        packed = avx2_conv.packed(w, groups)
        assert packed is not None
        return avx2_conv.launch(codes, SCALE, ZERO, packed, *ends, *geometry)

    def onednn(w: Tensor) -> Tensor:
        tail = (*ends, stride, [pad] * 2, dilation, groups)
        return onednn_conv.launch(codes, float(SCALE), int(ZERO), w, *tail)

    here = avx2_conv.packed(w_codes, groups) is not None
    copies = copies_beyond_cache(w_codes, most=16)
    check = near(expected, "its definition", MIN_SQNR_DB)
    variants = []
    for name, call in (*((("int8", own),) if here else ()), ("oneDNN", onednn)):
        for copy in copies:
            call(copy)  # packs it
        variants.append(Variant(name, cycled(call, copies), check))
    return variants


def kernel_for(shape: Shape, weight: Tensor) -> str:
    """Return which kernel lowering chooses for a shape."""
    codes = quantize_weight(weight, WEIGHT)[0]
    case = (shape.n_outputs, codes, shape.groups)
    if own_conv_pays(*case) and avx2_conv.packed(codes, shape.groups):
        return "int8"
    return "float" if conv_slower_than_float(*case) else "oneDNN"


def time_shape(shape: Shape, rounds: int, smoke: bool) -> tuple[dict[str, Timing | str], str]:
    """Time fp32 in both orders of memory and both kernels; return also which one lowering takes."""
    weight = torch.randn(shape.n_out, shape.n_in // shape.groups, shape.kernel, shape.kernel)
    bias = torch.randn(shape.n_out)
    gaussian = torch.randn(1, shape.n_in, shape.size, shape.size) / SCALE + ZERO
    codes = torch.round(gaussian).clamp(0, 255).to(torch.uint8)
    codes = codes.to(memory_format=torch.channels_last)
    x = (codes.float() - ZERO) * SCALE
    variants = float_variants(shape, x, weight, bias) + int8_variants(shape, codes, weight, bias)
    inputs = {"codes": codes, "weight": weight, "bias": bias}
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    timings = measure(variants, inputs, rounds, smoke=smoke, clock=clock)
    return {"int8": "no such kernel here"} | timings, kernel_for(shape, weight)


def row_of(shape: Shape, found: dict[str, Timing | str], rule: str) -> dict[str, Cell]:
    """Return the table's row of one shape."""
    row: dict[str, Cell] = {
        "layer": shape.layer, "C": shape.n_in, "N": shape.n_out, "size": shape.size,
        "kernel": shape.kernel, "stride": shape.stride, "groups": shape.groups,
        "Mi MAC": shape.n_macs / 2**20, "rule": rule,
    }  # fmt: skip
    names = {"fp32 ms": "fp32", "fp32 channels last ms": "fp32 last", "oneDNN ms": "oneDNN"}
    for column, name in names.items():
        timing = found[name]
        row[column] = timing if isinstance(timing, str) else timing.median_ms
    int8, onednn = found["int8"], found["oneDNN"]
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
    if isinstance(onednn, Timing):
        row["over oneDNN"] = int8.speedup_over(onednn)
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
        title=f"int8 convolutions against fp32 F.conv2d, {args.isa}",
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
            "int8: fxq's own kernel. speedup: ratio of medians, over the faster order of memory in "
            "fp32; paired: median of the ratios within a round; over oneDNN: ratio of medians.",
            "rule: what the x86 rules make of such a layer: int8 (fxq's own), oneDNN or float.",
        ),
    )
    publish(table, smoke=args.smoke)


if __name__ == "__main__":
    main()
