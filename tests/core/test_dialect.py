"""Dialects: each says what it does not contain."""

import pytest
import torch
from torch import nn
from torch.fx import Graph, GraphModule

from fxq.dialect import ATEN, LOWERED, OBSERVED, QUANTIZED, Dialect
from fxq.errors import PassError
from fxq.lowering import int8_linear  # noqa: F401  registers the kernel
from fxq.observers import RangeObserver
from fxq.spec import QuantSpec

OPS = torch.ops.fxq


def graph_of(kind: str) -> GraphModule:
    root = nn.Module()
    root.observer = RangeObserver(QuantSpec(), [2, 3], "x")
    root.relu = nn.ReLU()
    graph = Graph()
    x = graph.placeholder("x")
    match kind:
        case "aten":
            y = graph.call_function(torch.ops.aten.relu.default, (x,))
        case "observer":
            y = graph.call_module("observer", (x,))
        case "module":
            y = graph.call_module("relu", (x,))
        case "method":
            y = graph.call_method("relu", (x,))
        case "python":
            y = graph.call_function(torch.relu, (x,))
        case "quantize":
            y = graph.call_function(OPS.quantize.default, (x, x, None, -127, 127))
        case "kernel":
            y = graph.call_function(
                OPS.int8_linear.default, (x, x, None, x, x, None, torch.float32)
            )
    graph.output(y)
    return GraphModule(root, graph)


MEMBERS = {
    "aten": {ATEN, OBSERVED, QUANTIZED, LOWERED},
    "observer": {OBSERVED},
    "quantize": {QUANTIZED, LOWERED},
    "kernel": {LOWERED},
    "module": set(),
    "method": set(),
    "python": set(),
}


@pytest.mark.parametrize("dialect", [ATEN, OBSERVED, QUANTIZED, LOWERED], ids=repr)
@pytest.mark.parametrize("kind", MEMBERS)
def test_dialect_accepts_its_members_only(kind: str, dialect: Dialect) -> None:
    gm = graph_of(kind)

    if dialect in MEMBERS[kind]:
        dialect.check(gm)
    else:
        with pytest.raises(
            PassError, match=f"expected a graph in the {dialect} dialect after Tested"
        ):
            dialect.check(gm, after="Tested")
