"""Synthesis: dream calibration images out of a vision transformer (PSAQ-ViT, arXiv:2203.02250).

    minimize over pixels   -sum_l H_l  +  a1 * cross-entropy(class)  +  a2 * |TV - target|

per image, by Adam, with H_l the patch-similarity entropy of attention l. The model is frozen.

Departures from the published code, which knows five models of one library: images do not depend on
each other (own random numbers, own entropy, own total variation; shifts differ between images and
axes); pixels are optimized in [0, 1], so that learning rate and total variation mean the same for
every normalization; the entropy estimate converges and counts each pair once; tokens that are not
patches are left out, and only those.
"""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from fxq.capturing import Captured
from fxq.passes.psaq_vit.images import SyntheticImages, Trace, normalize
from fxq.passes.psaq_vit.prior import (
    Views,
    generator_of,
    learning_rate_factor,
    natural_scale,
    total_variation,
)
from fxq.passes.psaq_vit.teacher import (
    Estimator,
    Heads,
    Teacher,
    capture_images,
    class_logits,
    teacher_of,
)
from fxq.pipeline import Progress, device_of
from fxq.signature import Inputs, Leaf

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EVERY_S, SAVE_EVERY_S = 5.0, 60.0  # seconds between lines of progress, and between checkpoints


@dataclass(frozen=True)
class Synthesis:
    """Settings of the optimization. Defaults are the published ones in units of the pixel range,
    which spans 1 / 0.226 standard deviations of ImageNet.

    Args:
        n_steps: per stage.
        n_stages: each starts with a fifth of warm-up; the optimizer's state lives on.
        learning_rate: of Adam, fraction of the pixel range.
        betas: of Adam.
        entropy_weight: of the entropy, summed over attentions.
        class_weight: of the class loss (a1).
        tv_weight: of the distance to the target, per pixel range (a2).
        tv_target: the target of each image is drawn from this interval: root mean square neighbour
            difference of a picture of 224 pixels, converted to the size at hand
            (`prior.natural_scale`). Strokes and text have more than photographs.
        bandwidth: of the kernel density estimate. The published 0.01 leaves few pairs with a
            gradient where patches are few.
        estimator: "converged", or "reference": ten points, whole batch.
        heads: "mean" over heads, or "concat".
        jitter: largest cyclic shift in each stage, fraction of the side; the last entry also counts
            for later stages.
        flip: mirror half of the views.
    """

    n_steps: int = 500
    n_stages: int = 2
    learning_rate: float = 0.045
    betas: tuple[float, float] = (0.5, 0.9)
    entropy_weight: float = 1.0
    class_weight: float = 1.0
    tv_weight: float = 20.0
    tv_target: tuple[float, float] = (0.065, 0.077)
    bandwidth: float = 0.05
    estimator: Estimator = "converged"
    heads: Heads = "mean"
    jitter: tuple[float, ...] = (15 / 224, 30 / 224)
    flip: bool = True

    def __post_init__(self) -> None:
        if self.n_steps < 1 or self.n_stages < 1 or not self.jitter:
            raise ValueError(f"Synthesis: expected at least one stage of one step, found {self}")
        if not 0 <= self.tv_target[0] <= self.tv_target[1]:
            raise ValueError(f"Synthesis.tv_target: expected low <= high, found {self.tv_target}")

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
    progress: Progress | None = None,
    checkpoint: str | Path | None = None,
) -> SyntheticImages:
    """Return images on which `model` behaves as on pictures, made from nothing but the model.

    The model is read, never written; the same seed gives the same images, and an image depends on
    its index alone, not on how many are made.

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
        batch_size: images optimized together; bounds the memory, not the result.
        progress: called with a line of text every few seconds.
        checkpoint: a file that keeps the state of an interrupted run, which then goes on from
            there; it is removed at the end.
    Raises:
        UnsupportedError: no attention over patches, or not one input of images.
        ValueError: mean or std of the wrong length, labels out of range, numbers that overflow.
    """
    with torch.inference_mode(False), torch.no_grad():
        captured, leaf = capture_images(model, example_inputs)
        device = (device_of(model) if isinstance(model, nn.Module) else None) or torch.device("cpu")
        batch_size = _check_batch(leaf, n_images, batch_size)
        channels = leaf.shape[1]
        for name, values in (("mean", mean), ("std", std)):
            if len(values) != channels:
                raise ValueError(
                    f"{name}: expected one number per channel of {leaf.name!r} {list(leaf.shape)}, "
                    f"found {len(values)}"
                )
        if not all(s > 0 for s in std):
            raise ValueError(f"std: expected positive numbers, found {list(std)}")
        size = (min(2, batch_size) if isinstance(leaf.shape[0], str) else batch_size,)
        probe = torch.zeros(*size, *leaf.shape[1:], dtype=leaf.dtype, device=device)  # type: ignore
        teacher = teacher_of(
            captured,
            probe,
            bandwidth=settings.bandwidth,
            estimator=settings.estimator,
            heads=settings.heads,
            taps=taps,
            n_prefix=n_prefix,
        )
        run = _Run(captured, leaf, teacher, settings, tuple(mean), tuple(std), seed, logits, device)
        run.start(n_images, labels, probe)
        if progress and teacher.taps.refusals:
            listing = "; ".join(f"{name}: {why}" for name, why in teacher.taps.refusals.items())
            progress(f"synthesize: left out {listing}")
        state = _Checkpoint(checkpoint, run.fingerprint)
        return run.optimize(n_images, batch_size, progress, state)


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

    def start(self, n_images: int, labels: Tensor | str | None, probe: Tensor) -> None:
        """Draw everything random, image by image, and check the labels."""
        s = self.settings
        n_classes = 0
        if labels is not None:
            results, _ = self.teacher(probe)
            n_classes = class_logits(self.captured, results, self.logits).shape[1]
        given = labels if isinstance(labels, Tensor) else None
        if given is not None and (
            given.shape != (n_images,) or given.min() < 0 or given.max() >= n_classes
        ):
            raise ValueError(
                f"labels: expected {n_images} classes from 0 to {n_classes - 1}, found shape "
                f"{list(given.shape)}, values {int(given.min())} to {int(given.max())}"
            )
        _, channels, height, width = self.leaf.shape
        reach = [round(fraction * min(height, width)) for fraction in s.jitter]  # type: ignore
        noise, targets, classes, shifts, flips = [], [], [], [], []
        for index in range(n_images):
            g = generator_of(self.seed, index)
            noise.append(torch.randn(channels, height, width, generator=g))  # type: ignore
            targets.append(torch.rand((), generator=g))
            classes.append(torch.randint(max(1, n_classes), (), generator=g))
            stages = [reach[min(i, len(reach) - 1)] for i in range(s.n_stages)]
            shifts.append(
                torch.cat([torch.randint(-r, r + 1, (s.n_steps, 2), generator=g) for r in stages])
            )
            flips.append(torch.rand(s.total_steps, generator=g) < 0.5)
        scale = natural_scale(min(height, width))  # type: ignore[arg-type]
        low, high = (bound * scale for bound in s.tv_target)
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (self.mean, self.std))
        self.pixels = (torch.stack(noise) * std + mean).clamp(0, 1).to(self.device)
        self.targets = (low + (high - low) * torch.stack(targets)).to(self.device)
        drawn = torch.stack(classes) if given is None else given.cpu()
        self.labels = drawn.to(self.device) if labels is not None else None
        flipped = torch.stack(flips, 1) if s.flip else torch.zeros(s.total_steps, n_images).bool()
        self.views = Views(torch.stack(shifts, 1), flipped)
        about = (s, self.mean, self.std, self.seed, n_images, self.teacher.taps)
        self.fingerprint = _fingerprint(self.captured.graph_module, repr(about), drawn)

    def losses(self, step: int, chosen: slice, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return each image's loss `[B]` at a step, and what the trace keeps of it `[L + 2, B]`."""
        s = self.settings
        views = Views(self.views.shifts[:, chosen], self.views.flips[:, chosen])
        seen = views.at(step, pixels)
        results, entropy = self.teacher(normalize(seen, self.mean, self.std).to(self.leaf.dtype))
        tv = total_variation(seen)
        away = (tv / self.targets[chosen]).log().square()
        loss = s.tv_weight * away - s.entropy_weight * entropy.sum(0)
        classes = torch.zeros_like(tv)
        if self.labels is not None:
            logits = class_logits(self.captured, results, self.logits).float()
            classes = F.cross_entropy(logits, self.labels[chosen], reduction="none")
            loss = loss + s.class_weight * classes
        return loss, torch.cat([entropy, tv[None], classes[None]]).detach()

    def optimize(
        self, n_images: int, batch_size: int, progress: Progress | None, state: "_Checkpoint"
    ) -> SyntheticImages:
        """Optimize batch after batch and return the images."""
        steps = self.settings.total_steps
        record = torch.zeros(steps, len(self.teacher.taps.taps) + 2)
        first, step, moments = state.load(self.pixels, record)
        if progress and (first or step):
            progress(f"synthesize: going on from image {first}, step {step} of {steps}")
        clock = _Clock(progress)
        for start in range(first, n_images, batch_size):
            chosen = slice(start, min(start + batch_size, n_images))
            pixels = self.pixels[chosen].clone().requires_grad_()
            adam = torch.optim.Adam([pixels], betas=self.settings.betas)
            _restore(adam, pixels, moments, step)
            for step in range(step, steps):  # noqa: B020  goes on where a checkpoint stopped
                adam.param_groups[0]["lr"] = self.settings.learning_rate_at(step)
                with torch.enable_grad():
                    loss, kept = self.losses(step, chosen, pixels)
                    (pixels.grad,) = torch.autograd.grad(loss.sum(), pixels)
                self._check_finite(loss, pixels.grad, start, step)
                adam.step()
                pixels.clamp_(0, 1)
                record[step] += kept.sum(1).cpu() / n_images
                clock.say(step, steps, chosen, n_images, kept)
                self.pixels[chosen] = pixels
                state.save_now_and_then(start, step + 1, self.pixels, record, adam, pixels)
            step, moments = 0, None
            state.save(chosen.stop, 0, self.pixels, record, {})
        state.remove()
        return self._result(record, batch_size)

    def _check_finite(self, loss: Tensor, gradient: Tensor, start: int, step: int) -> None:
        bad = ~(loss.isfinite() & gradient.flatten(1).isfinite().all(1))
        if bad.any():
            raise ValueError(
                f"image {start + int(bad.nonzero()[0])}, step {step}: expected finite numbers, "
                f"found an overflow in {self.leaf.dtype}; synthesize with the model in float32"
            )

    def _result(self, record: Tensor, batch_size: int) -> SyntheticImages:
        settings = self.settings
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


def _fingerprint(gm: GraphModule, settings: str, labels: Tensor) -> str:
    """Return a hash of everything that decides the images: weights, graph, settings."""
    digest = hashlib.sha256(settings.encode() + gm.code.encode())
    for tensor in (*gm.parameters(), *gm.buffers(), labels):
        digest.update(
            tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()[:16]


class _Clock:
    """Say how far it has come, and how long it will take."""

    def __init__(self, progress: Progress | None) -> None:
        self.progress, self.began, self.last = progress, time.perf_counter(), time.perf_counter()
        self.done = 0

    def say(self, step: int, steps: int, chosen: slice, n_images: int, kept: Tensor) -> None:
        self.done += chosen.stop - chosen.start
        now = time.perf_counter()
        if self.progress is None or now - self.last < EVERY_S:
            return
        self.last = now
        left = (n_images - chosen.start) * steps - step * (chosen.stop - chosen.start)
        seconds = (now - self.began) / self.done * left
        entropy, tv, classes = kept[:-2].sum(0).mean(), kept[-2].mean(), kept[-1].mean()
        self.progress(
            f"synthesize: images {chosen.start} to {chosen.stop - 1} of {n_images}, step "
            f"{step + 1} of {steps}: entropy {entropy:.2f}, total variation {tv:.3f}, class loss "
            f"{classes:.2f}; about {seconds:.0f} s left"
        )


def _restore(
    adam: torch.optim.Adam, pixels: Tensor, moments: tuple[Tensor, Tensor] | None, step: int
) -> None:
    if moments is not None:
        adam.state[pixels] = {
            "step": torch.tensor(float(step)),
            "exp_avg": moments[0].to(pixels.device),
            "exp_avg_sq": moments[1].to(pixels.device),
        }


class _Checkpoint:
    """The state of a run in a file; without a path, nothing."""

    def __init__(self, path: str | Path | None, fingerprint: str) -> None:
        self.path = None if path is None else Path(path)
        self.fingerprint, self.last = fingerprint, time.perf_counter()

    def load(self, pixels: Tensor, record: Tensor) -> tuple[int, int, tuple[Tensor, Tensor] | None]:
        """Fill `pixels` and `record`, and return the first image, its step, and Adam's moments."""
        if self.path is None or not self.path.exists():
            return 0, 0, None
        with safe_open(self.path, "pt") as file:
            text = (file.metadata() or {}).get("fxq_synthesis")
            about = json.loads(text) if text else {}
            if about.get("fingerprint") != self.fingerprint:
                raise ValueError(
                    f"checkpoint: expected one of this model, these settings and this seed, found "
                    f"another in {self.path}; remove it or choose another file"
                )
            pixels.copy_(file.get_tensor("pixels"))
            record.copy_(file.get_tensor("record"))
            moments = None
            if about["step"]:
                moments = file.get_tensor("exp_avg"), file.get_tensor("exp_avg_sq")
        return about["image"], about["step"], moments

    def save_now_and_then(
        self,
        image: int,
        step: int,
        pixels: Tensor,
        record: Tensor,
        adam: torch.optim.Adam,
        trained: Tensor,
    ) -> None:
        """Write the file where the last time is long enough ago."""
        if self.path is not None and time.perf_counter() - self.last > SAVE_EVERY_S:
            state = adam.state[trained]
            moments = {name: state[name].cpu() for name in ("exp_avg", "exp_avg_sq")}
            self.save(image, step, pixels, record, moments)

    def save(
        self, image: int, step: int, pixels: Tensor, record: Tensor, moments: dict[str, Tensor]
    ) -> None:
        """Write the file, whole or not at all."""
        if self.path is None:
            return
        self.last = time.perf_counter()
        tensors = {"pixels": pixels.detach().cpu(), "record": record, **moments}
        about = {"fingerprint": self.fingerprint, "image": image, "step": step}
        partial = self.path.with_name(self.path.name + ".partial")
        save_file(tensors, partial, {"fxq_synthesis": json.dumps(about)})
        partial.replace(self.path)

    def remove(self) -> None:
        """Delete the file: the run is over."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
