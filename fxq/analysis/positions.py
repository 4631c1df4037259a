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

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxq.analysis.data_sizes import at_data_sizes, has_data_sizes
from fxq.analysis.following import MOVES, Following, Labels, by_movement, keep, pad
from fxq.analysis.labels import compact, filled, sizes_of
from fxq.analysis.streams import NOWHERE, UNKNOWN, Positions, Stream
from fxq.graph import args_of, depends_on_data, hint, input_name, is_op, val_of
from fxq.operators import SPATIAL_AXES, Movement, movement_of, multiplied, operand

aten = torch.ops.aten
PICKED = 2**40  # streams of what an index picks begin at its multiples


def find_positions(gm: GraphModule) -> Positions:
    """Walk a graph (dialect QUANTIZED) and return the positions its attentions see."""
    if not has_data_sizes(gm):
        return _walked(gm)
    (most, originals), (least, of_least) = (at_data_sizes(gm, largest) for largest in (True, False))
    found, few = _walked(most), _walked(least).attention
    fewer = {of_least[node]: numbers for node, numbers in few.items()}
    every, found.attention = found.attention, {}
    for copy, numbers in every.items():
        node = originals[copy]
        n_first = fewer[node][0].shape[-1] if node in fewer else 0
        if not depends_on_data(node):
            found.attention[node] = numbers
        elif n_first and _begin_alike(fewer[node], numbers):
            found.attention[node], found.present[node] = numbers, n_first
    return found


def _walked(gm: GraphModule) -> Positions:
    walk = _Numbers()
    walk.walk(gm, _visit)
    return walk.found


def _begin_alike(few: Sequence[Tensor], many: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b[:, : a.shape[-1]]) for a, b in zip(few, many, strict=True))


class _Numbers(Following):
    blank = NOWHERE

    def __init__(self) -> None:
        super().__init__()
        self.found = Positions()
        self.next = NOWHERE + 1
        self._picked: dict[tuple[Node, bytes], Stream] = {}

    def picked_from(self, name: str | None, index: Node, numbers: Tensor) -> Stream:
        """Return the stream of what an index picks from tokens with these numbers."""
        key = index, numbers.numpy().tobytes()
        if key not in self._picked:
            base = PICKED * (1 + len(self._picked))  # the same at any number of tokens
            self._picked[key] = Stream(str(name), (PICKED,), base)
            self.found.streams.append(self._picked[key])
        return self._picked[key]


def _visit(walk: _Numbers, node: Node, labelled: list[Node]) -> None:
    attends = movement_of(node) in (Movement.ATTENTION, Movement.SPARSE_ATTENTION)
    by_data = any(map(depends_on_data, node.all_input_nodes))
    if depends_on_data(node) or (attends and by_data):
        return
    if node.op == "placeholder":
        _begin(walk, node)
    elif node.op == "output":
        for number in {n for read in labelled for n in compact(walk.of(read)).unique().tolist()}:
            if stream := walk.found.stream_of(number):
                walk.found.returned.add(stream.name)
    elif node.op == "call_function" and by_data:
        walk.set(node, _unknown(walk, node))
    elif node.op == "call_function" and (labelled or attends):
        rule = RULES.get(movement_of(node))
        if rule is None:
            pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
            rule = _pointwise if pointwise else _unknown
        walk.set(node, rule(walk, node))


def _begin(walk: _Numbers, node: Node) -> None:
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.ndim < 3 or not value.is_floating_point():
        return
    batch, *rest = sizes_of(node)
    stream = Stream(input_name(node), tuple(rest), walk.next)
    walk.next += torch.Size(rest).numel()
    walk.found.streams.append(stream)
    numbers = torch.arange(stream.base, walk.next).view(1, *rest)
    walk.labels[node] = numbers.expand(batch, *rest)


