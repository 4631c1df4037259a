"""Each rewrite, before and after, and where it refuses."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxq.capturing import capture
from fxq.graph import is_op

ATEN = torch.ops.aten


class Wrap(nn.Module):
    """A function of its input and a few parameters as a model."""

    def __init__(self, function: object, **tensors: Tensor) -> None:
        super().__init__()
        self.function = function
        for name, value in tensors.items():
            self.register_buffer(name, value)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)  # type: ignore[operator]


class One(Wrap):
    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)  # type: ignore[operator]


class Three(Wrap):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.function(self, q, k, v)  # type: ignore[operator]


def rewritten(model: nn.Module, *inputs: Tensor) -> tuple[dict[str, int], list[object]]:
    """Capture, check that the result is the same, and return the counts and the operators left."""
    gm = capture(model.eval(), inputs, dynamic_shapes=None).graph_module
    (found,) = gm(*inputs)
    torch.testing.assert_close(found, model(*inputs), rtol=1e-5, atol=1e-6)
    targets = [n.target for n in gm.graph.nodes if n.op == "call_function"]
    return gm.meta["fxq_canonicalized"], targets


W, B = torch.randn(6, 4), torch.randn(4)
X = torch.randn(2, 3, 6)
LINEARS = {
    "addmm": (lambda m, x: torch.addmm(m.b, x.reshape(-1, 6), m.w), "linear_of_addmm"),
    "addmm of rows": (
        lambda m, x: torch.addmm(m.b, x.view(-1, 6), m.w).view(2, 3, 4),
        "linear_of_rows",
    ),
    "matmul": (lambda m, x: x @ m.w, "linear_of_matmul"),
    "matmul of a transpose": (lambda m, x: x @ m.wt.t(), "linear_of_matmul"),
    "matmul of .T": (lambda m, x: x @ m.wt.T, "linear_of_matmul"),
    "matmul of .mT": (lambda m, x: x @ m.wt.mT, "linear_of_matmul"),
    "matmul of .mH": (lambda m, x: x @ m.wt.mH, "linear_of_matmul"),
    "matmul and bias": (lambda m, x: x @ m.w + m.b, "linear_with_bias"),
    "bias first": (lambda m, x: m.b + F.linear(x, m.w.t()), "linear_with_bias"),
}


@pytest.mark.parametrize("name", LINEARS)
def test_products_with_a_constant_become_linear(name: str) -> None:
    function, rewrite = LINEARS[name]

    counts, targets = rewritten(One(function, w=W, b=B, wt=W.t().contiguous()), X)

    assert counts[rewrite] == 1
    assert targets.count(ATEN.linear.default) == 1
    assert ATEN.matmul.default not in targets
    assert ATEN.addmm.default not in targets
    assert ATEN.add.Tensor not in targets


def test_a_product_of_two_inputs_stays_a_matmul() -> None:
    _, targets = rewritten(
        Three(lambda m, q, k, v: q @ k + v), X, torch.randn(2, 6, 5), torch.ones(5)
    )

    assert targets.count(ATEN.matmul.default) == 1


def test_a_bias_of_another_shape_stays_an_addition() -> None:
    counts, targets = rewritten(One(lambda m, x: x @ m.w + m.b, w=W, b=torch.randn(3, 4)), X)

    assert "linear_with_bias" not in counts
    assert ATEN.add.Tensor in targets


def rms(m: nn.Module, x: Tensor) -> Tensor:
    return m.w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


NORMS = {
    "rsqrt": rms,
    "one plus weight": lambda m, x: (
        x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + m.w)
    ).type_as(x),
    "sqrt": lambda m, x: x / torch.sqrt(torch.mean(torch.square(x), -1, keepdim=True) + 1e-5) * m.w,
}


@pytest.mark.parametrize("name", NORMS)
def test_rms_norm_is_recognised(name: str) -> None:
    counts, targets = rewritten(One(NORMS[name], w=torch.randn(6)), X)

    assert counts["rms_norm"] == 1
    assert targets == [ATEN.rms_norm.default]


def test_a_native_batch_norm_is_a_batch_norm() -> None:
    names = ("weight", "bias", "mean", "variance")
    parts = {name: torch.rand(6) + 0.5 for name in names}
    native = ATEN._native_batch_norm_legit_no_training.default
    model = One(lambda m, x: native(x, *(getattr(m, n) for n in names), 0.1, 1e-3)[0], **parts)

    counts, targets = rewritten(model, torch.randn(2, 6, 3))

    assert counts["batch_norm_of_native"] == 1
    assert targets == [ATEN.batch_norm.default]


def test_rms_norm_in_fp32_between_casts_is_recognised() -> None:
    def gemma(m: nn.Module, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (wide * (1.0 + m.w.float())).to(x.dtype)

    counts, targets = rewritten(One(gemma, w=torch.randn(6).bfloat16()), X.bfloat16())

    assert counts["rms_norm"] == 1
    assert targets.count(ATEN.rms_norm.default) == 1
    assert len(targets) == 3  # a cast before, a cast after


def test_rms_norm_over_another_axis_or_in_half_precision_stays() -> None:
    over_tokens = One(
        lambda m, x: m.w * (x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6)), w=B[0]
    )
    half = One(rms, w=torch.randn(6).bfloat16())

    assert "rms_norm" not in rewritten(over_tokens, X)[0]
    assert "rms_norm" not in rewritten(half, X.bfloat16())[0]


ACTIVATIONS = {
    "gelu": (lambda m, x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))), ATEN.gelu.default),
    "gelu, other grouping": (
        lambda m, x: x * (0.5 * (1.0 + torch.erf(x * 0.7071067811865476))),
        ATEN.gelu.default,
    ),
    "tanh gelu": (
        lambda m, x: (
            0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x.pow(3.0))))
        ),
        ATEN.gelu.default,
    ),
    "silu": (lambda m, x: x * torch.sigmoid(x), ATEN.silu.default),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_recognised(name: str) -> None:
    function, target = ACTIVATIONS[name]

    _, targets = rewritten(One(function), X)

    assert targets == [target]


def test_quick_gelu_and_a_gate_stay() -> None:
    _, quick = rewritten(One(lambda m, x: x * torch.sigmoid(1.702 * x)), X)
    _, gate = rewritten(Three(lambda m, q, k, v: q * torch.sigmoid(k)), X, X + 1, X)

    assert ATEN.silu.default not in quick
    assert ATEN.silu.default not in gate


Q, K, V = (torch.randn(2, 3, 5, 8) for _ in range(3))
CAUSAL = torch.ones(5, 5, dtype=torch.bool).tril()
BIAS = torch.randn(1, 3, 5, 5)
ATTENTIONS = {
    "scores scaled": lambda m, q, k, v: (q @ k.transpose(-2, -1) / 8**0.5).softmax(-1) @ v,
    "query scaled": lambda m, q, k, v: ((q * 0.3) @ k.transpose(-2, -1)).softmax(-1) @ v,
    "bias": lambda m, q, k, v: ((q * 0.3) @ k.transpose(-2, -1) + m.bias).softmax(-1) @ v,
    "causal": lambda m, q, k, v: (
        torch.where(m.keep, q @ k.transpose(-2, -1) / 8**0.5, torch.finfo(q.dtype).min).softmax(-1)
        @ v
    ),
    "baddbmm": lambda m, q, k, v: torch.bmm(
        torch.baddbmm(
            q.new_empty(6, 5, 5), q.flatten(0, 1), k.flatten(0, 1).mT, beta=0, alpha=0.3
        ).softmax(-1),
        v.flatten(0, 1),
    ),
    "baddbmm with a mask": lambda m, q, k, v: torch.bmm(
        torch.baddbmm(
            m.windows[0, 0].expand(6, 5, 5), q.flatten(0, 1), k.flatten(0, 1).mT, alpha=0.3
        ).softmax(-1),
        v.flatten(0, 1),
    ),
    "windows": lambda m, q, k, v: (
        ((q @ k.transpose(-2, -1) + m.bias).view(1, 2, 3, 5, 5) + m.windows)
        .view(2, 3, 5, 5)
        .softmax(-1)
        @ v
    ),
}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_hand_written_attention_is_recognised(name: str) -> None:
    model = Three(ATTENTIONS[name], keep=CAUSAL, bias=BIAS, windows=torch.randn(1, 2, 1, 5, 5))

    counts, targets = rewritten(model, Q, K, V)

    assert counts["scaled_dot_product_attention"] == 1
    assert ATEN.softmax.int not in targets


REFUSED = {
    "mask scaled with the scores": lambda m, q, k, v: (
        ((q @ k.transpose(-2, -1) + m.bias) * 0.3).softmax(-1) @ v
    ),
    "softmax over queries": lambda m, q, k, v: (q @ k.transpose(-2, -1)).softmax(-2) @ v,
    "scores read elsewhere": lambda m, q, k, v: (
        (s := q @ k.transpose(-2, -1)).softmax(-1) @ v + s.mean()
    ),
    "probabilities read elsewhere": lambda m, q, k, v: (
        (p := (q @ k.transpose(-2, -1)).softmax(-1)) @ v + p.mean()
    ),
    "a query without a key": lambda m, q, k, v: (
        torch.where(m.none, q @ k.transpose(-2, -1), torch.finfo(q.dtype).min).softmax(-1) @ v
    ),
    "a mild mask": lambda m, q, k, v: (
        torch.where(m.keep, q @ k.transpose(-2, -1), -10.0).softmax(-1) @ v
    ),
    "softmax in another dtype": lambda m, q, k, v: (
        (q @ k.transpose(-2, -1)).softmax(-1, dtype=torch.float64).float() @ v
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_attention_that_is_not_provably_one_stays(name: str) -> None:
    none = CAUSAL.clone()
    none[2] = False
    model = Three(REFUSED[name], keep=CAUSAL, bias=BIAS, none=none)

    counts, _ = rewritten(model, Q, K, V)

    assert "scaled_dot_product_attention" not in counts


def test_eval_dropout_and_casts_to_the_same_dtype_go() -> None:
    model = nn.Sequential(nn.Dropout(0.5), One(lambda m, x: x.to(torch.float32).detach() + 1.0))
    gm = capture(model.eval(), X).graph_module

    assert [n.target for n in gm.graph.nodes if n.op == "call_function"] == [ATEN.add.Tensor]


def test_a_constant_that_is_written_to_is_copied_first() -> None:
    def count_up(m: nn.Module, x: Tensor) -> Tensor:
        start = torch.tensor([1.0])
        start.add_(1.0)
        return x + start

    gm = capture(One(count_up).eval(), X).graph_module

    assert torch.equal(gm(X)[0], X + 2.0)
    assert torch.equal(gm(X)[0], X + 2.0)  # and again


def test_the_transpose_of_a_constant_costs_no_copy() -> None:
    model = One(lambda m, x: x @ m.w, w=W.clone()).eval()

    gm = capture(model, X).graph_module

    (linear,) = [n for n in gm.graph.nodes if is_op(n, ATEN.linear.default)]
    assert is_op(linear.args[1], ATEN.permute.default)
    assert gm.w.data_ptr() == model.w.data_ptr()
