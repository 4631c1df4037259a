"""The game of PSAQ-ViT V2 (arXiv:2209.05687): images and quantized model improve each other, with
no labels.

    generator   minimize over pixels     prior (entropy, total variation)  -  beta * D(P, Q)
    student     minimize over weights    D(P, Q)

P is the frozen float model, Q its quantized version, D their disagreement on the outputs that the
caller selects. Images go where the two disagree and still look like pictures to P; Q follows.

No code is public and the paper names no constants that could be verified: D, beta, the schedule and
every default here are ours. D is the mean absolute error in units of the output's own size, because
that of a divergence vanishes as Q approaches P; beta makes D's gradient at an image four times as
long as the prior's, so that it leads and the prior still steers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from fxq.batches import CheckedBatches, device_of
from fxq.checkpoint import Checkpoint, fingerprint
from fxq.dialect import OBSERVED
from fxq.errors import UnsupportedError
from fxq.passes.common import adopt, student_of
from fxq.passes.psaq_vit.images import SyntheticImages
from fxq.passes.psaq_vit.players import Gap, ImageGenerator, Outputs, Student
from fxq.passes.psaq_vit.prior import Prior, generator_of, learning_rate_factor
from fxq.passes.psaq_vit.taps import find_taps
from fxq.passes.psaq_vit.teacher import Teacher, capture_images
from fxq.pipeline import Recipe, resolve_recipe
from fxq.program import Program
from fxq.progress import Progress, Reporter, reporting
from fxq.rewriting import copy_graph
from fxq.signature import Inputs

REFERENCE_BITS = 4  # of the learning rate
N_JUDGEMENTS = 8  # per game


@dataclass(frozen=True)
class Game:
    """Settings.

    Args:
        n_rounds: how often generator and student take turns. A round moves one batch of images.
        generator_steps: per round.
        student_steps: per round, on batches drawn from all images.
        image_learning_rate: of Adam, fraction of the pixel range.
        student_learning_rate: of Adam at 4 bits, the coarsest format of the recipe; half as much
            for each bit more, because rounding leaves half as much to learn, and twice as much for
            each bit less. Reached at the end of a warm-up of a tenth of all steps; from there it
            falls to zero along half a cosine.
        scale_learning_rate: likewise of the logarithm of activations' scales, in student learning
            rates. 1 fits the images better and new ones worse; 0 leaves scales to calibration.
        adversarial_weight: length of D's gradient at an image, in lengths of the prior's; 0 leaves
            the images to the prior.
        prior: what an image must look like.
    Raises:
        ValueError: no round or no student step, a learning rate that is not above zero, or an
            adversary without a prior.
    """

    n_rounds: int = 160
    generator_steps: int = 5
    student_steps: int = 5
    image_learning_rate: float = 0.02
    student_learning_rate: float = 2e-3
    scale_learning_rate: float = 0.2
    adversarial_weight: float = 4.0
    prior: Prior = field(default_factory=Prior)

    def __post_init__(self) -> None:
        counts = self.n_rounds, self.student_steps, self.generator_steps + 1
        if not all(isinstance(count, int) and count > 0 for count in counts):
            raise ValueError(f"Game: expected whole numbers of rounds and steps, found {self}")
        for name in ("image_learning_rate", "student_learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"Game: expected {name} above zero, found {getattr(self, name)}")
        for name in ("scale_learning_rate", "adversarial_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"Game: expected {name} of 0 or more, found {getattr(self, name)}")
        if self.adversarial_weight and not (self.prior.entropy_weight or self.prior.tv_weight):
            raise ValueError(
                "Game: expected a prior, in whose gradient adversarial_weight is measured, found "
                "one without weights"
            )

    @property
    def total_steps(self) -> int:
        """Student steps of all rounds."""
        return self.n_rounds * self.student_steps

    def student_learning_rate_at(self, step: int, bits: int) -> float:
        """Return the learning rate at a step of a student whose coarsest format has `bits`."""
        warmup = max(1, self.total_steps // 10)
        rate = self.student_learning_rate * 2.0 ** (REFERENCE_BITS - bits)
        return rate * learning_rate_factor(step, self.total_steps, warmup)


@dataclass(frozen=True)
class GameTrace:
    """How a game went, per round; disagreement in units of the output's mean magnitude.

    Args:
        generator: disagreement on the images moved, before the student answers `[R]`.
        entropy: their patch-similarity entropy, summed over attentions `[R]`, nat.
        total_variation: their root mean square neighbour difference `[R]`, fraction of the pixel
            range.
        student: disagreement on the batch that the student learned from last `[R]`.
        before: disagreement on the images the game began with, as quantized without it.
        after: likewise, of the student that is kept.
        best_round: the round after which it was kept, 0 if none came closer than it began.
    """

    generator: Tensor
    entropy: Tensor
    total_variation: Tensor
    student: Tensor
    before: float
    after: float
    best_round: int

    @property
    def improved(self) -> bool:
        """Whether the student came closer to the teacher."""
        return self.best_round > 0


@dataclass(frozen=True)
class Refinement:
    """What a game gives.

    Args:
        program: the student, compressed; compile it like any other.
        pixels: the images as the game left them `[n, C, H, W]`, fp32 in [0, 1].
        trace: how it went.
    """

    program: Program
    pixels: Tensor = field(repr=False)
    trace: GameTrace = field(repr=False)


def adversarial_refine(
    model: nn.Module | ExportedProgram,
    example_inputs: Inputs,
    recipe: Recipe | str,
    images: SyntheticImages,
    *,
    outputs: Outputs | None = None,
    settings: Game = Game(),
    seed: int = 0,
    taps: str | Sequence[str] = "*",
    n_prefix: int | None = None,
    progress: Progress = None,
    checkpoint: str | Path | None = None,
) -> Refinement:
    """Compress `model` by `recipe`, calibrated on `images`, and let images and result improve each
    other. All weights and biases train, and the scales of static activations, from those that
    calibration found.

    Up to eight times during the game the student is judged on the images it began with, and the one
    that comes closest to the teacher is kept. If none comes closer than it began, the program is
    what `fxq.compress` makes, and says so in its notes.

    The model is read, never written; the same seed gives the same program.

    Args:
        model: the float model that dreamed the images, in float32.
        example_inputs: one input as for `fxq.compress`; its values do not matter.
        recipe: any recipe that observes, calibrates and converts, or the name of one.
        images: where the game begins: `synthesize(..., labels=None)`.
        outputs: takes the model's own output and returns the tensors to agree on, each with the
            batch first; all floating ones unless given. A detector is best compared at its
            features and dense predictions, wrapped so that it returns them: what follows
            suppression of boxes has no gradient.
        settings: of the game.
        seed: of all random numbers.
        taps: which attentions count in the prior, as for `synthesize`.
        n_prefix: likewise.
        progress: as for `fxq.compress`.
        checkpoint: a file that keeps the state of an interrupted game, which then goes on from
            there; it is removed at the end.
    Raises:
        UnsupportedError: no attention over patches, not one input of images, half precision, or a
            recipe with nothing to train between observing and converting.
        ValueError: images of another size than the model takes, or no output to agree on.
    """
    if not isinstance(images, SyntheticImages):
        raise TypeError(
            f"images: expected what psaq_vit.synthesize returns, found {type(images).__name__}"
        )
    recipe = resolve_recipe(recipe)
    prepare, finish = _split(recipe)
    kept = Checkpoint(checkpoint, "fxq_game")
    with reporting(progress) as report, torch.inference_mode(False), torch.no_grad():
        captured, _ = capture_images(model, example_inputs)
        images = replace(images, pixels=images.pixels.to(device_of(model)))
        batches = CheckedBatches(captured, images, device_of(model))
        example = next(iter(batches))[0]
        found = find_taps(captured.graph_module, example, taps, n_prefix)
        teacher = Teacher(captured.graph_module, found, settings.prior)
        gap = Gap(teacher, outputs, captured.signature.out_spec, example)
        observed = prepare.apply(copy_graph(captured.graph_module), batches, report)
        game = _Game(
            gap, Student(student_of(observed), settings.scale_learning_rate), images, settings, seed
        )
        found.report_refusals("refine", report)
        about = repr((recipe, settings, seed, found, images.mean, images.std, images.batch_size))
        # The callable that selects outputs has no name: what it selects stands for it.
        selected = gap.chosen(teacher.results(example))
        decides = (images.pixels, *selected, *(tap.patches for tap in found.taps))
        mark = fingerprint(captured.graph_module, about, *decides)
        trace = game.play(report, kept, mark)
        made_by = repr(recipe)
        if trace.improved:
            adopt(observed, game.student.gm)
            made_by += f", refined by {settings!r}"
            report(
                f"refine: disagreement {trace.before:.3g} before, {trace.after:.3g} after round "
                f"{trace.best_round}, which is kept"
            )
        else:
            note = (
                f"the game is not part of it: disagreement {trace.before:.3g} on the images it "
                "began with, and never less"
            )
            captured = replace(captured, notes=(*captured.notes, note))
            report(f"refine: {note}")
        gm = finish.apply(observed, progress=report)
        program = Program.from_captured(captured, gm, recipe=made_by, model=model)
        return Refinement(program, game.generator.all_pixels, trace)


def _split(recipe: Recipe) -> tuple[Recipe, Recipe]:
    """Split a recipe in front of the pass that leaves the OBSERVED dialect."""
    for index, step in enumerate(recipe.passes):
        if step.reads is OBSERVED and step.writes is not OBSERVED and index:
            before, after = recipe.passes[:index], recipe.passes[index:]
            return Recipe(recipe.name, before), Recipe(recipe.name, after)
    raise UnsupportedError(
        f"recipe {recipe.name!r}: expected observers and a Convert, between which a student can "
        f"train, found {[type(step).__name__ for step in recipe.passes]}"
    )


class _Game:
    """One call of `adversarial_refine`."""

    def __init__(
        self, gap: Gap, student: Student, images: SyntheticImages, settings: Game, seed: int
    ) -> None:
        self.gap, self.student, self.images, self.settings = gap, student, images, settings
        n_views = settings.n_rounds * max(settings.generator_steps, settings.student_steps)
        rate, weight = settings.image_learning_rate, settings.adversarial_weight
        self.generator = ImageGenerator(images, settings.prior, n_views, rate, weight, seed)
        self.seed = seed
        self.record = torch.zeros(settings.n_rounds, 4)

    def play(self, report: Reporter, checkpoint: Checkpoint, mark: str) -> GameTrace:
        """Play all rounds."""
        before, n_rounds = self._gap_at_start(), self.settings.n_rounds
        if not math.isfinite(before):
            raise ValueError(
                "refine: expected finite outputs of the quantized model on the images, found NaN "
                "or Inf; choose another recipe, or other outputs"
            )
        best, best_round = before, 0
        judged = {1 + turn * (n_rounds - 1) // (N_JUDGEMENTS - 1) for turn in range(N_JUDGEMENTS)}
        state, first = checkpoint.load(mark), 0
        if state is not None:
            about, kept = state
            first, self.record = about["round"], kept["record"]
            best, best_round = about["best"], about["best_round"]
            self.generator.restore(kept)
            self.student.restore(kept)
            report(f"refine: going on from round {first + 1} of {n_rounds}")
        with report.task("refine", "rounds", n_rounds, first) as task:
            for turn in range(first, n_rounds):
                self._round(turn)
                task.advance(1, partial(_news, self.record[turn]))
                if turn + 1 in judged and (found := self._gap_at_start()) < best:
                    best, best_round = found, turn + 1
                    self.student.keep()
                if checkpoint.due:
                    kept = {"record": self.record} | self.generator.state() | self.student.state()
                    about = {"round": turn + 1, "best": best, "best_round": best_round}
                    checkpoint.save(about, kept)
        checkpoint.remove()
        self.student.recall()
        moved, entropy, tv, learned = self.record.T
        return GameTrace(moved, entropy, tv, learned, before, best, best_round)

    def _round(self, turn: int) -> None:
        s, generator = self.settings, self.generator
        for step in range(turn * s.generator_steps, (turn + 1) * s.generator_steps):
            index = turn % len(generator.batches)
            self.record[turn, :3] = generator.move(index, step, self.gap, self.student.gm)
        random = generator_of(self.seed, -1 - turn)
        for step in range(turn * s.student_steps, (turn + 1) * s.student_steps):
            order = torch.randperm(len(self.images.pixels), generator=random)
            images = generator.view(order[: len(generator.batches[0])], step)
            rate = s.student_learning_rate_at(step, self.student.bits)
            self.record[turn, 3] = self.student.learn(images, self.gap, rate)

    def _gap_at_start(self) -> float:
        parts = [self.gap.on(batch, self.student.gm) for batch in self.images]
        return float(torch.cat(parts).mean())


def _news(record: Tensor) -> str:
    moved, *_, learned = record.tolist()
    return f"disagreement {moved:.3f} on the images moved, {learned:.3f} while learning"
