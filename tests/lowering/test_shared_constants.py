"""Equal constants of several graphs are one tensor, but for those that belong to somebody."""

import gc
import weakref

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

from fxq.graph import RUNTIME_STATE
from fxq.lowering.shared_constants import _known, share_constants
from fxq.rewriting import register_tensor

EMPTY = GraphModule(nn.Module(), Graph())


def graph_with(**tensors: Tensor) -> GraphModule:
    gm = GraphModule(nn.Module(), Graph())
    for name, tensor in tensors.items():
        register_tensor(gm, name, tensor)
    return gm


def shared(given: GraphModule = EMPTY, **tensors: Tensor) -> GraphModule:
    gm = graph_with(**tensors)
    share_constants(gm, given)
    return gm


def codes(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)


def test_equal_tensors_become_one_and_others_stay() -> None:
    one = shared(weight=codes(0, 64, 64), scale=torch.ones(64, 64))
    other = shared(packed=codes(0, 64, 64), other=codes(1, 64, 64), scale=torch.ones(64, 64))
    assert other.packed is one.weight
    assert other.scale is one.scale
    assert torch.equal(other.other, codes(1, 64, 64))  # type: ignore[arg-type]


def test_one_element_in_thousands_tells_tensors_apart() -> None:
    one, changed = codes(2, 100, 100), codes(2, 100, 100)
    changed[50, 51] += 1
    kept = shared(weight=one)
    assert shared(weight=changed).weight is changed
    assert shared(weight=codes(2, 100, 100)).weight is kept.weight


def test_dtype_shape_and_strides_count() -> None:
    one = torch.zeros(64, 32)
    kept = shared(weight=one)
    for other in (one.int(), one.view(32, 64), one.t().contiguous().t()):
        assert shared(weight=other.clone(memory_format=torch.preserve_format)).weight is not one
    assert kept.weight is one


def test_what_the_graph_was_made_from_keeps_its_tensors() -> None:
    kept = shared(weight=codes(3, 64, 64))
    mine = codes(3, 64, 64)
    made = shared(graph_with(given=mine), weight=mine, computed=codes(3, 64, 64))
    assert made.weight is mine
    assert made.computed is kept.weight


def test_state_and_small_tensors_stay() -> None:
    kept = shared(weight=torch.zeros(64, 64), small=torch.ones(3))
    state, small = torch.zeros(64, 64), torch.ones(3)
    made = graph_with(small=small)
    register_tensor(made, f"{RUNTIME_STATE}.cache", state)
    share_constants(made, EMPTY)
    assert made.get_buffer(f"{RUNTIME_STATE}.cache") is state is not kept.weight
    assert made.small is small


def test_it_keeps_nothing_alive() -> None:
    made = shared(weight=codes(4, 64, 64))
    gone = weakref.ref(made.weight)
    del made
    gc.collect()
    assert gone() is None
    later = shared(weight=codes(5, 64, 64))
    assert all(any(r() is not None for r in found) for found in _known.values())
    assert later.weight is not None
