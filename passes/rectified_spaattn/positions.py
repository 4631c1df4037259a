"""Token positions: which element of which input stands at each place of a sequence.

A model's inputs with three dimensions or more are *streams*: latents `[B, C, T, H, W]`, packed
tokens `[B, S, C]`, text `[B, S, C]`. Each of their elements has a number. One walk over the graph
gives every value a tensor of such numbers, in its own shape: views, concatenation and slices are
run on the numbers themselves, so that no layout has to be known; operators that mix channels
(linear, the convolution of a patch embedding) keep the first channel's; attention keeps its
queries'. What has no position is `NOWHERE`: parameters, time-steps, pooled text. What a rule is
missing for is `UNKNOWN`.

So the sequence of any attention names its tokens, text or visual, in whatever order a model puts
them, and visual tokens still hold the coordinates of the pixels they were cut from.
"""

import operator
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from fxq.account import ATTENTION, CONV, LINEAR, MATMUL, SPARSE_ATTENTION
from fxq.graph import args_of, hint, input_name, is_op, val_of
from fxq.passes.common.scaling.labels import compact, settle, sizes_of
from fxq.passes.common.scaling.rules import (
    COPIES,
    LAST_NORMS,
    PADS,
    REARRANGES,
    RESHAPES,
    SHAPE_ONLY,
    SPATIAL,
)

aten, ops = torch.ops.aten, torch.ops.fxq
NOWHERE = 0
UNKNOWN = -1
KEEPS = COPIES | LAST_NORMS | {
    aten.group_norm.default, aten.batch_norm.default, aten.softmax.int, aten._softmax.default,
    ops.quantize.default, ops.dequantize.default,
}  # fmt: skip
SCATTERS = frozenset({aten.slice_scatter.default, aten.select_scatter.default})
REDUCTIONS = frozenset({
    aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default, aten.var.correction,
})  # fmt: skip
PLACELESS = SHAPE_ONLY | {aten.embedding.default, ops.choose_qparams.default}


@dataclass(frozen=True)
class Stream:
    """An input whose elements have positions.

    Args:
        name: of the model's argument.
        shape: its sizes behind the batch.
        base: number of its first element.
    """

    name: str
    shape: tuple[int, ...]
    base: int


@dataclass
class Positions:
    """What one walk found.

    Attributes:
        streams: the inputs with positions.
        attention: every dense attention node -> numbers along the sequence of its queries, keys
            and values, each `[S]`, int64, free sizes as at capture. One whose sizes depend on the
            data is left out.
        returned: names of the streams that the model's results have positions of.
    """

    streams: list[Stream] = field(default_factory=list)
    attention: dict[Node, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)
    returned: set[str] = field(default_factory=set)

    def stream_of(self, number: int) -> Stream | None:
        """Return the stream that an element's number belongs to, None for NOWHERE and UNKNOWN."""
        return next((s for s in reversed(self.streams) if number >= s.base), None)


def find_positions(gm: GraphModule) -> Positions:
    """Walk a graph (dialect QUANTIZED) once and return the positions its attentions see."""
    walk = _Walk()
    for node in gm.graph.nodes:
        walk.visit(node)
    return walk.found


