"""Programs whose convolutions are fxq's own on x86: what follows is in their epilogue, and what is
left to other kernels says why."""

import pytest
import torch
from torch import Tensor, nn

import fxq
from fxq.graph import is_op
from fxq.lowering.cpu import avx2_conv
from fxq.lowering.lower import lower
from fxq.numerics import sqnr_db
from fxq.passes import w8a8
from fxq.passes.common import Calibrate, Convert, InsertObservers, QuantizeResiduals
from fxq.pipeline import Recipe
from fxq.spec import LayerSpec, QuantSpec

CPU = torch.device("cpu")
OPS = torch.ops.fxq
pytestmark = pytest.mark.usefixtures("avx2_convs")
OBSERVE = InsertObservers(w8a8.STATIC_LAYER, ("conv",))
STATIC = Recipe("static", (OBSERVE, Calibrate(), Convert()))
CODED = Recipe("coded", (OBSERVE, QuantizeResiduals(), Calibrate(), Convert()))


class Residual(nn.Module):
    """A block of a residual network, whose second convolution is added before its activation."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Conv2d(16, 16, 3, padding=1) for _ in range(2))
        self.down, self.last = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 12, 1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(torch.relu(self.a(x))) + self.down(x)
        return self.last(torch.relu(y))


class Unet(nn.Module):
    """A block of a UNet."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(16, 32, 3, padding=1), nn.Conv2d(32, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(nn.functional.silu(self.a(x))) + x


class Mobile(nn.Module):
    """Pointwise convolutions with the activation functions of small networks."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(16, 16, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.c(nn.functional.hardswish(self.b(nn.functional.relu6(self.a(x)))))


# The epilogue of each kernel: an activation function, whether there is a residual, whether codes.
Fused = tuple[str, bool, bool]
PLAIN: Fused = ("none", False, False)
CODES: Fused = ("none", False, True)
RELU: Fused = ("relu", False, True)
BLOCKS: dict[str, tuple[type[nn.Module], Recipe, list[Fused]]] = {
    "residual": (Residual, STATIC, [RELU, ("relu", True, False), PLAIN, PLAIN]),
    "residual codes": (Residual, CODED, [RELU, CODES, ("relu", True, True), PLAIN]),
    "unet": (Unet, STATIC, [("silu", False, True), ("none", True, False)]),
    "mobile": (Mobile, STATIC, [("relu6", False, True), ("hardswish", False, True), PLAIN]),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_has_no_passes_of_its_own_after_convolutions(name: str) -> None:
    torch.manual_seed(0)
    make, recipe, expected = BLOCKS[name]
    model, x = make().eval(), torch.randn(2, 16, 9, 9)
    program = fxq.compress(model, x, recipe, data=[torch.randn(4, 16, 9, 9)])

    lowered, decisions = lower(program.graph_module, CPU)

    assert {decision.kernel for decision in decisions.values()} == {"int8_conv (AVX2)"}
    calls = [node.args[10:] for node in lowered.graph.nodes if is_op(node, OPS.int8_conv.default)]
    whole = [(*args, *[None] * (3 - len(args)))[:3] for args in calls]
    found = [(act, res is not None, codes is not None) for act, res, codes in whole]
    assert sorted(found) == sorted(expected)
    checked = fxq.verify(program, x, model=model)
    assert checked.ok
    assert all(check.accumulators_equal for check in checked.checks)
    with torch.no_grad():
        compiled = torch.compile(program, backend="fxq")(x)
    assert sqnr_db(program(x), compiled) > 60  # codes next to a tie may fall to the neighbour
    assert sqnr_db(model(x), compiled) > 25


@pytest.mark.parametrize(("make", "recipe"), [(Mobile, STATIC), (Residual, CODED)])
def test_what_is_not_finite_spoils_what_reads_it_through_codes_too(
    make: type[nn.Module], recipe: Recipe
) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 16, 9, 9)
    program = fxq.compress(make().eval(), x, recipe, data=[x])
    lowered, _ = lower(program.graph_module, CPU)
    x[1, 4, 3, 2] = torch.nan

    found, expected = lowered(x)[0], program(x)

    assert torch.equal(found.isnan(), expected.isnan())
    assert 0 < int(found.isnan().sum()) < found[1].numel()


class Beside(nn.Module):
    """A residual that no other layer reads."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x) + residual))


def test_a_residual_that_is_not_finite_spoils_what_reads_the_sum() -> None:
    torch.manual_seed(0)
    x, residual = torch.randn(3, 16, 9, 9), torch.randn(3, 16, 9, 9)
    program = fxq.compress(Beside().eval(), (x, residual), CODED, data=[(x, residual)])
    lowered, _ = lower(program.graph_module, CPU)
    residual[1, 4, 3, 2] = torch.nan

    found, expected = lowered(x, residual)[0], program(x, residual)

    assert torch.equal(found.isnan(), expected.isnan())
    assert 0 < int(found.isnan().sum()) < found[1].numel()


def test_weights_of_4_bits_say_so() -> None:
    spec = LayerSpec(
        w8a8.STATIC_LAYER.activation, QuantSpec(4, granularity=w8a8.WEIGHT.granularity)
    )
    recipe = Recipe("w4", (InsertObservers(spec, ("conv",)), Calibrate(), Convert()))
    x = torch.randn(2, 16, 9, 9)
    program = fxq.compress(nn.Conv2d(16, 16, 3).eval(), x, recipe, data=[x])

    _, decisions = lower(program.graph_module, CPU)

    assert [decision.kernel for decision in decisions.values()] == ["int4_conv (AVX2)"]
    assert fxq.verify(program, x).ok


@pytest.mark.parametrize(
    ("shape", "groups", "own"),
    [((16, 8, 3, 3), 1, True), ((64, 4, 3, 3), 16, False), ((64, 16, 3, 3), 4, False),
     ((64, 32, 3, 3), 2, True),
     ((66, 22, 3, 3), 3, True), ((66, 11, 3, 3), 6, True), ((8, 1, 3, 3), 8, False)],
)  # fmt: skip
def test_which_kernel_is_faster(
    shape: tuple[int, ...], groups: int, own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()

    assert avx2_conv.is_faster(torch.ones(shape, dtype=torch.int8), groups) is own


def test_small_windows_and_small_layers_are_left_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    x = torch.randn(1, 16, 9, 9)
    for kernel in (1, 3):  # 16 elements; 144, with too little work
        program = fxq.compress(nn.Conv2d(16, 16, kernel).eval(), x, STATIC, data=[x, -x])

        (decision,) = lower(program.graph_module, CPU)[1].values()

        assert decision.kernel is None
        assert "too small for int8 to pay" in decision.reason
