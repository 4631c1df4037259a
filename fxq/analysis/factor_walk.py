"""The walk that finds factors, and what shares its weight with something else."""

from collections import defaultdict

from torch import Tensor
from torch.fx import GraphModule, Node
from torch.multiprocessing.reductions import StorageWeakRef

from fxq.analysis.factor_rules import RULES, SOURCES, fix_inputs, op_name, pass_reason, weight_key
from fxq.analysis.factors import ChannelFlow
from fxq.analysis.following import rearrange
from fxq.graph import args_of, constant_of, is_op
from fxq.operators import ATTENTION, LAYERS, VIEWS, movement_of


def channel_flow(gm: GraphModule, scales: ChannelFlow | None = None) -> ChannelFlow:
    """Return the channel flow of a canonical graph (dialect ATEN).

    Args:
        gm: the graph.
        scales: give the flow of scales to get the flow of shifts.
    """
    flow = ChannelFlow(scales)
    flow.walk(gm, _visit)
    _fix_shared_weights(flow, gm)
    return flow


def _visit(flow: ChannelFlow, node: Node, labelled: list[Node]) -> None:
    if node.op == "output":
        for read in labelled:
            flow.fix(flow.labels[read], "it is an output of the model")
    elif node.op == "placeholder":
        flow.why[node] = "it reads an input of the model"
    elif node.op == "call_function":
        flow.traits[node] = frozenset().union(*(flow.traits_of(n) for n in labelled))
        if node.target in ATTENTION:
            query, key = args_of(node)[:2]
            flow.compared[node] = flow.tensor(query), flow.tensor(key)
        movement = movement_of(node)
        if RULES.get(movement) is rearrange:  # part of what it joins may not be scaled
            whys = (flow.why[n] for n in node.all_input_nodes if n in flow.why)
            flow.why[node] = next(whys, "")
        if movement in SOURCES:
            flow.set(node, SOURCES[movement](flow, node))
        elif labelled:
            flow.set(node, RULES.get(movement, fix_inputs)(flow, node))
        else:
            pass_reason(flow, node)


def _fix_shared_weights(flow: ChannelFlow, gm: GraphModule) -> None:
    """Fix the layers whose weight something else reads too, as an embedding does."""
    readers = WeightReaders(gm)
    for slot in flow.slots:
        if slot.node.target not in LAYERS:
            continue
        for reader, read in readers.others(slot.node):
            if reader.target not in LAYERS or reader.args[1] is not read:
                flow.fix(slot.ids, f"{op_name(reader)} also reads its weight")
            elif weight_key(read) != weight_key(args_of(slot.node)[1]):
                flow.fix(slot.ids, f"{op_name(reader)} reads its weight in another way")


class WeightReaders:
    """Who reads which constants of a graph, directly or through views."""

    def __init__(self, gm: GraphModule) -> None:
        self._readers: dict[StorageWeakRef, list[tuple[Node, Node]]] = defaultdict(list)
        for node in gm.graph.nodes:
            if node.op == "get_attr" and isinstance(constant_of(node), Tensor):
                self._readers[weight_key(node).storage] += _readers_through_views(node)

    def others(self, layer: Node) -> list[tuple[Node, Node]]:
        """Return what else reads elements of a layer's weight, each with the constant it reads."""
        mine = args_of(layer)[1]
        readers = self._readers.get(weight_key(mine).storage, [])
        return [(n, read) for n, read in readers if n is not layer and _overlap(read, mine)]


def _readers_through_views(node: Node) -> list[tuple[Node, Node]]:
    found: list[tuple[Node, Node]] = []
    for user in node.users:
        found += _readers_through_views(user) if is_op(user, *VIEWS) else [(user, node)]
    return found


def _overlap(a: Node, b: Node) -> bool:
    """Tell whether two constants of one storage may have elements in common."""
    spans = sorted(_span(constant_of(n)) for n in (a, b))
    return spans[1][0] <= spans[0][1]


def _span(value: Tensor) -> tuple[int, int]:
    first = int(value.storage_offset())
    steps = zip(value.shape, value.stride(), strict=True)
    return first, first + sum(int((size - 1) * stride) for size, stride in steps)
