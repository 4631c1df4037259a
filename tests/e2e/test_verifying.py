"""Verify finds what it should: a kernel that is wrong."""

import pytest
import torch
from models import Block

import fxq
from fxq.lowering import int8_linear
from fxq.lowering.devices import x86
from fxq.lowering.rule import MIN_SQNR_DB
from fxq.passes import w8a8


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> fxq.Program:
    monkeypatch.setattr(x86, "WITH_VNNI", x86.Thresholds(0, 0))
    monkeypatch.setattr(x86, "WITHOUT_VNNI", x86.Thresholds(0, 0))
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


def test_nothing_lowered_is_said() -> None:
    program = fxq.compress(Block().eval(), torch.randn(2, 5, 64), w8a8.DYNAMIC)

    assert "nothing to compare" in str(fxq.verify(program, torch.randn(1, 5, 64)))
