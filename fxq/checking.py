"""Compare a captured graph with the model it came from.

The model's own eager code is the judge: it is called with the example, and with a second batch of
another size and other values, and the graph must give the same results, write the same values to
arguments and buffers, and depend on nothing else that a call changes. Whatever the model keeps is
put back afterwards.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from fxq.binding import Bound
from fxq.conditions import Condition
from fxq.errors import UnsupportedError
from fxq.graph import hint, val_of
from fxq.identity import TensorKey
from fxq.module_state import Snapshot, spared
from fxq.numerics import as_real, is_inexact
from fxq.seeding import same_seed
from fxq.signature import Leaf, Signature

# Largest relative difference of one sample's results that rounding explains: rewrites keep the
# function and change the order of sums, and a deep network amplifies what that rounds.
TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-3,
    torch.float16: 16 * torch.finfo(torch.float16).eps,
    torch.bfloat16: 16 * torch.finfo(torch.bfloat16).eps,
}


FAST_PATH = (
    "expected the captured graph to compute what the model computes, found that "
    "nn.TransformerEncoder's fast path, which torch takes in eval mode without gradients and "
    "torch.export does not, gives zeros or other values for padded tokens; make the encoder with "
    "enable_nested_tensor=False, or call torch.backends.mha.set_fastpath_enabled(False), wherever "
    "the model runs"
)


class Found(NamedTuple):
    """What a comparison tells.

    Args:
        returned: which results are inputs of the graph (`Signature.returned`).
        conditions: on the free sizes.
        notes: what a person should know.
    """

    returned: dict[int, int]
    conditions: tuple[Condition, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Checked:
    """A graph and the model that judges it.

    Args:
        gm: the graph.
        signature: how a call of the model becomes a call of the graph.
        state: what the model's buffers that it writes to hold before the first call, by name.
        module: the model.
        bound: the example, which tells how to call the model.
    """

    gm: GraphModule
    signature: Signature
    state: Mapping[str, Tensor]
    module: nn.Module
    bound: Bound

    def compare(self, values: Mapping[str, Any]) -> Found:
        """Compare both on `values`, on `values` again where that could make a difference, on a
        second batch, and with each free size 1, for which tracing does not take branches.

        Args:
            values: the example's arguments by name.
        Raises:
            UnsupportedError: they differ by more than rounding, or a call changes what no graph can
                know of.
        """
        try:
            return self._compared(values)
        except UnsupportedError as error:
            if self._agrees_without_fast_path(values):
                raise UnsupportedError(FAST_PATH) from error
            raise

    def _agrees_without_fast_path(self, values: Mapping[str, Any]) -> bool:
        """Tell whether it is torch's own fast path of transformer layers that makes the difference:
        it is for eager code without gradients only."""
        mha, kinds = torch.backends.mha, (nn.TransformerEncoder, nn.TransformerEncoderLayer)
        if not mha.get_fastpath_enabled() or not any(
            isinstance(module, kinds) for module in self.module.modules()
        ):
            return False
        mha.set_fastpath_enabled(False)
        try:
            self._compared(values)
        except UnsupportedError:
            return False
        finally:
            mha.set_fastpath_enabled(True)
        return True

    def _compared(self, values: Mapping[str, Any]) -> Found:
        state = list(self.state.values())
        with spared(self.module):
            returned = self._returned(values)
        with spared(self.module) as before:
            state = self._agree(values, state, "the example")
            once = Snapshot(self.module)
            changed = self._unknown(before.changes(once))
            if changed or state:
                state = self._agree(values, state, "a second call", changed)
            if changed:
                again = self._unknown(once.changes(Snapshot(self.module)))
                if again:
                    raise UnsupportedError(_changes(again))
            self._second_batch(values, state)
            conditions = tuple(self._without_ones(values, state))
        if not changed:
            return Found(returned, conditions, ())
        names = ", ".join(changed[:3])
        note = f"a call of the model sets {names}, a call of the graph does not"
        return Found(returned, conditions, (note,))

    def _returned(self, values: Mapping[str, Any]) -> dict[int, int]:
        """Return which results of the model are arguments or buffers that it writes to."""
        if not self.signature.writes:
            return {}
        given = _cloned(values)
        inputs = [v for v in pytree.tree_leaves(given) if isinstance(v, Tensor)]
        inputs += [self.module.get_buffer(name) for name in self.signature.state]
        written = {TensorKey.of(inputs[index]): index for index in self.signature.writes}
        results = enumerate(self._call(given))
        keys = {i: TensorKey.of(value) for i, value in results if isinstance(value, Tensor)}
        return {i: written[key] for i, key in keys.items() if key in written}

    def _unknown(self, changed: Sequence[str]) -> list[str]:
        return [name for name in changed if name not in self.state]

    def _second_batch(self, values: Mapping[str, Any], state: list[Tensor]) -> None:
        for step in (1, 2, 0):  # another size where one is free and the model takes it
            sizes = larger(self.signature, step)
            if step and not sizes:
                continue
            other = other_batch(self.gm, self.signature, values, sizes)
            if (expected := self._tried(other)) is not None:
                self._check(expected, other, state, "a second batch", ())
                return

    def _tried(self, values: Mapping[str, Any]) -> list[Any] | None:
        """Return what the model does on values that may mean nothing to it: then None. What it
        keeps is afterwards as before."""
        kept = Snapshot(self.module)
        try:
            found = self._run_model(values)
            return list(pytree.tree_map_only(Tensor, torch.clone, found))
        except Exception:
            return None
        finally:
            kept.restore()

    def _without_ones(self, values: Mapping[str, Any], state: list[Tensor]) -> Iterator[Condition]:
        """Yield a condition for each free size of which 1 is computed otherwise: by itself, or with
        all sizes of the example's that are equal to it, which may be the batch of other inputs."""
        for name, size in self.signature.example_sizes.items():
            if size == 1 or self._agrees_at({name: 1}, values, state) is not False:
                continue
            alike = {n: 1 for n, other in self.signature.example_sizes.items() if other == size}
            others = [f"{n} == 1" for n in alike if n != name]
            if others and self._agrees_at(alike, values, state):
                yield Condition(" or ".join([f"{name} != 1", " and ".join(others)]))
            else:
                yield Condition(f"{name} != 1")

    def _agrees_at(
        self, sizes: Mapping[str, int], values: Mapping[str, Any], state: list[Tensor]
    ) -> bool | None:
        """Tell whether both agree on other sizes; None where one of them does not take these."""
        if not self.signature.takes(sizes):
            return None
        other = other_batch(self.gm, self.signature, values, sizes)
        if (expected := self._tried(other)) is None:
            return None
        try:
            self._check(expected, other, state, f"{sizes}", ())
        except UnsupportedError:
            return False
        return True

    def _agree(
        self,
        values: Mapping[str, Any],
        state: list[Tensor],
        what: str,
        changed: Sequence[str] = (),
    ) -> list[Tensor]:
        return self._check(self._run_model(values), values, state, what, changed)

    def _run_model(self, values: Mapping[str, Any]) -> list[Any]:
        """Return the model's results, the arguments after the call, and its state."""
        given = _cloned(values)
        arguments = [v for v in pytree.tree_leaves(given) if isinstance(v, Tensor)]
        results = self._call(given)
        kept = [self.module.get_buffer(name).clone() for name in self.signature.state]
        return [results, arguments, kept]

    def _call(self, given: Mapping[str, Any]) -> list[Any]:
        """Call the model as the example does, and return the leaves of its result."""
        args, kwargs = self.bound.split(given)
        with torch.no_grad(), same_seed(pytree.tree_leaves(dict(given))):
            results = self.module(*args, **kwargs)
        return pytree.tree_leaves(results)

    def _check(
        self,
        expected: list[Any],
        values: Mapping[str, Any],
        state: list[Tensor],
        what: str,
        changed: Sequence[str],
    ) -> list[Tensor]:
        """Raise where the graph differs from what the model did; return the state after."""
        leaves = [v for v in pytree.tree_leaves(_cloned(values)) if isinstance(v, Tensor)]
        inputs = [*leaves, *state]
        with torch.no_grad(), same_seed(inputs):
            try:
                found = list(self.gm(*inputs))
            except Exception as error:
                raise UnsupportedError(
                    f"expected the captured graph to run on {what}, as the model does, found "
                    f"{type(error).__name__}: {error}; capture with dynamic_shapes=None"
                ) from error
        n_results = self.signature.out_spec.num_leaves
        after = dict(zip(self.signature.writes, found[n_results:], strict=True))
        kept = self.signature.next_state(inputs, found)
        for kind, want, got in (
            ("results", expected[0], found[:n_results]),
            ("arguments", expected[1], [after.get(i, v) for i, v in enumerate(leaves)]),
            ("buffers", expected[2], kept),
        ):
            why = difference(want, got)
            if why:
                raise UnsupportedError(
                    _changes(changed)
                    if changed
                    else f"expected the captured graph to compute what the model computes, found "
                    f"other {kind} for {what}: {why}. torch.export made a constant of something "
                    "that varies, or the model is not deterministic; dynamic_shapes=None fixes "
                    "every size"
                )
        return kept


