"""Random modules through everything, with fixed seeds; `make fuzz` runs many more."""

import pytest
from cases import SHAPES, cases
from checks import verdicts
from hypothesis import HealthCheck, given, settings
from modules import Case, Step, all_steps, trimmed


@pytest.mark.filterwarnings("ignore")  # of torch about models that nobody would write
@settings(
    max_examples=60,
    derandomize=True,  # the same cases in every run
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(cases())
def test_random_modules_are_as_eager_has_them(case: Case) -> None:
    case = trimmed(case)

    findings = [verdict for verdict in verdicts(case) if verdict.status == "finding"]

    assert not findings, f"{case}\n{findings}"


def test_a_case_prints_as_the_code_that_makes_it() -> None:
    case = Case((Step("linear", "h @ wt", 3),), shape=(4,), dtype="bfloat16", seed=5)

    assert eval(repr(case)) == case
    assert repr(case).startswith('Case((Step("linear", "h @ wt", 3),), shape=(4,)')


def test_every_step_fits_somewhere() -> None:
    for step in all_steps():
        assert any(Case((step,), shape=shape).model().fitting for shape in SHAPES), step
