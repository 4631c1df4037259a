"""Run a graph over batches: to fill its observers, or to reduce a statistic at some of its edges.

Both work on any number of processes. Where `torch.distributed` is initialized, each process passes
its own share of the batches and all of them end with the same result; observers end with the bytes
that one process would have found over all batches.
"""

import functools
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, fx

from fxq.checkpoint import Checkpoint, Tensors, fingerprint, run_over
from fxq.errors import FxqWarning
from fxq.observers import MERGE, RangeObserver
from fxq.samples import Samples, batch_size

Item = TypeVar("Item")
Batches = Iterable[Sequence[Any]]  # a batch is the graph's positional inputs

REDUCE = {torch.add: "SUM", torch.minimum: "MIN", torch.maximum: "MAX"}  # names in ReduceOp
NO_DATA = (
    "expected at least one batch, found no data; pass data=[inputs, ...], and not an iterator that "
    "has been used up"
)


def calibrate(
    gm: fx.GraphModule,
    batches: Batches,
    *,
    observers: Sequence[RangeObserver],
    checkpoint: Checkpoint | None = None,
) -> int:
    """Run `gm` on every batch and merge `observers` over all processes.

    Args:
        gm: a graph with observers; all processes have the same one.
        batches: this process's inputs; the numbers may differ between processes.
        observers: the graph's observers, in the same order in every process. What they have seen
            before counts once: rank 0's, as every process has the same after an earlier call.
        checkpoint: keeps what this process's observers have seen; each process has its own.
    Returns:
        number of samples (rows of the first input) over all processes.
    Raises:
        ValueError: there is no batch in any process, or the checkpoint is of other work.
        UnsupportedError: several processes saw data for a `MovingAverage`.
    """
    if n_processes() > 1 and dist.get_rank() > 0:
        for observer in observers:
            observer.reset()
    sizes: list[int] = []

    def counted() -> Iterator[Sequence[Any]]:
        for inputs in batches:
            sizes.append(batch_size(inputs))
            yield inputs

    def state() -> Tensors:
        named = (
            (f"{index}.{name}", buffer)
            for index, observer in enumerate(observers)
            for name, buffer in observer.named_buffers()
        )
        return dict(named)

    def restore(kept: Tensors) -> None:
        for name, buffer in state().items():
            buffer.copy_(kept[name])

    with torch.no_grad():
        mark = functools.partial(fingerprint, gm, repr([(o.name, o.spec) for o in observers]))
        run_over(counted(), lambda inputs: gm(*inputs), checkpoint, mark, state, restore)
    n_batches, samples = len(sizes), sum(sizes)
    if n_processes() > 1:
        n_batches, samples = all_reduce(torch.tensor([n_batches, samples]), "SUM").tolist()
    if not n_batches:
        raise ValueError(NO_DATA)
    if n_processes() > 1:
        for observer in observers:
            _merge_over_processes(observer)
    return samples


def sweep(
    gm: fx.GraphModule,
    batches: Batches,
    edges: Sequence[fx.Node],
    reduce: Callable[[Tensor], Tensor],
    combine: Callable[[Tensor, Tensor], Tensor],
) -> dict[fx.Node, Tensor]:
    """Return a statistic of the value of each of `edges` over all batches; no activation is kept.

    Observers in `gm` take note of these batches as in any other run.

    Args:
        gm: any graph.
        batches: this process's inputs.
        edges: nodes of `gm` whose value is a tensor.
        reduce: statistic of one batch's value; always of the same shape for one edge.
        combine: statistic of two statistics; associative. Processes are combined in rank order.
    Raises:
        ValueError: there is no batch in any process, or a node is not in `gm`'s graph.
    """
    if foreign := [node.name for node in edges if node.graph is not gm.graph]:
        raise ValueError(f"expected nodes of the graph to sweep, found {foreign} of another graph")
    runner = _Sweep(gm, edges, reduce, combine)
    with torch.no_grad():
        for inputs in batches:
            runner.run(*inputs)
    found = runner.found
    if n_processes() > 1:
        parts = gather_statistics([found.get(node) for node in edges], _device(gm))
        found = {n: functools.reduce(combine, p) for n, p in zip(edges, parts, strict=True) if p}
    if len(found) < len(set(edges)):
        raise ValueError(NO_DATA)
    return found


