"""HeldOutMargin: as wide as the other half of the data asks for, and no wider."""

import pytest
import torch
from torch import Tensor, nn

import fxq
from fxq.account import account
from fxq.errors import FxqWarning
from fxq.numerics import sqnr_db
from fxq.observers import RangeObserver
from fxq.passes.common import Calibrate, Convert, HeldOutMargin, InsertObservers
from fxq.passes.common.held_out_margin import best_margin
from fxq.pipeline import Pass, Recipe
from fxq.spec import LayerSpec, MeanSquaredError, MinMax, PerChannel, PerTensor, QuantSpec

ACTIVATION = QuantSpec(symmetric=False, granularity=PerTensor(), observer=MinMax())
LAYER = LayerSpec(ACTIVATION, QuantSpec(granularity=PerChannel(0)))


def recipe(*more: Pass, layer: LayerSpec = LAYER) -> Recipe:
    return Recipe("test", (InsertObservers(layer), Calibrate(), *more, Convert()))


def watch(*values: float, bits: int = 8) -> RangeObserver:
    spec = QuantSpec(bits, symmetric=False, granularity=PerTensor(), observer=MeanSquaredError())
    observer = RangeObserver(spec, [len(values)], "x")
    observer(torch.tensor(values))
    return observer


def by_hand(halves: list[Tensor], margin: float, levels: int) -> float:
    """The error of each half in the range of the other, written again."""
    total = 0.0
    for fitted, judged in (halves, halves[::-1]):
        low, high = min(0.0, float(fitted.min())), max(0.0, float(fitted.max()))
        low, high = low * (1 + margin), high * (1 + margin)
        step = (high - low) / levels
        zero = round(-low / step)
        codes = ((judged / step).round() + zero).clamp(0, levels)
        total += float(((codes - zero) * step - judged).square().sum())
    return total


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("reach", [1.0, 1.12, 1.6])
def test_the_margin_is_the_one_of_least_error(bits: int, reach: float) -> None:
    halves = [torch.randn(4000).clamp(-3, 3), torch.randn(4000).clamp(-3, 3)]
    halves[0][:2] = torch.tensor([-3.0, 3.0])
    halves[1][:2] = torch.tensor([-3.0, 3.0]) * reach
    margins = (0.0, 0.1, 0.2, 0.5, 1.0)
    errors = [by_hand(halves, margin, 2**bits - 1) for margin in margins]
    watches = [watch(*half.tolist(), bits=bits) for half in halves]
    assert best_margin(watches, margins) == margins[errors.index(min(errors))]


def test_equals_and_nothing_seen_get_the_smallest() -> None:
    assert best_margin([watch(0.0, 0.0), watch(0.0)], (0.0, 0.5)) == 0.0
    assert best_margin([watch(0.0, 1.0), watch()], (0.0, 0.5)) == 0.0


class Two(nn.Module):
    """The input of the second layer reaches far in some samples."""

    def __init__(self) -> None:
        super().__init__()
        self.steady, self.rare = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor, far: Tensor) -> Tensor:
        return self.steady(x.tanh()) + self.rare(x.tanh() * far)


def batches(n: int, *, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Pairs of samples; how far the second input reaches differs between pairs."""
    generator = torch.Generator().manual_seed(seed)
    reach = torch.rand(n, generator=generator) * 4 + 1
    return [(torch.randn(2, 6, 32, generator=generator), far.expand(2, 6, 32)) for far in reach]


def test_a_layer_with_rare_large_inputs_gets_a_margin_and_loses_less() -> None:
    model, data, judges = Two().eval(), batches(4), batches(60, seed=1)
    programs = [fxq.compress(model, data[0], recipe(*more), data)
                for more in ((), (HeldOutMargin(),))]  # fmt: skip
    noted = {
        row.module
        for row in account(programs[1].graph_module)
        if any(t.by == "HeldOutMargin" for t in row.layer.treatments)
    }
    assert noted == {"rare"}
    with torch.no_grad():
        exact = torch.cat([model(*x) for x in judges])
        found = [torch.cat([p(*x) for x in judges]) for p in programs]
    assert sqnr_db(exact, found[1]) > sqnr_db(exact, found[0]) + 3


def test_order_of_batches_does_not_matter_within_halves_and_the_model_stays() -> None:
    model, data = Two().eval(), batches(6)
    turned = [data[i] for i in (4, 1, 2, 5, 0, 3)]  # even ones stay among themselves
    programs = [fxq.compress(model, data[0], recipe(HeldOutMargin()), d) for d in (data, turned)]
    first, second = (dict(p.named_buffers()) for p in programs)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_one_batch_is_cut_in_two_where_its_size_is_free() -> None:
    model = nn.Linear(8, 8).eval()
    x = torch.randn(16, 5, 8).tanh()
    x[0] *= 1.4
    found = fxq.compress(model, x, recipe(HeldOutMargin()), [x])
    plain = fxq.compress(model, x, recipe(), [x])
    scales = [float(next(b for n, b in p.named_buffers() if n.endswith("input_scale")))
              for p in (found, plain)]  # fmt: skip
    assert scales[0] > 1.05 * scales[1]


def test_rules_that_clip_on_purpose_keep_their_range() -> None:
    model, data = Two().eval(), batches(4)
    clipping = LayerSpec(
        QuantSpec(symmetric=False, granularity=PerTensor(), observer=MeanSquaredError()),
        LAYER.weight,
    )
    pair = [fxq.compress(model, data[0], recipe(*more, layer=clipping), data)
            for more in ((), (HeldOutMargin(),))]  # fmt: skip
    a, b = (dict(p.named_buffers()) for p in pair)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_range_that_saw_zeros_only_stays() -> None:
    model, data = Two().eval(), [(x, 0 * far) for x, far in batches(4)]
    with pytest.warns(FxqWarning, match="saw only zeros"):
        program = fxq.compress(model, data[0], recipe(HeldOutMargin()), data)
    assert bool(program(*data[0]).isfinite().all())


@pytest.mark.parametrize("margins", [(), (0.1, 0.2), (0.0, 0.2, 0.2), (0.0, float("inf"))])
def test_bad_margins(margins: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"HeldOutMargin.margins: expected finite numbers rising"):
        HeldOutMargin(margins)
