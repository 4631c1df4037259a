"""Quantized convolutions become `fxq::int8_conv` where it is exact and pays, and say why elsewhere.

The judge is the simulated graph, which convolves in float, and the float model.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxq
from fxq.lowering import int8_conv
from fxq.lowering.cpu import avx2_conv
from fxq.lowering.cpu.native import native
from fxq.lowering.cpu.onednn import CpuInt8, cpu_int8
from fxq.lowering.devices import x86
from fxq.lowering.devices.x86 import conv_slower_than_float, own_conv_pays
from fxq.lowering.lower import lower
from fxq.lowering.rule import Decision
from fxq.numerics import sqnr_db
from fxq.passes import w8a8
from fxq.passes.common import Calibrate, Convert, InsertObservers
from fxq.pipeline import Recipe
from fxq.spec import LayerSpec, PerChannel, PerTensor, QuantSpec

CPU = torch.device("cpu")
WINDOWS = ("MIN_CONV_OUTPUTS", *(name for name in dir(x86) if name.startswith("MIN_WINDOW")))
CONV: Any = ("linear", "conv")
STATIC = Recipe("static", (InsertObservers(w8a8.STATIC_LAYER, CONV), Calibrate(), Convert()))
DYNAMIC_TENSOR = QuantSpec(symmetric=False, granularity=PerTensor(), dynamic=True)
needs_x86 = pytest.mark.skipif(not cpu_int8().convolves, reason="no oneDNN int8 on this CPU")


@pytest.fixture(autouse=True)
def any_size_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in ("MIN_CONV_MACS", "MIN_AVX2_CONV_MACS", *WINDOWS):
        monkeypatch.setattr(x86, limit, 0)


@pytest.fixture(params=["AVX2", "oneDNN"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of the kernel of all but depthwise convolutions."""
    own = request.param == "AVX2"
    if own and (not cpu_int8().saturates or isinstance(native("avx2_conv"), str)):
        pytest.skip("needs AVX2 without VNNI, and a compiler")
    monkeypatch.setattr(avx2_conv, "is_faster", lambda weight, _: own and weight.shape[1] > 1)
    return f"int8_conv ({request.param})"


def decisions_of(program: fxq.Program) -> list[Decision]:
    return list(lower(program.graph_module, CPU)[1].values())


def convs() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(8, 12, 3, stride=2, padding=(1, 2)),
        nn.SiLU(),
        nn.Conv2d(12, 16, (3, 2), padding="same", dilation=(1, 3)),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding="valid", groups=2, bias=False),
    ).eval()


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "2d": (convs, (3, 8, 11, 10)),
    "1d": (lambda: nn.Conv1d(9, 16, 5, stride=2, padding=2).eval(), (2, 9, 31)),
    "3d": (lambda: nn.Conv3d(8, 6, (1, 3, 2), padding=(0, 1, 1)).eval(), (2, 8, 4, 5, 6)),
}


@needs_x86
@pytest.mark.parametrize("name", MODELS)
def test_every_convolution_is_lowered_and_verified(name: str, kernel: str) -> None:
    make, shape = MODELS[name]
    model, x = make(), torch.randn(shape)
    program = fxq.compress(model, x, STATIC, data=[x])

    lowered, decisions = lower(program.graph_module, CPU)
    result = lowered(x)[0]

    assert {d.kernel for d in decisions.values()} == {kernel}
    assert sqnr_db(program(x), result) > 30.0  # codes at ties may fall to the neighbour
    assert sqnr_db(model(x), result) > 25.0
    verification = fxq.verify(program, x, model=model)
    assert verification.ok
    assert all(check.accumulators_equal for check in verification.checks)


