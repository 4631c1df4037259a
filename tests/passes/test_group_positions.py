"""Positions that share a range: which do, what it costs, and that rows and ranges are right."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxq
from fxq.numerics import sqnr_db
from fxq.observers import RangeObserver
from fxq.passes.common import Calibrate, Convert, GroupPositions, InsertObservers
from fxq.passes.common.group_positions import group_positions, shared_range_cost
from fxq.pipeline import Recipe
from fxq.rows import EVERY, ByPosition
from fxq.spec import LayerSpec, MeanSquaredError, PerChannel, QuantSpec

WEIGHT = QuantSpec(granularity=PerChannel(0))


def recipe(rows: ByPosition, *, grouped: bool = True) -> Recipe:
    layer = LayerSpec(QuantSpec(symmetric=False, rows=rows, observer=MeanSquaredError()), WEIGHT)
    group = [GroupPositions()] if grouped else []
    return Recipe("test", (InsertObservers(layer), *group, Calibrate(), Convert()))


def tokens(scales: Tensor, n: int, seed: int = 0) -> Tensor:
    """Samples whose tokens have given sizes `[n, T, 64]`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, len(scales), 64, generator=generator) * scales[:, None]


def ranges(x: Tensor) -> Tensor:
    return torch.stack([x.amin(2), -x.amax(2)], -1)


def sizes(x: Tensor, bits: int = 8) -> list[int]:
    groups = group_positions(ranges(x), x.shape[2], 2**bits - 1, 0.1, symmetric=False)
    assert bool((groups.diff() >= 0).all())
    return groups.bincount().tolist()


@pytest.mark.parametrize("bits", [6, 8])
@pytest.mark.parametrize("n", [2, 12])
def test_a_sink_token_stands_alone(n: int, bits: int) -> None:
    scales = torch.ones(64)
    scales[0] = 30.0

    assert sizes(tokens(scales, n), bits) == [1, 63]


def test_tokens_that_are_alike_share_one_range() -> None:
    assert sizes(tokens(torch.ones(64), 12)) == [64]


def test_scales_of_a_next_scale_model_are_found() -> None:
    steps = [1, 4, 9, 16, 25]
    scales = torch.cat([torch.full((n,), 4.0 ** (i % 2)) for i, n in enumerate(steps)])

    assert sizes(tokens(scales, 64), 6) == steps


def test_one_sample_supports_one_range_and_identical_ones_several() -> None:
    scales = torch.ones(16)
    scales[0] = 30.0
    x = tokens(scales, 1)

    assert sizes(x) == [16]
    assert sizes(x.expand(4, -1, -1))[0] == 1


def test_zeros_stay_finite() -> None:
    assert sizes(torch.zeros(4, 8, 16)) == [8]
    x = tokens(torch.ones(16), 12)
    x[:, 3] = 0.0  # says nothing, and stands for no range of its own
    assert sizes(x) == [16]


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_cost_by_hand(symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, 5, generator=generator).double()
    low, high = x.amin(2), x.amax(2)
    weight = torch.tensor([2.0, 0.5], dtype=torch.float64)

    found = shared_range_cost(low, high, weight, 5, 15, symmetric=symmetric)

    costs = []
    for cut in (1.0, 0.9, 0.8, 0.7, 0.6):
        total = 0.0
        for j in range(3):
            others = x[[i for i in range(3) if i != j]]
            bottom, top = cut * float(others.min()), cut * float(others.max())
            if symmetric:
                top = max(top, -bottom)
                bottom = -top
            for p in range(2):
                up, down = float(high[j, p]), float(low[j, p])
                if symmetric:
                    up = max(up, -down)
                    down = -up
                over = max(0.0, up - top) + max(0.0, bottom - down)
                clipped = over**2
                total += float(weight[p]) * (5 * ((top - bottom) / 15) ** 2 / 12 + clipped)
        costs.append(total)
    assert found == pytest.approx(min(costs))


def test_positions_that_a_sample_lacks_cost_nothing() -> None:
    x = tokens(torch.ones(4), 6).double()
    low, high = x.amin(2), x.amax(2)
    weight = torch.ones(4, dtype=torch.float64)
    low[2, 1:], high[2, 1:] = torch.inf, -torch.inf

    found = shared_range_cost(low, high, weight, 64, 255, symmetric=True)

    bounds = torch.maximum(high, -low)
    total = []
    for cut in (1.0, 0.9, 0.8, 0.7, 0.6):
        cost = 0.0
        for j in range(6):
            top = cut * float(torch.cat([bounds[:j], bounds[j + 1 :]]).max())
            for value in bounds[j].tolist():
                if value != -torch.inf:
                    cost += 64 * (2 * top / 255) ** 2 / 12 + (2 * max(0.0, value - top)) ** 2
        total.append(cost)
    assert found == pytest.approx(min(total))


