"""Sparsity Induction: what it promises of every pruner, and what stands in its way."""

from pathlib import Path
from typing import Any

import pytest
import torch
from optimal_brain import correlated
from pruned import linears
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils._python_dispatch import TorchDispatchMode

import fxq
from fxq.graph import weight_of
from fxq.layer import layer_of
from fxq.passes import sparsity_induction
from fxq.passes.common.scaling import Scaling, fold_scaling, scale_sites
from fxq.passes.pruning import RIA, Group, Magnitude, SparseGPT, Unstructured, Wanda
from fxq.passes.sparsity_induction import AS_PRINTED, InduceSparsity, Learning
from fxq.pipeline import Recipe

BRIEF = Learning(steps=12)
SHIFT_ALONE = Learning(steps=0, starts=("ones",))
LAYER = Unstructured(0.5, "layer")
PRUNERS = [
    Magnitude(LAYER), Magnitude(Group(2, 4)), Wanda(), Wanda(Group(4, 8)), RIA(),
    SparseGPT(LAYER), SparseGPT(Group(2, 4)),
]  # fmt: skip


class Net(nn.Module):
    """A norm some of whose channels are ten times as large, two layers that read it, and more."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(32), nn.Linear(32, 24), nn.Linear(32, 24)
        self.out, self.head = nn.Linear(24, 32, bias=False), nn.Linear(32, 5)
        self.norm.weight.data[[3, 17]] = 10.0
        self.norm.bias.data.normal_()

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return self.head(x + self.out(torch.relu(self.a(h)) * self.b(h)))


def calls(gm: GraphModule) -> list[str]:
    return sorted(str(node.target) for node in gm.graph.nodes if node.op == "call_function")


def compressed(model: nn.Module, x: Tensor, *passes: Any) -> fxq.Program:
    return fxq.compress(model, x, Recipe("r", passes), [x])


def layer_errors(model: Net, program: fxq.Program, x: Tensor) -> Tensor:
    """Return the relative output errors of the layers on the norm, by hand."""
    h = model.norm(x)
    found = []
    for node, module in zip(linears(program.graph_module), (model.a, model.b), strict=False):
        bias = node.args[2]
        assert isinstance(bias, Node)
        state = dict(program.graph_module.named_buffers())
        state |= dict(program.graph_module.named_parameters())
        pruned = nn.functional.linear(h, weight_of(node), state[str(bias.target)])
        power = nn.functional.linear(h, module.weight).square().sum()
        found.append((pruned - module(h)).square().sum() / power)
    return torch.stack(found)


@pytest.mark.parametrize("pruner", PRUNERS, ids=repr)
@torch.no_grad()
def test_errors_are_never_above_the_pruners_and_counts_are_exact(pruner: Any) -> None:
    model, x = Net().eval(), correlated(256, 32)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    base = compressed(model, x, pruner)
    shifted = compressed(model, x, InduceSparsity(pruner, learning=SHIFT_ALONE))
    induced = compressed(model, x, InduceSparsity(pruner, learning=BRIEF))

    errors = [layer_errors(model, program, x) for program in (base, shifted, induced)]
    assert bool((errors[1] < errors[0]).all())
    assert errors[2].sum() <= errors[1].sum() * (1 + 1e-5)
    if isinstance(pruner, Magnitude):
        assert errors[2].sum() < 0.5 * errors[0].sum()
    for node in linears(induced.graph_module)[:3]:
        mask = layer_of(node).mask
        assert mask is not None
        pruner.pattern.check(mask)
        assert not weight_of(node)[~mask].any()
    assert layer_of(linears(induced.graph_module)[3]).mask is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@torch.no_grad()
def test_the_mean_error_on_the_data_is_zero() -> None:
    model, x = Net().eval(), correlated(256, 32)

    program = compressed(model, x, InduceSparsity(Wanda(), learning=BRIEF))

    node = linears(program.graph_module)[0]
    state = dict(program.graph_module.named_buffers())
    bias = node.args[2]
    assert isinstance(bias, Node)
    h = model.norm(x)
    error = nn.functional.linear(h, weight_of(node), state[str(bias.target)]) - model.a(h)
    assert float(error.mean(0).abs().max()) < 1e-4 * float(error.abs().max())


@pytest.mark.parametrize("pruner", [Wanda(Group(2, 4)), SparseGPT(Group(2, 4), damping=0.0)])
def test_exact_scaling_alone_changes_no_choice(pruner: Any) -> None:
    """The reason for a factor of importance: an exact one cancels."""
    model, x = Net().eval(), correlated(256, 32)
    plain = fxq.capture(model, x).graph_module
    scaled = fxq.capture(model, x).graph_module
    site = next(s for s in scale_sites(scaled).sites if s.kind == "norm")
    fold_scaling(scaled, [Scaling(site, 0.5 + 1.5 * torch.rand(32))])

    masks = []
    for gm in (plain, scaled):
        pruned = pruner.run(gm, [(x,)]).graph_module
        masks.append([layer_of(node).mask for node in linears(pruned)[:2]])

    assert all(torch.equal(a, b) for a, b in zip(*masks, strict=True))  # type: ignore[arg-type]


def test_factors_are_learned_through_the_mask() -> None:
    model, x = Net().eval(), correlated(256, 32)
    still = Learning(steps=0, starts=("ones",))
    moving = Learning(steps=30, starts=("ones",))

    masks = []
    for how in (still, moving):
        program = compressed(model, x, InduceSparsity(Magnitude(), learning=how))
        masks.append(torch.stack([layer_of(n).mask for n in linears(program.graph_module)[:2]]))  # type: ignore[misc]

    assert float((masks[0] != masks[1]).double().mean()) > 0.01
    found = layer_of(linears(program.graph_module)[0]).induction
    assert found is not None
    assert found.after.hoyer > found.before.hoyer
    assert found.after.gini > found.before.gini


@torch.no_grad()
def test_the_report_has_losses_and_the_concentration_of_weights(tmp_path: Path) -> None:
    model, x = Net().eval(), correlated(256, 32)
    induced = InduceSparsity(Magnitude(), learning=BRIEF)

    fxq.save(compressed(model, x, induced), tmp_path / "p.fxq")
    program = fxq.load(tmp_path / "p.fxq")

    rows = fxq.report(program).rows
    *found, head = [row.induction for row in rows]
    assert head is None
    assert [row.sparsity for row in rows] == [0.5, 0.5, 0.5, None]
    # Nothing is pruned in front of a and b. Their bias takes the mean: only the outputs' power is
    # another than in `layer_errors`.
    weights = [model.a.weight, model.b.weight, model.out.weight]
    h = model.norm(x)
    powers = [
        (h @ w.T).var(0, correction=0).sum() / (h @ w.T).square().mean(0).sum() for w in weights[:2]
    ]
    losses = layer_errors(model, program, x) / torch.stack(powers)
    for k, (each, weight) in enumerate(zip(found, weights, strict=True)):
        assert each is not None
        size = weight.norm()
        ratio = float(weight.abs().sum() / size)
        root = weight.numel() ** 0.5
        assert each.before.hoyer == pytest.approx((root - ratio) / (root - 1), rel=1e-5)
        rank = float((size / torch.linalg.matrix_norm(weight, 2)) ** 2)
        assert each.before.stable_rank == pytest.approx(rank, rel=1e-2)
        differences = (weight.flatten()[:, None].abs() - weight.flatten().abs()).abs()
        gini = float(differences.mean() / (2 * weight.abs().mean()))
        assert each.before.gini == pytest.approx(gini, rel=1e-4)
        assert each.loss <= each.loss_before
        if k < 2:
            assert each.loss == pytest.approx(float(losses[k]), rel=1e-3)
            assert each.sites == ("a, b",)


@pytest.mark.parametrize("pruner", [Magnitude(), SparseGPT(Group(2, 4))], ids=repr)
@torch.no_grad()
def test_folded_forward_is_the_same_function_and_runs_nothing_more(
    pruner: Any, tmp_path: Path
) -> None:
    model, x = Net().eval(), correlated(256, 32)

    programs = [
        compressed(model, x, InduceSparsity(pruner, learning=BRIEF, fold=where))
        for where in ("nowhere", "forward")
    ]

    torch.testing.assert_close(programs[0](x), programs[1](x), rtol=1e-5, atol=1e-5)
    nodes = [linears(program.graph_module)[0] for program in programs]
    assert torch.equal(layer_of(nodes[0]).mask, layer_of(nodes[1]).mask)  # type: ignore[arg-type]
    ratio = (weight_of(nodes[1]) / weight_of(nodes[0]))[layer_of(nodes[0]).mask]
    assert float(ratio.std()) > 0.01
    plain = calls(fxq.capture(model, x).graph_module)
    for program in programs:
        assert calls(program.graph_module) == plain
        fxq.save(program, tmp_path / "p.fxq")
        torch.testing.assert_close(fxq.load(tmp_path / "p.fxq")(x), program(x))


class CountRelu(TorchDispatchMode):
    """Counts how often the model's activation runs."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.relu.default
        return func(*args, **kwargs or {})


