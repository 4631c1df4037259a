"""Distribution-guided calibration: distances against scikit-learn's, and what is kept."""

import pytest
import torch
from sklearn.covariance import ledoit_wolf
from torch import Tensor, nn

from fxq.passes.ptq4arvg import choose, mahalanobis, pooled_features
from fxq.passes.ptq4arvg.calibration import shrinkage


def features(n: int, dims: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(-1, 1, dims)
    return torch.randn(n, dims, generator=generator) * scales + 3.0


@pytest.mark.parametrize(("n", "dims"), [(200, 12), (31, 31), (20, 64)])
def test_distances_are_those_of_the_shrunk_covariance(n: int, dims: int) -> None:
    x = features(n, dims)

    found = mahalanobis(x)

    array = x.double().numpy()
    covariance, delta = ledoit_wolf(array)
    centred = x.double() - x.double().mean(0)
    assert shrinkage(centred) == pytest.approx(delta, rel=1e-9)
    inverse = torch.linalg.inv(torch.from_numpy(covariance))
    expected = (centred @ inverse * centred).sum(1).sqrt()
    torch.testing.assert_close(found, expected)


def test_fewer_samples_than_dimensions_still_have_an_order() -> None:
    x = features(32, 100)
    x[7] = x.mean(0) + 5 * (x[7] - x.mean(0))

    found = mahalanobis(x)

    # Of the plain covariance's pseudo-inverse all would be at (N - 1) / sqrt(N) = 5.48.
    assert float(found.max() / found.min()) > 1.3
    assert int(found.argmax()) == 7


@pytest.mark.parametrize("shape", [(40, 8), (16, 50)])
def test_the_order_of_samples_changes_nothing(shape: tuple[int, int]) -> None:
    x = features(*shape)
    x[5] = x[3]  # two of the same
    strata = [index % 3 for index in range(len(x))]
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))

    distance, chosen = mahalanobis(x[order]), choose(x[order], strata=[strata[i] for i in order])

    assert torch.equal(distance, mahalanobis(x)[order])
    kept, expected = x[order][chosen], x[choose(x, strata=strata)]
    assert torch.equal(kept.sort(0).values, expected.sort(0).values)


def test_the_most_distant_half_is_kept() -> None:
    x = features(21, 6)

    chosen = choose(x)

    distance = mahalanobis(x)
    others = [i for i in range(21) if i not in chosen]
    assert len(chosen) == 11
    assert chosen == sorted(chosen)
    assert float(distance[chosen].min()) > float(distance[others].max())


def test_of_samples_equally_far_the_order_does_not_decide() -> None:
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])

    kept = [y[choose(y, 1)].tolist() for y in (x, x.flip(0), x.roll(1, 0))]

    assert kept[0] == kept[1] == kept[2]


def test_strata_give_their_shares_and_their_own_most_distant() -> None:
    x = features(30, 5)
    strata = ["a"] * 18 + ["b"] * 9 + ["c"] * 3

    chosen = choose(x, 10, strata)

    distance = mahalanobis(x)
    for name, share in (("a", 6), ("b", 3), ("c", 1)):
        mine = torch.tensor([i for i in range(30) if strata[i] == name])
        expected = mine[distance[mine].argsort(descending=True)[:share]]
        assert sorted(expected.tolist()) == [i for i in chosen if strata[i] == name]


def test_what_is_kept_covers_more_of_the_range_than_chance() -> None:
    """Conditional samples with heavy tails and near duplicates without a class: the half that is
    kept against halves by chance, in the error of the 0.1 and 99.9 % range of the population."""

    def draw(n: int, generator: torch.Generator) -> Tensor:
        normal = torch.randn(n // 2, 24, generator=generator)
        chi = torch.randn(n // 2, 4, generator=generator).square().sum(1, keepdim=True) / 4
        duplicates = 0.05 * torch.randn(n // 2, 24, generator=generator)
        return torch.cat([normal / chi.sqrt(), duplicates])

    population = draw(40_000, torch.Generator().manual_seed(99))
    low, high = (population.quantile(q, 0) for q in (0.001, 0.999))
    errors = torch.zeros(2)
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        x = draw(256, generator)
        by_chance = torch.randperm(256, generator=generator)[:128]
        for index, chosen in enumerate((torch.tensor(choose(x)), by_chance)):
            kept = x[chosen]
            off = (kept.quantile(0.001, 0) - low).abs() + (kept.quantile(0.999, 0) - high).abs()
            errors[index] += float((off / (high - low)).mean()) / 10

    assert errors[0] < 0.95 * errors[1]


def test_identical_samples_are_all_alike() -> None:
    x = torch.full((6, 4), 2.5)

    assert mahalanobis(x).tolist() == [0.0] * 6
    assert choose(x) == [0, 1, 2]
    assert mahalanobis(x[:1]).tolist() == [0.0]
    assert shrinkage(torch.zeros(6, 4, dtype=torch.float64)) == 1.0
    assert bool(mahalanobis(features(2, 3)).isfinite().all())


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x))


def test_features_are_means_over_tokens() -> None:
    model = Tokens().eval()
    data = [torch.randn(3, 5, 4), torch.randn(2, 5, 4)]

    found = pooled_features(model, data, "block")

    torch.testing.assert_close(found, torch.cat([model.block(x).mean(1) for x in data]))


def test_bad_input_is_refused() -> None:
    x = features(8, 3)
    model = Tokens().eval()

    with pytest.raises(ValueError, match=r"expected \[samples, dimensions\], found shape \[8\]"):
        mahalanobis(x[:, 0])
    with pytest.raises(ValueError, match="expected finite values, found 1 NaN or Inf"):
        mahalanobis(torch.where(torch.arange(24).reshape(8, 3) == 5, torch.nan, x))
    with pytest.raises(ValueError, match="count: expected 1 to 8 samples, found 9"):
        choose(x, 9)
    with pytest.raises(ValueError, match="strata: expected one for each of 8 samples, found 2"):
        choose(x, strata=[0, 1])
    with pytest.raises(ValueError, match="no submodule 'blok'; did you mean 'block'"):
        pooled_features(model, [torch.randn(1, 5, 4)], "blok")
    with pytest.raises(ValueError, match="batches: expected at least one, found none"):
        pooled_features(model, [], "block")
