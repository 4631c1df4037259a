"""torch.export with sizes that stay free: which of a model's do, and for which values.

A size is free where tracing found nothing that needs it as a number. Bounds and conditions that the
model's own branches put on it come from what torch.export notes; of a size of 1 it notes nothing
(`fxq.checking` tries that).
"""

import contextlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from fxq.binding import Bound
from fxq.conditions import Condition, conditions_of
from fxq.dynamic_shapes import export_shapes, unnamed, why_not_free
from fxq.errors import UnsupportedError
from fxq.graph import shape_of
from fxq.signature import Leaf, Signature


def export(
    model: nn.Module, bound: Bound, dynamic_shapes: Any
) -> tuple[ExportedProgram, tuple[str, ...]]:
    """Return a model as torch.export has it, with sizes free as `fxq.capture` says, and why the
    batch is not where it is not."""
    values = bound.values
    if dynamic_shapes != "batch":
        shapes = None if dynamic_shapes is None else export_shapes(values, dynamic_shapes)
        if shapes is not None:  # of a part of a larger tensor torch would compare strides to sizes
            values = pytree.tree_map_only(Tensor, torch.clone, values)
        try:
            return try_export(model, bound, values, shapes), ()
        except UnsupportedError as error:
            if why := why_not_free(str(error.__cause__)):
                raise ValueError(why) from error
            if found := _export_unproved(model, bound, values, shapes, error):
                return found, ()
            raise
    leaves, spec = pytree.tree_flatten(values)
    sizes = [t.shape[0] for t in leaves if isinstance(t, Tensor) and t.ndim]
    batch = sizes[0] if sizes else None

    has_batch = [isinstance(t, Tensor) and t.ndim > 0 and t.shape[0] == batch for t in leaves]
    try:
        while any(has_batch):
            # Tracing takes a size of 1 for a constant, and broadcasts on the strength of it:
            # capture two samples instead.
            flat = [
                torch.cat([v, v]) if free and batch == 1 else v
                for v, free in zip(leaves, has_batch, strict=True)
            ]
            dynamic = [{0: Dim.AUTO} if free else None for free in has_batch]
            traced, shapes = (pytree.tree_unflatten(x, spec) for x in (flat, dynamic))
            exported = try_export(model, bound, traced, shapes)
            stays = _free_batches(exported, has_batch)
            if batch != 1 or stays == has_batch:
                return exported, ()
            has_batch = stays  # a model may fix a size, as `len(x)` does: then to the example's
        return try_export(model, bound, values, None), ()
    except UnsupportedError as error:
        note = f"the batch is fixed at {batch}: capturing it free failed ({error.__cause__})"
        return try_export(model, bound, values, None), (note[:300],)


def _export_unproved(
    model: nn.Module, bound: Bound, values: Mapping[str, Any], shapes: Any, error: UnsupportedError
) -> ExportedProgram | None:
    """Return a model whose named sizes torch.export refuses because it cannot prove a condition, as
    torch 2.11 cannot that min(8 * t, 16 * t) is 8 * t; None where they do not stay free unnamed."""
    if "Constraints violated" not in str(error.__cause__):
        return None
    free, n_named = unnamed(shapes)
    exported = try_export(model, bound, values, free)
    return exported if n_free_sizes(exported) >= n_named else None


@contextlib.contextmanager
def noting_lengths(places: list[str]) -> Iterator[None]:
    """Note where in the user's code `len` of a tensor is taken, which must be a number, while the
    size is free."""
    length = Tensor.__len__

    def noting(self: Tensor) -> int:
        if self.ndim and type(self.shape[0]) is not int:
            frame = sys._getframe(1)
            places.append(f"{frame.f_code.co_filename}:{frame.f_lineno}")
        return length(self)

    Tensor.__len__ = noting  # type: ignore[method-assign]
    try:
        yield
    finally:
        Tensor.__len__ = length  # type: ignore[method-assign]


