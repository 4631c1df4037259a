"""The finder: how many sites of which kind each family has, and why layers are left out."""

from collections import Counter

import families
import pytest
import torch
from models import Computed
from scaling import random_scaling, with_slow
from small_models import ZOO
from torch import Tensor, nn

import fxq
from fxq.analysis.factors import connected_components
from fxq.graph import is_op, owner_name
from fxq.numerics import sqnr_db
from fxq.passes import repq_vit, smoothquant
from fxq.passes.common.scaling import ScaleSite, ScaleSites, fold_scaling, scale_sites
from fxq.pipeline import Recipe

# kind -> how many, by family. A number that changes is a finder that sees more, or less.
TABLE: dict[str, dict[str, int]] = {
    "vit": {"norm": 5, "value": 2, "query_key": 2, "quantizer": 3},
    "deit": {"norm": 3, "value": 1, "query_key": 1, "quantizer": 2},
    "beit": {"norm": 3, "value": 1, "query_key": 1, "quantizer": 2},
    "swin": {"norm": 10, "value": 4, "query_key": 4, "quantizer": 5},
    "gpt2": {"norm": 2, "value": 1, "query_key": 1, "quantizer": 1},
    "imagegpt": {"norm": 3, "value": 1, "query_key": 1, "quantizer": 1},
    "llama": {"norm": 3, "value": 1, "gated": 1, "query_key": 1},
    "gemma": {"norm": 2, "value": 1, "gated": 1, "query_key": 1},  # the head's weight is tied
    "opt": {"norm": 2, "value": 1, "relu": 1, "query_key": 1},
    "unet": {"norm": 4, "value": 4, "query_key": 4, "quantizer": 35},
    "unet_condition": {
        "norm": 16, "value": 8, "gated": 4, "linear": 1, "query_key": 8, "quantizer": 39,
    },
    "dit": {"modulate": 3, "value": 1, "query_key": 1, "quantizer": 4},
    "wan": {"modulate": 3, "norm": 1, "value": 2, "linear": 1, "quantizer": 7},
    "hunyuan_video": {"modulate": 6, "norm": 2, "value": 3, "query_key": 1, "quantizer": 20},
    "flux": {"modulate": 6, "value": 2, "quantizer": 12},
    "cogvideox": {"modulate": 3, "value": 1, "quantizer": 8},
}  # fmt: skip
if torch.__version__.startswith("2.11."):  # transformers adds a second mask: no attention to see
    TABLE["imagegpt"] = {"norm": 3, "quantizer": 2}


def find(model: nn.Module, *inputs: Tensor) -> ScaleSites:
    return scale_sites(fxq.capture(model.eval(), inputs).graph_module)


def only(sites: ScaleSites, kind: str) -> ScaleSite:
    (site,) = [site for site in sites.sites if site.kind == kind]
    return site


def consumers(site: ScaleSite) -> set[str]:
    return {owner_name(part.node) for part in site.consumers}


def refusals(sites: ScaleSites) -> dict[str, str]:
    return {owner_name(node): why for node, why in sites.refusals.items()}


@pytest.mark.parametrize("family", with_slow(*ZOO))
def test_number_of_sites_in_each_family(family: str) -> None:
    gm = families.family(family).graph

    found = scale_sites(gm)

    assert found.count() == Counter(TABLE[family])
    layers = {n for n in gm.graph.nodes if is_op(n, torch.ops.aten.linear.default)}
    accounted = {part.node for site in found.sites for part in site.consumers} | {*found.refusals}
    assert layers <= accounted


def test_table_names_every_family() -> None:
    assert set(TABLE) == set(ZOO)


def test_connected_components_by_hand() -> None:
    a, b = torch.tensor([7, 6, 5, 1]), torch.tensor([6, 5, 4, 2])

    found = connected_components(9, a, b)

    assert found.tolist() == [0, 1, 1, 3, 4, 4, 4, 4, 8]


