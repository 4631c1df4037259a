"""Generators that draw with a loop of their own: observed, compiled part by part, drawn with."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from generators import Generator, Masked, NextScale, OneByOne, Quantizing, Watching
from observed import ACTIVATION, LAYER, STATIC
from torch import Tensor, nn
from torch.fx import GraphModule

import fxq
from fxq.errors import FxqWarning
from fxq.numerics import sqnr_db
from fxq.observing import Observed
from fxq.passes.common import Calibrate, Convert, InsertObservers
from fxq.pipeline import Recipe
from fxq.rows import ByLength
from fxq.spec import LayerSpec

LABELS = torch.tensor([0, 1, 2, 3])
KINDS = (NextScale, OneByOne, Masked)


def compile_parts(model: nn.Module, seen: Observed) -> None:
    how = {"backend": "fxq", "options": {"recipe": seen.recipe}}
    for name in seen.called:
        part = model.get_submodule(name)
        # Module.compile of torch 2.11 leaves torch's own modules to Python.
        if torch.__version__.startswith("2.11.") and type(part).__module__.startswith("torch."):
            model.set_submodule(name, torch.compile(part, **how))
        else:
            part.compile(**how)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_parts_are_observed_where_a_loop_calls_them(kind: type[Generator]) -> None:
    model = kind().eval()
    with Watching() as watched:
        expected = model.draw(LABELS)

    with fxq.observe(model, STATIC) as seen:
        found = model.draw(LABELS)

    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert seen.missed == ()
    blocks = {f"blocks.{index}" for index in range(model.n_blocks)}
    assert set(seen.called) == {"head", *blocks}
    assert all(module._compiled_call_impl is None for module in model.modules())
    assert len(seen.layers) == len(watched.ranges) == 1 + 5 * model.n_blocks
    for layer in seen.layers.values():
        low, high = watched.ranges[id(model.get_parameter(f"{layer.name}.weight")), 0]
        observed = torch.stack([layer.observer.low.flatten(), layer.observer.high.flatten()])
        torch.testing.assert_close(observed, torch.tensor([[low], [high]]))


BY_LENGTH = LayerSpec(replace(ACTIVATION, rows=ByLength((1, 4))), LAYER.weight)
ROWS = Recipe("by_length", (InsertObservers(BY_LENGTH), Calibrate(), Convert()))


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "recipe"), [(NextScale, ROWS), (OneByOne, STATIC)], ids=["NextScale", "OneByOne"]
)
def test_compiled_parts_draw_what_quantized_ones_draw(
    kind: type[Generator], recipe: Recipe, every_layer_pays: None, built: list[GraphModule]
) -> None:
    """Judged by eager code whose linears are quantized by the definition; and nothing is compiled
    anew for the caches of every image."""
    model = kind().eval()
    in_float = model.draw(LABELS)
    with fxq.observe(model, recipe) as seen:
        model.draw(LABELS)
    with Watching(by_length=recipe is ROWS) as watched:
        model.draw(LABELS)
    with Quantizing(watched):
        tokens, logits = model.draw(LABELS)
        others = model.draw(LABELS.flip(0))
    assert 20 < sqnr_db(in_float[1][:, 0], logits[:, 0]) < 60

    compile_parts(model, seen)
    first, second = model.draw(LABELS), model.draw(LABELS.flip(0))
    n_builds = len(built)
    third = model.draw(LABELS)

    assert n_builds
    assert len(built) == n_builds
    for expected, found in (((tokens, logits), first), (others, second), ((tokens, logits), third)):
        assert torch.equal(expected[0], found[0])
        assert sqnr_db(expected[1], found[1]) > 45  # rounding moves codes
    assert torch.equal(third[1], first[1])


class Head(nn.Module):
    """Multiplies by a matrix that is no parameter of a linear."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 16)
        if kind == "buffer":
            self.register_buffer("weight", torch.randn(8, 16))
        else:
            self.weight = torch.randn(8, 16) if kind == "attribute" else self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["buffer", "attribute", "embedding"])
def test_matrices_are_seen_wherever_a_part_keeps_them(kind: str) -> None:
    head = Head(kind).eval()
    model = nn.ModuleDict({"head": head, "linear": nn.Linear(8, 8)})
    for observed, name in ((head, ""), (model, "head")):
        with fxq.observe(observed, STATIC) as seen:
            head(torch.randn(4, 16))
        assert seen.called == (name,)
        assert len(seen.layers) == 1


class Twice(nn.Module):
    """A layer, and one within a part, that have the same last name and equal weights."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.part = nn.Linear(16, 16), nn.Sequential()
        self.part.add_module("proj", nn.Linear(16, 16))
        self.part.load_state_dict({f"proj.{k}": v for k, v in self.proj.state_dict().items()})

    def draw(self, x: Tensor) -> Tensor:
        return self.part(self.proj(x) * 40 + 20)


@torch.no_grad()
def test_a_part_takes_no_range_of_a_layer_that_is_called_alike(every_layer_pays: None) -> None:
    model, x = Twice().eval(), torch.randn(4, 16)
    expected = model.draw(x)
    with fxq.observe(model, STATIC) as seen:
        model.draw(x)
    assert seen.called == ("proj", "part")
    compile_parts(model, seen)
    with pytest.warns(FxqWarning, match="are those of several layers: "):
        found = model.draw(x)
    assert sqnr_db(expected, found) > 30


@torch.no_grad()
def test_parts_that_several_threads_call_are_all_named() -> None:
    model = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(3)).eval()
    with fxq.observe(model, STATIC) as seen, ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda part: part(torch.randn(4, 16)), model))
    assert set(seen.called) == {"0", "1", "2"}
