"""Convert: codes where weights were, one quantize per edge, every dtype, nothing shared twice."""

import warnings

import pytest
import torch
from models import Block, Tied, Twice
from torch import Tensor, nn

import fxq
from fxq import numerics
from fxq.errors import FxqWarning
from fxq.graph import is_op
from fxq.passes import w8a8, weight_only
from fxq.passes.common import Calibrate, Convert, InsertObservers
from fxq.passes.common.convert import quantize_weight
from fxq.pipeline import Recipe
from fxq.program import Program
from fxq.spec import (
    Entropy,
    Granularity,
    LayerSpec,
    MeanSquaredError,
    MinMax,
    MovingAverage,
    Observer,
    Percentile,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QuantSpec,
)

OPS = torch.ops.fxq
W8A8 = (w8a8.STATIC, w8a8.STATIC_PER_TOKEN, w8a8.DYNAMIC)


def batches(*shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(*shape, generator=generator) for _ in range(3)]


def count(program: Program, target: object) -> int:
    return sum(is_op(n, target) for n in program.graph_module.graph.nodes)


@pytest.mark.parametrize("recipe", [*W8A8, weight_only.W8], ids=lambda r: r.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_recipes_stay_close_to_the_float_model_in_every_dtype(
    recipe: Recipe, dtype: torch.dtype
) -> None:
    model = Block().to(dtype).eval()
    data = [batch.to(dtype) for batch in batches(4, 5, 64)]

    program = fxq.compress(model, data[0], recipe, data)

    result = program(data[1])
    assert result.dtype == dtype
    # Measured 35.6 to 46.8 dB.
    assert numerics.sqnr_db(model(data[1]), result) > 33.0
    scales = [b for name, b in program.named_buffers() if name.endswith("_scale")]
    assert {s.dtype for s in scales} == {torch.float32}


def test_weights_become_codes_and_the_float_ones_go() -> None:
    program = fxq.compress(Block().eval(), torch.randn(2, 5, 64), w8a8.DYNAMIC)

    names = dict(program.graph_module.named_buffers())
    assert names["q.weight_codes"].dtype == torch.int8
    assert "q.weight" not in names
    assert names["q.bias"].dtype == torch.float32


def test_layers_that_share_an_input_share_its_codes() -> None:
    program = fxq.compress(Block().eval(), torch.randn(2, 5, 64), w8a8.DYNAMIC)

    assert count(program, OPS.quantize.default) == 4  # one for q, k and v
    assert count(program, OPS.choose_qparams.default) == 4


def test_a_tied_weight_stays_float_for_the_embedding_and_is_quantized_for_the_head() -> None:
    model = Tied().eval()
    ids = torch.arange(6).reshape(2, 3)

    program = fxq.compress(model, ids, w8a8.DYNAMIC)

    names = dict(program.graph_module.named_buffers())
    assert names["head.weight_codes"].dtype == torch.int8
    assert sum(b.dtype == torch.float32 and b.shape == (20, 64) for b in names.values()) == 1
    assert numerics.sqnr_db(model(ids), program(ids)) > 30.0


def test_a_module_called_twice_has_one_weight_and_two_ranges() -> None:
    data = batches(8, 64)

    program = fxq.compress(Twice().eval(), data[0], w8a8.STATIC, data)

    names = dict(program.graph_module.named_buffers())
    assert [n for n in names if n.endswith("weight_codes")] == ["inner.weight_codes"]
    assert len([n for n in names if "input_scale" in n]) == 2


class Heads(nn.Module):
    """Query, key and value as einsums with weights `[H, C, D]`, which a linear has to copy."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        for name in "qkv":
            weight = torch.randn(12, 64, 16, generator=generator)
            setattr(self, name, nn.Parameter(weight, requires_grad=False))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.einsum("btc,hcd->bthd", x, w) for w in (self.q, self.k, self.v))


@pytest.mark.parametrize("recipe", [weight_only.W8, w8a8.DYNAMIC], ids=lambda r: r.name)
@pytest.mark.parametrize("n_held", [0, 1, 5])
def test_weights_that_are_computed_are_told_apart(recipe: Recipe, n_held: int) -> None:
    model, (x, y, _) = Heads().eval(), batches(2, 7, 64)
    held = [torch.empty(12 * 64 * 16) for _ in range(2 * n_held)]  # blocks of a weight's size
    del held[::2]  # and some of them free again

    program = fxq.compress(model, x, recipe)

    for expected, found in zip(model(y), program(y), strict=True):
        assert numerics.sqnr_db(expected, found) > 30.0


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    "granularity", [PerTensor(), PerChannel(0), PerGroup(16)], ids=lambda g: type(g).__name__
)
def test_weight_formats_reconstruct_within_half_a_step(
    bits: int, symmetric: bool, granularity: PerTensor | PerChannel | PerGroup
) -> None:
    weight = torch.randn(24, 32)
    spec = QuantSpec(bits=bits, symmetric=symmetric, granularity=granularity)

    codes, scale, zero = quantize_weight(weight, spec)

    assert int(codes.min()) >= spec.quant_min
    assert int(codes.max()) <= spec.quant_max
    error = (numerics.dequantize(codes, scale, zero, torch.float32) - weight).abs()
    # An affine zero-point is rounded too, which adds half a step at the ends of the range.
    steps = 0.5 if symmetric else 1.0
    assert bool((error <= numerics.expand_blocks(scale, weight.shape) * (steps + 1e-4)).all())


OBSERVERS: list[Observer] = [MinMax(), MovingAverage(), Percentile(), MeanSquaredError(), Entropy()]


@pytest.mark.parametrize("observer", OBSERVERS, ids=lambda o: type(o).__name__)
@pytest.mark.parametrize(
    "granularity", [PerTensor(), PerChannel(-1), PerToken()], ids=lambda g: type(g).__name__
)
def test_every_observer_and_granularity_goes_through_the_pipeline(
    observer: Observer, granularity: PerTensor | PerChannel | PerToken
) -> None:
    activation = QuantSpec(symmetric=False, granularity=granularity, observer=observer)
    layer = LayerSpec(activation, QuantSpec(granularity=PerChannel(0)))
    recipe = Recipe("any", (InsertObservers(layer), Calibrate(), Convert()))
    model, data = (
        nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8)).eval(),
        batches(4, 5, 16),
    )

    program = fxq.compress(model, data[0], recipe, data)

    # The coarsest, an average of 15 values' extremes, measures 20 dB.
    assert numerics.sqnr_db(model(data[0]), program(data[0])) > 15.0


def test_nan_in_a_weight_is_refused_with_its_name() -> None:
    model = Block().eval()
    with torch.no_grad():
        model.up.weight[0, 0] = torch.nan

    with pytest.raises(ValueError, match=r"weight of up: .*NaN"):
        fxq.compress(model, torch.randn(2, 5, 64), w8a8.DYNAMIC)


def test_zero_and_constant_channels_give_finite_results() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)).eval()
    with torch.no_grad():
        model[0].weight[0] = 0.0
        model[1].weight[1] = 0.5
    data = [torch.zeros(3, 8), torch.zeros(3, 8)]

    with (
        pytest.warns(FxqWarning, match="calibration saw only zeros at '0': "),
        pytest.warns(FxqWarning, match="6 samples that are all alike"),
    ):
        program = fxq.compress(model, data[0], w8a8.STATIC, data)

    assert bool(program(torch.zeros(3, 8)).isfinite().all())


def test_ranges_calibrated_on_zeros_are_one_warning() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8), nn.Linear(8, 4)).eval()
    data = [torch.zeros(3, 8), torch.zeros(5, 8)]

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fxq.compress(model, data[0], w8a8.STATIC, data)

    alike, said = [str(w.message) for w in caught if issubclass(w.category, FxqWarning)]
    assert "8 samples that are all alike" in alike
    assert "saw only zeros at '0', '1': their range is not known" in said  # 2 sees the bias of 1


def test_the_same_data_gives_the_same_bytes() -> None:
    model, data = Block().eval(), batches(4, 5, 64)

    one, two = (fxq.compress(model, data[0], w8a8.STATIC, data) for _ in range(2))

    for (name, a), (other, b) in zip(one.named_buffers(), two.named_buffers(), strict=True):
        assert name == other
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("granularity", "shape"),
    [(PerChannel(0), (13, 16)), (PerChannel(0), (5, 8, 3, 3)), (PerGroup(8), (13, 16)),
     (PerTensor(), (13, 16))],
    ids=str,
)  # fmt: skip
def test_ranges_searched_in_pieces_are_those_of_the_whole(
    granularity: Granularity, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(shape)
    weight *= torch.logspace(-1, 1, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    spec = QuantSpec(6, granularity=granularity, observer=MeanSquaredError())
    codes, scale, _ = quantize_weight(weight, spec)
    monkeypatch.setattr("fxq.passes.common.convert.TOGETHER", 3 * weight[0].numel())

    in_pieces, its_scale, _ = quantize_weight(weight, spec)

    assert torch.equal(in_pieces, codes)
    assert torch.equal(its_scale, scale)
