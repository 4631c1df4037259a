"""The fold: exact for every family and every kind of site, and never in the model's own tensors."""

import pytest
import torch
from scaling import family, random_scaling, with_slow
from small_models import ZOO
from torch import Tensor, nn

import fxq
from fxq.errors import PassError, UnsupportedError
from fxq.graph import is_op
from fxq.passes.common import check_float_function, float_difference
from fxq.passes.common.scaling import (
    ScaleSites,
    Scaling,
    fold_scaling,
    scale_sites,
)
from fxq.rewriting import copy_graph

aten = torch.ops.aten


def sites_of(model: nn.Module, *inputs: Tensor) -> tuple[torch.fx.GraphModule, ScaleSites]:
    gm = fxq.capture(model.eval(), inputs).graph_module
    return gm, scale_sites(gm)


@pytest.mark.parametrize("name", with_slow(*ZOO))
@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.float64], ids=str
)
def test_random_scales_and_shifts_keep_the_float_function(name: str, dtype: torch.dtype) -> None:
    gm, inputs = family(name, dtype)
    before = copy_graph(gm)
    sites = scale_sites(gm).sites

    fold_scaling(gm, [random_scaling(site, seed) for seed, site in enumerate(sites)])

    gm.graph.lint()
    # Measured: at most 2e-15 in fp64, 4e-6 in fp32.
    worst = check_float_function(before, gm, [inputs], name="random factors")
    assert set(worst) == {dtype}
    assert not torch.equal(*(next(iter(_floats(g, inputs))) for g in (before, gm))), "nothing done"


def _floats(gm: torch.fx.GraphModule, inputs: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        leaves = torch.utils._pytree.tree_leaves(gm(*inputs))
    return [leaf for leaf in leaves if leaf.is_floating_point()]


class NormThenLinear(nn.Module):
    """A norm in front of a linear that has no bias."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.linear = norm, nn.Linear(2, 1, bias=False)
        self.linear.weight.data = torch.tensor([[3.0, 5.0]])

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x))


@pytest.mark.parametrize(
    "norm",
    [nn.LayerNorm(2), nn.LayerNorm(2, elementwise_affine=False), nn.RMSNorm(2)],
    ids=["affine", "plain", "rms"],
)
def test_a_fold_by_hand(norm: nn.Module) -> None:
    gm, found = sites_of(NormThenLinear(norm), torch.randn(3, 2))
    (site,) = found.sites

    fold_scaling(gm, [Scaling(site, torch.tensor([2.0, 0.5]), torch.tensor([1.0, -2.0]))])

    buffers = dict(gm.named_buffers())
    assert torch.equal(buffers["linear.weight_scaled"], torch.tensor([[6.0, 2.5]]))  # W s
    assert torch.equal(buffers["linear.bias_scaled"], torch.tensor([3.0 - 10.0]))  # W d
    assert torch.equal(buffers["norm.weight_scaled"], torch.tensor([0.5, 2.0]))  # 1 / s
    assert torch.equal(buffers["norm.bias_scaled"], torch.tensor([-0.5, 4.0]))  # -d / s
    assert sum(is_op(n, aten.add.Tensor) for n in gm.graph.nodes) == isinstance(norm, nn.RMSNorm)


class Modulated(nn.Module):
    """Adaptive LayerNorm; the rows that modulate it are one layer's own, or are read twice."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.modulation, self.shared = nn.Linear(4, 12), shared
        self.norm = nn.LayerNorm(6, elementwise_affine=False)
        self.a, self.b = nn.Linear(6, 5), nn.Linear(6, 5)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.modulation(c).unsqueeze(1).chunk(2, -1)
        y = self.a(self.norm(x) * (1 + scale) + shift)
        return y + self.b(self.norm(2 * x) * (1 + scale) + shift) if self.shared else y


def test_the_rows_of_a_modulation_take_scale_and_shift() -> None:
    model = Modulated(shared=False)
    gm, found = sites_of(model, torch.randn(2, 3, 6), torch.randn(2, 4))
    (site,) = [site for site in found.sites if site.kind == "modulate"]
    operators = len(gm.graph.nodes)
    scale, shift = torch.full((6,), 2.0), torch.full((6,), 3.0)

    fold_scaling(gm, [Scaling(site, scale, shift)])

    bias = dict(gm.named_buffers())["modulation.bias_scaled"]
    assert torch.equal(bias[:6], (model.modulation.bias[:6] - 3) / 2)  # rows of the shift
    assert torch.equal(bias[6:], model.modulation.bias[6:])  # rows of the scale
    ops = [n for n in gm.graph.nodes if n.op == "call_function"]
    assert len(gm.graph.nodes) == operators + 1  # the norm's weight, and no operator
    assert sum(is_op(n, aten.mul.Tensor) for n in ops) == 1


def test_a_modulation_that_two_edges_share_is_scaled_at_each_of_them() -> None:
    inputs = torch.randn(2, 3, 6), torch.randn(2, 4)
    gm, found = sites_of(Modulated(shared=True), *inputs)
    sites = [site for site in found.sites if site.kind == "modulate"]
    before = copy_graph(gm)

    fold_scaling(gm, [random_scaling(site, seed) for seed, site in enumerate(sites)])

    assert len(sites) == 2
    check_float_function(before, gm, [inputs], name="modulation")


def test_the_users_tensors_are_not_written_to() -> None:
    gm, _ = family("dit")
    before = {name: (p.data_ptr(), p.clone()) for name, p in gm.named_parameters()}
    versions = {name: p._version for name, p in gm.named_parameters()}
    tensors = dict(gm.named_parameters())

    fold_scaling(gm, [random_scaling(site, 0) for site in scale_sites(gm).sites])

    for name, tensor in tensors.items():
        assert tensor.data_ptr() == before[name][0]
        assert torch.equal(tensor, before[name][1])
        assert tensor._version == versions[name]


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner, self.out = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.inner(torch.relu(self.inner(self.norm(x))))))


