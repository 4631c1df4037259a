"""A model to prune, and its linears."""

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxq.graph import is_op

LINEAR = torch.ops.aten.linear.default


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.b(torch.relu(self.a(x))))


def linears(gm: GraphModule) -> list[Node]:
    return [node for node in gm.graph.nodes if is_op(node, LINEAR)]
