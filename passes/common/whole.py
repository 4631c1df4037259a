"""A graph judged as a whole: what quantization does to its outputs on batches held out.

Ranges come from some batches and the error from others, so what calibration did not show costs here
as it will in use. Passes that decide layer by layer check the sum of their decisions with it.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import SymInt, Tensor
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from fxq.calibrate import NO_DATA, Batches, calibrate, gather
from fxq.numerics import as_real, is_inexact
from fxq.observers import RangeObserver
from fxq.passes.common.convert import Convert
from fxq.passes.common.insert_observers import InsertObservers, Target
from fxq.rewriting import copy_graph
from fxq.samples import batch_size
from fxq.seeding import seeded
from fxq.spec import LayerSpec

FEWEST_SAMPLES = 4  # a batch of fewer is not cut: a graph may not take a batch of one
PIECE = 8  # samples whose activations are held at once, where a batch can be cut
MOST_SAMPLES = 256  # of a half: more say hardly more, and every judgement runs all of them


class WholeError(NamedTuple):
    """Squared error of a graph's outputs, sample by sample, the mean over outputs.

    Args:
        shares: of each sample, relative to the squares of all `[n]`, fp64: their sum is the error
            of all samples together.
        relative: of each sample, relative to its own squares `[n]`, fp64.
    """

    shares: Tensor
    relative: Tensor


class Halves(NamedTuple):
    """Batches to take ranges from, and others to judge on.

    Args:
        fit: the even batches, or the even samples of the only one.
        judge: the rest.
        held_out: whether it is one; a single batch that cannot be cut is both.
    """

    fit: Batches
    judge: Batches
    held_out: bool

    @property
    def folds(self) -> "list[Halves]":
        """These, and the other way round if they differ: so each sample is held out once."""
        return [self, Halves(self.judge, self.fit, True)] if self.held_out else [self]


def halves_of(gm: GraphModule, data: Batches) -> Halves:
    """Return batches in two halves. A process's only batch is cut where its size is free; where it
    is not in one process, nothing is held out in any: all have to run as many halves.

    Args:
        gm: the graph that takes them.
        data: this process's batches; they can be iterated more than once.
    """
    halves = _own_halves(gm, data)
    agreed = all(gather(halves.held_out))
    return halves if agreed else Halves(data, data, held_out=False)


def _own_halves(gm: GraphModule, data: Batches) -> Halves:
    first = list(itertools.islice(iter(data), 2))
    if len(first) != 1:
        return Halves(_Part(data, 0), _Part(data, 1), held_out=True)
    cut = batch_inputs(gm)
    if not cut or len(first[0][cut[0]]) < FEWEST_SAMPLES:
        return Halves(data, data, held_out=False)
    return Halves(_Part(data, 0, cut), _Part(data, 1, cut), held_out=True)


@dataclass(frozen=True)
class _Part:
    """Every second batch, or every second sample of the inputs `cut`; no batch more once there are
    `MOST_SAMPLES`."""

    data: Batches
    start: int
    cut: tuple[int, ...] = ()

    def __iter__(self) -> Iterator[Sequence[Any]]:
        if self.cut:
            for batch in self.data:
                yield [x[self.start :: 2] if i in self.cut else x for i, x in enumerate(batch)]
            return
        samples = 0
        for batch in itertools.islice(self.data, self.start, None, 2):
            yield batch
            samples += batch_size(batch)
            if samples >= MOST_SAMPLES:
                return


def batch_inputs(gm: GraphModule) -> tuple[int, ...]:
    """Return which inputs have the batch in dimension 0: those that share the first free size."""
    values = [n.meta.get("val") for n in gm.graph.find_nodes(op="placeholder")]
    sizes: list[Any] = [v.shape[0] if isinstance(v, Tensor) and v.ndim else None for v in values]
    free = [str(size) if isinstance(size, SymInt) else None for size in sizes]
    batch = next((size for size in free if size is not None), None)
    return tuple(i for i, size in enumerate(free) if size is not None and size == batch)


def pieces(gm: GraphModule, data: Batches, n_samples: int) -> Iterator[Sequence[Any]]:
    """Yield batches of a few samples each, cut where the graph takes any number, until there are
    `n_samples` or more."""
    cut, seen = batch_inputs(gm), 0
    for batch in data:
        size = batch_size(batch)
        step = PIECE if cut and size % PIECE != 1 else size  # a graph may not take a batch of one
        for start in range(0, size, step):
            part = slice(start, start + step)
            yield [x[part] if step < size and i in cut else x for i, x in enumerate(batch)]
            seen += min(step, size - start)
            if seen >= n_samples:
                return


def whole_error(
    gm: GraphModule,
    exact: GraphModule,
    halves: Halves,
    layer: LayerSpec,
    targets: tuple[Target, ...],
) -> WholeError:
    """Return the error that quantization makes of a graph's outputs. The graph stays as it is.

    Args:
        gm: a graph (dialect ATEN).
        exact: what its outputs are compared with: a float graph that takes the same inputs.
        halves: ranges come from the first, the error from the second.
        layer: how layers are quantized; with one range for all rows.
        targets: kinds of layers that are.
    Raises:
        ValueError: no process has a batch to judge on.
    """
    if layer.activation is not None:
        layer = replace(layer, activation=replace(layer.activation, rows=None))
    quantized = InsertObservers(layer, targets).run(copy_graph(gm)).graph_module
    quantized.recompile()
    observers = [m for m in quantized.modules() if isinstance(m, RangeObserver)]
    if observers:
        calibrate(quantized, halves.fit, observers=observers)
    quantized = Convert().run(quantized).graph_module
    quantized.recompile()
    return _compare(quantized, exact, halves.judge)


def _compare(found: GraphModule, exact: GraphModule, data: Batches) -> WholeError:
    """Return the error of one graph's outputs against another's, over all processes."""
    leaves = _float_outputs(exact)
    parts = [torch.zeros(len(leaves), 0, 2, dtype=torch.float64)]
    for inputs in data:
        pair = [[tree_leaves(seeded(gm, inputs))[i] for i in leaves] for gm in (found, exact)]
        n = batch_size(inputs)
        parts.append(torch.stack([_squares(a, b, n) for a, b in zip(*pair, strict=True)]))
    squares = torch.cat(gather(torch.cat(parts, 1)), 1)
    if not squares.shape[1]:
        raise ValueError(NO_DATA)
    error, signal = squares.unbind(-1)
    shares = _ratio(error, signal.sum(1, keepdim=True)).mean(0)
    return WholeError(shares, _ratio(error, signal).mean(0))


def _float_outputs(gm: GraphModule) -> list[int]:
    """Return which of a graph's outputs are tensors of floating-point or complex numbers."""
    leaves = tree_leaves(gm.graph.output_node().args[0])
    values = [getattr(leaf, "meta", {}).get("val") for leaf in leaves]
    return [i for i, v in enumerate(values) if is_inexact(v)]


def _squares(found: Tensor, exact: Tensor, n_samples: int) -> Tensor:
    """Return the squares of error and signal of each sample `[n_samples, 2]`, fp64, on the CPU.

    Of an output without samples, each has its share. Where the float value is not finite there is
    neither: masks are made of such.
    """
    found, exact = as_real(found), as_real(exact)
    finite = exact.isfinite()
    error = torch.where(finite, found.float() - exact.float(), 0.0).square()
    signal = torch.where(finite, exact.float(), 0.0).square()
    both = torch.stack([error, signal])
    if exact.ndim and len(exact) == n_samples:
        return both.reshape(2, n_samples, -1).sum(2, dtype=torch.float64).T.cpu()
    total = both.flatten(1).sum(1, dtype=torch.float64).cpu()
    return (total / n_samples).expand(n_samples, 2)


def _ratio(error: Tensor, signal: Tensor) -> Tensor:
    """Return error over signal; 0 where there is no signal."""
    return torch.where(signal > 0, error / signal, 0.0).nan_to_num(nan=torch.inf)
