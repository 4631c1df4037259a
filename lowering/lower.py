"""Lower a QUANTIZED graph for a device: each node by the first rule that takes it."""

from collections.abc import Mapping

import torch
from torch.fx import GraphModule, Node

from fxq.dialect import LOWERED
from fxq.errors import PassError
from fxq.graph import args_of, is_constant, is_op, tensor_of
from fxq.lowering.devices import device_at
from fxq.lowering.devices.other import OTHER
from fxq.lowering.rule import TAKEN, Decision, Device, Lowering, Rule
from fxq.lowering.strides import keep_strides
from fxq.rewriting import add_buffer, copy_graph, erase_dead

ops = torch.ops.fxq


def lower(
    gm: GraphModule, device: torch.device, sizes: Mapping[str, int] | None = None
) -> tuple[GraphModule, dict[str, Decision]]:
    """Return a LOWERED copy of `gm` for `device`, and the decision on each quantized layer by name.

    The copy shares parameters and buffers with `gm`. What took the place of a node says so in its
    meta (`fxq.lowering.rule.Replaced`).
    """
    lowering = Lowering(copy_graph(gm), device, sizes)
    found = device_at(device)
    decisions: dict[str, Decision] = {}
    for node in list(lowering.gm.graph.nodes):
        if (decision := decide(node, found, lowering)) is not None:
            decisions[node.name] = decision
    lowered = lowering.gm
    fold_dequantized_weights(lowered)
    erase_dead(lowered)
    keep_strides(lowered, gm)
    lowered.graph.lint()
    LOWERED.check(lowered, after="lowering")
    return lowered, decisions


def decide(node: Node, device: Device, lowering: Lowering) -> Decision | None:
    """Apply the first rule that takes `node` and return its decision, with why those before it
    declined; None for a node that no rule is for."""
    rules = [rule for rule in device.rules if rule.is_for(node)]
    rules = rules or [rule for rule in OTHER.rules if rule.is_for(node)]
    reasons: list[str] = []
    for rule in rules:
        decision = _applied(rule, node, lowering)
        reasons += [decision.reason] if decision.reason not in ("", *reasons) else []
        if decision.kernel is not None:
            return Decision(decision.kernel, "; ".join(reasons))
    if not rules:
        return None
    instead = f"{rules[-1].instead}: " if rules[-1].instead else ""
    return Decision(None, instead + "; ".join(reasons))


def _applied(rule: Rule, node: Node, lowering: Lowering) -> Decision:
    """Apply a rule, and hold it to what it decided.

    Raises:
        TypeError: it returns something else than a decision.
        PassError: it names a kernel and has put nothing in the node's place.
    """
    decision: object = rule.apply(node, lowering)
    name = f"{type(rule).__module__}.{type(rule).__qualname__}"
    if not isinstance(decision, Decision):
        raise TypeError(
            f"rule {name}: expected apply() to return a Decision for {node.name}, found "
            f"{decision!r}; return Decision(None, why) to decline"
        )
    if decision.kernel is not None and TAKEN not in node.meta:
        raise PassError(
            f"rule {name}: expected the kernel {decision.kernel!r} in the place of {node.name}, "
            "found nothing there; call self.replace() or self.keep(), or decline: "
            "Decision(None, why)"
        )
    return decision


def fold_dequantized_weights(gm: GraphModule) -> None:
    """Dequantize once, now, the weights that no integer kernel took.

    Otherwise a layer that stays float would dequantize its weight at every call and run slower than
    before it was quantized. The price is a float copy of these weights in memory.
    """
    for node in list(gm.graph.nodes):
        if not is_op(node, ops.dequantize.default) or not node.users:
            continue
        parts = args_of(node)[:3]
        if all(part is None or is_constant(part) for part in parts):
            values = [None if part is None else tensor_of(gm, part) for part in parts]
            folded = ops.dequantize(*values, args_of(node)[3])
            name = str(parts[0].target).replace("_codes", "_dequantized")
            node.replace_all_uses_with(add_buffer(gm, name, folded, like=node))
