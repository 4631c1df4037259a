"""PSAQ-ViT V2: what each player's step does, what the game leaves untouched, what it gives."""

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from psaq import Manual, dream, graph_of, lively
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

import fxq
from fxq.errors import UnsupportedError
from fxq.numerics import sqnr_db
from fxq.passes import w6a6, w8a8
from fxq.passes.common import InsertObservers, activation_scales, student_of
from fxq.passes.psaq_vit import (
    Game,
    Prior,
    Refinement,
    SyntheticImages,
    adversarial_refine,
    everywhere,
    find_taps,
)
from fxq.passes.psaq_vit.players import Gap, ImageGenerator, Student, disagreement, opposed
from fxq.passes.psaq_vit.teacher import Teacher
from fxq.pipeline import Recipe
from fxq.rewriting import copy_graph
from fxq.spec import MinMax

W4A4 = everywhere("w4a4", 4, 4, MinMax())
SHORT = Game(n_rounds=4, generator_steps=2, student_steps=2)
LONGER = Game(n_rounds=8, generator_steps=2, student_steps=6)  # the student comes closer by a third


@functools.cache
def dreamed() -> tuple[nn.Module, Tensor, SyntheticImages]:
    """A model of one block, an example and images, which all tests share and none writes to."""
    model, example = lively(depth=1)
    return model, example, dream(model, example, labels=None)


@functools.cache
def observed(seed: int) -> tuple[GraphModule, GraphModule, SyntheticImages]:
    """A model as a graph, the same with calibrated observers, and images."""
    model, example = lively(seed, depth=1)
    images = dream(model, example, labels=None)
    gm = graph_of(model, example)
    recipe = Recipe("w4a4", W4A4.passes[:-1])
    return gm, recipe.apply(copy_graph(gm), [(images.images,)]), images


def refine(model: nn.Module, example: Tensor, **changes: Any) -> Refinement:
    images = changes.pop("images", None) or dream(model, example, labels=None)
    recipe = changes.pop("recipe", W4A4)
    return adversarial_refine(model, example, recipe, images, **{"settings": SHORT} | changes)


def players(
    weight: float = 1.0, seed: int = 0
) -> tuple[Gap, ImageGenerator, Student, SyntheticImages]:
    """Both players over a W4A4 student, and the images they begin with."""
    gm, calibrated, images = observed(seed)
    x = images.images
    teacher = Teacher(gm, find_taps(gm, x), Prior())
    spec = pytree.tree_structure((torch.zeros(()),))
    gap = Gap(teacher, None, spec, x)
    generator = ImageGenerator(images, Prior(jitter=(0.0,), flip=False), 8, 0.01, weight, seed)
    return gap, generator, Student(student_of(calibrated), 0.2), images


def test_disagreement_by_hand() -> None:
    exact = [torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[[4.0]], [[-4.0]]])]
    found = [torch.tensor([[1.0, 3.0], [1.0, -1.0]]), torch.tensor([[[0.0]], [[0.0]]])]
    # per image: (0.5 / 1 + 4 / 8) / 2 and (1 / 1 + 4 / 8) / 2
    assert disagreement(exact, found, torch.tensor([1.0, 8.0])).tolist() == [0.5, 0.75]


def test_opposed_by_hand() -> None:
    prior = torch.tensor([[3.0, 4.0], [3.0, 4.0]]).view(2, 1, 1, 2)
    against = torch.tensor([[0.0, 0.1], [0.0, 0.0]]).view(2, 1, 1, 2)
    # the first is 5 long: 2 * 5 * (0, 1) is taken off; the second disagrees nowhere
    assert opposed(prior, against, 2.0).flatten(1).tolist() == [[3.0, -6.0], [3.0, 4.0]]
    assert torch.equal(opposed(prior, against, 0.0), prior)


