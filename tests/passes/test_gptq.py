"""GPTQ: codes against the paper's equations with explicit inverses, and what stands in its way."""

from pathlib import Path

import pytest
import torch
from optimal_brain import correlated, damped, surgery
from torch import Tensor, nn

import fxq
from fxq.account import account
from fxq.graph import is_op
from fxq.layer import WeightCodes, layer_of, set_facts
from fxq.passes import gptq
from fxq.passes.common import Convert, InsertObservers
from fxq.passes.common.second_moments import gram
from fxq.passes.gptq import GPTQ, round_columns
from fxq.pipeline import Recipe
from fxq.spec import LayerSpec, PerChannel, PerGroup, QuantSpec

LINEAR = torch.ops.aten.linear.default
AFFINE = QuantSpec(4, symmetric=False, granularity=PerGroup(8))


def affine_range(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return scale and zero-point per row, from the smallest and largest value and 0."""
    low, high = values.amin(1).clamp(max=0), values.amax(1).clamp(min=0)
    scale = (high - low) / (2**bits - 1)
    return scale, (-(2 ** (bits - 1)) - low / scale).round()


def codes_of(column: Tensor, scale: Tensor, zero: Tensor, low: int, high: int) -> Tensor:
    return ((column / scale).round() + zero).clamp(low, high)


@pytest.mark.parametrize("width", [1, 24, 33])
@pytest.mark.parametrize("order", ["given", "activation"])
def test_codes_per_channel_are_those_of_the_equations(width: int, order: str) -> None:
    weight, x = torch.randn(9, width), correlated(200, width)
    moments = x.double().T @ x.double()
    scale = weight.abs().amax(1) / 7
    columns = [*range(width)]
    if order == "activation":
        columns.sort(key=lambda j: -float(moments[j, j]))

    found = round_columns(
        weight, gram(x), QuantSpec(4, granularity=PerChannel(0)), GPTQ(order=order, columns=5)
    )

    def fix(work: Tensor, j: int) -> Tensor:
        return codes_of(work[:, j], scale, torch.zeros(9), -7, 7) * scale

    expected = surgery(weight, damped(moments), columns, fix) / scale[:, None]
    assert torch.equal(found.codes.double(), expected.round())
    torch.testing.assert_close(found.scale[:, 0], scale)


def test_groups_find_their_range_in_the_weights_as_they_are_then() -> None:
    weight, x = torch.randn(6, 40), correlated(200, 40)
    moments = x.double().T @ x.double()
    ranges: list[tuple[Tensor, Tensor]] = []
    codes = torch.zeros(6, 40)

    found = round_columns(weight, gram(x), AFFINE, GPTQ(columns=5))

    def fix(work: Tensor, j: int) -> Tensor:
        if j % 8 == 0:
            ranges.append(affine_range(work[:, j : j + 8], 4))
        scale, zero = ranges[-1]
        codes[:, j] = codes_of(work[:, j], scale, zero, -8, 7)
        return (codes[:, j] - zero) * scale

    surgery(weight, damped(moments), [*range(40)], fix)
    assert torch.equal(found.codes.float(), codes)
    torch.testing.assert_close(found.scale, torch.stack([s for s, _ in ranges], 1).float())
    assert found.zero_point is not None
    assert torch.equal(found.zero_point.double(), torch.stack([z for _, z in ranges], 1))


def test_pruned_weights_stay_zero_and_are_made_up_for() -> None:
    weight, x = torch.randn(6, 16), correlated(200, 16)
    mask = torch.rand(6, 16) > 0.5
    weight = weight * mask
    moments, scale = x.double().T @ x.double(), weight.abs().amax(1) / 7
    spec = QuantSpec(4, granularity=PerChannel(0))

    found = round_columns(weight, gram(x), spec, GPTQ(), mask)

    def fix(work: Tensor, j: int) -> Tensor:
        return codes_of(work[:, j], scale, torch.zeros(6), -7, 7) * scale * mask[:, j]

    expected = surgery(weight, damped(moments), [*range(16)], fix) / scale[:, None]
    assert torch.equal(found.codes.double(), expected.round())
    assert not found.codes[~mask].any()


def test_pairs_of_codes_stay_safe() -> None:
    weight, x = torch.randn(8, 16), correlated(100, 16)
    weight[:, 0] = weight[:, 1] = 3.0  # a pair at its limit
    spec = QuantSpec(8, granularity=PerChannel(0), pair_safe=True)

    for order in ("given", "activation"):
        codes = round_columns(weight, gram(x), spec, GPTQ(order=order)).codes.int()
        assert (codes[:, ::2] + codes[:, 1::2]).abs().max() <= 128


def test_dead_inputs_are_rounded_to_nearest_and_harm_no_other() -> None:
    weight, x = torch.randn(5, 12), correlated(100, 12)
    x[:, 3] = x[:, 7] = 0
    spec, alive = QuantSpec(4, granularity=PerChannel(0)), [0, 1, 2, 4, 5, 6, 8, 9, 10, 11]
    weight[:, 0] = 3.0  # sets the range

    found = round_columns(weight, gram(x), spec, GPTQ()).codes

    nearest = (weight / (3 / 7)).round()
    assert torch.equal(found[:, [3, 7]].float(), nearest[:, [3, 7]])
    without = round_columns(weight[:, alive], gram(x[:, alive]), spec, GPTQ()).codes
    assert torch.equal(found[:, alive], without)


def test_singular_moments_are_damped_or_refused() -> None:
    weight, x = torch.randn(5, 12), correlated(3, 12)

    GPTQ().treat(weight, gram(x), AFFINE_CHANNEL, None)
    with pytest.raises(ValueError, match="found singular ones with damping=0; use a larger one"):
        GPTQ(damping=0).treat(weight, torch.ones(12, 12).double(), AFFINE_CHANNEL, None)
    nothing = GPTQ().treat(weight, torch.zeros(12, 12).double(), AFFINE_CHANNEL, None)
    assert nothing.did.startswith("rounded to nearest")


AFFINE_CHANNEL = QuantSpec(4, symmetric=False, granularity=PerChannel(0))


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 24), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))


def recipe(*steps: object, spec: QuantSpec = AFFINE) -> Recipe:
    return Recipe("r", (InsertObservers(LayerSpec(None, spec)), *steps, Convert()))  # type: ignore[arg-type]


def test_the_second_layer_is_rounded_on_what_the_first_one_gives_now(tmp_path: Path) -> None:
    model, x = TwoLayers().eval(), correlated(96, 16, seed=1).reshape(8, 12, 16)
    data = [x[:4], x[4:]]

    program = fxq.compress(model, x[:4], recipe(GPTQ()), data)

    first, second = [
        layer_of(n).weight for n in program.graph_module.graph.nodes if is_op(n, LINEAR)
    ]
    assert first is not None
    assert second is not None
    assert torch.equal(first.codes, round_columns(model.a.weight, gram(x), AFFINE, GPTQ()).codes)
    zero = first.zero_point.float().repeat_interleave(8, 1)  # type: ignore[union-attr]
    rounded = (first.codes.float() - zero) * first.scale.repeat_interleave(8, 1)
    hidden = torch.relu(nn.functional.linear(x, rounded, model.a.bias))
    expected = round_columns(model.b.weight, gram(hidden), AFFINE, GPTQ())
    assert torch.equal(second.codes, expected.codes)
    on_float = round_columns(model.b.weight, gram(torch.relu(model.a(x))), AFFINE, GPTQ())
    assert not torch.equal(second.codes, on_float.codes)
    fxq.save(program, tmp_path / "p.fxq")
    loaded = fxq.load(tmp_path / "p.fxq")
    assert torch.equal(loaded(x), program(x))
    assert "output error" in str(account(loaded.graph_module)[0].layer.treatments[1].did)


@pytest.mark.parametrize("name", ["gptq_w4", "gptq_w4a8", "gptq_w8a8"])
def test_recipes_are_nearer_than_rounding(name: str) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64), nn.Linear(64, 8)).eval()
    x = correlated(256, 64)
    chosen: Recipe = {"gptq_w4": gptq.W4, "gptq_w4a8": gptq.W4A8, "gptq_w8a8": gptq.W8A8}[name]
    plain = Recipe("plain", tuple(p for p in chosen.passes if not isinstance(p, GPTQ)))

    errors = [
        (fxq.compress(model, x, r, [x])(x) - model(x)).square().mean() for r in (chosen, plain)
    ]

    assert errors[0] < errors[1]


class Twice(nn.Module):
    """One weight for two layers, and for an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(20, 16), nn.Linear(16, 20, bias=False)
        self.again = nn.Linear(16, 20, bias=False)
        self.out.weight = self.again.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        return self.out(x) + self.again(x.roll(1, -1))


def test_layers_that_share_a_weight_share_its_codes_and_the_embedding_stays() -> None:
    model, ids = Twice().eval(), torch.randint(0, 20, (4, 5))

    program = fxq.compress(model, ids, recipe(GPTQ()), [ids])

    found = [layer_of(n).weight for n in program.graph_module.graph.nodes if is_op(n, LINEAR)]
    assert found[0] is not None
    assert found[1] is not None
    assert torch.equal(found[0].codes, found[1].codes)
    tables = [n for n in program.graph_module.graph.nodes if "embedding" in str(n.target)]
    assert tables[0].args[0].op == "get_attr"


def test_what_is_no_linear_and_what_is_fixed_stay_and_say_so() -> None:
    model = nn.Sequential(nn.Conv1d(4, 4, 1), nn.Linear(16, 16)).eval()
    x = torch.randn(2, 4, 16)
    gm = fxq.capture(model, x).graph_module
    spec = LayerSpec(None, QuantSpec(4, granularity=PerChannel(0)))
    gm = InsertObservers(spec, targets=("linear", "conv")).run(gm).graph_module
    linear = next(n for n in gm.graph.nodes if is_op(n, LINEAR))
    codes = WeightCodes(torch.ones(16, 16, dtype=torch.int8), torch.ones(16, 1))
    set_facts(linear, weight=codes)

    result = GPTQ().run(gm, [(x,)])

    assert not result.modified
    remarks = [row.layer.remarks for row in account(result.graph_module)]
    assert remarks[0] == "rounded to nearest: expected a linear, found conv"
    assert remarks[1] == "codes [16, 16] stay: an earlier method fixed them"
    assert layer_of(linear).weight is codes


def test_data_that_is_not_finite_names_the_layer() -> None:
    gm = fxq.capture(TwoLayers().eval(), torch.randn(2, 16)).graph_module
    gm = InsertObservers(LayerSpec(None, AFFINE)).run(gm).graph_module

    with pytest.raises(ValueError, match="input of a: expected finite values, found NaN or Inf"):
        GPTQ().run(gm, [(torch.full((2, 16), torch.nan),)])
    with pytest.raises(ValueError, match="expected at least one batch"):
        GPTQ().run(gm, [])


@pytest.mark.parametrize(
    "wrong",
    [
        {"damping": -1},
        {"columns": 0},
        {"order": "random"},
        {"target": "loss"},
        {"refinements": -1},
        {"rows": "some"},
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="GPTQ: expected damping >= 0"):
        GPTQ(**wrong)  # type: ignore[arg-type]


@torch.no_grad()
def test_within_a_block_codes_of_a_layer_are_found_on_what_rounded_ones_give() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))).eval()
    x, spec = correlated(64, 16), QuantSpec(4, granularity=PerChannel(0))
    observe = InsertObservers(LayerSpec(None, spec))
    method = GPTQ(blocks=("0",), sequential=True)

    program = fxq.compress(model, x, Recipe("r", (observe, method, Convert())), [x])

    first = round_columns(model[0][0].weight, gram(x), spec, method)
    hidden = torch.relu(nn.functional.linear(x, first.codes * first.scale, model[0][0].bias))
    expected = round_columns(model[0][2].weight, gram(hidden), spec, method)
    found = [n for n in program.graph_module.graph.nodes if is_op(n, LINEAR)]
    codes = layer_of(found[1]).weight
    assert codes is not None
    assert torch.equal(codes.codes, expected.codes)
    before = round_columns(model[0][2].weight, gram(torch.relu(model[0][0](x))), spec, method)
    assert not torch.equal(codes.codes, before.codes)


