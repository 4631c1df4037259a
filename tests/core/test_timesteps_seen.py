"""Rows that no time-step reaches are told once. The judge is a schedule written out by hand."""

import copy
import pickle
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxq
from fxq import backend
from fxq.errors import FxqWarning
from fxq.passes.common import Calibrate, Convert, InsertObservers
from fxq.pipeline import Recipe
from fxq.program import Program
from fxq.rows import ByTimestep
from fxq.spec import LayerSpec, PerChannel, QuantSpec
from fxq.timesteps_seen import TimestepsSeen

FLUX = (1.0, 0.75, 0.5, 0.25)  # of few steps, divided by 1000
USUAL = tuple(range(981, 0, -20))


def seen(*levels: float) -> TimestepsSeen:
    return TimestepsSeen("timestep", 0, torch.tensor(levels))


def told(watch: TimestepsSeen, steps: Sequence[Any]) -> list[tuple[int, str]]:
    """Return what was told, with the index of the step at which it was."""
    found = []
    for index, step in enumerate(steps):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            watch([torch.as_tensor(step)])
        found += [(index, str(w.message)) for w in caught if w.category is FxqWarning]
    return found


def test_levels_in_another_unit_are_told_once_within_the_first_run() -> None:
    ((step, text),) = told(seen(800.0), FLUX * 3)

    assert step == 3
    assert text == (
        "input 'timestep': expected time-steps in every row of ByTimestep(levels=(800.0,)), found "
        "0.25 to 1 in a run of 4 steps, and none above 800; levels are in the unit of this input: "
        "choose them among the values that it has"
    )


def test_the_other_way_round_they_are_told_when_the_first_run_is_over() -> None:
    ((step, text),) = told(seen(0.2, 0.8), USUAL * 3)

    assert step == len(USUAL)
    assert f"found 1 to 981 in a run of {len(USUAL)} steps" in text
    assert "none up to 0.2 or above 0.2 up to 0.8;" in text


@pytest.mark.parametrize("levels", [(800.0,), (200.0, 800.0), (15.0, 980.0), (600.5,), (1.0,)])
def test_a_usual_run_that_reaches_every_row_is_not_told(levels: tuple[float, ...]) -> None:
    watch = seen(*levels)

    assert not told(watch, USUAL * 2)
    assert watch.done


@pytest.mark.parametrize(
    "steps",
    [
        [(0.2, 0.9), (0.5, 0.1), (0.7, 0.3)] * 4,  # falls once at a time
        [(0.4, 0.9), (0.3, 0.95), (0.2, 0.5), (0.1, 0.9)] * 4,  # the most noise does not fall
        [0.5] * 40,  # one call again and again
        [1.0, 0.5, 0.25] * 5,  # three steps: a trial
        [1.0, 1.0, 0.5, 0.5, 0.25, 0.25],  # each with and without its prompt
    ],
)
def test_calls_that_are_no_run_tell_nothing(steps: Sequence[Any]) -> None:
    assert not told(seen(800.0), steps)


def test_rows_below_may_still_come_and_rows_above_are_told_alone() -> None:
    ((step, text),) = told(seen(100.0, 500.0), USUAL[30:])  # from 381 down

    assert step == 3
    assert "and none above 500;" in text


def test_a_batch_counts_with_all_its_time_steps() -> None:
    watch = seen(200.0, 800.0)

    assert not told(watch, [[900, 10], [900, 300]])
    assert watch.done


def test_the_range_is_that_of_all_samples() -> None:
    ((_, text),) = told(seen(800.0), [(4, 0.5), (3, 2), (2, 1), (1, 1)])

    assert "found 0.5 to 4 " in text


def test_time_steps_are_rounded_as_in_the_graph() -> None:
    steps = [torch.tensor([t], dtype=torch.float64) for t in (0.7, 0.6, 0.5, 0.4)]

    assert len(told(seen(0.7), steps)) == 1  # in fp64 the first is above the level, 0.69999999


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int64])
def test_time_steps_have_any_dtype(dtype: torch.dtype) -> None:
    assert len(told(seen(800.0), [torch.tensor([t], dtype=dtype) for t in (4, 3, 2, 1)])) == 1


class Denoiser(nn.Module):
    """A layer whose input grows with the noise level."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 8)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.layer(x * (1 + timestep.reshape(-1, 1, 1)))


def example(timestep: float) -> tuple[Tensor, Tensor]:
    return torch.randn(2, 5, 16), torch.full((2,), float(timestep))


@pytest.fixture
def program() -> Program:
    spec = QuantSpec(symmetric=False, rows=ByTimestep((800.0,)))
    layer = LayerSpec(spec, QuantSpec(granularity=PerChannel(0)))
    recipe = Recipe("rows", (InsertObservers(layer), Calibrate(), Convert()))
    data = [example(t) for t in (1.0, 900.0)]
    return fxq.compress(Denoiser().eval(), data[0], recipe, data=data)


@pytest.fixture
def without_inductor(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(backend, "compile_fx", lambda gm, *args, **kwargs: gm)
    yield
    torch._dynamo.reset()


def told_by(model: Any, steps: Sequence[float]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        for step in steps:
            x, timestep = example(step)
            model(x=x, timestep=timestep)
    return [str(w.message) for w in caught if "ByTimestep" in str(w.message)]


def copies(program: Program, folder: Path) -> list[Program]:
    fxq.save(program, folder / "p.fxq")
    loaded = fxq.load(folder / "p.fxq")
    return [program, copy.deepcopy(program), pickle.loads(pickle.dumps(program)), loaded]


def test_programs_tell_and_their_copies_tell_anew(program: Program, tmp_path: Path) -> None:
    told_by(program, FLUX[:2])

    found = [told_by(p, FLUX * 2) for p in copies(program, tmp_path)]

    assert list(map(len, found)) == [1, 1, 1, 1]
    assert all("input 'timestep'" in texts[0] for texts in found)


def test_programs_whose_rows_are_reached_tell_nothing(program: Program) -> None:
    assert not told_by(program, USUAL)


@pytest.mark.usefixtures("without_inductor")
def test_compiled_programs_tell_once_too(program: Program) -> None:
    fast = torch.compile(program, backend="fxq", fullgraph=True)

    (text,) = told_by(fast, FLUX * 2)

    assert text.startswith("input 'timestep': expected")
    assert "levels=(800.0,)" in text


def test_a_time_step_that_has_no_value_yet_is_left_out() -> None:
    watch = seen(800.0)

    assert not told(watch, [torch.empty(1, device="meta")])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_device_is_not_waited_for() -> None:
    watch = seen(800.0)
    steps = [torch.tensor([t], device="cuda") for t in (*FLUX, *FLUX)]
    torch.cuda.synchronize()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("error")
        try:
            watch(steps[:1])
            for step in steps[1:4]:
                torch.cuda._sleep(100_000_000)  # the copy is in the queue after it
                watch([step])
            assert not watch.done
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        watch(steps[4:5])

    assert watch.done
    assert [w.category for w in caught] == [FxqWarning]
