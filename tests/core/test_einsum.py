"""Einsum: how an equation is read, which ones become a matrix product, what the others count."""

import pytest
import torch
from torch import Tensor, nn

import fxq
from fxq.account import account
from fxq.einsum import Equation

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
        ("ii,ij->ij", (3, 3), (3, 4)),  # a diagonal
        ("ij,kl->kl", (2, 3), (4, 5)),  # a sum over one operand
        ("ij,ij->ij", (2, 3), (2, 3)),  # nothing is contracted
        ("bij,bjk->bik", (1, 3, 4), (2, 4, 5)),  # a batch that broadcasts
        ("abi,abj->ij", (2, 3, 4), (2, 3, 5)),  # two axes contracted
        ("bi,bj->bij", (2, 3), (2, 4)),  # outer products
    ],
)
def test_what_is_no_matrix_product_stays_and_is_reported(
    equation: str, left: tuple[int, ...], right: tuple[int, ...]
) -> None:
    gm, targets = captured(Einsum(equation), torch.randn(left), torch.randn(right))
    assert ATEN.einsum.default in targets
    (row,) = account(gm)
    sizes = dict(zip(equation, left, strict=False)) | dict(
        zip(equation.split(",")[1], right, strict=False)
    )
    assert (row.kind, row.flops) == ("einsum", 2 * int(torch.tensor(list(sizes.values())).prod()))
    assert row.skip is not None


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