class _Walk:
    """The numbers of every value that is still to be read."""

    def __init__(self) -> None:
        self.found = Positions()
        self.numbers: dict[Node, Any] = {}  # a Tensor, or a list of them for several results
        self.unread: Counter[Node] = Counter()
        self.next = NOWHERE + 1

    def visit(self, node: Node) -> None:
        reads = [read for read in node.all_input_nodes if read in self.numbers]
        if _has_unbacked(node) or (
            is_op(node, *ATTENTION) and any(map(_has_unbacked, node.all_input_nodes))
        ):
            return
        if any(map(_has_unbacked, node.all_input_nodes)) and node.op == "call_function":
            self.numbers[node] = _unknown(self, node)
            self.unread[node] = len(node.users)
            return
        if node.op == "placeholder":
            self._begin(node)
        elif node.op == "output":
            for read in reads:
                for number in compact(self.of(read)).unique().tolist():
                    if stream := self.found.stream_of(number):
                        self.found.returned.add(stream.name)
        elif node.op == "call_function" and (reads or is_op(node, *ATTENTION)):
            self._apply(node)
        self.unread[node] = len(node.users)
        for read in node.all_input_nodes:  # tensors of 100,000 tokens: do not keep them all
            self.unread[read] -= 1
            if not self.unread[read]:
                self.numbers.pop(read, None)

    def of(self, value: Any) -> Tensor:
        """Return the numbers of an argument."""
        found = self.numbers.get(value) if isinstance(value, Node) else None
        if isinstance(found, Tensor):
            return found
        sizes = sizes_of(value)
        return torch.full((1,) * len(sizes), NOWHERE).expand(sizes)

    def _begin(self, node: Node) -> None:
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or value.ndim < 3 or not value.is_floating_point():
            return
        batch, *rest = sizes_of(node)
        stream = Stream(input_name(node), tuple(rest), self.next)
        count = torch.Size(rest).numel()
        self.found.streams.append(stream)
        self.numbers[node] = (
            torch.arange(self.next, self.next + count).view(1, *rest).expand(batch, *rest)
        )
        self.next += count

    def _apply(self, node: Node) -> None:
        rule = RULES.get(node.target)
        if rule is None:
            pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
            rule = _pointwise if pointwise else _unknown
        result = rule(self, node)
        if isinstance(result, Tensor):
            result = settle(result)
            if not bool((compact(result) != NOWHERE).any()):
                return
        elif result is not None:
            result = [settle(part) for part in result]
        if result is not None:
            self.numbers[node] = result


Rule = Callable[[_Walk, Node], Any]


def _has_unbacked(node: Node) -> bool:
    """Tell whether a size of a node's value depends on the data."""
    values = tree_leaves(node.meta.get("val"))
    return any(
        isinstance(size, torch.SymInt) and size.node.hint is None
        for value in values
        for size in (value.shape if isinstance(value, Tensor) else (value,))
    )


def _unknown(walk: _Walk, node: Node) -> Any:
    def unknown(value: Any) -> Tensor:
        sizes = tuple(hint(size) for size in value.shape)
        return torch.full((1,) * len(sizes), UNKNOWN).expand(sizes)

    value = val_of(node)
    if isinstance(value, Tensor):
        return unknown(value)
    is_list = isinstance(value, list | tuple) and all(isinstance(v, Tensor) for v in value)
    return [unknown(v) for v in value] if is_list else None


def _placeless(walk: _Walk, node: Node) -> None:
    return None


def _pointwise(walk: _Walk, node: Node) -> Tensor:
    """The operand with the most places decides; others fill what it leaves open. Of as many places
    one whose last dimension was mixed counts, rather than one whose channels still are an input's,
    such as a table of rotary angles."""

    def rank(numbers: Tensor) -> tuple[int, int]:
        small = compact(numbers)
        channels = small.shape[-1] if small.ndim else 1
        return -small.numel() // channels, channels

    numbers = [walk.of(read) for read in node.all_input_nodes if read in walk.numbers]
    numbers.sort(key=rank)
    sizes = sizes_of(node)
    result = numbers[0].expand(sizes)
    for other in numbers[1:]:
        small, more = torch.broadcast_tensors(compact(result), compact(other))
        result = torch.where(small == NOWHERE, more, small).expand(sizes)
    return result


def _keep(walk: _Walk, node: Node) -> Tensor:
    return walk.of(args_of(node)[0])


def _copy(walk: _Walk, node: Node) -> Tensor:
    return walk.of(args_of(node)[1]).expand(sizes_of(node))


def _reshape(walk: _Walk, node: Node) -> Tensor:
    return walk.of(args_of(node)[0]).reshape(sizes_of(node))


def _rearrange(walk: _Walk, node: Node) -> Any:
    """Run the operator on the numbers."""

    def value(read: Node) -> Any:
        val = val_of(read)
        if isinstance(val, Tensor):
            return walk.of(read)
        return hint(val) if isinstance(val, int | torch.SymInt) else val

    args, kwargs = map_arg((node.args, node.kwargs), value)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _getitem(walk: _Walk, node: Node) -> Any:
    source, index = args_of(node)
    return walk.numbers[source][index]


def _as_complex(walk: _Walk, node: Node) -> Tensor:
    return walk.of(args_of(node)[0])[..., 0]


def _as_real(walk: _Walk, node: Node) -> Tensor:
    return walk.of(args_of(node)[0]).unsqueeze(-1).expand(sizes_of(node))


