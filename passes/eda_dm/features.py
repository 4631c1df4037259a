"""Features of a denoising step: what a block in the middle of the module reads.

The published tap is the input of the attention in the middle of a UNet. What that is in any module
shows a call: attention is where a softmax or a fused attention is computed; the block it is in is
the largest one that neither convolves over positions nor holds most of the module's attention; and
the middle is where positions are fewest, halfway through those in the order of execution. A module
without attention is tapped halfway through its layers with the fewest positions.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fxq.passes.common.taps import read_by
from fxq.passes.eda_dm.selection import Similarities
from fxq.passes.eda_dm.trajectories import Call, Trajectories
from fxq.signature import split_inputs

ATTENTION = {"scaled_dot_product_attention", "softmax", "_native_multi_head_attention"}


def channels_last(features: Tensor) -> Tensor:
    """Return a feature map as places by channels `[P, C]`: channels are axis 1 of `[B, C, *size]`
    with positions, and the last axis of tokens `[B, N, C]` and of vectors `[B, C]`."""
    if features.ndim > 3:
        features = features.movedim(1, -1)
    return features.flatten(0, -2)


def find_tap(module: nn.Module, call: Call) -> str:
    """Return the name of the block in the middle of a module.

    Args:
        module: in eval mode.
        call: real arguments, on its device; a row is enough.
    Raises:
        ValueError: nothing in it has features with positions.
    """
    watched = _Watched(module)
    with watched:
        _run(module, call)
    blocks = watched.attention_blocks() or watched.layers()
    if not blocks:
        raise ValueError(
            f"tap: expected a submodule that reads a feature map in {type(module).__name__}, found "
            "none; name one (tap=...)"
        )
    fewest = min(entry.positions for entry in blocks)
    narrow = [entry for entry in blocks if entry.positions == fewest]
    return narrow[(len(narrow) - 1) // 2].name


@dataclass(frozen=True)
class _Entry:
    """A submodule as a call entered it."""

    name: str
    positions: int  # of one row of its input, 0 where that is no feature map


class _Watched(TorchFunctionMode):
    """Which submodules a call enters, and in which of them attention is computed."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.hooks = module, ExitStack()
        self.stack: list[_Entry] = []
        self.entered: list[_Entry] = []
        self.attention: list[tuple[_Entry, ...]] = []  # the stack at each attention

    def __enter__(self) -> "_Watched":
        for name, each in self.module.named_modules():
            if name:
                self._watch(name, each)
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self.hooks.close()

    def _watch(self, name: str, module: nn.Module) -> None:
        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.stack.append(_Entry(name, _positions(args, kwargs)))
            self.entered.append(self.stack[-1])

        def leave(*_: object) -> None:
            self.stack.pop()

        for handle in (
            module.register_forward_pre_hook(enter, with_kwargs=True),
            module.register_forward_hook(leave, always_call=True),
        ):
            self.hooks.callback(handle.remove)

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        stack = tuple(self.stack)
        if getattr(func, "__name__", "") in ATTENTION and stack and stack not in self.attention:
            self.attention.append(stack)
        return func(*args, **(kwargs or {}))

    def attention_blocks(self) -> list[_Entry]:
        """Return the blocks with attention, in the order of execution."""
        held: dict[str, int] = {}
        for stack in self.attention:
            for name in {entry.name for entry in stack}:
                held[name] = held.get(name, 0) + 1
        most = max(2, len(self.attention) // 2)
        found: dict[_Entry, None] = {}
        for stack in self.attention:
            inner = stack[-1]
            for outer in reversed(stack[:-1]):
                same = outer.positions == inner.positions or not inner.positions
                if held[outer.name] > most or not same or self._convolves(outer.name):
                    break
                inner = outer
            if inner.positions:
                found[inner] = None
        return list(found)

    def _convolves(self, name: str) -> bool:
        kernels = (getattr(m, "kernel_size", 1) for m in self.module.get_submodule(name).modules())
        return any(max(pytree.tree_leaves(kernel)) > 1 for kernel in kernels)

    def layers(self) -> list[_Entry]:
        """Return the modules without submodules, in the order of execution."""
        leaves = {name for name, each in self.module.named_modules() if not [*each.children()]}
        return [entry for entry in self.entered if entry.name in leaves and entry.positions]


def _positions(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Return how many vectors of channels a row of a module's input has, 0 where it has no axis for
    channels or is not floating point."""
    x = _input_of(args, kwargs)
    if x is None or x.ndim < 2 or not len(x):
        return 0
    return math.prod(x.shape[2:]) if x.ndim > 3 else math.prod(x.shape[1:-1])


def _input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    tensors = (x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor))
    return next((x for x in tensors if x.is_floating_point()), None)


def _run(module: nn.Module, call: Call) -> None:
    args, kwargs = split_inputs(call)
    with torch.no_grad():
        module(*args, **kwargs)


def compare_steps(
    module: nn.Module, found: Trajectories, tap: str, rows_at_once: int
) -> Similarities:
    """Return what tells the steps apart at a tap, over all trajectories.

    Args:
        module: in eval mode.
        found: the trajectories.
        tap: the name of a submodule.
        rows_at_once: trajectories whose features are in memory, all their steps.
    Raises:
        ValueError: a call does not reach the tap, features are not finite, of another shape at some
            step, or zero everywhere.
    """
    total = Similarities(len(found.timesteps))
    for path, rows in zip(found.paths, found.rows, strict=True):
        for part in torch.arange(rows).split(rows_at_once):
            maps = [_features(module, found, call, part.tolist(), tap) for call in path]
            if len({x.shape for x in maps}) > 1:
                shapes = sorted({str([*x.shape]) for x in maps})
                raise ValueError(
                    f"tap {tap!r}: expected features of one shape at every step, found "
                    f"{', '.join(shapes)}; name another tap"
                )
            total.add(torch.stack([channels_last(x) for x in maps]))
    if not total.largest:
        raise ValueError(
            f"tap {tap!r}: expected features that say something, found zeros alone in "
            f"{len(found.timesteps)} steps; name another tap"
        )
    return total


def _features(
    module: nn.Module, found: Trajectories, call: int, rows: Sequence[int], tap: str
) -> Tensor:
    features = read_by(module, tap, found.rows_of(call, rows), _input_of)
    if features is None:
        raise ValueError(
            f"tap {tap!r}: expected that {found.named(call)} reaches it with a floating-point "
            "tensor, found that it does not; name another tap"
        )
    if not bool(features.isfinite().all()):
        raise ValueError(
            f"tap {tap!r}: expected finite features, found NaN or Inf in {found.named(call)}; run "
            "the float module in a wider dtype, or name another tap"
        )
    return features.detach().float()
