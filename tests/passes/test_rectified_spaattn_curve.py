"""The space-filling curve and the neighbourhood of its blocks."""

import pytest
import torch

from fxq.passes.rectified_spaattn import block_adjacency, curve_order
from fxq.passes.rectified_spaattn.curve import Grid

GRIDS = [(1, 1, 1), (1, 1, 5), (2, 3, 1), (3, 5, 7), (5, 1, 9), (6, 2, 8), (1, 16, 16), (4, 9, 13)]


def coordinates(order: torch.Tensor, grid: Grid) -> torch.Tensor:
    return torch.stack(torch.unravel_index(order, grid), 1)


def test_the_curve_is_the_published_one() -> None:
    order = curve_order((2, 2, 4))

    assert order.tolist() == [0, 4, 12, 8, 9, 13, 5, 1, 2, 6, 14, 10, 11, 15, 7, 3]


@pytest.mark.parametrize("grid", GRIDS)
def test_the_curve_visits_every_token_once_in_steps_of_at_most_two(grid: Grid) -> None:
    order = curve_order(grid)

    assert torch.equal(order.sort().values, torch.arange(torch.Size(grid).numel()))
    steps = coordinates(order, grid).diff(dim=0).abs().sum(1)
    assert bool((steps <= 2).all())
    if all(side % 2 == 0 or side == 1 for side in grid):
        assert bool((steps == 1).all())


def test_a_video_grid_has_compact_blocks_with_few_neighbours() -> None:
    grid = (21, 45, 80)

    order = curve_order(grid)
    adjacency = block_adjacency(grid, order, 128)

    # The figures of the published code's own curve.
    steps = coordinates(order, grid).diff(dim=0).abs().sum(1)
    assert float((steps == 1).float().mean()) == pytest.approx(0.995, abs=5e-4)
    neighbours = adjacency.sum(1)
    assert (int(neighbours.min()), int(neighbours.max())) == (5, 29)
    assert float(neighbours.float().mean()) == pytest.approx(17.3, abs=0.01)


@pytest.mark.parametrize("grid", [(3, 5, 7), (1, 6, 9)])
@pytest.mark.parametrize("curved", [True, False])
def test_adjacency_is_what_26_neighbours_make_it(grid: Grid, curved: bool) -> None:
    order = curve_order(grid) if curved else None
    block_size = 8

    found = block_adjacency(grid, order, block_size)

    raster = torch.arange(torch.Size(grid).numel())
    places = coordinates(raster if order is None else order, grid)
    close = (places[:, None] - places[None]).abs().amax(-1) <= 1  # [S, S]
    n_blocks = -(-len(places) // block_size)
    expected = torch.zeros(n_blocks, n_blocks, dtype=torch.bool)
    for i, j in close.nonzero().tolist():
        expected[i // block_size, j // block_size] = True
    assert torch.equal(found, expected)
    assert torch.equal(found, found.T)
    assert bool(found.diagonal().all())


@pytest.mark.parametrize("grid", [(0, 4, 4), (4, 4), (2, -1, 3)])
def test_an_impossible_grid_is_refused(grid: Grid) -> None:
    with pytest.raises(ValueError, match="expected three sides"):
        curve_order(grid)
