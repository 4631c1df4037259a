"""ReplaceAttention: what it replaces, what it leaves and why, and that dense stays exact."""

from collections import Counter
from dataclasses import replace
from typing import Any

import families
import pytest
import torch
import torch.nn.functional as F
from small_models import ZOO, seeded
from sparse_models import (
    DENSE,
    SMALL,
    JointAttention,
    Mask,
    below_length,
    beside_ones,
    compress,
    compress_each,
    for_pairs,
    for_repeated_pairs,
    in_any_order,
    joint_inputs,
    not_above_length,
    padded_on,
    per_query,
    reasons,
    sparse_nodes,
)
from torch import nn
from torch.utils._pytree import tree_leaves

import fxq
from fxq.account import unintended_skips
from fxq.graph import args_of
from fxq.passes import w8a8
from fxq.passes.rectified_spaattn import TokenLayout
from fxq.pipeline import Recipe
from fxq.program import Program


def compress_family(family: str, *passes: Any) -> tuple[Program, nn.Module, Any]:
    found = families.family(family)
    return found.compress(Recipe("test", passes)), found.model, found.example


# Family -> attention replaced, text (start, size), grid known.
FAMILIES = {
    "wan": (1, (32, 0), True),
    "hunyuan_video": (2, (32, 5), True),
    "flux": (2, (0, 5), False),
    "cogvideox": (1, (0, 5), True),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_have_their_joint_attention_replaced(family: str) -> None:
    count, text, has_grid = FAMILIES[family]

    program, *_ = compress_family(family, SMALL)

    assert not unintended_skips(program.graph_module)

    nodes = sparse_nodes(program.graph_module)
    assert len(nodes) == count
    for node in nodes:
        _, _, _, _, text_len, order, adjacency, start, size, *_ = args_of(node)
        assert (start, size) == text
        assert (text_len is not None) == (family == "hunyuan_video")
        assert (order is not None) == (adjacency is not None) == has_grid
    kept = [n for n in program.graph_module.graph.nodes if "scaled_dot_product" in str(n.target)]
    assert len(kept) == len(reasons(program))


@pytest.mark.parametrize("family", FAMILIES)
def test_families_at_density_one_are_as_before(family: str) -> None:
    program, model, example = compress_family(family, DENSE)

    with torch.no_grad():
        expected, found = (tree_leaves(f(**example))[0] for f in (model, program))
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)


def test_the_report_says_what_was_replaced_and_what_not() -> None:
    program, *_ = compress_family("hunyuan_video", SMALL)

    rows = [r for r in fxq.report(program).rows if r.row.kind == "attention"]
    sparse = [r for r in rows if r.row.skip is None]
    assert {r.row.format for r in sparse} == {"sparse >=30%, paper"}
    assert all("5 text tokens last (encoder_hidden_states)" in r.reason for r in sparse)
    assert all("padding counted" in r.reason and "grid 2x4x4" in r.reason for r in sparse)
    assert list(reasons(program).values()) == ["5 tokens: dense is faster below 8"]
    others = {r.reason for r in fxq.report(program).rows if r.row.kind == "linear"}
    assert others == {"this recipe replaces attention only"}


def test_it_composes_with_quantized_linears() -> None:
    program, _, example = compress_family("flux", *w8a8.DYNAMIC.passes, SMALL)

    assert not unintended_skips(program.graph_module)
    formats = Counter(r.row.format for r in fxq.report(program).rows)
    assert formats["sparse >=30%, paper"] == 2
    assert formats["int8 x int8"] > 10
    assert all(size == 5 for size in (args_of(n)[8] for n in sparse_nodes(program.graph_module)))
    assert program(**example).sample.isfinite().all()


@pytest.mark.parametrize("text", ["first", "last", "none"])
def test_text_is_told_from_visual_tokens(text: Any) -> None:
    model, example = JointAttention(text), joint_inputs()

    program = compress(model, example, SMALL, strict=True)

    (node,) = sparse_nodes(program.graph_module)
    size = 0 if text == "none" else 7
    assert args_of(node)[7:9] == (0 if text == "first" else 72, size)
    order = program.graph_module.get_buffer("curve_order")
    assert torch.equal(order.sort().values, torch.arange(72))


