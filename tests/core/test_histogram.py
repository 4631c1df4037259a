"""The fixed grid and the ranges found on it, against brute force on the raw values."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxq.histogram import (
    Density,
    bin_edges,
    bin_index,
    divergence,
    fold,
    mantissa_bits,
    n_bins,
    quantization_error,
)
from fxq.numerics import choose_qparams, dequantize, quantize
from fxq.spec import QuantSpec

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


def histogram_of(x: Tensor, bits: int) -> Tensor:
    return torch.bincount(bin_index(x.flatten(), bits), minlength=n_bins(bits)).unsqueeze(0)


def density_of(x: Tensor, bits: int = 7) -> Density:
    low, high = x.min().reshape(1), x.max().reshape(1)
    return Density.of(histogram_of(x, bits), low, high, bits)


def gaussian(n: int = 200_000) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(0))


@settings(deadline=None, max_examples=150)
@given(st.lists(finite, min_size=1, max_size=50), st.sampled_from([4, 5, 6, 7]))
def test_bin_index_is_the_bin_whose_bounds_enclose_the_value(
    values: list[float], bits: int
) -> None:
    x, edges = torch.tensor(values), bin_edges(bits)

    index = bin_index(x, bits).long()

    assert bool((edges[index] <= x.double()).all())
    assert bool((x.double() <= edges[index + 1]).all())
    assert torch.equal(bin_index(-x, bits), 2 * (n_bins(bits) // 2) - bin_index(x, bits))


@pytest.mark.parametrize("bits", [4, 7])
def test_bins_are_no_wider_than_documented(bits: int) -> None:
    edges = bin_edges(bits)[n_bins(bits) // 2 + 1 : -1]

    assert edges[0] == 2.0**-32
    assert bool((edges.diff() / edges[:-1] <= 2.0**-bits).all())
    assert edges[-1] == pytest.approx(2.0**32, rel=2.0**-bits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_falls_into_the_bin_of_its_value(dtype: torch.dtype) -> None:
    x = gaussian(129).to(dtype)

    assert torch.equal(bin_index(x, 7), bin_index(x.float(), 7))


@pytest.mark.parametrize(("entries", "bits"), [(1, 7), (64, 7), (65, 6), (197, 5), (4096, 4)])
def test_memory_stays_as_documented(entries: int, bits: int) -> None:
    assert mantissa_bits(entries) == bits
    assert 8 * entries * n_bins(bits) <= max(2**23, entries * 2**14) + 8 * entries


def test_fold_is_the_histogram_of_magnitudes() -> None:
    x = torch.cat([gaussian(1001), torch.zeros(5)])

    assert torch.equal(fold(histogram_of(x, 5)), histogram_of(x.abs(), 5))


def test_up_to_counts_values_and_quantile_inverts_it() -> None:
    x = gaussian()
    density, points = density_of(x), torch.linspace(-3, 3, 63, dtype=torch.float64)

    rank = density.up_to(points.unsqueeze(0)).T

    expected = torch.searchsorted(x.double().sort().values, points).double()
    assert (rank[:, 0] - expected).abs().max() / len(x) < 1e-3  # a bin holds up to 0.2 % of them
    quantiles = torch.cat([density.quantile(r.unsqueeze(0)) for r in rank])
    torch.testing.assert_close(quantiles, points, rtol=1e-9, atol=1e-4)  # no value near 0


@pytest.mark.parametrize("cut", [1.0, 0.6, 0.2])
@pytest.mark.parametrize("p", [1.0, 2.0, 2.4])
@pytest.mark.parametrize(("bits", "symmetric"), [(8, True), (8, False), (3, True), (3, False)])
def test_quantization_error_matches_the_raw_values(
    bits: int, symmetric: bool, p: float, cut: float
) -> None:
    x, spec = gaussian() + 0.5, QuantSpec(bits, symmetric=symmetric)
    low, high = (cut * x.min()).reshape(1), (cut * x.max()).reshape(1)

    found = quantization_error(density_of(x), low, high, spec, p)

    limits = spec.quant_min, spec.quant_max
    qparams = choose_qparams(low, high, *limits, symmetric=symmetric)
    x_hat = dequantize(quantize(x, *qparams, *limits), *qparams, torch.float32)
    expected = (x_hat - x).abs().double().pow(p).mean()
    torch.testing.assert_close(found[0], expected, rtol=0.01, atol=0)


def raw_divergence(x: np.ndarray, low: float, high: float, spec: QuantSpec) -> float:
    """The docstring's formula, bin by bin, on the values themselves."""
    if spec.symmetric:
        x, low, high, n_codes = np.abs(x), 0.0, max(-low, high), spec.quant_max
    else:
        n_codes = spec.quant_max - spec.quant_min
    n = 16 * n_codes
    s, _ = np.histogram(x, n, (low, high))
    p = s.astype(float)
    p[s.nonzero()[0][0]] += (x < low).sum()
    p[s.nonzero()[0][-1]] += (x > high).sum()
    q = np.zeros(n)
    for code in range(n_codes + 1):
        members = [i for i in range(n) if (i + 8) // 16 == code]
        occupied = [i for i in members if s[i] > 0]
        for i in occupied:
            q[i] = sum(s[j] for j in members) / len(occupied)
    return sum(a / len(x) * math.log(a / b) for a, b in zip(p, q, strict=True) if a)


@pytest.mark.parametrize("cut", [1.0, 0.5, 0.3])
@pytest.mark.parametrize("symmetric", [True, False])
def test_divergence_matches_the_formula_on_the_raw_values(symmetric: bool, cut: float) -> None:
    x = torch.cat([gaussian(), torch.tensor([6.0, -6.0])])
    spec, density = QuantSpec(3, symmetric=symmetric), density_of(x)
    if symmetric:
        amax = x.abs().max().reshape(1)
        density = Density.of(fold(histogram_of(x, 7)), torch.zeros(1), amax, 7)
    low, high = (cut * x.min()).reshape(1), (cut * x.max()).reshape(1)

    found = divergence(density, low, high, spec)

    expected = raw_divergence(x.numpy(), low.item(), high.item(), spec)
    assert found.item() == pytest.approx(expected, rel=0.02)


def test_divergence_counts_values_at_the_bounds_as_inside() -> None:
    x, spec = gaussian().clamp(-1, 2), QuantSpec(3, symmetric=False)

    found = divergence(density_of(x), torch.tensor([-1.0]), torch.tensor([2.0]), spec)

    assert found.item() == pytest.approx(raw_divergence(x.numpy(), -1.0, 2.0, spec), rel=0.02)


def test_divergence_by_hand() -> None:
    x, spec = torch.tensor([1.0, 1.0, 1.0, 8.0]), QuantSpec(4)

    def of(high: float) -> float:
        return divergence(density_of(x), torch.zeros(1), torch.tensor([high]), spec).item()

    assert of(8.0) == pytest.approx(0)  # two values, two codes
    assert of(4.0) == pytest.approx(math.log(4 / 3))  # a quarter joins the bin of the others
    assert of(0.5) == math.inf  # nothing is inside
