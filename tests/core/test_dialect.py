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
        case "adjoint of complex numbers":
            y = graph.call_function(torch.ops.aten.adjoint.default, (x,))
        case "adjoint" | "view" | "mT" | "detach":
            operator = getattr(torch.ops.aten, kind).default
            y = graph.call_function(operator, (x, [6]) if kind == "view" else (x,))
    graph.output(y)
    dtype = torch.complex64 if "complex" in kind else torch.int8
    for node in (x, y):
        node.meta["val"] = torch.zeros(2, 3, dtype=dtype)
    return GraphModule(root, graph)


MEMBERS = {
    "aten": {ATEN, OBSERVED, QUANTIZED, LOWERED},
    "adjoint of complex numbers": {ATEN, OBSERVED, QUANTIZED, LOWERED},
    "adjoint": set(),
    "view": set(),
    "mT": set(),
    "detach": set(),
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


@pytest.mark.parametrize("dialect", [ATEN, OBSERVED, QUANTIZED, LOWERED], ids=repr)
def test_every_node_with_a_value_needs_a_fake_one(dialect: Dialect) -> None:
    gm = graph_of("aten")
    relu = next(iter(gm.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default)))
    with gm.graph.inserting_before(relu):
        check = torch.ops.aten._assert_async.default  # it has no result
        gm.graph.call_function(check, (relu.args[0],))
    dialect.check(gm)

    del relu.meta["val"]

    with pytest.raises(PassError, match=r"relu.*: no fake value"):
        dialect.check(gm)


def test_what_is_not_canonical_is_told_with_what_to_expect() -> None:
    with pytest.raises(PassError, match=r"aten\.view\.default.*: not canonical; expected reshape"):
        ATEN.check(graph_of("view"))
