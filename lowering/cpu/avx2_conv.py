"""int8_conv on x86 without VNNI, whole, with its epilogue: `avx2_conv.cpp`.

The product is that of `avx2_linear`, and so are its bounds; its rows are positions of the output,
and its input channels a position's window, in the order (*kernel, channel), as channels last has
them in memory. Rows are gathered slab by slab, so that windows, which overlap, are never in memory
all at once. An image that is padded, or that has another order in memory, is copied once, with
the zero-point around it, which is real 0.

Two facts follow for weights. Pairs are those of bytes in that order: with an odd number of
channels they reach across positions. A weight that is not safe there has a channel of zeros added
to each group, after which pairs are those of channels. And the product of a group with fewer output
channels than a panel would leave most of it empty: such groups are multiplied together, with zeros
between them.
"""

import functools
import itertools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fxq.lowering.cpu import avx2_linear
from fxq.lowering.cpu.avx2_linear import ACTIVATIONS, CODES, PANEL, REAL, RUN
from fxq.lowering.cpu.native import address, native
from fxq.lowering.cpu.onednn import cpu_int8
from fxq.lowering.derived import derived
from fxq.lowering.kernels import buffers
from fxq.numerics import SIGN, codes_dtype, is_pair_safe

N_AXES = 3  # of space, of the kernel
FORMATS = None, torch.float32, torch.int8, torch.uint8  # of a residual, as `epilogue.h` has them
ONEDNN_BLOCK = 4  # input channels of a group that oneDNN multiplies at a time


class Packed:
    """A weight in panels, as `avx2_linear.Packed` has one.

    Args:
        weight: codes `[N, C / groups, *kernel]`.
        groups: of channels.
        products: of `groups / products` groups each.
        wide: bytes that the channels of a group have in a window.
    """

    def __init__(self, weight: Tensor, groups: int, products: int, wide: int) -> None:
        self.n_out, self.products, self.kernel = len(weight), products, tuple(weight.shape[2:])
        self.layout = groups, products, weight.shape[1], wide
        each = matrix_of(weight, groups, products, wide).unflatten(0, (products, -1))
        rows = F.pad(each, (0, 0, 0, -each.shape[1] % PANEL)).flatten(0, 1)
        self.panels = avx2_linear.Packed(rows, 1)


def products_of(weight: Tensor, groups: int) -> int:
    """Return how many products to make of the groups of a weight `[N, C / groups, *kernel]`: as
    many as take the fewest multiply-adds, with what panels and runs are filled up to."""

    def work(products: int) -> int:
        n_out, n_in = len(weight) // products, weight[0].numel() * groups // products
        return products * math.ceil(n_out / PANEL) * math.ceil(n_in / RUN)

    return min((n for n in range(1, groups + 1) if groups % n == 0), key=work)


def matrix_of(weight: Tensor, groups: int, products: int, wide: int) -> Tensor:
    """Return the matrix `[N, *kernel * groups / products * wide]` that rows are multiplied with.

    Args:
        weight: codes `[N, C / groups, *kernel]`.
        groups: of channels.
        products: of groups.
        wide: bytes of a group's channels in a window.
    """
    last = F.pad(weight.movedim(1, -1), (0, wide - weight.shape[1]))  # [N, *kernel, wide]
    together = groups // products
    # Among a product's groups.
    own = torch.arange(len(weight)) // (len(weight) // groups) % together
    matrix = last.new_zeros((*last.shape[:-1], together, wide))
    matrix[torch.arange(len(weight)), ..., own, :] = last
    return matrix.flatten(1)


def pack(weight: Tensor, groups: int) -> Packed | None:
    """Return a weight `[N, C / groups, *kernel]` for `launch`; None where its products saturate."""
    channels, products = weight.shape[1], products_of(weight, groups)
    for wide in (channels, channels + 1) if channels % 2 else (channels,):
        if is_pair_safe(matrix_of(weight, groups, products, wide)):
            return Packed(weight, groups, products, wide)
    return None


def packed(weight: Tensor, groups: int) -> Packed | None:
    """Return a weight for `launch`, packed once; None where the kernel does not multiply with it
    here. With VNNI it is for none, as `avx2_linear.fits` says."""

    def make(weight: Tensor) -> Packed | None:
        if weight.dtype != torch.int8 or not weight.numel():
            return None
        return pack(weight, groups)

    if not cpu_int8().saturates or isinstance(native("avx2_conv"), str):
        return None
    return derived.get(weight, f"avx2_conv {groups}", make)


def is_faster(weight: Tensor, groups: int) -> bool:
    """Tell whether the kernel is faster than oneDNN's with a weight `[N, C / groups, *kernel]`.

    By measurement (`benchmarks/cpu_int8_conv.py`): panels have room for more output channels than
    groups of few channels have, whose product is mostly one with zeros. Groups whose channels are
    no multiple of four are an exception, which oneDNN convolves in plain code; so are depthwise
    ones, but slow here too.
    """
    n_in = weight.shape[1]
    return groups == 1 or n_in >= 2 * PANEL or (n_in > 1 and n_in % ONEDNN_BLOCK != 0)


class Window(NamedTuple):
    """What `avx2_conv.cpp` is told of a shape.

    Args:
        sizes: of the output's axes of space.
        fields: int64, those of its `Window`.
        runs: int64, bytes from the first run of a row to each.
    """

    sizes: tuple[int, ...]
    fields: Tensor
    runs: Tensor


