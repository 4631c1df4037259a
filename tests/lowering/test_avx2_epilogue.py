"""The epilogue of products on x86 without VNNI: bit-equal to the definition where it has no
activation function, codes included; and what the rule for them takes in."""

import math
from typing import Any

import pytest
import torch
from models import Block
from poison import poisoned
from torch import Tensor, nn

import fxq
from fxq.graph import is_op
from fxq.lowering.cpu.native import native
from fxq.lowering.cpu.onednn import cpu_int8
from fxq.lowering.devices import x86
from fxq.lowering.int8_linear import ACTIVATIONS, activate, reference
from fxq.lowering.kernels import buffers
from fxq.lowering.lower import lower
from fxq.lowering.rule import MAX_ROUNDED_SHARE
from fxq.numerics import sqnr_db
from fxq.passes import recommended, w8a8
from fxq.passes.common import SeparateOutliers

CPU = torch.device("cpu")
OPS = torch.ops.fxq
pytestmark = pytest.mark.skipif(
    not cpu_int8().saturates or isinstance(native("avx2_linear"), str),
    reason="needs AVX2 without VNNI, and a compiler",
)
SHAPES = [(1, 1, 1), (7, 33, 65), (13, 24, 31), (0, 16, 32), (100, 48, 96)]  # M, N, K
LARGEST = {4: 8, 8: 64}  # |w| of codes: any two are pair-safe


@pytest.fixture(autouse=True)
def _everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs start as poison, and small products are lowered too."""
    monkeypatch.setattr(buffers, "allocate", poisoned)
    monkeypatch.setattr(x86, "WITHOUT_VNNI", x86.Thresholds(0, 0))


def product(shape: tuple[int, int, int], dtype: torch.dtype, bits: int, rows: bool) -> list[Any]:
    """The op's arguments to the bias; with one scale, or one for each row."""
    m, n, k = shape
    low, high = (0, 256) if dtype == torch.uint8 else (-128, 128)
    count = m if rows else 1
    x, largest = torch.randint(low, high, (m, k)).to(dtype), LARGEST[bits]
    w = torch.randint(-largest, largest + 1, (n, k)).to(torch.int8)
    zero = torch.randint(low, high, (count, 1), dtype=torch.int32)
    scale = (torch.rand(count, 1) + 0.5) / (100 * largest * math.sqrt(k))
    return [x, scale, zero, w, torch.rand(n, 1) + 0.5, torch.randn(n)]


def outputs(m: int, n: int) -> dict[str, tuple[Any, ...]]:
    """The op's arguments from the residual on."""
    one, channels, rows = torch.tensor([[0.021]]), torch.rand(1, n) + 0.01, torch.rand(m, 1) + 0.01
    zero = torch.tensor([[7]], dtype=torch.int32)
    row_zero = torch.randint(-128, 128, (m, 1), dtype=torch.int32)
    return {
        "fp32": (None, None, None, -128, 127),
        "fp32, residual": (torch.randn(m, n), None, None, -128, 127),
        "int8": (None, one, zero, -128, 127),
        "uint8, residual": (torch.randn(m, n), one, zero + 120, 0, 255),
        "7 bits, per channel, strided residual": (
            torch.randn(n, m).T, channels, zero.expand(1, n).contiguous(), -64, 63,
        ),
        "per row": (None, rows, row_zero, -128, 127),
        "uint8, per row, no zero-point": (None, rows, None, 0, 255),
    }  # fmt: skip


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_without_activation_it_is_bit_equal_to_the_definition(
    shape: tuple[int, int, int], dtype: torch.dtype, bits: int
) -> None:
    for rows in (False, True):
        args = product(shape, dtype, bits, rows)
        for name, tail in outputs(*shape[:2]).items():
            whole = (*args, torch.float32, "none", *tail)

            found, expected = OPS.int8_linear(*whole), reference(*whole)

            assert found.dtype == expected.dtype, name
            assert torch.equal(found, expected), name


def test_more_axes_misaligned_and_strided() -> None:
    x, scale, _, w, w_scale, bias = product((12, 20, 33), torch.uint8, 8, False)
    memory = torch.zeros(4 * 12 * 20 + 3)[3:]  # 12 bytes off a vector's alignment
    residual = memory[: 12 * 20].normal_().view(3, 4, 20)
    tokens = torch.rand(1, 4, 1) + 0.5
    zeros = torch.randint(0, 256, (1, 4, 1), dtype=torch.int32)
    for codes in (x.view(3, 4, 33), x.view(4, 3, 33).transpose(0, 1)):
        for out_scale, out_zero in ((None, None), (tokens, zeros - 100), (tokens, None)):
            args = (codes, scale * tokens, zeros, w, w_scale, bias, torch.float32, "none")
            tail = (residual, out_scale, out_zero, -128, 127)

            assert torch.equal(OPS.int8_linear(*args, *tail), reference(*args, *tail))


