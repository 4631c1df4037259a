"""What must hold of every case. A check returns None, or says what is wrong.

A refusal by one of fxq's own errors is no finding; any other exception is. To add a check, write a
function of a `Subject` and put it in `CHECKS`.
"""

import copy
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from judges import Judge, outcome
from modules import Case
from torch import Tensor
from torch.utils import _pytree as pytree

import fxq
from fxq.pipeline import Recipe

ROOT = str(Path(fxq.__file__).resolve().parent)
FLOAT = Recipe("float", ())

# What is not supported yet: feature of a case -> checks that it is left out of. Empty is the goal.
KNOWN_GAPS: dict[str, tuple[str, ...]] = {
    "assigns buffers anew": ("float", "compiled"),
    "map over samples": ("float",),
    "writes to buffers": ("compiled",),
    "writes to arguments": ("float", "compiled"),
    "family recurrent": ("flops",),
}


@dataclass(frozen=True)
class Verdict:
    """Of one check on one case.

    Args:
        check: a key of `CHECKS`.
        status: "ok", "refused" with fxq's reason, "gap" where it was left out, or "finding".
        reason: what differs, or why not.
    """

    check: str
    status: str
    reason: str = ""

    @property
    def key(self) -> str:
        """What verdicts of the same kind share: numbers, names and sizes apart."""
        return f"{self.check}: {self.status}"


class Subject:
    """A case with its judge, and the float program, made once."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.judge = Judge(case)

    def error(self, function: Callable[..., Any]) -> str | None:
        """Return how calls of `function` differ from eager's beyond rounding.

        A batch size that the program refuses is left out.
        """
        try:
            return self.judge.error(outcome(function, self.judge.calls))
        except ValueError as error:
            if " in dimension " not in str(error) and "expected shape" not in str(error):
                raise
        self.judge = Judge(self.case, other_size=False)
        return self.judge.error(outcome(function, self.judge.calls))

    @cached_property
    def program(self) -> fxq.Program:
        """The float program, which must leave the model and the example as they are."""
        return self.compressed(FLOAT)

    def compressed(self, recipe: Recipe | str) -> fxq.Program:
        """Return the model after `recipe`, having checked that the model is as it was."""
        model, example = self.case.model(), self.case.inputs()
        kept = copy.deepcopy((model.state_dict(), example))
        attributes = [sorted(vars(module)) for module in model.modules()]
        program = fxq.compress(model, example, recipe)
        before, after = (pytree.tree_leaves(x) for x in (kept, (model.state_dict(), example)))
        if not all(map(_same, before, after)):
            raise AssertionError("compress wrote to the model or the example")
        if attributes != [sorted(vars(module)) for module in model.modules()]:
            raise AssertionError("compress left attributes in the model")
        return program


def _same(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a.nan_to_num(), b.nan_to_num())
    return a == b


def check_float(subject: Subject) -> str | None:
    """The float program equals eager, call after call."""
    return subject.error(subject.program)


CHECKS: dict[str, Callable[[Subject], str | None]] = {
    "float": check_float,
}


def verdicts(case: Case, only: str | None = None) -> Iterator[Verdict]:
    """Run the checks on a case, or only one of them."""
    subject = Subject(case)
    for name, check in CHECKS.items():
        if only not in (None, name):
            continue
        gaps = [gap for gap, left_out in KNOWN_GAPS.items() if name in left_out]
        if found := sorted(subject.judge.features.intersection(gaps)):
            yield Verdict(name, "gap", found[0])
        else:
            yield run_check(name, check, subject)


def run_check(name: str, check: Callable[[Subject], str | None], subject: Subject) -> Verdict:
    """Return the verdict of one check."""
    torch.manual_seed(0)
    try:
        why = check(subject)
    except Exception as error:
        if _is_refusal(error):
            return Verdict(name, "refused", _first_line(error))
        return Verdict(name, "finding", f"{type(error).__name__} at {_place(error)}: {error}"[:400])
    return Verdict(name, "finding", why) if why else Verdict(name, "ok")


def _is_refusal(error: Exception) -> bool:
    """Tell whether fxq itself raised an error that it is documented to raise."""
    own = (fxq.UnsupportedError, fxq.PassError, fxq.SkippedError, ValueError, TypeError)
    last = traceback.extract_tb(error.__traceback__)[-1].filename
    return isinstance(error, own) and last.startswith(ROOT) and bool(str(error))


def _place(error: Exception) -> str:
    """Return the last line of fxq that an error went through."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(ROOT)]
    return f"{frames[-1].filename[len(ROOT) :]}:{frames[-1].lineno}" if frames else "outside fxq"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:160]
