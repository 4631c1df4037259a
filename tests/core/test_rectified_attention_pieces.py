"""The pieces of rectified attention against numbers worked out by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxq.rectified_attention.layout import BlockLayout
from fxq.rectified_attention.pooling import BlockStats, mean_token, pool_blocks
from fxq.rectified_attention.rectification import gain_and_error, passes_gate, rectification
from fxq.rectified_attention.selection import (
    implicit_attention,
    keep_count,
    log_counts,
    select_blocks,
    visible_blocks,
)

QUERY = torch.tensor([[[[1.0, 0], [3, 0]]]])
KEY = torch.tensor([[[[1.0, 1], [1, -1], [0.1, 4], [-0.1, -2], [1, 0], [5, 0]]]])
PAIRS = torch.full((3,), 2.0)
ROW = (0.4, 0.25, 0.15, 0.1, 0.06, 0.04)


def choose(
    row: tuple[float, ...],
    density: float,
    top_p: float,
    text: float = 0.0,
    adjacency: Tensor | None = None,
) -> list[int]:
    """Return the blocks that the first query block of a map with equal rows visits."""
    n = len(row)
    p = torch.tensor(row).expand(1, 1, n, n)
    visible = torch.ones(n, n, dtype=torch.bool)
    p_text = torch.full((1, 1, n), text)
    chosen = select_blocks(p, p_text, torch.tensor(density), top_p, adjacency, visible)
    return chosen[0, 0, 0].nonzero()[:, 0].tolist()


def test_pooling_divides_by_the_true_number_of_tokens() -> None:
    x = torch.tensor([1.0, 3, 5, 9, 7]).reshape(1, 1, 5, 1)

    found = pool_blocks(x, torch.tensor([2.0, 2, 1]), 2)

    assert found.mean.flatten().tolist() == [2, 7, 7]
    assert found.deviation.flatten().tolist() == [1, 2, 0]
    assert mean_token(found.mean, torch.tensor([2.0, 2, 1])).item() == 5


def test_pooling_is_fp32_whatever_comes_in() -> None:
    x = torch.randn(1, 2, 20, 4).bfloat16()

    found = pool_blocks(x, torch.tensor([8.0, 8, 4]), 8)

    assert found.mean.dtype == found.deviation.dtype == torch.float32
    torch.testing.assert_close(found.mean[0, 0, 2], x[0, 0, 16:].float().mean(0))


def test_gain_and_error_of_a_worked_example() -> None:
    q, k = pool_blocks(QUERY, torch.tensor([2.0]), 2), pool_blocks(KEY, PAIRS, 2)

    gain, error = gain_and_error(q, k)

    torch.testing.assert_close(gain.flatten(), torch.tensor([2.0, 0, 6]))
    torch.testing.assert_close(error.flatten(), torch.tensor([1.0, 0.2, 7]))
    assert passes_gate(q, k, PAIRS, False).flatten().tolist() == [True, False, False]


def test_a_constant_added_to_keys_opens_the_gate_unless_keys_are_centred() -> None:
    q, k = pool_blocks(QUERY, torch.tensor([2.0]), 2), pool_blocks(KEY, PAIRS, 2)
    shifted = pool_blocks(KEY + torch.tensor([10.0, 0]), PAIRS, 2)

    gain, error = gain_and_error(q, shifted)

    torch.testing.assert_close(gain.flatten(), torch.tensor([22.0, 20, 26]))
    torch.testing.assert_close(error.flatten(), torch.tensor([11.0, 10.2, 17]))
    assert passes_gate(q, shifted, PAIRS, False).all()
    centred = passes_gate(q, k, PAIRS, True)
    assert torch.equal(passes_gate(q, shifted, PAIRS, True), centred)
    assert centred.any()
    assert not centred.all()


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([2.0**-6, 0.5, 8.0]), st.sampled_from([0.25, 4.0]), st.integers(0, 99))
def test_gate_does_not_depend_on_the_scale_of_queries_or_keys(
    a: float, b: float, seed: int
) -> None:
    torch.manual_seed(seed)
    q, k = (pool_blocks(torch.randn(1, 2, 20, 4), torch.full((5,), 4.0), 4) for _ in range(2))
    counts = torch.full((5,), 4.0)

    found = passes_gate(
        BlockStats(*(a * s for s in q)), BlockStats(*(b * s for s in k)), counts, False
    )

    assert torch.equal(found, passes_gate(q, k, counts, False))


def test_gate_is_open_without_error_and_shut_without_gain() -> None:
    zero, one = torch.zeros(1, 1, 1, 2), torch.tensor([[[[1.0, 0]]]])

    assert passes_gate(BlockStats(one, zero), BlockStats(one, zero), torch.ones(1), False).all()
    assert not passes_gate(
        BlockStats(zero, zero), BlockStats(one, zero), torch.ones(1), False
    ).any()


@pytest.mark.parametrize(
    ("density", "n", "expected"),
    [(0.2, 900, 180), (0.1, 900, 90), (0.25, 591, 148), (0.1, 4, 1), (0.0, 7, 1), (2.0, 7, 7)],
)
def test_density_is_rounded_to_blocks_and_not_truncated(
    density: float, n: int, expected: int
) -> None:
    assert keep_count(torch.tensor(density), torch.tensor([n])).item() == expected


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [(0.0, 1), (0.3, 1), (0.4, 2), (0.65, 3), (0.85, 4), (0.999, 6), (1.0, 6)],
)
def test_top_p_keeps_the_smallest_prefix_that_holds_more_than_p(
    top_p: float, expected: int
) -> None:
    assert choose(ROW, 0.0, top_p) == list(range(expected))


def test_top_k_and_top_p_keep_whichever_is_more() -> None:
    assert choose(ROW, 0.5, 0.3) == [0, 1, 2]
    assert choose(ROW, 0.2, 0.85) == [0, 1, 2, 3]


def test_equal_probabilities_go_to_the_lower_index() -> None:
    assert choose((0.1, 0.3, 0.1, 0.3, 0.1, 0.1), 0.5, 0.0) == [0, 1, 3]
    assert choose((0.25, 0.25, 0.25, 0.25), 0.0, 0.3) == [0, 1]


def test_text_takes_its_place_in_the_prefix_but_no_slot() -> None:
    halves = tuple(p / 2 for p in ROW)

    assert choose(halves, 0.5, 0.0, text=0.5) == [0, 1, 2]  # k blocks, though text ranks first
    assert choose(halves, 0.0, 0.3, text=0.5) == [0]  # text alone holds more than p
    assert choose(halves, 0.0, 0.6, text=0.5) == [0]
    assert choose(halves, 0.0, 0.7, text=0.5) == [0, 1]


def test_adjacency_is_kept_beside_the_most_probable() -> None:
    adjacency = torch.eye(6, dtype=torch.bool).roll(
        -1, 1
    )  # each block and the next... of block 0: 5

    assert choose(ROW, 0.0, 0.0, adjacency=adjacency) == [0, 5]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 999), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_more_density_or_mass_keeps_a_superset(
    seed: int, d1: float, d2: float, p1: float, p2: float
) -> None:
    torch.manual_seed(seed)
    row = tuple(torch.randn(13).softmax(0).tolist())

    fewer = choose(row, min(d1, d2), min(p1, p2))
    more = choose(row, max(d1, d2), max(p1, p2))

    assert set(fewer) <= set(more)
    assert len(fewer) >= keep_count(torch.tensor(min(d1, d2)), torch.tensor([13])).item()


def implicit(n_visual: int, text: int, block_size: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Return P of blocks and text, and the exact attention, for tokens equal within a block."""
    torch.manual_seed(0)
    layout = BlockLayout(n_visual + text, n_visual, text, block_size)
    counts = layout.counts(torch.device("cpu"))
    n = layout.n_blocks
    q, k, t = torch.randn(1, 1, n, 8), torch.randn(1, 1, n, 8), torch.randn(1, 1, text, 8)
    mask = torch.ones(1, text, dtype=torch.bool)
    every = visible_blocks(n, False, q.device)
    p, p_text = implicit_attention(q, k, log_counts(counts, False), every, t, mask, 0.5)
    tokens = torch.cat([k.repeat_interleave(counts.long(), 2), t], 2)
    return p, p_text, (q @ tokens.mT * 0.5).softmax(-1)


