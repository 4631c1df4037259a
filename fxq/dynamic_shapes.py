"""Which sizes of the inputs stay free: from the few that a user names to what torch.export takes.

    dynamic_shapes={"input_ids": {1: "tokens"}, "mask": {1: "tokens"}}

Everything that is not named is fixed. Equal names are one size; `Dim.AUTO` and the like are torch's
own.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.export import Dim
from torch.utils import _pytree as pytree

from fxq.errors import did_you_mean


def export_shapes(
    values: Mapping[str, Any], named: Mapping[str, Any] | Sequence[Any]
) -> dict[str, Any]:
    """Return the `dynamic_shapes` of torch.export for arguments of a model.

    Args:
        values: the arguments by name.
        named: of some of them, by name or in order, which dimensions are free: of a tensor a
            mapping from dimension to name, or a sequence with an entry for each; of a container, of
            some of its entries.
    Raises:
        ValueError: an argument or dimension that is not there.
        TypeError: a description in another form.
    """
    if not isinstance(named, Mapping | tuple | list):
        raise TypeError(
            f'dynamic_shapes: expected "batch", None or {{argument: {{dimension: name}}}}, found '
            f"{named!r}"
        )
    named = _entries(named, [*values], "argument", "the example")
    dims: dict[str, Any] = {}
    return {name: _free(value, named.get(name), name, dims) for name, value in values.items()}


def unnamed(shapes: Any) -> tuple[Any, int]:
    """Return what `export_shapes` returned with `Dim.AUTO` for every name, and how many it had."""
    leaves, spec = pytree.tree_flatten(shapes)
    named = [isinstance(leaf, Dim) for leaf in leaves]
    free = [Dim.AUTO if name else leaf for leaf, name in zip(leaves, named, strict=True)]
    return pytree.tree_unflatten(free, spec), sum(named)


def why_not_free(text: str) -> str | None:
    """Return what torch.export found wrong with names of free sizes, and what to do; None where
    `text`, its message, is about something else.

    Torch ends such a message with how the names should be defined: `tokens = 8` of one that is no
    free size, `b = a` of two that are one, `b = Dim('b', min=3)` and `w = 4*_w` of what is bounded.
    """
    fixes = re.findall(r"^  (\w+) = (.+)$", text.partition("Suggested fixes:")[2], re.MULTILINE)
    found = []
    for name, fix in ((name, fix) for name, fix in fixes if not name.startswith("_")):
        if fix.isdigit():
            found.append(
                f"{name!r} is always {fix}: leave it out, or name the sizes of other inputs that "
                "it must equal likewise"
            )
        elif fix.isidentifier():
            found.append(f"{name!r} is always {fix!r}: give both the same name")
        else:
            found.append(
                f"{name!r} cannot be any size ({fix}): give torch.export.Dim.AUTO in its place, "
                "which finds the bounds"
            )
    if not found:
        return None
    return "dynamic_shapes: expected sizes that the model leaves free, found that " + "; ".join(
        found
    )


def _entries(named: Any, keys: Sequence[Any], what: str, where: str) -> dict[Any, Any]:
    """Return a description of what has `keys` as a mapping: of some of them, by key or in order."""
    if named is None:
        return {}
    if not isinstance(named, Mapping | tuple | list):
        raise TypeError(
            f"dynamic_shapes: expected a mapping or a sequence for what {where} holds, found "
            f"{named!r}"
        )
    if not isinstance(named, Mapping):
        if len(named) > len(keys):
            raise ValueError(
                f"dynamic_shapes: expected at most {len(keys)} entries for {where}, found "
                f"{len(named)}"
            )
        return dict(zip(keys, named, strict=False))
    if unknown := [key for key in named if key not in keys]:
        near = (
            did_you_mean(unknown[0], keys)
            if all(isinstance(key, str) for key in (*keys, unknown[0]))
            else f"expected one of {[*keys]}"
        )
        raise ValueError(f"dynamic_shapes: no {what} {unknown[0]!r} in {where}; {near}")
    return dict(named)


def _free(value: Any, named: Any, where: str, dims: dict[str, Any]) -> Any:
    """Return the description of one argument, with all of what it holds in it."""
    if isinstance(value, Tensor):
        return _of_tensor(value, named, where, dims)
    if isinstance(value, Mapping):
        known = _entries(named, [*value], "key", where)
        return {k: _free(v, known.get(k), f"{where}[{k!r}]", dims) for k, v in value.items()}
    if isinstance(value, tuple | list):
        known = _entries(named, range(len(value)), "entry", where)
        return type(value)(
            _free(v, known.get(i), f"{where}[{i}]", dims) for i, v in enumerate(value)
        )
    if isinstance(named, str | Mapping | tuple | list) and named:
        raise TypeError(
            f"dynamic_shapes: expected None for {where!r}, which is no tensor, found {named!r}"
        )
    return named


def _of_tensor(value: Tensor, named: Any, where: str, dims: dict[str, Any]) -> Any:
    if named is None:
        return None
    if not isinstance(named, Mapping | tuple | list):
        raise TypeError(
            f"dynamic_shapes: expected {{dimension: name}} for {where!r}, found {named!r}"
        )
    entries = dict(named) if isinstance(named, Mapping) else dict(enumerate(named))
    free: dict[int, Any] = {}
    for dim, entry in entries.items():
        if type(dim) is not int or not -value.ndim <= dim < value.ndim:
            raise ValueError(
                f"dynamic_shapes: expected dimensions of {where!r} {list(value.shape)}, found "
                f"{dim!r}"
            )
        if dim % value.ndim in free:
            raise ValueError(
                f"dynamic_shapes: expected each dimension of {where!r} {list(value.shape)} once, "
                f"found {dim!r} again"
            )
        free[dim % value.ndim] = _dim(entry, value.shape[dim], where, dims)
    return free


def _dim(entry: Any, size: int, where: str, dims: dict[str, Any]) -> Any:
    if isinstance(entry, str):
        if not entry.isidentifier():
            raise ValueError(
                f"dynamic_shapes: expected a Python name for {where!r}, found {entry!r}"
            )
        return dims.setdefault(entry, Dim(entry))
    if entry is None or isinstance(entry, Dim | type(Dim.AUTO)) or entry == size:
        return entry
    raise TypeError(
        f"dynamic_shapes: expected the name of a free size, or None, for {where!r}, found {entry!r}"
    )