def n_free_sizes(exported: ExportedProgram) -> int:
    """Count the sizes of tensors among the inputs that are free."""
    inputs = exported.graph.find_nodes(op="placeholder")
    shapes = [shape_of(n) for n in inputs if isinstance(n.meta["val"], Tensor)]
    return sum(not isinstance(size, int) for shape in shapes for size in shape)


def _free_batches(exported: ExportedProgram, wanted: Sequence[bool]) -> list[bool]:
    """Return which of the sizes that were asked to be free are."""
    inputs = exported.graph.find_nodes(op="placeholder")[-len(wanted) :]
    return [
        free and not isinstance(shape_of(node)[0], int)
        for node, free in zip(inputs, wanted, strict=True)
    ]


def fixed_batches(signature: Signature, values: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what to say where the model fixes sizes that `export` wanted to be free."""
    leaves = [leaf for leaf in signature.tensors if leaf.shape]
    fixed = [leaf for leaf in leaves if isinstance(leaf.shape[0], int)]
    if fixed and len(fixed) == len(leaves):
        return (f"the model fixes its batch at {fixed[0].shape[0]}",)
    tensors = (v for v in pytree.tree_leaves(dict(values)) if isinstance(v, Tensor) and v.ndim)
    batch = next((len(value) for value in tensors), None)
    names = [leaf.name for leaf in fixed if leaf.shape[0] == batch]
    return (f"the model fixes the first size of {', '.join(names)} at {batch}",) if names else ()


def try_export(
    model: nn.Module, bound: Bound, values: Mapping[str, Any], dynamic_shapes: Any
) -> ExportedProgram:
    """Call torch.export with `values`, given as the example gives them; what it raises becomes an
    `UnsupportedError`."""
    args, kwargs = bound.split(values)
    with torch.no_grad(), refusing(type(model).__name__):
        return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes)


@contextlib.contextmanager
def refusing(name: str) -> Iterator[None]:
    """Turn what torch.export raises, a dozen kinds, into an `UnsupportedError`."""
    hooks = nn.modules.module._global_buffer_registration_hooks
    before = set(hooks)
    try:
        yield
    except Exception as error:
        # That of torch 2.11 leaves its hook on every module, and Dynamo breaks graphs at hooks.
        for key in set(hooks) - before:
            del hooks[key]
        reason = next((line for line in str(error).splitlines() if line.strip()), repr(error))
        remedy = "(torch.export.draft_export shows the place in its source)"
        if found := re.match(r"Found <class '[\w.]*?(\w+)'> in output, which is not", reason):
            reason = f"a call returns a {found[1]}, which no graph can return."
            remedy = "A cache is not made where the example has use_cache=False."
        raise UnsupportedError(
            f"{name} cannot be captured by torch.export: {reason.strip()} {remedy}"
        ) from error


def ranges_of(exported: ExportedProgram) -> dict[str, tuple[int, int | None]]:
    """Return the bounds the model's own branches put on free sizes.

    A lower bound of 2 is torch.export's own, which keeps sizes of 0 and 1 apart while tracing.
    """
    ranges = {}
    for symbol, found in exported.range_constraints.items():
        low = int(found.lower) if found.lower > 2 else 1
        high = int(found.upper) if found.upper < sys.maxsize // 2 else None
        if low > 1 or high is not None:
            ranges[str(symbol)] = (low, high)
    return ranges


def conditions_on_sizes(
    exported: ExportedProgram, leaves: Sequence[Any]
) -> tuple[tuple[Condition, ...], tuple[str, ...]]:
    """Return what the free sizes must satisfy for the model to take the branches that were traced,
    and what to say of conditions in another form."""
    shapes = {leaf.name: leaf.shape for leaf in leaves if isinstance(leaf, Leaf)}
    guards: Sequence[str] = getattr(exported, "_guards_code", None) or ()
    conditions, others = conditions_of(guards, shapes)
    return tuple(conditions), tuple(f"holds only where {guard}" for guard in others)
