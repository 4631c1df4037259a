"""PSAQ-ViT: taps of every kind of attention, synthesis, the published recipe."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_models
import torch
from psaq import MEAN, STD, Manual, dream, graph_of, lively
from torch import Tensor, nn

import fxq
from fxq.errors import UnsupportedError
from fxq.layer import Skip, layer_of
from fxq.numerics import sqnr_db
from fxq.observers import RangeObserver
from fxq.passes.common import (
    Calibrate,
    Convert,
    DecomposeAttention,
    InsertObservers,
    ObserveActivations,
)
from fxq.passes.psaq_vit import (
    PUBLISHED_W8A8,
    W4A8,
    W8A8,
    Prior,
    Synthesis,
    SyntheticImages,
    everywhere,
    find_taps,
)
from fxq.passes.psaq_vit.images import contact_sheet, normalize
from fxq.passes.psaq_vit.prior import (
    generator_of,
    learning_rate_factor,
    natural_scale,
    neighbour_differences,
    total_variation,
)
from fxq.spec import MinMax


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("prefix", [1, 3])
def test_fused_and_written_out_attention_give_the_same_taps(fused: bool, prefix: int) -> None:
    gm = graph_of(Manual(fused, prefix), torch.randn(1, 3, 16, 16))
    taps = find_taps(gm, torch.zeros(2, 3, 16, 16)).taps
    assert len(taps) == 2
    for tap in taps:
        assert (tap.n_windows, tap.n_heads, tap.n_patches) == (1, 2, 16)
        assert not tap.patches[:, :prefix].any()


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        (small_models.vit, [(1, 2, 16)] * 2),
        (small_models.deit, [(1, 2, 16)]),
        (small_models.swin, [(16, 2, 256)] * 2 + [(4, 4, 64)] * 2),
    ],
)
def test_taps_of_model_families(
    family: Callable[[], small_models.Example], expected: list[tuple[int, int, int]]
) -> None:
    model, example = family()
    gm = graph_of(model, example)
    found = find_taps(gm, torch.zeros(2, *example.shape[1:]))
    assert [(t.n_windows, t.n_heads, t.n_patches) for t in found.taps] == expected
    assert not found.refusals


def test_taps_can_be_chosen_and_prefix_overridden() -> None:
    model, example = small_models.vit()
    gm = graph_of(model, example)
    images = torch.zeros(2, 3, 16, 16)
    (tap,) = find_taps(gm, images, "blocks.1.*").taps
    assert tap.module == "blocks.1.attn"
    assert all(t.n_patches == 13 for t in find_taps(gm, images, n_prefix=4).taps)
    with pytest.raises(ValueError, match=r"blocks\.7"):
        find_taps(gm, images, "blocks.7.*")
    with pytest.raises(ValueError, match="expected names of modules or nodes, found none"):
        find_taps(gm, images, [])


class ByEinsum(nn.Module):
    """Two attentions; `weighted` of the second one says how values are averaged."""

    def __init__(self, weighted: str) -> None:
        super().__init__()
        self.stem, self.weighted = nn.Conv2d(3, 16, 4, 4), weighted
        self.mix, self.head = nn.Linear(16, 48), nn.Linear(16, 5)
        self.back = nn.Parameter(torch.randn(2, 8, 16) / 4)

    def attend(self, x: Tensor, weighted: str) -> Tensor:
        q, k, v = self.mix(x).unflatten(-1, (3, 2, 8)).unbind(2)
        weights = torch.einsum("bjhd,bihd->bhij", k, q).softmax(-1)
        operands = (v, weights) if weighted.startswith("bjhd") else (weights, v, self.back)
        return torch.einsum(weighted, *operands[: weighted.count(",") + 1])

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images).flatten(2).mT
        x = x + self.attend(x, "bjhd,bhij->bihd").flatten(2)
        return self.head((x + self.attend(x, self.weighted).reshape(x.shape)).mean(1))


def test_attention_by_einsum_has_taps_whatever_is_written_first() -> None:
    gm = graph_of(ByEinsum("bjhd,bhij->bihd"), torch.randn(1, 3, 16, 16))
    found = find_taps(gm, torch.zeros(2, 3, 16, 16))
    assert [(t.n_windows, t.n_heads, t.n_patches) for t in found.taps] == [(1, 2, 16)] * 2
    assert not found.refusals


def test_attention_that_shows_no_product_is_listed_and_told() -> None:
    model = ByEinsum("bhij,bjhd,hdc->bic").eval()
    gm = graph_of(model, torch.randn(1, 3, 16, 16))
    found = find_taps(gm, torch.zeros(2, 3, 16, 16))
    assert len(found.taps) == 1
    (why,) = found.refusals.values()
    assert "is not one product of weights and values" in why
    with pytest.warns(fxq.FxqWarning, match="left out"):
        dream(model, torch.randn(1, 3, 16, 16), labels=None)


def test_no_attention_is_a_loud_error() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Flatten(), nn.Linear(128, 5)).eval()
    with pytest.raises(UnsupportedError, match="attention"):
        dream(model, torch.randn(1, 3, 16, 16))


def test_total_variation_of_a_ramp_by_hand() -> None:
    ramp = torch.arange(9.0).view(1, 1, 3, 3)
    norms = [d.norm().item() for d in neighbour_differences(ramp)]
    assert norms == pytest.approx([6**0.5, 54**0.5, 8.0, 4.0])
    parts = [1.0, 3.0, 4.0, 2.0]  # root mean squares
    assert total_variation(ramp).item() == pytest.approx(sum(parts) / 4, abs=1e-5)
    assert torch.equal(total_variation(ramp.expand(2, -1, -1, -1))[:1], total_variation(ramp))


def test_schedule_by_hand() -> None:
    factors = {0: 0.01, 99: 1.0, 100: 1.0, 300: 0.5, 499: 1.5421e-5}
    for step, expected in factors.items():
        assert learning_rate_factor(step, 500, 100) == pytest.approx(expected, rel=1e-3)
    settings = Synthesis(n_steps=500)
    assert settings.learning_rate_at(500) == settings.learning_rate_at(0)


def test_natural_scale() -> None:
    assert natural_scale(224) == 1
    assert natural_scale(14) == pytest.approx(2)


def test_prior_draws_do_not_depend_on_other_images() -> None:
    prior = Prior(jitter=(0.0, 0.25))
    targets, views = prior.draw([generator_of(0, i) for i in (0, 1)], 16, [3, 4])
    one, alone = prior.draw([generator_of(0, 1)], 16, [3, 4])
    assert torch.equal(targets[1:], one)
    assert torch.equal(views.shifts[:, 1:], alone.shifts)
    assert not views.shifts[:3].any()
    assert views.shifts[3:].abs().max() <= 4
    low, high = (bound * natural_scale(16) for bound in prior.tv_target)
    assert bool(((low <= targets) & (targets <= high)).all())


def test_synthesis_is_reproducible_and_images_independent() -> None:
    model, example = lively(depth=1)
    model.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    first, again = (dream(model, example, seed=3) for _ in range(2))
    assert torch.equal(first.pixels, again.pixels)
    assert first.fingerprint == again.fingerprint
    more = dream(model, example, seed=3, n_images=5)
    torch.testing.assert_close(more.pixels[:4], first.pixels, atol=1e-4, rtol=0)
    other = dream(model, example, seed=4)
    assert not torch.equal(first.pixels, other.pixels)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_pixels_stay_in_the_range_of_the_callers_normalization() -> None:
    model, example = lively(depth=1)
    images = dream(model.eval(), example)
    assert 0 <= images.pixels.min() <= images.pixels.max() <= 1
    torch.testing.assert_close(images.images, normalize(images.pixels, MEAN, STD))
    low = (0 - torch.tensor(MEAN)) / torch.tensor(STD)
    assert bool((images.images >= low.view(-1, 1, 1) - 1e-5).all())
    assert [len(batch) for batch in images] == [4]


def test_without_classes_no_logits_are_needed() -> None:
    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit = Manual(True)

        def forward(self, x: Tensor) -> Tensor:
            return self.vit.stem(x) + self.vit(x).sum()

    with pytest.raises(ValueError, match="labels=None"):
        dream(Features().eval(), torch.randn(1, 3, 16, 16))
    images = dream(Features().eval(), torch.randn(1, 3, 16, 16), labels=None)
    assert images.labels is None
    assert not images.trace.class_loss.any()


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))])
def test_entropy_rises_with_its_term_and_not_without(seed: int) -> None:
    model, example = lively(seed)
    with_it, without = (
        dream(
            model,
            example,
            seed=seed,
            settings=Synthesis(n_steps=40, prior=Prior(entropy_weight=weight)),
        ).trace.entropy.sum(1)
        for weight in (1.0, 0.0)
    )
    # measured, nat: 0.34 and -1.97, 0.34 and -2.54, 0.64 and -0.71
    assert with_it[-1] > with_it[0]
    assert without[-1] < without[0]
    assert with_it[-1] > without[-1] + 1.0


def test_total_variation_reaches_its_target_and_the_class_is_seen() -> None:
    model, example = small_models.vit()
    settings = Synthesis(n_steps=60, prior=Prior(tv_target=(0.07, 0.07)))
    trace = dream(model.eval(), example, settings=settings).trace
    target = 0.07 * natural_scale(16)
    assert trace.total_variation[-1].item() == pytest.approx(target, rel=0.15)
    assert trace.class_loss[-1] < trace.class_loss[0]


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, example = lively(depth=1)
    whole = dream(model.eval(), example, batch_size=2)
    path = tmp_path / "state.safetensors"
    monkeypatch.setattr("fxq.checkpoint.SAVE_EVERY_S", -1.0)
    normalized = normalize
    calls = 0

    def interrupted(*args: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 14:  # in the second batch
            raise KeyboardInterrupt
        return normalized(*args)

    with monkeypatch.context() as patch:
        patch.setattr("fxq.passes.psaq_vit.synthesis.normalize", interrupted)
        with pytest.raises(KeyboardInterrupt):
            dream(model, example, batch_size=2, checkpoint=path)
    with pytest.raises(ValueError, match="remove it or choose another"):
        dream(model, example, batch_size=2, checkpoint=path, seed=9)
    resumed = dream(model, example, batch_size=2, checkpoint=path)
    assert torch.equal(resumed.pixels, whole.pixels)
    assert torch.equal(resumed.trace.entropy, whole.trace.entropy)
    assert not path.exists()


def test_images_survive_saving_and_draw(tmp_path: Path) -> None:
    model, example = lively(depth=1)
    images = dream(model.eval(), example)
    images.save(tmp_path / "images.safetensors")
    loaded = SyntheticImages.load(tmp_path / "images.safetensors")
    assert torch.equal(loaded.pixels, images.pixels)
    assert loaded.trace.taps == images.trace.taps
    assert (loaded.mean, loaded.dtype) == (images.mean, images.dtype)
    images.save_contact_sheet(tmp_path / "sheet.png", columns=3)
    assert (tmp_path / "sheet.png").stat().st_size > 1000
    assert contact_sheet(images.pixels, 3).shape == (3, 2 * 66, 3 * 66)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mean": (0.5,)}, "mean: expected one number per channel"),
        ({"std": (0.5, 0.5)}, "std: expected one number per channel"),
        ({"std": (0.5, 0.5, 0.0)}, "positive"),
        ({"labels": torch.tensor([0, 1, 2, 7])}, "from 0 to 4"),
        ({"labels": torch.tensor([0.0, 1.0, 2.0, 3.0])}, r"int64, found torch\.float32"),
        ({"checkpoint": "no/such/folder/state.safetensors"}, "folder that exists"),
        ({"n_images": 0}, "at least 1"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], message: str) -> None:
    model, example = lively(depth=1)
    with pytest.raises(ValueError, match=message):
        dream(model.eval(), example, **changes)


def test_fewer_than_four_patches_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="at least 4 patches, found 1"):
        dream(Manual(True).eval(), torch.randn(1, 3, 4, 4))


def test_a_wrong_channel_count_is_refused() -> None:
    model, _ = lively(depth=1)
    with pytest.raises((ValueError, UnsupportedError)):
        dream(model.eval(), torch.randn(1, 1, 16, 16))


def test_half_precision_gives_finite_images() -> None:
    model, example = lively(depth=1)
    images = dream(model.eval().bfloat16(), example.bfloat16())
    assert images.pixels.isfinite().all()
    assert next(iter(images)).dtype == torch.bfloat16


def observed_sites(gm: torch.fx.GraphModule) -> int:
    return sum(isinstance(m, RangeObserver) for m in gm.modules())


def test_published_sites_of_deit_tiny() -> None:
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=16, depth=12, num_heads=2, num_classes=5
    ).eval()
    gm = graph_of(model, torch.randn(1, 3, 32, 32))
    for step in PUBLISHED_W8A8.passes[:3]:
        gm = step.run(gm).graph_module  # type: ignore[call-arg]
    assert observed_sites(gm) == 127
    assert sum(layer_of(node).spec is not None for node in gm.graph.nodes) == 50


def test_decomposed_attention_computes_the_same() -> None:
    model, example = small_models.vit()
    gm = graph_of(model, example)
    before = gm(example)
    result = DecomposeAttention().run(gm)
    assert result.modified
    gm.recompile()
    assert not any("scaled_dot" in str(n.target) for n in gm.graph.nodes)
    torch.testing.assert_close(gm(example), before, atol=1e-5, rtol=1e-4)


def test_causal_attention_stays_whole_and_says_so() -> None:
    class Causal(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)

    gm = graph_of(Causal(), torch.randn(2, 2, 4, 8))
    assert not DecomposeAttention().run(gm).modified
    notes = [
        t.did for n in gm.graph.nodes for t in layer_of(n).treatments if isinstance(t.did, Skip)
    ]
    assert any("is_causal" in note.reason for note in notes)


def test_observed_sums_are_quantized_for_all_that_read_them() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            s = x + self.a(x)
            return torch.cat([s, s * 2], -1)

    model, x = Sum().eval(), torch.randn(4, 8)
    spec = everywhere("x", 8, 4, MinMax()).passes[3].spec  # type: ignore[union-attr]
    layers = W8A8.passes[2].default  # type: ignore[union-attr]
    steps = (InsertObservers(layers), ObserveActivations(spec, ("sum",)), Calibrate(), Convert())
    recipe = fxq.Recipe("sums", steps)
    out = fxq.compress(model, x, recipe, data=[x])(x)
    assert out[:, :8].unique().numel() <= 16
    assert torch.equal(out[:, 8:], out[:, :8] * 2)


@pytest.mark.parametrize("recipe", [W8A8, W4A8])
def test_dreamed_images_calibrate_any_recipe(recipe: fxq.Recipe) -> None:
    model, example = lively()
    images = dream(model, example)
    program = fxq.compress(model, example, recipe, data=images)
    x = images.images
    # measured 26.7 and 13.6 dB
    assert sqnr_db(model(x), program(x)) > (20 if recipe is W8A8 else 9)
    assert fxq.compress(model, example, "smoothquant_w8a8", data=images)(x).isfinite().all()


def test_an_exported_program_whose_image_size_is_free_is_refused() -> None:
    model, x = nn.Conv2d(3, 4, 3).eval(), torch.randn(2, 3, 16, 16)
    free = {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    exported = torch.export.export(model, (x,), dynamic_shapes=(free,))
    with pytest.raises(UnsupportedError, match="only its batch free"):
        dream(exported, x)  # type: ignore[arg-type]


@pytest.mark.parametrize("strength", [0.0, 5e-4])
def test_a_dead_or_quiet_head_is_still_a_head(strength: float) -> None:
    model = Manual(True)
    with torch.no_grad():
        model.mix.weight[32:40] *= strength  # values of the first head
        model.mix.bias[32:40] *= strength
    (first, _) = find_taps(
        graph_of(model, torch.randn(1, 3, 16, 16)), torch.zeros(2, 3, 16, 16)
    ).taps
    assert (first.n_windows, first.n_heads) == (1, 2)


def test_a_dead_channel_does_not_make_it_attention_among_channels() -> None:
    model = Manual(True)
    with torch.no_grad():
        model.mix.weight[[32, 40]] = 0
        model.mix.bias[[32, 40]] = 0
    gm = graph_of(model, torch.randn(1, 3, 16, 16))
    assert len(find_taps(gm, torch.zeros(2, 3, 16, 16)).taps) == 2


def test_a_checkpoint_belongs_to_its_taps_labels_and_outputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, example = lively(depth=1)
    whole = dream(model.eval(), example)
    others = (
        {"n_prefix": 6},
        {"labels": torch.zeros(4, dtype=torch.int64)},
        {"logits": lambda output: -output},
        {"batch_size": 2},
    )
    found = {dream(model, example, **changes).fingerprint for changes in others}
    assert len({whole.fingerprint, *found}) == 5


@pytest.mark.parametrize("changes", [{"heads": "max"}, {"estimator": "exact"}, {"jitter": (-0.1,)}])
def test_unknown_choices_of_a_prior_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"Prior.{next(iter(changes))}: expected"):
        Prior(**changes)


def test_weights_that_are_nan_are_named_before_any_image_is_kept() -> None:
    model, example = lively()
    with torch.no_grad():
        model.get_parameter("blocks.1.attn.qkv.weight")[0, 0] = torch.nan
    with pytest.raises((ValueError, UnsupportedError)):
        dream(model, example)
