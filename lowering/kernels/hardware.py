"""What a kernel may use of the device it is launched on: shared memory, and the copy engine (TMA).

From Hopper on, tiles can be loaded by the copy engine, which is told of a tensor by a descriptor.
The kernels here have a variant without, for older devices and for tensors that it cannot take.
"""

import contextvars
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # a Triton without: every kernel loads by pointers
    TensorDescriptor = None

ALIGNMENT = 16  # bytes, of what the copy engine reads


def shared_bytes(device: torch.device) -> int:
    """Return the shared memory that one program may have; in the interpreter it is a Hopper's."""
    if device.type != "cuda":
        return 232_448
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def multiprocessors(device: torch.device) -> int:
    """Return how many programs run side by side; in the interpreter as many as on an H100."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def why_no_copy_engine(device: torch.device) -> str | None:
    """Return why descriptors do not work here, None where they do; in the interpreter they do."""
    if TensorDescriptor is None:
        return f"Triton {triton.__version__} has no tensor descriptors"
    if device.type == "cuda" and (found := torch.cuda.get_device_capability(device)) < (9, 0):
        return f"the copy engine (TMA) is there from sm_90 on, found sm_{found[0]}{found[1]}"
    return None


def why_not_specialized(device: torch.device) -> str | None:
    """Return why warps cannot copy while others multiply by wgmma, which is of Hopper alone; None
    where they can."""
    if why := why_no_copy_engine(device):
        return why
    if device.type == "cuda" and (found := torch.cuda.get_device_capability(device))[0] != 9:
        return f"its products (wgmma) are those of sm_90, found sm_{found[0]}{found[1]}"
    return None


def with_scratch(launch: Callable[[], object]) -> None:
    """Launch a kernel that makes its descriptors itself, in memory that Triton asks us for.

    Triton keeps who allocates in a context variable; a copy of the context leaves the caller's
    alone.
    """

    def run() -> None:
        triton.set_allocator(_scratch)
        launch()

    contextvars.copy_context().run(run)


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")  # aligned to 512 bytes


def starts_aligned(x: Tensor) -> bool:
    """Tell whether the first element of `x` is at a multiple of what one load takes."""
    return x.data_ptr() % ALIGNMENT == 0


def can_describe(x: Tensor) -> bool:
    """Tell whether the copy engine can load tiles of `x`."""
    strides = [step * x.element_size() for step in _strides(x)[:-1]]
    return (
        why_no_copy_engine(x.device) is None
        and x.numel() > 0
        and starts_aligned(x)
        and _strides(x)[-1] == 1
        and all(step > 0 and step % ALIGNMENT == 0 for step in strides)
    )


def describe(x: Tensor, tile: Sequence[int]) -> Any:
    """Return a descriptor of `x` for tiles of a shape, where `can_describe`."""
    return TensorDescriptor(x, list(x.shape), _strides(x), list(tile))


def _strides(x: Tensor) -> list[int]:
    # The stride of an axis of one element is never used, and PyTorch leaves anything there.
    steps = [
        step if size > 1 else ALIGNMENT for step, size in zip(x.stride(), x.shape, strict=True)
    ]
    return [*steps[:-1], 1 if x.shape[-1] == 1 else steps[-1]]