def test_learning_runs_no_model() -> None:
    model, x = Net().eval(), correlated(64, 32)
    counts = []

    for steps in (0, 8):
        gm = fxq.capture(model, x).graph_module
        with torch.no_grad(), CountRelu() as mode:
            InduceSparsity(learning=Learning(steps=steps)).run(gm, [(x,)])
        counts.append(mode.count)

    assert counts[0] == counts[1] > 0


class Awkward(nn.Module):
    """Tied layers with different inputs, a tied embedding, a row of zeros and dead inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(20, 16), nn.LayerNorm(16)
        self.up, self.again = nn.Linear(16, 16), nn.Linear(16, 16)
        self.out = nn.Linear(16, 20, bias=False)
        self.out.weight, self.again.weight = self.table.weight, self.up.weight
        self.up.weight.data[2] = 0.0
        self.norm.weight.data[5], self.norm.bias.data[5] = 0.0, 0.0

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.again(torch.relu(self.up(self.norm(self.table(ids))))))


@pytest.mark.parametrize("pruner", [Magnitude(overrides=()), SparseGPT(overrides=())], ids=repr)
def test_what_is_tied_stays_tied(pruner: Any) -> None:
    model, ids = Awkward().eval(), torch.randint(0, 20, (4, 5))

    program = fxq.compress(
        model, ids, Recipe("r", (InduceSparsity(pruner, learning=BRIEF),)), [ids]
    )

    up, again, out = linears(program.graph_module)
    assert torch.equal(weight_of(up), weight_of(again))
    assert layer_of(up).sparsity == layer_of(again).sparsity == 0.5
    assert layer_of(out).mask is None
    assert "not pruned alike" in layer_of(out).skip.reason  # type: ignore[union-attr]


def test_layers_without_a_site_say_why_they_have_no_factor() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Sigmoid(), nn.Linear(16, 16), nn.Linear(16, 4))
    x = correlated(64, 16)

    program = compressed(model.eval(), x, InduceSparsity(learning=BRIEF))

    reasons = [row.reason for row in fxq.report(program).rows]
    assert "no factor: " in reasons[0]
    assert "no factor: " in reasons[1]
    assert layer_of(linears(program.graph_module)[1]).sparsity == 0.5


@pytest.mark.parametrize("how", [AS_PRINTED, Learning(starts=("spread",), steps=4)])
def test_printed_variants_keep_the_promise(how: Learning) -> None:
    model, x = Net().eval(), correlated(256, 32)

    with torch.no_grad():
        base = compressed(model, x, Magnitude())
        found = compressed(model, x, InduceSparsity(Magnitude(), learning=how))

        assert layer_errors(model, found, x).sum() < layer_errors(model, base, x).sum()


def test_settings_that_mean_nothing_are_refused() -> None:
    for make in ({"steps": -1}, {"bound": 1.0}, {"starts": ()}, {"starts": ("twos",)}):
        with pytest.raises(ValueError, match="Learning: expected steps >= 0"):
            Learning(**make)  # type: ignore[arg-type]


def test_singular_moments_without_damping_are_told_by_name() -> None:
    model, x = Net().eval(), torch.randn(4, 32)

    with pytest.raises(ValueError, match=r"weight of a, b: expected positive definite .* damping"):
        compressed(model, x, InduceSparsity(SparseGPT(damping=0.0)))


def test_recipes_have_the_pruners_and_patterns_of_their_names() -> None:
    for pruner in ("MAGNITUDE", "WANDA", "SPARSEGPT"):
        for name, sizes in (("50", None), ("2_4", (2, 4)), ("4_8", (4, 8))):
            (step,) = getattr(sparsity_induction, f"{pruner}_{name}").passes
            assert type(step.pruner).__name__.upper() == pruner
            pattern = step.pruner.pattern
            assert (None if sizes is None else (pattern.kept, pattern.size)) == sizes
