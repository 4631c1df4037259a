"""Judges from outside: what a case computes in eager PyTorch, and how far rounding can take it.

A bound on rounding comes from the case itself: how far eager is from the same module in float64,
and how far it moves where its inputs move by their last bit. Values that rounding alone takes far
away have no bound, and are not compared.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from eight_bits import EightBits
from modules import Case
from torch import Tensor, nn
from torch.utils import _pytree as pytree

FACTOR = 16.0  # of the largest error that rounding is seen to make: another order of sums
ULPS = 32.0  # of the largest value: where eager happens to be exact
ILL_CONDITIONED = 0.05  # an error by rounding of this share of the largest value decides nothing

QUANTIZED_FACTOR = 4.0  # of the largest of seven errors by 8 bits, each rounded otherwise
HOPELESS = 0.5  # an error by 8 bits of this share of the largest value says nothing about more


@dataclass(frozen=True)
class Outcome:
    """What calls returned and what they left changed.

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
        except (RuntimeError, ValueError, TypeError):  # of a model that names its dtype
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

    def error(self, found: Outcome, *, quantized: bool = False) -> str | None:
        """Return how `found` differs from eager beyond rounding, None where it does not.

        Args:
            found: of the same calls.
            quantized: rounding is that of 8 bits in every product.
        """
        if found.specs != self.eager.specs:
            return f"structure: {self.eager.specs} expected, {found.specs} found"
        leaves = dict(zip(found.names, found.leaves, strict=True))
        for index, name in enumerate(self.eager.names):
            if name not in leaves:
                continue  # a buffer, which a program calls otherwise
            bound = self.quantized_bound(index) if quantized else self.bound(index)
            if why := leaf_error(self.eager.leaves[index], leaves[name], bound):
                return f"{name}: {why}"
        return None

    @cached_property
    def is_bounded(self) -> bool:
        """Whether rounding has a bound in everything that the case computes."""
        return all(self.bound(i) is not None for i in range(len(self.eager.leaves)))

    @cached_property
    def is_bounded_in_8_bits(self) -> bool:
        """Likewise with 8-bit products."""
        return all(self.quantized_bound(i) is not None for i in range(len(self.eager.leaves)))

    @cached_property
    def eight_bits(self) -> list[Outcome]:
        """Outcomes with 8-bit products, rounded in several ways."""
        found = []
        for seed in (None, *range(6)):
            with EightBits(seed):
                found.append(self._outcome(lambda x: x, self.case.model()))
        return [outcome for outcome in found if outcome is not None]

    def quantized_bound(self, index: int) -> float | None:
        """Return what `bound` does, for 8-bit arithmetic."""
        others = [found.leaves[index] for found in self.eight_bits]
        bound, expected = self.bound(index), self.eager.leaves[index]
        if bound is None or not isinstance(expected, Tensor):
            return bound
        seen = largest_error(expected, others)
        if seen is None or not expected.is_floating_point():
            return bound if seen == 0.0 else None
        return bound + QUANTIZED_FACTOR * seen if seen <= HOPELESS * _largest(expected) else None

    def bound(self, index: int) -> float | None:
        """Return the largest error that rounding explains in a leaf; None if any."""
        expected = self.eager.leaves[index]
        if not isinstance(expected, Tensor):
            return 0.0
        others = [o.leaves[index] for o in (self.exact, self.moved) if o is not None]
        seen = largest_error(expected, others)
        if seen is None or not expected.is_floating_point():
            return 0.0 if seen == 0.0 else None
        if seen > ILL_CONDITIONED * _largest(expected):
            return None
        return FACTOR * seen + ULPS * torch.finfo(expected.dtype).eps * _largest(expected)


def _largest(x: Tensor) -> float:
    """Return the largest finite magnitude."""
    finite = x[x.isfinite()]
    return float(finite.double().abs().max()) if finite.numel() else 0.0


def largest_error(expected: Tensor, others: Sequence[Tensor]) -> float | None:
    """Return how far `others` are from `expected`; None where not by numbers: sizes, NaN, Inf."""
    if any(other.shape != expected.shape for other in others):
        return None
    finite = expected.isfinite()
    if any(not torch.equal(finite, other.isfinite()) for other in others):
        return None
    errors = [(expected.double() - other.double())[finite].abs() for other in others]
    return max((float(error.max()) for error in errors if error.numel()), default=0.0)


def leaf_error(expected: Any, found: Any, bound: float | None) -> str | None:
    """Return how a leaf differs by more than `bound`; None as a bound allows any numbers."""
    if not isinstance(expected, Tensor) or not isinstance(found, Tensor):
        return None if found is expected or found == expected else f"{expected}, found {found}"
    if (expected.dtype, expected.shape) != (found.dtype, found.shape):
        return f"{expected.dtype} {expected.shape}, found {found.dtype} {found.shape}"
    if bound is None:
        return None
    error = largest_error(expected, [found])
    if error is None or not torch.equal(expected.isnan(), found.isnan()):
        n_expected, n_found = (int((~x.isfinite()).sum()) for x in (expected, found))
        return f"NaN or Inf: {n_expected} expected, {n_found} found"
    if error <= bound:
        return None
    return f"largest error {error:.3g} where rounding explains {bound:.3g}"


def _moved(x: Tensor) -> Tensor:
    """Return `x` with values moved by up to their last bit."""
    if not x.is_floating_point():
        return x
    return x * (1 + torch.finfo(x.dtype).eps * torch.randint(-1, 2, x.shape))
