"""Pruning a model: block by block, tied weights, what stays dense, and what is refused."""

from pathlib import Path

import pytest
import torch
from optimal_brain import correlated
from pruned import Residual, linears
from torch import Tensor, nn

import fxq
from fxq.errors import SkippedError
from fxq.graph import weight_of
from fxq.layer import layer_of, set_facts
from fxq.passes import w8a8
from fxq.passes.common import FIRST, Calibrate, Convert, InsertObservers
from fxq.passes.common.second_moments import energy
from fxq.passes.pruning import Group, Magnitude, SparseGPT, Unstructured, Wanda
from fxq.pipeline import Pass, Recipe


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


class Block(nn.Module):
    """Two layers in one block."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
        self.out = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x + self.inner(x))


@pytest.mark.parametrize("sequential", [False, True])
@torch.no_grad()
def test_within_a_block_a_layer_is_pruned_on_what_treated_ones_give_if_asked(
    sequential: bool,
) -> None:
    model, x = Block().eval(), correlated(64, 16)
    first, second = model.inner[0], model.inner[2]

    pruner = Wanda(blocks=("inner",), sequential=sequential)
    program = fxq.compress(model, x, Recipe("w", (pruner,)), [x[:32], x[32:]])

    _, mask = Wanda().prune(first.weight, energy(x), Unstructured(0.5))
    hidden = {
        False: torch.relu(first(x)),
        True: torch.relu(nn.functional.linear(x, first.weight * mask, first.bias)),
    }
    masks = {
        kind: Wanda().prune(second.weight, energy(given), Unstructured(0.5))[1]
        for kind, given in hidden.items()
    }
    found = layer_of(linears(program.graph_module)[1]).mask
    assert not torch.equal(masks[True], masks[False])
    assert torch.equal(found, masks[sequential])  # type: ignore[arg-type]