@pytest.mark.parametrize("n_apart", [1, 3, 16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_channels_without_codes_are_added_before_the_activation(
    shape: tuple[int, int, int], n_apart: int
) -> None:
    m, n, _ = shape
    args = product(shape, torch.uint8, 8, True)
    few = {"apart": torch.randn(n_apart, m).T * 20, "w_apart": torch.randn(n, n_apart)}
    for activation in ("none", "gelu"):
        for name in ("fp32", "fp32, residual"):
            whole = (*args, torch.float32, activation, *outputs(m, n)[name])

            found, expected = OPS.int8_linear(*whole, **few), reference(*whole, **few)

            torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-5)
            assert m == 0 or not torch.allclose(found, reference(*whole), atol=1e-2)
    whole = (*args, torch.float32, "none", *outputs(m, n)["int8"])
    steps = (OPS.int8_linear(*whole, **few).int() - reference(*whole, **few).int()).abs()
    assert int(steps.max()) <= 1 if m else steps.numel() == 0


def test_channels_without_codes_have_rows_of_their_own_and_stay_not_finite() -> None:
    args = product((12, 20, 33), torch.uint8, 8, False)
    args[0] = args[0].view(3, 4, 33)
    few = torch.randn(3, 4, 2)
    few[1, 2, 0], few[2, 0, 1] = math.nan, math.inf

    found = OPS.int8_linear(*args, torch.float32, apart=few, w_apart=torch.ones(20, 2))

    bad = torch.zeros(3, 4, dtype=torch.bool)
    bad[1, 2] = bad[2, 0] = True
    assert torch.equal(found.isfinite().all(-1), ~bad)
    assert torch.equal(found.isfinite().any(-1), ~bad)


def test_threads_give_the_same() -> None:
    args = product((400, 200, 128), torch.uint8, 8, True)
    whole = (*args, torch.float32, "gelu", *outputs(400, 200)["uint8, residual"])
    before = torch.get_num_threads()
    found = []
    try:
        for n_threads in (1, 2):
            torch.set_num_threads(n_threads)
            found.append(OPS.int8_linear(*whole))
    finally:
        torch.set_num_threads(before)

    assert torch.equal(*found)


def activated(values: Tensor, activation: str) -> Tensor:
    """The kernel's function of `values` `[M]`: rows of one input channel, whose code is 1."""
    ones = torch.ones(len(values), 1, dtype=torch.uint8)
    w, one = torch.tensor([[1]], dtype=torch.int8), torch.ones(1, 1)
    args = (ones, values[:, None], None, w, one, None, torch.float32, activation)
    return OPS.int8_linear(*args)[:, 0]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_those_of_torch(activation: str) -> None:
    fine, coarse = torch.linspace(-12, 12, 200_001), torch.logspace(-30, 30, 10_001)
    values = torch.cat([fine, coarse, -coarse])

    found = activated(values, activation)

    exact = activate(values.double(), activation)
    error = (found.double() - exact).abs() / values.abs().clamp(min=1e-30)
    assert float(error.max()) <= 4e-7
    assert sqnr_db(activate(fine, activation), found[: len(fine)]) >= 120


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_is_not_finite_stays_so(activation: str) -> None:
    values = torch.tensor([math.nan, math.inf, -math.inf, 1.0, -3e38, 3e38, -100.0, -88.5, 0.0])

    found = activated(values, activation)

    expected = activate(values, activation)
    torch.testing.assert_close(found, expected, equal_nan=True, rtol=1e-6, atol=1e-36)


@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
def test_codes_of_activations_differ_by_rounding_only(activation: str) -> None:
    args = product((300, 200, 256), torch.uint8, 8, True)
    for name in ("int8", "per row", "uint8, residual"):
        whole = (*args, torch.float32, activation, *outputs(300, 200)[name])

        steps = (OPS.int8_linear(*whole).int() - reference(*whole).int()).abs()

        assert int(steps.max()) <= 1
        assert float((steps > 0).float().mean()) <= MAX_ROUNDED_SHARE


def test_a_narrower_result_is_rounded_once() -> None:
    args = product((20, 24, 64), torch.uint8, 8, True)

    found = OPS.int8_linear(*args, torch.bfloat16, "none")

    assert torch.equal(found, reference(*args, torch.bfloat16, "none"))


def lowered_of(model: nn.Module, recipe: fxq.Recipe, x: Tensor) -> tuple[Any, list[Any]]:
    """The verified program, and the arguments of its kernels from the activation function on."""
    data = [torch.randn_like(x) for _ in range(2)]
    program = fxq.compress(model.eval(), x, recipe, data if recipe.needs_data else None)
    gm, decisions = lower(program.graph_module, CPU)
    assert {decision.kernel for decision in decisions.values()} == {"int8_linear (AVX2)"}
    checked = fxq.verify(program, x)
    assert checked.ok
    assert all(check.accumulators_equal for check in checked.checks)
    assert sqnr_db(program(x), gm(x)[0]) > 60
    kernels = [node for node in gm.graph.nodes if is_op(node, OPS.int8_linear.default)]
    return gm, [node.args[7:] for node in kernels]


@pytest.mark.parametrize(
    ("recipe", "codes"), [(w8a8.STATIC, 1), (w8a8.STATIC_PER_TOKEN, 1), (w8a8.DYNAMIC, 0)],
    ids=lambda value: getattr(value, "name", value),
)  # fmt: skip
def test_a_block_has_no_passes_of_its_own_after_products(recipe: fxq.Recipe, codes: int) -> None:
    torch.manual_seed(0)

    gm, kernels = lowered_of(Block(), recipe, torch.randn(2, 9, 64))

    aten = torch.ops.aten
    left = (aten.linear.default, aten.gelu.default, aten.add.Tensor, aten.mul.Tensor)
    assert not [node for node in gm.graph.nodes if is_op(node, *left)]
    assert [args[0] for args in kernels].count("gelu") == 1
    assert len([args for args in kernels if args[1] is not None]) == 2  # residuals
    assert len([args for args in kernels if len(args) > 2]) == codes
    if recipe is w8a8.STATIC_PER_TOKEN:
        (fused,) = [args for args in kernels if len(args) > 2]
        assert fused[2].meta["val"].shape == (1, 9, 1)


def test_separated_outliers_are_part_of_the_product() -> None:
    torch.manual_seed(0)
    model, x = Block(), torch.randn(8, 9, 64)
    with torch.no_grad():
        model.norm.weight[5] = 300.0  # in what q, k and v read
        for layer in (model.q, model.k, model.v):
            layer.weight[:, 5] /= 300
        model.proj.bias[7] = 300.0  # in what `up` reads
        model.up.weight[:, 7] /= 300
        model.up.weight[:2] *= 300  # in what `down` reads
        model.down.weight[:, :2] /= 300

    gm, kernels = lowered_of(model, recommended.W8A8, x)

    found = [node.kwargs for node in gm.graph.nodes if is_op(node, OPS.int8_linear.default)]
    assert [set(few) == {"apart", "w_apart"} for few in found] == [
        True,
        True,
        True,
        False,
        True,
        True,
    ]
    aten = torch.ops.aten
    assert not [node for node in gm.graph.nodes if is_op(node, aten.linear.default)]
    assert [args[0] for args in kernels].count("gelu") == 1


def test_codes_of_what_has_channels_apart_say_where_it_is_not_finite() -> None:
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32))
    x = torch.randn(256, 64)
    x[:, 5] *= 300
    with torch.no_grad():
        model[0].weight[:, 5] *= 20  # type: ignore[operator, index]
    steps = (SeparateOutliers(w8a8.STATIC_LAYER), *w8a8.STATIC.passes)
    simulated = fxq.compress(model.eval(), x, fxq.Recipe("apart", steps), [x]).graph_module
    gm, _ = lower(simulated, CPU)

    first, _ = [node for node in gm.graph.nodes if is_op(node, OPS.int8_linear.default)]
    assert "apart" in first.kwargs
    assert len(first.args) > 9  # codes come out of it
    x[0, 5], x[1, 5], x[2, 5], x[3, 6] = 3e38, math.inf, math.nan, math.inf
    x[4, 5] = 1e30
    expected, found = simulated(x)[0], gm(x)[0]
    assert expected[:4].isnan().all(-1).tolist() == [True] * 4
    assert torch.equal(found.isnan(), expected.isnan())
    assert sqnr_db(expected[4:], found[4:]) > 60


class Readers(nn.Module):
    """Products whose results are read more than once, added to what has another shape, and added
    to a multiple."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(64, 64) for _ in range(4))
        self.row = nn.Parameter(torch.randn(64))

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        b = self.b(nn.functional.gelu(a)) * a
        c = self.row + self.c(b)
        return torch.add(self.d(c), x, alpha=2)


def test_what_has_other_readers_or_shapes_stays_outside() -> None:
    torch.manual_seed(0)

    _, kernels = lowered_of(Readers(), w8a8.STATIC, torch.randn(2, 9, 64))

    assert kernels == [("none", None)] * 4


def test_what_a_cast_rounds_stays_outside() -> None:
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU()).bfloat16().eval()
    x = torch.randn(4, 64, dtype=torch.bfloat16)
    program = fxq.compress(model, x, w8a8.DYNAMIC)

    gm, _ = lower(program.graph_module, CPU)

    (kernel,) = [node for node in gm.graph.nodes if is_op(node, OPS.int8_linear.default)]
    assert kernel.args[6:] == (torch.float32, "none", None)
    assert fxq.verify(program, x).ok


def test_an_unknown_function_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected one of .*found 'tanh'"):
        activated(torch.ones(1), "tanh")
