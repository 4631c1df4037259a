"""Students: the quantized function of an observed graph, with straight-through gradients.

`student_of` makes such a function of a graph that is ready for `Convert`, `adopt` puts what it
learned into that graph: `Convert` then gives the function that was trained, to the last integer.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxq.dialect import observer_of
from fxq.errors import UnsupportedError
from fxq.formats import Integer
from fxq.graph import args_of, is_constant, owner_name, tensor_of, weight_of
from fxq.identity import TensorKey
from fxq.layer import layer_of
from fxq.observers import RangeObserver
from fxq.passes.common.convert import pending_layers
from fxq.passes.common.learned_quantizers import (
    DynamicActivation,
    FixedWeight,
    RoundedWeight,
    ScaledWeight,
    StaticActivation,
    StraightThroughWeight,
)
from fxq.rewriting import copy_graph, insert_module
from fxq.spec import LayerSpec, QuantSpec

Weights = Literal["straight_through", "scaled", "rounded"]
Modules = dict[tuple[tuple[TensorKey, ...], QuantSpec], nn.Module]  # by what they quantize


def without_observers(gm: GraphModule) -> GraphModule:
    """Return a copy of an observed graph that observes nothing: its float function."""
    copied = copy_graph(gm)
    for node in [n for n in copied.graph.nodes if n.op == "call_module"]:
        node.replace_all_uses_with(node.args[0])
        copied.graph.erase_node(node)
    copied.delete_all_unused_submodules()
    copied.recompile()
    return copied


def student_of(gm: GraphModule, weights: Weights = "straight_through") -> GraphModule:
    """Return the function that `Convert` would make of an observed, calibrated graph, to train it:
    straight-through gradients, and parameters of its own.

    Parameters of `gm` train, all weights and biases of quantized layers, and the scales of static
    activations, from those that the observers found; other buffers do not. Zero-points stay. A
    weight's range follows the weight, a dynamic activation's the activation. A weight that a method
    has fixed stays.

    Args:
        gm: a graph in the OBSERVED dialect, in float32. It is not modified.
        weights: how they learn: "straight_through" by their values; "scaled" likewise, in the
            ranges they have at first, times gains that learn; "rounded" in fixed ranges, each
            whether it is rounded up or down. With the last two, of other tensors only the layers'
            biases train.
    Raises:
        UnsupportedError: parameters in half precision, in which small steps round away.
    """
    student = copy_graph(gm)
    for node in student.graph.find_nodes(op="call_module"):
        observer = observer_of(student, node)
        assert observer is not None
        student.add_submodule(str(node.target), StaticActivation(observer))
    modules: Modules = {}
    for layer, spec in pending_layers(student):
        _quantize_operands(student, layer, spec, weights, modules)
    _own_parameters(student, _trainable(student, weights))
    student.graph.lint()
    student.recompile()
    return student


def activation_scales(student: GraphModule) -> list[nn.Parameter]:
    """Return the parameters of a student that scale its static activations: logarithms of what
    multiplies the scales that calibration found, 0 at first. Scales that were trained before
    stay."""
    gains = (m.log_gain for m in student.modules() if isinstance(m, StaticActivation))
    return [gain for gain in gains if gain.requires_grad]


def activation_zero_shifts(student: GraphModule) -> list[nn.Parameter]:
    """Return what moves the zero-points of a student's static activations, in codes, 0 at first;
    but for those whose scales were trained before."""
    modules = [m for m in student.modules() if isinstance(m, StaticActivation)]
    return [m.zero_shift for m in modules if m.zero_shift is not None and m.log_gain.requires_grad]


def rows_of_activations(student: GraphModule) -> list[nn.Parameter]:
    """Return those parameters of a student's static activations that have a row for each of the
    spec's."""
    modules = [m for m in student.modules() if isinstance(m, StaticActivation) and m.spec.rows]
    both = [parameter for m in modules for parameter in (m.log_gain, m.zero_shift)]
    return [parameter for parameter in both if parameter is not None]


def layer_operands(student: GraphModule, position: int) -> dict[str, Tensor]:
    """Return the constants that the quantized layers of a student read, by qualified name; without
    those of layers whose weight a method has fixed.

    Args:
        student: what `student_of` returned, or the graph it was made from.
        position: 1 for weights, 2 for biases.
    """
    roots = (
        _root(arg)
        for layer, _ in pending_layers(student)
        if layer_of(layer).weight is None
        for arg in args_of(layer)[position : position + 1]
    )
    return {
        str(root.target): tensor_of(student, root)
        for root in roots
        if isinstance(root, Node) and root.op == "get_attr"
    }


