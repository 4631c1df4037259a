"""The account misses nothing: its total is what torch's own counter finds in the model."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import family
from small_models import ZOO
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fxq
from fxq.errors import SkippedError
from fxq.passes import w8a8
from fxq.pipeline import Recipe
from fxq.signature import split_inputs

FLOAT = Recipe("float", ())


class Call(nn.Module):
    """A function, with the modules it uses."""

    def __init__(self, function: Callable[..., Any], *parts: nn.Module) -> None:
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Any:
        return self.function(x, *self.parts)


def rows_of(model: nn.Module, example: Any) -> tuple[dict[str, int], int]:
    """Return the operations by kind, and their sum."""
    found = fxq.report(fxq.compress(model.eval(), example, FLOAT, dynamic_shapes=None))
    return {r.row.kind: r.row.flops for r in found.rows}, found.flops


def counted_by_torch(model: nn.Module, example: Any) -> int:
    # As products and softmax: of fused attention, torch 2.11 counts no CPU operator.
    args, kwargs = split_inputs(example)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*args, **kwargs)
    return counter.get_total_flops()


LARGE = ("hunyuan_video", "unet_condition", "wan", "flux")  # to capture


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in LARGE)) for n in ZOO]
)
def test_total_of_a_family_is_what_torch_counts(name: str) -> None:
    found = family(name)

    report = fxq.report(found.compress(FLOAT))

    assert report.flops == counted_by_torch(found.model, found.example) > 0


def scaled_mm(x: Tensor) -> Tensor:
    codes, one = x.to(torch.float8_e4m3fn), x.new_ones(())
    return torch._scaled_mm(codes, codes.t(), one, one, out_dtype=torch.float32)


MODULES: dict[str, tuple[Callable[..., Any], tuple[nn.Module, ...], tuple[int, ...]]] = {
    "lstm": (
        lambda x, m: m(x)[0],
        (nn.LSTM(8, 6, 2, bidirectional=True, proj_size=3),),
        (4, 3, 8),
    ),
    "gru": (lambda x, m: m(x)[0], (nn.GRU(8, 6),), (4, 3, 8)),
    "rnn_tanh": (lambda x, m: m(x)[0], (nn.RNN(8, 6),), (4, 3, 8)),
    "lstm_cell": (lambda x, m: m(x)[0], (nn.LSTMCell(8, 6),), (4, 8)),
    "gru_cell": (lambda x, m: m(x), (nn.GRUCell(8, 6),), (4, 8)),
    "tensordot": (lambda x: torch.tensordot(x, x, dims=([1], [1])), (), (4, 8)),
    "inner": (lambda x: torch.inner(x, x), (), (4, 8)),
    "linalg_multi_dot": (lambda x: torch.linalg.multi_dot([x, x.mT, x]), (), (4, 8)),
    "_scaled_mm": (scaled_mm, (), (16, 32)),
    "linalg_matrix_power": (lambda x: torch.linalg.matrix_power(x, 5), (), (4, 4)),
}


@pytest.mark.parametrize("kind", MODULES)
def test_operators_that_expand_to_products_are_rows(kind: str) -> None:
    function, parts, shape = MODULES[kind]
    model, x = Call(function, *parts), torch.randn(shape)

    found, _ = rows_of(model, x)

    assert found == {kind: counted_by_torch(model, x)}
    assert found[kind] > 0


def affine_grid(theta: Tensor) -> Tensor:
    return F.affine_grid(theta, [2, 3, 5, 7], align_corners=False)


def int_mm(x: Tensor) -> Tensor:
    return torch._int_mm(x.to(torch.int8), x.to(torch.int8).t())


@pytest.mark.parametrize(
    ("kind", "function", "shape", "flops"),
    [
        # Pairwise, as torch does it: [4, 5] first, then [4, 3].
        (
            "einsum",
            lambda x: torch.einsum("tc,sc,sd->td", x, x.new_ones(5, 8), x.new_ones(5, 3)),
            (4, 8),
            4 * 5 * 8 + 4 * 5 * 3,
        ),
        ("bilinear", lambda x: F.bilinear(x, x[:, :3], x.new_ones(5, 8, 3)), (4, 8), 4 * 8 * 3 * 5),
        ("matmul", lambda x: torch.mv(x, x[0]), (4, 8), 4 * 8),
        ("_int_mm", int_mm, (24, 32), 24 * 24 * 32),
        ("vdot", lambda x: torch.vdot(x[0], x[1]), (4, 8), 8),
        ("addmv", lambda x: torch.addmv(x[:, 0], x, x[0]), (4, 8), 4 * 8),
        ("addbmm", lambda x: torch.addbmm(x[0, :, :1], x, x.mT), (3, 4, 8), 3 * 4 * 8 * 4),
        ("cdist", lambda x: torch.cdist(x, x[:3]), (4, 8), 4 * 3 * 8),
        ("affine_grid_generator", affine_grid, (2, 2, 3), 2 * 5 * 7 * 2 * 3),
        # [6, 3, 8] with 2 taps to 5 channels: 5 steps come out.
        (
            "conv_tbc",
            lambda x: torch.conv_tbc(x, x.new_ones(2, 8, 5), x.new_ones(5)),
            (6, 3, 8),
            5 * 3 * 5 * 2 * 8,
        ),
    ],
)
def test_products_torch_has_no_formula_for_are_counted(
    kind: str, function: Callable[[Tensor], Tensor], shape: tuple[int, ...], flops: int
) -> None:
    found, _ = rows_of(Call(function), torch.randn(shape))

    assert found == {kind: 2 * flops}


def test_what_only_scales_and_moves_is_no_row() -> None:
    def function(x: Tensor) -> Tensor:
        y = F.layer_norm(x, x.shape[-1:]).reshape(8, 4).softmax(-1)
        return torch.kron(y, torch.outer(y[0], y[1])).sum(0)[:4] + F.one_hot(y[0].argmax(), 4)

    found, _ = rows_of(Call(function), torch.randn(4, 8))

    assert found == {}


def test_a_recurrent_layer_is_reported_and_stops_strict() -> None:
    model = Call(lambda x, m, head: head(m(x)[0]), nn.LSTM(64, 64), nn.Linear(64, 8))
    x = torch.randn(4, 3, 64)

    program = fxq.compress(model.eval(), x, w8a8.DYNAMIC)

    rows = {r.row.kind: r for r in fxq.report(program).rows}
    assert rows["lstm"].status == "float"
    assert "its weight multiplies as lstm, in a form that is not a linear" in rows["lstm"].reason
    assert rows["lstm"].row.flops == 2 * 4 * 3 * 4 * 64 * (64 + 64)
    with pytest.raises(SkippedError, match="multiplies as lstm"):
        fxq.compress(model, x, w8a8.DYNAMIC, strict=True)


def test_free_sizes_count_as_asked() -> None:
    model = Call(lambda x, m: m(x)[0], nn.GRU(8, 6, batch_first=True))
    program = fxq.compress(model.eval(), torch.randn(2, 5, 8), FLOAT)

    at_two, at_seven = (fxq.report(program, torch.randn(n, 5, 8)).flops for n in (2, 7))

    assert 2 * at_seven == 7 * at_two > 0
