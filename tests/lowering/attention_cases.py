"""Arguments and checks for the attention kernels that the interpreter and the GPU tests share."""

from typing import Any

import torch
from poison import poison
from torch import Tensor

from fxq.lowering.kernels import attend_blocks, pool_blocks, rectified_attention, select_blocks
from fxq.lowering.kernels.select_blocks import Products
from fxq.numerics import sqnr_db
from fxq.rectified_attention import reference
from fxq.rectified_attention.layout import BlockLayout, empty_output
from fxq.rectified_attention.pooling import pool_blocks as pool
from fxq.rectified_attention.rectification import rectification
from fxq.rectified_attention.selection import (
    implicit_attention,
    log_counts,
    visible_blocks,
)
from fxq.rectified_attention.selection import (
    select_blocks as select,
)


def poison_all() -> None:
    """Poison the outputs of all kernels."""
    poison()
    rectified_attention.empty_output = lambda *of: empty_output(*of).fill_(float("nan"))


def check_pool(case: pool_blocks.Case, device: str) -> dict[str, float]:
    """Return the largest differences of mean and deviation, and whether the copy is exact."""
    torch.manual_seed(case.n_tokens)
    poison_all()
    layout = BlockLayout(case.n_tokens, case.text_start, case.text_size, case.block_size)
    wide = torch.randn(2, case.n_tokens, 3, case.dim + 16)  # tokens before heads, and gaps
    x = wide.transpose(1, 2)[..., : case.dim].half()
    order = torch.randperm(layout.n_visual) if case.reorder else None
    index = layout.to_canonical(order, x.device)

    mean, deviation, copied = pool_blocks.launch(
        x.to(device), None if order is None else index.to(device), layout.n_visual,
        layout.visual_start, case.block_size, deviation=case.deviation,
    )  # fmt: skip

    canonical = x[:, :, index]
    expected = pool(canonical[:, :, : layout.n_visual], layout.counts(x.device), case.block_size)
    spread = expected.deviation if deviation is None else deviation.cpu()
    return {
        "mean": float((mean.cpu() - expected.mean).abs().max()),
        "deviation": float((spread - expected.deviation).abs().max()),
        "copied": float(torch.equal(copied.cpu(), x if order is None else canonical)),
    }


def check_select(case: select_blocks.Case, device: str) -> dict[str, float]:
    """Return whether the lists are equal, and the largest differences of R and what is given."""
    torch.manual_seed(case.n_blocks)
    poison_all()
    n, block, dim = case.n_blocks, 16, 8
    layout = BlockLayout(n * block - 5, 0, 0, block)
    counts = layout.counts(torch.device("cpu"))
    q, k = (pool(torch.randn(2, 1, layout.n_visual, dim) * 2, counts, block) for _ in range(2))
    if case.ties:
        q, k = (type(s)(*(part.round() for part in s)) for s in (q, k))
    text_key, mask = torch.randn(2, 1, 5, dim), torch.ones(2, 5, dtype=torch.bool)
    if not case.text:
        mask[:] = False
    adjacency = torch.rand(n, n) < 0.1 if case.adjacency else None
    products = rectified_attention.pair_products(
        q, k, counts, gate=case.gate and case.mode != "sparse", center_keys=case.text
    )
    lse = rectified_attention.text_log_sum_exp(q.mean, text_key, None, 0.5) if case.text else None
    density = torch.tensor(case.density)
    options: tuple[Any, ...] = (layout.n_visual, block, case.top_p, case.mode, case.mass, 0.5)

    moved = Products(*(x if x is None else x.to(device) for x in products))
    found = select_blocks.launch(
        moved, *(x if x is None else x.to(device) for x in (lse, adjacency)), density.to(device),
        *options, is_causal=case.is_causal,
    )  # fmt: skip

    visible = visible_blocks(n, case.is_causal, q.mean.device)
    bias = log_counts(counts, case.is_causal)
    p, p_text = implicit_attention(q.mean, k.mean, bias, visible, text_key, mask, 0.5)
    own = torch.eye(n, dtype=torch.bool) if case.is_causal else torch.zeros(n, n, dtype=torch.bool)
    kept = own if adjacency is None else adjacency | own
    selected = select(p, p_text, density, case.top_p, kept, visible)
    given = visible & ~selected
    if products.dq is not None:
        given &= reference.passes_gate(q, k, counts, case.text)
    ratio, _ = rectification(p, p_text, selected, given, k.mean, case.mass)
    if case.mode != "paper":
        ratio = torch.ones_like(ratio)
    expected = p * given if case.mode == "paper" else counts.log().where(given, -torch.inf)
    return {
        "lists": float(lists_equal(found, selected)),
        "ratio": float((found.ratio[:-1].cpu() - ratio.flatten()).abs().max()),
        "given": 0.0 if found.given is None else difference(found.given.cpu(), expected),
        "text_row": float(
            found.n_visited[-1] == n and found.visited[-1].tolist() == list(range(n))
        ),
    }


