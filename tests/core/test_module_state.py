"""Snapshots of what a module keeps: every change has its name, and everything is put back."""

from collections import deque
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fxq.module_state import Snapshot, restored, spared


class Cache:
    """A plain object, as transformers' caches are."""

    def __init__(self) -> None:
        self.layers: list[Tensor] = []


class Keeps(nn.Module):
    """Keeps something in every place a module can."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("count", torch.zeros(2))
        self.plain: Any = 0
        self.tensor: Any = torch.zeros(3)
        self.items: dict[str, Any] = {"a": [1, 2]}
        self.last: deque[int] = deque([0], maxlen=2)
        self.names = {"x"}
        self.cache = Cache()
        self.array = np.zeros(2)
        self.child = nn.Identity()


CHANGES = {
    "plain": lambda m: setattr(m, "plain", 1),
    "plain (type)": lambda m: setattr(m, "plain", None),
    "tensor": lambda m: m.tensor.add_(1),
    "tensor (replaced)": lambda m: setattr(m, "tensor", torch.ones(4)),
    "count": lambda m: m.count.add_(1),
    "count (replaced)": lambda m: setattr(m, "count", torch.ones(2)),
    "items.a.1": lambda m: m.items["a"].__setitem__(1, 3),
    "items.b": lambda m: m.items.update(b=1),
    "last.1": lambda m: m.last.append(1),
    "names.'y'": lambda m: m.names.add("y"),
    "cache.layers.0": lambda m: m.cache.layers.append(torch.ones(1)),
    "cache.extra": lambda m: setattr(m.cache, "extra", 1),
    "array": lambda m: m.array.fill(1),
    "child.kept": lambda m: setattr(m.child, "kept", 1),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_told_by_name_and_put_back(name: str) -> None:
    module = Keeps()
    before = Snapshot(module)

    with restored(module):
        CHANGES[name](module)
        assert before.changes(Snapshot(module)) == [name.partition(" ")[0]]

    assert before.changes(Snapshot(module)) == []
    assert module.plain == 0
    assert module.items == {"a": [1, 2]}
    assert list(module.last) == [0]
    assert module.names == {"x"}
    assert vars(module.cache) == {"layers": []}
    assert not hasattr(module.child, "kept")
    assert torch.equal(module.tensor, torch.zeros(3))
    assert torch.equal(module.count, torch.zeros(2))


def test_equal_values_are_no_change() -> None:
    module = Keeps()
    before = Snapshot(module)

    module.tensor, module.items = torch.zeros(3), {"a": [1, 2]}

    assert before.changes(Snapshot(module)) == []


def test_everything_is_put_back_where_a_call_raises() -> None:
    module = Keeps()

    def fail() -> None:
        with restored(module):
            module.plain = 5
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail()

    assert module.plain == 0


def test_tensors_nobody_changed_are_not_written_to() -> None:
    module = Keeps()

    with restored(module):
        module.plain = 5

    assert module.tensor._version == 0
    assert module.count._version == 0


def test_an_object_that_holds_itself_is_followed_once() -> None:
    module = Keeps()
    module.cache.itself = module.cache  # type: ignore[attr-defined]

    assert Snapshot(module).changes(Snapshot(module)) == []


def test_buffers_that_are_spared_are_never_written_to() -> None:
    module = Keeps()
    module.child.register_buffer("same", module.count)
    count = module.count

    with spared(module):
        module.count.add_(1)
        assert module.child.same is module.count
        module.plain = 5

    assert module.count is count
    assert module.child.same is count
    assert count._version == 0
    assert module.plain == 0


def test_buffers_that_share_memory_keep_sharing_it() -> None:
    module = Keeps()
    module.register_buffer("part", module.count[:1])
    module.seen = module.tensor

    with spared(module):
        module.count.add_(1)
        assert module.part == 1

    assert not module.count.any()
    assert not module.part.any()
