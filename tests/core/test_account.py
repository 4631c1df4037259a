"""The account misses nothing: its total is what torch's own counter finds in the model."""

from collections.abc import Callable
from dataclasses import replace
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
from fxq.errors import FxqWarning, SkippedError
from fxq.passes import gptq, pruning, recommended, w8a8
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


def by_groups(a: Tensor, b: Tensor, ends: list[int]) -> list[Tensor]:
    """`torch.nn.functional.grouped_mm`, one product after another."""
    if a.ndim == b.ndim == 3:
        return [x @ y for x, y in zip(a, b, strict=True)]
    parts = [slice(*each) for each in zip([0, *ends], ends, strict=False)]
    if a.ndim == b.ndim == 2:
        return [a[:, part] @ b[part] for part in parts]
    if a.ndim == 2:
        return [a[part] @ b[g] for g, part in enumerate(parts)]
    return [a[g] @ b[:, part] for g, part in enumerate(parts)]


@pytest.mark.parametrize(
    ("a", "b"),
    [((32, 64), (3, 64, 48)), ((3, 16, 64), (64, 32)), ((3, 16, 64), (3, 64, 48)),
     ((16, 32), (32, 48))],
    ids=("rows", "columns", "batch", "inner"),
)  # fmt: skip
def test_products_by_groups_count_as_their_parts(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    ends = [8, 16, 32]
    offs = None if len(a) == len(b) == 3 else torch.tensor(ends, dtype=torch.int32)
    x, y = torch.randn(a).bfloat16(), torch.randn(b).mT.contiguous().bfloat16().mT

    found, _ = rows_of(Call(lambda x: torch._grouped_mm(x, y, offs)), x)

    with FlopCounterMode(display=False) as counter:
        by_groups(x, y, ends)
    assert found == {"_grouped_mm": counter.get_total_flops()}


class Experts(nn.Module):
    """A linear, then a product by groups, which `multiply` computes."""

    def __init__(self, multiply: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.head, self.multiply = nn.Linear(64, 64), multiply
        self.weight = nn.Parameter(torch.randn(3, 64, 48) / 8)

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        return self.multiply(self.head(x), self.weight, ends)


@torch.library.custom_op("fxq_test::multiply_by_groups", mutates_args=())
def multiply_by_groups(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return torch.cat(by_groups(x, weight, ends.tolist()))


@multiply_by_groups.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])


@torch.library.custom_op("fxq_test::squash", mutates_args=())
def squash(x: Tensor) -> Tensor:
    return x.tanh()


@squash.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


ENDS = torch.tensor([8, 16, 32], dtype=torch.int32)


def test_experts_are_reported_and_stop_strict() -> None:
    model = Experts(torch._grouped_mm).eval().bfloat16()
    example = (torch.randn(32, 64, dtype=torch.bfloat16), ENDS)

    program = fxq.compress(model, example, w8a8.DYNAMIC, dynamic_shapes=None)

    rows = {r.row.kind: r for r in fxq.report(program).rows}
    assert "its weight multiplies as _grouped_mm" in rows["_grouped_mm"].reason
    assert rows["_grouped_mm"].row.flops == 2 * 32 * 64 * 48
    with pytest.raises(SkippedError, match="multiplies as _grouped_mm"):
        fxq.compress(model, example, w8a8.DYNAMIC, strict=True, dynamic_shapes=None)


@pytest.mark.filterwarnings("ignore:recipe .* changed nothing")
def test_groups_that_are_known_are_no_weight() -> None:
    model = Call(lambda x: torch._grouped_mm(x, x[:16].repeat(3, 1, 1), ENDS)).eval()
    x = torch.randn(32, 16, dtype=torch.bfloat16)

    program = fxq.compress(model, x, w8a8.DYNAMIC, dynamic_shapes=None)

    (row,) = fxq.report(program).rows
    assert row.reason == "this recipe does not quantize _grouped_mm"


@pytest.mark.filterwarnings("ignore:this program cannot be saved")
@pytest.mark.parametrize("recipe", [w8a8.DYNAMIC, pruning.MAGNITUDE_50], ids=lambda r: r.name)
def test_a_weight_in_an_unknown_operator_is_reported_and_stops_strict(recipe: Recipe) -> None:
    model, example = Experts(multiply_by_groups).eval(), (torch.randn(32, 64), ENDS)

    told = r"read weights, .* as they are: fxq_test::multiply_by_groups \(1\), at "
    with pytest.warns(FxqWarning, match=told):
        program = fxq.compress(model, example, recipe, [example], dynamic_shapes=None)

    report = fxq.report(program)
    assert "% float; 1 operator not counted; " in report.title
    row = next(r for r in report.rows if r.row.kind == "fxq_test::multiply_by_groups")
    assert row.status == "float"
    assert "an operator that fxq does not know" in row.reason
    assert row.row.flops == 0 < report.flops
    assert "1 operator cannot be counted" in report.caption
    with pytest.raises(SkippedError, match="that fxq does not know reads its weight"):
        fxq.compress(model, example, recipe, [example], strict=True, dynamic_shapes=None)


class Layers(nn.Module):
    """Five products by groups, one after another."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Experts(multiply_by_groups) for _ in range(5)])

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.pad(layer(x, ends), (0, 16))
        return x


@pytest.mark.filterwarnings("ignore:this program cannot be saved")
def test_unknown_operators_with_weights_are_told_in_one_warning() -> None:
    model, example = Layers().eval(), (torch.randn(32, 64), ENDS)

    told = r"multiply_by_groups \(5\), at layers.0, layers.1, layers.2 and 2 others"
    with pytest.warns(FxqWarning, match=told):
        program = fxq.compress(model, example, w8a8.DYNAMIC, dynamic_shapes=None)
    fxq.compress(model, example, FLOAT, dynamic_shapes=None)  # wants none: no warning

    assert "; 5 operators not counted; " in fxq.report(program).title


@pytest.mark.filterwarnings("ignore:this program cannot be saved")
def test_an_unknown_operator_without_a_weight_is_named_and_no_row() -> None:
    model, x = Call(lambda x, m: squash(m(x)), nn.Linear(64, 64)).eval(), torch.randn(4, 64)

    report = fxq.report(fxq.compress(model, x, w8a8.DYNAMIC, strict=True))

    assert [r.row.kind for r in report.rows] == ["linear"]
    assert report.uncounted == {"fxq_test::squash": 1}
    assert "not counted" not in replace(report, uncounted={}).title


def test_a_report_prints_names_as_they_are() -> None:
    report = fxq.report(fxq.compress(nn.Linear(64, 64).eval(), torch.randn(4, 64), w8a8.DYNAMIC))
    (row,) = report.rows
    names = {
        "rows": (replace(row, reason="by a[/b] :smile:", kernel="k[red]"),),
        "notes": ("of b[/b] :smile:",),
        "uncounted": {"c[/b]:smile:": 1},
    }

    text = str(replace(report, **names))

    assert "k[red]; by a[/b] :smile:" in text
    assert "note: of b[/b] :smile:\n" in text
    assert "fxq does not know c[/b]:smile:" in text


def test_free_sizes_count_as_asked() -> None:
    model = Call(lambda x, m: m(x)[0], nn.GRU(8, 6, batch_first=True))
    program = fxq.compress(model.eval(), torch.randn(2, 5, 8), FLOAT)

    at_two, at_seven = (fxq.report(program, torch.randn(n, 5, 8)).flops for n in (2, 7))

    assert 2 * at_seven == 7 * at_two > 0


def test_a_recipe_that_changes_next_to_nothing_says_so() -> None:
    body = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model, x = nn.Sequential(*body, nn.Linear(16, 10)).eval(), torch.randn(2, 3, 32, 32)

    with pytest.warns(FxqWarning, match=r"changed 0.0% .* conv: .* linear only \(100.0%\)"):
        fxq.compress(model, x, w8a8.DYNAMIC)
    fxq.compress(model, x[..., :4, :4], w8a8.DYNAMIC)  # 5 %, no warning


@pytest.mark.parametrize("recipe", [w8a8.DYNAMIC, recommended.W8A8, gptq.W4])
def test_a_recipe_that_changes_nothing_says_so(recipe: fxq.Recipe) -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3)).eval()
    data = [torch.randn(4, 3, 16, 16) for _ in range(2)] if recipe.needs_data else None

    with pytest.warns(
        FxqWarning, match=r"changed nothing and left as they were conv: .* _conv quantize"
    ):
        program = fxq.compress(model, torch.randn(2, 3, 16, 16), recipe, data)

    assert not [row for row in fxq.report(program).rows if row.row.format is not None]
