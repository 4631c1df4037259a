"""The record of a layer: what it keeps, what it says, and that it goes where the layer goes."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

import fxq
from fxq.account import account
from fxq.dialect import ATEN, OBSERVED, Dialect
from fxq.errors import PassError, SkippedError
from fxq.formats import Float8
from fxq.graph import is_op, weight_of
from fxq.layer import NOT_SEEN, Layer, Skip, Treatment, WeightCodes, layer_of, set_facts, treat
from fxq.lowering.lower import lower
from fxq.numerics import sqnr_db
from fxq.passes import smoothquant
from fxq.passes.common import Convert, DecomposeAttention, InsertObservers
from fxq.passes.common.student import student_of
from fxq.pipeline import Pass, Recipe
from fxq.rewriting import copy_graph
from fxq.spec import LayerSpec, PerChannel, QuantSpec

LINEAR = torch.ops.aten.linear.default
W4 = LayerSpec(None, QuantSpec(bits=4, granularity=PerChannel(0)))


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))


def linears(gm: GraphModule) -> list[Node]:
    return [node for node in gm.graph.nodes if is_op(node, LINEAR)]


@pytest.mark.parametrize(
    ("skips", "expected"),
    [
        ([], NOT_SEEN),
        ([Skip("a", True), Skip("b", True)], Skip("b", True)),
        ([Skip("a", False), Skip("b", True)], Skip("a", False)),
        ([Skip("a", True), Skip("b", False)], Skip("b", False)),
    ],
)
def test_a_reason_that_was_not_intended_is_never_covered_by_one_that_was(
    skips: list[Skip], expected: Skip
) -> None:
    layer = Layer("linear", treatments=tuple(Treatment("test", skip) for skip in skips))

    assert layer.skip == expected


def test_treatments_are_appended_and_facts_set() -> None:
    gm = fxq.capture(TwoLayers().eval(), torch.randn(2, 16)).graph_module
    a, b = linears(gm)

    treat(a, "First", "did this", "remark", scaled=("input",))
    treat(a, "Second", "did that", "remark")

    record = layer_of(a)
    assert [t.did for t in record.treatments] == ["did this", "did that"]
    assert (record.remarks, record.scaled, record.origin) == ("remark", ("input",), a.name)
    assert layer_of(b).treatments == ()


class Causal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def test_strict_sees_what_an_earlier_pass_could_not_do() -> None:
    recipe = Recipe("scores", (DecomposeAttention(), InsertObservers(W4), Convert()))

    with pytest.raises(SkippedError, match="its scores are not written out"):
        fxq.compress(Causal().eval(), torch.randn(2, 5, 16), recipe, strict=True)


@dataclass(frozen=True)
class RoundUp(Pass):
    """A weight method as somebody else would write it: codes of its own choice."""

    reads: ClassVar[Dialect] = OBSERVED
    writes: ClassVar[Dialect] = OBSERVED

    def run(self, gm: GraphModule) -> PassResult:
        for node in linears(gm):
            weight = weight_of(node)
            scale = weight.abs().amax(1, keepdim=True) / 7
            codes = torch.ceil(weight / scale).clamp(-7, 7).to(torch.int8)
            treat(node, "RoundUp", "rounded up", weight=WeightCodes(codes, scale))
        return PassResult(gm, modified=True)


def rounded_up(layer: nn.Linear) -> Tensor:
    scale = layer.weight.abs().amax(1, keepdim=True) / 7
    return torch.ceil(layer.weight / scale).clamp(-7, 7) * scale


def test_convert_keeps_the_codes_that_a_method_chose(tmp_path: Path) -> None:
    model, x = TwoLayers().eval(), torch.randn(5, 16)

    program = fxq.compress(model, x, Recipe("up", (InsertObservers(W4), RoundUp(), Convert())))

    hidden = torch.relu(F.linear(x, rounded_up(model.a), model.a.bias))
    expected = F.linear(hidden, rounded_up(model.b), model.b.bias)
    torch.testing.assert_close(program(x), expected, rtol=1e-6, atol=1e-6)
    fxq.save(program, tmp_path / "p.fxq")
    loaded = fxq.load(tmp_path / "p.fxq")
    assert torch.equal(loaded(x), program(x))
    dids = [t.did for t in account(loaded.graph_module)[0].layer.treatments]
    assert dids == ["to be quantized", "rounded up", "float32 x int4"]


def test_codes_that_are_fixed_are_not_trained() -> None:
    gm = fxq.capture(TwoLayers().eval(), torch.randn(2, 16)).graph_module
    fixed = Recipe("fixed", (InsertObservers(W4), RoundUp())).apply(gm)

    student, x = student_of(fixed).train(), torch.randn(4, 16)
    before = student(x)[0]
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if name.endswith("weight"):
                parameter.normal_()

    assert torch.equal(student(x)[0], before)
    assert torch.equal(before, Convert().run(fixed).graph_module(x)[0])


def test_layers_that_share_a_weight_may_have_codes_of_their_own() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a = nn.Linear(8, 8, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(self.a(x))

    model, x = Twice().eval(), torch.randn(3, 8)
    gm = InsertObservers(W4).run(fxq.capture(model, x).graph_module).graph_module
    first, second = linears(gm)
    ones = torch.ones(8, 8, dtype=torch.int8)
    treat(second, "Ones", "all ones", weight=WeightCodes(ones, torch.full((8, 1), 0.5)))

    gm = Convert().run(gm).graph_module

    step = model.a.weight.abs().amax(1, keepdim=True) / 7
    hidden = x @ (torch.round(model.a.weight / step) * step).T
    torch.testing.assert_close(gm(x)[0], hidden @ torch.full((8, 8), 0.5))
    assert first.name != second.name


FP8 = LayerSpec(None, QuantSpec(format=Float8(), granularity=PerChannel(0)))
PAIRS = LayerSpec(None, QuantSpec(granularity=PerChannel(0), pair_safe=True))
AFFINE = LayerSpec(None, QuantSpec(symmetric=False, granularity=PerChannel(0)))
ONES = torch.ones(32, 1)
NANS = torch.full((32, 16), torch.nan).to(torch.float8_e4m3fn)


def codes_of(
    value: int | Tensor, scale: Tensor = ONES, zero_point: Tensor | None = None
) -> WeightCodes:
    codes = value if isinstance(value, Tensor) else torch.full((32, 16), value)
    return WeightCodes(codes.to(torch.int8), scale, zero_point)


@pytest.mark.parametrize(
    ("spec", "fixed", "message"),
    [
        (
            W4,
            codes_of(torch.zeros(2, 2)),
            r"codes: expected torch.int8 \[32, 16\], .*\[2, 2\]",
        ),
        (W4, codes_of(8), "codes: expected -7 to 7, as the spec has it, found 8 to 8"),
        (
            W4,
            WeightCodes(torch.zeros(32, 16), ONES),
            "codes: .*torch.int8 .*, found torch.float32",
        ),
        (FP8, codes_of(1), "codes: expected torch.float8_e4m3fn .*, found torch.int8"),
        (FP8, WeightCodes(NANS, ONES), "codes: expected numbers, found 512 NaN"),
        (PAIRS, codes_of(65), "codes: expected sums of at most 128"),
        (
            W4,
            codes_of(0, torch.ones(32)),
            r"scale: .*float32 \[32, 1\] for PerChannel",
        ),
        (W4, codes_of(0, torch.ones(1, 16)), r"scale: .*found torch.float32 \[1, 16\]"),
        (W4, codes_of(0, ONES.long()), "scale: expected torch.float32 .*found torch.int64"),
        (W4, codes_of(0, ONES * torch.nan), "scale: expected finite values > 0, found 32 of 32"),
        (W4, codes_of(0, -ONES), "scale: expected finite values > 0, found 32 of 32"),
        (W4, codes_of(0, zero_point=ONES.int()), "zero_point: expected none for symmetric=True"),
        (AFFINE, codes_of(0), "zero_point: expected one for symmetric=False"),
        (AFFINE, codes_of(0, zero_point=ONES / 2), "zero_point: expected torch.int32"),
        (
            AFFINE,
            codes_of(0, zero_point=ONES.int().T),
            r"zero_point: .*found .*\[1, 32\]",
        ),
    ],
)
def test_codes_that_do_not_fit_their_weight_are_refused(
    spec: LayerSpec, fixed: WeightCodes, message: str
) -> None:
    captured = fxq.capture(TwoLayers().eval(), torch.randn(2, 16))
    gm = InsertObservers(spec).run(captured.graph_module).graph_module
    set_facts(linears(gm)[0], weight=fixed)

    with pytest.raises(ValueError, match=f"weight of a: {message}"):
        Convert().run(gm)


@pytest.mark.parametrize("scales", [(1.0, 100.0), (100.0, 1.0)])
def test_layers_may_share_codes_and_have_scales_of_their_own(scales: tuple[float, float]) -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval(), torch.randn(3, 8)
    gm = InsertObservers(W4).run(fxq.capture(model, x).graph_module).graph_module
    codes = torch.randint(-7, 8, (8, 8), dtype=torch.int8)
    for node, scale in zip(linears(gm), scales, strict=True):
        fixed = WeightCodes(codes, torch.full((8, 1), scale))
        treat(node, "Book", "took the codes of a book", weight=fixed)

    gm = Convert().run(gm).graph_module

    hidden = F.linear(x, codes * scales[0], model[0].bias)
    expected = F.linear(hidden, codes * scales[1], model[1].bias)
    torch.testing.assert_close(gm(x)[0], expected)


def test_the_mask_of_every_layer_is_checked_also_where_they_share_a_weight() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(self.a(x))

    gm = fxq.capture(Shared().eval(), torch.randn(2, 8)).graph_module
    gm = InsertObservers(W4).run(gm).graph_module
    set_facts(linears(gm)[1], mask=torch.zeros(8, 8, dtype=torch.bool))

    with pytest.raises(ValueError, match="weight of a: mask: expected zeros"):
        Convert().run(gm)


def test_a_pruned_weight_has_the_codes_of_zero() -> None:
    captured = fxq.capture(TwoLayers().eval(), torch.randn(2, 16))
    gm = InsertObservers(AFFINE).run(captured.graph_module).graph_module
    node, mask = linears(gm)[0], torch.arange(16).expand(32, 16) % 2 == 0
    weight_of(node).data.mul_(mask)
    zero_point = torch.full((32, 1), 3, dtype=torch.int32)

    right, wrong = torch.where(mask, 5, 3), torch.where(mask, 3, 5)
    set_facts(node, mask=mask, weight=codes_of(right, zero_point=zero_point))
    Convert().run(copy_graph(gm))

    set_facts(node, weight=codes_of(wrong, zero_point=zero_point))
    with pytest.raises(ValueError, match="codes: expected those of 0"):
        Convert().run(gm)


def test_a_layer_whose_codes_are_fixed_is_not_scaled() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.norm, self.a = nn.LayerNorm(16), nn.Linear(16, 8)
            self.norm.weight.data[:3] *= 100

        def forward(self, x: Tensor) -> Tensor:
            return self.a(self.norm(x))

    model, x = Normed().eval(), torch.randn(64, 16)
    gm = fxq.capture(model, x).graph_module
    (node,) = linears(gm)
    scale = model.a.weight.abs().amax(1, keepdim=True) / 60  # no two sum beyond 128
    fixed = WeightCodes(torch.round(model.a.weight / scale).to(torch.int8), scale)
    treat(node, "Fix", "fixed the codes", weight=fixed)

    found = smoothquant.W8A8.apply(gm, [(x,)])

    assert sqnr_db(model(x), found(x)[0]) > 25
    assert "the codes of a are fixed" in layer_of(linears(found)[0]).remarks


@dataclass(frozen=True)
class Halve(Pass):
    """A pruning method: every other input channel goes."""

    keep_weights: bool = False

    reads: ClassVar[Dialect] = ATEN
    writes: ClassVar[Dialect] = ATEN

    def run(self, gm: GraphModule) -> PassResult:
        for node in linears(gm):
            weight = weight_of(node)
            mask = torch.arange(weight.shape[1]).expand(weight.shape) % 2 == 0
            if not self.keep_weights:
                weight.data = weight * mask
            treat(node, "Halve", "pruned", mask=mask)
        return PassResult(gm, modified=True)


def test_a_mask_goes_where_its_layer_goes(tmp_path: Path) -> None:
    model, x = TwoLayers().eval(), torch.randn(5, 16)
    recipe = Recipe("half", (Halve(), InsertObservers(W4), Convert()))

    program = fxq.compress(model, x, recipe)
    fxq.save(program, tmp_path / "p.fxq")
    loaded = fxq.load(tmp_path / "p.fxq")

    lowered, _ = lower(program.graph_module, torch.device("cpu"))
    for gm in (loaded.graph_module, copy_graph(program.graph_module), lowered):
        for node, width in zip(linears(gm), (16, 32), strict=True):
            mask = layer_of(node).mask
            assert mask is not None
            assert mask.sum(1).tolist() == [width // 2] * mask.shape[0]
            assert not mask[:, 1::2].any()


def test_the_kernel_has_the_record_of_its_layer() -> None:
    program = fxq.compress(TwoLayers().eval(), torch.randn(5, 16), "w8a8_dynamic")

    lowered, decisions = lower(program.graph_module, torch.device("cuda"))

    kernels = [n for n in lowered.graph.nodes if is_op(n, torch.ops.fxq.int8_linear.default)]
    assert [layer_of(n).format for n in kernels] == ["int8 x int8"] * 2
    assert [layer_of(n).origin for n in kernels] == list(decisions)


def test_a_mask_over_weights_that_are_not_zero_is_refused() -> None:
    recipe = Recipe("half", (Halve(keep_weights=True), InsertObservers(W4), Convert()))

    with pytest.raises(PassError, match="a after Halve: mask: expected zeros where it is False"):
        fxq.compress(TwoLayers().eval(), torch.randn(2, 16), recipe)


def test_a_file_of_the_format_before_this_one_loads_with_its_account() -> None:
    program = fxq.load(Path(__file__).parent / "files" / "version_2.fxq")

    found = program(torch.arange(8.0).reshape(1, 8) / 8)

    expected = [-0.3445752263069153, 0.07537626475095749, 0.9499335289001465, 0.33398154377937317]
    torch.testing.assert_close(found, torch.tensor([expected]))
    rows = account(program.graph_module)
    assert [row.format for row in rows] == ["int8 x int8"] * 2
    assert [row.skip for row in rows] == [None, None]
