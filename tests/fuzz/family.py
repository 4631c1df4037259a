"""A family: spellings of the same kind of thing.

A spelling is a function of the layer `m` (its tensors and size), the value `h`, an earlier value
`o` of the same shape and the Python argument `n` of the module. Its name is for people; what
tensors it needs is read from its code.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

Shape = tuple[int, ...]
Spelling = Callable[[Any, Tensor, Any, int], Tensor]
Shapes = dict[str, Shape] | None


@dataclass(frozen=True)
class Family:
    """Spellings, the tensors and modules they may use, and what they do that is special.

    Args:
        spellings: by name.
        tensors: shapes by name for a value's shape and a step's size; None where it does not fit.
        modules: constructors by name, likewise.
        buffers: names of tensors that are state, zero at first.
    """

    spellings: Mapping[str, Spelling]
    tensors: Callable[[Shape, int], Shapes] = lambda shape, size: {}
    modules: Mapping[str, Callable[[Shape, int], nn.Module]] = field(default_factory=dict)
    buffers: tuple[str, ...] = ()
