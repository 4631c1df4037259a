"""What ReplaceAttention leaves dense and why, and what it must not mistake for a reason."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from sparse_models import (
    DENSE,
    SMALL,
    JointAttention,
    Mask,
    additive,
    all_kept,
    below_length,
    bias_of_ones,
    bias_of_zeros,
    compress,
    constant_bias,
    for_other_pairs,
    inverted_bits,
    joint_inputs,
    of_one_sample,
    reasons,
    rounded,
    sparse_nodes,
    too_short_a_length,
)
from torch import Tensor, nn

import fxq
from fxq.errors import SkippedError
from fxq.graph import args_of
from fxq.passes.rectified_spaattn import TokenLayout

pytestmark = pytest.mark.filterwarnings("ignore:recipe .* changed nothing")


@pytest.mark.parametrize(
    ("mask", "text", "reason"),
    [
        (too_short_a_length, "last", "cannot be proved to keep all visual tokens"),
        (rounded, "last", "cannot be proved to keep all visual tokens"),
        (inverted_bits, "last", "cannot be proved to keep all visual tokens"),
        (below_length, "first", "cannot be proved to keep all visual tokens"),
        (additive, "last", "not key padding: expected bool"),
        (for_other_pairs, "last", "not key padding: expected bool"),
        (of_one_sample, "last", "not key padding: expected bool"),
        (constant_bias, "last", "not key padding: expected bool"),
        (bias_of_ones, "last", "not key padding: expected bool"),
    ],
)
def test_masks_that_are_not_key_padding_stay_dense(mask: Mask, text: Any, reason: str) -> None:
    model, example = JointAttention(text, mask), joint_inputs()

    program = compress(model, example, SMALL)

    (found,) = reasons(program).values()
    assert reason in found
    with torch.no_grad():
        assert torch.equal(program(**example), model(**example))
    with pytest.raises(SkippedError, match="mask"):
        compress(model, example, SMALL, strict=True)


@pytest.mark.parametrize("mask", [all_kept, bias_of_zeros])
def test_constant_masks_without_effect_are_no_masks(mask: Mask) -> None:
    program = compress(JointAttention("last", mask), joint_inputs(), SMALL, strict=True)

    (node,) = sparse_nodes(program.graph_module)
    assert args_of(node)[4] is None


@pytest.mark.parametrize(
    ("model", "change", "reason"),
    [
        (JointAttention(is_causal=True), {}, "causal attention"),
        (JointAttention(dropout=0.5), {}, "dropout"),
        (JointAttention(head_dim=12), {}, "head sizes (12, 12): expected multiples of 8"),
        (JointAttention(), {"min_tokens": 80}, "79 tokens: dense is faster below 80"),
        (JointAttention(), {"layout": TokenLayout(grid=(2, 4, 6))}, "the given grid (2, 4, 6) has"),
        (JointAttention(), {"layout": TokenLayout("last", 5, (3, 4, 6))}, "the given layout has 5"),
    ],
)
def test_what_stays_dense_says_why(model: nn.Module, change: dict[str, Any], reason: str) -> None:
    program = compress(model, joint_inputs(), replace(SMALL, **change))

    assert not sparse_nodes(program.graph_module)
    (found,) = reasons(program).values()
    assert found.startswith(reason)


class SameLength(nn.Module):
    """Cross-attention whose keys happen to be as many as its queries."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        q, k = self.q(x)[:, None], self.k(other)[:, None]
        return nn.functional.scaled_dot_product_attention(q, k, k)[:, 0]


class Permuted(nn.Module):
    """Attention over tokens in an order that only the data knows."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(16, 16)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        q = self.q(x[:, index])[:, None]
        return nn.functional.scaled_dot_product_attention(q, q, q)[:, 0]


class Chosen(nn.Module):
    """Attention over as many tokens as the data says, then over all."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(16, 16)

    def attend(self, x: Tensor) -> Tensor:
        q = self.q(x)[:, None]
        return nn.functional.scaled_dot_product_attention(q, q, q)[:, 0]

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        some = x[:, valid.nonzero()[:, 0]]
        torch._check(some.shape[1] != 0)
        return self.attend(x + self.attend(some).mean(1, keepdim=True))


def test_a_size_that_depends_on_the_data_is_a_reason() -> None:
    program = compress(Chosen(), (torch.randn(2, 24, 16), torch.arange(24) % 2 == 0), SMALL)

    kinds = [r for r in fxq.report(program).rows if r.row.kind == "attention"]
    assert [bool(r.row.skip) for r in kinds] == [True, False]
    (found,) = reasons(program).values()
    assert found == "a size of it depends on the data"


def test_cross_attention_of_equal_length_is_seen() -> None:
    x = torch.randn(2, 24, 16)

    program = compress(SameLength(), (x, torch.randn(2, 24, 16)), SMALL, strict=True)

    (found,) = reasons(program).values()
    assert found == "cross-attention: keys or values are other tokens than queries"


def test_tokens_of_unknown_origin_need_the_users_word() -> None:
    example = (torch.randn(2, 24, 16), torch.randperm(24))

    silent = compress(Permuted(), example, SMALL)
    told = compress(
        Permuted(), example, replace(SMALL, layout=TokenLayout(text_size=0)), strict=True
    )

    (found,) = reasons(silent).values()
    assert found.endswith("give layout=TokenLayout(text, text_size, grid)")
    assert len(sparse_nodes(told.graph_module)) == 1


