"""Judges from outside: what a case computes in eager PyTorch, and how far rounding can take it.

A bound on rounding comes from the case itself: how far eager is from the same module in float64,
and how far it moves where its inputs move by their last bit. Values that rounding alone takes far
away have no bound, and are not compared.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from modules import Case
from torch import Tensor, nn
from torch.utils import _pytree as pytree

FACTOR = 16.0  # of the largest error that rounding is seen to make: another order of sums
ULPS = 32.0  # of the largest value: where eager happens to be exact
ILL_CONDITIONED = 0.05  # an error by rounding of this share of the largest value decides nothing


@dataclass(frozen=True)
class Outcome:
    """What calls returned and left behind.

    Args:
        specs: the pytree of each call's result.
        leaves: all leaves: results, arguments after each call, and buffers after the last.
        names: of the leaves.
    """

    specs: tuple[pytree.TreeSpec, ...]
    leaves: tuple[Any, ...]
    names: tuple[str, ...]


def outcome(
    function: Callable[..., Any],
    calls: Sequence[Sequence[Any]],
    state: nn.Module | None = None,
) -> Outcome:
    """Call `function` on copies of the arguments of each call.

    Args:
        function: a model, program or compiled model.
        calls: arguments of each call.
        state: the module whose buffers are compared too; None where they have other names.
    """
    specs, named = [], {}
    for index, call in enumerate(calls):
        arguments = copy.deepcopy(tuple(call))
        with torch.no_grad():
            result = function(*arguments)
        # Copies, since a later step may write to what was returned, as eager would too.
        leaves, spec = pytree.tree_flatten(result)
        specs.append(spec)
        named |= {f"call {index}, result {i}": _copied(leaf) for i, leaf in enumerate(leaves)}
        given = [leaf for leaf in arguments if isinstance(leaf, Tensor)]
        named |= {f"call {index}, argument {i}": _copied(leaf) for i, leaf in enumerate(given)}
    if state is not None:
        named |= {f"buffer {name}": _copied(b) for name, b in state.named_buffers()}
    return Outcome(tuple(specs), tuple(named.values()), tuple(named))


def _copied(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


class Judge:
    """Eager's outcome on a case, and bounds around it.

    Attributes:
        calls: arguments of the calls: the example, another batch size where eager takes it and
            `other_size` is set, and the example's size with other values.
        eager: their outcome.
        features: what the case does that may not be supported, see `gaps`.
    """

    def __init__(self, case: Case, *, other_size: bool = True) -> None:
        self.case = case
        self.calls = [case.inputs(call) for call in range(3)]
        model = case.model()
        if not other_size or not self._takes(case.model(), self.calls[1]):
            del self.calls[1]
        kept = dict(model.named_buffers())
        before = {name: value._version for name, value in kept.items()}
        self.eager = outcome(model, self.calls, model)
        self.exact = self._outcome(lambda x: x.double(), case.model().double())
        torch.manual_seed(0)
        self.moved = self._outcome(_moved, case.model())
        self.features = {name for s in case.steps for name in (f"family {s.family}", s.spelling)}
        if any(before[name] != value._version for name, value in kept.items()):
            self.features.add("writes to buffers")
        if any(kept[name] is not value for name, value in model.named_buffers()):
            self.features.add("assigns buffers anew")
        if self._writes_to_arguments():
            self.features.add("writes to arguments")
        if any(not bool(x.isfinite().all()) for x in self.floats(self.eager)):
            self.features.add("NaN or Inf")

    @staticmethod
    def _takes(model: nn.Module, call: Sequence[Any]) -> bool:
        try:
            outcome(model, [call])
        except (RuntimeError, IndexError, ValueError):
            return False
        return True

    def _outcome(self, change: Callable[[Tensor], Tensor], model: nn.Module) -> Outcome | None:
        calls = pytree.tree_map_only(Tensor, change, [tuple(call) for call in self.calls])
        try:
            return outcome(model, calls, model)
        except RuntimeError:  # of a model that names its dtype
            return None

    def _writes_to_arguments(self) -> bool:
        after = [
            leaf
            for name, leaf in zip(self.eager.names, self.eager.leaves, strict=True)
            if "argument" in name
        ]
        before = [leaf for call in self.calls for leaf in call if isinstance(leaf, Tensor)]
        return not all(map(torch.equal, before, after))

    @staticmethod
    def floats(outcome: Outcome) -> list[Tensor]:
        """Return the floating-point leaves of an outcome."""
        tensors = [leaf for leaf in outcome.leaves if isinstance(leaf, Tensor)]
        return [leaf for leaf in tensors if leaf.is_floating_point()]

    def error(self, found: Outcome) -> str | None:
        """Return how `found` differs from eager beyond rounding, None where it does not."""
        if found.specs != self.eager.specs[: len(found.specs)]:
            return f"structure: {self.eager.specs} expected, {found.specs} found"
        leaves = dict(zip(found.names, found.leaves, strict=True))
        for index, name in enumerate(self.eager.names):
            if name in leaves and (why := self._leaf_error(index, leaves[name])):
                return f"{name}: {why}"
        return None

    def _leaf_error(self, index: int, found: Any) -> str | None:
        expected = self.eager.leaves[index]
        if not isinstance(expected, Tensor) or not isinstance(found, Tensor):
            return None if found is expected or found == expected else f"{expected}, {found}"
        if (expected.dtype, expected.shape) != (found.dtype, found.shape):
            return f"{expected.dtype} {expected.shape}, found {found.dtype} {found.shape}"
        bound = self.bound(index)
        if bound is None:
            return None
        if not expected.is_floating_point():
            return None if torch.equal(expected, found) else "other integers"
        return differs(expected, found, bound)

    def bound(self, index: int) -> float | None:
        """Return the largest error that rounding explains in a leaf; None where it explains all."""
        expected = self.eager.leaves[index]
        others = [o.leaves[index] for o in (self.exact, self.moved) if o is not None]
        if any(other.shape != expected.shape for other in others):
            return None
        if not expected.is_floating_point():
            return 0.0 if all(torch.equal(expected, other) for other in others) else None
        expected = expected.double()
        finite = expected.isfinite()
        if any(not torch.equal(finite, other.isfinite()) for other in others):
            return None  # on the edge of the dtype's range
        if not finite.any():
            return 0.0
        largest = float(expected[finite].abs().max())
        seen = max(float((expected - o.double())[finite].abs().max()) for o in others)
        if seen > ILL_CONDITIONED * largest:
            return None
        eps = torch.finfo(self.eager.leaves[index].dtype).eps
        return FACTOR * seen + ULPS * eps * largest


def differs(expected: Tensor, found: Tensor, bound: float) -> str | None:
    """Return how far two tensors are apart where it is more than `bound`."""
    expected, found = expected.double(), found.double()
    finite = expected.isfinite()
    if not torch.equal(finite, found.isfinite()):
        n_expected, n_found = int((~finite).sum()), int((~found.isfinite()).sum())
        return f"{n_expected} values that are not finite expected, {n_found} found"
    if not torch.equal(expected.isnan(), found.isnan()):
        return "NaN and Inf exchanged"
    error = (expected - found)[finite].abs().max() if finite.any() else torch.zeros(())
    if float(error) <= bound:
        return None
    return f"largest error {float(error):.3g} where rounding explains {bound:.3g}"


def _moved(x: Tensor) -> Tensor:
    """Return `x` with values moved by up to their last bit."""
    if not x.is_floating_point():
        return x
    return x * (1 + torch.finfo(x.dtype).eps * torch.randint(-1, 2, x.shape))
