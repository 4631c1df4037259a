"""QuantizeCache: keep a model's KV cache as int8.

    write   codes of the rows (`fxq.cache_codes`)
    read    codes * scale

The state of the program is the codes, a quarter of float32: a call quantizes the rows that it
writes and dequantizes what attention reads, which Inductor fuses with what is around. The scale is
static, one for each head and channel (each index of every axis but the batch's and the one that
rows are written along): keys have channels many times as large as others. It comes from the rows
that calibration writes; beyond it values saturate.

NaN and Inf, for which there is no code of a finite value, have a code of their own, -128, and are
read as NaN, at this call and at every later one.

Put it last in a recipe, after `Convert`:

    Recipe("mine", (*w8a8.DYNAMIC.passes, QuantizeCache()))

`data` is calls in the order in which the deployed model makes them, the first from the state that
the model has when it is captured: a prompt, then a token at a time.
"""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from fxq.cache_codes import LIMIT, NOT_FINITE, encode
from fxq.calibrate import calibrate, warn_of_missing_data
from fxq.checkpoint import Checkpoint
from fxq.dialect import QUANTIZED, Dialect
from fxq.errors import FxqWarning
from fxq.graph import dtype_of, shape_of
from fxq.layer import Skip, treat
from fxq.observers import RangeObserver
from fxq.passes.common.caches import Cache, find_caches
from fxq.pipeline import Batches, DataPass
from fxq.rewriting import add_buffer, copy_graph, insert_call, last_of, propagate
from fxq.row_choice import counted_steps
from fxq.spec import MinMax, Observer, PerAxes, QuantSpec
from fxq.writes import STORED

aten, ops = torch.ops.aten, torch.ops.fxq


@dataclass(frozen=True)
class QuantizeCache(DataPass):
    """Keep caches as int8. One that cannot be stays float: a warning and the report say why.

    Args:
        observer: how the range of the rows is found.
    """

    observer: Observer = field(default_factory=MinMax)

    reads: ClassVar[Dialect] = QUANTIZED
    writes: ClassVar[Dialect] = QUANTIZED

    def __post_init__(self) -> None:
        if not isinstance(self.observer, Observer):
            raise TypeError(
                f"QuantizeCache.observer: expected a rule of fxq.spec, found {self.observer!r}"
            )

    def run(self, gm: GraphModule, data: Batches) -> PassResult:
        """Find the caches, calibrate their rows and rewrite what writes and reads them."""
        return self.resume(gm, data, None)

    def resume(self, gm: GraphModule, data: Batches, checkpoint: Checkpoint | None) -> PassResult:
        """Likewise, but each batch once in all calls with the same checkpoint."""
        caches, left = find_caches(gm)
        name = type(self).__name__
        for buffer, (why, products) in left.items():
            for product in products:
                treat(product, name, Skip(f"its cache {buffer} stays float: {why}", intended=False))
        _tell(caches, {buffer: why for buffer, (why, _) in left.items()})
        if not caches:
            return PassResult(gm, modified=False)
        observers = {cache.name: self._observer(cache) for cache in caches}
        observed = _observed(gm, caches, observers)
        with counted_steps(observed, data) as batches:
            calibrate(observed, batches, observers=[*observers.values()], checkpoint=checkpoint)
        warn_of_missing_data([*observers.values()])
        for cache in caches:
            _store(gm, cache, observers[cache.name].qparams()[0])
            for product in cache.products:
                treat(product, name, f"reads {cache.name} as int8")
                why = "its cache is int8, the product is in float"
                treat(product, name, Skip(why, intended=True))
        propagate(gm)
        return PassResult(gm, modified=True)

    def _observer(self, cache: Cache) -> RangeObserver:
        spec = QuantSpec(granularity=PerAxes(cache.scale_axes), observer=self.observer)
        return RangeObserver(spec, shape_of(cache.state), cache.name)


def _tell(caches: Iterable[Cache], left: dict[str, str]) -> None:
    """Warn of what stays float, and where there is no cache at all."""
    listing = "; ".join(f"{name}: {why}" for name, why in left.items())
    if left:
        warnings.warn(f"QuantizeCache left in float: {listing}", FxqWarning, stacklevel=3)
    elif not caches:
        warnings.warn(
            "QuantizeCache: expected buffers that the model writes rows to, found none; give the "
            "model its cache as buffers of fixed size (register_buffer)",
            FxqWarning,
            stacklevel=3,
        )


def _observed(
    gm: GraphModule, caches: Iterable[Cache], observers: dict[str, RangeObserver]
) -> GraphModule:
    """Return a copy of `gm` that observes what its caches hold before each call and the rows that
    it writes."""
    copied = copy_graph(gm)
    nodes = {node.name: node for node in copied.graph.nodes}
    end = copied.graph.output_node()
    for index, cache in enumerate(caches):
        copied.add_submodule(f"cache_{index}", observers[cache.name])
        for rows, lacks in ((cache.state, ()), *cache.rows.items()):
            seen = nodes[rows.name]
            for axis in sorted(lacks):
                seen = insert_call(aten.unsqueeze.default, (seen, axis), before=end)
            with copied.graph.inserting_before(end):
                copied.graph.call_module(f"cache_{index}", (seen,))
    copied.recompile()
    return copied


def _store(gm: GraphModule, cache: Cache, scale: Tensor) -> None:
    """Have a cache hold codes.

    Args:
        gm: the graph.
        cache: in it.
        scale: fp32, with as many axes as the cache.
    """
    float_dtype, scales = dtype_of(cache.state), dict[tuple[int, ...], Node]()

    def scale_without(lacks: tuple[int, ...]) -> Node:
        if lacks not in scales:
            name = f"{cache.name}_scale"
            scales[lacks] = add_buffer(gm, name, scale.squeeze(lacks), like=cache.value)
        return scales[lacks]

    reads: dict[Node, list[Node]] = {}
    for node, user in cache.reads:
        reads.setdefault(node, []).append(user)
    for node, users in reads.items():
        value = _read(node, scale_without(cache.kept[node]), float_dtype)
        for user in users:
            user.replace_input_with(node, value)
    for rows, lacks in cache.rows.items():
        codes = _write(rows, scale_without(lacks))
        for user in [user for user in rows.users if user in cache.kept]:
            user.replace_input_with(rows, codes)
    cache.state.meta[STORED] = partial(encode, scale=scale)
    cache.state.meta["val"] = cache.state.meta["val"].to(torch.int8)


def _write(rows: Node, scale: Node) -> Node:
    """Insert the codes of rows."""
    after = last_of(rows, scale)
    grid = (-LIMIT, LIMIT)
    codes = insert_call(ops.quantize.default, (rows, scale, None, *grid), after=after, like=rows)
    finite = insert_call(aten.isfinite.default, (rows,), after=codes, like=rows)
    return insert_call(aten.where.ScalarOther, (finite, codes, NOT_FINITE), after=finite, like=rows)


def _read(codes: Node, scale: Node, dtype: torch.dtype) -> Node:
    """Insert the values of codes."""
    after = last_of(codes, scale)
    value = insert_call(ops.dequantize.default, (codes, scale, None, dtype), after=after)
    # Compared as floats: Inductor's vector code is twice as slow with a mask made of int8.
    as_float = insert_call(aten._to_copy.default, (codes,), {"dtype": torch.float32}, after=value)
    bad = insert_call(aten.eq.Scalar, (as_float, NOT_FINITE), after=as_float)
    return insert_call(aten.masked_fill.Scalar, (value, bad, float("nan")), after=bad)
