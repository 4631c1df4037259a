"""What must hold of every case. A check returns None, or says what is wrong.

A refusal by one of fxq's own errors is no finding; any other exception is. To add a check, write a
function of a `Subject` and put it in `CHECKS`.
"""

import copy
import importlib.metadata
import math
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from judges import Judge, outcome
from modules import Case
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

import fxq
from fxq import backend, capturing, pipeline
from fxq.lowering.devices import x86
from fxq.passes.pruning.prune import Pruner
from fxq.pipeline import FLOAT, Recipe

ROOT = str(Path(fxq.__file__).resolve().parent)
# What is not supported yet: feature of a case -> the checks it is left out of. Empty is the goal.
KNOWN_GAPS: dict[str, tuple[str, ...]] = {}
# What fxq says where it found out by itself that it was about to compute something else.
OUTSIDE = "outside fxq"
COMPILED = ("compiled", "inductor")  # how checks on the compile path are called
SELF_CAUGHT = ("expected the captured graph to compute", "check: expected")


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


class Subject:
    """A case with its judge; what is captured of it, and each program, is made once."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.judge = Judge(case)
        self.programs: dict[str, fxq.Program] = {}
        self.captured: capturing.Captured | None = None

    def error(
        self,
        function: Callable[..., Any],
        *,
        quantized: bool = False,
        state: nn.Module | None = None,
    ) -> str | None:
        """Return how calls of `function` differ from eager's beyond rounding.

        A batch size that the program refuses is left out.

        Args:
            function: takes the model's arguments.
            quantized: rounding is that of 8 bits.
            state: the module whose buffers are compared with the model's.
        """
        try:
            return self.judge.error(outcome(function, self.judge.calls, state), quantized=quantized)
        except ValueError as error:
            if " in dimension " not in str(error) and "expected shape" not in str(error):
                raise
        if isinstance(function, fxq.Program):
            function.reset()
        self.judge = Judge(self.case, other_size=False)
        return self.judge.error(outcome(function, self.judge.calls, state), quantized=quantized)

    def program(self, recipe: Recipe | str = "w8a8_dynamic") -> fxq.Program:
        """Return a program made by a recipe, with its state as the model has it."""
        name = recipe if isinstance(recipe, str) else recipe.name
        if name not in self.programs:
            self.programs[name] = self.compressed(recipe)
        self.programs[name].reset()
        return self.programs[name]

    def compressed(self, recipe: Recipe | str) -> fxq.Program:
        """Return the model after `recipe`, having checked that the model is as it was."""
        model, example = self.case.model(), self.case.inputs()
        kept = copy.deepcopy((model.state_dict(), example))
        attributes = [sorted(vars(module)) for module in model.modules()]
        with mock.patch.object(pipeline, "capture", self._capture):
            program = fxq.compress(model, example, recipe)
        before, after = (pytree.tree_leaves(x) for x in (kept, (model.state_dict(), example)))
        if not all(map(_same, before, after)):
            raise AssertionError("compress wrote to the model or the example")
        if attributes != [sorted(vars(module)) for module in model.modules()]:
            raise AssertionError("compress left attributes in the model")
        return program

    def _capture(self, *args: Any) -> capturing.Captured:
        """Return a copy of what is captured of the case, which takes most of the time."""
        if self.captured is None:
            self.captured = capturing.capture(*args)
        return copy.deepcopy(self.captured)


def _same(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a.nan_to_num(), b.nan_to_num())
    return a == b


Check = Callable[[Subject], str | None]


def check_float(subject: Subject) -> str | None:
    """The float program equals eager, call after call."""
    return subject.error(subject.program(FLOAT))


def _recipe_check(name: str) -> Check:
    quantized = "w8" in name

    def check(subject: Subject) -> str | None:
        """The program is as close to eager as 8 bits allow; sparse attention of a single block, as
        short sequences have it, is dense."""
        return subject.error(subject.program(name), quantized=quantized)

    return check


def check_flops(subject: Subject) -> str | None:
    """The report accounts for as many operations as torch counts in eager.

    Counted here and not by torch: products with a vector, and recurrent layers in oneDNN. Products
    of two parameters are made once, when the model is captured. What torch makes of an einsum or
    of distances depends on sizes: a contracted axis of one element is no product to it.
    """
    if PRODUCTS_OF_PARAMETERS & subject.judge.features:
        return None
    model, example = subject.case.model(), subject.case.inputs()
    counter = FlopCounterMode(display=False, custom_mapping=VECTOR_PRODUCTS)
    with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False), counter:
        model(*copy.deepcopy(example))
    found = fxq.report(subject.program(FLOAT), example).flops
    expected = counter.get_total_flops()
    depends = not subject.judge.features.isdisjoint({"family einsum", "cdist"})
    if found == expected or (found > expected and depends):
        return None
    return f"{expected} operations expected, {found} found"


def check_saved(subject: Subject) -> str | None:
    """What was saved and loaded computes the same bits."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "program.fxq"
        fxq.save(subject.program(), path)
        try:
            loaded = fxq.load(path)
        except ValueError as error:
            return f"what was saved cannot be loaded: {error}"
    calls = [subject.case.inputs(0), subject.case.inputs(2)]
    before, after = (outcome(program, calls) for program in (subject.program(), loaded))
    if before.specs != after.specs or not all(map(_same, before.leaves, after.leaves)):
        return "a loaded program computes something else"
    return None


def check_verified(subject: Subject) -> str | None:
    """Every kernel computes what was simulated, and every layer what the model's does."""
    model, example = subject.case.model(), subject.case.inputs()
    verification = fxq.verify(subject.program(), example, model=model)
    kernels_ok = all(check.ok for check in verification.checks)
    no_floor = not subject.judge.is_bounded_in_8_bits or "NaN or Inf" in subject.judge.features
    if verification.ok or (kernels_ok and no_floor):
        return None
    return str(verification)


