"""Rows: which row holds, the ranges that calibration finds for each, and one graph for all."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from row_cases import WEIGHT, quantized, recipe, weight_of
from torch import Tensor, nn

import fxq
from fxq.errors import FxqWarning, SkippedError
from fxq.numerics import sqnr_db
from fxq.observers import RangeObserver
from fxq.passes.common import Calibrate, Convert, InsertObservers, ObserveActivations
from fxq.passes.common.student import student_of
from fxq.pipeline import Recipe
from fxq.program import Program
from fxq.rows import ByPosition, ByStep, ByTimestep, Rows
from fxq.spec import LayerSpec, MovingAverage, Percentile, PerToken, QuantSpec


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (ByTimestep((200.0, 800.0)), 3),
        (ByTimestep.nearest((0, 10, 100)), 3),
        (ByStep(7), 7),
        (ByPosition(5), 5),
    ],
)
def test_number_of_rows(rows: Rows, expected: int) -> None:
    assert rows.count == expected


def test_nearest_puts_the_bounds_half_way() -> None:
    assert ByTimestep.nearest((100, 0, 10)).levels == (5.0, 55.0)


class Denoiser(nn.Module):
    """A layer whose input grows with the noise level."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(16, 8)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.layer(x * (1 + timestep.reshape(-1, 1, 1)))


LEVELS = (0.0, 10.0, 100.0)


def noisy(timestep: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(timestep.numel(), 5, 16, generator=generator), timestep


def by_timestep() -> tuple[nn.Module, Program, list[tuple[Tensor, Tensor]]]:
    data = [noisy(torch.full((4,), t), seed=i) for i, t in enumerate(LEVELS)]
    model = Denoiser().eval()
    rows = ByTimestep.nearest(LEVELS)
    return model, fxq.compress(model, data[0], recipe(rows), data=data), data


def test_each_sample_of_a_batch_is_quantized_in_the_range_of_its_own_time_step() -> None:
    model, program, data = by_timestep()
    # 12 is nearest to 10, 54 too, 56 to 100; a batch may mix them, and be of any size.
    x, timestep = noisy(torch.tensor([0.0, 12.0, 54.0, 56.0, 100.0, 1e6]), seed=9)

    found = program(x, timestep)

    seen = [d[0] * (1 + t) for d, t in zip(data, LEVELS, strict=True)]
    low, high = (
        torch.stack([f(s) for s in seen])[[0, 1, 1, 2, 2, 2]] for f in (torch.amin, torch.amax)
    )
    given = quantized(x * (1 + timestep.reshape(-1, 1, 1)), low[:, None, None], high[:, None, None])
    assert isinstance(model, Denoiser)
    torch.testing.assert_close(found, F.linear(given, weight_of(model.layer), model.layer.bias))


def test_rows_are_far_closer_to_float_than_one_range() -> None:
    model, program, data = by_timestep()
    one = fxq.compress(model, data[0], recipe(None), data=data)

    other = noisy(torch.zeros(4), seed=9)

    # One range is 101 times too wide here: 40 dB.
    assert sqnr_db(model(*other), program(*other)) > sqnr_db(model(*other), one(*other)) + 20


def test_the_program_is_one_graph_saved_verified_and_compiled(tmp_path: Path) -> None:
    model, program, _ = by_timestep()
    x, timestep = noisy(torch.tensor([0.0, 30.0, 100.0]), seed=5)
    graphs: list[Any] = []

    def count(gm: Any, inputs: Any) -> Any:
        graphs.append(gm)
        return torch._dynamo.lookup_backend("fxq")(gm, inputs)

    compiled = torch.compile(program, backend=count, fullgraph=True)
    with pytest.warns(FxqWarning, match="no kernel here"):
        first = compiled(x, timestep)
    second = compiled(x, timestep.flip(0))

    torch.testing.assert_close(first, program(x, timestep))
    torch.testing.assert_close(second, program(x, timestep.flip(0)))
    assert len(graphs) == 1
    fxq.save(program, tmp_path / "p.fxq")
    assert torch.equal(fxq.load(tmp_path / "p.fxq")(x, timestep), program(x, timestep))
    assert fxq.verify(program, (x, timestep), model=model).ok
    (row,) = fxq.report(program).rows
    assert row.row.format == "int8 by timestep x int8"
    assert isinstance(row.row.layer.spec, LayerSpec)


def test_the_scales_of_all_layers_are_gathered_at_once() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            for layer in self.layers:
                x = torch.relu(layer(x)) * (1 + timestep.reshape(-1, 1, 1))
            return x

    data = [noisy(torch.full((4,), t)) for t in LEVELS]
    program = fxq.compress(Deep().eval(), data[0], recipe(ByTimestep.nearest(LEVELS)), data=data)

    calls = [node.target for node in program.graph_module.graph.nodes]

    assert calls.count(torch.ops.aten.bucketize.Tensor) == 1
    assert calls.count(torch.ops.aten.index.Tensor) == 2  # scales, zero-points


def test_a_scalar_time_step_and_one_for_the_whole_batch() -> None:
    model = Denoiser().eval()
    rows = ByTimestep.nearest(LEVELS)
    for timesteps in ([torch.tensor(t) for t in LEVELS], [torch.tensor([t]) for t in LEVELS]):
        data = [(noisy(torch.zeros(4))[0], t) for t in timesteps]
        program = fxq.compress(model, data[0], recipe(rows), data=data)
        for x, t in data:
            assert sqnr_db(model(x, t), program(x, t)) > 35


def test_the_step_that_the_user_counts_chooses() -> None:
    model = nn.Sequential(nn.Linear(16, 8)).eval()
    x = torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(0))
    # Calibration counts no steps: it fills the row of step 0, which stands for all.
    with pytest.warns(FxqWarning, match="reached no value in rows 1, 2: the nearest row"):
        program = fxq.compress(model, x, recipe(ByStep(3)), data=[x])

    outputs = []
    for step in (0, 2, 50):
        fxq.set_step(program, step)
        outputs.append(program(x))

    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


