"""Verify finds what it should: a kernel that is wrong."""

import pytest
import torch
from models import Block
from torch import nn

import fxq
from fxq.lowering import int8_linear
from fxq.lowering.devices import x86
from fxq.lowering.rule import MIN_SQNR_DB
from fxq.passes import w8a8


@pytest.fixture
def any_size_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(x86, "WITH_VNNI", x86.Thresholds(0, 0))
    monkeypatch.setattr(x86, "WITHOUT_VNNI", x86.Thresholds(0, 0))


@pytest.fixture
def program(any_size_pays: None) -> fxq.Program:
    return fxq.compress(Block().eval(), torch.randn(2, 5, 64), w8a8.DYNAMIC)


def test_a_right_kernel_is_within_the_bounds(program: fxq.Program) -> None:
    verification = fxq.verify(program, torch.randn(2, 5, 64))

    assert verification.ok
    assert verification.worst is not None
    assert verification.worst.sqnr_db >= MIN_SQNR_DB
    assert "6 kernels compared" in str(verification)


def test_one_wrong_accumulator_is_found(
    program: fxq.Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = int8_linear.cpu_launch

    def off_by_one(*args: torch.Tensor) -> torch.Tensor:
        result = launch(*args)
        result[..., 0] += 1e-4 if float(args[1].flatten()[0]) != 1.0 else 1.0
        return result

    monkeypatch.setattr(int8_linear, "cpu_launch", off_by_one)

    verification = fxq.verify(program, torch.randn(2, 5, 64))

    assert not verification.ok
    assert "accumulators DIFFER" in str(verification)


@pytest.mark.usefixtures("any_size_pays")
def test_a_kernel_that_reads_another_is_given_the_simulated_values(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 32)).eval(), torch.randn(5, 64)
    program = fxq.compress(model, x, w8a8.DYNAMIC)
    launch = int8_linear.cpu_launch

    def first_wrong(*args: torch.Tensor) -> torch.Tensor:
        result = launch(*args)
        return result * 1.01 if result.shape[-1] == 96 else result

    monkeypatch.setattr(int8_linear, "cpu_launch", first_wrong)

    first, second = fxq.verify(program, x).checks

    assert not first.ok
    assert second.ok, second


def test_nothing_lowered_is_said() -> None:
    program = fxq.compress(Block().eval(), torch.randn(2, 5, 64), w8a8.DYNAMIC)

    assert "nothing to compare" in str(fxq.verify(program, torch.randn(1, 5, 64)))
