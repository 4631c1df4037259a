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
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxq.analysis.following import MOVES, Following, Labels, by_movement, keep, pad
from fxq.analysis.labels import compact, filled, sizes_of
from fxq.graph import args_of, depends_on_data, hint, input_name, val_of
from fxq.operators import SPATIAL_AXES, Movement, movement_of, multiplied, operand

NOWHERE = 0
UNKNOWN = -1


@dataclass(frozen=True)
class Stream:
    """An input whose elements have positions.

    Args:
        name: of the model's argument.
        shape: its sizes after the batch.
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
        attention: every dense attention node -> numbers along the sequences of its queries, keys
            and values, each `[R, S]`, int64, free sizes as at capture. R sequences where those of a
            batch stand at different places (frames, windows), else 1. One whose sizes depend on
            the data is left out.
        returned: names of the streams that the model's results have positions of.
        aligned: pairs of streams whose tokens are added (or multiplied) one to one: they stand at
            the same places.
    """

    streams: list[Stream] = field(default_factory=list)
    attention: dict[Node, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)
    returned: set[str] = field(default_factory=set)
    aligned: set[frozenset[str]] = field(default_factory=set)

    @property
    def standing_for(self) -> set[str]:
        """Names of the streams that are returned or stand, token for token, where such a one does:
        what a denoiser's control branch is given."""
        found: set[str] = set()
        more = set(self.returned)
        while more:
            found |= more
            more = {name for pair in self.aligned if pair & found for name in pair} - found
        return found

    def stream_of(self, number: int) -> Stream | None:
        """Return the stream that an element's number belongs to, None for NOWHERE and UNKNOWN."""
        return next((s for s in reversed(self.streams) if number >= s.base), None)


def find_positions(gm: GraphModule) -> Positions:
    """Walk a graph (dialect QUANTIZED) once and return the positions its attentions see."""
    walk = _Numbers()
    walk.walk(gm, _visit)
    return walk.found


class _Numbers(Following):
    blank = NOWHERE

    def __init__(self) -> None:
        super().__init__()
        self.found = Positions()
        self.next = NOWHERE + 1


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
