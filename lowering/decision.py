"""What a lowering rule decided for one layer, and why."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Decision:
    """Outcome of a rule.

    Args:
        kernel: the kernel that computes the layer, None where it runs as float on dequantized
            values.
        reason: why there is no kernel, or what to know about the one there is.
    """

    kernel: str | None
    reason: str = ""
