"""QuantizeResiduals: additions to convolutions read codes, the same that the next layer reads. The
judges are the eager model and its equations written again."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxq
from fxq.account import account
from fxq.graph import args_of, is_op
from fxq.numerics import sqnr_db
from fxq.passes import w8a8
from fxq.passes.common import Calibrate, Convert, InsertObservers, QuantizeResiduals
from fxq.pipeline import Recipe
from fxq.spec import LayerSpec, PerTensor, QuantSpec

OPS, ADD = torch.ops.fxq, torch.ops.aten.add.Tensor


def recipe(layer: LayerSpec = w8a8.STATIC_LAYER) -> Recipe:
    observe = InsertObservers(layer, targets=("linear", "conv"))
    return Recipe("coded", (observe, QuantizeResiduals(), Calibrate(), Convert()))


class Stage(nn.Module):
    """Two blocks of a residual network, the first with a convolution beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.beside = (nn.Conv2d(4, 4, 1) for _ in range(3))
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x) + self.beside(x))
        x = torch.relu(self.second(x) + x)
        return self.head(x)


def compressed(model: nn.Module, x: Tensor, layer: LayerSpec = w8a8.STATIC_LAYER) -> fxq.Program:
    return fxq.compress(model.eval(), x, recipe(layer), data=[x])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def added(program: fxq.Program) -> list[bool]:
    """Which additions read values of codes."""
    adds = [node for node in program.graph_module.graph.nodes if is_op(node, ADD)]
    return [any(is_op(arg, OPS.dequantize.default) for arg in args_of(add)) for add in adds]


def test_additions_read_the_codes_that_layers_read() -> None:
    program = compressed(Stage(), torch.randn(2, 4, 5, 5))
    graph = program.graph_module.graph

    assert added(program) == [True, True]
    quantized = [n for n in graph.nodes if is_op(n, OPS.quantize.default)]
    # x, beside's output, and each block's, once: of the second block no addition reads it.
    assert len(quantized) == 4
    shared = [n for n in graph.nodes if is_op(n, OPS.dequantize.default) and len(n.users) > 1]
    assert [sorted(str(user.target) for user in n.users) for n in shared] == [
        ["aten.conv2d.default"] * 2,
        ["aten.add.Tensor", "aten.conv2d.default"],
    ]


def test_its_numbers_are_those_of_the_equations() -> None:
    model, x = Stage(), torch.randn(2, 4, 5, 5)
    program = compressed(model, x)
    state = dict(program.graph_module.named_buffers())

    def rounded(name: str, values: Tensor) -> Tensor:
        scale, zero = (state[f"{name}_{part}"] for part in ("scale", "zero_point"))
        codes = ((values / scale).round() + zero).clamp(-128, 127)
        return (codes - zero) * scale

    def conv(name: str, values: Tensor) -> Tensor:
        codes, scale = (state[f"{name}.weight_{part}"] for part in ("codes", "scale"))
        bias = getattr(model, name).bias
        return torch.nn.functional.conv2d(values, codes.float() * scale, bias)

    first = rounded("first.input", x)
    y = torch.relu(conv("first", first) + rounded("first.residual", conv("beside", first)))
    second = rounded("second.input", y)
    y = torch.relu(conv("second", second) + second)
    expected = conv("head", rounded("head.input", y))

    assert sqnr_db(expected, program(x)) > 120
    assert sqnr_db(model(x), program(x)) > 30


class One(nn.Module):
    """A convolution and an addition of some kind."""

    def __init__(self, add: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.add = nn.Conv2d(4, 4, 1), add
        self.row = nn.Parameter(torch.randn(1, 4, 5, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.add(self.conv(x), x)


ADDITIONS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], bool]] = {
    "plain": (lambda y, x: y + x, True),
    "turned": (lambda y, x: x + y, True),
    "in place": (lambda y, x: y.add_(x), True),
    "another value": (lambda y, x: y + x.sin(), True),
    "itself": (lambda y, x: y + y, False),
    "a multiple": (lambda y, x: torch.add(y, x, alpha=2), False),
    "a row": (lambda y, x: y + x[:, :, :1], False),
    "a number": (lambda y, x: y + 1.0, False),
    "read by others": (lambda y, x: (y + x) * y, False),
    "no convolution": (lambda y, x: y.relu() + x, False),
}


@pytest.mark.parametrize("name", ADDITIONS)
def test_which_additions(name: str) -> None:
    add, expected = ADDITIONS[name]
    model, x = One(add), torch.randn(2, 4, 5, 5)

    program = compressed(model, x)

    assert any(added(program)) is expected
    assert sqnr_db(model(x), program(x)) > 30


def test_scales_at_run_time_leave_additions_alone() -> None:
    model, x = One(lambda y, x: y + x), torch.randn(2, 4, 5, 5)
    spec = QuantSpec(granularity=PerTensor(), dynamic=True)

    program = compressed(model, x, LayerSpec(spec, w8a8.WEIGHT))

    assert added(program) == [False]


def test_linears_keep_their_residual_in_float() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) + x

    assert added(compressed(Block(), torch.randn(2, 3, 8))) == [False]


def test_a_model_in_half_precision_adds_values_of_its_dtype() -> None:
    model, x = One(lambda y, x: y + x).bfloat16(), torch.randn(2, 4, 5, 5).bfloat16()

    program = compressed(model, x)

    assert added(program) == [True]
    assert program(x).dtype == torch.bfloat16
    assert sqnr_db(model(x), program(x)) > 25


def test_the_layer_says_so() -> None:
    program = compressed(Stage(), torch.randn(2, 4, 5, 5))

    remarks = {row.module: str(row.layer) for row in account(program.graph_module)}

    said = "what is added to it is quantized to int8"
    assert {name: said in text for name, text in remarks.items()} == {
        "first": True, "beside": False, "second": True, "head": False,
    }  # fmt: skip
