"""Weight methods on a real small language model: perplexity, and text that it still writes."""

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxq
from fxq.passes.common import LAST, Convert, InsertObservers
from fxq.passes.gptq import BY_ACTIVATION, W4_LAYER
from fxq.passes.pruning import Group, Magnitude, SparseGPT, Unstructured, Wanda
from fxq.pipeline import Recipe
from fxq.spec import LayerSpec, PerGroup

TOKENS = 128
# 172 columns are no multiple of 32.
DOWN = LayerSpec(None, replace(W4_LAYER.weight, granularity=PerGroup(43)))
OBSERVE = InsertObservers(W4_LAYER, overrides=((LAST, None), ("*down_proj", DOWN)))


class Story:
    """The story model, batches to calibrate with, and its perplexity on other stories."""

    def __init__(self, folder: Path) -> None:
        sys.path.insert(0, str(folder))
        import zoo

        tokenizer = zoo.StoriesTokenizer()
        encoded = [tokenizer.encode(story[:800]) for story in zoo.tinystories()]
        rows = torch.tensor([ids[:TOKENS] for ids in encoded if len(ids) >= TOKENS])
        self.model = zoo.stories260k()
        self.data = [{"input_ids": part, "use_cache": False} for part in rows[:240].split(8)]
        self.held_out = rows[-96:]

    @torch.no_grad()
    def loss(self, model: nn.Module) -> float:
        losses = []
        for ids in self.held_out.split(32):
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
            losses.append(nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))
        return float(torch.stack(losses).mean())

    def compressed(self, *passes: Any) -> fxq.Program:
        return fxq.compress(
            self.model,
            self.data[0],
            Recipe("story", passes),
            self.data,
            dynamic_shapes={"input_ids": {0: "batch", 1: "tokens"}},
        )


@pytest.fixture(scope="module")
def stories() -> dict[Path, Story]:
    return {}


@pytest.fixture
def story(shared_data: Path, stories: dict[Path, Story]) -> Story:
    if shared_data not in stories:
        stories[shared_data] = Story(shared_data)
    return stories[shared_data]


@pytest.mark.slow
def test_gptq_loses_less_than_rounding(story: Story) -> None:
    exact = story.loss(story.model)

    rounded = story.loss(story.compressed(OBSERVE, Convert())) - exact
    program = story.compressed(OBSERVE, BY_ACTIVATION, Convert())
    found = story.loss(program) - exact

    assert found < 0.6 * rounded  # 0.53 measured
    assert_writes(story.model, program)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [Unstructured(0.5), Group(2, 4)], ids=str)
def test_better_pruners_lose_less(story: Story, pattern: Any) -> None:
    programs = [story.compressed(kind(pattern)) for kind in (Magnitude, Wanda, SparseGPT)]

    perplexities = [math.exp(story.loss(program)) for program in programs]

    assert perplexities[0] > 1.2 * perplexities[1] > 1.2 * 1.2 * perplexities[2]
    assert_writes(story.model, programs[2])


def assert_writes(model: Any, program: fxq.Program) -> None:
    """Check that transformers' `generate` writes with a program what greedy search over its logits
    does."""
    forward, prompt = model.forward, torch.tensor([[1, 403, 407, 261]])

    def run(input_ids: Tensor, **_: Any) -> Any:
        return program(input_ids=input_ids, use_cache=False)

    expected = prompt
    for _ in range(12):
        best = program(input_ids=expected, use_cache=False).logits[:, -1].argmax(-1)
        expected = torch.cat([expected, best[:, None]], 1)
    model.forward = run
    try:
        written = model.generate(prompt, max_new_tokens=12, do_sample=False, use_cache=False)
    finally:
        model.forward = forward
    assert torch.equal(written, expected[:, : written.shape[1]])
    assert written.shape[1] > prompt.shape[1] + 4
