"""The quantization arithmetic: hand-computed numbers, and properties over arbitrary floats."""

import pytest
import torch
import torch.ao.quantization.fx._decomposed
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxq import numerics
from fxq.spec import Granularity, PerChannel, PerGroup, PerTensor, PerToken, QuantSpec, block_of

BITS = range(2, 9)
TINY = torch.finfo(torch.float32).tiny

# 2^122 leaves room for a reciprocal that is not denormal and for half a step beyond the range.
floats = st.floats(-(2.0**122), 2.0**122, width=32)
values = st.lists(floats, min_size=1, max_size=20).map(lambda v: torch.tensor(v))
specs = st.builds(QuantSpec, bits=st.sampled_from(BITS), symmetric=st.booleans())


def qparams_of(
    x: Tensor, spec: QuantSpec, block: tuple[int, ...] | None = None
) -> tuple[Tensor, Tensor]:
    block = block or block_of(spec.granularity, x.ndim, dynamic=spec.dynamic)
    low, high = numerics.block_amin_amax(x, block)
    return numerics.choose_qparams(
        low, high, spec.quant_min, spec.quant_max, symmetric=spec.symmetric
    )


def codes_and_values(x: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scale, zero_point = qparams_of(x, spec)
    codes = numerics.quantize(x, scale, zero_point, spec.quant_min, spec.quant_max)
    return codes, numerics.dequantize(codes, scale, zero_point, torch.float32), scale, zero_point


@pytest.mark.parametrize(
    ("bits", "scale"),
    [(2, 6.0), (3, 2.0), (4, 6 / 7), (5, 0.4), (6, 6 / 31), (7, 6 / 63), (8, 6 / 127)],
)
def test_symmetric_qparams_by_hand(bits: int, scale: float) -> None:
    spec = QuantSpec(bits, symmetric=True)

    found, zero_point = numerics.choose_qparams(
        torch.tensor([-6.0, -1.0]), torch.tensor([3.0, 6.0]), spec.quant_min, spec.quant_max,
        symmetric=True,
    )  # fmt: skip

    torch.testing.assert_close(found, torch.tensor([scale, scale]), rtol=2**-22, atol=0)
    assert zero_point.tolist() == [0, 0]
    assert zero_point.dtype == torch.int32


# low=-1, high=3: scale = 4 / (2^b - 1), zero point = round(-2^(b-1) + (2^b - 1) / 4)
@pytest.mark.parametrize(
    ("bits", "scale", "zero_point"),
    [
        (2, 4 / 3, -1),
        (3, 4 / 7, -2),
        (4, 4 / 15, -4),
        (5, 4 / 31, -8),
        (6, 4 / 63, -16),
        (7, 4 / 127, -32),
        (8, 4 / 255, -64),
    ],
)
def test_affine_qparams_by_hand(bits: int, scale: float, zero_point: int) -> None:
    spec = QuantSpec(bits, symmetric=False)

    found, found_zero = qparams_of(torch.tensor([-1.0, 0.5, 3.0]), spec)

    torch.testing.assert_close(found, torch.tensor([scale]), rtol=2**-22, atol=0)
    assert found_zero.tolist() == [zero_point]


@pytest.mark.parametrize(
    ("low", "high", "zero_point"),
    [(1.0, 2.0, -128), (-2.0, -1.0, 127), (0.0, 2.0, -128), (-2.0, 0.0, 127)],
)
def test_affine_range_is_widened_to_hold_zero(low: float, high: float, zero_point: int) -> None:
    scale, found = numerics.choose_qparams(
        torch.tensor(low), torch.tensor(high), -128, 127, symmetric=False
    )

    assert found.item() == zero_point
    assert scale.item() == pytest.approx(2 / 255, rel=2**-22)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_range_that_is_not_finite_has_scale_nan(bad: float, symmetric: bool) -> None:
    low, high = torch.tensor([-bad, -1.0, -1.0]), torch.tensor([1.0, bad, 1.0])

    scale, zero_point = numerics.choose_qparams(low, high, -127, 127, symmetric=symmetric)

    assert scale.isnan().tolist() == [True, True, False]
    assert bool(((zero_point >= -127) & (zero_point <= 127)).all())


def test_guard_scale_by_hand() -> None:
    x = torch.tensor(
        [[[1.0, -3e38], [torch.inf, 0.0]], [[torch.nan, 1.0], [-torch.inf, torch.inf]]]
    )
    scale = torch.tensor([[[0.1], [0.3]]])

    found = numerics.guard_scale(x, scale)

    assert found.shape == (2, 2, 1)
    assert torch.equal(found[0, 0], scale[0, 0])
    assert found.isnan().flatten().tolist() == [False, True, True, True]


@pytest.mark.parametrize("bits", BITS)
def test_quantize_by_hand_rounds_half_to_even_and_clamps(bits: int) -> None:
    spec = QuantSpec(bits, symmetric=True)
    largest = spec.quant_max
    x = torch.tensor([0.0, 0.25, 0.26, 0.5, -0.5, 0.75, -0.75, 1e6, -1e6])

    codes = numerics.quantize(x, torch.tensor([0.5]), None, spec.quant_min, largest)

    expected = [0, 0, 1, 1, -1, min(2, largest), -min(2, largest), largest, -largest]
    assert codes.tolist() == expected
    assert codes.dtype == torch.int8


def test_quantize_and_dequantize_by_hand_affine() -> None:
    scale, zero_point = torch.tensor([0.5]), torch.tensor([3], dtype=torch.int32)

    codes = numerics.quantize(torch.tensor([-6.0, -5.5, 0.0, 2.0, 9.0]), scale, zero_point, -8, 7)
    x_hat = numerics.dequantize(codes, scale, zero_point, torch.float32)

    assert codes.tolist() == [-8, -8, 3, 7, 7]
    assert x_hat.tolist() == [-5.5, -5.5, 0.0, 2.0, 2.0]


def test_quant_max_beyond_127_is_stored_unsigned() -> None:
    scale, zero_point = torch.tensor([1.0]), torch.tensor([128], dtype=torch.int32)

    codes = numerics.quantize(torch.tensor([-128.0, 127.0]), scale, zero_point, 0, 255)

    assert codes.dtype == torch.uint8
    assert codes.tolist() == [0, 255]


def test_groups_by_hand() -> None:
    x = torch.tensor([[0.8, -2.0, 7.0, 0.0], [0.5, 0.1, -3.5, 14.0]])

    scale, _ = qparams_of(x, QuantSpec(4, granularity=PerGroup(2)))
    codes = numerics.quantize(x, scale, None, -7, 7)

    torch.testing.assert_close(scale, torch.tensor([[2 / 7, 1.0], [0.5 / 7, 2.0]]))
    assert codes.tolist() == [[3, -7, 7, 0], [7, 1, -2, 7]]  # 2.8, 1.4 and -1.75 round


@pytest.mark.parametrize(("dynamic", "rows"), [(True, [[1, 2], [8, 4]]), (False, [[8, 4]])])
def test_tokens_by_hand(dynamic: bool, rows: list[list[float]]) -> None:
    x = torch.tensor([[[1.0, 0.0], [-2.0, 1.0]], [[0.0, 8.0], [4.0, -4.0]]]) * 127  # [B, T, C]

    scale, _ = qparams_of(x, QuantSpec(granularity=PerToken(), dynamic=dynamic))

    torch.testing.assert_close(scale, torch.tensor(rows, dtype=torch.float32).unsqueeze(-1))


@settings(deadline=None, max_examples=150)
@given(values, specs)
def test_codes_lie_on_the_grid_and_values_within_half_a_step(x: Tensor, spec: QuantSpec) -> None:
    codes, x_hat, scale, zero_point = codes_and_values(x, spec)

    assert spec.quant_min <= int(codes.min()) <= int(codes.max()) <= spec.quant_max
    assert spec.quant_min <= int(zero_point) <= spec.quant_max
    assert bool(scale >= TINY)
    error = (x.double() - x_hat.double()).abs().max()
    assert error <= (0.5 + 1e-4) * scale.double()  # u = x / scale is off by up to 255 * 2^-22


@settings(deadline=None, max_examples=100)
@given(values, specs)
def test_zero_is_exact(x: Tensor, spec: QuantSpec) -> None:
    scale, zero_point = qparams_of(x, spec)

    codes = numerics.quantize(torch.zeros(1), scale, zero_point, spec.quant_min, spec.quant_max)

    assert codes.item() == zero_point.item()
    assert numerics.dequantize(codes, scale, zero_point, torch.float32).item() == 0


@settings(deadline=None, max_examples=100)
@given(values, specs)
def test_requantizing_dequantized_values_gives_the_same_codes(x: Tensor, spec: QuantSpec) -> None:
    codes, x_hat, scale, zero_point = codes_and_values(x, spec)

    again = numerics.quantize(x_hat, scale, zero_point, spec.quant_min, spec.quant_max)

    assert torch.equal(again, codes)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    "x",
    [
        [0.0, 0.0],
        [3.0, 3.0],
        [-3.0, -3.0],
        [1e-45, 0.0],  # the smallest denormal
        [-1e-40, 1e-40],
        [3e38, -3e38],
        [65504.0, -65504.0],
    ],
)
def test_extreme_ranges_give_a_finite_scale_and_reciprocal(x: list[float], symmetric: bool) -> None:
    scale, zero_point = qparams_of(torch.tensor(x), QuantSpec(8, symmetric=symmetric))

    assert torch.isfinite(scale).all()
    assert torch.isfinite(1 / scale).all()
    assert -128 <= zero_point.item() <= 127