@pytest.mark.parametrize("seed", [0, 1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_step_of_the_images_raises_the_disagreement_and_one_of_the_student_lowers_it(
    seed: int,
) -> None:
    gap, generator, student, _ = players(weight=20.0, seed=seed)
    with torch.no_grad():
        before = gap.on(generator.normalized(generator.all_pixels), student.gm).mean()
        for step in range(4):
            generator.move(0, step, gap, student.gm)
        x = generator.normalized(generator.all_pixels)
        moved = gap.on(x, student.gm).mean()
        for _ in range(4):
            student.learn(x, gap, 1e-3)
        learned = gap.on(x, student.gm).mean()
    assert moved > before
    assert learned < moved
    assert 0 <= generator.all_pixels.min() <= generator.all_pixels.max() <= 1


def test_a_student_that_is_the_teacher_has_nothing_to_learn() -> None:
    gap, generator, _, images = players()
    twin = graph_of(*lively(depth=1))
    with torch.no_grad():
        before = generator.all_pixels
        assert not gap.on(images.images, twin).any()
        kept = generator.move(0, 0, gap, twin)
    assert kept[0] == 0
    assert kept.isfinite().all()
    assert not torch.equal(generator.all_pixels, before)  # the prior alone moves it


def test_the_game_leaves_model_and_images_untouched_and_is_reproducible() -> None:
    model, example, images = dreamed()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    pixels = images.pixels.clone()

    first, again = (refine(model, example, images=images) for _ in range(2))

    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert torch.equal(images.pixels, pixels)
    assert torch.equal(first.pixels, again.pixels)
    assert not torch.equal(first.pixels, pixels)
    assert torch.equal(first.program(example), again.program(example))
    other = refine(model, example, images=images, seed=1)
    assert not torch.equal(first.pixels, other.pixels)


@pytest.mark.slow
def test_the_student_comes_closer_than_quantization_alone() -> None:
    gains = []
    for seed in range(3):
        model, example = lively(seed)
        images = dream(model, example, labels=None, seed=seed, n_images=8)
        unseen = dream(model, example, labels=None, seed=100 + seed, n_images=8).images
        plain = fxq.compress(model, example, W4A4, data=images)

        refined = refine(model, example, images=images, settings=LONGER, seed=seed)

        assert refined.trace.after < 0.9 * refined.trace.before  # measured 0.68, 0.59, 0.66
        exact = model(unseen).detach()
        gains.append(sqnr_db(exact, refined.program(unseen)) - sqnr_db(exact, plain(unseen)))
    assert sum(gains) / 3 > 1.0  # dB on images of another seed; measured 0.2, 4.3, 1.8


def test_weights_of_the_result_are_codes_and_the_report_is_whole() -> None:
    model, example, images = dreamed()
    program = refine(model, example, images=images).program

    codes = {n: b for n, b in program.named_buffers() if b.dtype == torch.int8}
    assert len(codes) == len([r for r in fxq.report(program).rows if r.row.format])
    assert all(int(b.min()) >= -7 and int(b.max()) <= 7 for b in codes.values())
    assert "refined by Game" in program.recipe


@pytest.mark.parametrize("recipe", ["w8a8_dynamic", "w8", "smoothquant_w8a8", w6a6.STATIC])
def test_any_recipe_that_converts_can_be_refined(recipe: str | Recipe) -> None:
    model, example, images = dreamed()
    result = refine(model, example, images=images, recipe=recipe)
    x = torch.randn(3, *example.shape[1:])
    assert sqnr_db(model(x).detach(), result.program(x)) > 15


def test_a_game_that_does_harm_is_given_up_and_says_so() -> None:
    model, example, images = dreamed()
    wild = Game(n_rounds=2, student_learning_rate=3.0)
    said: list[str] = []
    recipe = everywhere("w8a8", 8, 8, MinMax())

    result = refine(
        model, example, images=images, recipe=recipe, settings=wild, progress=said.append
    )

    plain = fxq.compress(model, example, recipe, data=images)
    assert result.trace.after == result.trace.before
    assert result.trace.best_round == 0
    assert not result.trace.improved
    assert torch.equal(result.program(example), plain(example))
    assert any("not part of it" in note for note in result.program.notes)
    assert any("not part of it" in line for line in said)


def test_the_best_student_is_kept_though_later_ones_are_worse(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, example, images = dreamed()
    settings = Game(n_rounds=3, generator_steps=2, student_steps=8)

    def then(later: float) -> Refinement:
        monkeypatch.setattr(
            Game, "student_learning_rate_at", lambda _, step, bits: 1e-3 if step < 8 else later
        )
        return refine(model, example, images=images, settings=settings)

    result, stopped = then(later=0.3), then(later=0.0)

    assert result.trace.best_round == 1
    assert result.trace.after < result.trace.before
    assert torch.equal(result.program(example), stopped.program(example))


@pytest.mark.parametrize("factor", [0.0, 0.5])
def test_scales_learn_at_a_rate_of_their_own(factor: float) -> None:
    gap, _, student, images = players()
    student = Student(student.gm, factor)
    (scale, *_) = activation_scales(student.gm)
    weight = next(p for n, p in student.named.items() if "fc1.weight" in n)
    before = weight.detach().clone()
    with torch.no_grad():
        student.learn(images.images, gap, 1e-3)
    # Adam's first step is the rate, whatever the gradient.
    assert (weight - before).abs().max().item() == pytest.approx(1e-3, rel=1e-2)
    assert scale.abs().item() == pytest.approx(factor * 1e-3, rel=1e-2)


def test_the_learning_rate_halves_with_each_bit() -> None:
    game = Game(n_rounds=10, student_steps=2, student_learning_rate=1e-2)
    assert game.student_learning_rate_at(2, 4) == 1e-2
    assert game.student_learning_rate_at(2, 8) == 1e-2 / 16
    *_, student, _ = players()
    assert student.bits == 4


def test_feature_maps_can_be_agreed_on_and_need_no_classes() -> None:
    class Backbone(nn.Module):  # its second output has no batch
        def __init__(self) -> None:
            super().__init__()
            self.vit = Manual(True)

        def forward(self, images: Tensor) -> dict[str, Tensor]:
            tokens = self.vit.stem(images)
            return {"map": tokens * self.vit(images).mean(), "norm": tokens.abs().mean()}

    torch.manual_seed(0)
    model, example = Backbone().eval(), torch.randn(1, 3, 16, 16)
    with pytest.raises(ValueError, match="batch of 4 images first"):
        refine(model, example)

    result = refine(model, example, outputs=lambda output: output["map"])

    x = torch.randn(2, 3, 16, 16)
    assert sqnr_db(model(x)["map"].detach(), result.program(x)["map"]) > 5
    assert result.trace.generator.isfinite().all()


def test_an_interrupted_game_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, example = lively(depth=1)
    images = dream(model, example, labels=None, batch_size=2)
    whole = refine(model, example, images=images)
    path = tmp_path / "game.safetensors"
    monkeypatch.setattr("fxq.checkpoint.SAVE_EVERY_S", -1.0)
    learn, calls = Student.learn, 0

    def interrupted(*args: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 6:  # in the third round
            raise KeyboardInterrupt
        return learn(*args)

    with monkeypatch.context() as patch:
        patch.setattr(Student, "learn", interrupted)
        with pytest.raises(KeyboardInterrupt):
            refine(model, example, images=images, checkpoint=path)
    with pytest.raises(ValueError, match="remove it or choose another"):
        refine(model, example, images=images, checkpoint=path, seed=9)
    said: list[str] = []

    resumed = refine(model, example, images=images, checkpoint=path, progress=said.append)

    assert any("going on from round 3 of 4" in line for line in said)
    assert torch.equal(resumed.pixels, whole.pixels)
    assert torch.equal(resumed.program(example), whole.program(example))
    assert torch.equal(resumed.trace.student, whole.trace.student)
    assert not path.exists()


def test_an_exported_program_can_be_refined() -> None:
    model, _, images = dreamed()
    exported = torch.export.export(model, (images.images,))
    result = refine(exported, images.images, images=images)  # type: ignore[arg-type]
    assert result.program(images.images).shape == model(images.images).shape


def test_bad_arguments() -> None:
    model, example, images = dreamed()
    with pytest.raises(UnsupportedError, match="expected observers and a Convert"):
        refine(model, example, images=images, recipe=Recipe("nothing", ()))
    program = fxq.compress(model, example, "w8a8_dynamic")
    with pytest.raises(UnsupportedError, match="found a compressed Program"):
        refine(program, example, images=images)
    with pytest.raises(ValueError, match="expected whole numbers of rounds"):
        Game(n_rounds=0)
    with pytest.raises(ValueError, match="expected student_learning_rate above zero, found nan"):
        Game(student_learning_rate=float("nan"))
    with pytest.raises(ValueError, match="expected tensors that depend differentiably"):
        refine(model, example, images=images, outputs=lambda output: output.detach())
    small = torch.zeros(1, 3, 8, 8)
    wrong = SyntheticImages(small, images.mean, images.std, None, images.trace)
    with pytest.raises(ValueError, match="expected shape"):
        refine(model, example, images=wrong)
    model, example = lively(depth=1)  # one that may be cast
    half = dream(model.bfloat16(), example.bfloat16(), labels=None)
    with pytest.raises(UnsupportedError, match="expected float32 to train in"):
        refine(model, example.bfloat16(), images=half)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_rounds": 2.5}, "whole numbers"),
        ({"adversarial_weight": float("nan")}, "adversarial_weight of 0 or more, found nan"),
        ({"adversarial_weight": -1.0}, "adversarial_weight of 0 or more"),
        ({"prior": Prior(entropy_weight=0.0, tv_weight=0.0)}, "expected a prior"),
    ],
)
def test_settings_that_make_no_game(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Game(**changes)


def test_a_recipe_that_quantizes_nothing_here_is_named() -> None:
    model, example, images = dreamed()
    steps = tuple(
        replace(step, overrides=(("*", None),)) if isinstance(step, InsertObservers) else step
        for step in w8a8.STATIC.passes
    )
    with pytest.raises(UnsupportedError, match="quantizes none"):
        refine(model, example, images=images, recipe=Recipe("none", steps))


def test_outputs_that_cannot_be_compared() -> None:
    model, example, images = dreamed()

    def masked(output: Tensor) -> Tensor:
        return output.masked_fill(output == output.amax(), -float("inf"))

    with pytest.raises(ValueError, match="expected finite values, found NaN or Inf"):
        refine(model, example, images=images, outputs=masked)
    with pytest.raises(TypeError, match="expected it to return tensors, found NoneType"):
        refine(model, example, images=images, outputs=lambda output: None)
    with pytest.raises(TypeError, match=r"expected what psaq_vit\.synthesize returns, found list"):
        refine(model, example, images=[images.images])


def test_a_checkpoint_that_is_another_file(tmp_path: Path) -> None:
    model, example, images = dreamed()
    other = tmp_path / "notes.txt"
    other.write_text("not a checkpoint")
    for path in (other, tmp_path):
        with pytest.raises(ValueError, match="expected a file that this work wrote"):
            refine(model, example, images=images, checkpoint=path)
    assert other.read_text() == "not a checkpoint"
