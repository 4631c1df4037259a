"""The first call of a compiled graph, compared with eager code.

Three comparisons, because quantization error is meant and everything else is not: the float graph
must be what the model's own code computes, to rounding; what is compiled must be as close to it as
the simulated graph is; and both must write the same values to the same inputs.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxq.checking import difference
from fxq.errors import FxqWarning, PassError
from fxq.numerics import is_inexact, sqnr_db

# Rounding moves codes, and each implementation rounds its own way: noise of the same size, not the
# same noise. On a result of few elements its power differs by more than the usual 0.5 dB.
MAX_GAP_DB = 6.0


@dataclass
class FirstCall:
    """What to compare one compiled graph with, once.

    Args:
        eager: Dynamo's graph, which runs the model's own operators.
        float_graph: the same in fxq's operators, before any pass.
        simulated: the same after the recipe.
        live: indices of the arguments that the graphs but `eager` take.
        written: indices of the arguments that are written to; their new values are the last results
            of `float_graph` and `simulated`.
        names: of all arguments.
    """

    eager: GraphModule
    float_graph: GraphModule
    simulated: GraphModule
    live: Sequence[int]
    written: Sequence[int]
    names: Sequence[str]
    done: bool = field(default=False, init=False)

    def __call__(self, args: Sequence[Any], run: Callable[[], Any]) -> Any:
        """Return what `run` does with `args`, once it has been compared.

        Args:
            args: of Dynamo's graph.
            run: calls what was compiled with those that are live.
        Raises:
            PassError: the results differ.
        """
        if any(map(_is_random, self.float_graph.graph.nodes)):
            warnings.warn(
                "check: the graph draws random numbers, which compiled code draws in another "
                "order; it is not compared with eager code",
                FxqWarning,
                stacklevel=3,
            )
            self.done = True
            return run()
        with torch.no_grad():
            given = [arg.clone() if self._is_live(i, arg) else arg for i, arg in enumerate(args)]
            expected = [*self.eager(*given), *(given[i] for i in self.written)]
            inputs = [args[i] for i in self.live]
            in_float, simulated = self.float_graph(*inputs), self.simulated(*inputs)
        results = run()
        found = [*results, *(args[i] for i in self.written)]
        self._check(expected, in_float, "the float graph", expected)  # to rounding
        self._check(expected, found, "what was compiled", simulated)
        self.done = True
        return results

    def _is_live(self, index: int, arg: Any) -> bool:
        return isinstance(arg, Tensor) and index in self.live

    def _check(
        self, expected: Sequence[Any], found: Sequence[Any], what: str, simulated: Sequence[Any]
    ) -> None:
        """Raise where a value is further from the expected one than rounding and the simulated
        value explain."""
        n_results = len(expected) - len(self.written)
        names = [f"result {i}" for i in range(n_results)]
        names += [f"the value written to {self.names[i]!r}" for i in self.written]
        for name, a, b, reference in zip(names, expected, found, simulated, strict=True):
            if why := _apart(a, b, reference):
                raise PassError(
                    f"check: expected {what} to give what eager code does, found that {name} is "
                    f"another: {why}; please report this model, and compile it with another "
                    "backend meanwhile"
                )


def _apart(expected: Any, found: Any, simulated: Any) -> str | None:
    why = difference([expected], [found])
    if why is None or difference([expected], [simulated]) is None:
        return why
    if not isinstance(expected, Tensor) or expected.shape != found.shape:
        return why
    if not is_inexact(expected):
        return None  # of quantized values: an index may be another
    if not torch.equal(simulated.isfinite(), found.isfinite()):
        return "it has NaN or infinities elsewhere than the simulated graph's"
    kept = expected.isfinite() & found.isfinite()
    floor, own = (sqnr_db(expected[kept], value[kept]) for value in (simulated, found))
    if own >= floor - MAX_GAP_DB:
        return None
    return f"{own:.1f} dB from it, where the simulated graph's is {floor:.1f} dB"


def _is_random(node: Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