@functools.lru_cache(maxsize=4096)
def window(
    shape: tuple[int, ...],
    steps: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    layout: tuple[int, int, int, int],
) -> Window:
    """Return where rows lie in an image `[B, C, *size]` with `steps` in memory.

    Args:
        shape: of the image.
        steps: bytes from one to the next along its axes.
        kernel: its size, and so on, as `fxq.lowering.int8_conv` has them.
        stride: of the kernel.
        padding: before and after each axis.
        dilation: of the kernel.
        layout: groups, products, channels of a group and the bytes that they have in a window.
    """
    groups, products, channels, wide = layout
    missing = N_AXES - len(kernel)
    ones, none = (1,) * missing, (0,) * missing
    inner, kernel, stride, dilation = (
        (*ones, *values) for values in (shape[2:], kernel, stride, dilation)
    )
    before, after = (*none, *padding[::2]), (*none, *padding[1::2])
    outer = [sum(sizes) for sizes in zip(before, inner, after, strict=True)]
    sizes = [
        (full - d * (k - 1) - 1) // s + 1
        for full, k, s, d in zip(outer, kernel, stride, dilation, strict=True)
    ]
    bytes_of = [math.prod(outer[axis + 1 :]) * groups * wide for axis in range(N_AXES)]
    image = bytes_of[0] * outer[0]
    ahead = [d * step for d, step in zip(dilation, bytes_of, strict=True)]
    starts = [range(0, k * step, step) for k, step in zip(kernel, ahead, strict=True)]
    length = groups // products * wide
    if products == 1 and (dilation[2] == 1 or kernel[2] == 1):  # neighbours along the last axis
        length, starts[2] = length * kernel[2], range(1)
    runs = [sum(offsets) for offsets in itertools.product(*starts)]
    rows = _merged(
        [shape[0], *sizes],
        [image, *(s * step for s, step in zip(stride, bytes_of, strict=True))],
    )
    in_order = (image, 1, *bytes_of[missing:])
    elsewhere = any(size > 1 and a != b for size, a, b in zip(shape, steps, in_order, strict=True))
    copied = outer != list(inner) or wide != channels or elsewhere
    fields = [
        shape[0] * math.prod(sizes), *(size for size, _ in rows[1:]), *(step for _, step in rows),
        groups // products * wide, len(runs), length, int(copied), shape[0], *inner, *before,
        *outer, groups, channels, wide, *steps[:2], *none, *steps[2:],
    ]  # fmt: skip
    return Window(tuple(sizes[missing:]), torch.tensor(fields), torch.tensor(runs))


def _merged(sizes: list[int], steps: list[int]) -> list[tuple[int, int]]:
    """Return axes with their steps, four again, where those that lie one after the other are one:
    finding a row takes a division for each."""
    axes: list[tuple[int, int]] = []
    for size, step in zip(sizes, steps, strict=True):
        if axes and (axes[-1][1] == step * size or axes[-1][0] == 1):
            size *= axes.pop()[0]
        axes.append((size, step))
    first, *rest = axes
    return [first, *[(1, 0)] * (len(sizes) - len(axes)), *rest]


def launch(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    weight: Packed,
    w_scale: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    activation: str = "none",
    residual: Tensor | None = None,
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
    quant_min: int = -128,
    quant_max: int = 127,
    residual_scale: Tensor | None = None,
    residual_zero_point: Tensor | None = None,
) -> Tensor:
    """Compute `fxq.lowering.int8_conv.reference` with one scale and zero-point, the first of those
    given, of the residual too; arguments as there but for the packed weight."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {ACTIVATIONS}, found {activation!r}")
    call = native("avx2_conv")
    assert not isinstance(call, str)
    geometry = (tuple(stride), tuple(padding), tuple(dilation))
    found = window(tuple(x.shape), x.stride(), weight.kernel, *geometry, weight.layout)
    kind = REAL if out_scale is None else CODES
    dtype = torch.float32 if kind == REAL else codes_dtype(quant_max)
    out = buffers.allocate((len(x), *found.sizes, weight.n_out), dtype, x.device)
    bias = None if bias is None else bias.float().contiguous()
    w_scale, panels = w_scale.contiguous(), weight.panels
    if residual is not None:
        residual = residual if residual_scale is not None else residual.float()
        residual = residual.movedim(1, -1).expand(out.shape).contiguous()
    steps = (out_scale, out_zero_point)
    step, zero = (None if value is None else value.contiguous() for value in steps)
    format = FORMATS.index(None if residual is None else residual.dtype)
    call(
        address(x, strided=True), address(found.fields), address(found.runs),
        SIGN if x.dtype == torch.int8 else 0, first(x_zero_point), first(x_scale),
        *panels.addresses(),
        address(w_scale), int(w_scale.numel() > 1), address(bias),
        ACTIVATIONS.index(activation),
        address(residual), format, first(residual_scale), first(residual_zero_point),
        address(step), int(step is not None and step.numel() > 1),
        address(zero), int(zero is not None and zero.numel() > 1), quant_min, quant_max,
        address(out), kind, weight.n_out, weight.products, torch.get_num_threads(),
    )  # fmt: skip
    return out.movedim(-1, 1)


def first(values: Tensor | None) -> int | None:
    """Return where the first of some values is."""
    return address(values, strided=True)