def _changes(names: Sequence[str]) -> str:
    return (
        "expected a model that keeps nothing between calls but in buffers that it writes to in "
        f"place, found that a call changes {', '.join(map(repr, names[:3]))}; make it a buffer "
        "(register_buffer) of fixed size, or pass it as an argument and return it"
    )


def larger(signature: Signature, step: int) -> dict[str, int]:
    """Return the free sizes that can be `step` larger than in the example, then."""
    grown = {name: size + step for name, size in signature.example_sizes.items()}
    return {name: size for name, size in grown.items() if signature.takes({name: size})}


def other_batch(
    gm: GraphModule, signature: Signature, values: Mapping[str, Any], sizes: Mapping[str, int]
) -> dict[str, Any]:
    """Return arguments like `values` with other free sizes and other numbers.

    Floating values are shifted by one sample and halved; integers and booleans keep to those of the
    example, which mean something to the model.

    Args:
        gm: the graph, whose inputs tell which sizes are free.
        signature: its signature.
        values: the example's arguments by name.
        sizes: the free sizes that are others.
    """
    nodes = iter(gm.graph.find_nodes(op="placeholder"))
    leaves, spec = pytree.tree_flatten(dict(values))
    others = [
        _other(value, [hint(size, sizes) for size in val_of(next(nodes)).shape])
        if isinstance(leaf, Leaf)
        else value
        for leaf, value in zip(signature.leaves, leaves, strict=True)
    ]
    return dict(pytree.tree_unflatten(others, spec))