@pytest.mark.parametrize("mask", [below_length, not_above_length])
def test_padded_text_is_counted_and_has_no_influence(mask: Mask) -> None:
    model, example = JointAttention("last", mask), joint_inputs(lengths=(7, 3))

    program, dense = compress_each(model, example, SMALL, DENSE)

    (node,) = sparse_nodes(program.graph_module)
    assert args_of(node)[4] is not None
    with torch.no_grad():
        torch.testing.assert_close(dense(**example), model(**example), atol=1e-6, rtol=1e-5)
        before = program(**example)
        example["text"][1, 3:] += 1e3
        torch.testing.assert_close(program(**example), before, atol=1e-5, rtol=1e-5)


EVERYWHERE = (
    beside_ones, in_any_order, padded_on, for_pairs, for_repeated_pairs, per_query,
)  # fmt: skip


@pytest.mark.parametrize("mask", EVERYWHERE)
def test_masks_that_show_all_visual_tokens_are_padding_wherever_text_is_valid(mask: Mask) -> None:
    model, example = JointAttention("last", mask), joint_inputs(lengths=(5, 0))

    program, dense = compress_each(model, example, SMALL, DENSE)

    assert len(sparse_nodes(program.graph_module)) == 1
    with torch.no_grad():
        torch.testing.assert_close(dense(**example), model(**example), atol=1e-6, rtol=1e-5)
        before = program(**example)
        hidden = ~example["valid"] if mask in (beside_ones, per_query) else None
        hidden = ~example["valid"].roll(2, 1) if hidden is None else hidden
        example["text"][hidden] += 1e3
        torch.testing.assert_close(program(**example), before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mask", [for_pairs, for_repeated_pairs])
def test_queries_of_padding_see_nothing_as_in_torchs_attention(mask: Mask) -> None:
    class WithText(JointAttention):
        """Returns all of the sequence."""

        def forward(self, video: Any, text: Any, valid: Any) -> Any:
            rows = torch.cat([video, text], 1)
            q = self.q(rows)[:, None]
            h = F.scaled_dot_product_attention(q, q, q, mask(valid, video.shape[1]))
            return h[:, 0]

    model = WithText("last", head_dim=8).eval()
    example = {
        "video": torch.randn(2, 24, 16), "text": torch.randn(2, 7, 16),
        "valid": torch.arange(7)[None] < torch.tensor([[5], [0]]),
    }  # fmt: skip

    program = compress(model, example, replace(DENSE, layout=TokenLayout("last", 7)), strict=True)

    assert len(sparse_nodes(program.graph_module)) == 1
    with torch.no_grad():
        expected = model(**example)
        assert not expected[1, 24:].any()
        torch.testing.assert_close(program(**example), expected, atol=1e-6, rtol=1e-5)


SLOWLY = [pytest.param(dtype, marks=pytest.mark.slow) for dtype in (torch.float32, torch.int64)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, *SLOWLY], ids=str)
def test_a_mask_of_zeros_and_ones_may_have_any_dtype(dtype: torch.dtype) -> None:
    """diffusers' HunyuanVideo pipeline casts it to the transformer's dtype."""
    model, example = seeded(ZOO["hunyuan_video"])
    assert isinstance(example, dict)
    example["encoder_attention_mask"] = example["encoder_attention_mask"].to(dtype)

    program = compress(model, example, DENSE, strict=True)

    assert len(sparse_nodes(program.graph_module)) == FAMILIES["hunyuan_video"][0]
    with torch.no_grad():
        found, expected = (tree_leaves(m(**example))[0] for m in (program, model))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mask", [below_length, beside_ones])