def _pad(walk: _Walk, node: Node) -> Tensor:
    return torch.constant_pad_nd(walk.of(args_of(node)[0]), args_of(node)[1], NOWHERE)


def _mix_channels(walk: _Walk, node: Node) -> Tensor:
    """Linear and products mix the last dimension of their first operand."""
    left = args_of(node)[1 if is_op(node, aten.addmm.default, aten.baddbmm.default) else 0]
    if val_of(left).ndim != val_of(node).ndim:
        return _unknown(walk, node)
    return walk.of(left)[..., :1].expand(sizes_of(node))


def _conv(walk: _Walk, node: Node) -> Tensor:
    """A window has the position of its first pixel."""
    x, weight = args_of(node)[:2]
    numbers, sizes = walk.of(x), sizes_of(node)
    stride: Any = args_of(node)[3] if len(node.args) > 3 else node.kwargs.get("stride", 1)
    unbatched = numbers.ndim != len(sizes_of(weight))
    if unbatched or (is_op(node, aten.convolution.default) and args_of(node)[6]):  # transposed
        return _unknown(walk, node)
    numbers = numbers[:, :1]
    steps: Sequence[int] = stride if isinstance(stride, list | tuple) else [stride]
    for dim in range(2, len(sizes)):
        step = steps[dim - 2] if len(steps) > 1 else steps[0]
        at = (torch.arange(sizes[dim]) * step).clamp(max=numbers.shape[dim] - 1)
        numbers = numbers.index_select(dim, at)
    return numbers.expand(sizes)


def _resample(walk: _Walk, node: Node) -> Tensor:
    """Pooling and interpolation: where in the input each place of the output lies."""
    numbers, sizes = walk.of(args_of(node)[0]), sizes_of(node)
    for dim in range(len(sizes) - SPATIAL[node.target], len(sizes)):
        at = torch.arange(sizes[dim]) * numbers.shape[dim] // sizes[dim]
        numbers = numbers.index_select(dim, at)
    return numbers


def _reduce(walk: _Walk, node: Node) -> Tensor | None:
    """A sum over places has none."""
    x, dims, *rest = (*args_of(node), None)
    if dims is None or not isinstance(dims, int | list | tuple):
        return None
    keep = bool(rest and rest[0]) or bool(node.kwargs.get("keepdim"))
    numbers = compact(walk.of(x))
    for dim in sorted(d % numbers.ndim for d in ([dims] if isinstance(dims, int) else dims))[::-1]:
        if numbers.shape[dim] > 1:
            return None
        numbers = numbers if keep else numbers.squeeze(dim)
    return numbers.expand(sizes_of(node))


def _attention(walk: _Walk, node: Node) -> Any:
    """The result stands where the queries do."""
    query, key, value = (walk.of(operand) for operand in args_of(node)[:3])
    result = query[..., :1].expand(*query.shape[:-1], value.shape[-1])
    if is_op(node, SPARSE_ATTENTION):
        return [result, result[..., 0]]
    walk.found.attention[node] = tuple(map(_along_sequence, (query, key, value)))  # type: ignore[assignment]
    return result


def _along_sequence(numbers: Tensor) -> Tensor:
    """Return the numbers `[S]` along the second to last dimension, UNKNOWN where others vary."""
    small = compact(numbers.movedim(-2, 0)).flatten(1)
    low, high = small.amin(1), small.amax(1)
    return torch.where(low == high, low, UNKNOWN).expand(numbers.shape[-2])


RULES: dict[Any, Rule] = {
    **dict.fromkeys(KEEPS, _keep),
    **dict.fromkeys(RESHAPES, _reshape),
    **dict.fromkeys(REARRANGES | SCATTERS, _rearrange),
    **dict.fromkeys(PADS, _pad),
    **dict.fromkeys(LINEAR | MATMUL, _mix_channels),
    **dict.fromkeys(CONV, _conv),
    **dict.fromkeys(SPATIAL, _resample),
    **dict.fromkeys(REDUCTIONS, _reduce),
    **dict.fromkeys(ATTENTION, _attention),
    **dict.fromkeys(PLACELESS, _placeless),
    aten.copy.default: _copy,
    aten.view_as_complex.default: _as_complex,
    aten.view_as_real.default: _as_real,
    operator.getitem: _getitem,
}
