"""Found by `make fuzz`: float, RuntimeError at /checking.py:148: shape '[2, 24]' ."""

from checks import verdicts
from modules import Case, Step


def test_0ec3a40809() -> None:
    case = Case(
        (
            Step("view", "flatten(1)"),
            Step("einsum", "nc,...c->n...", 2),
            Step("constant", "h * tensor(2.)"),
            Step("view", "transpose(0, 1)"),
        ),
        batches=(1, 7),
    )

    (verdict,) = verdicts(case, ["float"])

    assert verdict.status != "finding", verdict.reason
