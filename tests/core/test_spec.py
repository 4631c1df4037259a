"""Specs: the shape of a scale for every granularity, the code grid, and what is refused."""

from dataclasses import replace
from typing import Any

import pytest

from fxq.formats import Float8, Integer
from fxq.spec import (
    ALL,
    Entropy,
    Granularity,
    MeanSquaredError,
    MovingAverage,
    Percentile,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QuantSpec,
    block_of,
    scale_shape,
)


@pytest.mark.parametrize(
    ("granularity", "dynamic", "shape", "expected"),
    [
        (PerTensor(), False, [2, 63, 129], [1, 1, 1]),
        (PerTensor(), True, [2, 63, 129], [1, 1, 1]),
        (PerTensor(), False, [], []),
        (PerChannel(0), False, [129, 63], [129, 1]),
        (PerChannel(-1), False, [2, 63, 129], [1, 1, 129]),
        (PerChannel(1), False, [8, 4, 3, 3], [1, 4, 1, 1]),
        (PerGroup(3), False, [5, 12], [5, 4]),
        (PerGroup(12), False, [5, 12], [5, 1]),
        (PerToken(), True, [2, 63, 129], [2, 63, 1]),
        (PerToken(), True, [63, 129], [63, 1]),
        (PerToken(), False, [2, 63, 129], [1, 63, 1]),
        (PerToken(), False, [2, 4, 63, 129], [1, 1, 63, 1]),
    ],
)
def test_scale_shape_of_each_granularity(
    granularity: Granularity, dynamic: bool, shape: list[int], expected: list[int]
) -> None:
    block = block_of(granularity, len(shape), dynamic=dynamic)

    assert scale_shape(shape, block) == expected


def test_negative_channel_axis_means_the_same_as_positive() -> None:
    assert block_of(PerChannel(-1), 3) == block_of(PerChannel(2), 3) == (ALL, ALL, 1)


def test_group_that_does_not_divide_raises_with_both_sizes() -> None:
    with pytest.raises(ValueError, match=r"PerGroup\(128\).*divisible by 128, found 4304"):
        scale_shape([8, 4304], block_of(PerGroup(128), 2))


@pytest.mark.parametrize("axis", [2, -3])
def test_channel_axis_outside_the_tensor_raises(axis: int) -> None:
    with pytest.raises(ValueError, match="dimensions"):
        block_of(PerChannel(axis), 2)


def test_static_per_token_without_batch_dimension_raises() -> None:
    with pytest.raises(ValueError, match="found 2 dimensions"):
        block_of(PerToken(), 2)


@pytest.mark.parametrize(
    ("bits", "largest"), [(2, 1), (3, 3), (4, 7), (5, 15), (6, 31), (7, 63), (8, 127)]
)
def test_code_grid_of_every_bit_width(bits: int, largest: int) -> None:
    symmetric, affine = QuantSpec(bits, symmetric=True), QuantSpec(bits, symmetric=False)

    assert (symmetric.quant_min, symmetric.quant_max) == (-largest, largest)
    assert (affine.quant_min, affine.quant_max) == (-largest - 1, largest)


@pytest.mark.parametrize("bits", [1, 9, 0, -8])
def test_unsupported_bit_width_raises(bits: int) -> None:
    with pytest.raises(ValueError, match=f"found {bits}"):
        QuantSpec(bits)


@pytest.mark.parametrize(
    "options",
    [
        {"symmetric": False, "granularity": PerChannel(0)},
        {"granularity": PerTensor()},
        {"granularity": PerChannel(1)},
    ],
)
def test_pair_safe_needs_symmetric_rows(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="pair_safe needs"):
        QuantSpec(pair_safe=True, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (MovingAverage, {"momentum": 0.0}),
        (MovingAverage, {"momentum": 1.5}),
        (Percentile, {"percent": 50.0}),
        (Percentile, {"percent": 100.1}),
        (MeanSquaredError, {"p": 0.0}),
        (MeanSquaredError, {"steps": 0}),
        (Entropy, {"steps": 0}),
        (PerGroup, {"size": 0}),
    ],
)
def test_hyper_parameter_out_of_range_raises(kind: type, options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        kind(**options)


def test_equal_specs_are_one_key() -> None:
    assert (
        len({QuantSpec(4, granularity=PerGroup(32)), QuantSpec(4, granularity=PerGroup(32))}) == 1
    )


@pytest.mark.parametrize("found", ["e4m3", 8, Integer])
def test_a_format_is_one_of_ours(found: Any) -> None:
    with pytest.raises(TypeError, match=r"QuantSpec.format: expected Integer or Float8"):
        QuantSpec(format=found)


def test_bits_and_another_format_contradict_each_other() -> None:
    with pytest.raises(ValueError, match=r"found bits=4 with Integer\(bits=8\)"):
        QuantSpec(bits=4, format=Integer(8))

    assert QuantSpec(bits=4, format=Integer(4)).bits == 4


def test_replace_takes_bits_and_format_as_they_are() -> None:
    assert replace(QuantSpec(), bits=4).format == Integer(4)
    assert replace(QuantSpec(bits=4), format=Integer(6)).bits == 6
    assert replace(QuantSpec(bits=4), format=Float8()).format == Float8()
    assert replace(QuantSpec(bits=4), symmetric=False).bits == 4
