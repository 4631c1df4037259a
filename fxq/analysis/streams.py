"""What a walk over token positions finds (`fxq.analysis.positions`)."""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import Node

NOWHERE = 0
UNKNOWN = -1


@dataclass(frozen=True)
class Stream:
    """An input whose elements have positions.

    Args:
        name: of the model's argument.
        shape: its sizes after the batch.
        base: number of its first element.
    """

    name: str
    shape: tuple[int, ...]
    base: int


@dataclass
class Positions:
    """What one walk found.

    Attributes:
        streams: the inputs with positions.
        attention: every dense attention node -> numbers along the sequences of its queries, keys
            and values, each `[R, S]`, int64, free sizes as at capture. R sequences where those of a
            batch stand at different places (frames, windows), else 1. Of one whose sizes depend on
            the data they are the most there can be, of which the first so many are there; where
            that is not so it is left out.
        present: for each of these, a number of tokens that is small and shows what always is there.
        returned: names of the streams that the model's results have positions of.
        aligned: pairs of streams whose tokens are added (or multiplied) one to one: they stand at
            the same places.
    """

    streams: list[Stream] = field(default_factory=list)
    attention: dict[Node, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)
    present: dict[Node, int] = field(default_factory=dict)
    returned: set[str] = field(default_factory=set)
    aligned: set[frozenset[str]] = field(default_factory=set)

    @property
    def standing_for(self) -> set[str]:
        """Names of the streams that are returned or stand, token for token, where such a one does:
        what a denoiser's control branch is given."""
        found: set[str] = set()
        more = set(self.returned)
        while more:
            found |= more
            more = {name for pair in self.aligned if pair & found for name in pair} - found
        return found

    def stream_of(self, number: int) -> Stream | None:
        """Return the stream that an element's number belongs to, None for NOWHERE and UNKNOWN."""
        return next((s for s in reversed(self.streams) if number >= s.base), None)

    def index_of(self, numbers: Tensor) -> Tensor:
        """Return which of the streams each element belongs to, -1 for none."""
        bases = torch.tensor([stream.base for stream in self.streams])
        return torch.bucketize(numbers, bases, right=True) - 1

    def names_of(self, numbers: Tensor) -> set[str | None]:
        """Return the names of the streams that elements belong to, and None if some have none."""
        found = self.index_of(numbers).unique().tolist()
        return {self.streams[i].name if i >= 0 else None for i in found}