def _other(value: Tensor, shape: Sequence[int]) -> Tensor:
    for dim, size in enumerate(shape):
        if size != value.shape[dim]:
            index = torch.arange(size, device=value.device) % value.shape[dim]
            value = value.index_select(dim, index)
    if value.ndim and is_inexact(value):
        return value.roll(1, 0) * 0.5
    return value * 0.5 if is_inexact(value) else value.clone()


def difference(expected: Sequence[Any], found: Sequence[Any]) -> str | None:
    """Return how the tensors among `found` differ from `expected` by more than rounding, None where
    they do not."""
    if len(expected) != len(found):
        return f"{len(expected)} values against {len(found)}"
    for index, (a, b) in enumerate(zip(expected, found, strict=True)):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            if not same_plain(a, b):
                return f"value {index} is {str(a)[:60]!r} against {str(b)[:60]!r}"
            continue
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"value {index} is {a.dtype} {list(a.shape)} against {b.dtype} {list(b.shape)}"
        relative = relative_difference(a, b)
        if not relative <= TOLERANCE.get(a.dtype.to_real(), 0.0):
            return f"value {index} differs by {relative:.1e} of its size"
    return None


def same_plain(a: Any, b: Any) -> bool:
    """Tell whether two results that are not both tensors are the same."""
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-6) or (math.isnan(a) and math.isnan(b))
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and bool(a == b)


def relative_difference(expected: Tensor, found: Tensor) -> float:
    """Return the largest over the samples (dimension 0) of |expected - found| / |expected|.

    Samples smaller than the tensor's mean size are compared with that. Infinities and NaN must be
    at the same places. Of integers and booleans, the share that differs.
    """
    if not expected.numel():
        return 0.0
    if not is_inexact(expected):
        return float((expected != found).float().mean())
    expected, found = as_real(expected), as_real(found)
    rows = len(expected) if expected.ndim > 1 else 1
    a, b = (t.detach().double().reshape(rows, -1) for t in (expected, found))
    same = (a == b) | (a.isnan() & b.isnan())
    size = torch.where(a.isfinite(), a, 0.0).norm(dim=1)
    noise = torch.where(same, 0.0, a - b).norm(dim=1)
    worst = (noise / torch.maximum(size, size.mean()).clamp(min=1e-300)).max()
    return float(worst) if not worst.isnan() else float("inf")


def _cloned(values: Mapping[str, Any]) -> dict[str, Any]:
    return dict(pytree.tree_map_only(Tensor, torch.clone, dict(values)))