def _unknown(walk: _Numbers, node: Node) -> Labels:
    def unknown(value: Any) -> Tensor:
        return filled(tuple(map(hint, value.shape)), UNKNOWN)

    value = val_of(node)
    if isinstance(value, Tensor):
        return unknown(value)
    is_list = isinstance(value, list | tuple) and all(isinstance(v, Tensor) for v in value)
    return [unknown(v) for v in value] if is_list else None


def _placeless(walk: _Numbers, node: Node) -> Labels:
    return None


def _pointwise(walk: _Numbers, node: Node) -> Tensor:
    """The operand with the most places decides; others fill what it leaves open. Of as many places
    one whose last dimension was mixed counts, rather than one whose channels still are an input's,
    such as a table of rotary angles."""

    def rank(numbers: Tensor) -> tuple[int, int]:
        small = compact(numbers)
        channels = small.shape[-1] if small.ndim else 1
        return -small.numel() // channels, channels

    numbers = [walk.of(read) for read in node.all_input_nodes if read in walk.labels]
    numbers.sort(key=rank)
    sizes = sizes_of(node)
    result = numbers[0].expand(sizes)
    for other in numbers[1:]:
        _note_alignment(walk.found, compact(result), compact(other))
        small, more = torch.broadcast_tensors(compact(result), compact(other))
        result = torch.where(small == NOWHERE, more, small).expand(sizes)
    return result


def _note_alignment(found: Positions, one: Tensor, other: Tensor) -> None:
    """Note the streams of two operands with as many tokens each, all of one stream each."""
    if one.shape != other.shape or one.numel() < 2:
        return
    ends = [[found.stream_of(int(n)) for n in (x.amin(), x.amax())] for x in (one, other)]
    streams = [low if low is high else None for low, high in ends]
    if streams[0] is not None and streams[1] is not None and streams[0] is not streams[1]:
        found.aligned.add(frozenset(stream.name for stream in streams if stream is not None))


def _pick(walk: _Numbers, node: Node) -> Labels:
    """What an index picks of one stream is a stream by itself, of the same name: which of its
    tokens they are is in the data. Picked twice by one index they are the same tokens."""
    found, numbers = _index_of(node), compact(keep(walk, node))
    if found is None:
        return _unknown(walk, node)
    dim, index = found
    dim %= numbers.ndim
    names = walk.found.names_of(numbers)
    if len(names) != 1 or None in names or numbers.numel() != numbers.shape[dim]:
        return _unknown(walk, node)
    stream = walk.picked_from(names.pop(), index, numbers)
    sizes = sizes_of(node)
    shape = [size if axis == dim else 1 for axis, size in enumerate(sizes)]
    return torch.arange(stream.base, stream.base + sizes[dim]).view(shape).expand(sizes)


def _index_of(node: Node) -> tuple[int, Node] | None:
    """Return the axis that an operator picks from and its index, None where there are several."""
    if is_op(node, aten.index_select.default):
        return operand(node, "dim"), operand(node, "index")
    given = [(i, x) for i, x in enumerate(operand(node, "indices")) if x is not None]
    return given[0] if len(given) == 1 and val_of(given[0][1]).ndim == 1 else None


def _overwrite(walk: _Numbers, node: Node) -> Tensor:
    return walk.of(operand(node, "src")).expand(sizes_of(node))


def _as_complex(walk: _Numbers, node: Node) -> Tensor:
    return keep(walk, node)[..., 0]


def _as_real(walk: _Numbers, node: Node) -> Tensor:
    return keep(walk, node).unsqueeze(-1).expand(sizes_of(node))


def _pad(walk: _Numbers, node: Node) -> Tensor:
    return pad(walk, node, NOWHERE)


def _mix_channels(walk: _Numbers, node: Node) -> Labels:
    """Linear and products mix the last dimension of their first operand."""
    left = multiplied(node)[0]
    if val_of(left).ndim != val_of(node).ndim:
        return _unknown(walk, node)
    return walk.of(left)[..., :1].expand(sizes_of(node))


