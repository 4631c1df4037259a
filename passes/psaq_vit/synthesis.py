"""Synthesis: dream calibration images out of a vision transformer (PSAQ-ViT, arXiv:2203.02250).

    minimize over pixels   prior (entropy, total variation)  +  a1 * cross-entropy(class)

per image, by Adam. The model is frozen.

Departures from the published code, which knows five models of one library: images do not depend on
each other (own random numbers, own entropy, own total variation; shifts differ between images and
axes); pixels are optimized in [0, 1], so that learning rate and total variation mean the same for
every normalization; the entropy estimate converges and counts each pair once; tokens that are not
patches are left out, and only those.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import ExportedProgram

from fxq.batches import device_of
from fxq.capturing import Captured
from fxq.checkpoint import Checkpoint, Tensors, adam_state, fingerprint, restore_adam
from fxq.passes.psaq_vit.images import SyntheticImages, Trace, normalize
from fxq.passes.psaq_vit.prior import Prior, generator_of, learning_rate_factor, total_variation
from fxq.passes.psaq_vit.taps import find_taps
from fxq.passes.psaq_vit.teacher import Teacher, capture_images, class_logits
from fxq.progress import Progress, Reporter, Task, reporting
from fxq.signature import Inputs, Leaf

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Synthesis:
    """Settings of the optimization. Defaults are the published ones in units of the pixel range,
    which spans 1 / 0.226 standard deviations of ImageNet.

    Args:
        n_steps: per stage.
        n_stages: each starts with a fifth of warm-up; the optimizer's state lives on.
        learning_rate: of Adam, fraction of the pixel range.
        betas: of Adam.
        class_weight: of the class loss (a1).
        prior: what else is asked of an image.
    Raises:
        ValueError: no step or no stage.
    """

    n_steps: int = 500
    n_stages: int = 2
    learning_rate: float = 0.045
    betas: tuple[float, float] = (0.5, 0.9)
    class_weight: float = 1.0
    prior: Prior = field(default_factory=Prior)

    def __post_init__(self) -> None:
        if self.n_steps < 1 or self.n_stages < 1:
            raise ValueError(f"Synthesis: expected at least one stage of one step, found {self}")

    @property
    def total_steps(self) -> int:
        """Steps of all stages."""
        return self.n_steps * self.n_stages

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of a step."""
        warmup = max(1, self.n_steps // 5)
        return self.learning_rate * learning_rate_factor(step % self.n_steps, self.n_steps, warmup)


def synthesize(
    model: nn.Module | ExportedProgram,
    example_inputs: Inputs,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    n_images: int = 32,
    labels: Tensor | Literal["random"] | None = "random",
    seed: int = 0,
    settings: Synthesis = Synthesis(),
    taps: str | Sequence[str] = "*",
    n_prefix: int | None = None,
    logits: Callable[[Any], Tensor] | None = None,
    batch_size: int = 32,
    progress: Progress = None,
    checkpoint: str | Path | None = None,
) -> SyntheticImages:
    """Return images on which `model` behaves as on pictures, made from nothing but the model.

    The model is read, never written; the same call gives the same images. What is drawn for an
    image depends on the seed and its index alone, not on how many are made.

    Args:
        model: a float vision transformer in eval mode, or one that torch.export exported.
        example_inputs: one input as for `fxq.compress`; its values do not matter.
        mean: per channel, of the normalization the model was trained with.
        std: likewise, > 0.
        n_images: how many.
        labels: the class each image is to show `[n_images]`, int64; "random" draws one per image;
            None leaves classes out.
        seed: of all random numbers.
        settings: of the optimization.
        taps: which attentions count: qualified module names with wildcards, or node names.
        n_prefix: leading tokens that are not patches; found by experiment unless given.
        logits: takes the model's output and returns class logits `[B, classes]`, where they are
            not its only tensor of two dimensions.
        batch_size: images optimized together; bounds the memory. Rounding differs between batch
            sizes, and grows over many steps.
        progress: as for `fxq.compress`.
        checkpoint: a file that keeps the state of an interrupted run, which then goes on from
            there; it is removed at the end.
    Raises:
        UnsupportedError: no attention over patches, or not one input of images.
        ValueError: mean or std of the wrong length, labels out of range, numbers that overflow.
    """
    kept = Checkpoint(checkpoint, "fxq_synthesis")
    with reporting(progress) as report, torch.inference_mode(False), torch.no_grad():
        captured, leaf = capture_images(model, example_inputs)
        device = device_of(model) or torch.device("cpu")
        batch_size = _check_batch(leaf, n_images, batch_size)
        check_normalization(leaf, mean, std)
        size = (min(2, batch_size) if isinstance(leaf.shape[0], str) else batch_size,)
        probe = torch.zeros(*size, *leaf.shape[1:], dtype=leaf.dtype, device=device)  # type: ignore
        found = find_taps(captured.graph_module, probe, taps, n_prefix)
        teacher = Teacher(captured.graph_module, found, settings.prior)
        means, stds = tuple(map(float, mean)), tuple(map(float, std))
        run = _Run(captured, leaf, teacher, settings, means, stds, seed, logits, device)
        run.start(n_images, batch_size, labels, probe)
        found.report_refusals("synthesize", report)
        return run.optimize(n_images, batch_size, report, kept)


def check_normalization(leaf: Leaf, mean: Sequence[float], std: Sequence[float]) -> None:
    """Raise `ValueError` unless there is one mean and one positive std per channel."""
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != leaf.shape[1]:
            raise ValueError(
                f"{name}: expected one number per channel of {leaf.name!r} {list(leaf.shape)}, "
                f"found {len(values)}"
            )
    if not all(s > 0 for s in std):
        raise ValueError(f"std: expected positive numbers, found {list(std)}")


def _check_batch(leaf: Leaf, n_images: int, batch_size: int) -> int:
    if n_images < 1 or batch_size < 1:
        raise ValueError(
            f"n_images and batch_size: expected at least 1, found {n_images} and {batch_size}"
        )
    if isinstance(leaf.shape[0], str):
        return min(batch_size, n_images)
    if n_images % leaf.shape[0]:
        raise ValueError(
            f"n_images: expected a multiple of {leaf.shape[0]}, the batch this model fixes, "
            f"found {n_images}"
        )
    return leaf.shape[0]


class _Run:
    """One call of `synthesize`."""

    def __init__(
        self,
        captured: Captured,
        leaf: Leaf,
        teacher: Teacher,
        settings: Synthesis,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        seed: int,
        logits: Callable[[Any], Tensor] | None,
        device: torch.device,
    ) -> None:
        self.captured, self.leaf, self.teacher, self.settings = captured, leaf, teacher, settings
        self.mean, self.std, self.seed = mean, std, seed
        self.logits, self.device = logits, device

    def start(
        self, n_images: int, batch_size: int, labels: Tensor | str | None, probe: Tensor
    ) -> None:
        """Draw everything random, image by image, and check the labels."""
        s = self.settings
        if not (isinstance(labels, Tensor) or labels in ("random", None)):
            raise ValueError(f'labels: expected a tensor, "random" or None, found {labels!r}')
        logits = torch.zeros(1, 0)
        if labels is not None:
            results, _ = self.teacher(probe)
            logits = class_logits(self.captured, results, self.logits)
        n_classes = logits.shape[1]
        given = labels if isinstance(labels, Tensor) else None
        if given is not None and (
            given.dtype != torch.int64
            or given.shape != (n_images,)
            or given.min() < 0
            or given.max() >= n_classes
        ):
            raise ValueError(
                f"labels: expected {n_images} classes from 0 to {n_classes - 1}, int64, found "
                f"{given.dtype} {list(given.shape)}, values {given.min()} to {given.max()}"
            )
        _, channels, height, width = self.leaf.shape
        shape, side = (channels, height, width), min(height, width)
        generators = [generator_of(self.seed, index) for index in range(n_images)]
        noise = [torch.randn(shape, generator=g) for g in generators]  # type: ignore[arg-type]
        classes = [torch.randint(max(1, n_classes), (), generator=g) for g in generators]
        stages = [s.n_steps] * s.n_stages
        targets, self.views = s.prior.draw(generators, side, stages)  # type: ignore[arg-type]
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (self.mean, self.std))
        self.pixels = (torch.stack(noise) * std + mean).clamp(0, 1).to(self.device)
        self.targets = targets.to(self.device)
        drawn = torch.stack(classes) if given is None else given.cpu()
        self.labels = drawn.to(self.device) if labels is not None else None
        taps = self.teacher.taps
        about = (s, self.mean, self.std, self.seed, n_images, batch_size, taps, labels is None)
        # The callable that finds the logits has no name: what it finds stands for it.
        decides = (drawn, logits, *(tap.patches for tap in taps.taps))
        self.fingerprint = fingerprint(self.captured.graph_module, repr(about), *decides)

    def losses(self, step: int, chosen: slice, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return each image's loss `[B]` at a step, and what the trace keeps of it `[L + 2, B]`."""
        s = self.settings
        seen = self.views.of(chosen).at(step, pixels)
        results, entropy = self.teacher(normalize(seen, self.mean, self.std).to(self.leaf.dtype))
        tv = total_variation(seen)
        loss = s.prior.loss(entropy, tv, self.targets[chosen])
        classes = torch.zeros_like(tv)
        if self.labels is not None:
            logits = class_logits(self.captured, results, self.logits).float()
            classes = F.cross_entropy(logits, self.labels[chosen], reduction="none")
            loss = loss + s.class_weight * classes
        return loss, torch.cat([entropy, tv[None], classes[None]]).detach()

    def optimize(
        self, n_images: int, batch_size: int, report: Reporter, checkpoint: Checkpoint
    ) -> SyntheticImages:
        """Optimize batch after batch and return the images."""
        steps = self.settings.total_steps
        self.record = torch.zeros(steps, len(self.teacher.taps.taps) + 2)
        first, begin, state = 0, 0, checkpoint.load(self.fingerprint)
        kept: Tensors = {}
        if state is not None:
            first, begin, kept = state[0]["image"], state[0]["step"], state[1]
            self.pixels, self.record = kept["pixels"].to(self.device), kept["record"]
            report(f"synthesize: going on from image {first}, step {begin} of {steps}")
        done = first * steps + begin * min(batch_size, n_images - first)
        with report.task("synthesize", "image steps", n_images * steps, done) as task:
            for start in range(first, n_images, batch_size):
                chosen = slice(start, min(start + batch_size, n_images))
                self._optimize_batch(chosen, begin, kept, task, checkpoint)
                begin = 0
                tensors = {"pixels": self.pixels, "record": self.record}
                checkpoint.save({"image": chosen.stop, "step": 0}, tensors)
        checkpoint.remove()
        return self._result(batch_size)

    def _optimize_batch(
        self, chosen: slice, begin: int, kept: Tensors, task: Task, checkpoint: Checkpoint
    ) -> None:
        """Take the steps from `begin` on with a batch; `kept` has the optimizer's state there."""
        pixels = self.pixels[chosen].clone().requires_grad_()
        adam = torch.optim.Adam([pixels], betas=self.settings.betas)
        if begin:
            restore_adam(adam, [pixels], kept, "adam")
        for step in range(begin, self.settings.total_steps):
            adam.param_groups[0]["lr"] = self.settings.learning_rate_at(step)
            with torch.enable_grad():
                loss, found = self.losses(step, chosen, pixels)
                (pixels.grad,) = torch.autograd.grad(loss.sum(), pixels)
            self._check_finite(loss, pixels.grad, chosen.start, step)
            adam.step()
            pixels.clamp_(0, 1)
            self.record[step] += found.sum(1).cpu() / len(self.pixels)
            task.advance(len(pixels), partial(_news, chosen, step, found))
            if checkpoint.due:
                self.pixels[chosen] = pixels
                tensors = {"pixels": self.pixels, "record": self.record}
                tensors |= adam_state(adam, [pixels], "adam")
                checkpoint.save({"image": chosen.start, "step": step + 1}, tensors)
        self.pixels[chosen] = pixels

    def _check_finite(self, loss: Tensor, gradient: Tensor, start: int, step: int) -> None:
        bad = ~(loss.isfinite() & gradient.flatten(1).isfinite().all(1))
        if bad.any():
            raise ValueError(
                f"image {start + int(bad.nonzero()[0])}, step {step}: expected finite numbers, "
                f"found an overflow in {self.leaf.dtype}; check the model's weights for NaN, and "
                "synthesize in float32"
            )

    def _result(self, batch_size: int) -> SyntheticImages:
        settings, record = self.settings, self.record
        rates = [settings.learning_rate_at(step) for step in range(settings.total_steps)]
        names = tuple(tap.module for tap in self.teacher.taps.taps)
        entropy, tv, classes = record[:, :-2], record[:, -2], record[:, -1]
        return SyntheticImages(
            self.pixels,
            self.mean,
            self.std,
            self.labels,
            Trace(names, entropy, tv, classes, torch.tensor(rates)),
            batch_size,
            self.leaf.dtype,
            self.fingerprint,
        )


def _news(chosen: slice, step: int, found: Tensor) -> str:
    entropy, tv, classes = found[:-2].sum(0).mean(), found[-2].mean(), found[-1].mean()
    return (
        f"images {chosen.start} to {chosen.stop - 1}, step {step + 1}: entropy {entropy:.2f}, "
        f"total variation {tv:.3f}, class loss {classes:.2f}"
    )