def test_all_zero_range_gets_scale_one() -> None:
    scale, zero_point = qparams_of(torch.zeros(4), QuantSpec(symmetric=False))

    assert scale.item() == 1
    assert -128 <= zero_point.item() <= 127


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_quantized_in_fp32(dtype: torch.dtype) -> None:
    x = torch.linspace(-3, 3, 129).to(dtype)

    half, full = codes_and_values(x, QuantSpec()), codes_and_values(x.float(), QuantSpec())

    for a, b in zip(half, full, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("symmetric", [True, False])
def test_groups_are_channels_of_the_reshaped_tensor_bit_for_bit(symmetric: bool) -> None:
    x = torch.randn(7, 12, generator=torch.Generator().manual_seed(0))

    groups = codes_and_values(x, QuantSpec(symmetric=symmetric, granularity=PerGroup(4)))
    rows = codes_and_values(
        x.reshape(21, 4), QuantSpec(symmetric=symmetric, granularity=PerChannel(0))
    )

    for a, b in zip(groups, rows, strict=True):
        assert torch.equal(a.reshape(b.shape), b)


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(1), PerGroup(3), PerToken()])
def test_block_amin_amax_matches_a_loop_over_the_blocks(granularity: Granularity) -> None:
    x = torch.randn(2, 5, 9, generator=torch.Generator().manual_seed(0))

    low, high = numerics.block_amin_amax(x, block_of(granularity, 3))

    owner = torch.arange(low.numel()).reshape(low.shape)
    owner = numerics.expand_blocks(owner, x.shape).expand(x.shape)
    for index in range(low.numel()):
        assert low.flatten()[index] == x[owner == index].min()
        assert high.flatten()[index] == x[owner == index].max()


