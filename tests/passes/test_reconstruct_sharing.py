"""Reconstruct where blocks share weights, scales or views, and where values are not plain: what
runs later changes nothing that ran before."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from models import Block
from reconstruction_cases import FAST, W3A6, batches, compressed, results_of_the_last_block
from test_blocks import Transformer
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

import fxq
from fxq.dialect import OBSERVED, Dialect
from fxq.errors import UnsupportedError
from fxq.graph import weight_of
from fxq.layer import layer_of, treat
from fxq.passes.common import Calibrate, Convert, InsertObservers
from fxq.passes.common.reconstruction import (
    Rounding,
    StraightThrough,
    training,
)
from fxq.passes.common.reconstruction import frontier as frontier_module
from fxq.passes.common.reconstruction.losses import relative_error
from fxq.pipeline import Pass, Recipe


def test_infinities_of_a_mask_are_no_errors() -> None:
    exact, found = torch.randn(3, 4), torch.randn(3, 4)
    mask = torch.ones(3, 4).triu(1).bool()
    apart, together = (x.masked_fill(mask, float("-inf")) for x in (exact, found))

    value = relative_error(together, apart)

    inside = ~mask
    expected = (found - exact)[inside].square().sum() / exact[inside].square().sum()
    torch.testing.assert_close(value, expected)
    assert not relative_error(found, apart).isfinite()
    assert relative_error(together, exact.masked_fill(mask, float("nan"))).isnan()


@pytest.mark.parametrize("place", ["device", "cpu", "disk"])
def test_values_of_several_tensors_are_kept_as_they_are(place: Any) -> None:
    shelf = frontier_module._Shelf(place)
    value = (torch.arange(4.0), [torch.arange(3), 5])

    floats, (numbers, size) = shelf.get(shelf.put(value))

    assert torch.equal(floats, value[0])
    assert torch.equal(numbers, value[1][0])
    assert size == 5


def test_a_module_that_is_called_twice_keeps_one_set_of_codes() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x).relu())

    program, _ = compressed(Twice, FAST)
    buffers = [n for n, _ in program.graph_module.named_buffers() if "weight_codes" in n]
    assert len(buffers) == 1
    nearest, _ = compressed(Twice)
    (x,) = batches(Twice, 1, 3)[0]
    assert not torch.equal(program(x), nearest(x))


def test_what_a_block_runs_with_no_later_block_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module is called twice with another between; its first block stays as calibrated."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.one, self.two = Block(16), Block(16)

        def forward(self, x: Tensor) -> Tensor:
            return self.one(self.two(self.one(x)))

    train, trained = training.BlockTraining.train, list[str]()

    def first_fails(self: Any, *args: Any) -> training.Outcome:
        trained.append(self.block.name)
        outcome = train(self, *args)
        if len(trained) > 1:
            return outcome
        return training.Outcome(None, outcome.before, outcome.before)

    monkeypatch.setattr(training.BlockTraining, "train", first_fails)
    last = results_of_the_last_block(monkeypatch, "one")
    method = StraightThrough(learning_rate=3e-2)
    program, _ = compressed(Shared, replace(FAST, steps=8, method=method))

    assert trained == ["one", "two", "one"]
    for x, expected in zip(batches(Shared, 5, 0), last, strict=True):
        assert torch.equal(program(*x), expected)


def test_pruned_weights_stay_zero() -> None:
    mask = torch.arange(32) % 2 == 0

    @dataclass(frozen=True)
    class Prune(Pass):
        reads: ClassVar[Dialect] = OBSERVED
        writes: ClassVar[Dialect] = OBSERVED

        def run(self, gm: GraphModule) -> PassResult:
            layers = [n for n in gm.graph.nodes if layer_of(n).is_pending and n.name != "linear"]
            for node in layers:
                weight = weight_of(node)
                pruned = mask[torch.arange(weight.shape[1]) % 32].expand(weight.shape)
                weight.mul_(pruned)
                treat(node, "Prune", "pruned", mask=pruned.clone())
            return PassResult(gm, modified=True)

    learn = replace(FAST, method=StraightThrough(learning_rate=5e-2))
    program, _ = compressed(Transformer, Prune(), learn)

    buffers = dict(program.graph_module.named_buffers())
    codes = [value for name, value in buffers.items() if name.endswith(("up.weight_codes",))]
    assert len(codes) == 2
    assert all(not bool(value[:, 1::2].any()) and bool(value[:, ::2].any()) for value in codes)


def test_a_view_of_a_weight_that_two_blocks_read_is_in_both() -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.weight = nn.Parameter(torch.randn(16, 16) / 4)

        def forward(self, x: Tensor) -> Tensor:
            turned = self.weight.t()
            x = x + nn.functional.linear(x, turned)
            return x + nn.functional.linear(x.relu(), turned)

    program, _ = compressed(Turned, FAST)
    buffers = [n for n, _ in program.graph_module.named_buffers() if "weight_codes" in n]
    assert len(buffers) == 1


def test_half_precision_is_refused() -> None:
    model = Transformer().to(torch.bfloat16).eval()
    data = [tuple(x.bfloat16() for x in batch) for batch in batches(Transformer, 2, 0)]
    recipe = Recipe("r", (InsertObservers(W3A6), Calibrate(), FAST, Convert()))
    with pytest.raises(
        UnsupportedError, match=r"float32 to learn in, found torch.bfloat16 at stem"
    ):
        fxq.compress(model, data[0], recipe, data)


def test_no_roundings_to_learn_leaves_the_weights_at_the_nearest() -> None:
    scales_alone = replace(
        FAST, method=Rounding(learning_rate=0.0, activation_learning_rate=0.05, float_share=0.5)
    )
    program, _ = compressed(Transformer, scales_alone)
    nearest, _ = compressed(Transformer)
    found, plain = (dict(p.graph_module.named_buffers()) for p in (program, nearest))
    moved = [name for name in plain if not torch.equal(plain[name], found[name])]
    assert moved
    assert all("input" in name for name in moved)
