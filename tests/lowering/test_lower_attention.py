"""The rule for sparse attention: which engine, why, and that each computes the definition. The op
runs on its reference where there is no GPU."""

import functools
from typing import Any

import pytest
import torch
from sparse_attention import compressed
from torch import Tensor
from torch.fx import GraphModule
from torch.library import opcheck
from torch.nn.attention.flex_attention import flex_attention

import fxq
from fxq import verifying
from fxq.dialect import LOWERED
from fxq.graph import is_op
from fxq.lowering import flex_attention as flex
from fxq.lowering.devices.cuda import MAX_BLOCKS
from fxq.lowering.lower import lower
from fxq.lowering.lower_attention import min_attention_sqnr_db
from fxq.lowering.rule import Decision
from fxq.rectified_attention.reference import rectified_attention

LOWERED_OP = torch.ops.fxq.lowered_attention
CUDA = torch.device("cuda")
BF16 = torch.bfloat16


def decide(
    shape: tuple[int, ...] = (1, 2, 256, 64), dtype: torch.dtype = BF16, **options: Any
) -> tuple[GraphModule, Decision]:
    """Return what the rule makes of one attention on CUDA."""
    program = compressed(shape, dtype, **{"block_size": 128} | options)
    lowered, decisions = lower(program.graph_module, CUDA)
    (decision,) = decisions.values()
    return lowered, decision


def engines(lowered: GraphModule) -> list[str]:
    return [n.args[-1] for n in lowered.graph.nodes if is_op(n, LOWERED_OP.default)]


@pytest.mark.parametrize("mode", ["paper", "online", "sparse"])
@pytest.mark.parametrize("dim", [64, 80, 96, 128])
def test_our_kernel_takes_common_attention(dim: int, mode: str) -> None:
    lowered, decision = decide((1, 2, 256, dim), mode=mode)

    assert decision == Decision("rectified_attention (Triton)")
    assert engines(lowered) == ["triton"]
    LOWERED.check(lowered)


@pytest.mark.parametrize(
    ("shape", "dtype", "options", "reason"),
    [
        ((1, 2, 256, 64), torch.float32, {}, "float16 and bfloat16, found torch.float32"),
        ((1, 2, 256, 256), BF16, {}, "head dims of 16 to 128 by 16, found 256"),
        ((1, 2, 256, 24), BF16, {}, "head dims of 16 to 128 by 16, found 24"),
        ((1, 2, 256, 72), BF16, {}, "head dims of 16 to 128 by 16, found 72"),
        ((1, 2, 512, 64), BF16, {"block_size": 256}, "blocks of 64 or 128 tokens, found 256"),
        ((1, 2, 256, 64), BF16, {"scale": -1.0}, "positive scale, found -1.0"),
    ],
)
def test_flex_attention_takes_what_our_kernel_declines(
    shape: tuple[int, ...], dtype: torch.dtype, options: dict[str, Any], reason: str
) -> None:
    lowered, decision = decide(shape, dtype, **options)

    assert decision.kernel == "rectified_attention (FlexAttention)"
    assert reason in decision.reason
    assert engines(lowered) == ["flex"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"mode": "online"}, "FlexAttention: it knows no pseudo-keys"),
        ({"is_causal": True}, "FlexAttention: blocks visited in part"),
        ({"block_size": 32}, "multiples of 128 tokens, found 32"),
    ],
)
def test_the_reference_takes_the_rest_and_says_why(options: dict[str, Any], reason: str) -> None:
    lowered, decision = decide(dtype=torch.float32, **options)

    assert decision.kernel is None
    assert "the kernel is for" in decision.reason
    assert reason in decision.reason
    assert engines(lowered) == []


def test_the_limits_of_the_rule_are_those_of_the_kernel() -> None:
    kernel = pytest.importorskip("fxq.lowering.kernels.select_blocks")

    assert kernel.MAX_BLOCKS == MAX_BLOCKS


def test_on_a_cpu_the_definition_is_the_kernel_and_the_report_says_so() -> None:
    (row,) = fxq.report(compressed()).rows

    assert (row.status, row.kernel) == ("lowered", "rectified_attention (torch)")
    assert "visited blocks only" in row.reason


def test_other_devices_have_no_kernel() -> None:
    _, decisions = lower(compressed().graph_module, torch.device("mps"))

    (decision,) = decisions.values()
    assert decision == Decision(None, "the reference: no kernel for mps")


