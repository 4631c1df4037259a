"""CorrectBias: the mean error that quantization makes of a layer's output goes out of its bias.

Rounded weights meet inputs that are not zero in the mean, behind a ReLU above all: errors of one
sign, channel by channel, which the next layers add up. With the operands of a layer quantized and
its input the float one,

    e_c = y_c - Q(y)_c,   of a sample, in the mean over its positions
    b_c <- b_c + m_c max(0, 1 - s_c^2 / (n m_c^2))

where m_c and s_c^2 are mean and variance of e_c over n samples: of a mean that so many samples
would have by chance only the rest counts (positive-part shrinkage, James and Stein 1961). The
correction itself is that of arXiv:1906.04721 (Nagel and others, 2019), section 4.2, with data.
"""

from collections import ChainMap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.passes.infra.pass_base import PassResult

from fxq.calibrate import NO_DATA, Batches, all_reduce, n_processes
from fxq.dialect import OBSERVED, Dialect
from fxq.graph import dtype_of, is_constant, owner_name, tensor_of, weight_of
from fxq.layer import Skip, treat
from fxq.operators import operand, set_operand
from fxq.passes.common.convert import Convert, pending_layers
from fxq.passes.common.student import without_observers
from fxq.passes.common.whole import pieces
from fxq.pipeline import DataPass
from fxq.rewriting import add_buffer, copy_graph, erase_dead
from fxq.spec import LayerSpec
from fxq.teacher_forcing import evaluate


def correction(total: Tensor, squares: Tensor, n: int) -> Tensor:
    """Return what to add to a bias `[C]`; zeros for one sample, whose chance nobody knows.

    Args:
        total: sum of the samples' mean errors `[C]`, fp64.
        squares: sum of their squares `[C]`, fp64.
        n: number of samples.
    """
    if n < 2:
        return torch.zeros_like(total)
    mean = total / n
    by_chance = (squares / n - mean.square()).clamp(min=0) / (n - 1)  # variance of the mean
    keep = (1 - by_chance / mean.square()).clamp(min=0)
    return torch.where(mean == 0, 0.0, mean * keep)


@dataclass(frozen=True)
class CorrectBias(DataPass):
    """Correct the biases of quantized layers. Stands after `Calibrate`, right before `Convert`.

    A layer without a bias gets one. One whose bias is computed at run time, or whose scale is
    chosen by row, keeps it, with the reason in its record.

    Args:
        n_samples: of the data, in this process, whose errors are looked at.
    Raises:
        ValueError: `n_samples` is not positive.
    """

    n_samples: int = 256

    reads: ClassVar[Dialect] = OBSERVED
    writes: ClassVar[Dialect] = OBSERVED

    def __post_init__(self) -> None:
        if self.n_samples < 1:
            raise ValueError(
                f"CorrectBias.n_samples: expected a positive number, found {self.n_samples}"
            )

    def run(self, gm: GraphModule, data: Batches) -> PassResult:
        """Correct every layer that is about to be quantized."""
        name, layers = type(self).__name__, list[Node]()
        for layer, spec in pending_layers(gm):
            if why := _why_not(layer, spec):
                treat(layer, name, Skip(why, intended=True))
            else:
                layers.append(layer)
        if not layers:
            return PassResult(gm, modified=False)
        for layer, shift in zip(layers, self._corrections(gm, layers, data), strict=True):
            bias = operand(layer, "bias")
            known = 0.0 if bias is None else tensor_of(gm, bias).double()
            corrected = (known + shift).to(dtype_of(layer))
            buffer = add_buffer(gm, f"{owner_name(layer)}.bias", corrected, like=layer)
            set_operand(layer, "bias", buffer)
            treat(layer, name, f"{int(shift.count_nonzero())} channels of the bias corrected")
        erase_dead(gm)
        return PassResult(gm, modified=True)

    def _corrections(self, gm: GraphModule, layers: Sequence[Node], data: Batches) -> list[Tensor]:
        """Return what to add to each layer's bias, fp64."""
        exact, names = without_observers(gm), [layer.name for layer in layers]
        quantized = Convert().run(copy_graph(gm)).graph_module
        twins = {node.name: node for node in quantized.graph.nodes}
        constants = {n.name: tensor_of(quantized, n) for n in twins.values() if n.op == "get_attr"}
        axes = [1 - weight_of(layer).ndim for layer in layers]  # of the output channels
        sums = [weight_of(layer).new_zeros(3, len(weight_of(layer)), dtype=torch.float64)
                for layer in layers]  # fmt: skip
        runner = Interpreter(exact, garbage_collect_values=False)
        with torch.no_grad():
            for batch in pieces(gm, data, self.n_samples):
                runner.run(*batch)
                known = ChainMap({n.name: v for n, v in runner.env.items()}, constants)
                for of_layer, layer, axis in zip(sums, names, axes, strict=True):
                    error = known[layer].double() - evaluate(twins[layer], {}, known)
                    of_layer += _of_samples(error.movedim(axis, -1))
                runner.env.clear()
        if n_processes() > 1:
            sums = [all_reduce(each, "SUM").to(each.device) for each in sums]
        if not int(sums[0][2, 0]):
            raise ValueError(NO_DATA)
        return [correction(total, squares, int(count[0])) for total, squares, count in sums]


def _of_samples(error: Tensor) -> Tensor:
    """Return sum, sum of squares and number of the samples' mean errors `[3, C]`.

    Args:
        error: `[samples, ..., C]`, or of one sample `[C]`.
    """
    error = error.reshape(len(error) if error.ndim > 1 else 1, -1, error.shape[-1])
    means = error.mean(1)
    return torch.stack([means.sum(0), means.square().sum(0), torch.ones_like(means).sum(0)])


def _why_not(layer: Node, spec: LayerSpec) -> str:
    """Return why a layer's bias stays, "" where it does not."""
    bias = operand(layer, "bias")
    if bias is not None and not is_constant(bias):
        return "its bias is computed at run time"
    if spec.activation is not None and spec.activation.rows is not None:
        return "its mean error is another in each row of its scale"
    return ""