def rounded_values(codes: WeightCodes) -> Tensor:
    """Return what codes in groups stand for, fp64."""
    width = codes.codes.shape[1] // codes.scale.shape[1]
    zero = 0 if codes.zero_point is None else codes.zero_point.repeat_interleave(width, 1)
    return (codes.codes.double() - zero) * codes.scale.double().repeat_interleave(width, 1)


def ridge_regression(x: Tensor, y: Tensor) -> Tensor:
    """Return the weight that gives y for x, held back as GPTQ is by default."""
    ridge = (0.01 * (x.T @ x).diagonal().mean()) ** 0.5 * torch.eye(x.shape[1]).double()
    rows, goals = torch.cat([x, ridge]), torch.cat([y, torch.zeros(len(ridge), y.shape[1])])
    return torch.linalg.lstsq(rows, goals).solution.T


@torch.no_grad()
def test_a_float_target_is_the_fit_of_the_float_outputs_that_other_rows_bear_out() -> None:
    model, x = TwoLayers().eval(), correlated(96, 16, seed=1).reshape(8, 12, 16)
    method = GPTQ(target="float", sequential=True)

    program = fxq.compress(model, x[:4], recipe(method), [x[:4], x[4:]])

    found = [layer_of(n).weight for n in program.graph_module.graph.nodes if is_op(n, LINEAR)]
    assert found[0] is not None
    assert found[1] is not None
    assert torch.equal(found[0].codes, round_columns(model.a.weight, gram(x), AFFINE, GPTQ()).codes)
    own, exact = [], []  # of both halves: 2 of the 4 samples of each batch
    for rows in (x[[0, 1, 4, 5]], x[[2, 3, 6, 7]]):
        given = nn.functional.linear(rows.double(), rounded_values(found[0]), model.a.bias.double())
        own.append(torch.relu(given).flatten(0, 1))
        exact.append(torch.relu(model.a(rows)).flatten(0, 1).double())
    weight = model.b.weight.double()
    changes = [ridge_regression(y, (z - y) @ weight.T) for y, z in zip(own, exact, strict=True)]
    errors = [(z - y) @ weight.T for y, z in zip(own, exact, strict=True)]
    made = torch.cat([own[0] @ changes[1].T, own[1] @ changes[0].T]).flatten()
    share = torch.linalg.lstsq(made[:, None], torch.cat(errors).flatten()[:, None]).solution
    assert 0.1 < share < 0.9
    own = torch.cat(own)
    fit = (weight + share * ridge_regression(own, torch.cat(errors))).float()
    expected = round_columns(fit, gram(own), AFFINE, GPTQ())
    assert torch.equal(found[1].codes, expected.codes)
    assert not torch.equal(
        found[1].codes, round_columns(model.b.weight, gram(own), AFFINE, GPTQ()).codes
    )


