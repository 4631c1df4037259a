"""What rectified attention must satisfy as a whole: equalities, symmetries, errors, bad input."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from rectified import (
    DEFAULTS,
    MODES,
    attention,
    block_structured,
    random_qkv,
    relative_error,
    with_lse,
)
from torch import Tensor

import fxq.rectified_attention.op  # noqa: F401  registers the operator
from fxq.rectified_attention import reference
from fxq.rectified_attention.layout import BlockLayout
from fxq.rectified_attention.reference import Plan, plan

LAYOUTS = ((0, 0), (0, 9), (82, 9))  # text_start, text_size of 91 tokens: none, first, last


def planned(q: Tensor, k: Tensor, v: Tensor, density: float, **options: Any) -> Plan:
    """Return the plan of a call without text or order."""
    o = DEFAULTS | options
    layout = BlockLayout(q.shape[2], 0, 0, o["block_size"])
    mask = torch.ones(q.shape[0], 0, dtype=torch.bool)
    names = ("top_p", "mode", "mass", "gate", "center_keys", "is_causal")
    rest = (*(o[name] for name in names), q.shape[-1] ** -0.5)
    return plan(q, k, v, torch.tensor(density), mask, o["adjacency"], layout, *rest)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("text_start", "text_size"), LAYOUTS)
@pytest.mark.parametrize(("density", "top_p"), [(1.0, 0.0), (0.0, 1.0)])
def test_full_density_is_dense_attention(
    density: float, top_p: float, text_start: int, text_size: int, mode: str, is_causal: bool
) -> None:
    q, k, v = random_qkv(91)
    options = {"text_start": text_start, "text_size": text_size, "is_causal": is_causal}

    found, lse = with_lse(q, k, v, density, top_p=top_p, mode=mode, **options)

    logits = q @ k.mT / 4
    if is_causal:
        logits = logits.masked_fill(torch.ones(91, 91).triu(1).bool(), -torch.inf)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    assert (found - expected).abs().max() <= 1e-6
    torch.testing.assert_close(lse, logits.logsumexp(-1), rtol=0, atol=2e-6)


def test_full_density_gives_nothing_back() -> None:
    found = planned(*random_qkv(91), 1.0, gate=False)

    assert found.selected.all()
    assert (found.ratio == 1).all()
    assert (found.correction == 0).all()


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(MODES),
    st.sampled_from(LAYOUTS),
    st.floats(0, 1),
    st.floats(0, 1),
    st.booleans(),
    st.booleans(),
)
def test_a_constant_value_gives_that_constant(
    mode: str,
    text: tuple[int, int],
    density: float,
    top_p: float,
    gate: bool,
    is_causal: bool,
) -> None:
    q, k, v = random_qkv(91, batch=2)
    options = {"text_start": text[0], "text_size": text[1], "is_causal": is_causal}
    text_len = torch.tensor([text[1], text[1] // 2], dtype=torch.int32)

    out = attention(
        q, k, torch.ones_like(v), density,
        top_p=top_p, mode=mode, gate=gate, text_len=text_len, **options,
    )  # fmt: skip

    assert (out - 1).abs().max() <= 2e-6


@pytest.mark.parametrize("mode", MODES)
def test_output_is_linear_in_the_value(mode: str) -> None:
    q, k, v = random_qkv(45)
    w = torch.randn_like(v)

    found = attention(q, k, 2 * v - 3 * w, 0.3, mode=mode)

    parts = [attention(q, k, x, 0.3, mode=mode) for x in (v, w)]
    torch.testing.assert_close(found, 2 * parts[0] - 3 * parts[1], rtol=0, atol=2e-5)


def shuffled_within_blocks(n_tokens: int, block_size: int) -> Tensor:
    """Return a permutation that leaves every token in its block."""
    blocks = torch.arange(n_tokens).split(block_size)
    return torch.cat([block[torch.randperm(len(block))] for block in blocks])


@pytest.mark.parametrize("mode", MODES)
def test_order_within_a_block_does_not_matter(mode: str) -> None:
    q, k, v = random_qkv(45)
    keys, queries = shuffled_within_blocks(45, 8), shuffled_within_blocks(45, 8)
    expected = attention(q, k, v, 0.3, mode=mode)

    found = attention(q[:, :, queries], k[:, :, keys], v[:, :, keys], 0.3, mode=mode)

    torch.testing.assert_close(found, expected[:, :, queries], rtol=0, atol=2e-6)


@pytest.mark.parametrize("mode", MODES)
def test_order_of_key_blocks_does_not_matter(mode: str) -> None:
    q, k, v = random_qkv(48)
    blocks = torch.randperm(6)
    tokens = (blocks[:, None] * 8 + torch.arange(8)).flatten()
    adjacency = torch.rand(6, 6) < 0.2

    found = attention(
        q, k[:, :, tokens], v[:, :, tokens], 0.3, mode=mode, adjacency=adjacency[:, blocks]
    )

    expected = attention(q, k, v, 0.3, mode=mode, adjacency=adjacency)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("text_start", "text_size"), LAYOUTS)
def test_order_is_a_gather_before_and_a_scatter_after(
    text_start: int, text_size: int, mode: str
) -> None:
    q, k, v = random_qkv(91)
    options = {"text_start": text_start, "text_size": text_size, "mode": mode}
    order = torch.randperm(91 - text_size)
    first = text_size if text_start == 0 else 0
    index = torch.arange(91)
    index[first : first + len(order)] = first + order

    found = attention(q, k, v, 0.3, order=order, **options)

    expected = attention(*(x[:, :, index] for x in (q, k, v)), 0.3, **options)
    assert torch.equal(found[:, :, index], expected)


def piecewise_constant(block_size: int, text: int, *, queries: bool) -> list[Tensor]:
    """Return visual tokens equal within a block (keys, or queries too) that pass the gate, then
    text."""
    n_blocks = 14
    made = []
    for equal in (queries, True):
        visual = torch.rand(1, 2, n_blocks, 16) + 0.2  # products are positive: gain, and no error
        visual = visual.repeat_interleave(block_size, 2)
        if not equal:
            visual = visual + 0.3 * torch.randn_like(visual)
        made.append(torch.cat([visual, torch.rand(1, 2, text, 16) + 0.7], 2))
    return [*made, torch.randn(1, 2, n_blocks * block_size + text, 16)]


@pytest.mark.parametrize("density", [0.07, 0.14, 0.28, 0.56, 1.0])
@pytest.mark.parametrize("mode", ["paper", "online"])
def test_tokens_equal_within_blocks_are_attended_exactly(mode: str, density: float) -> None:
    q, k, v = piecewise_constant(8, 5, queries=mode == "paper")

    found = attention(
        q, k, v, density, mode=mode, gate=mode == "paper", text_start=112, text_size=5
    )

    assert relative_error(found, F.scaled_dot_product_attention(q, k, v)) <= 2e-6


def test_without_the_count_of_tokens_the_same_data_is_far_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    q, k, v = piecewise_constant(8, 5, queries=True)
    monkeypatch.setattr(reference, "log_counts", lambda counts, is_causal: torch.zeros(1))

    found = attention(q, k, v, 0.28, text_start=112, text_size=5)

    assert relative_error(found, F.scaled_dot_product_attention(q, k, v)) >= 0.2


@pytest.mark.parametrize("seed", range(4))
def test_errors_on_block_structured_data_are_ordered(seed: int) -> None:
    torch.manual_seed(seed)
    q, k, v = block_structured(n_blocks=24, block_size=16)
    dense = F.scaled_dot_product_attention(q, k, v)

    sparse, paper, ungated, online = (
        relative_error(attention(q, k, v, 0.2, block_size=16, mode=mode, gate=gate), dense)
        for mode, gate in (("sparse", True), ("paper", True), ("paper", False), ("online", False))
    )

    assert paper < 0.6 * sparse
    assert online < 0.1 * sparse
    assert online < ungated < paper


@pytest.mark.parametrize("seed", range(3))
def test_online_is_best_on_a_drifting_sequence(seed: int) -> None:
    torch.manual_seed(seed)
    noise = 0.7 * (1 - 0.98**2) ** 0.5 * torch.randn(2, 512, 2, 64)
    rows = [0.7 * torch.randn(2, 2, 64)]
    for t in range(511):
        rows.append(0.98 * rows[-1] + noise[:, t])
    q, k = torch.stack(rows, 2)[:, None]
    v = torch.randn_like(q)
    dense = F.scaled_dot_product_attention(q, k, v)

    sparse, paper, online = (
        relative_error(attention(q, k, v, 0.2, block_size=16, mode=mode, gate=gate), dense)
        for mode, gate in (("sparse", True), ("paper", True), ("online", False))
    )

    assert paper < sparse
    assert online < 0.5 * paper


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("text_start", "text_size"), LAYOUTS[1:])
def test_text_rows_are_dense(text_start: int, text_size: int, mode: str) -> None:
    q, k, v = random_qkv(91)
    rows = slice(text_start, text_start + text_size)

    found = attention(q, k, v, 0.1, mode=mode, text_start=text_start, text_size=text_size)

    dense = F.scaled_dot_product_attention(q, k, v)
    assert (found[:, :, rows] - dense[:, :, rows]).abs().max() <= 1e-6
    other = slice(9, None) if text_start == 0 else slice(0, 82)
    assert (found[:, :, other] - dense[:, :, other]).abs().max() > 0.01


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("text_start", [0, 83])
def test_each_sample_equals_its_unpadded_run(text_start: int, mode: str) -> None:
    q, k, v = random_qkv(91, batch=3)
    lengths = [3, 7, 0]
    options = {"mode": mode, "text_start": text_start, "text_size": 8}
    text_len = torch.tensor(lengths, dtype=torch.int32)

    found = attention(q, k, v, 0.3, text_len=text_len, **options)

    for b, length in enumerate(lengths):
        valid = torch.ones(91, dtype=torch.bool)
        valid[text_start + length : text_start + 8] = False
        single = [x[b : b + 1, :, valid] for x in (q, k, v)]
        alone = attention(*single, 0.3, **options | {"text_size": length})
        torch.testing.assert_close(found[b : b + 1, :, valid], alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_padded_text_has_no_influence_and_order_of_text_none_either(mode: str) -> None:
    q, k, v = random_qkv(91)
    options = {"mode": mode, "text_start": 82, "text_size": 9, "text_len": torch.tensor([6])}
    expected = attention(q, k, v, 0.3, **options)
    k2, v2 = k.clone(), v.clone()
    k2[:, :, 88:] += 1e3
    v2[:, :, 88:] += 1e3
    index = torch.cat([torch.arange(82), 82 + torch.randperm(6), torch.arange(88, 91)])

    assert torch.equal(attention(q, k2, v2, 0.3, **options), expected)
    permuted = attention(q, k[:, :, index], v[:, :, index], 0.3, **options)
    torch.testing.assert_close(permuted, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_grouped_heads_equal_repeated_heads(mode: str, is_causal: bool) -> None:
    q, k, v = random_qkv(45, heads=4)
    k, v = k[:, :2], v[:, :2]
    options = {"mode": mode, "is_causal": is_causal, "text_start": 0, "text_size": 5}

    found = attention(q, k, v, 0.3, **options)

    repeated = (x.repeat_interleave(2, 1) for x in (k, v))
    assert torch.equal(found, attention(q, *repeated, 0.3, **options))


@pytest.mark.parametrize("is_causal", [False, True])
def test_sparse_mode_equals_dense_attention_under_the_block_mask(is_causal: bool) -> None:
    q, k, v = random_qkv(45)
    mask = planned(q, k, v, 0.3, is_causal=is_causal).selected
    mask = mask.repeat_interleave(8, 2).repeat_interleave(8, 3)[:, :, :45, :45]
    if is_causal:
        mask = mask & torch.ones(45, 45).tril().bool()

    found, lse = with_lse(q, k, v, 0.3, mode="sparse", is_causal=is_causal)

    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert (found - expected).abs().max() <= 1e-6
    logits = (q @ k.mT / 4).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(lse, logits.logsumexp(-1), rtol=0, atol=2e-6)


def test_online_log_sum_exp_counts_pseudo_keys() -> None:
    q, k, v = random_qkv(45)
    found = planned(q, k, v, 0.3, mode="online", gate=False)
    rows = torch.arange(45) // 8
    seen = found.selected[:, :, rows][..., rows]
    exact = (q @ k.mT / 4).masked_fill(~seen, -torch.inf)
    pooled = q @ found.k_mean.mT / 4 + found.counts.log()
    pooled = pooled.masked_fill(found.selected[:, :, rows], -torch.inf)

    _, lse = with_lse(q, k, v, 0.3, mode="online", gate=False)

    expected = torch.cat([exact, pooled], -1).logsumexp(-1)
    torch.testing.assert_close(lse, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("mass", ["complement", "critical"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_plan_keeps_its_promises(is_causal: bool, mass: str) -> None:
    q, k, v = random_qkv(91, dim=4)
    adjacency = torch.rand(12, 12) < 0.1

    found = planned(q, k, v, 0.3, adjacency=adjacency, is_causal=is_causal, mass=mass)

    visible = torch.ones(12, 12).tril().bool() if is_causal else torch.ones(12, 12).bool()
    given = (found.p_blocks * found.compensated).sum(-1)
    assert not (found.selected & found.compensated).any()
    assert (found.selected | ~(adjacency & visible)).all()
    assert not (found.selected | found.compensated).logical_and(~visible).any()
    torch.testing.assert_close(found.p_blocks.sum(-1), torch.ones(1, 2, 12))
    assert found.compensated.any()
    assert ((found.ratio > 0) & (found.ratio <= 1)).all()
    if mass == "complement":
        torch.testing.assert_close(found.ratio + given, torch.ones(1, 2, 12))
        assert torch.equal(found.ratio == 1, ~found.compensated.any(-1))
    else:
        torch.testing.assert_close(found.ratio, (found.p_blocks * found.selected).sum(-1))


def test_a_value_moved_in_one_block_moves_rows_by_what_the_plan_says() -> None:
    q, k, v = random_qkv(96, dim=4)
    found = planned(q, k, v, 0.3)
    before = attention(q, k, v, 0.3)
    kinds = (found.compensated, found.selected, ~(found.compensated | found.selected))
    block = int(torch.stack([kind.any((0, 1, 2)) for kind in kinds]).all(0).nonzero()[0])
    tokens, delta = slice(block * 8, block * 8 + 8), torch.randn(4)
    moved = v.clone()
    moved[:, :, tokens] += delta

    change = attention(q, k, moved, 0.3) - before

    change = change.reshape(1, 2, 12, 8, 4)
    given, visited, untouched = (kind[..., block] for kind in kinds)
    expected = (found.p_blocks[..., block, None] * delta)[:, :, :, None].expand_as(change)
    torch.testing.assert_close(change[given], expected[given], rtol=0, atol=2e-6)
    assert (change[untouched] == 0).all()
    mask = found.selected.repeat_interleave(8, 2).repeat_interleave(8, 3)
    weights = (q @ k.mT / 2).masked_fill(~mask, -torch.inf).softmax(-1)
    sparse_mass = weights[..., tokens].sum(-1).reshape(1, 2, 12, 8)
    expected = (found.ratio[..., None] * sparse_mass)[..., None] * delta
    torch.testing.assert_close(change[visited], expected[visited], rtol=0, atol=2e-6)


def test_pulling_a_block_to_its_mean_gives_it_back() -> None:
    q, k, v = random_qkv(96)
    before = planned(q, k, v, 0.3)
    shut = ~(before.selected | before.compensated)
    _, h, n, m = (int(i) for i in shut.nonzero()[0])
    rows, tokens = slice(n * 8, n * 8 + 8), slice(m * 8, m * 8 + 8)
    q, k = q.clone(), k.clone()
    for x, part in ((q, rows), (k, tokens)):
        x[0, h, part] = x[0, h, part].mean(0)

    after = planned(q, k, v, 0.3)

    p = after.p_blocks[0, h, n, m]
    assert after.compensated[0, h, n, m]
    others = before.compensated[0, h, n].logical_or(torch.arange(12) == m)
    others = others & after.compensated[0, h, n]
    assert others.sum() >= 1
    given = (after.p_blocks[0, h, n] * after.compensated[0, h, n]).sum()
    torch.testing.assert_close(after.ratio[0, h, n], 1 - given)
    without = after.compensated[0, h, n].clone()
    without[m] = False
    rest = (after.p_blocks[0, h, n] * without) @ after.v_mean[0, h]
    torch.testing.assert_close(after.correction[0, h, n] - rest, p * after.v_mean[0, h, m])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dim", [64, 80, 96, 128])
@pytest.mark.parametrize(
    ("dtype", "atol"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)], ids=str
)
def test_narrow_dtypes_are_rounded_once(
    dtype: torch.dtype, atol: float, dim: int, mode: str
) -> None:
    q, k, v = (x.to(dtype) for x in random_qkv(45, dim=dim))

    found = attention(q, k, v, 0.3, mode=mode)

    expected = attention(q.float(), k.float(), v.float(), 0.3, mode=mode)
    assert found.dtype == dtype
    assert (found.float() - expected).abs().max() <= atol
    assert torch.equal(found, expected.to(dtype))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("n_tokens", "text_start", "text_size", "text_len"),
    [(8, 0, 8, 0), (8, 0, 8, 3), (0, 0, 0, 0), (1, 0, 0, 0), (9, 1, 8, 0), (9, 0, 8, 0)],
)
def test_degenerate_sequences_are_finite(
    n_tokens: int, text_start: int, text_size: int, text_len: int, mode: str
) -> None:
    q, k, v = random_qkv(n_tokens)
    text = torch.tensor([text_len])

    out, lse = with_lse(
        q, k, v, 0.3, mode=mode, text_start=text_start, text_size=text_size, text_len=text
    )

    assert out.isfinite().all()
    assert not lse.isnan().any()
    if n_tokens == text_size and text_len == 0:
        assert (out == 0).all()  # no key at all
        assert (lse == -torch.inf).all()


def test_a_causal_token_before_every_key_is_zero() -> None:
    q, k, v = random_qkv(12)
    options = {"text_start": 0, "text_size": 4, "text_len": torch.tensor([0]), "is_causal": True}

    out, lse = with_lse(q, k, v, 0.5, **options)

    assert (out[:, :, :4] == 0).all()
    assert (lse[:, :, :4] == -torch.inf).all()
    assert out.isfinite().all()


@pytest.mark.parametrize("mode", MODES)
def test_large_logits_do_not_overflow(mode: str) -> None:
    q, k, v = random_qkv(45)

    assert attention(100 * q, 100 * k, v, 0.3, mode=mode).isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "papr"}, "mode: expected one of"),
        ({"mass": "all"}, "mass: expected one of"),
        ({"block_size": 0}, "block_size: expected at least 1"),
        ({"text_start": 3, "text_size": 8}, "text at either end"),
        ({"text_start": 0, "text_size": 46}, "text at either end"),
        ({"text_len": torch.tensor([1, 2])}, "text_len: expected shape"),
        ({"order": torch.arange(44)}, "order: expected shape"),
        ({"adjacency": torch.eye(5, dtype=torch.bool)}, "adjacency: expected shape"),
        ({"order": torch.arange(45), "is_causal": True}, "none with is_causal"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention(*random_qkv(45), 0.3, **options)


def test_tensors_that_make_no_self_attention_are_refused() -> None:
    q, k, v = random_qkv(45, heads=4)

    with pytest.raises(ValueError, match="leave cross-attention dense"):
        attention(q, k[:, :, :20], v[:, :, :20], 0.3)
    with pytest.raises(ValueError, match="multiple of key heads"):
        attention(q, k[:, :3], v[:, :3], 0.3)
    with pytest.raises(ValueError, match="four dimensions"):
        attention(q[0], k[0], v[0], 0.3)
    with pytest.raises(ValueError, match="density: expected one number"):
        with_lse(q, k, v, [0.3, 0.4])  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", MODES)
def test_one_graph_serves_dense_and_sparse_steps(mode: str) -> None:
    q, k, v = random_qkv(45)
    graphs = []

    def backend(gm: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(gm)
        return gm.forward

    options = DEFAULTS | {"mode": mode}

    @torch.compile(backend=backend, fullgraph=True)
    def step(density: Tensor) -> Tensor:
        return torch.ops.fxq.rectified_attention(q, k, v, density, *options.values())[0]

    found = [step(torch.tensor(d)) for d in (1.0, 1.0, 0.5, 0.2)]

    assert len(graphs) == 1
    assert (found[0] - F.scaled_dot_product_attention(q, k, v)).abs().max() <= 1e-6
    assert torch.equal(found[3], attention(q, k, v, 0.2, mode=mode))
    assert not torch.equal(found[2], found[3])