class Attention(nn.Module):
    """Self-attention with as many key heads as asked for."""

    def __init__(
        self, heads: int = 4, key_heads: int = 4, rotary: str = "none", norm: bool = False
    ):
        super().__init__()
        self.heads, self.key_heads, self.rotary = heads, key_heads, rotary
        self.q, self.out = nn.Linear(32, 8 * heads), nn.Linear(8 * heads, 32)
        self.k, self.v = nn.Linear(32, 8 * key_heads), nn.Linear(32, 8 * key_heads)
        self.norm = nn.RMSNorm(8) if norm else nn.Identity()
        self.register_buffer("cos", torch.rand(6, 8))
        self.register_buffer("sin", torch.rand(6, 8))

    def rotate(self, x: Tensor) -> Tensor:
        if self.rotary == "halves":
            a, b = x.chunk(2, -1)
            return x * self.cos + torch.cat([-b, a], -1) * self.sin
        if self.rotary == "pairs":
            a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
            return x * self.cos + torch.stack([-b, a], -1).flatten(-2) * self.sin
        return x

    def forward(self, x: Tensor) -> Tensor:
        q = self.rotate(self.norm(self.q(x).unflatten(-1, (self.heads, 8)).transpose(1, 2)))
        k = self.rotate(self.norm(self.k(x).unflatten(-1, (self.key_heads, 8)).transpose(1, 2)))
        v = self.v(x).unflatten(-1, (self.key_heads, 8)).transpose(1, 2)
        k, v = (t.repeat_interleave(self.heads // self.key_heads, 1) for t in (k, v))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).flatten(2))


def test_value_heads_that_are_shared_have_one_factor_per_key_head() -> None:
    site = only(find(Attention(4, 2), torch.randn(2, 6, 32)), "value")

    assert site.n_channels == 16
    (part,) = site.consumers
    expected = torch.arange(16).reshape(2, 1, 8).expand(2, 2, 8).flatten()
    assert torch.equal(part.channels, expected)  # out-projection columns, by query head


@pytest.mark.parametrize(
    ("rotary", "partner"), [("halves", lambda c: c + 4), ("pairs", lambda c: c ^ 1)]
)
def test_rotated_pairs_of_query_and_key_are_tied(rotary: str, partner: object) -> None:
    site = only(find(Attention(4, 2, rotary), torch.randn(2, 6, 32)), "query_key")

    assert site.n_channels == 2 * 4  # key heads x half a head
    q, k = site.producers
    assert {q.inverse, k.inverse} == {False, True}
    for part in (q, k):
        heads = part.channels.reshape(-1, 8)
        first = torch.tensor([0, 1, 2, 3] if rotary == "halves" else [0, 2, 4, 6])
        second = torch.tensor([partner(int(c)) for c in first])  # type: ignore[operator]
        assert torch.equal(heads[:, first], heads[:, second])


def test_query_and_key_behind_a_norm_are_refused() -> None:
    found = find(Attention(norm=True), torch.randn(2, 6, 32))

    assert not [site for site in found.sites if site.kind == "query_key"]
    assert any("normalises the query or key" in why for why in found.refusals.values())


class Branch(nn.Module):
    """A norm whose result a linear reads, and something else besides."""

    def __init__(self, other: str) -> None:
        super().__init__()
        self.norm, self.linear, self.other = nn.LayerNorm(16), nn.Linear(16, 8), other

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.norm(x)
        match self.other:
            case "output":
                return self.linear(h), h
            case "exp":
                return self.linear(h), torch.exp(h)
            case "residual":
                return self.linear(h), nn.functional.gelu(h + x)
            case _:
                return self.linear(h), x


@pytest.mark.parametrize(
    ("other", "reason"),
    [("output", "output of the model"), ("exp", "exp also reads it"), ("residual", "add also")],
)
def test_an_edge_that_something_else_reads_is_refused_with_the_reason(
    other: str, reason: str
) -> None:
    found = find(Branch(other), torch.randn(2, 16))

    assert [site.kind for site in found.sites] == ["quantizer"]
    gm_reasons = scale_reasons(Branch(other), torch.randn(2, 16))
    assert reason in gm_reasons["linear"]


def scale_reasons(model: nn.Module, *inputs: Tensor) -> dict[str, str]:
    """Return the reason each layer has before a quantizer site takes it in."""
    from fxq.analysis.factor_walk import channel_flow
    from fxq.passes.common.scaling.sites import _refusals

    gm = fxq.capture(model.eval(), inputs).graph_module
    flow = channel_flow(gm)
    return {owner_name(n): why for n, why in _refusals(gm, flow, []).items()}


class Tied(nn.Module):
    def __init__(self, through: str) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.norm = nn.LayerNorm(16)
        self.inner = nn.Linear(16, 16, bias=False)
        self.head = nn.Linear(16, 20, bias=False)
        self.through = through
        if through == "embedding":
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.embed(ids))
        if self.through == "call":
            x = self.inner(torch.relu(self.inner(x)))
        return self.head(x)


def test_a_weight_that_an_embedding_reads_too_is_refused() -> None:
    found = find(Tied("embedding"), torch.randint(0, 20, (2, 3)))

    assert found.sites == []
    assert "embedding also reads its weight" in refusals(found)["head"]
    assert "shared" in refusals(found)["head"]


def test_a_layer_called_twice_has_one_set_of_factors() -> None:
    model = Tied("call")

    found = find(model, torch.randint(0, 20, (2, 3)))

    # norm -> inner -> relu -> inner -> head: inner's rows are its own columns, and the head's.
    (site,) = found.sites
    assert len(site.producers) == 3
    assert [owner_name(part.node) for part in site.consumers] == ["inner", "inner", "head"]


class Concatenated(nn.Module):
    """Channels of two sources side by side, one of which no factor reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(8, 6), nn.Linear(8, 10), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.cat([torch.relu(self.a(x)), torch.sigmoid(self.b(x))], -1))


def test_a_part_of_the_channels_can_be_a_site() -> None:
    site = only(find(Concatenated(), torch.randn(3, 8)), "relu")

    (part,) = site.consumers
    assert site.n_channels == 6
    assert torch.equal(part.channels, torch.tensor([*range(6), *[-1] * 10]))


class Convolutions(nn.Module):
    def __init__(self, groups: int) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.b = nn.Conv2d(8, 8, 3, padding=1, groups=groups)
        self.pool, self.head = nn.AvgPool2d(2), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(torch.relu(self.norm(self.a(x))))
        return self.head(self.pool(torch.relu(x)).mean((2, 3)))


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_convolutions_scale_through_relu_pooling_and_groups(groups: int) -> None:
    found = find(Convolutions(groups), torch.randn(2, 3, 8, 8))

    by_consumer = {site.name: site for site in found.sites}
    assert by_consumer["b"].kind == "norm"
    assert by_consumer["head"].kind == "relu"
    assert by_consumer["b"].n_channels == 8
    assert "relu" in str(by_consumer["b"].why_no_shift)


class PerElement(nn.Module):
    """An edge that its consumer mixes: every channel would need the same factor."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(8), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x).transpose(1, 2))


def test_channels_that_share_one_factor_are_no_site() -> None:
    found = find(PerElement(), torch.randn(2, 6, 8))

    assert [site.kind for site in found.sites] == ["quantizer"]
    (reason,) = scale_reasons(PerElement(), torch.randn(2, 6, 8)).values()
    assert reason == "all its channels would share one factor"


def test_shift_needs_a_mask_that_hides_no_row() -> None:
    class Masked(Attention):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
            q, k, v = (
                layer(x).unflatten(-1, (4, 8)).transpose(1, 2) for layer in (self.q, self.k, self.v)
            )
            y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            return self.out(y.transpose(1, 2).flatten(2))

    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool)

    free = only(find(Attention(), torch.randn(2, 6, 32)), "value")
    masked = only(find(Masked(), torch.randn(2, 6, 32), mask), "value")

    assert free.why_no_shift is None
    assert masked.why_no_shift == "the mask of attention may hide all keys of a row"


