"""The README's walkthrough works as it is printed."""

import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from small_models import ZOO, seeded
from torch import nn

import fxq
from fxq.passes import w8a8
from fxq.pipeline import Recipe

README = (Path(__file__).parents[2] / "README.md").read_text()


def block(containing: str) -> str:
    (found,) = [b for b in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if containing in b]
    return found


def test_the_pass_of_the_readme_runs_in_front_of_a_recipe() -> None:
    module = ModuleType("readme_pass")
    sys.modules["readme_pass"] = module  # dataclasses look their module up
    exec(block("class ReluToIdentity"), module.__dict__)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU()).eval(), torch.randn(4, 8)

    recipe = Recipe("mine", (module.ReluToIdentity(), *w8a8.DYNAMIC.passes))
    program = fxq.compress(model, x, recipe)

    assert bool((program(x) < 0).any())


def test_the_recipe_variant_of_the_readme_keeps_its_layers_float() -> None:
    scope: dict[str, object] = {"w8a8": w8a8}
    exec(block("overrides=((FIRST"), scope)
    model = nn.Sequential()
    model.add_module("stem", nn.Linear(8, 8))
    model.add_module("body", nn.Linear(8, 8))
    model.add_module("head", nn.Linear(8, 8))
    x = torch.randn(4, 8)

    program = fxq.compress(model.eval(), x, scope["mine"], [x])  # type: ignore[arg-type]

    rows = {r.row.module: r.row.format for r in fxq.report(program).rows}
    assert rows == {"stem": None, "body": "int8 x int8", "head": None}


def test_the_scaling_method_of_the_readme_runs() -> None:
    module = ModuleType("readme_method")
    sys.modules["readme_method"] = module
    exec(block("class Halve"), module.__dict__)
    model, x = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)).eval(), torch.randn(64, 8)

    program = fxq.compress(model, x, module.HALVED, [x])

    (row,) = fxq.report(program).rows
    assert "Halve" in row.reason


def test_the_sites_of_the_readme_are_found() -> None:
    model, example = seeded(ZOO["llama"])
    scope: dict[str, object] = {"fxq": fxq, "model": model, "example_inputs": example}

    exec(block("scale_sites(fxq.capture"), scope)

    printed = re.search(r"Llama: (\{.*?\})", README)
    assert printed is not None
    assert eval(printed[1]) == scope["found"].count()  # type: ignore[attr-defined]


def test_the_sparse_attention_of_the_readme_is_accepted() -> None:
    model, _ = seeded(ZOO["wan"])
    scope: dict[str, Any] = {"torch": torch, "pipe": SimpleNamespace(transformer=model)}

    exec(block("ReplaceAttention(density=(0.2, 1.0)"), scope)

    assert scope["sparse"].densities == (0.2, 1.0)
    assert callable(scope["pipe"].transformer)