def test_lowered_graph_computes_what_was_simulated() -> None:
    program = compressed((2, 2, 256, 64), BF16, block_size=128)
    x = torch.randn(2, 2, 256, 64, dtype=BF16)

    lowered, _ = lower(program.graph_module, CUDA)

    assert torch.equal(lowered(x)[0], program(x))


@pytest.mark.parametrize("engine", ["triton", "flex"])
def test_op_passes_opcheck(engine: str) -> None:
    q = torch.randn(2, 2, 37, 8)
    text_len = torch.tensor([5, 0], dtype=torch.int32)
    rest = (0, 5, 4, 0.3, "paper", "complement", True, False, False, None, engine)

    opcheck(LOWERED_OP, (q, q, q, torch.tensor(0.3), text_len, None, None, *rest))


def test_an_unknown_engine_is_refused() -> None:
    q = torch.randn(1, 1, 8, 8)
    rest = (0, 0, 4, 0.3, "paper", "complement", True, False, False, None, "cutlass")

    with pytest.raises(ValueError, match="engine: expected one of"):
        LOWERED_OP(q, q, q, torch.tensor(0.3), None, None, None, *rest)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("mode", ["paper", "sparse"])
@pytest.mark.parametrize(("text_start", "text_size"), [(0, 0), (0, 11), (64, 11), (0, 75)], ids=str)
def test_flex_attention_equals_the_definition(text_start: int, text_size: int, mode: str) -> None:
    q = torch.randn(2, 4, 75, 16)
    k, v = torch.randn(2, 2, 2, 75, 16)
    text_len = torch.tensor([text_size // 2, 0], dtype=torch.int32)
    order = torch.randperm(75 - text_size)
    args = (q, k, v, torch.tensor(0.3), text_len, order, None, text_start, text_size, 16, 0.3, mode)

    out, lse = flex.launch(*args, "complement", True, False, scale=0.25, attention=flex_attention)

    expected, expected_lse = rectified_attention(*args, "complement", True, False, False, 0.25)
    assert float((out - expected).abs().max()) <= 2e-6
    finite = expected_lse.isfinite()
    assert torch.equal(lse[~finite], expected_lse[~finite])
    torch.testing.assert_close(lse[finite], expected_lse[finite], rtol=0, atol=2e-6)


def verified(monkeypatch: pytest.MonkeyPatch, lowered_op: Any) -> verifying.NodeCheck:
    """Verify a program lowered for CUDA, with `lowered_op` as the kernel."""
    program = compressed((1, 2, 256, 64), BF16, block_size=128)

    def for_cuda(gm: GraphModule, *_: Any) -> Any:
        lowered, decisions = lower(gm, CUDA)
        for node in lowered.graph.nodes:
            if is_op(node, LOWERED_OP.default):
                node.meta["kernel"] = lowered_op
        return lowered, decisions

    monkeypatch.setattr(verifying, "lower", for_cuda)
    computed = verifying._Replay._computed

    def replayed(self: Any, node: Any) -> Any:
        found = computed(self, node)
        return node.meta["kernel"](*found) if "kernel" in node.meta else found

    monkeypatch.setattr(verifying._Replay, "_computed", replayed)
    (check,) = fxq.verify(program, torch.randn(1, 2, 256, 64, dtype=BF16)).checks
    return check


def noisy(out: Tensor, lse: Tensor, share: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(out.shape, generator=generator) * out.float().std() * share
    return (out.float() + noise).to(out.dtype), lse


def test_verify_accepts_rounding_of_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    check = verified(monkeypatch, functools.partial(noisy, share=2.0**-8))

    assert check.ok
    assert check.kernel == "fxq.lowered_attention"
    assert 36 < check.sqnr_db < 60


def test_verify_refuses_attention_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    check = verified(monkeypatch, functools.partial(noisy, share=0.03))

    assert not check.ok
    assert check.sqnr_db < 36


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float16, 54.2), (BF16, 36.1), (torch.float32, 120.0)], ids=str
)
def test_bounds_on_attention_follow_from_the_dtype(dtype: torch.dtype, bound: float) -> None:
    assert min_attention_sqnr_db(dtype) == pytest.approx(bound, abs=0.1)
