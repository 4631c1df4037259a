"""The equations of Sparsity Induction, against numbers found by hand and explicit definitions."""

import math

import pytest
import torch
from optimal_brain import correlated
from torch import Tensor

from fxq.passes.common.second_moments import gram
from fxq.passes.sparsity_induction.equations import (
    absorbed_shift,
    boundary,
    bounded,
    centred,
    gini,
    hoyer,
    log_factor,
    log_norm_slope,
    mask_slope,
    power_iteration,
    spectral_norm_loss,
    spread_start,
    stable_rank,
)


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def with_ones(x: Tensor) -> Tensor:
    return gram(torch.cat([x, torch.ones(len(x), 1)], 1))


def test_a_start_is_the_square_of_median_less_mean_and_never_a_factor_of_zero() -> None:
    skewed, symmetric = doubles(1, 2, 9), doubles(-1, 0, 1)
    both = torch.stack([skewed, symmetric], 1)

    found = spread_start(both.median(0).values, both.mean(0))
    factors = log_factor(found).exp()

    assert found.tolist() == [4, 0]
    assert bool((factors > 0).all())
    assert bool(factors.isfinite().all())
    assert float(factors.prod()) == pytest.approx(1)
    assert log_factor(doubles(0, 0)).tolist() == [0, 0]


def test_a_power_tempers_a_start() -> None:
    found = log_factor(doubles(16, 1), 0.25).exp()

    torch.testing.assert_close(found, doubles(2**0.5, 2**-0.5), rtol=1e-5, atol=0)


def test_factors_have_a_product_of_one_and_are_bounded() -> None:
    assert bounded(doubles(3, 1, 2), 5.0).tolist() == [1, -1, 0]
    # clamp(u - c, -1, 1) sums to 0 at c = 0.5: 1, -0.5, -0.5
    torch.testing.assert_close(bounded(doubles(9, 0, 0), 1.0), doubles(1, -0.5, -0.5))

    found = bounded(5 * torch.randn(40).double(), math.log(8))

    assert abs(float(found.sum())) < 1e-11
    assert float(found.abs().max()) <= math.log(8)


def test_the_mean_is_the_best_shift_and_goes_into_the_bias() -> None:
    x = torch.tensor([[1.0, 4.0], [1.0, 6.0]])
    weight, pruned = doubles(1, 0.1)[None], doubles(1, 0)[None]

    moments, mean = centred(with_ones(x))
    shift = absorbed_shift(weight, pruned, mean)

    assert mean.tolist() == [1, 5]
    assert moments.tolist() == [[0, 0], [0, 2]]
    assert shift.tolist() == [0.5]
    errors = [float((x.double() @ (weight - pruned).T - by).square().mean()) for by in (0.0, shift)]
    assert errors == pytest.approx([0.26, 0.01])


def test_no_other_shift_leaves_less_error() -> None:
    x, change = correlated(100, 6).double(), torch.randn(5, 6).double()
    moments, mean = centred(with_ones(x.float()))

    def error(shift: Tensor) -> float:
        return float(((x - shift) @ change.T).square().sum())

    assert float(((change @ moments) * change).sum()) == pytest.approx(error(mean), rel=1e-5)
    assert all(error(mean) <= error(mean + 0.01 * torch.randn(6)) for _ in range(20))


def test_the_boundary_is_between_what_stays_and_what_goes() -> None:
    scores = doubles(1, 4, 2, 9, torch.nan)
    stays = torch.tensor([False, True, False, True, False])
    goes = torch.tensor([True, False, True, False, False])

    assert boundary(scores, stays, goes).tolist() == [3]
    assert not boundary(scores, stays | goes, stays & goes).isfinite()


def test_a_mask_learns_at_the_boundary_most() -> None:
    found = mask_slope(doubles(0, 1, -1, torch.inf, torch.nan), 8.0)

    assert float(found[0]) == 2.0  # temperature / 4
    soft = 1 / (1 + math.exp(-8))
    assert found[1:3].tolist() == pytest.approx([8 * soft * (1 - soft)] * 2)
    assert found[3:].tolist() == [0, 0]


def test_the_spectral_norm_loss_is_the_papers() -> None:
    found = spectral_norm_loss(doubles(3, 4), 0.1)

    assert float(found) == pytest.approx(0.496585, abs=1e-6)
    assert float(spectral_norm_loss(doubles(3, 4.1), 0.1)) < float(found)
    assert float(spectral_norm_loss(doubles(3.1, 4), 0.1)) < float(found)


def test_power_iteration_finds_the_largest_singular_value() -> None:
    weight, start = torch.randn(9, 14).double(), torch.ones(14).double() / 14**0.5

    norm, vector = power_iteration(weight, start, 200)

    assert float(norm) == pytest.approx(float(torch.linalg.matrix_norm(weight, 2)), rel=1e-4)
    assert float(vector.norm()) == pytest.approx(1)
    zero, stays = power_iteration(0 * weight, start, 3)
    assert float(zero) == 0
    assert torch.equal(stays, start)


@pytest.mark.parametrize("normalized", [True, False])
def test_the_slope_of_a_norm_is_autograds(normalized: bool) -> None:
    weight = torch.randn(9, 14).double()
    u = torch.randn(14).double().requires_grad_()
    scaled = weight * u.exp()
    norm = torch.linalg.matrix_norm(scaled, 2)
    loss = (norm / scaled.norm() if normalized else norm).log()
    loss.backward()  # type: ignore[no-untyped-call]

    right = torch.linalg.svd(scaled.detach()).Vh[0]
    found = log_norm_slope(scaled.detach(), right, normalized)

    torch.testing.assert_close(found, u.grad)
    assert float(found.sum()) == pytest.approx(0 if normalized else 1)


def test_measures_of_sparsity() -> None:
    assert hoyer(doubles(0, 0, 3, 0)) == pytest.approx(1)
    assert hoyer(doubles(1, -1, 1, 1)) == pytest.approx(0)
    assert gini(doubles(1, 1, 1, 1)) == pytest.approx(0)
    assert gini(doubles(0, 0, 0, 5)) == pytest.approx(0.75)
    assert gini(doubles(1, 3)) == pytest.approx(0.25)
    assert (hoyer(doubles(0, 0)), gini(doubles(0, 0))) == (0, 0)


def test_the_stable_rank_is_that_of_the_singular_values() -> None:
    sizes = doubles(5, 3, 2, 1)
    left, right = (torch.linalg.qr(torch.randn(n, 4).double()).Q for n in (6, 9))

    found = stable_rank(left * sizes @ right.T)

    assert found == pytest.approx((25 + 9 + 4 + 1) / 25)
    assert stable_rank(torch.eye(7)) == pytest.approx(7)
    assert stable_rank(torch.zeros(3, 4)) == 0
