"""The rule that chooses what computes `fxq::rectified_attention` on a device."""

from collections.abc import Mapping

import torch
from torch.fx import GraphModule, Node

from fxq.lowering.decision import Decision


def lower_attention(
    gm: GraphModule, node: Node, device: torch.device, sizes: Mapping[str, int] | None
) -> Decision:
    """Decide on one sparse attention."""
    return Decision(None, f"runs as its reference on {device.type}")
