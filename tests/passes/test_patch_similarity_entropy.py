"""Patch-similarity entropy: hand-computed values, the published numbers, invariances, gradients."""

import math

import pytest
import torch
from torch import Tensor

from fxq.passes.psaq_vit.entropy import (
    Grid,
    bin_samples,
    density,
    differential_entropy,
    patch_similarity_entropy,
    reference_patch_similarity_entropy,
)

FINE = Grid(0.01)


def patches(b: int = 2, n: int = 30, d: int = 16, spread: float = 1.0) -> Tensor:
    return torch.randn(b, 1, n, d) * spread + torch.randn(b, 1, 1, d)


def entropy_of(samples: Tensor, grid: Grid) -> Tensor:
    counts = torch.zeros(1, grid.n_points, dtype=torch.int64)
    bin_samples(samples[None], grid, counts)
    return differential_entropy(density(counts, grid, samples.numel()), grid.step)


def plain(vectors: Tensor, bandwidth: float, points: int = 4000) -> Tensor:
    """The formula written down, in fp64."""
    unit = torch.nn.functional.normalize(vectors.double(), dim=-1)[:, 0]
    above = torch.ones(unit.shape[1], unit.shape[1]).triu(1).bool()
    samples = (unit @ unit.mT)[:, above]
    x = torch.linspace(-1 - 8 * bandwidth, 1 + 8 * bandwidth, points, dtype=torch.float64)
    z = (x[:, None] - samples[:, None]) / bandwidth
    f = torch.exp(-0.5 * z * z).mean(-1) / (bandwidth * math.sqrt(2 * math.pi))
    f = f.clamp(min=1e-300)  # 0 log 0 has no gradient
    return -torch.trapezoid(f * f.log(), x, dim=1)


def test_equal_similarities_have_the_entropy_of_the_kernel() -> None:
    same = torch.ones(1, 1, 10, 4)
    expected = 0.5 * math.log(2 * math.pi * math.e * 0.01**2)  # -3.186232
    torch.testing.assert_close(
        patch_similarity_entropy(same, FINE), torch.tensor([expected]), atol=1e-3, rtol=0
    )


def test_three_patches_by_hand() -> None:
    # Similarities 0 (2 of 9), sqrt(1/2) (4 of 9), 1 (3 of 9), diagonal included.
    samples = torch.tensor([0.0] * 2 + [math.sqrt(0.5)] * 4 + [1.0] * 3)
    assert entropy_of(samples, FINE).item() == pytest.approx(-2.125375, abs=1e-3)


def test_published_estimate_of_three_patches() -> None:
    three = torch.tensor([[[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]]])
    assert reference_patch_similarity_entropy(three).item() == pytest.approx(-2.982782, abs=1e-4)


def test_entropy_grows_with_the_spread_of_similarities() -> None:
    samples = [torch.randn(4000).mul(s).clamp(-1, 1) for s in (0, 0.002, 0.007, 0.02, 0.1)]
    values = [entropy_of(s, FINE).item() for s in samples]
    assert values == sorted(values)


@pytest.mark.parametrize("bandwidth", [0.01, 0.05])
def test_value_and_gradient_are_those_of_the_formula(bandwidth: float) -> None:
    ours, exact = (patches().requires_grad_() for _ in range(2))
    exact.data = ours.data.clone()
    value, expected = patch_similarity_entropy(ours, Grid(bandwidth)), plain(exact, bandwidth)
    torch.testing.assert_close(value.double(), expected, atol=2e-3, rtol=0)
    (g,) = torch.autograd.grad(value.sum(), ours)
    (e,) = torch.autograd.grad(expected.sum(), exact)
    assert torch.nn.functional.cosine_similarity(g.flatten(), e.flatten(), dim=0) > 0.9999
    assert (g - e).norm() / e.norm() < 5e-3  # measured 2e-4 at 196 patches


def test_ten_points_give_another_gradient() -> None:
    """Why the published estimator is not the default."""
    x = patches(1).requires_grad_()
    gradients = [
        torch.autograd.grad(f.sum(), x)[0].flatten()
        for f in (patch_similarity_entropy(x, FINE), reference_patch_similarity_entropy(x))
    ]
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) < 0.9


def test_invariances() -> None:
    x = patches(3).requires_grad_()
    value = patch_similarity_entropy(x)
    (gradient,) = torch.autograd.grad(value.sum(), x, retain_graph=True)
    alone = torch.cat([patch_similarity_entropy(x[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(value, alone, atol=1e-5, rtol=0)
    shuffled = patch_similarity_entropy(x[:, :, torch.randperm(30)])
    torch.testing.assert_close(shuffled, value, atol=1e-4, rtol=0)
    rotation = torch.linalg.qr(torch.randn(16, 16))[0]
    torch.testing.assert_close(patch_similarity_entropy(x @ rotation), value, atol=1e-4, rtol=0)
    scale = torch.rand(3, 1, 30, 1) + 0.5
    torch.testing.assert_close(patch_similarity_entropy(x * scale), value, atol=1e-4, rtol=0)
    along = (gradient * x).sum(-1).abs()
    assert along.max() < 1e-5 * gradient.norm()


def test_tokens_that_are_no_patches_get_no_gradient() -> None:
    x = patches(2, 31).requires_grad_()
    valid = torch.arange(31)[None] > 0
    value = patch_similarity_entropy(x, valid=valid)
    assert torch.equal(value, patch_similarity_entropy(x[:, :, 1:]))
    (gradient,) = torch.autograd.grad(value.sum(), x)
    assert not gradient[:, :, 0].any()
    assert gradient[:, :, 1:].any(-1).all()


def test_windows_pool_pairs_within_each() -> None:
    x = torch.randn(1, 2, 8, 4)
    unit = torch.nn.functional.normalize(x, dim=-1)
    above = torch.ones(8, 8).triu(1).bool()
    samples = (unit @ unit.mT)[0][:, above].flatten()
    torch.testing.assert_close(
        patch_similarity_entropy(x), entropy_of(samples, Grid()), atol=1e-5, rtol=0
    )


def test_tiles_do_not_change_the_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    x = patches(2, 50)
    whole = patch_similarity_entropy(x)
    monkeypatch.setattr("fxq.passes.psaq_vit.entropy.TILE", 64)
    # The products of a tile may differ in the last bit, the counts only then.
    torch.testing.assert_close(patch_similarity_entropy(x), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_collapsed_patches_stay_finite(dtype: torch.dtype) -> None:
    x = torch.zeros(1, 1, 6, 8, dtype=dtype).requires_grad_()
    value = patch_similarity_entropy(x)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    assert value.isfinite().all()
    assert gradient.isfinite().all()


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"expected \[B, W, N, D\]"):
        patch_similarity_entropy(torch.randn(2, 3, 4))
    with pytest.raises(ValueError, match="two or more per window"):
        patch_similarity_entropy(torch.randn(1, 4, 1, 4))
    with pytest.raises(ValueError, match="bandwidth"):
        Grid(0.0)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e18, 1e25])
def test_entropy_does_not_depend_on_scale_at_the_ends_of_fp32(scale: float) -> None:
    patches = torch.randn(2, 1, 16, 8)
    torch.testing.assert_close(
        patch_similarity_entropy(patches * scale),
        patch_similarity_entropy(patches),
        atol=1e-4,
        rtol=0,
    )


def test_what_is_not_finite_gives_nan_for_its_image_alone() -> None:
    patches = torch.randn(2, 1, 16, 8)
    patches[1, 0, 3] = torch.inf
    entropy = patch_similarity_entropy(patches)
    assert entropy[0].isfinite()
    assert entropy[1].isnan()