class Decoder(nn.Module):
    """Tokens that grow with their position, as the first ones of a language model do not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(16, 8)

    def forward(self, x: Tensor, cache_position: Tensor) -> Tensor:
        return self.layer(x * (1.0 + cache_position.reshape(*cache_position.shape, 1)))


def test_prefill_and_decode_have_the_same_row_for_the_same_token() -> None:
    model = Decoder().eval()
    x = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(6)
    batch = torch.export.Dim.AUTO
    program = fxq.compress(
        model, (x, positions), recipe(ByPosition(6, "cache_position")), data=[(x, positions)],
        dynamic_shapes=({0: batch, 1: batch}, {0: batch}),
    )  # fmt: skip

    prefill = program(x, positions)

    grown = x * (1.0 + positions[:, None])
    low, high = grown.amin((0, 2))[:, None], grown.amax((0, 2))[:, None]
    expected = F.linear(quantized(grown, low, high), weight_of(model.layer), model.layer.bias)
    torch.testing.assert_close(prefill, expected)
    for t in range(6):
        decoded = program(x[:, t : t + 1], positions[t : t + 1])
        torch.testing.assert_close(decoded, prefill[:, t : t + 1])


def test_positions_of_each_sample() -> None:
    model = Decoder().eval()
    x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[0, 1, 2], [2, 3, 4]])
    every = torch.arange(6).reshape(2, 3)
    program = fxq.compress(
        model, (x, positions), recipe(ByPosition(6, "cache_position")), data=[(x, every)]
    )

    found = program(x, positions)

    grown = x * (1.0 + every[..., None])
    low, high = grown.amin(2).flatten()[positions], grown.amax(2).flatten()[positions]
    given = quantized(x * (1.0 + positions[..., None]), low[..., None], high[..., None])
    torch.testing.assert_close(found, F.linear(given, weight_of(model.layer), model.layer.bias))


def test_each_step_is_calibrated_by_its_own_batches() -> None:
    model = nn.Sequential(nn.Linear(16, 8)).eval()
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    data = [x, 10 * x, 100 * x, 2 * x]  # the fourth is step 0 again

    program = fxq.compress(model, x, recipe(ByStep(3)), data=data)

    for step, seen in enumerate((2 * x, 10 * x, 100 * x)):
        fxq.set_step(program, step)
        given = quantized(seen, seen.amin(), seen.amax())
        expected = F.linear(given, weight_of(model[0]), model[0].bias)
        torch.testing.assert_close(program(seen), expected, rtol=1e-4, atol=1e-4)


def test_a_program_starts_at_the_first_step_after_calibration() -> None:
    model, x = nn.Sequential(nn.Linear(16, 8)).eval(), torch.randn(4, 16)
    program = fxq.compress(model, x, recipe(ByStep(2)), data=[x, 100 * x])

    fresh = program(x)

    fxq.set_step(program, 0)
    assert torch.equal(fresh, program(x))
    assert sqnr_db(model(x), fresh) > 30


def test_counted_along_the_token_axis_it_is_a_static_scale_per_token() -> None:
    model = nn.Sequential(nn.Linear(16, 8)).eval()
    x = (
        torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))
        * torch.arange(1, 7)[:, None]
    )
    by_row = fxq.compress(model, x, recipe(ByPosition(6)), data=[x])
    per_token = fxq.compress(model, x, recipe(None, granularity=PerToken()), data=[x])

    assert torch.equal(by_row(x), per_token(x))


def test_percentiles_of_each_row() -> None:
    rows = ByTimestep((0.5,))
    spec = QuantSpec(rows=rows, observer=Percentile(90.0))
    both = RangeObserver(spec, (4, 5, 16), "both")
    x = torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(0))
    index = torch.tensor([0, 1, 1, 0])

    both(x, index)

    for row in range(2):
        mine = x[index == row]
        limit = mine.abs().flatten().sort().values
        rank = limit[int(0.9 * limit.numel())]
        found = both.qparams()[0][row] * 127
        torch.testing.assert_close(found.flatten()[0], rank, rtol=0.05, atol=0)


def test_states_of_rows_merge_exactly_and_in_any_order() -> None:
    spec = QuantSpec(rows=ByTimestep((0.5, 1.5)), observer=Percentile(99.0))
    generator = torch.Generator().manual_seed(0)
    parts = [(torch.randn(3, 5, 8, generator=generator), torch.tensor([i, 0, 2])) for i in range(3)]
    whole, first, second = (RangeObserver(spec, (3, 5, 8), name) for name in "abc")
    for part in parts:
        whole(*part)
    first(*parts[2])
    second(*parts[1])
    second(*parts[0])

    first.merge(second)

    for a, b in zip(whole.buffers(), first.buffers(), strict=True):
        assert torch.equal(a, b)


def test_training_starts_from_the_rows_that_calibration_found() -> None:
    model, data = Denoiser().eval(), [noisy(torch.full((4,), t)) for t in LEVELS]
    passes = recipe(ByTimestep.nearest(LEVELS)).passes
    gm = fxq.capture(model, data[0]).graph_module
    observed = Recipe("observed", passes[:2]).apply(gm, data)

    student = student_of(observed)
    x, timestep = noisy(torch.tensor([0.0, 10.0, 100.0]))

    found = student(x, timestep)[0]
    torch.testing.assert_close(found, Convert().run(observed).graph_module(x, timestep)[0])


class Flattened(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 8)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.layer(x.flatten(0, 1)) * timestep.sum()


def test_a_layer_that_has_lost_the_batch_stays_float_and_says_so() -> None:
    example = noisy(torch.zeros(4))

    with pytest.raises(SkippedError, match="rows by timestep need the batch first"):
        fxq.compress(
            Flattened().eval(), example, recipe(ByTimestep((1.0,))), data=[example], strict=True
        )


class Timed(nn.Module):
    """Two layers with something between them, and rows for all of it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        x = x * timestep.reshape(-1, 1, 1)
        h = self.a(x) + x
        return self.b(torch.tanh(h)) + h