def lists_equal(found: select_blocks.Selection, selected: Tensor) -> bool:
    """Tell whether every row lists what is selected, in ascending order."""
    counts, visited = found.n_visited.tolist(), found.visited.tolist()
    rows = selected.flatten(0, 2)
    return all(
        visited[i][: counts[i]] == row.nonzero()[:, 0].tolist() for i, row in enumerate(rows)
    )


def difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference; infinities must be the same."""
    finite = expected.isfinite()
    if not torch.equal(found[~finite], expected[~finite]):
        return float("inf")
    return float((found - expected)[finite].abs().max()) if finite.any() else 0.0


def attention_inputs(case: attend_blocks.Case) -> tuple[Any, ...]:
    """Return the arguments of the operator but the scale."""
    torch.manual_seed(case.n_tokens)
    shapes = [(len(case.text_len), h, case.n_tokens, case.dim) for h in (case.heads, case.kv_heads)]
    # Heads beside channels, as a linear leaves them.
    q, k, v = (
        torch.randn(b, s, h, d).to(case.dtype).transpose(1, 2)
        for b, h, s, d in (shapes[0], shapes[1], shapes[1])
    )
    n_visual = case.n_tokens - case.text_size
    text_len = torch.tensor(case.text_len, dtype=torch.int32) if case.text_size else None
    order = torch.randperm(n_visual) if case.reorder else None
    return (
        q, k, v, torch.tensor(case.density), text_len, order, None,
        0 if case.text_first else n_visual, case.text_size, case.block_size, 0.3, case.mode,
        "complement", case.mode == "paper", case.center_keys, case.is_causal,
    )  # fmt: skip


def check_attend(
    case: attend_blocks.Case, device: str, config: attend_blocks.Config | None = None
) -> dict[str, float]:
    """Return the largest differences of output and log-sum-exp, and the output's SQNR."""
    poison_all()
    args = attention_inputs(case)
    moved = [x.to(device) if isinstance(x, Tensor) else x for x in args]

    prepared = rectified_attention.prepare(*moved, case.dim**-0.5)
    out, lse = attend_blocks.launch(*prepared, is_causal=case.is_causal, config=config)

    expected, expected_lse = reference.rectified_attention(*args, None)
    assert out.stride() == expected.stride()
    return {
        "out": difference(out.cpu().float(), expected.float()),
        "lse": difference(lse.cpu(), expected_lse),
        "sqnr_db": sqnr_db(expected, out.cpu()),
    }


def assert_attends(case: attend_blocks.Case, found: dict[str, float]) -> None:
    """Assert what `check_attend` found: rounding of the dtype, for values of unit variance."""
    bound = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[case.dtype]
    assert found["out"] <= bound
    # Logits are exact products of narrow inputs, but pseudo-keys are rounded to their dtype.
    rounded = case.mode == "online" and case.dtype != torch.float32
    assert found["lse"] <= (bound if rounded else 1e-5)
