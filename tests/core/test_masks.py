"""What masks are known to hide, judged by the masks themselves."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils._python_dispatch import TorchDispatchMode

from fxq.analysis.masks import Masks
from fxq.capturing import capture
from fxq.graph import args_of

S = 6
DEPTH = 18  # a diamond more doubles the paths


class Masked(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return x[..., None].masked_fill(self.function(x > 0), 0.0)


def mask_of(function: Callable[[Tensor], Tensor]) -> Node:
    gm = capture(Masked(function).eval(), (torch.randn(2, S),)).graph_module
    (node,) = [n for n in gm.graph.nodes if "masked_fill" in str(n.target)]
    return args_of(node)[1]


class Counted(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.calls += 1
        return func(*args, **(kwargs or {}))


def causal(seen: Tensor) -> Tensor:
    return torch.ones(S, S, dtype=torch.bool).tril()


def causal_and_seen(seen: Tensor) -> Tensor:
    return seen[:, None] & causal(seen).clone()


def anti_causal(seen: Tensor) -> Tensor:
    return torch.ones(S, S, dtype=torch.bool).triu()


def causal_or_seen(seen: Tensor) -> Tensor:
    return seen[:, None] | causal(seen)


def diamonds(seen: Tensor) -> Tensor:
    mask = causal_or_seen(seen)
    for _ in range(DEPTH):
        mask = mask & mask.clone()
    return mask


@pytest.mark.parametrize(
    ("function", "expected"),
    [(causal, True), (causal_and_seen, True), (anti_causal, False), (causal_or_seen, False)],
)
def test_causal_masks_are_told(function: Callable[[Tensor], Tensor], expected: bool) -> None:
    hides = all(
        not bool((function(torch.rand(2, S) > 0.5) & torch.ones(S, S).triu(1).bool()).any())
        for _ in range(4)
    )

    assert hides is expected
    assert Masks().is_causal(mask_of(function)) is expected


def test_masks_that_share_parts_are_looked_at_once() -> None:
    mask, masks = mask_of(diamonds), Masks()

    def look(node: Node) -> bool:
        looked.append(node)
        return original(node)

    original, looked = masks._hides_what_follows, list[Node]()
    masks._hides_what_follows = look  # type: ignore[method-assign]

    assert not masks.is_causal(mask)
    assert len(looked) == DEPTH + 1


def prefix(added: int) -> Callable[[Tensor], Tensor]:
    def function(seen: Tensor) -> Tensor:
        length = seen.sum(-1, keepdim=True)
        for _ in range(added):
            length = length + length
        return torch.arange(S) < (length + 2)[:, None]

    return function


@pytest.mark.parametrize("added", [0, 1, DEPTH])
def test_a_prefix_is_bounded_whatever_the_count_is_made_of(added: int) -> None:
    mask, masks = mask_of(prefix(added)), Masks()
    original, looked = masks._bound, list[Node]()

    def look(node: Node) -> int:
        looked.append(node)
        return original(node)

    masks._bound = look  # type: ignore[method-assign]

    assert masks.shows_at_least(mask) == 2
    assert len(looked) == added + 2  # each sum once, and what is counted


def test_what_may_be_no_prefix_has_no_bound() -> None:
    assert Masks().shows_at_least(mask_of(lambda seen: seen[:, None])) is None
    assert Masks().shows_at_least(mask_of(causal)) is None


def test_a_constant_mask_is_computed_once_for_all_that_read_it() -> None:
    mask, masks = mask_of(causal), Masks()
    assert masks.is_causal(mask)

    with Counted() as counted:
        assert masks.is_causal(mask)
        assert not masks.hides_nothing(mask)
        once = counted.calls
        assert not masks.hides_nothing(mask)

    assert counted.calls - once <= 3  # clone, all and item: not ones and tril once more