@pytest.mark.parametrize("rows", [ByTimestep((0.5,)), ByStep(2), ByPosition(8)], ids=str)
def test_rows_of_edges_between_layers(rows: Rows) -> None:
    model, inputs = Timed().eval(), (torch.randn(4, 8, 16), torch.tensor([0.25, 1, 0.25, 1]))
    spec = QuantSpec(rows=rows, symmetric=False)
    passes = (InsertObservers(LayerSpec(spec, WEIGHT)), ObserveActivations(spec))
    both = Recipe("edges", (*passes, Calibrate(), Convert()))

    program = fxq.compress(model, inputs, both, data=[inputs, inputs])

    quantizers = program.graph_module.code.count("torch.ops.fxq.quantize.default")
    assert quantizers == 6  # two inputs, two outputs of layers, two sums
    assert sqnr_db(model(*inputs), program(*inputs)) > 25


def test_an_edge_that_rows_do_not_fit_stays_float_and_is_warned_of() -> None:
    spec = QuantSpec(rows=ByPosition(8))
    passes = (InsertObservers(LayerSpec(None, WEIGHT)), ObserveActivations(spec, ("layer",)))
    model, x = nn.Sequential(nn.Linear(16, 8), nn.Softmax(-1)).eval(), torch.randn(4, 16)

    with pytest.warns(FxqWarning, match="left 1 of 1 edges in float.*along the token axis"):
        program = fxq.compress(model, x, Recipe("edge", (*passes, Calibrate(), Convert())), [x])

    assert "fxq.quantize.default" not in program.graph_module.code


