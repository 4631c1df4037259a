"""Learned rounding: the paper's equations by hand, rounding to nearest before anything is learned,
codes that are kept."""

import math

import pytest
import torch

from fxq import numerics
from fxq.passes.common.convert import quantize_weight
from fxq.passes.common.learned_quantizers import RoundedWeight, position_of, rounding
from fxq.spec import MeanSquaredError, PerChannel, PerGroup, QuantSpec

SPECS = {
    "per channel": QuantSpec(4, granularity=PerChannel(0)),
    "affine": QuantSpec(3, symmetric=False, granularity=PerChannel(0)),
    "in groups": QuantSpec(4, granularity=PerGroup(8)),
    "clipped": QuantSpec(4, granularity=PerChannel(0), observer=MeanSquaredError()),
    "pair-safe": QuantSpec(8, granularity=PerChannel(0), pair_safe=True),
}


def test_rounding_by_hand() -> None:
    # sigmoid(-ln 2) = 1/3, and 1.2 / 3 - 0.1 = 0.3
    share = rounding(torch.tensor([-math.log(2), 0.0, -9.0, 9.0]))
    torch.testing.assert_close(share, torch.tensor([0.3, 0.5, 0.0, 1.0]))
    torch.testing.assert_close(position_of(torch.tensor(0.3)), torch.tensor(-math.log(2)))


def test_indecision_by_hand() -> None:
    module = RoundedWeight(torch.tensor([[0.3, 1.0]]) * 7, QuantSpec(4, granularity=PerChannel(0)))
    # scale 1: shares 0.1 of 2.1, and 0 of 7
    assert module.indecision(2.0).item() == pytest.approx((1 - 0.8**2 + 1 - 1) / 2, abs=1e-5)


@pytest.mark.parametrize("name", SPECS)
def test_before_it_learns_it_is_the_weight_in_train_mode_and_nearest_in_eval(name: str) -> None:
    spec, weight = SPECS[name], torch.randn(6, 16)
    weight[0, :4] = torch.tensor([0.5, 1.5, -0.5, 7.0])  # with scale 1, halves
    codes, scale, zero = quantize_weight(weight, spec)
    module = RoundedWeight(weight, spec)
    clipped = spec.quant_max * numerics.expand_blocks(scale, weight.shape)

    soft = module.train()(weight)
    hard = module.eval()(weight)

    if spec.symmetric:
        expected = weight.clamp(-clipped, clipped)
        torch.testing.assert_close(soft, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(module.codes().codes, codes)
    assert torch.equal(hard, numerics.dequantize(codes, scale, zero, torch.float32))


@pytest.mark.parametrize("name", SPECS)
def test_whatever_it_learns_it_takes_one_of_the_two_neighbours(name: str) -> None:
    spec, weight = SPECS[name], torch.randn(6, 16)
    module = RoundedWeight(weight, spec)
    with torch.no_grad():
        module.position.normal_(std=5)

    fixed = module.codes()

    zero = 0 if fixed.zero_point is None else numerics.expand_blocks(fixed.zero_point, [6, 16])
    place = weight / numerics.expand_blocks(fixed.scale, [6, 16]) + zero
    inside = (place > spec.quant_min) & (place < spec.quant_max)
    off = (fixed.codes.float() - place).abs()
    assert off[inside].max() < 1
    assert off[inside].max() > 0.5  # it did learn something else than nearest
    assert fixed.codes.min() >= spec.quant_min
    assert fixed.codes.max() <= spec.quant_max
    if spec.pair_safe:
        assert numerics.is_pair_safe(fixed.codes)


def test_a_weight_range_by_squared_error_is_the_best_of_its_candidates() -> None:
    weight = torch.randn(5, 40) * torch.linspace(0.1, 3, 5)[:, None]
    weight[:, 0] *= 6  # an outlier that is worth cutting
    spec = QuantSpec(3, granularity=PerChannel(0), observer=MeanSquaredError(steps=50))

    _, scale, _ = quantize_weight(weight, spec)

    for row, found in zip(weight.double(), scale.flatten(), strict=True):
        amax = float(row.abs().max())
        errors = {}
        for k in range(50):
            step = amax * 50 ** (-k / 49) / 3
            value = (row / step).round().clamp(-3, 3) * step
            errors[step] = float((value - row).square().sum())
        best = min(errors, key=errors.__getitem__)
        assert float(found) == pytest.approx(best, rel=1e-5)
        assert float(found) < amax / 3
