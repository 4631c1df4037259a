"""GPTQ and pruning on a real small language model."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from story import Story, assert_writes

import fxq
from fxq.graph import is_op
from fxq.layer import layer_of
from fxq.passes.common import LAST, Convert, InsertObservers
from fxq.passes.gptq import TO_FLOAT, W4_LAYER
from fxq.passes.pruning import SPARSEGPT_2_4_W8A8, Group, Magnitude, SparseGPT, Unstructured, Wanda
from fxq.passes.sparsity_induction import InduceSparsity
from fxq.spec import LayerSpec, PerGroup

LINEAR = torch.ops.aten.linear.default
# 172 columns are no multiple of 32.
DOWN = LayerSpec(None, replace(W4_LAYER.weight, granularity=PerGroup(43)))
PATTERNS = [Group(2, 4)]
OBSERVE = InsertObservers(W4_LAYER, overrides=((LAST, None), ("*down_proj", DOWN)))


@pytest.mark.slow
def test_gptq_loses_less_than_rounding(story: Story) -> None:
    exact = story.loss(story.model)

    rounded = story.loss(story.compressed(OBSERVE, Convert())) - exact
    program = story.compressed(OBSERVE, TO_FLOAT, Convert())
    found = story.loss(program) - exact

    assert found < 0.5 * rounded  # 0.43 to 0.45 on three draws of 128 of these stories
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


def test_a_pruned_and_quantized_language_model_writes_in_generate() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    data = [{"input_ids": torch.randint(512, (2, 16)), "use_cache": False} for _ in range(2)]

    program = fxq.compress(
        model, data[0], SPARSEGPT_2_4_W8A8, data,
        dynamic_shapes={"input_ids": {0: "batch", 1: "tokens"}},
    )  # fmt: skip

    linears = [n for n in program.graph_module.graph.nodes if is_op(n, LINEAR)]
    assert [layer_of(n).sparsity for n in linears] == [0.5] * 7 + [None]  # the output layer
    assert {layer_of(n).format for n in linears[:7]} == {"int8 x int8"}
    assert_writes(model, program)
