"""The four dialects of a graph, as executable predicates.

    ATEN       aten operators, none of which canonicalisation would rewrite whatever its operands
               (`fxq.operators.CANONICAL`): what `fxq.capture` gives
    OBSERVED   ATEN, with range observers on edges and a `LayerSpec` in the meta of every layer to
               be quantized
    QUANTIZED  ATEN, with fxq::quantize, fxq::dequantize and fxq::rectified_attention: runs
               anywhere, is saved and inspected
    LOWERED    QUANTIZED, with kernels of `fxq.lowering` in place of what they compute

A dialect is a function from a node to a complaint, or None. `check` collects the complaints of a
whole graph; in each dialect every node that has a value has its fake value in `meta["val"]`.
Settled nodes (`fxq.graph.SETTLED`) are those of a `Program` inside a model that is being compiled,
and layers that a pass made to stay float; they may be QUANTIZED wherever the rest is ATEN or
OBSERVED.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from fxq.errors import PassError
from fxq.formats import CONTAINERS
from fxq.graph import is_settled, owning_module
from fxq.observers import RangeObserver
from fxq.operators import canonical_form

QUANTIZED_OPS = frozenset({
    "quantize", "dequantize", "choose_qparams", "guard_scale", "rectified_attention",
})  # fmt: skip
SYMBOLIC = {
    operator.getitem,
    torch.sym_max,
    torch.sym_min,
    torch.sym_not,
    torch.sym_float,
    torch.sym_ite,
    torch.sym_sum,
}


@dataclass(frozen=True)
class Dialect:
    """A named language of graphs.

    Args:
        name: how messages call it.
        complaint: what is wrong with a node, None where nothing is.
    """

    name: str
    complaint: Callable[[Node], str | None]

    def __repr__(self) -> str:
        return self.name

    def check(self, gm: GraphModule, after: str = "") -> None:
        """Raise `PassError` listing every node of `gm` that is not in this dialect."""
        found = [
            f"{node.format_node()}: {why}"
            for node in gm.graph.nodes
            if (why := self.complaint(node) or _valueless(node))
        ]
        if found:
            where = f" after {after}" if after else ""
            listing = "\n  ".join(found[:10]) + ("\n  ..." if len(found) > 10 else "")
            raise PassError(
                f"expected a graph in the {self.name} dialect{where}, found\n  {listing}"
            )


def _valueless(node: Node) -> str | None:
    if node.op == "output" or "val" in node.meta:
        return None
    if isinstance(node.target, torch._ops.OpOverload) and not node.target._schema.returns:
        return None
    return 'no fake value; expected one in meta["val"], as fxq.rewriting.insert_call gives'


def _namespace(node: Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target.namespace
    module = getattr(target, "__module__", None)
    return "symbolic" if target in SYMBOLIC or module in ("_operator", "math") else "python"


def _aten(node: Node) -> str | None:
    if node.op == "call_module":
        return "a module call; expected operators only"
    if node.op == "call_method":
        return "a method call; expected operators only"
    if node.op != "call_function":
        return None
    if _namespace(node) == "python":
        return "a Python function; expected an operator"
    if _namespace(node) == "fxq" and not is_settled(node):
        return "an fxq operator; expected none yet"
    if (form := canonical_form(node)) is not None:
        return f"not canonical; expected {form} in its place, as fxq.canonicalize gives"
    return None


def observer_of(gm: GraphModule, node: Node) -> RangeObserver | None:
    """Return the range observer that a node calls, None where it calls none."""
    module = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
    return module if isinstance(module, RangeObserver) else None


def _observed(node: Node) -> str | None:
    if node.op == "call_module":
        known = observer_of(owning_module(node), node) is not None
        return None if known else "a module that is not a range observer"
    return _aten(node)


def _quantized(node: Node) -> str | None:
    if node.op == "call_function" and _namespace(node) == "fxq":
        name = node.target._opname  # type: ignore[union-attr]
        if name not in QUANTIZED_OPS:
            return "a kernel; kernels belong to LOWERED"
        if name == "dequantize" and "val" in node.args[0].meta:  # type: ignore[union-attr]
            dtype = node.args[0].meta["val"].dtype  # type: ignore[union-attr]
            return None if dtype in CONTAINERS else f"codes of dtype {dtype}"
        return None
    return _aten(node)


def _lowered(node: Node) -> str | None:
    if node.op == "call_function" and _namespace(node) == "fxq":
        return None
    return _aten(node)


ATEN = Dialect("ATEN", _aten)
OBSERVED = Dialect("OBSERVED", _observed)
QUANTIZED = Dialect("QUANTIZED", _quantized)
LOWERED = Dialect("LOWERED", _lowered)