def check_compiled(subject: Subject) -> str | None:
    """The float model compiled equals eager, state included."""
    model = subject.case.model()
    return subject.error(compiled(model, recipe=FLOAT), state=model)


def check_compiled_dynamic(subject: Subject) -> str | None:
    """The model compiled as it is by default is as close to eager as 8 bits allow."""
    return subject.error(compiled(subject.case.model(), check=True), quantized=True)


def check_compiled_program(subject: Subject) -> str | None:
    """A compiled program is as close to eager as 8 bits allow."""
    return subject.error(compiled(subject.program()), quantized=True)


def check_inductor(subject: Subject) -> str | None:
    """As `check_compiled`, through Inductor."""
    torch._dynamo.reset()
    model = subject.case.model()
    options = {"recipe": FLOAT, "check": True}
    return subject.error(torch.compile(model, backend="fxq", options=options), state=model)


def compiled(model: nn.Module, **options: Any) -> Callable[..., Any]:
    """Return `model` compiled by fxq with an interpreter in the place of Inductor: all that fxq
    does to the graph is done, and nothing waits for a C++ compiler."""
    torch._dynamo.reset()
    function = torch.compile(model, backend="fxq", options=options)

    def call(*args: Any) -> Any:
        with mock.patch.object(backend, "compile_fx", lambda gm, inputs, **kwargs: gm):
            return function(*args)

    return call


def _vector_flops(matrix: Sequence[int], *rest: Any, **kwargs: Any) -> int:
    return 2 * math.prod(matrix)


VECTOR_PRODUCTS = {torch.ops.aten.mv: _vector_flops, torch.ops.aten.dot: _vector_flops}
PRODUCTS_OF_PARAMETERS = {"h @ (square @ square)"}
RECIPES = {p.name: p.load() for p in importlib.metadata.entry_points(group="fxq.recipes")}
DATA_FREE = sorted(  # that are to keep the function: pruned weights are another one
    name
    for name, recipe in RECIPES.items()
    if not recipe.needs_data and not any(isinstance(p, Pruner) for p in recipe.passes)
)
CHECKS: dict[str, Check] = {
    "float": check_float,
    **{name: _recipe_check(name) for name in DATA_FREE},
    "flops": check_flops,
    "saved": check_saved,
    "verified": check_verified,
    "compiled": check_compiled,
    "compiled w8a8_dynamic": check_compiled_dynamic,
    "compiled program": check_compiled_program,
    "inductor": check_inductor,
}
# Checks that cost much, or rarely find what the others do not: every how many cases they run.
SELDOM = {"inductor": 20, "compiled program": 4, "w8": 4, "compiled": 2}


def checks_for(case: Case, index: int) -> list[str]:
    """Return the checks that are worth their time on a case, the `index`-th of many: sparse
    attention only where there is attention."""
    has_attention = any(step.family == "attention" for step in case.steps)
    return [
        name
        for name in CHECKS
        if index % SELDOM.get(name, 1) == 0 and (has_attention or "spaattn" not in name)
    ]


def verdicts(case: Case, names: Iterable[str] = ()) -> Iterator[Verdict]:
    """Run checks on a case: those named, or all."""
    every_product = x86.Thresholds(0, 0)  # is lowered, however small
    with (
        mock.patch.object(x86, "WITH_VNNI", every_product),
        mock.patch.object(x86, "WITHOUT_VNNI", every_product),
    ):
        subject = Subject(case)
        for name in names or CHECKS:
            gaps = [gap for gap, left_out in KNOWN_GAPS.items() if name in left_out]
            if found := sorted(subject.judge.features.intersection(gaps)):
                yield Verdict(name, "gap", found[0])
            else:
                yield run_check(name, CHECKS[name], subject)


def run_check(name: str, check: Check, subject: Subject) -> Verdict:
    """Return the verdict of one check."""
    torch.manual_seed(0)
    try:
        why = check(subject)
    except Exception as raised:
        error: Any = getattr(raised, "inner_exception", raised)  # Dynamo wraps a backend's
        text = str(error)
        if text.startswith(SELF_CAUGHT) and not subject.judge.is_bounded:
            return Verdict(name, "refused", "rounding alone changes the result")
        if _is_refusal(error) and not text.startswith(SELF_CAUGHT):
            return Verdict(name, "refused", _first_line(error))
        place = _place(error)
        if place == OUTSIDE and name.startswith(COMPILED) and _dynamo_fails(subject):
            return Verdict(name, "refused", "torch.compile cannot trace it with any backend")
        return Verdict(name, "finding", f"{type(error).__name__} at {place}: {text}"[:400])
    return Verdict(name, "finding", why) if why else Verdict(name, "ok")


def _is_refusal(error: Exception) -> bool:
    """Tell whether fxq itself raised an error that it is documented to raise."""
    own = (fxq.UnsupportedError, fxq.PassError, fxq.SkippedError, ValueError, TypeError)
    last = traceback.extract_tb(error.__traceback__)[-1].filename
    return isinstance(error, own) and last.startswith(ROOT) and bool(str(error))


def _place(error: Exception) -> str:
    """Return the last line of fxq that an error went through."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(ROOT)]
    return f"{frames[-1].filename[len(ROOT) :]}:{frames[-1].lineno}" if frames else OUTSIDE


def _dynamo_fails(subject: Subject) -> bool:
    """Tell whether torch.compile fails without fxq."""
    torch._dynamo.reset()
    function = torch.compile(subject.case.model(), backend="eager")
    try:
        outcome(function, subject.judge.calls)
    except Exception:
        return True
    return False


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:160]
