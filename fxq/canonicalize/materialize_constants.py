"""What depends on parameters and buffers only is computed once, and becomes one named constant.

Biases put together, `1 + weight`, the weight of a weight norm, a cast, part of a weight, a reshape
that has to copy: every pass then finds an ordinary weight. Views that `fxq.graph.is_constant` sees
through stay in the graph, and parts of a parameter share its memory.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.fx import GraphModule, Node

from fxq.constants import constant_value, is_pure
from fxq.graph import args_of, constant_of, is_constant, is_state, shape_of, tensor_of, writes
from fxq.identity import TensorKey
from fxq.rewriting import add_buffer

# A constant has at most this many times the elements of what it is made of: a bias with zeros for
# the keys has 3 / 2. A table of positions, looked up for every pair of tokens, has thousands.
GROWTH = 2


@torch.no_grad()
def materialize_constants(gm: GraphModule) -> int:
    """f(parameters) equals a constant, provided f is not random, its result is not much larger than
    what it is made of, and nobody may write to it."""
    made_of = _made_of(gm)
    _merge_equal(made_of)
    returned = _memory_of(gm, [gm.graph.output_node()])  # the caller may write to it
    folded = {n for n, roots in made_of.items() if n not in returned and _fits(n, roots)}
    last = [n for n in made_of if n in folded and any(user not in folded for user in n.users)]
    count = 0
    for node in last:
        if not _is_view(node):
            _materialize(gm, node, made_of[node])
            count += 1
    return count


def _made_of(gm: GraphModule) -> dict[Node, tuple[Node, ...]]:
    """Return, for each operator that depends on constants only, the parameters and buffers."""
    written = _memory_of(gm, [node for node in gm.graph.nodes if writes(node)])
    storages = {_storage(gm, node) for node in written if node.op == "get_attr"}
    found: dict[Node, tuple[Node, ...]] = {}
    for node in gm.graph.nodes:
        if _is_root(gm, node) and _storage(gm, node) not in storages:
            found[node] = (node,)
        elif is_pure(node) and node not in written and found.keys() >= set(node.all_input_nodes):
            roots = [root for n in node.all_input_nodes for root in found[n]]
            found[node] = tuple(dict.fromkeys(roots))
    return {node: roots for node, roots in found.items() if node.op != "get_attr"}


def _is_root(gm: GraphModule, node: Node) -> bool:
    if node.op != "get_attr" or is_state(node):
        return False
    value: object = tensor_of(gm, node)
    return isinstance(value, Tensor) and not isinstance(value, FakeTensor)


def _storage(gm: GraphModule, node: Node) -> object:
    return TensorKey.of(tensor_of(gm, node)).storage


def _merge_equal(made_of: dict[Node, tuple[Node, ...]]) -> None:
    """Let what is computed twice alike, as in a module that is called twice, be computed once."""
    first: dict[object, Node] = {}
    for node in list(made_of):
        key = (node.target, *(_operand_key(arg) for arg in (node.args, dict(node.kwargs))))
        same = first.setdefault(key, node)
        if same is not node:
            node.replace_all_uses_with(same)
            del made_of[node]


def _operand_key(value: object) -> object:
    if isinstance(value, list | tuple):
        return tuple(map(_operand_key, value))
    if isinstance(value, dict):
        return tuple((name, _operand_key(value[name])) for name in sorted(value))
    if isinstance(value, Node):
        return TensorKey.of(constant_of(value)) if value.op == "get_attr" else value
    return type(value), repr(value)  # 1, 1.0 and True are equal, and -0.0 is 0.0


def _memory_of(gm: GraphModule, readers: Sequence[Node]) -> set[Node]:
    """Return what may share memory with an argument of `readers`."""
    found: set[Node] = set()
    for node in reversed(gm.graph.nodes):
        if node in readers or (node in found and _may_alias(node)):
            found.update(node.all_input_nodes)
    return found


def _may_alias(node: Node) -> bool:
    """Tell whether a result may be a view of an argument."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return True
    return any(result.alias_info is not None for result in node.target._schema.returns)


def _fits(node: Node, roots: Sequence[Node]) -> bool:
    if not roots or not isinstance(node.meta["val"], Tensor):
        return False
    if not all(isinstance(size, int) for size in shape_of(node)):  # as many as values decide
        return False
    return _numel(node) <= GROWTH * sum(map(_numel, roots))


def _numel(node: Node) -> int:
    return int(node.meta["val"].numel())


def _is_view(node: Node) -> bool:
    """Tell whether a node is a view that `is_constant` sees through, and shares memory."""
    if not is_constant(node):
        return False
    root = node
    while root.op != "get_attr":
        root = args_of(root)[0]
    return TensorKey.of(constant_of(node)).storage == TensorKey.of(constant_of(root)).storage


def _materialize(gm: GraphModule, node: Node, roots: Sequence[Node]) -> None:
    values = {root: tensor_of(gm, root) for root in roots}
    parameters = [root for root, value in values.items() if isinstance(value, nn.Parameter)]
    value = constant_value(node)
    assert value is not None
    if parameters and value.is_floating_point():  # what trains parameters finds one
        trains = any(values[root].requires_grad for root in parameters)
        value = nn.Parameter(value.detach(), requires_grad=trains)
    name = _name_of(str((parameters or roots)[0].target))
    node.replace_all_uses_with(add_buffer(gm, f"{name}_constant", value, like=node))


def _name_of(root: str) -> str:
    """Return a parameter's name; of one that torch parametrizes, the name of what it makes."""
    path, found, rest = root.rpartition("parametrizations.")
    return f"{path}{rest.split('.')[0]}" if found else root
