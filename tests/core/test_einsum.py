"""Einsum: how an equation is read, which ones become a matrix product, what the others count."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fxq
from fxq.account import account
from fxq.einsum import Equation
from fxq.errors import SkippedError
from fxq.lowering.devices import x86
from fxq.passes import w8a8

ATEN = torch.ops.aten


class Einsum(nn.Module):
    def __init__(self, equation: str, weight: Tensor | None = None, first: bool = False) -> None:
        super().__init__()
        self.equation, self.first = equation, first
        self.weight = None if weight is None else nn.Parameter(weight)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        other = y if self.weight is None else self.weight
        assert other is not None
        return torch.einsum(self.equation, *((other, x) if self.first else (x, other)))


def captured(model: nn.Module, *inputs: Tensor) -> tuple[torch.fx.GraphModule, list[object]]:
    """Capture, check that the result is the same, and return graph and operators."""
    gm = fxq.capture(model.eval(), inputs, dynamic_shapes=None).graph_module
    torch.testing.assert_close(gm(*inputs)[0], model(*inputs), rtol=1e-5, atol=1e-5)
    return gm, [n.target for n in gm.graph.nodes if n.op == "call_function"]


def test_equations_by_hand() -> None:
    assert Equation.parse("ij, jk", (2, 2)) == Equation.parse("ij,jk->ik", (2, 2))
    assert Equation.parse("ba", (2,)).result == ("a", "b")
    ellipsis = Equation.parse("...d,...ed->...e", (4, 3))
    assert ellipsis.operands == ((".2", ".1", ".0", "d"), (".0", "e", "d"))
    assert ellipsis.result == (".2", ".1", ".0", "e")
    sizes = Equation.parse("ab,bc->ac", (2, 2)).sizes([(1, 3), (3, 4)])
    assert sizes == {"a": 1, "b": 3, "c": 4}


@pytest.mark.parametrize(
    ("equation", "left", "right"),
    [
        ("bhid,bhjd->bhij", (2, 3, 4, 5), (2, 3, 6, 5)),
        ("bhij,bhjd->bhid", (2, 3, 4, 6), (2, 3, 6, 5)),
        ("bhij,bhjd->bihd", (2, 3, 4, 6), (2, 3, 6, 5)),
        ("bihd,bjhd->bhij", (2, 4, 3, 5), (2, 6, 3, 5)),
        ("... i d, ... j d -> ... i j", (2, 3, 4, 5), (2, 3, 6, 5)),
        ("bchw,bcij->bhwij", (2, 3, 4, 5), (2, 3, 6, 7)),
        ("ij,jk", (3, 4), (4, 5)),
        ("ji,jk->ki", (3, 4), (3, 5)),
        ("bchw,bjc->bjhw", (2, 3, 4, 5), (2, 6, 3)),
    ],
)
def test_products_of_two_inputs(
    equation: str, left: tuple[int, ...], right: tuple[int, ...]
) -> None:
    _, targets = captured(Einsum(equation), torch.randn(left), torch.randn(right))
    several = equation in ("bchw,bcij->bhwij", "bchw,bjc->bjhw")  # axes would have to be joined
    assert (ATEN.einsum.default in targets) == several
    assert (ATEN.matmul.default in targets) != several


@pytest.mark.parametrize(
    ("equation", "weight", "first"),
    [
        ("bnd,df->bnf", (5, 7), False),
        ("bnd,fd->bnf", (7, 5), False),
        ("...d,fd->...f", (7, 5), False),
        ("fd,bnd->bnf", (7, 5), True),
        ("fd,bnd->bfn", (7, 5), True),
        ("bnd,dhe->bnhe", (5, 3, 7), False),  # to heads
        ("bnd,dhe->bhne", (5, 3, 7), False),
        ("edh,bnd->bnhe", (7, 5, 3), True),
        ("bnd,dne->be", (5, 3, 7), False),  # two axes contracted
    ],
)
def test_a_product_with_a_constant_is_a_linear(
    equation: str, weight: tuple[int, int], first: bool
) -> None:
    model = Einsum(equation, torch.randn(weight), first)
    _, targets = captured(model, torch.randn(2, 3, 5))
    assert targets.count(ATEN.linear.default) == 1
    assert ATEN.einsum.default not in targets


@pytest.mark.parametrize(
    ("equation", "left", "right"),
    [
        ("ii,ij->j", (3, 3), (3, 4)),  # a diagonal
        ("ij,kl->kl", (2, 3), (4, 5)),  # a sum over one operand
        ("bij,bjk->bik", (1, 3, 4), (2, 4, 5)),  # a batch that broadcasts
        ("abi,abj->ij", (2, 3, 4), (2, 3, 5)),  # two axes contracted
    ],
)
def test_what_is_no_matrix_product_stays_and_is_reported(
    equation: str, left: tuple[int, ...], right: tuple[int, ...]
) -> None:
    operands = torch.randn(left), torch.randn(right)
    gm, targets = captured(Einsum(equation), *operands)
    with FlopCounterMode(display=False) as counter:
        torch.einsum(equation, *operands)

    assert ATEN.einsum.default in targets
    (row,) = account(gm)
    assert (row.kind, row.flops) == ("einsum", counter.get_total_flops())
    assert row.skip is not None


@pytest.mark.parametrize(
    ("equation", "shape"),
    [
        ("nhwc->nchw", (2, 3, 4, 5)),
        ("nhwc->nc", (2, 3, 4, 5)),
    ],
)
def test_an_einsum_that_multiplies_nothing_is_not_counted(
    equation: str, shape: tuple[int, ...]
) -> None:
    class Permute(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum(equation, x)

    gm, _ = captured(Permute(), torch.randn(shape))
    assert not account(gm)


@pytest.mark.parametrize("equation", ["ij,ij->ij", "ij,ik->ijk"])
def test_nor_is_one_that_contracts_nothing(equation: str) -> None:
    gm, _ = captured(Einsum(equation), torch.randn(2, 3), torch.randn(2, 3))
    assert not account(gm)


def test_a_view_behind_a_product_that_lies_otherwise_in_memory() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(7, 5))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("fd,bd->fb", self.weight, x).view(-1)

    _, targets = captured(Flat(), torch.randn(3, 5))
    assert ATEN.linear.default in targets
    assert ATEN.view.default not in targets


def test_projections_to_heads_and_back_are_quantized() -> None:
    class Projections(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.split = nn.Parameter(torch.randn(16, 2, 8))
            self.join = nn.Parameter(torch.randn(2, 8, 16))

        def forward(self, x: Tensor) -> Tensor:
            heads = torch.einsum("bnc,chd->bhnd", x, self.split)
            return torch.einsum("bhnd,hdc->bnc", heads, self.join)

    x = torch.randn(3, 5, 16)
    model = Projections().eval()
    program = fxq.compress(model, x, w8a8.DYNAMIC, strict=True)
    assert [row.kind for row in account(program.graph_module)] == ["linear", "linear"]
    for batch in (x, torch.randn(2, 5, 16)):
        exact, found = model(batch), program(batch)
        assert (exact - found).norm() < 0.02 * exact.norm()


def test_a_weight_that_multiplies_otherwise_is_told() -> None:
    """One matrix per head."""
    x = torch.randn(2, 3, 4, 5)
    model = Einsum("bhnd,hde->bhne", torch.randn(3, 5, 7)).eval()
    with pytest.raises(SkippedError, match="not a linear"):
        fxq.compress(model, x, w8a8.DYNAMIC, strict=True)


@torch.no_grad()
def test_torch_compile_finds_products_with_weights_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """There weights are inputs of the graph until they are bound."""
    monkeypatch.setattr(x86, "WITH_VNNI", x86.Thresholds(0, 0))
    monkeypatch.setattr(x86, "WITHOUT_VNNI", x86.Thresholds(0, 0))

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Parameter(torch.randn(64, 64))
            self.second = nn.Parameter(torch.randn(64, 64))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("bd,fd->bf", x, self.first).relu() @ self.second

    x, model = torch.randn(32, 64), Two().eval()
    program = fxq.compress(model, x, w8a8.DYNAMIC)
    compiled = torch.compile(model, backend="fxq", options={"strict": False})
    torch.testing.assert_close(compiled(x), program(x), rtol=1e-4, atol=1e-4)


def test_attention_by_einsum_is_attention() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(16, 48)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.mix(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
            scores = torch.einsum("bhid,bhjd->bhij", q, k) * 8**-0.5
            out = torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v)
            return out.transpose(1, 2).flatten(2)

    _, targets = captured(Attention(), torch.randn(2, 5, 16))
    assert targets.count(ATEN.scaled_dot_product_attention.default) == 1
    assert ATEN.matmul.default not in targets


@pytest.mark.parametrize(
    ("equation", "target"),
    [
        ("nchpw->nhwcp", ATEN.permute.default),
        ("n...c->nc...", ATEN.permute.default),
        ("nchpw->nhwc", ATEN.einsum.default),  # summed
        ("nchhw->nchw", ATEN.einsum.default),  # a diagonal
    ],
)
def test_moving_axes_is_a_permutation(equation: str, target: object) -> None:
    class Moved(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum(equation, x)

    _, targets = captured(Moved(), torch.randn(2, 3, 4, 4, 5))
    assert targets == [target]
