"""What passes put into graphs: buffers get values of the graph's own kind, at a cost that does not
grow with the graph."""

import operator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx import Graph, GraphModule
from torch.utils._pytree import tree_leaves

from fxq import rewriting
from fxq.rewriting import add_buffer


def chain(length: int, values: list[Any]) -> GraphModule:
    """Return a graph of negations, of which the first nodes have these values."""
    graph = Graph()
    node = graph.placeholder("x")
    for _ in range(length):
        node = graph.call_function(operator.neg, (node,))
    graph.output(node)
    for node, value in zip(graph.nodes, values, strict=False):
        node.meta["val"] = value
    return GraphModule(nn.Module(), graph)


def test_buffers_cost_the_same_in_a_long_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[Any] = []

    def counting(values: Any = None) -> FakeTensorMode | None:
        looked_at.extend(tree_leaves(values))
        return detect_fake_mode(values)

    monkeypatch.setattr(rewriting, "detect_fake_mode", counting)

    def cost(length: int) -> int:
        with FakeTensorMode():
            gm = chain(length, [torch.ones(2) for _ in range(length)])
        looked_at.clear()
        for index in range(10):
            add_buffer(gm, f"buffer_{index}", torch.ones(2), like=gm.graph.output_node())
        return len(looked_at)

    assert cost(1000) == cost(10)


@pytest.mark.parametrize("before", [(), (torch.ones(2), 3, (torch.ones(2), None))])
@pytest.mark.parametrize("inside", [False, True], ids=["tensor", "tuple"])
def test_a_buffer_is_fake_where_any_value_is(before: tuple[Any, ...], inside: bool) -> None:
    mode = FakeTensorMode()
    fake = mode.from_tensor(torch.ones(2))
    gm = chain(5, [*before, (1, fake) if inside else fake])

    val = add_buffer(gm, "buffer", torch.ones(3), like=gm.graph.output_node()).meta["val"]

    assert isinstance(val, FakeTensor)
    assert val.fake_mode is mode


@pytest.mark.parametrize("values", [[], [torch.ones(2), 3]], ids=["none", "real"])
def test_a_buffer_is_real_where_no_value_is_fake(values: list[Any]) -> None:
    gm, buffer = chain(3, values), torch.ones(3)

    val: Tensor = add_buffer(gm, "buffer", buffer, like=gm.graph.output_node()).meta["val"]

    assert val is buffer
