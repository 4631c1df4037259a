"""EDA-DM's selection: numbers worked out by hand, the equations as loops, and what must hold."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxq.passes.common.apportion import apportion
from fxq.passes.eda_dm import selection
from fxq.passes.eda_dm.selection import MedianRadius, Similarities

# Five steps, one trajectory, two channels, one position.
BY_HAND = torch.tensor([(4, 0), (3, 1), (2, 2), (2, 2.2), (1.8, 2.6)]).reshape(5, 1, 2)


def similar(features: Tensor) -> Similarities:
    found = Similarities(len(features))
    found.add(features)
    return found


def scores_of(features: Tensor, radius: selection.Radius, weight: float) -> Tensor:
    found = similar(features)
    distances = found.distances()
    near = selection.density(distances, selection.resolve_radius(radius, distances))
    return selection.score(near, found.variety, weight)


def test_the_worked_example() -> None:
    found = similar(BY_HAND)

    near = selection.density(found.distances(), 0.3)
    scores = selection.score(near, found.variety, 1.2)

    assert near.tolist() == [0, 0, 2, 2, 2]
    expected = [1.102327, 0.484746, 0.415728, 0.465051, 0.655655]
    torch.testing.assert_close(found.variety, torch.tensor(expected).double(), atol=1e-5, rtol=0)
    expected = [1.2, 0.120627, 1, 1.086204, 1.419331]
    torch.testing.assert_close(scores, torch.tensor(expected).double(), atol=1e-5, rtol=0)
    assert apportion(scores, 100) == [25, 2, 21, 23, 29]
    assert apportion(scores, 1024) == [255, 26, 212, 230, 301]


def by_loops(maps: Tensor, radius: float, weight: float) -> list[float]:
    """The equations as they are printed, on `[T, B, C, H, W]`."""
    n = len(maps)
    near, varied = [0.0] * n, [0.0] * n
    for i in range(n):
        for j in range(n):
            if i != j:
                near[i] += float((maps[i] - maps[j]).square().mean() <= radius)
                cosine = F.cosine_similarity(maps[i], maps[j], dim=1, eps=1e-6)
                varied[i] += float((1 - cosine).sum())
    parts = [
        [(x - min(values)) / (max(values) - min(values)) for x in values]
        for values in (near, varied)
    ]
    return [a + weight * b for a, b in zip(*parts, strict=True)]


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_products_give_what_loops_give(offset: float) -> None:
    torch.manual_seed(0)
    walk = torch.randn(7, 3, 6, 5, 4).cumsum(0) + offset
    distances = similar(places(walk)).distances()
    middle = 1.01 * float(distances.flatten().median())  # no distance is on the border

    found = scores_of(places(walk), middle, 1.2)

    expected = by_loops(walk.double(), middle, 1.2)
    torch.testing.assert_close(found, torch.tensor(expected).double(), atol=1e-9, rtol=1e-6)


def places(maps: Tensor) -> Tensor:
    """`[T, B, C, H, W]` as `[T, P, C]`."""
    return maps.movedim(2, -1).flatten(1, 3)


def test_pieces_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    features = torch.randn(6, 20, 4)
    whole = similar(features)

    monkeypatch.setattr(selection, "BLOCK", 10)  # 2 places at a time, 10 columns
    parts = Similarities(6)
    for part in features.split(7, 1):
        parts.add(part)

    torch.testing.assert_close(parts.distances(), whole.distances())
    torch.testing.assert_close(parts.variety, whole.variety)


def test_the_relative_radius_goes_with_the_features() -> None:
    features = torch.randn(9, 8, 4).cumsum(0)

    one, other = (scores_of(features * scale, MedianRadius(), 1.2) for scale in (1.0, 100.0))
    absolute = [scores_of(features * scale, 3.0, 1.2) for scale in (1.0, 100.0)]

    torch.testing.assert_close(one, other)
    assert not torch.allclose(*absolute)


@pytest.mark.parametrize("radius", [0.3, math.inf, MedianRadius()])
@pytest.mark.parametrize("features", [torch.full((6, 3, 2), 0.7), torch.zeros(6, 3, 2)])
def test_equal_features_give_equal_numbers(features: Tensor, radius: selection.Radius) -> None:
    scores = scores_of(features, radius, 1.2)

    assert apportion(scores, 60) == [10] * 6


def test_an_infinite_radius_leaves_variety_alone() -> None:
    scores = scores_of(BY_HAND, math.inf, 1.2)

    varied = selection.normalised(similar(BY_HAND).variety)
    assert torch.equal(scores, 1.2 * varied)
    assert apportion(scores_of(BY_HAND, math.inf, 0.0), 10) == [2] * 5


def test_steps_in_another_order_have_the_same_numbers() -> None:
    features = torch.randn(11, 6, 4).cumsum(0)
    order = torch.randperm(11)

    numbers = apportion(scores_of(features, MedianRadius(), 1.2), 1000)
    permuted = apportion(scores_of(features[order], MedianRadius(), 1.2), 1000)

    assert permuted == [numbers[i] for i in order]


@pytest.mark.parametrize("total", [1, 3, 10, 11, 13, 999])
def test_numbers_add_up(total: int) -> None:
    scores = torch.rand(11)

    numbers = apportion(scores, total)

    assert sum(numbers) == total
    exact = [total * float(s) / float(scores.sum()) for s in scores]
    assert all(n >= 0 and abs(n - e) < 1 for n, e in zip(numbers, exact, strict=True))


def test_few_samples_of_equal_steps_are_spread_out() -> None:
    assert apportion(torch.ones(8), 4) == [1, 0, 1, 0, 1, 0, 1, 0]


def test_bounds_hold_and_leave_the_rest_in_proportion() -> None:
    scores = torch.tensor([0.0, 1.0, 2.0, 100.0])

    numbers = apportion(scores, 40, floor=2, limit=20)

    # 2 and 20 are at their bounds; the other 18 are as 1 to 2.
    assert numbers == [2, 6, 12, 20]
    assert apportion(scores, 80, limit=20) == [20] * 4
    with pytest.raises(ValueError, match=r"expected 8 to 80 samples \(2 to 20 .*found 81"):
        apportion(scores, 81, floor=2, limit=20)


@pytest.mark.parametrize("n_trajectories", [40, 12, 7])
def test_every_sample_has_a_trajectory_of_its_own_at_its_step(n_trajectories: int) -> None:
    numbers = [5, 0, 7, 6, 2]

    found = selection.assign(numbers, n_trajectories, seed=3)

    assert len({*found}) == len(found) == 20
    assert [sum(step == i for _, step in found) for i in range(5)] == numbers
    used = [sum(t == i for t, _ in found) for i in range(n_trajectories)]
    assert max(used) - min(used) <= 1
    assert found == selection.assign(numbers, n_trajectories, seed=3)
    assert found != selection.assign(numbers, n_trajectories, seed=4)


def test_a_radius_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="expected more than 0, found 0"):
        MedianRadius(0)