def test_implicit_attention_counts_tokens_and_isolates_text() -> None:
    p, p_text, exact = implicit(n_visual=10, text=3)  # blocks of 4, 4 and 2 tokens

    sums = [exact[..., a:b].sum(-1) for a, b in ((0, 4), (4, 8), (8, 10), (10, 13))]
    torch.testing.assert_close(p, torch.stack(sums[:3], -1))
    torch.testing.assert_close(p_text, sums[3])
    torch.testing.assert_close(p.sum(-1) + p_text, torch.ones_like(p_text))


def test_reallocation_is_the_published_one_for_full_blocks() -> None:
    torch.manual_seed(0)
    q, k, t = (torch.randn(1, 1, n, 8) for n in (3, 3, 5))
    plain = torch.cat([q @ k.mT, q @ t.mT], -1).softmax(-1)
    weighted = 4 * plain[..., :3]
    expected = weighted / (weighted.sum(-1, keepdim=True) + plain[..., 3:].sum(-1, keepdim=True))

    bias = log_counts(torch.full((3,), 4.0), False)
    mask = torch.ones(1, 5, dtype=torch.bool)
    found, _ = implicit_attention(q, k, bias, visible_blocks(3, False, q.device), t, mask, 1.0)

    torch.testing.assert_close(found, expected)


def test_padded_text_has_no_probability_even_where_all_of_it_is_padded() -> None:
    q = torch.randn(2, 1, 2, 8)
    mask = torch.tensor([[True, False], [False, False]])
    every = visible_blocks(2, False, q.device)

    p, p_text = implicit_attention(
        q, q, log_counts(torch.ones(2), False), every, 100 * q, mask, 1.0
    )

    assert p_text[1].abs().max() == 0
    torch.testing.assert_close(p[1].sum(-1), torch.ones(1, 2))
    assert p_text[0].min() > 0


def test_causal_columns_stand_for_what_a_token_sees_of_them() -> None:
    found = log_counts(torch.tensor([4.0, 4, 2]), True).exp()

    expected = torch.tensor([[2.5, 4, 2], [4, 2.5, 2], [4, 4, 1.5]])
    torch.testing.assert_close(found, expected)
    assert visible_blocks(3, True, found.device).tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]


def test_rectification_splits_the_probability() -> None:
    p = torch.tensor([0.5, 0.2, 0.15, 0.05]).reshape(1, 1, 1, 4)
    text = torch.full((1, 1, 1), 0.1)
    selected = torch.tensor([True, False, False, False]).reshape(1, 1, 1, 4)
    given = torch.tensor([False, True, True, False]).reshape(1, 1, 1, 4)
    v_mean = torch.tensor([1.0, 10, 100, 1000]).reshape(1, 1, 4, 1)

    ratio, correction = rectification(p, text, selected, given, v_mean, "complement")
    critical, same = rectification(p, text, selected, given, v_mean, "critical")

    assert ratio.item() == pytest.approx(0.65)  # 0.05 failed the gate and goes to the visited keys
    assert critical.item() == pytest.approx(0.6)
    assert correction.item() == same.item() == pytest.approx(17.0)
