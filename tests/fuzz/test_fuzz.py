"""Random modules through everything, with fixed seeds; `make fuzz` runs many more.

Each case is compared as a float program, and in one more way of those that `checks.CHECKS` has.
"""

import dataclasses

import pytest
import torch
from cases import SHAPES, cases
from checks import CHECKS, Subject, Verdict, checks_for, run_check, verdicts
from hypothesis import HealthCheck, given, settings
from judges import Judge, Outcome, outcome
from modules import Case, Step, all_steps, trimmed
from shrinking import shrunk

BLOCK = (
    Step("norm", "rms_norm"),
    Step("attention", "softmax(s * q @ k.mT + bias)"),
    Step("linear", "addmm(b, rows, wt)", 16),
    Step("activation", "0.5 * h * (1 + erf(h / sqrt(2)))"),
    Step("state", "cache.index_copy_"),
)
pytestmark = pytest.mark.filterwarnings("ignore")  # of torch, about models nobody would write


@settings(
    max_examples=25,
    derandomize=True,  # the same cases in every run
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(cases())
def test_random_modules_are_as_eager_has_them(case: Case) -> None:
    case = trimmed(case)
    others = [name for name in checks_for(case, 0) if name not in ("float", "inductor")]

    found = list(verdicts(case, ["float", others[case.seed % len(others)]]))

    assert not [verdict for verdict in found if verdict.status == "finding"], case


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_a_module_through_every_check(dtype: str) -> None:
    case = Case(BLOCK, dtype=dtype)

    found = {verdict.check: verdict for verdict in verdicts(case)}

    assert case.model().fitting == BLOCK
    assert list(found) == list(CHECKS)
    assert {verdict.status for verdict in found.values()} == {"ok"}, found


def test_a_case_prints_as_the_code_that_makes_it() -> None:
    case = Case((Step("linear", "h @ wt", 3),), shape=(4,), dtype="bfloat16", seed=5)

    assert eval(repr(case)) == case
    assert repr(case).startswith('Case((Step("linear", "h @ wt", 3),), shape=(4,)')


def test_every_step_fits_somewhere() -> None:
    for step in all_steps():
        assert any(Case((step,), shape=shape).model().fitting for shape in SHAPES), step


def test_a_case_is_the_same_module_each_time() -> None:
    case = Case((*BLOCK, Step("recurrent", "lstm"), Step("linear", "nn.Linear")))

    first, second = case.model().state_dict(), case.model().state_dict()

    assert list(first) == list(second)
    assert all(map(torch.equal, first.values(), second.values()))


def _changed(found: Outcome, leaf: int, factor: float) -> Outcome:
    leaves = list(found.leaves)
    leaves[leaf] = leaves[leaf].clone()
    leaves[leaf].view(-1)[0] += factor * leaves[leaf].abs().max()
    return dataclasses.replace(found, leaves=tuple(leaves))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_judge_sees_what_rounding_does_not_explain(dtype: str) -> None:
    judge = Judge(Case(BLOCK, dtype=dtype))
    eps = torch.finfo(getattr(torch, dtype)).eps

    for leaf in range(len(judge.eager.leaves)):
        if "argument" not in judge.eager.names[leaf]:
            assert judge.error(_changed(judge.eager, leaf, eps)) is None
            assert judge.error(_changed(judge.eager, leaf, min(1e4 * eps, 1.0)))
            assert judge.error(_changed(judge.eager, leaf, 1.0), quantized=True)
    assert judge.error(judge.eager) is None
    assert judge.error(judge.eager, quantized=True) is None


def test_eight_bits_are_within_their_own_bound_and_four_are_not() -> None:
    case = Case((Step("linear", "h @ wt", 64), Step("linear", "F.linear(h, w)", 64)), (7, 64))
    judge = Judge(case)

    class Coarse(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = case.model()
            for parameter in self.model.parameters():
                step = parameter.abs().amax() / 7
                parameter.copy_((parameter / step).round() * step)

        def forward(self, *args: object) -> object:
            return self.model(*args)

    assert judge.error(judge.eight_bits[0], quantized=True) is None
    assert judge.error(outcome(Coarse(), judge.calls), quantized=True)


def _raises(error: Exception) -> Verdict:
    def check(subject: Subject) -> str | None:
        raise error

    return run_check("float", check, Subject(Case()))


def test_only_errors_of_fxq_are_refusals() -> None:
    def refused(subject: Subject) -> str | None:
        subject.compressed("no such recipe")
        return None

    assert run_check("float", refused, Subject(Case())).status == "refused"
    assert _raises(ValueError("somebody else's")).status == "finding"
    assert _raises(RuntimeError("a crash")).status == "finding"


def test_shrinking_keeps_what_fails_and_drops_the_rest() -> None:
    case = Case(BLOCK, shape=(7, 8), dtype="bfloat16", seed=7)

    small = shrunk(case, lambda other: BLOCK[2] in other.steps and other.dtype == "bfloat16")

    assert small == Case((BLOCK[2],), shape=(), dtype="bfloat16")
