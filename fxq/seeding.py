"""Random operators that draw the same numbers in two runs that are compared."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


@contextlib.contextmanager
def same_seed(values: Sequence[Any]) -> Iterator[None]:
    """Start torch's generators at one seed, and leave them as they were afterwards.

    Args:
        values: of the call; tensors among them tell whose generators.
    """
    devices = {v.device for v in values if isinstance(v, Tensor) and v.is_cuda}
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        yield


def seeded(run: Callable[..., Any], inputs: Sequence[Any]) -> Any:
    """Return `run(*inputs)`, with the same random numbers whatever `run` is, and no gradients."""
    with torch.no_grad(), same_seed(inputs):
        return run(*inputs)