def test_positions_counted_along_a_free_axis_serve_every_length(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 8)).eval()
    x = torch.randn(2, 12, 16) * torch.arange(1, 13)[:, None]
    free = {"input": {0: "b", 1: "t"}}
    short = x[:, :5]

    program = fxq.compress(model, x, recipe(ByPosition(12)), data=[short, x], dynamic_shapes=free)

    for y in (short, x, x[:1, :1], torch.cat([x, x], 1)):
        assert sqnr_db(model(y), program(y)) > 30
    torch.testing.assert_close(program(short), program(x)[:, :5])
    fxq.save(program, tmp_path / "rows.fxq")
    assert torch.equal(fxq.load(tmp_path / "rows.fxq")(short), program(short))


def test_positions_along_a_free_axis_of_edges_in_front_of_the_first_layer() -> None:
    class Embedded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.layer = nn.LayerNorm(16), nn.Linear(16, 16)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            h = x + y
            return h + self.layer(self.norm(h))

    model, inputs = Embedded().eval(), (torch.randn(2, 7, 16), torch.randn(2, 7, 16))
    spec = QuantSpec(rows=ByPosition(7))
    passes = (InsertObservers(LayerSpec(spec, WEIGHT)), ObserveActivations(spec, ("sum",)))
    edges = Recipe("edges", (*passes, Calibrate(), Convert()))
    free = {name: {1: "t"} for name in "xy"}

    program = fxq.compress(model, inputs, edges, data=[inputs], dynamic_shapes=free)

    short = tuple(x[:, :3] for x in inputs)
    assert sqnr_db(model(*short), program(*short)) > 30


@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.Linear(8, 4), (8,)), (nn.Linear(8, 4), (3, 8)),
                         (nn.Conv2d(8, 4, 1), (2, 8, 5, 5))],
)  # fmt: skip
def test_positions_are_not_counted_along_a_batch_or_an_image(
    layer: nn.Module, shape: tuple[int, ...]
) -> None:
    spec = LayerSpec(QuantSpec(rows=ByPosition(5)), WEIGHT)
    rows = Recipe("rows", (InsertObservers(spec, ("linear", "conv")), Calibrate(), Convert()))
    x = torch.randn(shape)

    with pytest.raises(SkippedError, match=r"rows by position (are counted|need)"):
        fxq.compress(layer.eval(), x, rows, data=[x], strict=True, dynamic_shapes=None)


class SequenceFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 8)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.layer((x * timestep.reshape(-1, 1, 1)).transpose(0, 1)).transpose(0, 1)


@pytest.mark.filterwarnings("ignore:recipe .* changed nothing")
@pytest.mark.parametrize(("tokens", "assumed"), [(4, True), (5, False)])
def test_a_batch_that_only_its_size_tells_is_an_assumption_that_the_report_shows(
    tokens: int, assumed: bool
) -> None:
    inputs = (torch.randn(4, tokens, 16), torch.tensor([0.25, 1.0, 0.25, 1.0]))

    program = fxq.compress(
        SequenceFirst().eval(), inputs, recipe(ByTimestep((0.5,))), [inputs], dynamic_shapes=None
    )

    shown = "; ".join(row.reason for row in fxq.report(program).rows)
    assert ("is taken for the batch" in shown) is assumed
    assert ("rows by timestep need the batch first" in shown) is not assumed


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ByTimestep(("a", "b")), "of finite numbers"),  # type: ignore[arg-type]
        (lambda: ByTimestep((float("nan"),)), "of finite numbers"),
        (lambda: ByTimestep((5.0, float("inf"))), "of finite numbers"),
        (lambda: ByTimestep((2.0, 1.0)), "expected a tuple that ascends"),
        (lambda: ByTimestep([1.0]), "expected a tuple that ascends"),  # type: ignore[arg-type]
        (lambda: ByStep(0), "ByStep.count: expected 1 or more"),
        (lambda: ByPosition(2.0), "ByPosition.count: expected 1 or more"),  # type: ignore[arg-type]
        (lambda: QuantSpec(dynamic=True, rows=ByStep(2)), "among ranges that calibration finds"),
        (lambda: QuantSpec(observer=MovingAverage(), rows=ByStep(2)), "use MinMax"),
        (
            lambda: QuantSpec(granularity=PerToken(), rows=ByPosition(2)),
            "a scale for each of them already",
        ),
        (lambda: LayerSpec(None, QuantSpec(rows=ByStep(2))), "use dynamic=False and no rows"),
        (
            lambda: fxq.compress(
                Denoiser().eval(), noisy(torch.zeros(2)), recipe(ByTimestep((1.0,), "sigma")),
                data=[noisy(torch.zeros(2))],
            ),
            r"no input 'sigma' of the model is a tensor",
        ),
        (lambda: fxq.set_step(nn.Linear(2, 2), 1), "expected one whose recipe sets 'step'"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_says_so(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