def test_expand_blocks_repeats_each_entry_over_its_neighbours() -> None:
    param = torch.tensor([[1.0, 2.0]])

    assert numerics.expand_blocks(param, (3, 6)).tolist() == [[1, 1, 1, 2, 2, 2]]


def test_per_tensor_agrees_with_quantized_decomposed() -> None:
    x = torch.randn(63, 129, generator=torch.Generator().manual_seed(0)) * 3
    codes, x_hat, scale, zero_point = codes_and_values(x, QuantSpec(symmetric=False))
    ops, args = torch.ops.quantized_decomposed, (scale.item(), zero_point.item(), -128, 127)

    theirs = ops.quantize_per_tensor(x, *args, torch.int8)

    assert torch.equal(codes, theirs)
    assert torch.equal(x_hat, ops.dequantize_per_tensor(theirs, *args, torch.int8))


def test_per_channel_agrees_with_quantized_decomposed() -> None:
    x = torch.randn(63, 129, generator=torch.Generator().manual_seed(0)) * 3
    codes, x_hat, scale, zero_point = codes_and_values(x, QuantSpec(granularity=PerChannel(0)))
    ops = torch.ops.quantized_decomposed
    args = (scale.flatten(), zero_point.flatten().long(), 0, -127, 127, torch.int8)

    theirs = ops.quantize_per_channel(x, *args)

    assert torch.equal(codes, theirs)
    assert torch.equal(x_hat, ops.dequantize_per_channel(theirs, *args))


# Rounding is worst where codes fall on ties: multiples of 1/254 of the row's largest magnitude.
tie_rows = st.lists(st.integers(-254, 254), min_size=1, max_size=9).map(
    lambda v: torch.tensor([v], dtype=torch.float32) / 254
)
float_rows = st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=9).map(
    lambda v: torch.tensor([v])
)


