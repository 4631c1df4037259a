"""Verify finds what it should: a kernel that is wrong."""

from collections.abc import Callable

import pytest
import torch
from models import Block
from torch import Tensor, nn

import fxq
from fxq.lowering import int8_linear
from fxq.lowering.cpu import avx2_linear
from fxq.lowering.cpu.native import native
from fxq.lowering.cpu.onednn import cpu_int8
from fxq.lowering.devices import x86
from fxq.lowering.rule import MIN_SQNR_DB, is_code
from fxq.passes import w8a8


@pytest.fixture
def any_size_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(x86, "WITH_VNNI", x86.Thresholds(0, 0))
    monkeypatch.setattr(x86, "WITHOUT_VNNI", x86.Thresholds(0, 0))


@pytest.fixture
def program(any_size_pays: None) -> fxq.Program:
    return fxq.compress(Block().eval(), torch.randn(2, 5, 64), w8a8.DYNAMIC)


def spoil(monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Make of every product on this CPU `change(result, x_scale)`."""
    for module, name in ((int8_linear, "cpu_launch"), (avx2_linear, "launch")):
        launch = getattr(module, name)

        def spoilt(*args: Tensor, launch: Callable[..., Tensor] = launch) -> Tensor:
            return change(launch(*args), args[1])

        monkeypatch.setattr(module, name, spoilt)


def test_a_right_kernel_is_within_the_bounds(program: fxq.Program) -> None:
    verification = fxq.verify(program, torch.randn(2, 5, 64))

    assert verification.ok
    assert verification.worst is not None
    assert verification.worst.sqnr_db >= MIN_SQNR_DB
    assert "6 kernels compared" in str(verification)


def test_one_wrong_accumulator_is_found(
    program: fxq.Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    def off_by_one(result: Tensor, x_scale: Tensor) -> Tensor:
        result[..., 0] += 1e-4 if float(x_scale.flatten()[0]) != 1.0 else 1.0
        return result

    spoil(monkeypatch, off_by_one)

    verification = fxq.verify(program, torch.randn(2, 5, 64))

    assert not verification.ok
    assert "accumulators DIFFER" in str(verification)


@pytest.mark.usefixtures("any_size_pays")
def test_a_kernel_that_reads_another_is_given_the_simulated_values(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, x = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 32)).eval(), torch.randn(5, 64)
    program = fxq.compress(model, x, w8a8.DYNAMIC)
    spoil(monkeypatch, lambda result, _: result * 1.01 if result.shape[-1] == 96 else result)

    first, second = fxq.verify(program, x).checks

    assert not first.ok
    assert second.ok, second


def test_nothing_lowered_is_said() -> None:
    program = fxq.compress(Block().eval(), torch.randn(2, 5, 64), w8a8.DYNAMIC)

    assert "nothing to compare" in str(fxq.verify(program, torch.randn(1, 5, 64)))


@pytest.mark.usefixtures("any_size_pays")
def test_codes_are_counted_and_a_far_one_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    if not cpu_int8().saturates or isinstance(native("avx2_linear"), str):
        pytest.skip("kernels that write codes need AVX2 without VNNI, and a compiler")
    model, x = (
        nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32)).eval(),
        torch.randn(50, 64),
    )
    program = fxq.compress(model, x, w8a8.STATIC, data=[x])
    right = fxq.verify(program, x)
    step = 0

    def move_one(result: Tensor, _: Tensor) -> Tensor:
        if is_code(result):
            result.view(-1)[(result.int() - 10).abs().argmin()] += step
        return result

    spoil(monkeypatch, move_one)
    found = []
    for step in (1, 2):  # noqa: B007
        found.append(fxq.verify(program, x))

    assert right.ok
    assert right.worst is not None
    assert right.worst.codes == 0
    assert right.worst.sqnr_db >= MIN_SQNR_DB
    before = right.checks[0]
    assert before.codes == 50 * 96
    assert f"of {50 * 96:,} codes that they write {before.neighbours}" in str(right)
    assert found[0].ok
    assert abs(found[0].checks[0].neighbours - before.neighbours) == 1
    assert not found[1].ok
    assert found[1].worst == found[1].checks[0]
