"""Attention on a cache's int8 codes: the op against its definition in float64, written again, and
programs lowered with it against the model in eager float."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from poison import poisoned
from torch import Tensor, nn
from torch.library import opcheck

import fxq
from fxq.cache_codes import NOT_FINITE
from fxq.lowering.cache_attention import reference
from fxq.lowering.cpu import cache_attention as on_cpu
from fxq.lowering.cpu.native import native
from fxq.lowering.kernels import buffers
from fxq.lowering.lower import lower
from fxq.numerics import sqnr_db
from fxq.passes.common import QuantizeCache
from fxq.pipeline import Recipe

CPU = torch.device("cpu")
INT8 = Recipe("int8_cache", (QuantizeCache(),))
op = torch.ops.fxq.cache_attention
needs_native = pytest.mark.skipif(
    isinstance(native("cache_attention"), str), reason=str(native("cache_attention"))
)
# B, H, G, T, L, D, E. Queries that share keys are taken by fours, twos and ones; positions by
# fours, twos and ones, and in blocks of 128; channels of values by 64, 32, 16 and 8.
SHAPES = [
    (1, 1, 1, 1, 1, 8, 8), (2, 4, 2, 1, 16, 16, 16), (2, 4, 2, 3, 37, 64, 72),
    (1, 8, 1, 1, 130, 80, 48), (3, 3, 3, 2, 300, 24, 136), (1, 7, 1, 1, 129, 8, 40),
    (1, 2, 2, 5, 40, 72, 64), (0, 2, 1, 1, 4, 8, 8), (1, 2, 1, 0, 4, 8, 8),
]  # fmt: skip


def case(b: int, h: int, g: int, t: int, length: int, d: int, e: int) -> tuple[Tensor, ...]:
    """Return query, codes and scales."""
    keys, values = (torch.randint(-127, 128, (b, g, length, n)).to(torch.int8) for n in (d, e))
    scales = (torch.rand(1, g, 1, n) / 64 + 1e-3 for n in (d, e))
    return torch.randn(b, h, t, d), keys, next(scales), values, next(scales)


def masks(b: int, h: int, t: int, length: int) -> dict[str, Tensor | None]:
    some = torch.rand(b, 1, t, length) > 0.6
    nothing = torch.zeros(1, 1, t, length, dtype=torch.bool)
    middle = nothing.clone()
    middle[..., length // 3 : length // 2 + 1] = True
    added = torch.randn(b, h, t, length)
    return {
        "none": None,
        "some": some,
        "nothing": nothing,
        "middle": middle,
        "causal": torch.arange(length) <= torch.arange(t)[:, None],
        "of keys": torch.rand(b, 1, 1, length) > 0.2,
        "of queries": torch.rand(b, 1, t, 1) > 0.3,
        "added": added,
        "added, hidden": added.masked_fill(~some, -torch.inf),
    }


def in_float64(
    query: Tensor, keys: Tensor, k_scale: Tensor, values: Tensor, v_scale: Tensor,
    mask: Tensor | None, scale: float,
) -> Tensor:  # fmt: skip
    """The definition, written again."""
    k, v = keys.double() * k_scale.double(), values.double() * v_scale.double()
    k, v = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = scale * query.double() @ k.mT
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask.double()
    weights = (scores - scores.amax(-1, keepdim=True).clamp(min=-1e30)).exp()
    return weights @ v / weights.sum(-1, keepdim=True).clamp(min=1e-300)


@needs_native
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_and_reference_give_the_definition(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buffers, "allocate", poisoned)
    parts = case(*shape)
    for name, mask in masks(shape[0], shape[1], shape[3], shape[4]).items():
        expected = in_float64(*parts, mask, 0.3)
        for compute in (op, reference):
            found = compute(*parts, mask, 0.3)

            assert found.shape == expected.shape
            if name == "nothing":
                assert torch.equal(found, torch.zeros_like(found))
            else:
                assert found.numel() == 0 or sqnr_db(expected, found) > 120, (name, compute)


@needs_native
def test_threads_share_the_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "allocate", poisoned)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    parts = case(2, 10, 2, 1, 1500, 64, 64)

    assert sqnr_db(in_float64(*parts, None, 0.2), op(*parts, None, 0.2)) > 120


@needs_native
def test_many_queries_are_the_definitions(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = case(1, 4, 2, on_cpu.MOST_ROWS // 2 + 1, 50, 16, 16)
    monkeypatch.setattr("fxq.lowering.cache_attention.launch", None)

    assert sqnr_db(in_float64(*parts, None, 0.2), op(*parts, None, 0.2)) > 120


@needs_native
def test_any_strides() -> None:
    query, keys, k_scale, values, v_scale = case(2, 4, 2, 3, 20, 16, 24)
    mask = torch.rand(2, 1, 3, 20) > 0.5
    expected = in_float64(query, keys, k_scale, values, v_scale, mask, 0.5)
    layouts: list[Callable[[Tensor], Tensor]] = [
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: x.mT.contiguous().mT,
        lambda x: torch.stack([x, x], -1)[..., 1],
        lambda x: torch.cat([x, x], 2)[:, :, x.shape[2] :],
    ]

    for turn in layouts:
        found = op(turn(query), turn(keys), turn(k_scale), turn(values), turn(v_scale),
                   turn(mask), 0.5)  # fmt: skip

        assert sqnr_db(expected, found) > 120


@needs_native
@pytest.mark.parametrize("compute", [op, reference], ids=["kernel", "reference"])
@pytest.mark.parametrize("width", [8, 72], ids=["a vector", "more"])
def test_what_is_not_finite_spoils_its_head_or_channel(compute: Any, width: int) -> None:
    query, keys, k_scale, values, v_scale = case(2, 4, 2, 2, 9, width, width)
    mask = (torch.arange(9) < 5)[None]
    keys[0, 1, 7, width - 3] = NOT_FINITE  # hidden, and read all the same
    values[1, 0, 8, 5] = values[1, 0, 0, width - 1] = NOT_FINITE

    found = compute(query, keys, k_scale, values, v_scale, mask, 0.5)

    spoilt = torch.zeros_like(found, dtype=torch.bool)
    spoilt[0, 2:] = True
    spoilt[1, :2, :, [5, width - 1]] = True
    assert torch.equal(found.isnan(), spoilt)


@needs_native
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_query_that_is_not_finite_gives_nan(value: float) -> None:
    query, *rest = case(1, 6, 2, 1, 20, 16, 16)
    query[0, 1, 0, 3] = value

    found = op(query, *rest, None, 0.5)

    assert found[0, 1].isnan().all()
    assert found[0, [0, 2, 3, 4, 5]].isfinite().all()


@needs_native
@pytest.mark.parametrize("mask", ["none", "some", "added"])
def test_opcheck(mask: str) -> None:
    opcheck(op.default, (*case(2, 4, 2, 1, 6, 8, 16), masks(2, 4, 1, 6)[mask], 0.5))


class Layout:
    """How a cache lies, and how attention gets [B, H, T, D] from it."""

    def __init__(self, name: str, axis: int, moved: Callable[[Tensor, int], Tensor]) -> None:
        self.name, self.axis, self.moved = name, axis, moved


def expanded(x: Tensor, n: int) -> Tensor:
    return x[:, :, None].expand(-1, -1, n, -1, -1).flatten(1, 2)


LENGTH, HEADS, SHARED, WIDTH = 12, 4, 2, 8
LAYOUTS = [
    Layout("heads first", 2, lambda x, n: x.repeat_interleave(n, 1)),
    Layout("repeated by a view", 2, expanded),
    Layout("tokens first", 1, lambda x, n: x.transpose(1, 2).repeat_interleave(n, dim=1)),
    Layout("permuted", 1, lambda x, n: expanded(x.permute(0, 2, 1, 3).contiguous(), n)),
    Layout("from the end", 1, lambda x, n: x.transpose(1, 2).repeat_interleave(n, dim=-3)),
    Layout("a part", 2, lambda x, n: x[:, :, 1:9].repeat_interleave(n, 1)),
]
OTHERS = {
    "repeated in turn": lambda x, n: x.repeat(1, n, 1, 1),
    "in turn by a view": lambda x, n: x[:, None].expand(-1, n, -1, -1, -1).flatten(1, 2),
    "flipped": lambda x, n: x.flip(2).repeat_interleave(n, 1),
}


class Attends(nn.Module):
    """Attention over caches that lie in some way."""

    keys: Tensor
    values: Tensor

    def __init__(self, axis: int, moved: Callable[[Tensor, int], Tensor], **kwargs: Any) -> None:
        super().__init__()
        self.axis, self.moved, self.kwargs = axis, moved, kwargs
        width = kwargs.pop("width", WIDTH)
        self.q = nn.Linear(16, HEADS * width)
        self.kv = nn.Linear(16, 2 * SHARED * width)
        shape = [2, SHARED, LENGTH, width] if axis == 2 else [2, LENGTH, SHARED, width]
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(shape))
        self.eval()

    def forward(self, x: Tensor, place: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, SHARED, -1)).unbind(2)
        for cache, rows in ((self.keys, k), (self.values, v)):
            cache.index_copy_(self.axis, place, rows if self.axis == 1 else rows.transpose(1, 2))
        k, v = (self.moved(x, HEADS // SHARED) for x in (self.keys, self.values))
        return nn.functional.scaled_dot_product_attention(q, k, v, **self.kwargs)


def steps(scale: float = 1.0) -> list[tuple[Tensor, Tensor]]:
    return [(scale * torch.randn(2, 1, 16), torch.tensor([i])) for i in range(LENGTH)]


def compressed(model: nn.Module) -> fxq.Program:
    data = steps()
    return fxq.compress(model, data[0], INT8, data, dynamic_shapes=None)


@needs_native
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_attention_reads_codes_however_a_cache_lies(layout: Layout) -> None:
    model, own = Attends(layout.axis, layout.moved), steps(0.5)
    judge = deepcopy(model)

    program = compressed(model)
    lowered, decisions = lower(program.graph_module, CPU)

    assert [d.kernel for d in decisions.values()] == ["cache_attention (AVX2)"]
    assert not any("masked_fill" in node.name for node in lowered.graph.nodes)
    assert "cache_attention (AVX2)" in str(fxq.report(program))
    with torch.no_grad():
        assert all(fxq.verify(program, step).ok for step in own)
        exact, found = (torch.stack([run(*step) for step in own]) for run in (judge, program))
    assert sqnr_db(exact, found) > 28  # measured 30 and 31: first steps attend to few rows


@needs_native
def test_heads_that_the_operator_shares_are_shared() -> None:
    model, own = Attends(2, lambda x, _: x, enable_gqa=True), steps(0.5)
    judge = deepcopy(model)

    program = compressed(model)

    (decision,) = lower(program.graph_module, CPU)[1].values()
    assert decision.kernel == "cache_attention (AVX2)"
    with torch.no_grad():
        assert all(fxq.verify(program, step).ok for step in own)
        exact, found = (torch.stack([run(*step) for step in own]) for run in (judge, program))
    assert sqnr_db(exact, found) > 28


@needs_native
def test_a_compiled_step_is_the_simulated_one() -> None:
    layout, own = LAYOUTS[2], steps(0.5)
    program = compressed(Attends(layout.axis, layout.moved))

    with torch.no_grad():
        simulated = torch.stack([program(*step) for step in own])
        program.reset()
        fast = torch.compile(program, backend="fxq")
        found = torch.stack([fast(*step) for step in own])

    assert sqnr_db(simulated, found) > 120


@needs_native
@pytest.mark.parametrize(
    ("model", "why"),
    [
        (Attends(2, LAYOUTS[0].moved, width=12), "heads of 12 and 12 channels"),
        (Attends(2, LAYOUTS[0].moved, is_causal=True), "neither is_causal nor dropout"),
    ],
    ids=["narrow", "causal"],
)
def test_what_the_kernel_does_not_take_says_why(model: Attends, why: str) -> None:
    _, decisions = lower(compressed(model).graph_module, CPU)

    (decision,) = decisions.values()
    assert decision.kernel is None
    assert decision.reason.startswith("every call makes a float copy of its cache: ")
    assert why in decision.reason


@needs_native
@pytest.mark.parametrize("name", OTHERS)
def test_heads_in_another_order_stay_float(name: str) -> None:
    program = compressed(Attends(2, OTHERS[name]))

    lowered, decisions = lower(program.graph_module, CPU)

    assert decisions == {}
    assert not any("cache_attention" in node.name for node in lowered.graph.nodes)
