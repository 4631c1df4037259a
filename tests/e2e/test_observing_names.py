"""Calibration of whatever runs: which layer is which, and what is told of those without data."""

import warnings

import pytest
import torch
from observed import LAYER, STATIC, Blocks, TwoHeads, hooked, ranges
from torch import Tensor, nn

import fxq
from fxq.errors import FxqWarning, SkippedError
from fxq.numerics import sqnr_db
from fxq.passes.common import Calibrate, Convert, InsertObservers
from fxq.pipeline import Recipe
from fxq.rows import ByTimestep
from fxq.spec import LayerSpec, QuantSpec


class Cross(nn.Module):
    """Attends to itself or to something else, as the same layers do in some models."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor, other: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.query(x), self.key(x if other is None else other)


@pytest.mark.parametrize("itself_first", [True, False])
def test_layers_that_read_the_same_in_one_graph_only_keep_apart(
    itself_first: bool, every_layer_pays: None
) -> None:
    model, x, small = Cross().eval(), torch.randn(2, 9, 32), torch.randn(2, 9, 32) * 0.01
    calls = [(x,), (small, x)]
    with torch.no_grad(), fxq.observe(model, STATIC) as seen:
        for call in calls if itself_first else calls[::-1]:
            model(*call)

    with torch.no_grad(), hooked(model) as expected:
        for call in calls:
            model(*call)

    for name, range_ in ranges(seen).items():
        torch.testing.assert_close(torch.tensor(range_), torch.tensor(expected[name]))
    fast = torch.compile(model, backend="fxq", options={"recipe": seen.recipe, "strict": True})
    with torch.no_grad():
        for call in calls:
            assert min(map(sqnr_db, model(*call), fast(*call))) > (30 if call[0] is x else 5)


class Functional(nn.Module):
    """Two weights of one module, on both sides of a graph break, and one of the model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.randn(16, 16) / 4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.nn.functional.linear(x * 0.01, self.first)
        torch._dynamo.graph_break()
        return torch.nn.functional.linear(x * 1e4, self.second)


@pytest.mark.parametrize("nested", [True, False])
def test_weights_of_one_module_have_states_of_their_own(nested: bool) -> None:
    model = (nn.Sequential(Functional()) if nested else Functional()).eval()
    x = torch.randn(64, 16)
    with torch.no_grad(), fxq.observe(model, STATIC) as seen:
        model(x)

    prefix = "0." if nested else ""
    assert [x.name for x in seen.layers.values()] == [f"{prefix}first", f"{prefix}second"]
    program = fxq.compress(model, x, seen.recipe)
    assert sqnr_db(model(x), program(x)) > 30


def test_observing_often_leaves_nothing_to_eager(every_layer_pays: None) -> None:
    model, x = nn.Sequential(nn.Linear(16, 16)).eval(), torch.randn(8, 16)
    with torch.no_grad():
        for _ in range(10):  # Dynamo makes eight graphs of a function, and then leaves it alone
            with fxq.observe(model, STATIC) as seen:
                model(x)
        fast = torch.compile(model, backend="fxq", options={"recipe": seen.recipe, "strict": True})
        assert 25 < sqnr_db(model(x), fast(x)) < 80


def test_tied_weights_and_modules_of_two_names_are_found(every_layer_pays: None) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
            self.b.weight = self.a.weight
            self.alias = self.a

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x)) * 10) + self.alias(x * 0.1)

    model, x = Tied().eval(), torch.randn(64, 16)
    with torch.no_grad(), fxq.observe(model, STATIC) as seen:
        model(x)

    assert seen.missed == ()
    program = fxq.compress(model, x, seen.recipe, strict=True)
    assert torch.equal(program(x), fxq.compress(model, x, STATIC, data=[x])(x))
    fast = torch.compile(model, backend="fxq", options={"recipe": seen.recipe, "strict": True})
    with torch.no_grad():
        assert sqnr_db(program(x), fast(x)) > 60


