"""What the rules of all devices share that choose what computes `fxq::rectified_attention`."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

import fxq.lowering.rectified_attention  # noqa: F401  registers the op
from fxq.account import SPARSE_ATTENTION
from fxq.graph import args_of, insert_call, is_op
from fxq.lowering.exactness import MIN_SQNR_DB, Exactness
from fxq.lowering.rule import Rule
from fxq.numerics import sqnr_db

OP = torch.ops.fxq.lowered_attention.default


@dataclass(frozen=True)
class SparseAttention(Rule):
    """A rule for one sparse attention, whose definition runs on any device."""

    instead: ClassVar[str] = "the reference"

    def is_for(self, node: Node) -> bool:
        return is_op(node, SPARSE_ATTENTION)

    def use(self, engine: str, node: Node) -> None:
        """Put an engine of `fxq.lowering.rectified_attention` in the place of `node`."""
        self.replace(node, insert_call(OP, (*args_of(node), engine), before=node))

    def check(
        self, expected: Any, found: Any, kernel: Node, value: Callable[[Node], Any]
    ) -> Exactness:
        error = sqnr_db(expected[0], found[0])  # without the log-sum-exp
        return Exactness(True, error, error >= min_attention_sqnr_db(expected[0].dtype))


def min_attention_sqnr_db(dtype: torch.dtype) -> float:
    """Return the bound on attention in a dtype: 54 dB in float16, 36 dB in bfloat16.

    Attention has no integers: its kernels round the weights and the output to the model's dtype,
    once each, by half a unit in the last place or less: together one unit. Half of that again is
    left for outputs that are smaller than what they are summed from.
    """
    return min(MIN_SQNR_DB, -20 * math.log10(2 * torch.finfo(dtype).eps))
