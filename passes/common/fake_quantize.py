"""Fake quantization that can be trained through: the quantized function of an observed graph, with
straight-through gradients.

    forward   x_hat = dequantize(quantize(x))        backward   1 where x is in range, 0 outside

Rounding has no slope anywhere, so its gradient is taken for that of the identity; values outside
the range are clipped, and clipping's own gradient is kept. Of the scale, that makes the gradient
`(x_hat - x) / scale` in range and `x_hat / scale` outside (LSQ, arXiv:1902.08153, Eq. 3).
`student_of` makes such a function of a graph that is ready for `Convert`, `adopt` puts what it
learned into that graph: `Convert` then gives the function that was trained, to the last integer.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxq import numerics
from fxq.errors import UnsupportedError
from fxq.graph import args_of, is_constant, owner_name, tensor_of
from fxq.identity import TensorKey
from fxq.layer import layer_of
from fxq.observers import RangeObserver
from fxq.passes.common.convert import pending_layers, quantize_weight
from fxq.rewriting import copy_graph, insert_module
from fxq.row_choice import pick
from fxq.spec import LayerSpec, QuantSpec, block_of


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor | None, *grid: Any
    ) -> Tensor:
        codes = numerics.quantize(x, scale, zero_point, *grid)
        value = numerics.dequantize(codes, scale, zero_point, x.dtype)
        wide = numerics.expand_blocks(scale, x.shape)
        # In range is what no clamp moved: at most half a step from its code's value, which in
        # floating point is a step of the largest codes.
        step = 1.0 if len(grid) == 2 else torch.finfo(grid[2]).eps * grid[1]
        inside = (value.float() - x.float()).abs() <= wide * (step * (0.5 + 2**-10))
        slope = (value.float() - x.float() * inside) / wide if ctx.needs_input_grad[1] else None
        ctx.save_for_backward(inside, slope, scale)
        ctx.n_constants = 1 + len(grid)
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inside, slope, scale = ctx.saved_tensors
        of_scale = None
        if slope is not None:
            with torch.enable_grad():
                leaf = scale.detach().requires_grad_()
                wide = numerics.expand_blocks(leaf, slope.shape).expand(slope.shape)
            (of_scale,) = torch.autograd.grad(wide, leaf, grads[0].float() * slope)
        return grads[0] * inside, of_scale, *[None] * ctx.n_constants


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, *grid: Any) -> Tensor:
    """Return `x` rounded to codes and back, in its dtype; bit-equal to quantize and dequantize.

    Args:
        x: float, any shape.
        scale: fp32, > 0, one entry per block of `x`.
        zero_point: int32 in the shape of `scale`, or None for 0.
        grid: of the codes (`QuantSpec.grid`).
    """
    value: Tensor = _StraightThrough.apply(x, scale, zero_point, *grid)
    return value


class _StaticActivation(nn.Module):
    """An activation in the range its observer found, scaled by what training makes of it."""

    found: Tensor
    zero_point: Tensor | None

    def __init__(self, observer: RangeObserver) -> None:
        super().__init__()
        self.spec = observer.spec
        scale, zero_point = observer.qparams()
        self.register_buffer("found", scale)
        self.register_buffer("zero_point", None if self.spec.symmetric else zero_point)
        self.log_gain = nn.Parameter(torch.zeros_like(scale))  # a scale stays above zero

    @property
    def scale(self) -> Tensor:
        """The scale as trained so far, fp32 in the shape of the one found."""
        return self.found * self.log_gain.exp()

    def forward(self, x: Tensor, index: Tensor | None = None) -> Tensor:
        scale, zero_point, rows = self.scale, self.zero_point, self.spec.rows
        if rows is not None:
            assert index is not None
            scale = pick(scale, index, rows)
            zero_point = None if zero_point is None else pick(zero_point, index, rows)
        return fake_quantize(x, scale, zero_point, *self.spec.grid)


class _DynamicActivation(nn.Module):
    """An activation in its own range."""

    def __init__(self, spec: QuantSpec) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, x: Tensor) -> Tensor:
        spec = self.spec
        block = block_of(spec.granularity, x.ndim, dynamic=True)
        low, high = numerics.block_amin_amax(x.detach(), block)
        scale, zero_point = numerics.choose_qparams(
            low, high, spec.quant_min, spec.quant_max, symmetric=spec.symmetric
        )
        zero = None if spec.symmetric else zero_point
        return fake_quantize(x, scale, zero, *spec.grid)


class _Weight(nn.Module):
    """A weight in the range it has now."""

    def __init__(self, spec: QuantSpec) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, weight: Tensor) -> Tensor:
        with torch.no_grad():
            _, scale, zero_point = quantize_weight(weight, self.spec)
        return fake_quantize(weight, scale, zero_point, *self.spec.grid)


def without_observers(gm: GraphModule) -> GraphModule:
    """Return a copy of an observed graph that observes nothing: its float function."""
    copied = copy_graph(gm)
    for node in [n for n in copied.graph.nodes if n.op == "call_module"]:
        node.replace_all_uses_with(node.args[0])
        copied.graph.erase_node(node)
    copied.delete_all_unused_submodules()
    copied.recompile()
    return copied


def student_of(gm: GraphModule) -> GraphModule:
    """Return the function that `Convert` would make of an observed, calibrated graph, to train it:
    straight-through gradients, and parameters of its own.

    Parameters of `gm` train, all weights and biases of quantized layers, and the scales of static
    activations, from those that the observers found; other buffers do not. Zero-points stay. A
    weight's range follows the weight, a dynamic activation's the activation.

    Args:
        gm: a graph in the OBSERVED dialect, in float32. It is not modified.
    Raises:
        UnsupportedError: parameters in half precision, in which small steps round away.
    """
    student = copy_graph(gm)
    for node in [n for n in student.graph.nodes if n.op == "call_module"]:
        observer = student.get_submodule(str(node.target))
        assert isinstance(observer, RangeObserver)
        student.add_submodule(str(node.target), _StaticActivation(observer))
    for layer, spec in pending_layers(student):
        _quantize_operands(student, layer, spec)
    _own_parameters(student, _trainable(student))
    student.graph.lint()
    student.recompile()
    return student


def activation_scales(student: GraphModule) -> list[nn.Parameter]:
    """Return the parameters of a student that scale its static activations: logarithms of what
    multiplies the scales that calibration found, 0 at first."""
    return [m.log_gain for m in student.modules() if isinstance(m, _StaticActivation)]


def _quantize_operands(student: GraphModule, layer: Node, spec: LayerSpec) -> None:
    source, weight, *rest = args_of(layer)
    name = owner_name(layer)
    if layer_of(layer).weight is not None:
        raise UnsupportedError(
            f"{name}: expected a weight to train, found codes that a method has fixed; train first"
        )
    if spec.activation is not None and spec.activation.dynamic:
        module: nn.Module = _DynamicActivation(spec.activation)
        source = insert_module(student, f"{name}.input_fake_quantize", module, source)
    module = _Weight(spec.weight)
    weight = insert_module(student, f"{name}.weight_fake_quantize", module, weight)
    layer.args = (source, weight, *rest)


def _trainable(student: GraphModule) -> list[str]:
    """Return the names of the tensors that train."""
    operands = {_root(arg) for layer, _ in pending_layers(student) for arg in args_of(layer)[1:3]}
    names: dict[str, None] = {}
    for node in student.graph.nodes:
        if node.op == "get_attr" and tensor_of(student, node).is_floating_point():
            value = tensor_of(student, node)
            if isinstance(value, nn.Parameter) or node in operands:
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
        _set(student, name, copies[key])


def adopt(gm: GraphModule, student: GraphModule) -> None:
    """Replace tensors of `gm`, and scales of its observers, by what `student`, made from it by
    `student_of`, has learned."""
    scales = {n: m.scale for n, m in student.named_modules() if isinstance(m, _StaticActivation)}
    for name, scale in scales.items():
        observer = gm.get_submodule(name)
        assert isinstance(observer, RangeObserver)
        observer.trained_scale = scale.detach().clone()
    copies: dict[TensorKey, nn.Parameter] = {}
    for name, value in student.named_parameters(remove_duplicate=False):
        if name.rpartition(".")[0] in scales:
            continue
        key = TensorKey.of(value)
        if key not in copies:
            copies[key] = nn.Parameter(value.detach().clone(), requires_grad=False)
        _set(gm, name, copies[key])


def _get(gm: GraphModule, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    value: Tensor = getattr(gm.get_submodule(path), leaf)
    return value


def _set(gm: GraphModule, name: str, value: nn.Parameter) -> None:
    path, _, leaf = name.rpartition(".")
    owner = gm.get_submodule(path)
    if leaf in owner._buffers:
        delattr(owner, leaf)
    owner.register_parameter(leaf, value)
