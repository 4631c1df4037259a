"""What calibration batches hold, and what is said of those that say little."""

import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxq
from fxq import FxqWarning
from fxq.calibrate import all_alike
from fxq.passes import smoothquant, w8a8
from fxq.samples import Samples

ROW = torch.tensor([[1.0, 2.0, 3.0]])
ALIKE: dict[str, list[Sequence[Any]]] = {
    "one sample": [(ROW,)],
    "one again and again": [(ROW.repeat(4, 1),), (ROW.repeat(2, 1),)],
    "with a time for all": [(ROW.repeat(4, 1), torch.tensor(7)), (ROW, torch.tensor(7))],
    "with a number": [(ROW, 7), (ROW, 7)],
    "none": [],
}
DIFFERENT: dict[str, list[Sequence[Any]]] = {
    "rows": [(torch.cat([ROW, ROW + 1]),)],
    "batches": [(ROW.repeat(4, 1),), (ROW + 1,)],
    "one between": [(ROW,), (ROW + 1,), (ROW,)],
    "lengths": [(ROW,), (torch.ones(1, 4),)],
    "times": [(ROW, torch.tensor(7)), (ROW, torch.tensor(8))],
    "numbers": [(ROW, 7), (ROW, 8)],
    "second inputs": [(ROW.repeat(2, 1), torch.tensor([0, 1]))],
}


@pytest.mark.parametrize("batches", ALIKE.values(), ids=ALIKE)
def test_samples_that_are_alike_are_known(batches: list[Sequence[Any]]) -> None:
    assert all_alike(batches)
    assert not Samples(batches).differ


@pytest.mark.parametrize("batches", DIFFERENT.values(), ids=DIFFERENT)
def test_samples_that_differ_are_known(batches: list[Sequence[Any]]) -> None:
    assert not all_alike(batches)
    assert Samples(batches).differ


@pytest.mark.parametrize("theirs", [[ROW + 1], [ROW, torch.tensor(7)], []])
def test_other_processes_have_samples_too(
    theirs: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "fxq.calibrate.gather", lambda mine: [mine, (len(theirs), False, theirs or [])]
    )
    mine = [(ROW, torch.tensor(7))] if len(theirs) == 2 else [(ROW,)]

    assert all_alike(mine) == (not theirs or theirs[0] is ROW)


def test_spreads_are_those_of_batches() -> None:
    samples = Samples([(torch.tensor([[1.0, 3.0]]), torch.tensor([1])), (torch.full((2, 2), 6.0),)])

    assert samples.count == 3
    assert samples.spreads == {0: (0.0, 1.0)}  # whole numbers are no measurements


def test_one_number_a_sample_is_no_measurement() -> None:
    """Time-steps, conditions: of few samples they may spread anyhow."""
    times = [
        (torch.randn(4, 3), torch.tensor([1.0, 900.0, 20.0, 3.0])),
        (torch.randn(1, 3), torch.tensor(5.0)),
    ]

    assert list(Samples(times).spreads) == [0]


def block() -> nn.Module:
    """A norm whose channels differ by a factor of 30, in front of a linear layer."""
    norm = nn.LayerNorm(32)
    norm.weight.data *= torch.logspace(0, 1.5, 32)
    return nn.Sequential(norm, nn.Linear(32, 32)).eval()


@pytest.mark.parametrize("repeats", [1, 8])
def test_no_factor_is_judged_on_one_sample(repeats: int) -> None:
    model, image = block(), torch.randn(1, 64, 32)
    data = [(image.repeat(repeats, 1, 1),)] * 2
    found = "found 2 samples" if repeats == 1 else "found 16 samples that are all alike"

    with pytest.warns(FxqWarning, match=found):
        program = fxq.compress(model, image, smoothquant.W8A8, data=data)
    with pytest.warns(FxqWarning, match=found):
        plain = fxq.compress(model, image, w8a8.STATIC, data=data)

    x = torch.randn(4, 64, 32)
    assert torch.equal(program(x), plain(x))
    (linear,) = (row.row.layer for row in fxq.report(program).rows)
    assert "SmoothQuant saw one sample only" in linear.remarks


def warned(model: nn.Module, example: Tensor, data: Tensor) -> list[str]:
    """Return what is said while a model is compressed."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fxq.compress(model, example, smoothquant.W8A8, data=[(data,)])  # reads them three times
    return [str(w.message) for w in caught]


def test_data_normalised_otherwise_than_the_example_are_told() -> None:
    pixels = torch.rand(16, 64, 32)
    pixels = pixels / pixels.std() * 0.25
    normalised = (pixels - pixels.mean()) / 0.25

    (told,) = warned(block(), normalised, pixels)

    assert "deviation of 1, those of batches 0.25 to 0.25: are both normalised alike?" in told
    assert len(warned(block(), pixels, normalised)) == 1
    assert len(warned(block(), pixels[:1], pixels[:1])) == 1
    assert warned(block(), normalised[:2], normalised) == []
    assert warned(block(), torch.zeros(2, 64, 32), normalised) == []  # says nothing of its own
