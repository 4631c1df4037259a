"""Trained models that are not part of the project, and samples for them: a folder with `zoo.py` has
them."""

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Outputs(nn.Module):
    """A model that returns one tensor, of tensors given by position."""

    def __init__(self, model: nn.Module, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model, self.call = model, call

    def forward(self, x: Tensor, t: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        """Return what the model makes of a batch; `t` and `y` are a diffusion model's."""
        return self.call(self.model, x) if t is None else self.call(self.model, x, t, y)


class Study(NamedTuple):
    """A model and what it takes: the first dimension of every input is the sample."""

    model: nn.Module
    inputs: tuple[Tensor, ...]


def diffusion(zoo: ModuleType, model: nn.Module, n: int) -> Study:
    """Return a denoiser on noisy digits at random time-steps."""
    x, y = zoo.mnist16("test")
    generator = torch.Generator().manual_seed(0)
    x, y = x[:n], y[:n]
    t = torch.randint(1000, (len(x),), generator=generator)
    noisy = zoo.ddim().add_noise(x, torch.randn(x.shape, generator=generator), t)
    call = lambda m, x, t, y: m(x, timestep=t, class_labels=y).sample  # noqa: E731
    return Study(Outputs(model, call).eval(), (noisy, t, y))


def stories(zoo: ModuleType, n: int) -> Study:
    """Return a language model on the beginnings of stories."""
    encode = zoo.StoriesTokenizer().encode
    tokens = [encode(text[:400])[:64] for text in zoo.tinystories()]
    rows = torch.tensor([t for t in tokens if len(t) == 64][:n])
    call = lambda m, x: m(input_ids=x, use_cache=False).logits  # noqa: E731
    return Study(Outputs(zoo.stories260k(), call).eval(), (rows,))


def pixels(zoo: ModuleType, n: int) -> Study:
    """Return an image generator on the tokens of digits."""
    model, levels = zoo.imagegpt_mnist()
    x = zoo.mnist("test")[0][:n].flatten(1)
    return Study(model, ((x[..., None] - levels).abs().argmin(-1),))


def studies(zoo: ModuleType, n: int) -> dict[str, Callable[[], Study]]:
    """Return how to load each model, with `n` samples or more."""
    return {
        "vit_cifar10": lambda: Study(zoo.vit_cifar10(), (zoo.cifar10("test")[0],)),
        "kwt1": lambda: Study(zoo.kwt1(), (zoo.speech_commands()[0],)),
        "stories260k": lambda: stories(zoo, n),
        "imagegpt_mnist": lambda: pixels(zoo, n),
        "dit_mnist": lambda: diffusion(zoo, zoo.dit_mnist(), n),
        "unet_mnist": lambda: diffusion(zoo, zoo.unet_mnist(), n),
        "vit_tiny_imagenet": lambda: Study(zoo.vit_tiny_imagenet(), (zoo.imagenet_batch(n)[0],)),
    }
