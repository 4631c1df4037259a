"""Calibration runs: one process by hand, and two gloo processes that end with one process's
bytes."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, fx

from fxq.calibrate import calibrate, sweep
from fxq.checkpoint import Checkpoint
from fxq.errors import UnsupportedError
from fxq.observers import RangeObserver
from fxq.passes.common import HeldOutMargin
from fxq.spec import (
    Entropy,
    MeanSquaredError,
    MinMax,
    MovingAverage,
    Observer,
    Percentile,
    PerChannel,
    PerTensor,
    PerToken,
    QuantSpec,
)

T, C = 5, 9
SPECS = [
    QuantSpec(granularity=granularity, observer=rule)
    for granularity in (PerTensor(), PerChannel(-1), PerToken())
    for rule in (MinMax(), Percentile(99.0), MeanSquaredError(), Entropy())
]
# Rank 0's and rank 1's share of the batches: uneven, and with nothing for one of them.
SHARES = {"even": [[0, 2], [1, 3]], "uneven": [[3, 1, 0], [2]], "none": [[], [0, 1, 2, 3]]}


class Scale(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x * 2)


def batches() -> list[tuple[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(rows, T, C, generator=generator),) for rows in (1, 3, 2, 4)]


def observed(specs: Sequence[QuantSpec]) -> tuple[fx.GraphModule, list[RangeObserver]]:
    """Return the traced model with one observer per spec on the output of its `mul`."""
    gm = fx.symbolic_trace(Scale())
    (mul,) = (node for node in gm.graph.nodes if node.name == "mul")
    observers = [RangeObserver(spec, (1, T, C), f"mul.{i}") for i, spec in enumerate(specs)]
    with gm.graph.inserting_after(mul):
        for i, observer in enumerate(observers):
            gm.add_submodule(f"observer_{i}", observer)
            gm.graph.call_module(f"observer_{i}", (mul,))
    gm.recompile()
    return gm, observers


def states(observers: Sequence[RangeObserver]) -> list[dict[str, bytes]]:
    return [{k: v.numpy().tobytes() for k, v in o.state_dict().items()} for o in observers]


def stopped(data: Sequence[tuple[Tensor]]) -> Iterator[tuple[Tensor]]:
    yield data[0]
    raise KeyboardInterrupt


def channel_amax(x: Tensor) -> Tensor:
    return x.abs().amax((0, 1))


def widened(data: list[tuple[Tensor]]) -> list[Tensor]:
    """Calibrated ranges, smallest and largest value, before and after margins were looked for."""
    gm, (observer,) = observed([QuantSpec(symmetric=False, observer=MinMax())])
    calibrate(gm, data, observers=[observer])
    before = observer.range()
    HeldOutMargin().run(gm, data)
    return [*before, *observer.range()]


def run_rank(rank: int, folder: str) -> None:
    """Calibrate every division of the batches as one of two processes and save what it ends
    with."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    found: dict[str, Any] = {}
    for name, shares in SHARES.items():
        gm, observers = observed(SPECS)
        mine = [batches()[i] for i in shares[rank]]
        samples = calibrate(gm, mine, observers=observers)
        merged = states(observers)
        edges = list(gm.graph.find_nodes(op="placeholder"))
        amax = sweep(gm, mine, edges, channel_amax, torch.maximum)
        found[name] = samples, merged, amax[edges[0]]
    gm, observers = observed(SPECS)
    for i in (rank, 2 + rank):
        calibrate(gm, [batches()[i]], observers=observers)
    found["in two calls"] = states(observers)
    for name, shares in {"moving average": SHARES["even"], "no data": [[], []]}.items():
        gm, observers = observed([QuantSpec(observer=MovingAverage())])
        try:
            calibrate(gm, [batches()[i] for i in shares[rank]], observers=observers)
        except (UnsupportedError, ValueError) as error:
            found[name] = repr(error)
    gm, observers = observed([QuantSpec(observer=MovingAverage())])
    calibrate(gm, batches() if rank else [], observers=observers)
    found["moving average in one process"] = states(observers)
    for name, shares in {"halves": SHARES["even"], "no half": SHARES["uneven"]}.items():
        found[name] = widened([batches()[i] for i in shares[rank]])
    mine, path = [batches()[i] for i in SHARES["even"][rank]], Path(folder) / f"{rank}.kept"
    with contextlib.suppress(KeyboardInterrupt):
        gm, observers = observed(SPECS)
        calibrate(gm, stopped(mine), observers=observers, checkpoint=Checkpoint(path, "test"))
    gm, observers = observed(SPECS)
    calibrate(gm, mine, observers=observers, checkpoint=Checkpoint(path, "test"))
    found["interrupted"] = states(observers)
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes ended with; they start once for all tests."""
    folder = tmp_path_factory.mktemp("gloo")
    mp.spawn(run_rank, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("share", SHARES)
def test_two_processes_end_with_the_bytes_of_one(ranks: list[dict[str, Any]], share: str) -> None:
    gm, observers = observed(SPECS)

    samples = calibrate(gm, batches(), observers=observers)

    for rank in ranks:
        assert rank[share][0] == samples == 10
        assert rank[share][1] == states(observers)


@pytest.mark.parametrize("way", ["in two calls", "interrupted"])
def test_two_processes_in_two_calls_end_with_the_bytes_of_one(
    ranks: list[dict[str, Any]], way: str
) -> None:
    gm, observers = observed(SPECS)

    calibrate(gm, batches(), observers=observers)

    for rank in ranks:
        assert rank[way] == states(observers)


@pytest.mark.parametrize("share", SHARES)
def test_two_processes_sweep_like_one(ranks: list[dict[str, Any]], share: str) -> None:
    expected = channel_amax(torch.cat([x for (x,) in batches()]))

    for rank in ranks:
        assert torch.equal(rank[share][2], expected)


def test_two_processes_widen_by_the_same_margin(ranks: list[dict[str, Any]]) -> None:
    # The even batches of each process are one half: 0 of the first and 1 of the second.
    expected = widened([batches()[i] for i in (0, 2, 1, 3)])
    for rank in ranks:
        assert all(map(torch.equal, rank["halves"], expected))
    assert not torch.equal(expected[1], expected[3])


def test_nothing_is_held_out_where_one_process_cannot(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:  # the second has one batch of a fixed size
        assert all(map(torch.equal, rank["no half"][:2], rank["no half"][2:]))


def test_moving_average_over_two_processes_raises_in_both(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["moving average"].startswith("UnsupportedError")
        assert "found 2 independent" in rank["moving average"]


def test_moving_average_with_data_in_one_process_only_is_shared(
    ranks: list[dict[str, Any]],
) -> None:
    gm, observers = observed([QuantSpec(observer=MovingAverage())])

    calibrate(gm, batches(), observers=observers)

    for rank in ranks:
        assert rank["moving average in one process"] == states(observers)


def test_no_data_in_any_process_raises_in_both(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert "found no data" in rank["no data"]


@pytest.mark.parametrize("rule", [MinMax(), MovingAverage(), Percentile()])
def test_calibrate_shows_every_batch_to_the_observers(rule: Observer) -> None:
    gm, (observer,) = observed([QuantSpec(observer=rule)])

    samples = calibrate(gm, iter(batches()), observers=[observer])

    alone = RangeObserver(observer.spec, (1, T, C), "alone")
    for (x,) in batches():
        alone(x * 2)
    assert samples == 10
    assert states([observer]) == states([alone])


def test_calibrate_without_batches_raises() -> None:
    gm, observers = observed([QuantSpec()])

    with pytest.raises(ValueError, match="found no data"):
        calibrate(gm, [], observers=observers)


def test_sweep_by_hand() -> None:
    gm = fx.symbolic_trace(Scale())
    nodes = {node.name: node for node in gm.graph.nodes}
    inputs = [(torch.tensor([1.0, -2.0]),), (torch.tensor([-3.0, 1.0]),)]

    found = sweep(gm, inputs, [nodes["relu"], nodes["mul"]], torch.abs, torch.maximum)

    assert found[nodes["mul"]].tolist() == [6.0, 4.0]
    assert found[nodes["relu"]].tolist() == [2.0, 2.0]


def test_sweep_builds_no_autograd_graph() -> None:
    gm = fx.symbolic_trace(Scale())
    (mul,) = (node for node in gm.graph.nodes if node.name == "mul")

    found = sweep(gm, [(torch.ones(2, requires_grad=True),)], [mul], torch.abs, torch.maximum)

    assert not found[mul].requires_grad


def test_sweep_without_batches_raises() -> None:
    gm = fx.symbolic_trace(Scale())

    with pytest.raises(ValueError, match="found no data"):
        sweep(gm, [], list(gm.graph.nodes)[:1], torch.abs, torch.maximum)


def test_sweep_of_a_foreign_node_raises_with_its_name() -> None:
    gm, other = fx.symbolic_trace(Scale()), fx.symbolic_trace(Scale())

    with pytest.raises(ValueError, match=r"\['x'\] of another graph"):
        sweep(gm, batches(), list(other.graph.nodes)[:1], torch.abs, torch.maximum)