def _quantize_operands(
    student: GraphModule,
    layer: Node,
    spec: LayerSpec,
    weights: Weights,
    modules: Modules,
) -> None:
    """Put quantizers between a layer and what it reads; layers that share a weight share its."""
    source, weight, *rest = args_of(layer)
    name = owner_name(layer)
    if spec.activation is not None and spec.activation.dynamic:
        dynamic = DynamicActivation(spec.activation)
        source = insert_module(student, f"{name}.input_fake_quantize", dynamic, source)
    value, fixed, mask = weight_of(layer), layer_of(layer).weight, layer_of(layer).mask
    parts = (value,) if fixed is None else (fixed.codes, fixed.scale)
    key = (*map(TensorKey.of, parts),), spec.weight
    if key not in modules:
        if fixed is not None:
            modules[key] = FixedWeight(fixed)
        elif weights == "rounded" and isinstance(spec.weight.format, Integer):
            modules[key] = RoundedWeight(value, spec.weight)
        elif weights == "scaled" and not spec.weight.pair_safe:  # which fixes the range
            modules[key] = ScaledWeight(value, spec.weight, mask)
        else:
            modules[key] = StraightThroughWeight(spec.weight, mask)
    weight = insert_module(student, f"{name}.weight_fake_quantize", modules[key], weight)
    layer.args = (source, weight, *rest)


def _trainable(student: GraphModule, weights: Weights) -> list[str]:
    """Return the names of the tensors that train."""
    biases = layer_operands(student, 2)
    operands = biases if weights == "rounded" else layer_operands(student, 1) | biases
    names: dict[str, None] = {}
    for node in student.graph.nodes:
        if node.op == "get_attr" and tensor_of(student, node).is_floating_point():
            value = tensor_of(student, node)
            everything = weights == "straight_through" and isinstance(value, nn.Parameter)
            if everything or str(node.target) in operands:
                if value.dtype in (torch.float16, torch.bfloat16):
                    raise UnsupportedError(
                        f"{node.target}: expected float32 to train in, found {value.dtype}; refine "
                        "the model in float32 and convert it afterwards"
                    )
                names[str(node.target)] = None
    return list(names)


def _root(node: Any) -> Any:
    while isinstance(node, Node) and (node.op == "call_module" or is_constant(node)):
        if node.op == "get_attr":
            return node
        node = node.args[0]
    return node


def _own_parameters(student: GraphModule, names: list[str]) -> None:
    """Replace tensors by trainable copies; those that are the same view of the same memory go on
    sharing."""
    copies: dict[TensorKey, nn.Parameter] = {}
    for name in names:
        value = _get(student, name)
        key = TensorKey.of(value)
        if key not in copies:
            copies[key] = nn.Parameter(value.detach().clone(), requires_grad=True)
        set_parameter(student, name, copies[key])


def adopt(gm: GraphModule, student: GraphModule) -> None:
    """Replace tensors of `gm`, and scales of its observers, by what `student`, made from it by
    `student_of`, has learned."""
    scales = {n: m for n, m in student.named_modules() if isinstance(m, StaticActivation)}
    for name, module in scales.items():
        observer = gm.get_submodule(name)
        assert isinstance(observer, RangeObserver)
        observer.trained_scale = module.scale.detach().clone()
    copies: dict[TensorKey, nn.Parameter] = {}
    for name, value in student.named_parameters(remove_duplicate=False):
        if name.rpartition(".")[0] in scales:
            continue
        key = TensorKey.of(value)
        if key not in copies:
            copies[key] = nn.Parameter(value.detach().clone(), requires_grad=False)
        set_parameter(gm, name, copies[key])
    for layer, _ in pending_layers(gm):  # zeros that a method has pruned stay
        if (mask := layer_of(layer).mask) is not None:
            weight_of(layer).mul_(mask)


def _get(gm: GraphModule, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    value: Tensor = getattr(gm.get_submodule(path), leaf)
    return value


def set_parameter(gm: GraphModule, name: str, value: nn.Parameter) -> None:
    """Put a parameter in the place of a tensor of a qualified name."""
    path, _, leaf = name.rpartition(".")
    owner = gm.get_submodule(path)
    if leaf in owner._buffers:
        delattr(owner, leaf)
    owner.register_parameter(leaf, value)
