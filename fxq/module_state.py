"""What a module keeps between calls: buffers, and whatever its attributes reach.

A snapshot tells which of it a call changed, by name, and puts it back. It follows attributes of the
module and its submodules into containers and plain objects, such as a cache, but not into other
libraries' opaque ones.
"""

import contextlib
import operator
from collections import Counter, deque
from collections.abc import Iterator, Mapping, MutableMapping, MutableSequence
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from fxq.identity import TensorKey

_OWN = frozenset(vars(nn.Module()))  # of every module, the dictionaries of its parts among them
_OPAQUE = (nn.Module, nn.Parameter, type, FunctionType, MethodType, ModuleType)
_MAX_DEPTH = 32


class Snapshot:
    """What a module keeps, at one moment.

    Args:
        module: parameters are not looked at: a forward that writes to them is refused elsewhere.
    """

    def __init__(self, module: nn.Module) -> None:
        self.leaves: dict[str, Any] = {}
        self._contents: list[tuple[Any, Any]] = []  # (container, a shallow copy of what it holds)
        self._tensors: list[tuple[Tensor, Tensor]] = []
        self._seen: set[int] = set()
        for prefix, part in module.named_modules():
            own = {k: v for k, v in vars(part).items() if k not in _OWN}
            self._contents.append((vars(part), own))
            for store in (own, part._buffers):
                self._walk(prefix, store, 0)

    def _walk(self, path: str, value: Any, depth: int) -> None:
        if isinstance(value, Tensor):
            if not isinstance(value, nn.Parameter):
                copy = value.detach().clone()
                self._tensors.append((value, copy))
                self.leaves[path] = copy
            return
        if isinstance(value, np.ndarray):
            self.leaves[path] = value.copy()
            self._contents.append((value, self.leaves[path]))
            return
        items = None if isinstance(value, _OPAQUE) or depth > _MAX_DEPTH else _items(value)
        if items is None:
            self.leaves[path] = value
        elif id(value) not in self._seen:
            self._seen.add(id(value))
            self._contents.append((value, _shallow(value)))
            for key, item in items:
                self._walk(f"{path}.{key}".lstrip("."), item, depth + 1)

    def changes(self, later: "Snapshot") -> list[str]:
        """Return the names of what is another value in `later`, or is there in one only."""
        names = {**self.leaves, **later.leaves}
        return [
            name
            for name in names
            if name not in self.leaves
            or name not in later.leaves
            or not _equal(self.leaves[name], later.leaves[name])
        ]

    def shared_memory(self) -> set[StorageWeakRef]:
        """Return the memory that several tensors, seen by the snapshot, reach."""
        tensors = {id(tensor): tensor for tensor, _ in self._tensors}.values()
        counts = Counter(TensorKey.of(tensor).storage for tensor in tensors)
        return {storage for storage, count in counts.items() if count > 1}

    def restore(self) -> None:
        """Put everything back as it was."""
        for container, content in self._contents:
            _refill(container, content)
        for tensor, value in self._tensors:
            if not _equal(tensor, value):
                with torch.inference_mode(tensor.is_inference()), torch.no_grad():
                    tensor.copy_(value)


@contextlib.contextmanager
def restored(module: nn.Module) -> Iterator[Snapshot]:
    """Put back afterwards what `module` keeps, whatever calls of it change meanwhile."""
    snapshot = Snapshot(module)
    try:
        yield snapshot
    finally:
        snapshot.restore()


@contextlib.contextmanager
def spared(module: nn.Module) -> Iterator[Snapshot]:
    """Let calls write to copies of the buffers of `module`, so that what was derived of them stays
    valid, and put everything else that they change back afterwards, as what is reached through
    several tensors."""
    with restored(module) as snapshot:
        copies: dict[Tensor, Tensor] = {}
        shared = snapshot.shared_memory()
        for part in module.modules():
            for name, buffer in part._buffers.items():
                if buffer is not None and TensorKey.of(buffer).storage not in shared:
                    part._buffers[name] = copies.setdefault(buffer, buffer.detach().clone())
        yield snapshot


def _items(value: Any) -> list[tuple[str, Any]] | None:
    """Return what a container or plain object holds, None for any other value."""
    if isinstance(value, Mapping):
        return [(str(key), item) for key, item in value.items()]
    if isinstance(value, list | tuple | deque):
        return [(str(index), item) for index, item in enumerate(value)]
    if isinstance(value, set):
        return [(repr(item), item) for item in value]
    held = getattr(value, "__dict__", None)
    return [(str(key), item) for key, item in held.items()] if type(held) is dict else None


def _shallow(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, list | tuple | deque | set):
        return list(value)
    return dict(vars(value))


def _refill(container: Any, content: Any) -> None:
    """Make a container hold `content` again. Attributes of `nn.Module` itself stay."""
    if isinstance(container, np.ndarray):
        np.copyto(container, content)
    elif isinstance(container, MutableMapping):
        for key in [k for k in container if k not in content and k not in _OWN]:
            del container[key]
        if any(key not in container or container[key] is not content[key] for key in content):
            container.update(content)
    elif isinstance(container, MutableSequence):
        if len(container) != len(content) or any(map(operator.is_not, container, content)):
            container.clear()
            container.extend(content)
    elif isinstance(container, set):
        container.clear()
        container.update(content)
    elif isinstance(content, dict):
        _refill(vars(container), content)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return bool(np.array_equal(a, b))
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        same = a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
        return same and bool(torch.allclose(a, b, rtol=0, atol=0, equal_nan=True))
    if a is b:
        return True
    plain = (bool, int, float, complex, str, bytes, torch.dtype, torch.device)
    return isinstance(a, plain) and type(a) is type(b) and a == b