def _conv(walk: _Numbers, node: Node) -> Labels:
    """A window has the position of its first pixel."""
    numbers, sizes, stride = keep(walk, node), sizes_of(node), operand(node, "stride")
    unbatched = numbers.ndim != len(sizes_of(operand(node, "weight")))
    if unbatched or operand(node, "transposed", False):
        return _unknown(walk, node)
    numbers = numbers[:, :1]
    steps: Sequence[int] = stride if isinstance(stride, list | tuple) else [stride]
    for dim in range(2, len(sizes)):
        step = steps[dim - 2] if len(steps) > 1 else steps[0]
        at = (torch.arange(sizes[dim]) * step).clamp(max=numbers.shape[dim] - 1)
        numbers = numbers.index_select(dim, at)
    return numbers.expand(sizes)


def _resample(walk: _Numbers, node: Node) -> Tensor:
    """Pooling and interpolation: where in the input each place of the output lies."""
    numbers, sizes = keep(walk, node), sizes_of(node)
    for dim in range(len(sizes) - SPATIAL_AXES[movement_of(node)], len(sizes)):
        at = torch.arange(sizes[dim]) * numbers.shape[dim] // sizes[dim]
        numbers = numbers.index_select(dim, at)
    return numbers


def _reduce(walk: _Numbers, node: Node) -> Labels:
    """A sum over places has none."""
    dims, keepdim = operand(node, "dim", None), operand(node, "keepdim", False)
    if not isinstance(dims, int | list | tuple) or dims == []:
        return None
    numbers = compact(keep(walk, node))
    for dim in sorted(d % numbers.ndim for d in ([dims] if isinstance(dims, int) else dims))[::-1]:
        if numbers.shape[dim] > 1:
            return None
        numbers = numbers if keepdim else numbers.squeeze(dim)
    return numbers.expand(sizes_of(node))


def _attention(walk: _Numbers, node: Node) -> Labels:
    """The result stands where the queries do."""
    query, key, value = (walk.of(operand) for operand in args_of(node)[:3])
    result = query[..., :1].expand(*query.shape[:-1], value.shape[-1])
    if movement_of(node) is Movement.SPARSE_ATTENTION:
        return [result, result[..., 0]]
    walk.found.attention[node] = tuple(map(_along_sequence, (query, key, value)))  # type: ignore[assignment]
    return result


def _along_sequence(numbers: Tensor) -> Tensor:
    """Return the numbers `[R, S]` along the second to last dimension of every sequence there is,
    UNKNOWN where the channels of a token differ."""
    small = compact(numbers)
    low, high = small.amin(-1), small.amax(-1)
    return torch.where(low == high, low, UNKNOWN).flatten(0, -2).expand(-1, numbers.shape[-2])


RULES = MOVES | by_movement({
    keep: (
        Movement.COPY, Movement.DROPOUT, Movement.QUANTIZE, Movement.LAST_NORM,
        Movement.CHANNEL_NORM, Movement.SOFTMAX,
    ),
    _pick: (Movement.PICK,),
    _overwrite: (Movement.OVERWRITE,),
    _as_complex: (Movement.AS_COMPLEX,),
    _as_real: (Movement.AS_REAL,),
    _pad: (Movement.PAD,),
    _mix_channels: (Movement.LINEAR, Movement.MATMUL, Movement.ADDMM),
    _conv: (Movement.CONV,),
    _resample: (Movement.SPATIAL_1D, Movement.SPATIAL_2D, Movement.SPATIAL_3D),
    _reduce: (Movement.MEAN, Movement.SUM, Movement.REDUCE),
    _attention: (Movement.ATTENTION, Movement.SPARSE_ATTENTION),
    _placeless: (Movement.SHAPE_ONLY, Movement.ONES, Movement.LOOKUP, Movement.QPARAMS),
})  # fmt: skip