@settings(deadline=None, max_examples=200)
@given(st.one_of(tie_rows, float_rows))
def test_pair_safe_amax_keeps_every_int16_pair_sum_exact(weight: Tensor) -> None:
    amax = numerics.pair_safe_amax(weight)
    scale, _ = numerics.choose_qparams(-amax, amax, -127, 127, symmetric=True)

    codes = numerics.quantize(weight, scale.unsqueeze(1), None, -127, 127)

    assert numerics.is_pair_safe(codes)
    assert bool((amax >= weight.abs().amax(1)).all())
    pairs = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2)).long().unflatten(1, (-1, 2))
    worst = torch.stack([255 * pairs.clamp(min=0).sum(-1), 255 * pairs.clamp(max=0).sum(-1)])
    assert bool((worst == worst.to(torch.int16)).all())  # activations are 0 or 255


@pytest.mark.parametrize(
    ("codes", "safe"),
    [
        ([127, 1], True),
        ([127, 2], False),
        ([-127, -2], False),
        ([127, -127], True),
        ([1, 127, 2], True),  # columns 1 and 2 are no pair
        ([1, 1, 64, 65], False),
        ([127], True),
    ],
)
def test_is_pair_safe_by_hand(codes: list[int], safe: bool) -> None:
    found = numerics.is_pair_safe(torch.tensor([codes], dtype=torch.int8))

    assert found is safe


def test_pairs_of_a_convolution_are_channels_at_one_position() -> None:
    safe = torch.tensor([[[127, 127], [1, -127], [100, 90]]], dtype=torch.int8)  # 3 channels
    unsafe = torch.tensor([[[127, 2], [1, 127], [0, 0]]], dtype=torch.int8)  # 129 at the second

    assert numerics.is_pair_safe(safe)
    assert not numerics.is_pair_safe(unsafe)


@pytest.mark.parametrize("shape", [(4, 6, 3, 3), (4, 5, 3), (4, 1, 3, 3), (4, 3, 2, 1, 2)])
def test_pair_safe_amax_of_a_convolution(shape: tuple[int, ...]) -> None:
    weight = torch.rand(shape, generator=torch.Generator().manual_seed(0))  # one-signed

    amax = numerics.pair_safe_amax(weight)

    for row, limit in zip(weight, amax, strict=True):
        pairs = [row[c : c + 2].sum(0).max() for c in range(0, shape[1], 2)]
        assert limit == max([*pairs, row.max()])


def test_sqnr_by_hand() -> None:
    reference = torch.tensor([3.0, 4.0])

    assert numerics.sqnr_db(reference, reference) == float("inf")
    assert numerics.sqnr_db(reference, torch.tensor([3.0, 3.5])) == pytest.approx(20.0)  # 25 / .25


@pytest.mark.parametrize(
    ("reference", "other", "db"),
    [
        ([3.0, 4.0], [3.0, 4.5], 20.0),  # 25 / 0.25
        ([float("nan"), 3.0, 4.0], [float("nan"), 3.0, 4.5], 20.0),
        ([float("inf"), 3.0, 4.0], [float("inf"), 3.0, 4.5], 20.0),
        ([float("nan"), 3.0], [float("nan"), 3.0], float("inf")),
        ([3.0, 4.0], [3.0, float("nan")], float("nan")),
        ([float("nan"), 4.0], [3.0, 4.0], float("nan")),
        ([3.0, 4.0], [float("inf"), 4.0], -float("inf")),
    ],
)
def test_sqnr_takes_equal_nan_and_infinities_as_equal(
    reference: list[float], other: list[float], db: float
) -> None:
    found = numerics.sqnr_db(torch.tensor(reference), torch.tensor(other))

    assert found == pytest.approx(db, nan_ok=True)


def test_sqnr_of_complex_numbers_counts_both_parts() -> None:
    reference = torch.tensor([3 + 4j, 0j])

    assert numerics.sqnr_db(reference, reference) == float("inf")
    other = torch.tensor([3 + 3.5j, 0j])
    assert numerics.sqnr_db(reference, other) == pytest.approx(20.0)  # 25 / .25
    assert numerics.sqnr_db(reference.conj(), other.conj()) == pytest.approx(20.0)
