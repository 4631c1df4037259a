"""GPTQ and pruning on a real small language model."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from story import Story, assert_writes

from fxq.passes.common import LAST, Convert, InsertObservers
from fxq.passes.gptq import BY_ACTIVATION, W4_LAYER
from fxq.passes.pruning import Group, Magnitude, SparseGPT, Unstructured, Wanda
from fxq.passes.sparsity_induction import InduceSparsity
from fxq.spec import LayerSpec, PerGroup

# 172 columns are no multiple of 32.
DOWN = LayerSpec(None, replace(W4_LAYER.weight, granularity=PerGroup(43)))
PATTERNS = [Group(2, 4)]
OBSERVE = InsertObservers(W4_LAYER, overrides=((LAST, None), ("*down_proj", DOWN)))


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

    perplexities = [story.perplexity(program) for program in programs]

    assert perplexities[0] > 1.2 * perplexities[1] > 1.2 * 1.2 * perplexities[2]
    assert_writes(story.model, programs[2])


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_induction_halves_what_magnitude_loses(story: Story, pattern: Any) -> None:
    exact = story.perplexity(story.model)

    base = story.perplexity(story.compressed(Magnitude(pattern)))
    found = story.perplexity(story.compressed(InduceSparsity(Magnitude(pattern))))

    assert found - exact < 0.5 * (base - exact)