@pytest.mark.parametrize("spec", [AFFINE, QuantSpec(3, granularity=PerChannel(0))], ids=str)
def test_refined_codes_cannot_be_bettered_one_by_one(spec: QuantSpec) -> None:
    weight, x = torch.randn(4, 16), correlated(60, 16)
    hessian = damped(x.double().T @ x.double())
    mask = torch.rand(4, 16) > 0.3
    weight = weight * mask

    def error(values: Tensor) -> Tensor:
        change = values - weight.double()
        return ((change @ hessian) * change).sum(1)

    plain, refined = (
        round_columns(weight, gram(x), spec, GPTQ(refinements=n), mask) for n in (0, 50)
    )

    values = rounded_values(refined)
    least = error(values)
    assert (least <= error(rounded_values(plain)) * (1 + 1e-6)).all()
    assert least.sum() < 0.98 * error(rounded_values(plain)).sum()
    assert not values[~mask].any()
    scales = refined.scale.double().repeat_interleave(16 // refined.scale.shape[1], 1)
    for step in (-1, 1):
        codes = refined.codes.int() + step
        for row, column in mask.nonzero().tolist():
            if spec.quant_min <= codes[row, column] <= spec.quant_max:
                other = values.clone()
                other[row, column] += step * scales[row, column]
                assert error(other)[row] >= least[row] * (1 - 1e-6)
    for change in (0.99, 1.01):  # of the scales of one group
        for start in range(0, 16, 16 // refined.scale.shape[1]):
            other = values.clone()
            other[:, start : start + 16 // refined.scale.shape[1]] *= change
            assert (error(other) >= least * (1 - 1e-6)).all()


def test_rows_alike_are_those_of_inputs_divided_by_their_size() -> None:
    x = correlated(60, 16).reshape(5, 12, 16)
    x[0, :3] *= 100
    x[1, 0] = 0
    rows = x.double().flatten(0, 1)
    size = rows.square().mean(1, keepdim=True).sqrt()
    rows = torch.where(size > 0, rows / size, 0.0)

    torch.testing.assert_close(GPTQ(rows="alike").moments(x), rows.T @ rows)
    both = torch.cat([x, 2 * x], -1)
    found = GPTQ(rows="alike", target="float").moments(both)
    expected = torch.stack([part.T @ torch.cat([part, 2 * part], 1) for part in rows.chunk(2)])
    torch.testing.assert_close(found, expected)