@needs_x86
def test_where_no_kernel_pays_a_layer_stays_float_while_compiling(kernel: str) -> None:
    spec = LayerSpec(DYNAMIC_TENSOR, w8a8.WEIGHT)
    recipe = Recipe("dynamic", (InsertObservers(spec, CONV), Convert()))
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Conv2d(16, 16, 3, groups=16)).eval()
    x = torch.randn(2, 8, 9, 9)

    with torch.no_grad(), pytest.warns(fxq.FxqWarning, match="left 1 of 2 .*depthwise"):
        found = torch.compile(model, backend="fxq", options={"recipe": recipe})(x)

    program = fxq.compress(model, x, recipe)
    taken, declined = decisions_of(program)
    assert (taken.kernel, declined.kernel) == (kernel, None)
    first = Recipe("first", (InsertObservers(spec, CONV, (("1", None),)), Convert()))
    assert sqnr_db(fxq.compress(model, x, first)(x), found) > 60.0
    assert sqnr_db(program(x), found) < 60.0


@needs_x86
def test_a_row_that_is_not_finite_spoils_what_reads_it_and_nothing_else(kernel: str) -> None:
    model, x = convs(), torch.randn(3, 8, 11, 10)
    program = fxq.compress(model, x, STATIC, data=[x])
    lowered, _ = lower(program.graph_module, CPU)
    x[1, 4, 3, 2] = torch.nan

    found, expected = lowered(x)[0], program(x)

    assert torch.equal(found.isnan(), expected.isnan())
    assert not found[0].isnan().any()
    assert found[1].isnan().any()


@needs_x86
def test_the_check_sees_a_wrong_sum(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 8, 9, 9)
    program = fxq.compress(nn.Conv2d(8, 8, 3).eval(), x, STATIC, data=[x])
    for module, name in ((int8_conv, "cpu_launch"), (avx2_conv, "launch")):
        right = getattr(module, name)
        wrong = functools.partial(lambda right, *args: right(*args) + 1, right)
        monkeypatch.setattr(module, name, wrong)

    verification = fxq.verify(program, x)

    assert not verification.ok
    assert not verification.checks[0].accumulators_equal