def test_layers_that_share_a_weight_share_it_after_the_fold() -> None:
    x = torch.randn(4, 8)
    gm, found = sites_of(Twice(), x)
    before = copy_graph(gm)

    fold_scaling(gm, [random_scaling(site, 1) for site in found.sites])

    check_float_function(before, gm, [(x,)], name="twice")
    weights = {n.args[1] for n in gm.graph.nodes if is_op(n, aten.linear.default)}
    assert len(weights) == 2


def test_an_overflow_of_the_dtype_is_an_error_that_names_the_layer() -> None:
    model = NormThenLinear(nn.LayerNorm(2)).half()
    model.linear.weight.data.fill_(60000.0)
    gm, found = sites_of(model, torch.randn(3, 2).half())

    with pytest.raises(ValueError, match=r"weight of linear: expected it to stay finite in .*16"):
        fold_scaling(gm, [Scaling(found.sites[0], torch.tensor([4.0, 4.0]))])


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        ([1.0, 0.0], "values > 0"),
        ([1.0, -1.0], "values > 0"),
        ([1.0, torch.nan], "finite values"),
        ([1.0, torch.inf], "finite values"),
        ([1.0], "expected 2 finite values"),
    ],
)
def test_bad_factors_are_refused(scale: list[float], message: str) -> None:
    _, found = sites_of(NormThenLinear(nn.LayerNorm(2)), torch.randn(3, 2))

    with pytest.raises(ValueError, match=message):
        Scaling(found.sites[0], torch.tensor(scale))


def test_a_shift_where_none_is_possible_is_refused_with_the_reason() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    _, found = sites_of(model, torch.randn(2, 4))
    (site,) = [site for site in found.sites if site.kind == "relu"]

    with pytest.raises(UnsupportedError, match="relu"):
        Scaling(site, torch.ones(4), torch.ones(4))


def test_the_proof_sees_a_function_that_changed() -> None:
    x = torch.randn(4, 8)
    gm, _ = sites_of(Twice(), x)
    wrong = copy_graph(gm)
    (relu, *_) = [n for n in wrong.graph.nodes if is_op(n, aten.relu.default)]
    relu.target = aten.neg.default
    wrong.recompile()

    assert float_difference(gm, gm, [(x,)]) == {torch.float32: 0.0}
    with pytest.raises(PassError, match="test: expected the float function to stay the same"):
        check_float_function(gm, wrong, [(x,)], name="test")