class FromIds(nn.Module):
    """Attention over the embeddings of token numbers."""

    def __init__(self, is_causal: bool = False, mask: Any = None) -> None:
        super().__init__()
        self.embed, self.q = nn.Embedding(10, 16), nn.Linear(16, 16)
        self.is_causal, self.mask = is_causal, mask

    def forward(self, ids: Tensor) -> Tensor:
        q = self.q(self.embed(ids))[:, None]
        mask = self.mask and self.mask(ids)
        h = nn.functional.scaled_dot_product_attention(q, q, q, mask, is_causal=self.is_causal)
        return h[:, 0]


class FromRows(nn.Module):
    """Attention over the rows of a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Permuted()

    def forward(self, rows: Tensor) -> Tensor:
        result: Tensor = self.attention(rows.view(1, 24, 16), torch.arange(24))
        return result


IDS = torch.arange(24)[None] % 10


@pytest.mark.parametrize(
    ("model", "example"), [(FromIds(), IDS), (FromRows(), torch.randn(24, 16))]
)
def test_attention_that_no_stream_reaches_is_judged_like_any_other(
    model: nn.Module, example: Tensor
) -> None:
    told = replace(SMALL, layout=TokenLayout(text_size=0))

    silent = compress(model, (example,), SMALL)
    dense = compress(model, (example,), replace(told, density=1.0), strict=True)

    ((name, reason),) = reasons(silent).items()
    assert reason.endswith("give layout=TokenLayout(text, text_size, grid)")
    with pytest.raises(SkippedError, match="give layout=TokenLayout"):
        compress(model, (example,), SMALL, strict=True)
    assert len(sparse_nodes(dense.graph_module)) == 1
    with torch.no_grad():
        torch.testing.assert_close(dense(example), model(example), atol=1e-6, rtol=1e-5)
    kept = compress(model, (example,), replace(told, overrides=((name, None),)), strict=True)
    assert reasons(kept) == {name: f"override {name!r}"}


def tril(ids: Tensor) -> Tensor:
    return torch.ones(24, 24, dtype=torch.bool).tril()


def padded_tril(ids: Tensor) -> Tensor:
    return tril(ids) & (ids > 2)[:, None, None]


def tril_of_the_batch(ids: Tensor) -> Tensor:
    """As the transformers library has it: it needs the batch's size to be computed."""
    position = torch.arange(24).expand(len(ids), -1)
    return (position[:, None] <= position[:, :, None])[:, None]


@pytest.mark.parametrize("mask", [None, tril, padded_tril, tril_of_the_batch])
@pytest.mark.parametrize("layout", [TokenLayout(), TokenLayout(text_size=0)])
def test_a_language_model_is_causal(mask: Any, layout: TokenLayout) -> None:
    model, attention = FromIds(is_causal=mask is None, mask=mask), replace(SMALL, layout=layout)

    program = compress(model, IDS.expand(2, -1), attention, strict=True)

    assert list(reasons(program).values()) == ["causal attention: the method is for denoisers"]


def test_a_mask_that_shows_one_later_key_is_not_causal() -> None:
    model = FromIds(mask=lambda ids: torch.ones(24, 24, dtype=torch.bool).tril(1))

    program = compress(model, IDS, replace(SMALL, layout=TokenLayout(text_size=0)))

    (found,) = reasons(program).values()
    assert found.startswith("its mask is not key padding")


class Broadcast(nn.Module):
    """Attention that uses parts of an input `[B, H, S, D]` for its query, and for key and value."""

    def __init__(self, query: tuple[int, int], key: tuple[int, int]) -> None:
        super().__init__()
        self.query, self.key = query, key

    def forward(self, x: Tensor) -> Tensor:
        q, k = (x[:batch, :heads] for batch, heads in (self.query, self.key))
        return nn.functional.scaled_dot_product_attention(q, k, k)


@pytest.mark.parametrize(
    ("query", "key", "reason"),
    [
        ((2, 2), (1, 2), "expected query, key and value of one batch size, found 2, 1, 1"),
        ((1, 2), (2, 2), "expected query, key and value of one batch size, found 1, 2, 2"),
        ((2, 1), (2, 2), "expected query heads a multiple of key heads, and as many value heads"),
    ],
)
def test_broadcast_operands_stay_dense(query: Any, key: Any, reason: str) -> None:
    model, example = Broadcast(query, key), (torch.randn(2, 2, 24, 16),)

    program = compress(model, example, replace(SMALL, layout=TokenLayout(text_size=0)))

    (found,) = reasons(program).values()
    assert found.startswith(reason)
    assert torch.equal(program(*example), model(*example))


def test_one_key_head_serves_all_queries() -> None:
    model, example = Broadcast((2, 2), (2, 1)), (torch.randn(2, 2, 24, 16),)

    program = compress(model, example, replace(DENSE, layout=TokenLayout(text_size=0)), strict=True)

    torch.testing.assert_close(program(*example), model(*example), atol=1e-6, rtol=1e-5)