class Small(nn.Module):
    """A first layer, one that is depthwise and one that is neither, each with a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        sizes = ((3, 16, 1), (16, 16, 16), (16, 16, 1))
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, groups=g, bias=False) for a, b, g in sizes)
        self.norms = nn.ModuleList(nn.BatchNorm2d(16) for _ in sizes)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = torch.relu(norm(conv(x)))
        return x


@needs_x86
def test_the_recipe_for_convolutional_networks() -> None:
    model, x = Small().eval(), torch.randn(4, 3, 16, 16)
    program = fxq.compress(model, x, w8a8.STATIC_CONV, data=[x])

    rows = {entry.row.module: entry for entry in fxq.report(program, x).rows}

    assert [rows[f"convs.{i}"].status for i in range(3)] == ["float", "float", "lowered"]
    assert all("folded into it" in rows[f"convs.{i}"].row.layer.remarks for i in range(3))
    assert sqnr_db(model(x), program(x)) > 25.0


UNSAFE = torch.full((16, 8, 3, 3), 127, dtype=torch.int8)
SMALL = torch.full((16, 8, 3, 3), 1, dtype=torch.int8)
SHAPES = {
    "pays": (SMALL, 1, None),
    "depthwise": (torch.ones(16, 1, 3, 3), 16, "^depthwise: memory"),
    "first layer": (torch.ones(16, 3, 7, 7), 1, r"fewer than 8 input channels \(3\)"),
    "one channel": (torch.ones(16, 1, 3, 3), 1, r"fewer than 8 input channels \(1\)"),
    "groups of few": (torch.ones(16, 4, 3, 3), 2, None),
    "groups": (torch.ones(18, 9, 3, 3), 2, "no int8 kernel for groups of 9 input channels"),
    "unsafe": (UNSAFE, 1, r"unsafe pairs .* QuantSpec\(pair_safe=True\)"),
    "small": (SMALL, 1, "8 to 16 channels, 3x3, 100 positions is too small"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_where_int8_does_not_pay_the_reason_is_given(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    avx2 = CpuInt8(available=True, convolves=True, saturates=True)
    monkeypatch.setattr(x86, "cpu_int8", lambda: avx2)
    monkeypatch.setattr(x86, "MIN_CONV_MACS", (1 << 20) if name == "small" else 0)
    weight, groups, reason = SHAPES[name]

    why = conv_slower_than_float(100, weight.to(torch.int8), groups)

    if reason is None:
        assert why is None
    else:
        assert why is not None
        assert re.search(reason, why)


@pytest.mark.parametrize(
    ("weight", "n_outputs", "pays"),
    [
        ((256, 64, 1, 1), 4 * 56 * 56, True),  # oneDNN would take it
        ((256, 64, 1, 1), 28 * 28, False),  # 12 Mi multiply-adds: fp32
        ((256, 48, 1, 1), 4 * 56 * 56, False),
        ((256, 128, 1, 1), 28 * 28, True),
        ((8, 128, 1, 1), 4 * 56 * 56, False),  # half a panel
    ],
)
def test_narrow_windows_need_the_work_that_onednn_needs(
    weight: tuple[int, ...], n_outputs: int, pays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the limits as they are

    assert own_conv_pays(n_outputs, torch.ones(weight, dtype=torch.int8), 1) == pays


DECLINED = {
    "no batch axis": (w8a8.STATIC_LAYER, (8, 9, 9), "without a batch axis"),
    "a scale per channel": (
        LayerSpec(QuantSpec(granularity=PerChannel(1)), w8a8.WEIGHT),
        (2, 8, 9, 9),
        r"an activation scale within a sample; use PerTensor\(\)",
    ),
    "affine weight": (
        LayerSpec(DYNAMIC_TENSOR, QuantSpec(symmetric=False, granularity=PerChannel(0))),
        (2, 8, 9, 9),
        "affine weight",
    ),
    "a scale per input channel": (
        LayerSpec(DYNAMIC_TENSOR, QuantSpec(granularity=PerChannel(1))),
        (2, 8, 9, 9),
        r"per input channel; use PerChannel\(0\)",
    ),
    "weight-only": (LayerSpec(None, w8a8.WEIGHT), (2, 8, 9, 9), "weight-only"),
}


@pytest.mark.parametrize("name", DECLINED)
def test_what_the_kernel_cannot_take_is_declined(name: str) -> None:
    spec, shape, reason = DECLINED[name]
    x = torch.randn(shape)
    recipe = Recipe("declined", (InsertObservers(spec, CONV), Calibrate(), Convert()))
    program = fxq.compress(nn.Conv2d(8, 8, 3).eval(), x, recipe, data=[x], dynamic_shapes=None)

    (decision,) = decisions_of(program)

    assert decision.kernel is None
    assert re.search(reason, decision.reason), decision.reason


def test_other_devices_say_that_they_have_no_kernel() -> None:
    x = torch.randn(2, 8, 9, 9)
    program = fxq.compress(nn.Conv2d(8, 8, 3).eval(), x, STATIC, data=[x])

    _, decisions = lower(program.graph_module, torch.device("meta"))

    assert ["no int8 kernel for meta" in d.reason for d in decisions.values()] == [True]


def test_sums_that_may_exceed_int32_are_declined() -> None:
    model = nn.Conv1d(30_000, 1, 3).eval()
    model.weight.data.uniform_(0.5, 1.0)
    x = torch.rand(1, 30_000, 3)
    spec = LayerSpec(DYNAMIC_TENSOR, w8a8.FULL_RANGE)
    program = fxq.compress(model, x, Recipe("sums", (InsertObservers(spec, CONV), Convert())))

    (decision,) = decisions_of(program)

    assert decision.kernel is None
    assert "30000 input channels and 3 positions of such codes may exceed" in decision.reason
