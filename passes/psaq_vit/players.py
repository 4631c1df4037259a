"""The two players of PSAQ-ViT V2's game, and what they play for: how far student and teacher
disagree (see `fxq.passes.psaq_vit.game`)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from fxq.checkpoint import adam_state, restore_adam
from fxq.errors import UnsupportedError
from fxq.passes.common import activation_scales
from fxq.passes.psaq_vit.images import SyntheticImages, normalize
from fxq.passes.psaq_vit.prior import Prior, generator_of, total_variation
from fxq.passes.psaq_vit.teacher import Teacher
from fxq.spec import QuantSpec

Outputs = Callable[[Any], Tensor | Sequence[Tensor]]
BETAS = (0.5, 0.9)  # of the pixels' Adam, as in synthesis


def disagreement(exact: Sequence[Tensor], found: Sequence[Tensor], sizes: Tensor) -> Tensor:
    """Return the mean absolute error of each image's outputs `[B]`, mean over outputs.

    Args:
        exact: outputs of the teacher, each `[B, ...]`.
        found: those of the student.
        sizes: what an error of each output is measured in `[O]`, > 0.
    """
    errors = [
        (p.float() - q.float()).abs().flatten(1).mean(1) / size
        for p, q, size in zip(exact, found, sizes, strict=True)
    ]
    return torch.stack(errors).mean(0)


def opposed(prior: Tensor, adversarial: Tensor, weight: float) -> Tensor:
    """Return the gradient `[B, C, H, W]` that descends the prior and climbs the disagreement, whose
    own is brought to `weight` times the length of the prior's, image by image.

    Args:
        prior: gradient of the prior `[B, C, H, W]`.
        adversarial: gradient of the disagreement, likewise; zero where student and teacher are one.
        weight: ratio of lengths.
    """
    lengths = [g.flatten(1).norm(dim=1).view(-1, 1, 1, 1) for g in (prior, adversarial)]
    tiny = torch.finfo(torch.float32).tiny
    return prior - weight * lengths[0] * (adversarial / lengths[1].clamp(min=tiny))


class Gap:
    """How far a student's outputs are from the teacher's.

    Args:
        teacher: the float model.
        outputs: takes the model's own output and returns what counts; everything floating unless
            given.
        out_spec: the pytree of the model's own output.
        example: normalized images `[B, C, H, W]` on which the sizes of the outputs are measured.
    Raises:
        ValueError: no output, one without the batch first, or one that is not finite.
    """

    def __init__(
        self,
        teacher: Teacher,
        outputs: Outputs | None,
        out_spec: pytree.TreeSpec,
        example: Tensor,
    ) -> None:
        self.teacher, self.outputs, self.out_spec = teacher, outputs, out_spec
        exact = self.chosen(teacher.results(example))
        fits = [isinstance(x, Tensor) and x.ndim and len(x) == len(example) for x in exact]
        if not exact or not all(fits):
            shapes = [list(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in exact]
            raise ValueError(
                f"outputs: expected floating tensors with the batch of {len(example)} images "
                f"first, found {shapes}; select others with outputs=lambda output: ..."
            )
        if not all(x.isfinite().all() for x in exact):
            raise ValueError(
                "outputs: expected finite values, found NaN or Inf, as in masked logits; select "
                "others with outputs=lambda output: ..."
            )
        self.sizes = torch.stack([x.float().abs().mean() for x in exact]).clamp(min=1e-12)

    def chosen(self, results: Sequence[Any]) -> list[Tensor]:
        """Return what counts among a graph's results."""
        if self.outputs is None:
            return [x for x in results if isinstance(x, Tensor) and x.is_floating_point()]
        picked = self.outputs(pytree.tree_unflatten(list(results), self.out_spec))
        if not isinstance(picked, Tensor | Sequence):
            raise TypeError(
                f"outputs: expected it to return tensors, found {type(picked).__name__}"
            )
        return [picked] if isinstance(picked, Tensor) else list(picked)

    def between(self, exact: Sequence[Any], found: Sequence[Any]) -> Tensor:
        """Return the disagreement of each image `[B]` between two graphs' results.

        Raises:
            ValueError: gradients are wanted, and what counts has none.
        """
        result = disagreement(self.chosen(exact), self.chosen(found), self.sizes)
        if torch.is_grad_enabled() and not result.requires_grad:
            raise ValueError(
                "outputs: expected tensors that depend differentiably on weights and image, found "
                "none that does; select others, and do not detach or round them"
            )
        return result

    def on(self, images: Tensor, student: GraphModule) -> Tensor:
        """Return the disagreement of each image `[B]`, normalized."""
        with torch.no_grad():
            exact = self.teacher.results(images)
        return self.between(exact, student(images))


