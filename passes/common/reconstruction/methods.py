"""What learns in a block: plug-ins of the reconstruction engine.

A method makes a student of a block, says which of its parameters train and how fast, what else than
the block's error they are to lower, and what of the student is kept.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxq.checkpoint import Tensors
from fxq.graph import args_of, constant_of
from fxq.layer import WeightCodes, layer_of
from fxq.passes.common.convert import pending_layers, quantize_weight
from fxq.passes.common.learned_quantizers import (
    RoundedWeight,
    ScaledWeight,
    StaticActivation,
    kept,
)
from fxq.passes.common.student import (
    activation_scales,
    activation_zero_shifts,
    layer_operands,
    rows_of_activations,
    student_of,
)
from fxq.spec import QuantSpec

# Adam's parameter groups. Those with "rows": True are tables of which a step uses some rows.
Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class Learned:
    """What a block has learned.

    Args:
        scales: of static activations, by the observer's name.
        zero_points: likewise, of those that have one.
        codes: of weights, by the layer's node.
        biases: by qualified name.
    """

    scales: Mapping[str, Tensor] = field(default_factory=dict)
    codes: Mapping[str, WeightCodes] = field(default_factory=dict)
    biases: Mapping[str, Tensor] = field(default_factory=dict)
    zero_points: Mapping[str, Tensor] = field(default_factory=dict)

    def tensors(self) -> Tensors:
        """Return everything under names, for a checkpoint."""
        kept = {f"scale {name}": value for name, value in self.scales.items()}
        kept |= {f"zero {name}": value for name, value in self.zero_points.items()}
        kept |= {f"bias {name}": value for name, value in self.biases.items()}
        for name, fixed in self.codes.items():
            kept |= {f"codes {name}": fixed.codes, f"codes_scale {name}": fixed.scale}
            if fixed.zero_point is not None:
                kept[f"codes_zero {name}"] = fixed.zero_point
        return kept

    @classmethod
    def of(cls, tensors: Tensors) -> "Learned":
        """Return what `tensors` returned, put together again."""
        named: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            kind, _, name = key.partition(" ")
            named.setdefault(kind, {})[name] = value
        zeros, steps = named.get("codes_zero", {}), named.get("codes_scale", {})
        codes = {
            name: WeightCodes(value, steps[name], zeros.get(name))
            for name, value in named.get("codes", {}).items()
        }
        return cls(named.get("scale", {}), codes, named.get("bias", {}), named.get("zero", {}))


class Method(Protocol):
    """What learns in a block."""

    def student(self, block: GraphModule) -> GraphModule:
        """Return the function of a block, observed and calibrated, that is trained."""

    def groups(self, student: GraphModule) -> Groups:
        """Return the parameters that train, with the learning rates they begin with."""

    def penalty(self, student: GraphModule, done: float) -> Tensor | float:
        """Return what is added to the block's loss, in units of the loss at the beginning.

        Args:
            student: in train mode.
            done: the share of the steps that is done.
        """

    def learned(self, student: GraphModule) -> Learned:
        """Return what the student has learned so far."""


@dataclass(frozen=True)
class Rounding:
    """Learn whether each weight is rounded up or down (AdaRound, arXiv:2004.10568), the scales of
    static activations (LSQ, arXiv:1902.08153), and biases. Weights keep their ranges.

    Learning rates are those of Adam at the first step: of positions on the stretched sigmoid, of
    logarithms of scales, and of biases in units of the error that they correct.

    Args:
        learning_rate: of roundings; 0 leaves them to the nearest.
        activation_learning_rate: of activations' scales; 0 leaves them to calibration.
        bias_learning_rate: of biases; 0 leaves them.
        penalty_weight: of the indecision of roundings, which must be 0 or 1 in the end; in units of
            the loss at the beginning.
        warmup: share of the steps without that penalty.
        sharpness: its exponent, at the beginning and at the end.
        float_share: share of the activations that stay float in each step (QDrop,
            arXiv:2203.05740).
    """

    learning_rate: float = 0.1
    activation_learning_rate: float = 1e-3
    bias_learning_rate: float = 0.0
    penalty_weight: float = 0.1
    warmup: float = 0.2
    sharpness: tuple[float, float] = (20.0, 2.0)
    float_share: float = 0.0

    def student(self, block: GraphModule) -> GraphModule:
        """Return the block with learned roundings."""
        student = _with_float_share(student_of(block, "rounded"), self.float_share)
        for module in _rounded(student):
            module.position.requires_grad_(self.learning_rate > 0)
        return student

    def groups(self, student: GraphModule) -> Groups:
        """Return roundings, scales and biases."""
        return _groups(
            (self.learning_rate, [m.position for m in _rounded(student)]),
            (self.activation_learning_rate, activation_scales(student)),
            (self.bias_learning_rate, layer_operands(student, 2).values()),
            rows=rows_of_activations(student),
        )

    def penalty(self, student: GraphModule, done: float) -> Tensor | float:
        """Return the mean indecision of all roundings, in its weight; 0 while warming up."""
        share = (done - self.warmup) / (1 - self.warmup)
        modules = [m for m in _rounded(student) if m.position.requires_grad]
        if share < 0 or not modules:
            return 0.0
        first, last = self.sharpness
        sharpness = last + (first - last) * (1 + math.cos(math.pi * share)) / 2
        sizes = [m.position.numel() for m in modules]
        parts = [m.indecision(sharpness) * n for m, n in zip(modules, sizes, strict=True)]
        return self.penalty_weight * torch.stack(parts).sum() / sum(sizes)

    def learned(self, student: GraphModule) -> Learned:
        """Return codes, scales and biases."""
        return _learned(student)


@dataclass(frozen=True)
class StraightThrough:
    """Learn weights by their values, with straight-through gradients, their scales, the scales of
    static activations, and biases. A pair-safe weight's range follows the weight instead.

    Args:
        learning_rate: of weights, in units of each layer's mean magnitude.
        scale_learning_rate: of logarithms of weights' scales; 0 leaves them.
        activation_learning_rate: of logarithms of activations' scales; 0 leaves them.
        zero_point_learning_rate: of activations' zero-points, in codes; 0 leaves them.
        bias_learning_rate: of biases; 0 leaves them.
        float_share: share of the activations that stay float in each step.
    """

    learning_rate: float = 5e-3
    scale_learning_rate: float = 0.0
    activation_learning_rate: float = 1e-3
    zero_point_learning_rate: float = 0.0
    bias_learning_rate: float = 0.0
    float_share: float = 0.0

    def student(self, block: GraphModule) -> GraphModule:
        """Return the block with weights that train."""
        student = _with_float_share(student_of(block, "scaled"), self.float_share)
        for shift in activation_zero_shifts(student):
            shift.requires_grad_(self.zero_point_learning_rate > 0)
        return student

    def groups(self, student: GraphModule) -> Groups:
        """Return weights, scales and biases."""
        weights = [
            (self.learning_rate * float(weight.detach().abs().mean()), [weight])
            for weight in layer_operands(student, 1).values()
        ]
        scales = [m.log_gain for m in student.modules() if isinstance(m, ScaledWeight)]
        return _groups(
            *weights,
            (self.scale_learning_rate, scales),
            (self.activation_learning_rate, activation_scales(student)),
            (self.zero_point_learning_rate, activation_zero_shifts(student)),
            (self.bias_learning_rate, layer_operands(student, 2).values()),
            rows=rows_of_activations(student),
        )

    def penalty(self, student: GraphModule, done: float) -> Tensor | float:
        """Return 0."""
        return 0.0

    def learned(self, student: GraphModule) -> Learned:
        """Return codes, scales and biases."""
        return _learned(student)


def _groups(*rates: tuple[float, Iterable[Tensor]], rows: Collection[Tensor]) -> Groups:
    """Return parameters with their rates, each once, and whether they are tables of rows; those
    that stay are left out."""
    found = {parameter: rate for rate, several in rates for parameter in several if rate}
    tables = set(rows)
    return [{"params": [p], "lr": rate, "rows": p in tables} for p, rate in found.items()]


def _with_float_share(student: GraphModule, share: float) -> GraphModule:
    for module in student.modules():
        if isinstance(module, StaticActivation):
            module.float_share = share
    return student


def _rounded(student: GraphModule) -> list[RoundedWeight]:
    return [module for module in student.modules() if isinstance(module, RoundedWeight)]


def _learned(student: GraphModule) -> Learned:
    """Return the scales and biases of a student, and the codes of its weights."""
    scales = {
        name: module.scale.detach().clone()
        for name, module in student.named_modules()
        if isinstance(module, StaticActivation) and module.log_gain.requires_grad
    }
    zero_points = {
        name: module.zero_point.clone()
        for name, module in student.named_modules()
        if isinstance(module, StaticActivation) and module.zero_point is not None
        if name in scales
    }
    codes = {
        layer.name: _codes_of(student, layer, spec.weight)
        for layer, spec in pending_layers(student)
        if layer_of(layer).weight is None
    }
    biases = {n: b.detach().clone() for n, b in layer_operands(student, 2).items()}
    return Learned(scales, codes, biases, zero_points)


def _codes_of(student: GraphModule, layer: Node, spec: QuantSpec) -> WeightCodes:
    quantizer = args_of(layer)[1]
    module = student.get_submodule(str(quantizer.target))
    if isinstance(module, RoundedWeight):
        return module.codes()
    weight = constant_of(args_of(quantizer)[0])
    if isinstance(module, ScaledWeight):
        return module.codes(weight)
    return WeightCodes(*quantize_weight(kept(weight.detach(), layer_of(layer).mask), spec))