def test_a_range_that_one_sample_alone_has_costs_infinitely() -> None:
    low, high = torch.full((3, 1), torch.inf), torch.full((3, 1), -torch.inf)
    low[0], high[0] = -1.0, 1.0

    assert shared_range_cost(low, high, torch.ones(1), 4, 255, symmetric=False) == torch.inf


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(64, 32)

    def forward(self, x: Tensor, cache_position: Tensor | None = None) -> Tensor:
        if cache_position is not None:
            x = x + 0.0 * cache_position[:, None]  # there are as many as tokens
        return self.layer(x)


def planted() -> Tensor:
    scales = torch.ones(32)
    scales[0], scales[16:] = 30.0, 4.0
    return scales


def test_twelve_samples_are_enough_where_positions_share_rows() -> None:
    model = Layer().eval()
    data = [tokens(planted(), 12)]
    held_out = tokens(planted(), 12, seed=1)

    programs = [
        fxq.compress(model, data[0], recipe(ByPosition(EVERY), grouped=grouped), data=data)
        for grouped in (True, False)
    ]

    with torch.no_grad():
        exact = model(held_out)
        rest = [sqnr_db(exact[:, 1:16], program(held_out)[:, 1:16]) for program in programs]
    # In one range for all positions the tokens after the first would lose 20 log10(30) = 30 dB.
    assert rest[0] > rest[1] + 0.5
    assert rest[0] > 38
    (row,) = fxq.report(programs[0]).rows
    assert "32 positions in 3 ranges" in row.row.layer.remarks
    shuffled = held_out[:, torch.arange(31, -1, -1)]
    with torch.no_grad():
        lost = sqnr_db(model(shuffled), programs[0](shuffled))
    assert lost < 15  # a table by position is of no use where positions are not theirs


def test_prefill_and_decode_have_the_same_rows() -> None:
    model, x = Layer().eval(), tokens(planted(), 12)
    positions = torch.arange(32)
    rows = ByPosition(32, "cache_position")
    dim = torch.export.Dim.DYNAMIC
    program = fxq.compress(
        model, (x, positions), recipe(rows), data=[(x, positions)],
        dynamic_shapes=({0: dim, 1: dim}, {0: dim}), strict=True,
    )  # fmt: skip

    prefill = program(x, positions)

    for t in (0, 1, 15, 16, 31):
        decoded = program(x[:, t : t + 1], positions[t : t + 1])
        torch.testing.assert_close(decoded, prefill[:, t : t + 1])
    beyond = program(x[:, 31:], positions[31:] + 100)  # the last row holds beyond the table
    torch.testing.assert_close(beyond, prefill[:, 31:])


def test_calibration_may_be_decode_steps() -> None:
    model, x = Layer().eval(), tokens(planted(), 12)
    positions = torch.arange(32)
    dim = torch.export.Dim.DYNAMIC
    shapes = ({0: dim, 1: dim}, {0: dim})
    steps = [(x[:, t : t + 1], positions[t : t + 1]) for t in range(32)]
    rows = ByPosition(32, "cache_position")

    found, whole = (
        fxq.compress(
            model, (x, positions), recipe(rows), data=data, dynamic_shapes=shapes, strict=True
        )
        for data in (steps, [(x, positions)])
    )

    both = [program(x, positions) for program in (found, whole)]
    exact = F.linear(x, model.layer.weight, model.layer.bias)
    assert abs(sqnr_db(exact, both[0]) - sqnr_db(exact, both[1])) < 1.0


def test_a_layer_without_tokens_has_one_range() -> None:
    model = nn.Sequential(nn.Linear(16, 8)).eval()
    x = torch.randn(8, 16)

    program = fxq.compress(model, x, recipe(ByPosition(EVERY)), data=[x], strict=True)

    (row,) = fxq.report(program).rows
    assert "one scale for all rows: no token axis" in row.row.layer.remarks


def test_shared_rows_are_checked() -> None:
    observer = RangeObserver(QuantSpec(rows=ByPosition(4)), (2, 4, 8), "edge")

    with pytest.raises(ValueError, match="groups at edge: expected a number from 0 on for each"):
        observer.share_rows(torch.tensor([0, 0, 2, 2]))
    with pytest.raises(ValueError, match=r"an observer needs a number of rows, found .* at edge"):
        RangeObserver(QuantSpec(rows=ByPosition(EVERY)), (2, 4, 8), "edge")
    with pytest.raises(ValueError, match=r"GroupPositions\.tolerance: expected >= 0, found -1"):
        GroupPositions(-1.0)


def test_shared_rows_have_the_range_of_all_of_them() -> None:
    spec = QuantSpec(rows=ByPosition(4))
    observer, other = (RangeObserver(spec, (2, 4, 8), "edge") for _ in range(2))
    x = torch.randn(2, 4, 8)
    observer.share_rows(torch.tensor([0, 1, 1, 1]))

    observer(x, torch.arange(4))

    scale, _ = observer.qparams()
    expected = torch.stack([x[:, :1].abs().amax(), *[x[:, 1:].abs().amax()] * 3]) / 127
    torch.testing.assert_close(scale.flatten(), expected)
    with pytest.raises(ValueError, match="same spec, scale shape and shared rows"):
        observer.merge(other)
