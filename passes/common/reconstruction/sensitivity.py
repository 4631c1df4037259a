"""How much the model's results feel an error at a node: the diagonal of a Gauss-Newton matrix.

To second order an error d at a node changes the results, in squared error, by `d^T J^T J d`, where
J is the Jacobian of the results to the node. With random signs v on the results, the gradient g of
their signed sum has `E[g^2] = diag(J^T J)`: one backward pass tells it for all nodes at once. In
place of the results' squared error a task's loss gives the Fisher diagonal of BRECQ
(arXiv:2102.05426, eq. 8), from which EDA-DM (arXiv:2401.04585) derives its block loss.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from fxq.calibrate import all_reduce, n_processes
from fxq.errors import UnsupportedError
from fxq.rewriting import frozen


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
            floats = [r for r in results if isinstance(r, Tensor) and r.requires_grad]
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


class _Watching(Interpreter):
    """Runs a graph so that gradients reach some of its nodes."""

    def __init__(self, gm: GraphModule, names: set[str]) -> None:
        super().__init__(gm)
        self.names = names
        self.values: dict[str, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        """Run a node; keep its value if it is watched."""
        value = super().run_node(n)
        if n.name in self.names and isinstance(value, Tensor) and value.is_floating_point():
            value = value if value.requires_grad else value.detach().requires_grad_()
            self.values[n.name] = value
        return value