def test_an_exact_name_goes_before_the_end_of_one(every_layer_pays: None) -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.block = nn.Linear(16, 16), Inner()
            nn.init.zeros_(self.fc.weight)
            nn.init.zeros_(self.block.fc.weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.fc(x) + 100)

    model, x = Outer().eval(), torch.randn(4, 16)
    with torch.no_grad(), fxq.observe(model, STATIC) as seen:
        model(x)

    observed = fxq.compress(model, x, seen.recipe, strict=True)

    assert torch.equal(observed(x), fxq.compress(model, x, STATIC, data=[x])(x))


def test_records_of_what_was_seen_differ_where_it_does() -> None:
    model = nn.Sequential(nn.Linear(16, 16)).eval()
    recipes = []
    for scale in (1.0, 2.0, 1.0):
        x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0)) * scale
        with torch.no_grad(), fxq.observe(model, STATIC) as seen:
            model(x)
        recipes.append(repr(seen.recipe))

    assert recipes[0] == recipes[2] != recipes[1]


def test_a_compiled_model_is_refused() -> None:
    refused = pytest.raises(TypeError, match=r"before torch\.compile")
    with refused, fxq.observe(torch.compile(Blocks().eval()), STATIC):
        pass


class Parts(nn.Module):
    """Of which only the first part knows the time-step."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        x = self.first(x * timestep.reshape(-1, 1, 1))
        torch._dynamo.graph_break()
        return self.second(torch.relu(x))


def test_a_part_without_the_time_step_stays_as_it_is_and_is_told(every_layer_pays: None) -> None:
    rows = QuantSpec(symmetric=False, rows=ByTimestep((0.5,)))
    layers = InsertObservers(LayerSpec(rows, LAYER.weight))
    recipe = Recipe("rows", (layers, Calibrate(), Convert()))
    model, x, timestep = Parts().eval(), torch.randn(2, 5, 16), torch.tensor([0.1, 1.0])

    with torch.no_grad(), fxq.observe(model, recipe) as seen:
        model(x, timestep)

    assert [layer.name for layer in seen.layers.values()] == ["first"]
    assert seen.missed == ("second",)
    assert "no input 'timestep'" in str(seen)
    fast = torch.compile(model, backend="fxq", options={"recipe": seen.recipe})
    with torch.no_grad(), pytest.warns(FxqWarning, match="as it is: .*no input 'timestep'"):
        assert 25 < sqnr_db(model(x, timestep), fast(x, timestep)) < 80


def test_an_override_need_not_match_in_every_part(every_layer_pays: None) -> None:
    keep = InsertObservers(LAYER, overrides=(("blocks.1.down", None),))
    recipe = Recipe("keep", (keep, *STATIC.passes[1:]))
    model, x = Blocks().eval(), torch.randn(2, 5, 16)
    with torch.no_grad(), fxq.observe(model, recipe) as seen:
        model(x)

    names = {layer.name for layer in seen.layers.values()}
    assert names == {f"blocks.{i}.{part}" for i in range(3) for part in ("up", "down")} - {
        "blocks.1.down"
    } | {"head"}
    fast = torch.compile(model, backend="fxq", options={"recipe": seen.recipe})
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the name of the layer is not the same in its part
        assert sqnr_db(model(x), fast(x)) > 25


def test_a_layer_without_data_stays_float() -> None:
    model, x = TwoHeads().eval(), torch.randn(2, 5, 16)
    with torch.no_grad(), fxq.observe(model, STATIC) as seen:
        model(x, head=False)
        model(x[:0])

    with pytest.raises(SkippedError, match="head: it had no data while it was observed"):
        fxq.compress(model, x, seen.recipe, strict=True)


def test_rows_that_no_call_reached_are_told() -> None:
    rows = QuantSpec(symmetric=False, rows=ByTimestep((0.5, 5.0)))
    recipe = Recipe("rows", (InsertObservers(LayerSpec(rows, LAYER.weight)), *STATIC.passes[1:]))
    model, x = Parts().eval(), torch.randn(2, 5, 16)

    told = pytest.warns(FxqWarning, match="reached no value in rows 1")
    with told, torch.no_grad(), fxq.observe(model, recipe):
        model(x, torch.tensor([0.1, 9.0]))
