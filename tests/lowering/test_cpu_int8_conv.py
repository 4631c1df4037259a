"""int8 convolutions on x86 are exact for weights whose pairs are safe, with every instruction set.

The judge is the sum over kernel positions in int64, written out.
"""

import functools
import itertools
import json
import math
import os
import subprocess
import sys
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import fxq.ops  # noqa: F401  registers guard_scale
from fxq.lowering.cpu.int8_conv import can_launch, launch
from fxq.lowering.cpu.onednn import cpu_int8
from fxq.lowering.int8_conv import reference
from fxq.numerics import is_pair_safe, sqnr_db

needs_x86 = pytest.mark.skipif(not cpu_int8().convolves, reason="no oneDNN int8 on this CPU")
# Where oneDNN takes AVX2 in its place, the test has been run.
needs_avx512 = pytest.mark.skipif(not torch.cpu._is_avx512_supported(), reason="no AVX512")


class Case(NamedTuple):
    """A convolution: batch, channels in and out, groups, then a number per axis, padding two."""

    b: int
    c: int
    n: int
    groups: int
    size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    @property
    def geometry(self) -> tuple[Any, ...]:
        return [*self.stride], [*self.padding], [*self.dilation], self.groups


CASES = {
    "1x1": Case(1, 64, 33, 1, (7, 7), (1, 1), (1, 1), (0, 0, 0, 0), (1, 1)),
    "3x3": Case(2, 16, 32, 1, (9, 8), (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
    "odd channels": Case(3, 7, 9, 1, (9, 9), (3, 3), (2, 2), (1, 1, 1, 1), (1, 1)),
    "three channels": Case(2, 3, 17, 1, (15, 15), (7, 7), (2, 2), (3, 3, 3, 3), (1, 1)),
    "one channel": Case(1, 1, 4, 1, (5, 5), (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
    "groups": Case(2, 24, 16, 2, (6, 9), (3, 3), (1, 2), (1, 1, 0, 0), (1, 1)),
    "groups of five": Case(1, 15, 6, 3, (6, 6), (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
    "depthwise": Case(2, 24, 24, 24, (9, 9), (3, 3), (2, 2), (1, 1, 1, 1), (1, 1)),
    "depthwise times two": Case(1, 5, 10, 5, (9, 9), (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
    "dilated": Case(1, 17, 8, 1, (12, 12), (3, 3), (1, 1), (2, 2, 3, 3), (2, 3)),
    "asymmetric": Case(2, 12, 8, 1, (8, 8), (4, 2), (1, 1), (1, 2, 0, 1), (1, 1)),
    "padding beyond the kernel": Case(1, 8, 8, 1, (3, 3), (2, 2), (1, 1), (3, 3, 3, 3), (1, 1)),
    "1d": Case(2, 33, 12, 1, (40,), (5,), (3,), (2, 2), (1,)),
    "1d, dilated, asymmetric": Case(1, 6, 9, 3, (21,), (4,), (1,), (4, 5), (3,)),
    "3d": Case(1, 10, 8, 1, (5, 4, 6), (2, 3, 1), (1, 2, 1), (1, 1, 0, 0, 0, 0), (1, 1, 1)),
    "sums beyond 2^24": Case(1, 600, 4, 1, (6, 6), (3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
}  # fmt: skip
WEIGHTS = ("all 64", "all -64", "127 and 1", "mixed signs", "random")


def safe_weight(name: str, shape: tuple[int, ...]) -> Tensor:
    """Codes whose pairs of channels sum to 128 at most, as close to it as can be."""
    even = (torch.arange(shape[1]) % 2 == 0).reshape(1, -1, *[1] * (len(shape) - 2))
    match name:
        case "all 64":
            values = torch.full(shape, 64)
        case "all -64":
            values = torch.full(shape, -64)
        case "127 and 1":
            values = torch.where(even, 127, 1).expand(shape)
        case "mixed signs":
            values = torch.where(even, 127, -127).expand(shape)
        case _:
            values = torch.randint(-64, 65, shape)
    return values.to(torch.int8).contiguous()


def by_hand(x: Tensor, zero: int, weight: Tensor, case: Case) -> Tensor:
    """Sum over groups and kernel positions in int64."""
    widths = [case.padding[2 * i : 2 * i + 2] for i in range(len(case.size))]
    full = [s + sum(w) for s, w in zip(case.size, widths, strict=True)]
    around = torch.zeros(case.b, case.c, *full, dtype=torch.int64)
    inner = tuple(slice(w[0], w[0] + s) for s, w in zip(case.size, widths, strict=True))
    around[(..., *inner)] = x.long() - zero
    out = [
        (f - d * (k - 1) - 1) // s + 1
        for f, d, k, s in zip(full, case.dilation, case.kernel, case.stride, strict=True)
    ]
    results = []
    for xs, ws in zip(
        around.chunk(case.groups, 1), weight.long().chunk(case.groups, 0), strict=True
    ):
        total = torch.zeros(case.b, len(ws), *out, dtype=torch.int64)
        for position in itertools.product(*map(range, case.kernel)):
            starts = [p * d for p, d in zip(position, case.dilation, strict=True)]
            seen = tuple(
                slice(a, a + (o - 1) * s + 1, s)
                for a, o, s in zip(starts, out, case.stride, strict=True)
            )
            total += torch.einsum("bc...,nc->bn...", xs[(..., *seen)], ws[(..., *position)])
        results.append(total)
    return torch.cat(results, 1)


def wrong() -> list[list[object]]:
    """Return the cases whose accumulators are not exact on this machine."""
    torch.manual_seed(0)
    found: list[list[object]] = []
    one = torch.ones(1)
    for (name, case), kind in itertools.product(CASES.items(), WEIGHTS):
        weight = safe_weight(kind, (case.n, case.c // case.groups, *case.kernel))
        assert is_pair_safe(weight)
        for zero in (0, 137):
            x = torch.randint(0, 256, (case.b, case.c, *case.size), dtype=torch.uint8)
            x[0] = 255
            exact = by_hand(x, zero, weight, case).float()
            shift = torch.tensor([zero], dtype=torch.int32)
            signed = (x.int() - 128).to(torch.int8)
            unsigned_y = torch.ops.fxq.int8_conv(x, one, shift, weight, one, None, *case.geometry)
            signed_y = torch.ops.fxq.int8_conv(
                signed, one, shift - 128, weight, one, None, *case.geometry
            )
            if not (torch.equal(unsigned_y, exact) and torch.equal(signed_y, exact)):
                found.append([name, kind, zero])
    return found


def saturating_pairs(channels: int, positions: int, groups: int) -> list[list[int]]:
    """Return which two elements of a kernel, as channel and position each, oneDNN cannot add."""
    elements = list(itertools.product(range(channels), range(positions)))
    pairs = list(itertools.combinations(range(len(elements)), 2))
    n_out = math.ceil(len(pairs) / groups) * groups
    weight = torch.zeros(n_out, len(elements), dtype=torch.int8)
    for row, pair in enumerate(pairs):
        weight[row, list(pair)] = 127
    weight = weight.reshape(n_out, channels, positions)
    x = torch.full((1, channels * groups, 9), 255, dtype=torch.uint8)
    y = launch(x, 1.0, 0, weight, torch.ones(1), None, [1], [0], [1], groups)
    bad = (y != 2 * 127 * 255).any(2)[0, : len(pairs)]
    return [
        [*elements[a], *elements[b]] for (a, b), is_bad in zip(pairs, bad, strict=True) if is_bad
    ]


@functools.cache
def probe(isa: str) -> dict[str, Any]:
    env = os.environ | ({"ONEDNN_MAX_CPU_ISA": isa} if isa != "native" else {})
    command = [sys.executable, "-W", "ignore", __file__]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


@needs_x86
@pytest.mark.parametrize("isa", ["native", "AVX2", pytest.param("AVX512_CORE", marks=needs_avx512)])
def test_accumulators_are_exact_with_every_instruction_set(isa: str) -> None:
    assert probe(isa)["wrong"] == []


@needs_x86
def test_avx2_saturates_at_neighbouring_channels_of_one_position_only() -> None:
    found = probe("AVX2")

    for channels in (7, 8):
        expected = [[c, p, c + 1, p] for c in range(0, channels - 1, 2) for p in range(2)]
        assert found[f"{channels} channels"] == expected
    assert found["depthwise"] == []


SAMPLES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": torch.randn(8)},
    "no zero-point": {"x_zero_point": None},
    "guarded": {"x_scale": torch.full((2, 6, 5, 1), 0.5)},
    "a scale per sample": {
        "x_scale": torch.tensor([0.5, 0.25]).reshape(2, 1, 1, 1),
        "bias": torch.randn(8),
    },
    "a zero-point per sample": {
        "x_scale": torch.tensor([0.5, 0.25]).reshape(2, 1, 1, 1),
        "x_zero_point": torch.tensor([3, 17], dtype=torch.int32).reshape(2, 1, 1, 1),
        "bias": torch.randn(8),
    },
    "equal ones per sample": {
        "x_scale": torch.full((2, 1, 1, 1), 0.5),
        "x_zero_point": torch.full((2, 1, 1, 1), 9, dtype=torch.int32),
    },
    "scale per tensor": {"w_scale": torch.rand(1, 1, 1, 1)},
    "groups": {"weight": torch.randint(-64, 65, (8, 3, 3, 2)).to(torch.int8), "groups": 2},
}


def sample(dtype: torch.dtype, **changes: Any) -> tuple[Any, ...]:
    low, high = (0, 256) if dtype == torch.uint8 else (-128, 128)
    values = {
        "x": torch.randint(low, high, (2, 6, 5, 7)).to(dtype),
        "x_scale": torch.tensor([[[[0.5]]]]),
        "x_zero_point": torch.tensor([[[[low + 100]]]], dtype=torch.int32),
        "weight": torch.randint(-64, 65, (8, 6, 3, 2)).to(torch.int8),
        "w_scale": torch.rand(8, 1, 1, 1),
        "bias": None,
        "stride": [1, 2],
        "padding": [1, 1, 0, 1],
        "dilation": [2, 1],
        "groups": 1,
    }
    return tuple((values | changes).values())


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8], ids=str)
@pytest.mark.parametrize("changes", SAMPLES)
def test_op_equals_reference(changes: str, dtype: torch.dtype) -> None:
    args = sample(dtype, **SAMPLES[changes])

    found = torch.ops.fxq.int8_conv(*args)

    expected = reference(*args)
    assert found.stride() == expected.stride()
    assert sqnr_db(expected, found) >= 120.0


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8], ids=str)
@pytest.mark.parametrize(
    "changes", [pytest.param(s, marks=[pytest.mark.slow] * (s != "guarded")) for s in SAMPLES]
)
def test_op_passes_opcheck(changes: str, dtype: torch.dtype) -> None:
    opcheck(torch.ops.fxq.int8_conv, sample(dtype, **SAMPLES[changes]))


@pytest.mark.parametrize("spoiled", [False, True])
@pytest.mark.parametrize("rows", [[0, 0, 0], [0, 1, 0], [2, 1, 0]])
def test_each_sample_has_its_scale_and_zero_point(rows: list[int], spoiled: bool) -> None:
    scales, zeros = torch.tensor([0.5, 0.03, 2.0]), torch.tensor([0, 137, 255], dtype=torch.int32)
    scale = scales[rows].reshape(3, 1, 1, 1)
    zero = zeros[rows].reshape(3, 1, 1, 1)
    values = torch.randn(3, 6, 9, 7)
    if spoiled:
        values[1, 2, 3, 3] = torch.nan
    codes = torch.randint(0, 256, values.shape, dtype=torch.uint8)
    weight, w_scale = torch.randint(-64, 65, (4, 6, 3, 3)).to(torch.int8), torch.rand(4, 1, 1, 1)
    guarded = torch.ops.fxq.guard_scale(values, scale)
    geometry = ([2, 1], [1, 1, 0, 1], [1, 1], 1)

    found = torch.ops.fxq.int8_conv(codes, guarded, zero, weight, w_scale, None, *geometry)

    x = (codes.double() - zero) * torch.where(guarded.isnan(), torch.nan, scale.double())
    around = torch.nn.functional.pad(x, (0, 1, 1, 1))
    expected = torch.conv2d(around, weight.double() * w_scale.double(), None, (2, 1))
    assert torch.equal(found.isnan(), expected.isnan())
    assert bool(found.isnan().any()) is spoiled
    exact, got = (y.nan_to_num(0) for y in (expected, found.double()))
    torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max()))


@pytest.mark.parametrize(("groups", "width"), [(1, 3), (2, 3), (1, 1)])
def test_an_output_that_reads_a_spoiled_row_is_nan_and_no_other(groups: int, width: int) -> None:
    values = torch.randn(2, 6, 9, 7)
    values[0, 1, 2, 3] = torch.inf
    values[1, 5, 8, 0] = torch.nan
    codes = torch.randint(0, 256, values.shape, dtype=torch.uint8)
    weight = torch.randint(-64, 65, (4, 6 // groups, width, width)).to(torch.int8)
    scale = torch.ops.fxq.guard_scale(values, torch.full((1, 1, 1, 1), 0.5))
    pad = width // 2
    geometry = ([2, 1], [pad] * 4, [1, 1], groups)

    found = torch.ops.fxq.int8_conv(codes, scale, None, weight, torch.ones(1), None, *geometry)

    dequantized = torch.ops.fxq.dequantize(codes, scale, None, torch.float32)
    expected = torch.conv2d(dequantized, weight.float(), None, (2, 1), pad, 1, groups)
    assert 0 < int(found.isnan().sum()) < found.numel()
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(0), expected.nan_to_num(0))


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same values in other memory."""
    b, c, h, w = x.shape
    spaced = torch.zeros(b, 2 * c, h + 1, w + 3, dtype=x.dtype)
    spaced[:, ::2, 1:, 3:] = x
    shifted = torch.zeros(x.numel() + 1, dtype=x.dtype)
    shifted[1:] = x.flatten()
    return {
        "contiguous": x,
        "channels last": x.to(memory_format=torch.channels_last),
        "strided": spaced[:, ::2, 1:, 3:],
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
        "misaligned": shifted[1:].view(b, c, h, w),
        "expanded": x[:, :, :1].expand(-1, -1, h, -1),
    }


def test_memory_of_the_input_makes_no_difference() -> None:
    args = sample(torch.uint8)
    for name, x in layouts(args[0]).items():
        expected = torch.ops.fxq.int8_conv(x.clone().contiguous(), *args[1:])

        assert torch.equal(torch.ops.fxq.int8_conv(x, *args[1:]), expected), name


@pytest.mark.parametrize("batch", [0, 1])
def test_any_batch(batch: int) -> None:
    args = sample(torch.uint8)
    guarded = torch.full((batch, 6, 5, 1), 0.5)

    y = torch.ops.fxq.int8_conv(args[0][:batch], guarded, *args[2:])

    assert y.shape == (batch, 8, 3, 4)
    torch.testing.assert_close(y, torch.ops.fxq.int8_conv(*args)[:batch], rtol=0, atol=0)


def test_reference_by_hand() -> None:
    x = torch.tensor([[[10, 20, 30]]], dtype=torch.uint8)
    zero = torch.tensor([5], dtype=torch.int32)
    weight = torch.tensor([[[1, 2]]], dtype=torch.int8)
    half, two = torch.tensor([0.5]), torch.tensor([2.0])

    y = reference(x, half, zero, weight, two, torch.tensor([1.0]), [2], [1, 0], [1], 1)

    # (0, 5) . (1, 2) = 10 and (15, 25) . (1, 2) = 65, times 0.5 * 2, plus 1.
    assert y.tolist() == [[[11.0, 66.0]]]


@needs_x86
def test_unsafe_weights_are_computed_by_the_definition_where_onednn_would_saturate() -> None:
    weight = torch.full((4, 8, 3, 3), 127, dtype=torch.int8)
    x = torch.full((1, 8, 5, 5), 255, dtype=torch.uint8)
    one = torch.ones(1)

    y = torch.ops.fxq.int8_conv(x, one, None, weight, one, None, [1, 1], [0] * 4, [1, 1], 1)

    assert can_launch(x, weight) is not cpu_int8().saturates
    assert bool((y == 255 * 127 * 72).all())


@needs_x86
def test_a_weight_written_in_place_is_seen() -> None:
    args = sample(torch.uint8)
    before = torch.ops.fxq.int8_conv(*args)

    args[3].neg_()

    assert torch.equal(torch.ops.fxq.int8_conv(*args), -before)


if __name__ == "__main__":
    pairs = {f"{n} channels": saturating_pairs(n, 2, 1) for n in (7, 8)}
    pairs["depthwise"] = saturating_pairs(1, 4, 64)
    print(json.dumps({"wrong": wrong(), **pairs}))
