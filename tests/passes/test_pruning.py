"""Pruning: masks against the papers' equations, exact counts, and what stands in its way."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from optimal_brain import correlated, damped, surgery
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

import fxq
from fxq.dialect import ATEN, Dialect
from fxq.errors import PassError, SkippedError
from fxq.graph import is_op, weight_of
from fxq.layer import layer_of, set_facts
from fxq.passes import pruning, smoothquant, w8a8
from fxq.passes.common import FIRST, Calibrate, Convert, InsertObservers
from fxq.passes.common.second_moments import energy, gram
from fxq.passes.pruning import RIA, Group, Magnitude, Pattern, SparseGPT, Unstructured, Wanda
from fxq.pipeline import Pass, Recipe
from fxq.rewriting import add_buffer

LINEAR = torch.ops.aten.linear.default
PATTERNS = [Unstructured(0.5), Unstructured(0.3, "layer"), Group(2, 4), Group(4, 8), Group(1, 3)]


def naive_mask(scores: Tensor, pattern: Pattern) -> Tensor:
    """Return True for what stays, one comparison at a time; the first of equal scores goes."""
    n, k = scores.shape
    mask = torch.ones(n, k, dtype=torch.bool)
    if isinstance(pattern, Unstructured) and pattern.per == "layer":
        places = sorted((float(scores[i, j]), i, j) for i in range(n) for j in range(k))
        for _, i, j in places[: int(pattern.sparsity * n * k)]:
            mask[i, j] = False
        return mask
    for i in range(n):
        if isinstance(pattern, Unstructured):
            parts = [([*range(k)], int(pattern.sparsity * k))]
        else:
            groups = [[*range(j, min(j + pattern.size, k))] for j in range(0, k, pattern.size)]
            parts = [(group, max(0, len(group) - pattern.kept)) for group in groups]
        for columns, gone in parts:
            for j in sorted(columns, key=lambda j, i=i: (float(scores[i, j]), j))[:gone]:
                mask[i, j] = False
    return mask


@pytest.mark.parametrize("width", [1, 7, 32, 43])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_masks_are_those_of_the_equations(pattern: Pattern, width: int) -> None:
    weight, x = torch.randn(6, width), correlated(50, width)
    weight[2] = 0.0
    norm = x.double().norm(dim=0)
    rows, columns = weight.double().abs().sum(1), weight.double().abs().sum(0)
    shares = [
        [
            float(abs(weight[i, j].double()) / columns[j]) if columns[j] else 0.0
            for j in range(width)
        ]
        for i in range(6)
    ]
    own = weight.double().abs() / rows.where(rows > 0, 1.0)[:, None]
    scores = {
        Wanda(): weight.double().abs() * norm,
        RIA(): (torch.tensor(shares).double() + own) * norm**0.5,
    }

    for pruner, expected in scores.items():
        kept, mask = pruner.prune(weight, energy(x), pattern)
        assert torch.equal(mask, naive_mask(expected, pattern))
        assert torch.equal(kept, weight)
        pattern.check(mask)


@pytest.mark.parametrize("width", [1, 30, 48])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_sparsegpt_is_optimal_brain_surgery(pattern: Pattern, width: int) -> None:
    weight, x = torch.randn(6, width), correlated(200, width)
    moments = damped(x.double().T @ x.double())
    size = pattern.size if isinstance(pattern, Group) else 16
    mask = torch.ones(6, width, dtype=torch.bool)

    found, found_mask = SparseGPT(columns=16).prune(weight, gram(x), pattern)

    def gone(columns: int) -> int:
        assert isinstance(pattern, Unstructured)
        return int(pattern.sparsity * columns * (1 if pattern.per == "row" else 6))

    def fix(work: Tensor, j: int) -> Tensor:
        if j % size == 0:
            some = [*range(j, min(j + size, width))]
            cost = torch.stack(
                [work[:, c] ** 2 / torch.linalg.inv(moments[c:, c:])[0, 0] for c in some], 1
            )
            if isinstance(pattern, Group):
                mask[:, some] = naive_mask(cost, pattern)
            else:
                n_gone = gone(j + len(some)) - gone(j)
                rows = cost if pattern.per == "row" else cost.flatten()[None]
                lowest = rows.argsort(1)[:, :n_gone]
                kept = torch.ones_like(rows).scatter(1, lowest, 0).bool()
                mask[:, some] = kept.reshape(cost.shape)
        return work[:, j] * mask[:, j]

    expected = surgery(weight, moments, [*range(width)], fix)
    assert torch.equal(found_mask, mask)
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-5)
    pattern.check(found_mask)


def test_dead_inputs_go_first_and_keep_their_weights_where_they_stay() -> None:
    weight, x = torch.randn(4, 8) + 5, correlated(50, 8)
    x[:, [1, 2, 3]] = 0

    found, mask = SparseGPT().prune(weight, gram(x), Group(2, 4))

    assert mask[:, 0].all()
    assert mask[:, 1:4].sum(1).tolist() == [1] * 4
    assert torch.equal(found[mask][:2], weight[mask][:2]) or bool(mask[0, :4].sum() == 2)
    stays = mask[:, 3]
    assert torch.equal(found[stays, 3], weight[stays, 3])


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.b(torch.relu(self.a(x))))


def linears(gm: GraphModule) -> list[Node]:
    return [node for node in gm.graph.nodes if is_op(node, LINEAR)]


def test_the_second_layer_is_pruned_on_what_the_first_one_gives_now(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 24), nn.Linear(24, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x)))

    model, x = Two().eval(), correlated(64, 16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pattern = Unstructured(0.5)

    program = fxq.compress(model, x, Recipe("w", (Wanda(overrides=()),)), [x[:32], x[32:]])

    masks = [layer_of(node).mask for node in linears(program.graph_module)]
    _, first = Wanda().prune(model.a.weight.detach(), energy(x), pattern)
    hidden = torch.relu(nn.functional.linear(x, model.a.weight * first, model.a.bias))
    _, second = Wanda().prune(model.b.weight.detach(), energy(hidden), pattern)
    assert torch.equal(masks[0], first)  # type: ignore[arg-type]
    assert torch.equal(masks[1], second)  # type: ignore[arg-type]
    expected = nn.functional.linear(hidden, model.b.weight * second, model.b.bias)
    torch.testing.assert_close(program(x), expected)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    fxq.save(program, tmp_path / "p.fxq")
    loaded = fxq.load(tmp_path / "p.fxq")
    assert torch.equal(layer_of(linears(loaded.graph_module)[1]).mask, second)  # type: ignore[arg-type]


def test_a_report_says_how_much_of_each_layer_is_gone_and_strict_has_no_complaint() -> None:
    model, x = Residual().eval(), torch.randn(4, 16)

    program = fxq.compress(model, x, Recipe("m", (Magnitude(Group(2, 4)),)), strict=True)

    rows = fxq.report(program).rows
    assert [row.sparsity for row in rows] == [0.5, 0.5, None]
    assert rows[0].reason.endswith("zeros are multiplied like other numbers; 50.00% pruned (2:4)")
    assert rows[2].reason == "override '<last>' keeps it dense"
    assert "50.00% pruned" in str(fxq.report(program))


@pytest.mark.parametrize("recipe", [pruning.SPARSEGPT_2_4_W8A8, pruning.SPARSEGPT_50_W4])
def test_what_is_pruned_stays_zero_when_it_is_quantized(recipe: Recipe) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 8)).eval()
    x = correlated(64, 64)

    program = fxq.compress(model, x, recipe, [x])

    for node in linears(program.graph_module)[:2]:
        codes, _, zero = node.args[1].args[:3]
        state = dict(program.graph_module.named_buffers())
        values = state[codes.target].int()
        if zero is not None:
            values = values - state[zero.target].repeat_interleave(32, 1)
        assert not values[~layer_of(node).mask].any()  # type: ignore[index]
        assert layer_of(node).sparsity == 0.5
    rows = fxq.report(program).rows
    assert rows[0].sparsity == 0.5
    assert "50.00% pruned" in rows[0].reason


def test_scaling_after_pruning_keeps_the_mask() -> None:
    model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    x = correlated(64, 16)
    recipe = Recipe("both", (Wanda(), *smoothquant.W8A8.passes))

    program = fxq.compress(model, x, recipe, [x])

    assert layer_of(linears(program.graph_module)[0]).sparsity == 0.5


@dataclass(frozen=True)
class Shift(Pass):
    """Breaks masks."""

    reads: ClassVar[Dialect] = ATEN
    writes: ClassVar[Dialect] = ATEN

    def run(self, gm: GraphModule) -> PassResult:
        for node in linears(gm)[:1]:
            value = weight_of(node) + 0.1
            node.update_arg(1, add_buffer(gm, "a.moved", value, like=node))
        return PassResult(gm, modified=True)


@dataclass(frozen=True)
class Compute(Shift):
    """Makes a pruned weight one that is computed."""

    def run(self, gm: GraphModule) -> PassResult:
        node = linears(gm)[0]
        with gm.graph.inserting_before(node):
            moved = gm.graph.call_function(torch.ops.aten.neg.default, (node.args[1],))
        moved.meta = {"val": node.args[1].meta["val"]}  # type: ignore[union-attr]
        node.update_arg(1, moved)
        return PassResult(gm, modified=True)


def test_a_pass_that_breaks_a_mask_is_told() -> None:
    model, x = Residual().eval(), torch.randn(4, 16)

    with pytest.raises(PassError, match=r"^a after Shift: mask: expected zeros .* found other"):
        fxq.compress(model, x, Recipe("r", (Magnitude(), Shift())))
    with pytest.raises(PassError, match="a after Compute: expected a constant weight, because"):
        fxq.compress(model, x, Recipe("r", (Magnitude(), Compute())))


def test_a_layer_is_pruned_once() -> None:
    model, x = Residual().eval(), torch.randn(4, 16)

    with pytest.raises(ValueError, match="Wanda: expected dense layers, found a pruned before"):
        fxq.compress(model, x, Recipe("r", (Magnitude(), Wanda(Group(2, 4)))), [x])
    others = Wanda(overrides=(("a", None), ("b", None)))
    program = fxq.compress(model, x, Recipe("r", (Magnitude(), others)), [x])
    assert [layer_of(n).sparsity for n in linears(program.graph_module)] == [0.5] * 3


def test_codes_cannot_be_pruned() -> None:
    with pytest.raises(ValueError, match="Wanda reads ATEN, but Convert before it writes QUANT"):
        Recipe("r", (*w8a8.DYNAMIC.passes, Wanda()))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.up = nn.Embedding(20, 16), nn.Linear(16, 16)
        self.again, self.out = nn.Linear(16, 16), nn.Linear(16, 20, bias=False)
        self.out.weight, self.again.weight = self.table.weight, self.up.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.again(torch.relu(self.up(self.table(ids)))))


@pytest.mark.parametrize("pruner", [Magnitude(overrides=()), SparseGPT(overrides=())])
def test_tied_linears_stay_tied_and_a_tied_embedding_stays_dense(pruner: Pass) -> None:
    model, ids = Tied().eval(), torch.randint(0, 20, (4, 5))

    program = fxq.compress(model, ids, Recipe("r", (pruner,)), [ids])

    up, again, out = linears(program.graph_module)
    assert torch.equal(weight_of(up), weight_of(again))
    assert torch.equal(layer_of(up).mask, layer_of(again).mask)  # type: ignore[arg-type]
    assert layer_of(up).sparsity == 0.5
    assert layer_of(out).mask is None
    with pytest.raises(SkippedError, match="out: its weight is also that of table, which is not"):
        fxq.compress(model, ids, Recipe("r", (pruner,)), [ids], strict=True)
    apart = Recipe("r", (Magnitude(overrides=((FIRST, Group(2, 4)), ("out", None))),))
    with pytest.raises(SkippedError, match="its weight is also that of"):
        fxq.compress(model, ids, apart, strict=True)


def test_a_pattern_that_is_not_met_is_told() -> None:
    mask = torch.tensor([[True, False, True, True], [False, True, True, False]])

    with pytest.raises(PassError, match="expected 2 of every 4 neighbours to stay, found 2 to 3"):
        Group(2, 4).check(mask)
    with pytest.raises(PassError, match="expected 2 of 4 weights to go, 50% of each row, found 1"):
        Unstructured(0.5).check(mask)


@pytest.mark.parametrize(
    "make", [lambda: Unstructured(1.5), lambda: Group(0, 4), lambda: Group(5, 4)]
)
def test_patterns_that_mean_nothing_are_refused(make: object) -> None:
    with pytest.raises(ValueError, match=r"(Unstructured|Group): expected"):
        make()  # type: ignore[operator]


def test_weights_that_are_not_finite_are_refused_by_name() -> None:
    model, x = Residual().eval(), torch.randn(4, 16)
    model.b.weight.data[0, 0] = torch.nan

    with pytest.raises(ValueError, match="weight of b: expected finite values, found NaN or Inf"):
        fxq.compress(model, x, Recipe("r", (Magnitude(),)))


def test_a_convolution_stays_dense_and_says_so() -> None:
    model = nn.Sequential(nn.Conv1d(4, 4, 1), nn.Linear(16, 16), nn.Linear(16, 16)).eval()
    gm = fxq.capture(model, torch.randn(2, 4, 16)).graph_module

    gm = Magnitude().run(gm).graph_module

    conv = next(n for n in gm.graph.nodes if "conv" in str(n.target))
    skip = layer_of(conv).skip
    assert skip is not None
    assert (skip.reason, skip.intended) == ("Magnitude does not prune conv", True)


def test_half_precision_stays_and_counts_are_exact() -> None:
    model, x = Residual().eval().bfloat16(), torch.randn(8, 16).bfloat16()

    program = fxq.compress(model, x, Recipe("r", (SparseGPT(Group(2, 4)),)), [x])

    node = linears(program.graph_module)[0]
    assert weight_of(node).dtype == torch.bfloat16
    assert not weight_of(node)[~layer_of(node).mask].any()  # type: ignore[index]
    observed = Recipe("q", (InsertObservers(w8a8.STATIC_LAYER), Calibrate(), Convert()))
    set_facts(node, mask=layer_of(node).mask)
    assert fxq.compress(model, x, Recipe("b", (Wanda(), *observed.passes)), [x]).sqnr_db > 3
