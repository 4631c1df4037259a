"""Rows by time-step: chosen from data, merged where ranges are alike, learned without moving each
other, one graph for all steps."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxq
from fxq.errors import MissingInputError
from fxq.lowering.devices import x86
from fxq.numerics import sqnr_db
from fxq.observers import RangeObserver
from fxq.passes.common import (
    Calibrate,
    Convert,
    DecomposeAttention,
    InsertObservers,
    ObserveActivations,
    TimestepRows,
)
from fxq.passes.common.learned_quantizers import StaticActivation
from fxq.passes.common.reconstruction import Reconstruct, StraightThrough
from fxq.passes.common.reconstruction.row_adam import RowAdam
from fxq.passes.common.timestep_rows import Ranges, binned, bounded, merged, widened
from fxq.pipeline import Recipe
from fxq.rows import ByTimestep
from fxq.spec import LayerSpec, PerChannel, QuantSpec

Batches = list[tuple[Tensor, Tensor]]
W8A4 = LayerSpec(QuantSpec(4, symmetric=False), QuantSpec(8, granularity=PerChannel(0)))


class Denoiser(nn.Module):
    """Its layers see what grows with the noise level; it is told of it, and does nothing of it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden, self.head = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.head((self.hidden(x)).relu()) + 0 * timestep[:, None]


def data(steps: Any = range(0, 40, 4), rows: int = 16, seed: int = 0) -> Batches:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(rows, 8, generator=generator) * (1 + t / 4), torch.full((rows,), int(t)))
        for t in steps
    ]


def recipe(*steps: Any, layer: LayerSpec = W8A4) -> Recipe:
    return Recipe("r", (InsertObservers(layer), *steps))


def error(program: nn.Module, batches: Batches) -> float:
    """Mean over time-steps of the error relative to the signal."""
    model = Denoiser().eval()
    with torch.no_grad():
        pairs = [(program(*batch), model(*batch)) for batch in batches]
    ratios = [(a - b).square().sum() / b.square().sum() for a, b in pairs]
    return float(torch.stack(ratios).mean())


def levels_of(program: fxq.Program) -> list[float]:
    (found,) = [b for n, b in program.graph_module.named_buffers() if "levels" in n]
    return found.tolist()


def test_bins_by_hand() -> None:
    counts = Counter({5.0: 2, 1.0: 4, 3.0: 1, 4.0: 1, 9.0: 1})
    assert binned(counts, 1) == [[1], [3], [4], [5], [9]]
    assert binned(counts, 2) == [[1], [3, 4], [5, 9]]  # the last has too few of its own
    assert binned(counts, 100) == [[1, 3, 4, 5, 9]]
    assert bounded([[1.0, 3.0], [4.0], [10.0]], "t") == ByTimestep((3.5, 7.0), "t", known=True)


def test_merging_by_hand() -> None:
    # two ranges: [0, r]. Group (0, 1): the first bin's become 2x and 1x wider, sqrt(2) on average.
    ranges = Ranges(torch.zeros(3, 2), torch.tensor([[1.0, 4.0], [2.0, 4.0], [2.0, 4.0]]))
    assert merged(ranges, 0.4) == [[0], [1, 2]]
    assert merged(ranges, 0.5) == [[0, 1, 2]]
    assert widened(ranges, [[0, 1, 2]]).tolist() == pytest.approx([2**0.5 - 1, 0, 0])
    assert merged(Ranges(torch.zeros(3, 1), torch.zeros(3, 1)), 0.01) == [[0, 1, 2]]  # no values


def test_merging_gives_the_fewest_groups() -> None:
    def valid(ranges: Ranges, cuts: tuple[int, ...]) -> bool:
        groups = [list(range(a, b)) for a, b in zip((0, *cuts), (*cuts, 7), strict=True)]
        return bool((widened(ranges, groups) <= 0.3).all())

    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        high = torch.rand(7, 3, generator=generator) + 0.5
        ranges = Ranges(-torch.rand(7, 3, generator=generator), high)
        every = [tuple(k for k in range(1, 7) if mask >> (k - 1) & 1) for mask in range(64)]
        fewest = min(len(cuts) + 1 for cuts in every if valid(ranges, cuts))
        assert len(merged(ranges, 0.3)) == fewest