@pytest.mark.parametrize("lengths", [(0, 0), (7, 0), (1, 7)])
def test_empty_and_full_text_never_give_nan(mask: Mask, lengths: tuple[int, int]) -> None:
    model, example = JointAttention("last", mask), joint_inputs(lengths=lengths)
    attention = replace(SMALL, layout=TokenLayout(prefix_masks=True))

    variants = attention, replace(attention, mode="online"), replace(attention, density=1.0)
    before = {name: value.clone() for name, value in example.items()}
    for program in compress_each(model, example, *variants):
        result = program(**example)

        assert result.isfinite().all()
        assert all(torch.equal(example[name], before[name]) for name in before)
    with torch.no_grad():
        torch.testing.assert_close(result, model(**example), atol=1e-6, rtol=1e-5)


def test_grouped_heads_and_a_given_layout() -> None:
    model, example = JointAttention("first", heads=(4, 2)), joint_inputs()
    layout = TokenLayout("first", 7, (3, 4, 6))

    program = compress(model, example, replace(DENSE, layout=layout), strict=True)

    (node,) = sparse_nodes(program.graph_module)
    assert args_of(node)[7:9] == (0, 7)
    with torch.no_grad():
        torch.testing.assert_close(program(**example), model(**example), atol=1e-6, rtol=1e-5)


def test_overrides_choose_layers_and_the_first_match_wins() -> None:
    overrides = (("transformer_blocks.*", None), ("*transformer_blocks.*", 0.6))

    program, *_ = compress_family("hunyuan_video", replace(SMALL, overrides=overrides))

    assert reasons(program)["transformer_blocks.0.attn"] == "override 'transformer_blocks.*'"
    assert len(sparse_nodes(program.graph_module)) == 1
    table = program.graph_module.get_buffer("runtime_state.densities")
    torch.testing.assert_close(table, torch.tensor([[0.6]]))
    with pytest.raises(ValueError, match=r"override 'bloks\.0' matches no attention"):
        compress_family("hunyuan_video", replace(SMALL, overrides=(("bloks.0", None),)))


def test_modes_differ_and_online_is_closest_to_dense() -> None:
    torch.manual_seed(0)
    model, example = JointAttention("none", head_dim=64), joint_inputs()
    attention = replace(SMALL, keep_neighbours=False, top_p=0.0)
    with torch.no_grad():
        expected = model.eval()(**example)

    modes = ("sparse", "paper", "online")
    variants = (replace(attention, mode=mode) for mode in modes)
    errors = {
        mode: float((program(**example) - expected).norm() / expected.norm())
        for mode, program in zip(modes, compress_each(model, example, *variants), strict=True)
    }

    assert errors["online"] < 0.5 * errors["sparse"]
    assert errors["paper"] != errors["sparse"]


def test_a_program_survives_saving(tmp_path: Any) -> None:
    program, _, example = compress_family("hunyuan_video", SMALL)

    fxq.save(program, tmp_path / "sparse.safetensors")
    loaded = fxq.load(tmp_path / "sparse.safetensors")

    assert torch.equal(loaded(**example).sample, program(**example).sample)
    assert fxq.report(loaded).rows[0].row.kind == fxq.report(program).rows[0].row.kind


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"density": 0.0}, "density: expected positive shares"),
        ({"density": "0.2"}, "density: expected positive shares"),
        ({"density": None}, "density: expected positive shares"),
        ({"density": float("nan")}, "density: expected positive shares"),
        ({"top_p": 1.5}, "top_p: expected 0 to 1, found 1.5"),
        ({"block_size": 0}, "block_size and min_tokens of at least 1"),
        ({"mode": "fast"}, "mode: expected one of"),
        ({"overrides": (("a", 0.0),)}, "positive density or None for 'a'"),
    ],
)
def test_bad_settings_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)


@pytest.mark.parametrize(
    "fields", [{"text_size": 5}, {"text": "middle"}, {"grid": (0, 2, 2)}, {"text_size": -1}]
)
def test_a_bad_layout_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="TokenLayout"):
        TokenLayout(**fields)
