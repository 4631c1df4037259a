"""LeaveFloat: what a layer costs the results decides, judged by programs in which it is the only
one that is quantized."""

import pytest
import torch
from torch import Tensor, nn

import fxq
from fxq.account import account
from fxq.numerics import sqnr_db
from fxq.passes import recommended, w8a8
from fxq.passes.common import Calibrate, Convert, InsertObservers, LeaveFloat
from fxq.passes.common.leave_float import costly
from fxq.pipeline import Recipe

LAYER = w8a8.STATIC_LAYER


class Uneven(nn.Module):
    """A narrow layer that the result feels a hundred times as much as its output's size tells."""

    def __init__(self, head: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide, self.up = nn.Linear(32, 256), nn.Linear(256, 32)
        self.narrow, self.head = nn.Linear(32, 8), nn.Linear(32, head)

    def forward(self, x: Tensor) -> Tensor:
        y = self.narrow(x)
        detail = (y - y.mean(-1, keepdim=True)).repeat(1, 1, 4)
        return self.head(self.up(self.wide(x)) + 30 * detail)


def data(seed: int, rows: int = 16) -> Tensor:
    return torch.randn(rows, 5, 32, generator=torch.Generator().manual_seed(seed))


def recipe(*steps: LeaveFloat, **settings: object) -> Recipe:
    observe = InsertObservers(LAYER, **settings)  # type: ignore[arg-type]
    return Recipe("test", (observe, Calibrate(), *steps, Convert()))


def compressed(model: nn.Module, *steps: LeaveFloat, **settings: object) -> fxq.Program:
    batches = [(data(1),), (data(2),)]
    return fxq.compress(model, batches[0], recipe(*steps, **settings), batches)


def errors_of(model: nn.Module, monkeypatch: pytest.MonkeyPatch, **settings: int) -> list[float]:
    """What the pass finds, layer by layer."""
    found: list[list[float]] = []

    def spy(errors: list[float], *_: object) -> list[int]:
        found.append(errors)
        return []

    monkeypatch.setattr("fxq.passes.common.leave_float.costly", spy)
    compressed(model, LeaveFloat(**settings))
    return found[0]


def true_error(model: nn.Module, name: str) -> float:
    """The error of a program in which one layer is quantized, on the data that it is judged on."""
    others = tuple(
        (other, None) for other, m in model.named_modules()
        if isinstance(m, nn.Linear) and other != name
    )  # fmt: skip
    program = compressed(model, overrides=others)
    total = 0.0
    for x in (data(1), data(2)):
        for part in x.split(8):  # as the pass takes them
            exact, found = model(part), program(part)
            total += float(((found - exact).square().sum() / exact.square().sum()).detach())
    return total


def test_the_error_of_a_layer_is_that_of_a_program_with_only_this_layer_quantized(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class OneNumber(nn.Module):
        """Linear up to its result, one number a sample: no sign matters, no second order is."""

        def __init__(self) -> None:
            super().__init__()
            self.model = Uneven(head=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x)[:, 2]

    model = OneNumber().eval()
    found = errors_of(model, monkeypatch, n_directions=1)
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    expected = {name: true_error(model, name) for name in names}
    order = sorted(found)
    torch.testing.assert_close(order, sorted(expected.values()), rtol=2e-3, atol=1e-9)


def test_directions_stand_for_all_numbers_of_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Uneven().eval()
    found = errors_of(model, monkeypatch, n_directions=200)
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    expected = sorted(true_error(model, name) for name in names)
    torch.testing.assert_close(sorted(found), expected, rtol=0.1, atol=0)


def test_what_costs_most_for_its_work_stays_float() -> None:
    model, x = Uneven().eval(), data(3)
    plain, program = compressed(model), compressed(model, LeaveFloat())
    rows = {row.module: row.layer for row in account(program.graph_module)}
    skips = {name: layer.skip for name, layer in rows.items() if layer.skip is not None}
    assert list(skips) == ["narrow", "head"]
    assert skips["narrow"].intended
    assert "of the error in the results, 1." in skips["narrow"].reason
    before, after = (sqnr_db(model(x), p(x)) for p in (plain, program))
    assert after > before + 6
    assert fxq.verify(program, x, model=model).ok


def test_costly_by_hand() -> None:
    errors, work = [6.0, 1.0, 2.0, 1.0], [0.5, 0.02, 0.03, 0.05]
    # shares of the errors 0.6, 0.1, 0.2, 0.1: 1.2, 5, 6.7 and 2 times the work
    assert costly(errors, work, 0.05, 4.0) == [2, 1]
    assert costly(errors, work, 0.2, 4.0) == [2, 1]
    assert costly(errors, work, 0.04, 4.0) == [2]
    assert costly(errors, work, 0.025, 4.0) == [1]
    assert costly(errors, work, 1.0, 1.0) == [2, 1, 3, 0]
    assert costly([0.0, 0.0], [0.5, 0.5], 1.0, 1.0) == []
    assert costly([1.0, 1.0], [0.0, 0.5], 0.1, 1.0) == [0]


@pytest.mark.parametrize(
    "settings",
    [{"most_work": 1.5}, {"most_work": float("nan")}, {"least_gain": 0.0}, {"n_samples": 0},
     {"n_directions": -1}],
)  # fmt: skip
def test_bad_settings(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=rf"LeaveFloat.{next(iter(settings))}: expected"):
        LeaveFloat(**settings)  # type: ignore[arg-type]


@torch.library.custom_op("fxq_test::without_gradient", mutates_args=())
def without_gradient(x: Tensor) -> Tensor:
    """The same values, through an operator that autograd does not know."""
    return x.clone()


@without_gradient.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@pytest.mark.filterwarnings("ignore:this program cannot be saved")
def test_without_a_gradient_every_layer_is_quantized_and_a_warning_says_so() -> None:
    class Custom(Uneven):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(without_gradient(self.up(self.wide(x))))

    x = data(3)
    with pytest.warns(fxq.FxqWarning, match="LeaveFloat: every layer is quantized; which"):
        program = fxq.compress(Custom().eval(), (x,), recipe(LeaveFloat()), [(x,)])
    assert all(row.layer.format for row in account(program.graph_module))


def test_memory_that_runs_out_is_no_missing_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr("fxq.passes.common.leave_float.errors_at_results", full)
    x = data(3)
    with pytest.raises(torch.OutOfMemoryError):
        fxq.compress(Uneven().eval(), (x,), recipe(LeaveFloat()), [(x,)])


def test_under_inference_mode_the_same_layers_stay() -> None:
    model = Uneven().eval()
    with torch.inference_mode():
        program = compressed(model, LeaveFloat())
    kept = [row.module for row in account(program.graph_module) if row.layer.skip]
    assert kept == ["narrow", "head"]


def test_a_graph_whose_batch_is_fixed_is_judged_whole() -> None:
    model, x = Uneven().eval(), data(1)
    program = fxq.compress(model, (x,), recipe(LeaveFloat()), [(x,)], dynamic_shapes=None)
    kept = [row.module for row in account(program.graph_module) if row.layer.skip]
    assert kept == ["narrow", "head"]


def test_the_recommended_recipe_has_it_and_calibration_is_not_disturbed() -> None:
    """With nothing left float the codes are those of the recipe without the pass."""
    model, x = Uneven().eval(), data(3)
    none = LeaveFloat(most_work=0.0)
    assert torch.equal(compressed(model, none)(x), compressed(model)(x))
    assert any(isinstance(step, LeaveFloat) for step in recommended.W8A8.passes)
