"""int8 convolutions of fxq's own on x86 without VNNI: integer sums are those of a convolution in
fp64, results and codes bit-equal to the definition."""

import itertools
import math
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import opcheck

from fxq.lowering.cpu import avx2_conv
from fxq.lowering.int8_conv import reference
from fxq.lowering.int8_linear import ACTIVATIONS
from fxq.lowering.rule import MAX_ROUNDED_SHARE

OPS = torch.ops.fxq
CONV = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
pytestmark = pytest.mark.usefixtures("avx2_convs")


class Case(NamedTuple):
    """A convolution: sizes of the input and of the weight, then a number per axis, padding two."""

    x: tuple[int, ...]
    weight: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1

    @property
    def geometry(self) -> tuple[Any, ...]:
        return [*self.stride], [*self.padding], [*self.dilation], self.groups


CASES = {
    "1x1": Case((1, 64, 7, 7), (33, 64, 1, 1), (1, 1), (0, 0, 0, 0), (1, 1)),
    "1x1, stride 2": Case((2, 9, 7, 6), (5, 9, 1, 1), (2, 2), (0, 0, 0, 0), (1, 1)),
    "one position": Case((3, 16, 3, 3), (7, 16, 3, 3), (1, 1), (0, 0, 0, 0), (1, 1)),
    "odd channels": Case((3, 7, 9, 9), (9, 7, 3, 3), (2, 2), (1, 1, 1, 1), (1, 1)),
    "three channels": Case((2, 3, 15, 15), (17, 3, 7, 7), (2, 2), (3, 3, 3, 3), (1, 1)),
    "patches": Case((2, 3, 12, 12), (40, 3, 4, 4), (4, 4), (0, 0, 0, 0), (1, 1)),
    "one channel": Case((1, 1, 5, 5), (4, 1, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
    "stride beyond the kernel": Case((1, 6, 11, 9), (20, 6, 2, 1), (5, 3), (0, 0, 0, 0), (1, 1)),
    "groups": Case((2, 24, 6, 9), (16, 12, 3, 3), (1, 2), (1, 1, 0, 0), (1, 1), 2),
    "groups of five": Case((1, 15, 6, 6), (6, 5, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 3),
    "groups of panels": Case((1, 34, 5, 5), (66, 17, 2, 2), (1, 1), (1, 0, 0, 1), (1, 1), 2),
    "many groups": Case((1, 32, 6, 5), (32, 4, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 8),
    "depthwise": Case((2, 20, 9, 9), (20, 1, 3, 3), (2, 2), (1, 1, 1, 1), (1, 1), 20),
    "dilated": Case((1, 17, 12, 12), (8, 17, 3, 3), (1, 1), (2, 2, 3, 3), (2, 3)),
    "asymmetric": Case((2, 12, 8, 8), (8, 12, 4, 2), (1, 1), (1, 2, 0, 1), (1, 1)),
    "padding beyond the image": Case((1, 8, 3, 2), (8, 8, 2, 2), (1, 1), (4, 5, 6, 3), (1, 1)),
    "1d": Case((2, 33, 40), (12, 33, 5), (3,), (2, 2), (1,)),
    "1d, dilated, groups": Case((1, 6, 21), (9, 2, 4), (1,), (4, 5), (3,), 3),
    "3d": Case((1, 10, 5, 4, 6), (8, 10, 2, 3, 2), (1, 2, 1), (1, 1, 0, 0, 0, 1), (1, 1, 1)),
    "slabs": Case((1, 30, 40, 40), (19, 30, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
    "no batch": Case((0, 8, 5, 5), (8, 8, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
}  # fmt: skip
LARGEST = {4: 8, 8: 64}  # |w| of codes: any two are pair-safe


def arguments(case: Case, dtype: torch.dtype, bits: int = 8) -> list[Any]:
    """The op's arguments to the groups; the zero-point is at an end of the grid or inside."""
    low, high = (0, 256) if dtype == torch.uint8 else (-128, 128)
    x, largest = torch.randint(low, high, case.x).to(dtype), LARGEST[bits]
    w = torch.randint(-largest, largest + 1, case.weight).to(torch.int8)
    zero = torch.tensor([[low, high - 1, low + 100][w.numel() % 3]], dtype=torch.int32)
    scale = torch.rand(1) / (100 * largest * math.sqrt(w[0].numel()))
    n = len(w)
    w_scale = torch.rand(n, *[1] * (w.ndim - 1)) + 0.5
    return [x, scale, zero, w, w_scale, torch.randn(n), *case.geometry]


def exact(x: Tensor, zero: int, weight: Tensor, case: Case) -> Tensor:
    """The convolution of the centred codes in fp64, whose padding is 0."""
    sides = zip(case.padding[::2], case.padding[1::2], strict=True)
    around = F.pad(x.double() - zero, [n for pair in reversed(list(sides)) for n in pair])
    stride, _, dilation, groups = case.geometry
    return CONV[x.ndim](around, weight.double(), None, stride, 0, dilation, groups)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8], ids=str)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", CASES)
def test_sums_are_exact_and_results_bit_equal_to_the_definition(
    name: str, bits: int, dtype: torch.dtype
) -> None:
    args = arguments(case := CASES[name], dtype, bits)
    x, _, zero, w = args[:4]
    one = torch.ones(1)
    packed = avx2_conv.packed(w, case.groups)
    assert packed is not None
    assert packed.panels.is_narrow is (bits == 4)

    sums = OPS.int8_conv(x, one, zero, w, one, None, *case.geometry)
    found = OPS.int8_conv(*args)

    assert torch.equal(sums.double(), exact(x, int(zero), w, case))
    assert torch.equal(found, reference(*args))
    assert found.movedim(1, -1).is_contiguous()


def one_signed(name: str, shape: tuple[int, ...]) -> Tensor:
    """The largest codes whose neighbouring channels are pair-safe."""
    even = (torch.arange(shape[1]) % 2 == 0).reshape(1, -1, *[1] * (len(shape) - 2))
    pair = {"64": (64, 64), "-64": (-64, -64), "127 and 1": (127, 1), "127 and -127": (127, -127)}
    return torch.where(even, *pair[name]).expand(shape).to(torch.int8).contiguous()


@pytest.mark.parametrize("weights", ["64", "-64", "127 and 1", "127 and -127"])
def test_nothing_saturates_with_the_largest_codes(weights: str) -> None:
    one = torch.ones(1)
    for name, case in CASES.items():
        x, w = torch.full(case.x, 255, dtype=torch.uint8), one_signed(weights, case.weight)
        for zero in (0, 255):
            shift = torch.tensor([zero], dtype=torch.int32)

            found = OPS.int8_conv(x, one, shift, w, one, None, *case.geometry)

            assert avx2_conv.packed(w, case.groups) is not None, name
            assert torch.equal(found.double(), exact(x, zero, w, case)), name


def test_pairs_are_those_of_bytes_as_they_are_multiplied() -> None:
    across = torch.zeros(16, 3, 1, 2, dtype=torch.int8)
    across[:, 2, 0, 0] = across[:, 0, 0, 1] = 127  # bytes 2 and 3 of a window
    beside = torch.zeros(16, 3, 1, 2, dtype=torch.int8)
    beside[:, 0] = beside[:, 1] = 127
    safe = torch.full((16, 3, 1, 2), 64, dtype=torch.int8)

    for weight, wide in ((safe, 3), (across, 4), (beside, None)):
        packed = avx2_conv.packed(weight, 1)
        assert (None if packed is None else packed.layout[-1]) == wide
    x, one = torch.full((1, 3, 2, 3), 255, dtype=torch.uint8), torch.ones(1)
    found = OPS.int8_conv(x, one, None, beside, one, None, [1, 1], [0] * 4, [1, 1], 1)
    assert bool((found == 255 * 127 * 4).all())  # by the definition


def outputs(shape: torch.Size) -> dict[str, tuple[Any, ...]]:
    """The op's arguments from the residual on."""
    ones = [1] * (len(shape) - 2)
    one, channels = torch.full((1, 1, *ones), 0.021), torch.rand(1, shape[1], *ones) + 0.01
    zero = torch.full((1, 1, *ones), 7, dtype=torch.int32)
    per_sample = torch.rand(shape[0], 1, *ones) + 0.01
    last = torch.randn(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
    signed = torch.randint(-128, 128, shape, dtype=torch.int8)
    unsigned = torch.randint(0, 256, last.mT.shape, dtype=torch.uint8).mT
    return {
        "residual": (torch.randn(shape), None, None, -128, 127),
        "int8": (None, one, zero, -128, 127),
        "uint8, residual": (last, one, zero + 120, 0, 255),
        "7 bits, per channel": (last, channels, zero.expand_as(channels).contiguous(), -64, 63),
        "no zero-point": (None, one, None, 0, 255),
        "codes as residual": (signed, one, zero, -128, 127, 0.7 * one, zero - 9),
        "codes as residual, fp32": (unsigned, None, None, -128, 127, 1.3 * one, zero + 90),
        "codes as residual, no zero-point": (unsigned, channels, None, 0, 255, one, None),
        "codes of samples": (signed, one, zero, -128, 127, per_sample, zero),
    }


@pytest.mark.parametrize("name", ["odd channels", "groups", "many groups", "1d", "3d", "slabs"])
def test_the_epilogue_is_that_of_the_definition(name: str) -> None:
    case = CASES[name]
    args = arguments(case, torch.uint8)
    plain = reference(*args)
    for (kind, tail), activation in itertools.product(outputs(plain.shape).items(), ACTIVATIONS):
        found, expected = (f(*args, activation, *tail) for f in (OPS.int8_conv, reference))

        assert (found.dtype, found.stride()) == (expected.dtype, expected.stride()), kind
        if activation in ("none", "relu", "relu6"):
            assert torch.equal(found, expected), (kind, activation)
        elif found.dtype == torch.float32:
            torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6)
        else:
            steps = (found.int() - expected.int()).abs()
            assert int(steps.max()) <= 1
            assert float(steps.float().mean()) <= MAX_ROUNDED_SHARE


def test_the_definition_adds_the_residual_before_the_activation() -> None:
    x, one = torch.tensor([[[10]]], dtype=torch.uint8), torch.ones(1)
    w, residual = torch.tensor([[[1]], [[-1]]], dtype=torch.int8), torch.tensor([[[5.0], [25.0]]])
    geometry = ([1], [0, 0], [1], 1)

    for compute in (OPS.int8_conv, reference):
        y = compute(x, one, None, w, one, None, *geometry, "relu6", residual)
        codes = compute(x, one, None, w, one, None, *geometry, "relu", residual, 2 * one)
        assert y.tolist() == [[[6.0], [6.0]]]
        assert codes.tolist() == [[[8], [8]]]  # 7.5 to even


def test_memory_of_the_input_makes_no_difference() -> None:
    case = CASES["asymmetric"]
    args = arguments(case, torch.int8)
    x, expected = args[0], reference(*args)
    spaced = torch.zeros(2, 24, 9, 11, dtype=torch.int8)
    spaced[:, ::2, 1:, 3:] = x
    shifted = torch.zeros(x.numel() + 1, dtype=torch.int8)
    shifted[1:] = x.movedim(1, -1).flatten()
    layouts = (
        x.to(memory_format=torch.channels_last),
        spaced[:, ::2, 1:, 3:],
        x.transpose(2, 3).contiguous().transpose(2, 3),
        shifted[1:].view(2, 8, 8, 12).movedim(-1, 1),
    )
    for layout in layouts:
        assert torch.equal(OPS.int8_conv(layout, *args[1:]), expected)
    expanded = x[:, :, :1].expand(-1, -1, 8, -1)
    assert torch.equal(OPS.int8_conv(expanded, *args[1:]), reference(expanded, *args[1:]))


def test_threads_give_the_same() -> None:
    args = arguments(Case((2, 40, 30, 30), (50, 40, 3, 3), (1, 1), (1,) * 4, (1, 1)), torch.uint8)
    before = torch.get_num_threads()
    found = []
    try:
        for n_threads in (1, 2):
            torch.set_num_threads(n_threads)
            found.append(OPS.int8_conv(*args, "silu", None, torch.ones(1) * 0.03))
    finally:
        torch.set_num_threads(before)

    assert torch.equal(*found)


def test_random_shapes() -> None:
    generator = torch.Generator().manual_seed(0)

    def drawn(low: int, high: int, count: int = 1) -> list[int]:
        return torch.randint(low, high + 1, (count,), generator=generator).tolist()

    for _ in range(60):
        (axes,), (groups,), (c, n) = drawn(1, 3), drawn(1, 4), drawn(1, 9, 2)
        kernel, stride, dilation = (tuple(drawn(1, 3, axes)) for _ in range(3))
        padding, batch = tuple(drawn(0, 3, 2 * axes)), drawn(1, 3)
        reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
        size = [r + extra for r, extra in zip(reach, drawn(0, 6, axes), strict=True)]
        shape, weight = (*batch, groups * c, *size), (groups * n, c, *kernel)
        case = Case(shape, weight, stride, padding, dilation, groups)
        args = arguments(case, torch.uint8)

        assert torch.equal(OPS.int8_conv(*args), reference(*args)), case


@pytest.mark.parametrize("codes", [False, True])
def test_samples_with_scales_of_their_own_have_the_epilogue_too(codes: bool) -> None:
    case = CASES["odd channels"]
    args = arguments(case, torch.uint8)
    args[1] = torch.tensor([0.01, 0.02, 0.01]).reshape(3, 1, 1, 1)
    residual = torch.randn(reference(*args).shape)
    tail = ("relu", residual, *((torch.tensor([0.05]),) if codes else ()))

    assert torch.equal(OPS.int8_conv(*args, *tail), reference(*args, *tail))


def test_op_passes_opcheck() -> None:
    args = arguments(CASES["groups"], torch.uint8)
    tail = outputs(reference(*args).shape)["uint8, residual"]

    opcheck(OPS.int8_conv, (*args, "relu", *tail))


@pytest.mark.parametrize("groups", [1, 2])
def test_the_guard_of_codes_is_that_of_the_values_they_are_of(groups: int) -> None:
    x = torch.randn(3, 6, 9, 7)
    x[1, 2, 3, 3] = torch.nan
    weight = torch.randn(4, 6 // groups, 3, 2)
    scale, codes = torch.full((1, 1, 1, 1), 0.5), torch.zeros(x.shape, dtype=torch.int8)
    y = F.conv2d(F.pad(x, (0, 1, 1, 0)), weight, None, (2, 1), 0, (1, 2), groups)
    for values, result in ((x, y), (x[:1], y[:1])):
        args = (OPS.guard_scale(values, scale), scale, codes[: len(values)], weight.to(torch.int8))
        args = (*args, [2, 1], [1, 0, 0, 1], [1, 2], groups)

        found = OPS.guard_conv_scale(*args)

        expected = OPS.guard_scale(result, scale)
        found = found.expand(expected.shape)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    opcheck(OPS.guard_conv_scale, args)  # compares NaN as unequal: the last has none
    assert 0 < int(OPS.guard_scale(y, scale).isnan().sum()) < y.shape[1] * y.shape[2]
