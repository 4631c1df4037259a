"""What the rules of all devices share that choose what computes `fxq::rectified_attention`."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

import fxq.lowering.rectified_attention  # noqa: F401  registers the op
from fxq.graph import args_of, is_op
from fxq.lowering.rule import MIN_SQNR_DB, Decision, Lowering, Rule
from fxq.numerics import sqnr_db
from fxq.operators import SPARSE_ATTENTION
from fxq.rewriting import insert_call

OP = torch.ops.fxq.lowered_attention.default


@dataclass(frozen=True)
class SparseAttention(Rule):
    """A rule for sparse attention, as it is without a kernel.

    Devices that have one say how reports call it, with a remark; which engine of
    `fxq.lowering.rectified_attention` it is, None where the node stays as it is; and `why_not`.
    """

    instead: ClassVar[str] = "the reference"
    kernel: ClassVar[str] = ""
    remark: ClassVar[str] = ""
    engine: ClassVar[str | None] = None

    def is_for(self, node: Node) -> bool:
        return is_op(node, SPARSE_ATTENTION)

    def why_not(self, node: Node, lowering: Lowering) -> str | None:
        """Return why the kernel does not take an attention, None where it does."""
        return f"no kernel for {lowering.device.type}"

    def apply(self, node: Node, lowering: Lowering) -> Decision:
        if why := self.why_not(node, lowering):
            return Decision(None, why)
        if self.engine is None:
            self.keep(node)
        else:
            self.replace(node, insert_call(OP, (*args_of(node), self.engine), before=node))
        return Decision(self.kernel, self.remark)

    def check(
        self, expected: Any, found: Any, kernel: Node, value: Callable[[Node], Any]
    ) -> tuple[bool, bool]:
        (expected, _), (found, _) = expected, found
        return True, sqnr_db(expected, found) >= min_attention_sqnr_db(expected.dtype)


def min_attention_sqnr_db(dtype: torch.dtype) -> float:
    """Return the bound on attention in a dtype: 54 dB in float16, 36 dB in bfloat16.

    Attention has no integers: its kernels round the weights and the output to the model's dtype,
    once each, by half a unit in the last place or less: together one unit. Half of that again is
    left for outputs that are smaller than what they are summed from.
    """
    return min(MIN_SQNR_DB, -20 * math.log10(2 * torch.finfo(dtype).eps))