def test_every_time_step_has_its_own_range_and_others_the_nearest() -> None:
    batches = data()
    shared, own = (
        fxq.compress(Denoiser().eval(), batches[0], recipe(*steps, Calibrate(), Convert()), batches)
        for steps in ((), (TimestepRows(widening=0),))
    )
    assert levels_of(own) == [4.0 * k + 2 for k in range(9)]
    others = data(seed=1)
    assert error(own, others) < error(shared, others) / 2
    (x, _), (_, t) = others[3], data([13])[0]
    assert torch.equal(own(x, t), own(x, torch.full_like(t, 12)))
    assert not torch.equal(own(x, t), own(x, torch.full_like(t, 16)))
    assert torch.equal(own(x, t + 1000), own(x, torch.full_like(t, 36)))


def test_a_batch_may_mix_time_steps() -> None:
    batches = data()
    steps = (TimestepRows(widening=0), Calibrate(), Convert())
    program = fxq.compress(Denoiser().eval(), batches[0], recipe(*steps), batches)
    x = torch.cat([batch[0] for batch in batches])
    t = torch.cat([batch[1] for batch in batches])
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    alone = torch.cat([program(*batch) for batch in batches])
    torch.testing.assert_close(program(x[order], t[order]), alone[order], rtol=0, atol=1e-6)


def test_alike_time_steps_share_a_row_and_the_loss_is_stated() -> None:
    batches = data(range(0, 1000, 50))  # the range grows by a factor of 240
    lines: list[str] = []
    programs = [
        fxq.compress(
            Denoiser().eval(),
            batches[0],
            recipe(TimestepRows(widening), Calibrate(), Convert()),
            batches,
            progress=lines.append,
        )
        for widening in (0.0, 0.5)
    ]
    rows = [len(levels_of(program)) + 1 for program in programs]
    assert rows[0] == 20
    assert 5 <= rows[1] <= 12
    told = [line for line in lines if "rows of" in line]
    assert "20 rows of 20 time-steps" in told[0]
    assert f"{rows[1]} rows of 20 time-steps, wider than their own by" in told[1]
    assert f"{rows[1]} rows of 20" in str(fxq.report(programs[1]))
    others = data(range(0, 1000, 50), seed=1)
    assert error(programs[1], others) < 1.5**2 * error(programs[0], others)


def test_few_samples_share_a_row() -> None:
    batches = data(range(40), rows=1)
    steps = (TimestepRows(widening=0, fewest_samples=8), Calibrate(), Convert())
    program = fxq.compress(Denoiser().eval(), batches[0], recipe(*steps), batches)
    assert levels_of(program) == [7.5, 15.5, 23.5, 31.5]


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "expected at least one batch, found no data"),
        ([(torch.randn(2, 8), torch.tensor([1.0, float("nan")]))], "'timestep': expected finite"),
    ],
)
def test_bad_data(batches: list[Any], message: str) -> None:
    example = (torch.randn(2, 8), torch.tensor([1.0, 2.0]))
    with pytest.raises(ValueError, match=message):
        fxq.compress(Denoiser().eval(), example, recipe(TimestepRows()), batches)


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="widening: expected a finite number >= 0, found -1"):
        TimestepRows(widening=-1)
    with pytest.raises(ValueError, match="fewest_samples: expected 1 or more, found 0"):
        TimestepRows(fewest_samples=0)
    with pytest.raises(MissingInputError, match=r"no input 'timesteps'.*did you mean 'timestep'"):
        fxq.compress(Denoiser().eval(), data()[0], recipe(TimestepRows(name="timesteps")), data())


