"""Names of modules: any that Python lets them have, whatever code and files can hold."""

import collections
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fxq
from fxq.account import kind_of
from fxq.capturing import capture
from fxq.graph import owner_name
from fxq.numerics import sqnr_db
from fxq.passes import w8a8
from fxq.pipeline import Recipe
from fxq.rewriting import add_buffer, insert_module

UNWRITABLE = ['a"b', "a\nb", "a\rb", "a\0b", "a\\b", "class"]  # in code that torch.fx makes


class Named(nn.Module):
    """A layer, a buffer and an activation function under one name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({name: nn.Linear(8, 8)})
        self.register_buffer(name, torch.ones(8))
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return self.inner[self.name](x) * getattr(self, self.name)


@pytest.mark.parametrize("name", UNWRITABLE)
@pytest.mark.parametrize("exported", [False, True], ids=["module", "exported"])
def test_a_name_that_cannot_be_in_code_is_another_there(name: str, exported: bool) -> None:
    model, x = Named(name).eval(), torch.randn(2, 8)
    given = torch.export.export(model, (x,)) if exported else model
    keys = [*given.state_dict] if exported else [*model.state_dict()]

    program = fxq.compress(given, x, "w8", dynamic_shapes=None if exported else "batch")

    assert sqnr_db(model(x), program(x)) > 30
    (row,) = fxq.report(program).rows
    assert row.row.module == f"inner.{name}"
    judgement = fxq.verify(program, x, model=model).against_model
    assert judgement is not None
    assert [layer.reason for layer in judgement.layers] == [""]
    assert [*(given.state_dict if exported else model.state_dict())] == keys


class Heads(nn.Module):
    """Two layers whose names code would take for one."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__()
        layers = {name: nn.Linear(512, 512) for name in (first, second)}
        self.heads = nn.ModuleDict(layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [head(x) for head in self.heads.values()]


@pytest.mark.parametrize("names", [("class", "class_"), ("a_", "a?"), ('a"', "a!")], ids=str)
@pytest.mark.parametrize("compiled", [False, True], ids=["compress", "compile"])
def test_two_names_that_code_would_take_for_one_are_two(
    names: tuple[str, str], compiled: bool
) -> None:
    model, x = Heads(*names).eval(), torch.randn(256, 512)

    if compiled:
        run = torch.compile(model, backend="fxq")
    else:
        run = program = fxq.compress(model, x, "w8")
        assert [r.row.module for r in fxq.report(program).rows] == [f"heads.{n}" for n in names]
    with torch.no_grad():
        pairs = list(zip(model(x), run(x), strict=True))

    assert all(30 < sqnr_db(exact, found) < 60 for exact, found in pairs)  # in 8 bits


@pytest.mark.parametrize("name", UNWRITABLE)
def test_what_a_pass_names_after_a_module_can_be_in_code(name: str) -> None:
    class Product(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x @ x.mT

    model = nn.Sequential(collections.OrderedDict({name: Product()})).eval()
    gm = capture(model, x := torch.ones(2, 8, 8)).graph_module
    (product,) = [node for node in gm.graph.nodes if kind_of(node) == "matmul"]

    assert owner_name(product) == name
    add_buffer(gm, f"{owner_name(product)}.scale", x, like=product)
    insert_module(gm, f"{owner_name(product)}.observer", nn.Identity(), product)
    gm.recompile()
    assert torch.equal(gm(x)[0], model(x))


@pytest.mark.parametrize("name", ["a b", "a'b", "a{b}", "1", "a-b", "a:b", "é", "Class"])
def test_any_other_name_is_captured(name: str) -> None:
    model, x = Named(name).eval(), torch.randn(2, 8)

    program = fxq.compress(model, x, "w8")

    assert sqnr_db(model(x), program(x)) > 30  # 8 bits give more


class Shared(nn.Module):
    """A layer under two names, an embedding whose weight is that of a product as well, and a layer
    that lends its weight to the module around it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.inner = nn.Sequential(self.first)
        self.attention = nn.MultiheadAttention(64, 2, batch_first=True)
        self.words = nn.Embedding(96, 64)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        x = self.inner(self.first(x).relu())
        x, _ = self.attention(x, x, x, need_weights=False)
        return F.linear(x, self.words.weight)


NAMES = ["first", "inner.0", "attention", "attention", "attention.out_proj", "linear_4"]
IDS = torch.arange(12).reshape(3, 4)


def dynamic_but(*overrides: str) -> Recipe:
    """8 bits, but layers that stay float."""
    observe, *rest = w8a8.DYNAMIC.passes
    chosen = tuple((pattern, None) for pattern in overrides)
    return Recipe("but", (replace(observe, overrides=chosen), *rest))


def names_and_formats(program: fxq.Program) -> list[tuple[str, str | None]]:
    return [(row.row.module, row.row.format) for row in fxq.report(program).rows]


@pytest.mark.parametrize("name", sorted({*NAMES}))
def test_a_name_of_the_report_overrides_that_layer_alone(name: str) -> None:
    found = names_and_formats(fxq.compress(Shared().eval(), IDS, dynamic_but(name)))

    assert [module for module, _ in found] == NAMES
    products = [(module, format) for module, format in found if module != "attention"]
    assert all((format is None) == (module == name) for module, format in products)


def test_the_name_of_what_owns_a_weight_overrides_all_that_read_it() -> None:
    found = names_and_formats(fxq.compress(Shared().eval(), IDS, dynamic_but("words")))

    softmax = "attention"  # its products are float with this recipe
    assert [module for module, format in found if format is None] == [softmax, "linear_4"]


def test_names_are_those_of_the_report_in_checks_and_in_files(tmp_path: Path) -> None:
    model = Shared().eval()
    program = fxq.compress(model, IDS, w8a8.DYNAMIC)
    fxq.save(program, tmp_path / "program.safetensors")
    loaded = fxq.load(tmp_path / "program.safetensors")

    layers = fxq.verify(program, IDS, model=model).against_model.layers
    assert [layer.module for layer in layers] == NAMES
    assert [layer.module for layer in layers if not layer.reason] == ["first", "inner.0"]
    assert [module for module, _ in names_and_formats(loaded)] == NAMES