class ImageGenerator:
    """The generator: all images, and an optimizer for each batch of them.

    Args:
        start: where the images begin.
        prior: what they must look like.
        n_steps: most steps that any view is asked for.
        learning_rate: of Adam, fraction of the pixel range.
        adversarial_weight: as in `opposed`.
        seed: of views and targets.
    """

    def __init__(
        self,
        start: SyntheticImages,
        prior: Prior,
        n_steps: int,
        learning_rate: float,
        adversarial_weight: float,
        seed: int,
    ) -> None:
        self.start, self.prior, self.weight = start, prior, adversarial_weight
        generators = [generator_of(seed, index) for index in range(len(start.pixels))]
        side = min(start.pixels.shape[-2:])
        targets, self.views = prior.draw(generators, side, [n_steps])
        self.targets = targets.to(start.pixels.device)
        self.batches = torch.arange(len(start.pixels)).split(start.batch_size)
        self.pixels = [start.pixels[batch].requires_grad_() for batch in self.batches]
        self.adams = [torch.optim.Adam([p], learning_rate, BETAS) for p in self.pixels]

    @property
    def all_pixels(self) -> Tensor:
        """All images `[n, C, H, W]` in [0, 1]."""
        return torch.cat([pixels.detach() for pixels in self.pixels])

    def normalized(self, pixels: Tensor) -> Tensor:
        """Return pixels as the model takes them."""
        return normalize(pixels, self.start.mean, self.start.std).to(self.start.dtype)

    def view(self, batch: Tensor, step: int) -> Tensor:
        """Return images by their index, as seen at a step, normalized."""
        return self.normalized(self.views.of(batch).at(step, self.all_pixels[batch]))

    def move(self, index: int, step: int, gap: Gap, student: GraphModule) -> Tensor:
        """Take one step with a batch, and return disagreement, entropy and total variation before
        it, mean over images `[3]`.

        Raises:
            ValueError: a gradient that is not finite.
        """
        pixels, batch = self.pixels[index], self.batches[index]
        with torch.enable_grad():
            seen = self.views.of(batch).at(step, pixels)
            images = self.normalized(seen)
            results, entropy = gap.teacher(images)
            tv = total_variation(seen)
            prior = self.prior.loss(entropy, tv, self.targets[batch]).sum()
            found = gap.between(results, student(images))
            (gradient,) = torch.autograd.grad(prior, pixels, retain_graph=True)
            (against,) = torch.autograd.grad(found.sum(), pixels)
        pixels.grad = opposed(gradient, against, self.weight)
        if not pixels.grad.isfinite().all():
            raise ValueError(
                f"generator: expected finite gradients, found NaN or Inf at step {step}; lower "
                "Game.image_learning_rate"
            )
        self.adams[index].step()
        pixels.clamp_(0, 1)
        return torch.stack([found.mean(), entropy.sum(0).mean(), tv.mean()]).detach()

    def state(self) -> dict[str, Tensor]:
        """Return everything that changes."""
        kept = {"pixels": self.all_pixels}
        for index, (adam, pixels) in enumerate(zip(self.adams, self.pixels, strict=True)):
            kept |= adam_state(adam, [pixels], f"images{index}")
        return kept

    def restore(self, kept: dict[str, Tensor]) -> None:
        """Put back what `state` returned."""
        for index, (adam, pixels) in enumerate(zip(self.adams, self.pixels, strict=True)):
            pixels.copy_(kept["pixels"][self.batches[index]])
            if f"images{index}.0.step" in kept:
                restore_adam(adam, [pixels], kept, f"images{index}")


class Student:
    """The quantized model, through straight-through gradients.

    Args:
        gm: what `student_of` returned.
        scale_learning_rate: of activations' scales, in those of the rest.
    """

    def __init__(self, gm: GraphModule, scale_learning_rate: float) -> None:
        self.gm = gm
        scales = dict.fromkeys(activation_scales(gm))
        self.named = {
            name: parameter
            for name, parameter in gm.named_parameters()
            if parameter.requires_grad and (scale_learning_rate or parameter not in scales)
        }
        rest = [p for p in self.named.values() if p not in scales]
        self.adam = torch.optim.Adam(rest)
        self.factors = [1.0]
        if scale_learning_rate and scales:
            self.adam.add_param_group({"params": list(scales)})
            self.factors.append(scale_learning_rate)
        specs = [getattr(module, "spec", None) for module in gm.modules()]
        bits = [spec.bits for spec in specs if isinstance(spec, QuantSpec)]
        if not bits:
            raise UnsupportedError(
                "refine: expected a recipe that quantizes layers of this model, found one that "
                "quantizes none; look at its targets and overrides"
            )
        self.bits = min(bits)  # of the coarsest format
        self.best: dict[str, Tensor] = {n: p.detach().clone() for n, p in self.named.items()}

    def keep(self) -> None:
        """Remember the parameters."""
        for name, value in self.named.items():
            self.best[name].copy_(value)

    def recall(self) -> None:
        """Go back to what was remembered."""
        for name, value in self.named.items():
            value.copy_(self.best[name])

    def learn(self, images: Tensor, gap: Gap, learning_rate: float) -> Tensor:
        """Take one step on normalized images, and return the disagreement before it.

        Raises:
            ValueError: a gradient that is not finite.
        """
        for group, factor in zip(self.adam.param_groups, self.factors, strict=True):
            group["lr"] = learning_rate * factor
        parameters = list(self.named.values())
        with torch.enable_grad():
            loss = gap.on(images, self.gm).mean()
            gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
        for (name, parameter), gradient in zip(self.named.items(), gradients, strict=True):
            if not gradient.isfinite().all():
                raise ValueError(
                    f"student: expected finite gradients, found an overflow at {name}; lower "
                    "Game.student_learning_rate"
                )
            parameter.grad = gradient
        self.adam.step()
        return loss.detach()

    def state(self) -> dict[str, Tensor]:
        """Return everything that changes."""
        kept: dict[str, Tensor] = {f"student.{n}": value for n, value in self.named.items()}
        kept |= {f"best.{name}": value for name, value in self.best.items()}
        return kept | adam_state(self.adam, list(self.named.values()), "student_adam")

    def restore(self, kept: dict[str, Tensor]) -> None:
        """Put back what `state` returned."""
        for name, value in self.named.items():
            value.copy_(kept[f"student.{name}"])
            self.best[name].copy_(kept[f"best.{name}"])
        restore_adam(self.adam, list(self.named.values()), kept, "student_adam")