class HeadsInTheBatch(nn.Module):
    """Attention whose heads are part of the batch, [B * H, N, D], as before PyTorch 2."""

    def __init__(self, heads: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.heads, self.qkv = heads, nn.Linear(8, 24)

    def split(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        x = x.reshape(b, n, self.heads, c // self.heads).permute(0, 2, 1, 3)
        return x.reshape(b * self.heads, n, c // self.heads)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        q, k, v = map(self.split, self.qkv(x * (1 + timestep[:, None, None])).chunk(3, -1))
        out = torch.bmm((torch.bmm(q, k.transpose(1, 2)) / 2).softmax(-1), v)
        b, n, c = x.shape
        return out.reshape(b, self.heads, n, c // self.heads).permute(0, 2, 1, 3).reshape(b, n, c)


def test_heads_in_the_batch_have_the_row_of_their_sample() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(3, 5, 8, generator=generator), torch.full((3,), float(t))) for t in (0, 1, 9)
    ]
    activation = QuantSpec(8, symmetric=False)
    passes = (
        DecomposeAttention(),
        InsertObservers(LayerSpec(activation, QuantSpec(8, granularity=PerChannel(0)))),
        ObserveActivations(activation, ("operand", "probabilities")),
        TimestepRows(widening=0, fewest_samples=1),
        Calibrate(),
        Convert(),
    )
    model = HeadsInTheBatch().eval()
    program = fxq.compress(model, batches[0], Recipe("r", passes), batches)
    x, t = (torch.cat(parts) for parts in zip(*batches, strict=True))
    order = torch.tensor([0, 3, 6, 1, 4, 7, 2, 5, 8])  # neighbours are of different steps
    alone = torch.cat([program(*batch) for batch in batches])
    torch.testing.assert_close(program(x[order], t[order]), alone[order], rtol=0, atol=1e-6)
    with torch.no_grad():
        assert sqnr_db(model(x, t), program(x, t)) > 30
    targets = [str(node.target) for node in program.graph_module.graph.nodes]
    assert targets.count("aten.repeat_interleave.self_int") == 1


def row_activation(scales: list[float], zero: int = 0) -> StaticActivation:
    spec = QuantSpec(4, symmetric=False, rows=ByTimestep(tuple(range(len(scales) - 1))))
    observer = RangeObserver(spec, (3, 1), "x")
    observer(torch.ones(3, 1), torch.arange(3))
    module = StaticActivation(observer)
    module.found = torch.tensor(scales).reshape(-1, 1, 1)
    module.found_zero = torch.full_like(module.found, zero, dtype=torch.int32)
    return module


def test_rows_by_hand() -> None:
    module = row_activation([0.1, 0.2, 0.4])
    x = torch.full((3, 1), 0.52)
    value = module(x, torch.arange(3))
    torch.testing.assert_close(value.flatten(), torch.tensor([0.5, 0.6, 0.4]))

    module(x, torch.tensor([0, 1, 1])).sum().backward()
    assert module.log_gain.grad is not None
    # d value / d scale = round(x / s) - x / s: -0.2 of the first, twice 0.4 of the second; by
    # logarithms times the scale
    expected = torch.tensor([-0.2 * 0.1, 0.8 * 0.2, 0.0])
    torch.testing.assert_close(module.log_gain.grad.flatten(), expected, atol=1e-6, rtol=1e-4)


def test_a_zero_point_learns_from_what_is_clipped() -> None:
    module = row_activation([0.1, 0.1, 0.1], zero=-4)  # codes -8 to 7: from -0.4 to 1.1
    assert module.zero_shift is not None
    module.train().zero_shift.requires_grad_()
    x = torch.tensor([[0.5], [2.0], [-3.0]])
    before = module(x, torch.arange(3))
    torch.testing.assert_close(before.flatten(), torch.tensor([0.5, 1.1, -0.4]))
    before.sum().backward()
    gradient = module.zero_shift.grad
    assert gradient is not None
    torch.testing.assert_close(gradient.flatten(), torch.tensor([0.0, -0.1, -0.1]))
    with torch.no_grad():
        module.zero_shift.fill_(0.6)
    assert module.zero_point is not None
    assert module.zero_point.flatten().tolist() == [-3, -3, -3]
    with torch.no_grad():
        module.zero_shift.fill_(100)
    assert module.zero_point.flatten().tolist() == [7, 7, 7]


def test_a_step_moves_only_the_rows_it_uses() -> None:
    table = nn.Parameter(torch.zeros(4, 2))
    adam = RowAdam([{"params": [table], "lr": 0.1}])
    table.grad = torch.zeros(4, 2)
    table.grad[2] = torch.tensor([1.0, -2.0])
    adam.step()
    after = table.detach().clone()
    torch.testing.assert_close(after[2], torch.tensor([-0.1, 0.1]))
    table.grad = torch.zeros(4, 2)
    table.grad[0] = 3.0
    adam.step()
    assert torch.equal(table[1:], after[1:])  # Adam itself would have moved row 2 again
    torch.testing.assert_close(table[0], torch.tensor([-0.1, -0.1]))  # its first step, not its 2nd


def test_rows_that_every_step_uses_move_as_under_adam() -> None:
    tables = [nn.Parameter(torch.zeros(3, 2, dtype=torch.float64)) for _ in range(2)]
    adams = [RowAdam([tables[0]], lr=0.01), torch.optim.Adam([tables[1]], lr=0.01)]
    for step in range(20):
        gradient = torch.randn(3, 2, generator=torch.Generator().manual_seed(step)).double()
        for table, adam in zip(tables, adams, strict=True):
            table.grad = gradient.clone()
            adam.step()
    torch.testing.assert_close(tables[0], tables[1])


def test_rows_are_trained_and_what_is_trained_is_converted() -> None:
    # long tails, which the smallest and largest value are a bad range for
    def batches(seed: int) -> Batches:
        return [(x.sign() * x.abs() ** 1.5, t) for x, t in data(rows=64, seed=seed)]

    layer = LayerSpec(QuantSpec(3, symmetric=False), QuantSpec(8, granularity=PerChannel(0)))
    method = StraightThrough(0, 0, activation_learning_rate=0.02, zero_point_learning_rate=0.05)
    train = Reconstruct(steps=100, rows_per_step=256, method=method)
    programs = [
        fxq.compress(
            Denoiser().eval(),
            data()[0],
            recipe(TimestepRows(widening=0), Calibrate(), *steps, Convert(), layer=layer),
            batches(0),
        )
        for steps in ((), (train,))
    ]
    model, (x, t) = Denoiser().eval(), map(torch.cat, zip(*batches(1), strict=True))
    with torch.no_grad():
        errors = [float((program(x, t) - model(x, t)).square().mean()) for program in programs]
    assert errors[1] < 0.8 * errors[0]
    zeros, scales = (
        [dict(program.graph_module.named_buffers())[name] for program in programs]
        for name in ("table_of_zero_points", "table_of_scales")
    )
    assert scales[0].shape == (10, 2)
    assert bool((scales[0] != scales[1]).any(1).all())  # also the one of the batch that judges
    assert not torch.equal(*zeros)


def test_one_compiled_graph_serves_all_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    for limits in ("WITH_VNNI", "WITHOUT_VNNI"):
        monkeypatch.setattr(x86, limits, x86.Thresholds(0, 0))
    batches = data()
    steps = (TimestepRows(widening=0), Calibrate(), Convert())
    program = fxq.compress(Denoiser().eval(), batches[0], recipe(*steps), batches)
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(program, backend="fxq", fullgraph=True)
    with torch.no_grad():
        for x, t in data([36, 4, 4, 0, 13, 8, 500, *range(0, 40, 3)], seed=2):
            torch.testing.assert_close(compiled(x, t), program(x, t), rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
