"""Models captured once for all recipes and tests that only read the graph, the families first."""

import functools
import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from small_models import ZOO, seeded
from torch import nn
from torch.fx import GraphModule

import fxq
from fxq.account import unintended_skips
from fxq.capturing import Captured
from fxq.pipeline import Recipe
from fxq.program import Program
from fxq.rewriting import copy_graph


def digest(model: nn.Module) -> str:
    """Hash everything a capture could change: values, versions, flags."""
    content = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        facts = (name, tensor._version, tensor.requires_grad, tensor.data_ptr(), tensor.dtype)
        content.update(repr(facts).encode())
        content.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    content.update(repr([(n, m.training) for n, m in model.named_modules()]).encode())
    return content.hexdigest()


@dataclass(frozen=True)
class CapturedModel:
    """A model, an example, what was captured of them, and the model's digest before that.

    Many tests share them, so none may write to them.
    """

    model: nn.Module
    example: Any
    captured: Captured
    before: str

    @property
    def graph(self) -> GraphModule:
        """A graph of the caller's own."""
        return copy_graph(self.captured.graph_module)

    def compress(self, recipe: Recipe, strict: bool = False) -> Program:
        """Do what `fxq.compress` does after it has captured."""
        with torch.no_grad():
            gm = recipe.apply(self.graph)
            skips = unintended_skips(gm)
            assert not (strict and skips), skips
            return Program.from_captured(self.captured, gm, repr(recipe), self.model)


def capture_once(model: nn.Module, example: Any) -> CapturedModel:
    before = digest(model)
    return CapturedModel(model, example, fxq.capture(model, example), before)


@functools.cache
def family(name: str) -> CapturedModel:
    return capture_once(*seeded(ZOO[name]))
