"""SeparateOutliers: the float function stays, and a few huge channels no longer cost the others."""

import pytest
import torch
from torch import Tensor, nn

import fxq
from fxq.account import account
from fxq.capturing import capture
from fxq.graph import constant_of
from fxq.numerics import sqnr_db
from fxq.operators import LINEAR
from fxq.passes import recommended, w8a8
from fxq.passes.common import SeparateOutliers, check_float_function
from fxq.pipeline import Recipe
from fxq.rewriting import copy_graph

LAYER = recommended.W8A8_LAYER
OUTLIERS = [3, 17]


class Mixer(nn.Module):
    """Two linears read one value, in which two of 32 channels are far larger, and a third reads
    something even."""

    def __init__(self, k: int = 1) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32 * k, 24 * k), nn.Linear(32 * k, 16 * k, bias=False)
        self.c = nn.Linear(40 * k, 8 * k)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.cat([self.a(x), self.b(x)], -1).tanh())


def inputs(seed: int, rows: int = 64, k: int = 1) -> Tensor:
    x = torch.randn(rows // 16, 16, 32 * k, generator=torch.Generator().manual_seed(seed))
    x[..., OUTLIERS] *= torch.tensor([300.0, -80.0])
    return x


def model(k: int = 1) -> Mixer:
    torch.manual_seed(0)
    made = Mixer(k).eval()
    with torch.no_grad():  # as in trained models: what is large is multiplied by little
        for layer in (made.a, made.b):
            layer.weight[:, OUTLIERS] /= torch.tensor([300.0, 80.0])
    return made


def separated(net: nn.Module, data: list[tuple[Tensor]], **settings: float) -> fxq.Program:
    step = SeparateOutliers(LAYER, **settings)  # type: ignore[arg-type]
    return fxq.compress(net, data[0][0][:1], Recipe("separated", (step,)), data)


def test_outliers_get_layers_of_their_own_and_the_float_function_stays() -> None:
    gm = capture(model(), inputs(0)[:1]).graph_module
    before = copy_graph(gm)
    data = [(inputs(1),), (inputs(2),)]

    result = SeparateOutliers(LAYER).run(gm, data)

    gm.graph.lint()
    gm.recompile()
    assert result.modified
    check_float_function(before, gm, [(inputs(3),)], name="SeparateOutliers")
    layers = [n for n in gm.graph.nodes if n.target in LINEAR]
    shapes = [tuple(constant_of(n.args[1]).shape) for n in layers]
    assert shapes == [(24, 32), (24, 2), (16, 32), (16, 2), (8, 40)]
    rest, apart = constant_of(layers[0].args[1]), constant_of(layers[1].args[1])
    original = dict(model().named_parameters())["a.weight"]
    assert not rest[:, OUTLIERS].any()
    assert torch.equal(apart, original[:, OUTLIERS])
    kept = {n.args[0].args[1] for n in (layers[0], layers[2])}
    assert len(kept) == 1  # both read one product
    assert constant_of(kept.pop()).tolist() == [float(c not in OUTLIERS) for c in range(32)]
    remarks = {row.node: row.layer.remarks for row in account(gm)}
    assert remarks[layers[0].name] == "outlier channels apart, in float"
    skips = [row.layer.skip for row in account(gm)]
    assert skips[1] is not None
    assert skips[1].reason == "outlier channels of a layer that is quantized"
    assert skips[1].intended
    assert skips[4] is not None
    assert skips[4].reason == "SeparateOutliers found no gain"


class Mlp(nn.Module):
    """Two of 32 values behind an activation function are far larger than the others."""

    def __init__(self, function: nn.Module, bias: bool, skip: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.function = nn.Linear(24, 32, bias=bias), function
        self.down, self.skip = nn.Linear(32, 16), skip
        with torch.no_grad():
            self.up.weight[OUTLIERS] *= torch.tensor([[300.0], [80.0]])
            self.down.weight[:, OUTLIERS] /= torch.tensor([300.0, 80.0])

    def forward(self, x: Tensor) -> Tensor:
        y = self.function(self.up(x))
        return self.down(y) + (y.sum(-1, keepdim=True) if self.skip else 0.0)


def mlp_inputs(seed: int) -> tuple[Tensor]:
    return (torch.randn(4, 16, 24, generator=torch.Generator().manual_seed(seed)),)


@pytest.mark.parametrize(
    ("function", "bias"),
    [(nn.GELU(), True), (nn.GELU("tanh"), True), (nn.SiLU(), True), (nn.ReLU(), False)],
    ids=str,
)
def test_outliers_behind_a_function_are_rows_of_the_linear_in_front(
    function: nn.Module, bias: bool
) -> None:
    gm = capture(Mlp(function, bias, skip=False).eval(), *mlp_inputs(0)).graph_module
    before, original = copy_graph(gm), dict(Mlp(function, bias, skip=False).named_parameters())

    SeparateOutliers(LAYER, most=2).run(gm, [mlp_inputs(1), mlp_inputs(2)])

    gm.graph.lint()
    gm.recompile()
    check_float_function(before, gm, [mlp_inputs(3)], name="SeparateOutliers")
    layers = [n for n in gm.graph.nodes if n.target in LINEAR]
    up, few, down, extra = layers
    for operand, name in ((1, "up.weight"), (2, "up.bias"))[: 1 + bias]:
        rest, apart = constant_of(up.args[operand]), constant_of(few.args[operand])
        assert torch.equal(apart, original[name][OUTLIERS])
        assert not rest[OUTLIERS].any()
        kept = [c for c in range(32) if c not in OUTLIERS]
        assert torch.equal(rest[kept], original[name][kept])
    assert up.args[0] is few.args[0]
    (value,) = up.users
    assert list(value.users) == [down]  # nobody reads it but what will quantize it
    assert extra.args[0].target is value.target
    reasons = [row.layer.skip.reason for row in account(gm) if row.layer.skip]
    assert reasons.count("outlier channels of a layer that is quantized") == 2


@pytest.mark.parametrize(
    ("function", "skip"),
    [(nn.GELU(), True), (nn.Softplus(), False)],
    ids=["read twice", "f(0) > 0"],
)
def test_otherwise_they_are_picked_out_of_the_value(function: nn.Module, skip: bool) -> None:
    gm = capture(Mlp(function, True, skip).eval(), *mlp_inputs(0)).graph_module
    before = copy_graph(gm)

    SeparateOutliers(LAYER, most=2).run(gm, [mlp_inputs(1), mlp_inputs(2)])

    gm.recompile()
    check_float_function(before, gm, [mlp_inputs(3)], name="SeparateOutliers")
    shapes = [tuple(constant_of(n.args[1]).shape) for n in gm.graph.nodes if n.target in LINEAR]
    assert shapes == [(32, 24), (16, 32), (16, 2)]


def test_few_codes_for_everything_else_become_many() -> None:
    net, test = model(16), inputs(3, 1024, 16)
    data = [(inputs(seed, 1024, 16),) for seed in (1, 2)]
    expected = net(test)

    plain = fxq.compress(net, data[0][0][:1], w8a8.STATIC, data)
    program = fxq.compress(net, data[0][0][:1], recommended.W8A8, data, strict=True)

    before, after = sqnr_db(expected, plain(test)), sqnr_db(expected, program(test))
    assert before < 25
    assert after > before + 12
    assert fxq.verify(program, test).ok
    compiled = torch.compile(program, backend="fxq")
    assert sqnr_db(program(test), compiled(test)) > 60


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtype(dtype: torch.dtype) -> None:
    net, data = model().to(dtype), [(inputs(1).to(dtype),), (inputs(2).to(dtype),)]

    program = separated(net, data)

    found = program(data[1][0])
    assert found.dtype is dtype
    assert sqnr_db(net(data[1][0]).float(), found.float()) > 30
    assert sum("apart" in name for name, _ in program.named_buffers()) == 2


def test_even_channels_stay_together() -> None:
    torch.manual_seed(0)
    data = [(torch.randn(4, 16, 32),) for _ in range(2)]

    program = separated(Mixer().eval(), data)

    assert not [name for name, _ in program.named_buffers() if "apart" in name]


def test_what_brings_little_in_all_is_not_worth_a_product() -> None:
    data = [(inputs(1),), (inputs(2),)]

    program = separated(model(), data, least_share=1.0)

    assert not [name for name, _ in program.named_buffers() if "apart" in name]


def test_too_few_rows_separate_nothing() -> None:
    few = inputs(1, 16)[:, :4]
    gm = capture(model(), few).graph_module

    SeparateOutliers(LAYER).run(gm, [(few,)])

    reasons = {row.layer.skip.reason for row in account(gm) if row.layer.skip}
    assert reasons == {"SeparateOutliers saw too few rows"}


@pytest.mark.parametrize(
    ("losses", "total", "expected"),
    [
        ([1.0, 0.5, 0.21, 0.2], 2.0, 2),  # two bring what four bring, to a tenth
        ([1.0, 0.5, 0.3, 0.2], 2.0, 4),
        ([1.0, 0.9, 0.8, 0.7], 2.0, 0),  # less than half again
        ([1.0, 0.5, 0.3, 0.2], 100.0, 0),  # 0.8 % of all errors
        ([0.0, 0.0, 0.0, 0.0], 1.0, 0),
        ([0.0], 1.0, 0),
    ],
)
def test_how_many_by_hand(losses: list[float], total: float, expected: int) -> None:
    step = SeparateOutliers(LAYER)

    assert step._count(torch.tensor(losses, dtype=torch.float64), total) == expected


def test_none_at_most_is_refused() -> None:
    with pytest.raises(ValueError, match=r"SeparateOutliers\.most: expected at least 1, found 0"):
        SeparateOutliers(LAYER, most=0)
