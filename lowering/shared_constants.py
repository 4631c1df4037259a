"""One tensor for equal constants, however many graphs hold them.

A model that runs as several graphs (prefill and decode, one for each length, one for each scale of
an image) has its weights quantized and packed for each of them. Without this, every graph would
cost the memory of the whole quantized model again.
"""

import weakref
from collections import defaultdict

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxq.graph import RUNTIME_STATE
from fxq.identity import TensorKey
from fxq.rewriting import register_tensor

SMALL = 1024  # elements; not worth a search

# One for the process, as graphs are compiled at any time, by whatever calls them. It keeps nothing
# alive; 0.0 and -0.0 count as equal, in constants that are multiplied and added.
_known: dict[object, list[weakref.ref[Tensor]]] = defaultdict(list)


def share_constants(gm: GraphModule, given: GraphModule) -> None:
    """Replace what a step of compiling has computed by equal tensors that another graph holds.

    Args:
        gm: a graph, which is changed.
        given: what it was made from. Its tensors are left alone: somebody may write to them.
    """
    for key in [k for k, refs in _known.items() if all(ref() is None for ref in refs)]:
        del _known[key]
    own = {TensorKey.of(tensor) for tensor in given.buffers()}
    for name, tensor in list(gm.named_buffers(remove_duplicate=False)):
        if tensor.numel() < SMALL or RUNTIME_STATE in name.split("."):
            continue
        if TensorKey.of(tensor) not in own:
            register_tensor(gm, name, _shared(tensor))


def _shared(tensor: Tensor) -> Tensor:
    """Return the first tensor of these values that is still in use: it may be `tensor`."""
    sample = tuple(tensor.flatten()[:: tensor.numel() // 16].tolist())
    found = _known[tensor.shape, tensor.stride(), tensor.dtype, tensor.device, sample]
    alive = [known for reference in found if (known := reference()) is not None]
    for known in alive:
        if torch.equal(known, tensor):
            return known
    found[:] = map(weakref.ref, [*alive, tensor])
    return tensor
