"""How much the model's results feel an error at a node, by backward passes from random directions.

`sensitivities`: the diagonal of a Gauss-Newton matrix. To second order an error d at a node changes
the results, in squared error, by `d^T J^T J d`, where J is the Jacobian of the results to the node.
With random signs v on the results, the gradient g of their signed sum has `E[g^2] = diag(J^T J)`:
one backward pass tells it for all nodes at once. In place of the results' squared error a task's
loss gives the Fisher diagonal of BRECQ (arXiv:2102.05426, eq. 8), from which EDA-DM
(arXiv:2401.04585) derives its block loss.

`errors_at_results`: what quantizing a layer does to the results F. To first order it is J times the
error d of the layer itself, which is at hand: its operands quantized, its input the float one. With
random signs v again, `E[(v^T J d)^2] = |J d|^2`, and here with all of d, not one number of it:

    error(l) = E_v sum over samples of <d(v . F) / d y_l, Q_l(x) - y_l>^2 / |F|^2
"""

from collections import ChainMap
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import tree_leaves

from fxq.calibrate import all_reduce, n_processes
from fxq.errors import UnsupportedError
from fxq.graph import tensor_of
from fxq.numerics import as_real
from fxq.rewriting import frozen
from fxq.teacher_forcing import evaluate


def sensitivities(
    gm: GraphModule, batches: Iterable[Sequence[Any]], names: Sequence[str]
) -> dict[str, Tensor]:
    """Return the mean squared gradient of the signed results at each node, fp32, in the shape of a
    sample's value, mean 1; without nodes that no result depends on.

    The whole graph runs forward and backward on each batch, so its activations must fit.

    Args:
        gm: a float graph.
        batches: its inputs.
        names: of nodes whose value is a tensor of floats with the batch first.
    Raises:
        UnsupportedError: a node's value has another shape in another batch.
        ValueError: a gradient that is not finite.
    """
    watching, totals = _Watching(frozen(gm), set(names)), dict[str, Tensor]()
    for batch in batches:
        with torch.enable_grad():
            results = watching.run(*batch)
            floats = [as_real(r) for r in results if isinstance(r, Tensor) and r.requires_grad]
            signed = [(r * torch.randint_like(r, 2).mul(2).sub(1)).sum() for r in floats]
            values = list(watching.values.values())
            gradients = (
                torch.autograd.grad(torch.stack(signed).sum(), values, allow_unused=True)
                if signed
                else [None] * len(values)
            )
        for name, gradient in zip(watching.values, gradients, strict=True):
            if gradient is not None:
                _add(totals, name, gradient.float().square().sum(0))
        watching.values.clear()
    if n_processes() > 1:
        totals = {name: all_reduce(total, "SUM").to(total.device) for name, total in totals.items()}
    for name, total in totals.items():
        if not bool(total.isfinite().all()):
            raise ValueError(
                f"fisher: expected finite gradients at {name}, found NaN or Inf; check the data "
                "and the model, or use fisher=False"
            )
    return {name: total / total.mean() for name, total in totals.items() if bool(total.mean() > 0)}


def _add(totals: dict[str, Tensor], name: str, part: Tensor) -> None:
    known = totals.get(name)
    if known is not None and known.shape != part.shape:
        raise UnsupportedError(
            f"fisher: expected values of one shape at {name}, found {[*known.shape]} and "
            f"{[*part.shape]}; give batches of one size, or use fisher=False"
        )
    totals[name] = part if known is None else known + part


def errors_at_results(
    exact: GraphModule,
    quantized: GraphModule,
    batches: Iterable[Sequence[Any]],
    names: Sequence[str],
    n_directions: int,
    generator: torch.Generator,
) -> Tensor:
    """Return the error that each layer's quantization makes in the results, alone and to first
    order: squared, relative to the results' squares, summed over results and samples; fp64
    `[layers]`, of this process's batches.

    A sample is what is first in a layer's output. The whole graph runs forward and backward on each
    batch, so its activations must fit.

    Args:
        exact: a float graph.
        quantized: the same graph, converted (`Convert`).
        batches: their inputs.
        names: of the layers, in both graphs.
        n_directions: that are drawn for each batch; each is a backward pass.
        generator: draws them.
    """
    twins = {node.name: node for node in quantized.graph.nodes}
    constants = {n.name: tensor_of(quantized, n) for n in twins.values() if n.op == "get_attr"}
    watching, sums = (
        _Watching(frozen(exact), set(names), keep_all=True),
        torch.zeros(len(names)).double(),
    )
    for batch in batches:
        with torch.inference_mode(False), torch.enable_grad():
            leaves = tree_leaves(watching.run(*batch))
            results = [as_real(r) for r in leaves if isinstance(r, Tensor) and r.requires_grad]
            values = [watching.values[name] for name in names]
            with torch.no_grad():
                known = ChainMap({n.name: v for n, v in watching.env.items()}, constants)
                found = [evaluate(twins[name], {}, known) for name in names]
                changes = [(q - y).float() for q, y in zip(found, values, strict=True)]
            for index in range(n_directions if results else 0):
                gradients = torch.autograd.grad(
                    results, values, [_signs(result, generator) for result in results],
                    retain_graph=index + 1 < n_directions, allow_unused=True,
                )  # fmt: skip
                for k, (gradient, change) in enumerate(zip(gradients, changes, strict=True)):
                    if gradient is not None:
                        products = (gradient.float() * change).flatten(1).sum(1)
                        sums[k] += float(products.double().square().sum()) / n_directions
        watching.values.clear()
        watching.env.clear()
    return sums


def _signs(result: Tensor, generator: torch.Generator) -> Tensor:
    """Return random signs for a result, in units of the root of its sum of squares."""
    signs = torch.randint(2, result.shape, generator=generator).mul(2).sub(1).to(result.device)
    size = result.detach().float().square().sum().sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    return (signs / size).to(result.dtype)


class _Watching(Interpreter):
    """Runs a graph so that gradients reach some of its nodes."""

    def __init__(self, gm: GraphModule, names: set[str], *, keep_all: bool = False) -> None:
        super().__init__(gm, garbage_collect_values=not keep_all)
        self.names = names
        self.values: dict[str, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        """Run a node; keep its value if it is watched."""
        value = super().run_node(n)
        if isinstance(value, Tensor) and value.is_inference():  # which autograd cannot keep
            value = value.clone()
        if n.name in self.names and isinstance(value, Tensor) and value.is_floating_point():
            value = value if value.requires_grad else value.detach().requires_grad_()
            self.values[n.name] = value
        return value
