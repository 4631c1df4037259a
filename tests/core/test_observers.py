"""Observers: the ranges they find, and states that merge to the same bytes in any order."""

import copy
import itertools
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from fxq import numerics
from fxq.errors import UnsupportedError
from fxq.observers import RangeObserver
from fxq.spec import (
    Entropy,
    Granularity,
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
    block_of,
)

SHAPE = (6, 5, 9)  # [B, T, C]
MERGEABLE = [MinMax(), Percentile(99.0), MeanSquaredError(steps=20), Entropy(steps=20)]
GRANULARITIES = [PerTensor(), PerChannel(-1), PerToken()]
every_rule = pytest.mark.parametrize("rule", MERGEABLE, ids=lambda r: type(r).__name__)
every_granularity = pytest.mark.parametrize(
    "granularity", GRANULARITIES, ids=lambda g: type(g).__name__
)


def data(shape: tuple[int, ...] = SHAPE, seed: int = 0) -> Tensor:
    """Return channels of different scale and offset, with exact zeros of both signs."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.linspace(0.1, 30, shape[-1])
    x = x + torch.linspace(-1, 1, shape[-1])
    x[0, 0, 0], x[-1, 0, 0] = 0.0, -0.0
    return x


def observe(
    rule: Observer,
    batches: Iterable[Tensor],
    granularity: Granularity | None = None,
    *,
    bits: int = 8,
    symmetric: bool = True,
) -> RangeObserver:
    batches = list(batches)
    spec = QuantSpec(bits, symmetric, granularity or PerTensor(), observer=rule)
    observer = RangeObserver(spec, batches[0].shape, "blocks.3.mlp.fc2")
    for batch in batches:
        observer(batch)
    return observer


def state_bytes(observer: RangeObserver) -> dict[str, bytes]:
    """Return the state as bytes, so that 0.0 and -0.0 differ."""
    return {name: b.numpy().tobytes() for name, b in observer.state_dict().items()}


def result_bytes(observer: RangeObserver) -> dict[str, bytes]:
    scale, zero_point = observer.qparams()
    qparams = {"scale": scale.numpy().tobytes(), "zero_point": zero_point.numpy().tobytes()}
    return state_bytes(observer) | qparams


def quantization_mse(x: Tensor, observer: RangeObserver, low: Tensor, high: Tensor) -> Tensor:
    spec = observer.spec
    limits = spec.quant_min, spec.quant_max
    qparams = numerics.choose_qparams(low, high, *limits, symmetric=spec.symmetric)
    x_hat = numerics.dequantize(numerics.quantize(x, *qparams, *limits), *qparams, torch.float32)
    return (x_hat.double() - x.double()).square().mean()


def test_min_max_by_hand() -> None:
    batches = [torch.tensor([[1.0, -2.0]]), torch.tensor([[0.5, 3.0]])]

    observer = observe(MinMax(), batches, symmetric=False)

    assert [bound.tolist() for bound in observer.range()] == [[[-2.0]], [[3.0]]]
    scale, zero_point = observer.qparams()
    assert scale.item() == pytest.approx(5 / 255, rel=2**-22)
    assert zero_point.item() == -26  # -128 + 2 / (5 / 255)
    assert observer.count == 4


@pytest.mark.parametrize("granularity", [*GRANULARITIES, PerGroup(3)])
def test_min_max_matches_all_data_at_once(granularity: Granularity) -> None:
    x = data()
    batches = x.unsqueeze(1) if granularity == PerGroup(3) else x.split([1, 2, 3])

    observer = observe(MinMax(), batches, granularity)

    whole = torch.cat(list(batches)) if granularity != PerGroup(3) else x.amin(0, keepdim=True)
    low, _ = numerics.block_amin_amax(whole, block_of(granularity, 3))
    assert torch.equal(observer.range()[0], low)


def test_moving_average_by_hand() -> None:
    batches = [torch.tensor([0.0, 1.0]), torch.tensor([-4.0, 3.0]), torch.tensor([0.0, 2.0])]

    low, high = observe(MovingAverage(momentum=0.5), batches).range()

    assert low.item() == -1.0  # 0 -> -2 -> -1
    assert high.item() == 2.0  # 1 -> 2 -> 2


def test_moving_averages_do_not_merge_but_an_empty_one_does() -> None:
    first, second = (observe(MovingAverage(), [data(seed=seed)]) for seed in (1, 2))
    empty = RangeObserver(first.spec, SHAPE, "empty")

    empty.merge(first)

    assert state_bytes(empty) == state_bytes(first)
    with pytest.raises(UnsupportedError, match=r"order of batches.*blocks\.3\.mlp\.fc2"):
        first.merge(second)


@every_granularity
@every_rule
def test_merge_is_associative_and_commutative_and_equals_one_observer(
    rule: Observer, granularity: Granularity
) -> None:
    parts = data().split([1, 2, 3])
    whole = result_bytes(observe(rule, parts, granularity))

    for a, b, c in itertools.permutations(parts):
        left, right, last = (observe(rule, [part], granularity) for part in (a, b, c))
        nested = copy.deepcopy(right)
        nested.merge(last)
        outer = copy.deepcopy(left)
        outer.merge(nested)  # a + (b + c)
        left.merge(right)
        left.merge(last)  # (a + b) + c

        assert result_bytes(left) == whole
        assert result_bytes(outer) == whole


@every_granularity
@every_rule
def test_result_depends_on_neither_order_nor_batch_size(
    rule: Observer, granularity: Granularity
) -> None:
    x = data()

    results = [
        result_bytes(observe(rule, batches, granularity))
        for batches in ([x], x.split(1), x.flip(0).split([4, 2]))
    ]

    assert results[0] == results[1] == results[2]


@every_rule
def test_zeros_of_either_sign_leave_the_same_bytes_in_any_order(rule: Observer) -> None:
    zeros = [torch.tensor([0.0]), torch.tensor([-0.0])]

    assert state_bytes(observe(rule, zeros)) == state_bytes(observe(rule, zeros[::-1]))


def test_merge_of_different_specs_raises() -> None:
    with pytest.raises(ValueError, match="same spec"):
        observe(MinMax(), [data()]).merge(observe(Percentile(), [data()]))


@every_granularity
@every_rule
def test_state_can_be_saved_and_loaded(rule: Observer, granularity: Granularity) -> None:
    observer = observe(rule, [data()], granularity)
    restored = RangeObserver(observer.spec, SHAPE, "restored")

    restored.load_state_dict(observer.state_dict())

    assert result_bytes(restored) == result_bytes(observer)


@every_rule
def test_channels_are_observed_as_if_alone(rule: Observer) -> None:
    x = data((64, 5, 9))

    low, high = observe(rule, [x], PerChannel(-1), symmetric=False).range()

    for channel in range(9):
        alone = observe(rule, [x[..., channel]], symmetric=False).range()
        assert low[0, 0, channel] == alone[0].item()
        assert high[0, 0, channel] == alone[1].item()


@every_rule
def test_non_contiguous_input_counts_the_same(rule: Observer) -> None:
    x = data().transpose(1, 2)

    strided, packed = observe(rule, [x], PerToken()), observe(rule, [x.contiguous()], PerToken())

    assert state_bytes(strided) == state_bytes(packed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@every_rule
def test_half_precision_leaves_the_state_of_its_fp32_values(
    rule: Observer, dtype: torch.dtype
) -> None:
    x = data().to(dtype)

    assert state_bytes(observe(rule, [x])) == state_bytes(observe(rule, [x.float()]))


@every_rule
def test_forward_is_the_identity_and_keeps_no_graph(rule: Observer) -> None:
    observer = RangeObserver(QuantSpec(observer=rule), SHAPE, "x")
    x = data().requires_grad_()

    result = observer(x)

    assert result is x
    assert not any(buffer.requires_grad for buffer in observer.buffers())


def test_empty_batch_changes_nothing() -> None:
    observer = observe(MinMax(), [data(), torch.empty(0, 5, 9)], PerToken())

    assert observer.count == data().numel()


@pytest.mark.parametrize("percent", [90.0, 99.0, 99.9, 100.0])
@pytest.mark.parametrize("symmetric", [True, False])
def test_percentile_is_the_order_statistic_up_to_a_bin(percent: float, symmetric: bool) -> None:
    x = data((40, 50, 9))
    x = torch.where(x > 0, x, 3 * x)  # skewed

    low, high = observe(Percentile(percent), [x], symmetric=symmetric).range()

    x, share = x.double().flatten(), percent / 100
    if symmetric:
        high_expected = x.abs().quantile(share, interpolation="lower")
        low_expected = -high_expected
    else:
        high_expected = x.quantile((1 + share) / 2, interpolation="lower")
        low_expected = x.quantile((1 - share) / 2, interpolation="lower")
    for found, expected in ((low, low_expected), (high, high_expected)):
        torch.testing.assert_close(found.double().squeeze(), expected, rtol=2**-7, atol=1e-6)


def test_percentile_cuts_one_outlier_in_ten_thousand_values() -> None:
    x = torch.linspace(-1, 1, 10_000)
    x[1234] = 1e4

    low, high = observe(Percentile(99.99), [x]).range()

    assert 0.99 < high.item() <= 1.01
    assert low.item() == -high.item()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("outlier", [0.0, 100.0])
def test_mean_squared_error_is_near_the_best_candidate_on_the_raw_values(
    outlier: float, bits: int, symmetric: bool
) -> None:
    x = data((40, 50, 9))[..., 4].clone()
    x[0, 0] = outlier

    observer = observe(MeanSquaredError(), [x], bits=bits, symmetric=symmetric)

    found = quantization_mse(x, observer, *observer.range())
    amax = x.abs().max()
    limits = [amax * 100 ** (-k / 99) for k in range(100)]
    candidates = [(x.min().clamp(min=-t), x.max().clamp(max=t)) for t in limits]
    errors = [quantization_mse(x, observer, *candidate) for candidate in candidates]
    assert found <= min(errors) * 1.02
    assert found <= errors[0]


@pytest.mark.parametrize("rule", [MeanSquaredError(), Entropy()])
@pytest.mark.parametrize("symmetric", [True, False])
def test_values_that_fill_their_range_evenly_are_not_clipped_at_8_bits(
    symmetric: bool, rule: Observer
) -> None:
    x = torch.linspace(-2, 2, 10_001)

    low, high = observe(rule, [x], symmetric=symmetric).range()

    assert (low.item(), high.item()) == (-2.0, 2.0)


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0)])
def test_entropy_clips_a_lone_outlier(granularity: Granularity) -> None:
    x = torch.randn(2, 50_000, generator=torch.Generator().manual_seed(0))
    x[:, 7] = 1000.0

    _, high = observe(Entropy(), [x], granularity).range()

    assert bool((high > 3).all())
    assert bool((high < 50).all())


def test_entropy_keeps_the_bulk_when_a_single_value_is_small() -> None:
    x = torch.linspace(4.9, 5.1, 100)
    x[0] = 0.06

    _, high = observe(Entropy(), [x]).range()

    assert high.item() > 4.9


def test_entropy_of_values_below_the_grid_is_min_max() -> None:
    x = torch.tensor([1e-12, -2e-12, 3e-12])

    low, high = observe(Entropy(), [x]).range()

    assert (low.item(), high.item()) == (x.min().item(), x.max().item())


def test_entropy_ignores_exact_zeros() -> None:
    x = torch.randn(50_000, generator=torch.Generator().manual_seed(0)).abs()

    dense, sparse = (observe(Entropy(), [v], bits=4) for v in (x, torch.cat([x, 0 * x, 0 * x])))

    assert torch.equal(dense.range()[1], sparse.range()[1])


@pytest.mark.parametrize("magnitude", [1e-44, 1e-12, 1e12, 1e30])
@pytest.mark.parametrize("symmetric", [True, False])
@every_rule
def test_magnitudes_beyond_the_grid_stay_inside_their_exact_range(
    rule: Observer, symmetric: bool, magnitude: float
) -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * magnitude

    observer = observe(rule, [x], symmetric=symmetric)

    low, high = observer.range()
    assert 0 < high.item() <= x.abs().max().item()
    assert 0 > low.item() >= -x.abs().max().item()
    assert torch.isfinite(observer.qparams()[0]).all()


@pytest.mark.parametrize("symmetric", [True, False])
@every_granularity
@every_rule
def test_all_zero_and_constant_channels_get_finite_positive_scales(
    rule: Observer, granularity: Granularity, symmetric: bool
) -> None:
    constants = torch.tensor([0.0, -0.0, 1.0, -1.0, 1e-30, -3e4])
    x = constants.reshape(1, 6, 1).expand(2, 6, 6) * torch.ones(6)

    for tensor in (x, x.transpose(1, 2), torch.zeros(2, 6, 6)):
        scale, zero_point = observe(rule, [tensor], granularity, symmetric=symmetric).qparams()
        assert bool((torch.isfinite(scale) & (scale > 0)).all())
        assert bool((zero_point.abs() <= 128).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@every_rule
def test_non_finite_values_raise_and_leave_the_state(rule: Observer, bad: float) -> None:
    observer = observe(rule, [data()], PerToken())
    before, x = state_bytes(observer), data()
    x[1, 2, 3] = x[4, 4, 4] = bad

    with pytest.raises(ValueError, match=r"found 2 NaN or Inf of 270 at blocks\.3\.mlp\.fc2"):
        observer(x)

    assert state_bytes(observer) == before


@every_rule
def test_qparams_without_data_raises(rule: Observer) -> None:
    observer = RangeObserver(QuantSpec(observer=rule), SHAPE, "blocks.0.attn.proj")

    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.proj saw no data"):
        observer.qparams()


def test_another_token_count_raises_with_both() -> None:
    observer = observe(MinMax(), [data()], PerToken())

    with pytest.raises(ValueError, match=r"\[1, 5, 1\], found a tensor of shape \[6, 4, 9\]"):
        observer(data()[:, :4])


def test_another_number_of_dimensions_raises_where_the_scale_is_another() -> None:
    observer = RangeObserver(QuantSpec(granularity=PerChannel(1)), (6, 4, 8), "x")

    with pytest.raises(ValueError, match="found a tensor of shape"):
        observer(torch.randn(6, 5))
    observer(torch.randn(6, 2, 4, 8)[:, 0])


@pytest.mark.parametrize(
    "spec", [QuantSpec(dynamic=True), QuantSpec(pair_safe=True, granularity=PerChannel(0))]
)
def test_spec_that_calibration_does_not_decide_raises(spec: QuantSpec) -> None:
    with pytest.raises(ValueError, match="needs a range"):
        RangeObserver(spec, (4, 4), "x")


def test_dynamic_token_dimension_raises_only_where_the_scale_needs_it() -> None:
    class Tokens(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1

    shapes = {"x": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}
    program = torch.export.export(Tokens(), (torch.zeros(2, 3, 4),), dynamic_shapes=shapes)
    (output,) = program.graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor)
    shape = output.meta["val"].shape

    RangeObserver(QuantSpec(granularity=PerChannel(-1)), shape, "x")
    with pytest.raises(ValueError, match=r"PerToken\(\) needs a fixed shape"):
        RangeObserver(QuantSpec(granularity=PerToken()), shape, "x")


@pytest.mark.parametrize(("values", "zeros"), [([0.0, -0.0], True), ([0.0, -1.0], False)])
def test_an_observer_knows_that_it_saw_only_zeros(values: list[float], zeros: bool) -> None:
    observer = RangeObserver(QuantSpec(), (2,), "edge")
    assert not observer.saw_only_zeros

    observer(torch.tensor(values))

    assert observer.saw_only_zeros is zeros