def test_layers_with_computed_weights_are_in_sites() -> None:
    torch.manual_seed(0)
    model = Computed().eval()
    gm = fxq.capture(model, torch.randn(2, 5, 64)).graph_module

    found = scale_sites(gm)
    fold_scaling(gm, [random_scaling(site, seed) for seed, site in enumerate(found.sites)])

    assert found.count() == {"norm": 1, "linear": 2}
    assert [consumers(site) for site in found.sites] == [{"qkv"}, {"linear_default"}, {"out"}]
    x = torch.randn(3, 5, 64)
    with torch.no_grad():
        torch.testing.assert_close(gm(x)[0], model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("recipe", [smoothquant.W8A8, repq_vit.W8A8], ids=lambda r: r.name)
def test_recipes_keep_a_model_with_computed_weights_close_to_float(recipe: Recipe) -> None:
    torch.manual_seed(0)
    model = Computed().eval()
    batches = [torch.randn(4, 7, 64) for _ in range(3)]

    program = fxq.compress(model, batches[0], recipe, batches, strict=True)

    x = torch.randn(4, 7, 64)
    with torch.no_grad():
        assert sqnr_db(model(x), program(x)) > 32.0  # measured 35.0 and 35.8 dB


class AtRunTime(nn.Module):
    """Layers whose weight or bias is no constant, and a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first = nn.LayerNorm(8), nn.Linear(8, 8)
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        h = self.norm(x)
        bias = x.mean((0, 1))
        return (
            nn.functional.linear(h, self.weight * bias),
            nn.functional.linear(h, self.weight, bias),
            torch.convolution(
                self.first(h).mT, self.weight[:, :, None], None, [1], [0], [1], True, [0], 1
            ),
        )


def test_layers_whose_weight_is_not_constant_say_so() -> None:
    found = find(AtRunTime(), torch.randn(2, 5, 8))

    whys = Counter(found.refusals.values())
    assert whys["its weight or bias is computed at run time"] == 2
    assert whys["no factor passes through a transposed convolution"] == 1


class Parts(nn.Module):
    """Two layers that read parts of one weight, the second from row `start`."""

    def __init__(self, start: int) -> None:
        super().__init__()
        self.start, self.norm = start, nn.LayerNorm(8)
        self.weight = nn.Parameter(torch.randn(16, 8))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        h = self.norm(x)
        linear = nn.functional.linear
        return linear(h, self.weight[:8]), linear(h, self.weight[self.start :])


def test_parts_of_a_weight_share_a_site_unless_they_overlap() -> None:
    apart, overlapping = (find(Parts(start), torch.randn(2, 5, 8)) for start in (8, 7))

    assert len(only(apart, "norm").consumers) == 2
    assert not overlapping.sites
    whys = list(overlapping.refusals.values())
    assert whys == ["linear reads its weight in another way, and its weight is shared"] * 2


class WeightAsBias(nn.Module):
    """A layer whose bias is a row of another's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        h = self.norm(x)
        return self.a(h), nn.functional.linear(x, self.b.weight, self.a.weight[0])


def test_a_weight_that_is_also_a_bias_stays() -> None:
    found = find(WeightAsBias(), torch.randn(2, 5, 8))

    assert refusals(found)["a"] == "linear also reads its weight, and its weight is shared"