def warn_of_missing_data(observers: Sequence[RangeObserver]) -> None:
    """Warn of ranges that are not known: where only zeros came, and rows that no value reached."""
    if zeros := [observer.name for observer in observers if observer.saw_only_zeros]:
        warnings.warn(
            f"calibration saw only zeros at {', '.join(map(repr, zeros))}: their range is not "
            "known and their scale is 1; give data that reaches them, or leave them float with "
            "overrides",
            FxqWarning,
            stacklevel=3,
        )
    if missed := {row for observer in observers for row in observer.rows_without_data}:
        warnings.warn(
            f"calibration reached no value in rows {_listing(missed)}: the nearest row that it "
            "reached stands for each; give data of all time-steps, steps, positions or lengths",
            FxqWarning,
            stacklevel=3,
        )


def _listing(rows: set[int]) -> str:
    first = sorted(rows)[:8]
    return ", ".join(map(str, first)) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")


class _Sweep(fx.Interpreter):
    def __init__(
        self,
        gm: fx.GraphModule,
        edges: Sequence[fx.Node],
        reduce: Callable[[Tensor], Tensor],
        combine: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        super().__init__(gm)
        self.edges, self.reduce, self.combine = set(edges), reduce, combine
        self.found: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.edges:
            statistic = self.reduce(value)
            seen = self.found.get(n)
            self.found[n] = statistic if seen is None else self.combine(seen, statistic)
        return value


def n_processes() -> int:
    """Return how many processes share the batches."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_alike(batches: Batches) -> bool:
    """Tell whether the batches of all processes hold one sample only, or one again and again."""
    samples = Samples()
    for inputs in batches:
        samples.add(inputs)
        if samples.differ:
            break
    first = [x.cpu() if isinstance(x, Tensor) else x for x in samples.first]
    found = gather((samples.count, samples.differ, first))
    firsts = [each for count, _, each in found if count]
    return not any(differ for _, differ, _ in found) and all(
        isinstance(b, Tensor) and torch.equal(a, b) if isinstance(a, Tensor) else a == b
        for each in firsts[1:]
        for a, b in zip(firsts[0], each, strict=True)
    )


def _merge_over_processes(observer: RangeObserver) -> None:
    n_states = int(all_reduce(torch.tensor(observer.count > 0, dtype=torch.int64), "SUM"))
    observer.check_mergeable(n_states)
    for name, buffer in observer.named_buffers():
        buffer.copy_(all_reduce(buffer, REDUCE[MERGE[name]]))


def all_reduce(state: Tensor, op: str) -> Tensor:
    """Return a tensor reduced over all processes, on a device that the backend takes.

    Args:
        state: of this process; it stays.
        op: a name in torch's `ReduceOp`.
    """
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"  # nccl has no other
    state = state.to(device, copy=True)
    dist.all_reduce(state, getattr(dist.ReduceOp, op))
    return state


def _device(gm: fx.GraphModule) -> torch.device:
    return next(itertools.chain(gm.parameters(), gm.buffers()), torch.empty(0)).device


def gather(value: Item) -> list[Item]:
    """Return the values of all processes, in rank order; they are pickled."""
    if n_processes() == 1:
        return [value]
    found: list[Any] = [None] * n_processes()
    dist.all_gather_object(found, value)
    return found


def gather_statistics(found: Sequence[Tensor | None], device: torch.device) -> list[list[Tensor]]:
    """Return each edge's statistics of the processes that have one, in rank order, on `device`."""
    parts = gather([None if s is None else s.cpu() for s in found])
    return [[s.to(device) for s in edge if s is not None] for edge in zip(*parts, strict=True)]
