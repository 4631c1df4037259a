"""Compress a vision transformer without any data: it dreams its own calibration images.

    python examples/data_free_vit.py [figure.png]

Takes about two minutes on two cores. The small ViT is trained on scikit-learn's digits first;
from then on no image is used until its accuracy is measured. Writes a figure of the dreamed images
and of the patch-similarity entropy in every attention.
"""

import sys
import time

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from digits_vit import digits, train_vit
from rich.console import Console

import fxq
from fxq.passes import psaq_vit, w8a8
from fxq.passes.psaq_vit.images import contact_sheet
from fxq.scorecard import measure


def draw(images: psaq_vit.SyntheticImages, path: str) -> None:
    """Write the images and how their entropy rose."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), constrained_layout=True)
    left.imshow(contact_sheet(images.pixels, 8).permute(1, 2, 0).numpy())
    left.set_title(f"{len(images.pixels)} dreamed images")
    left.axis("off")
    for name, entropy in zip(images.trace.taps, images.trace.entropy.T, strict=True):
        right.plot(entropy.numpy(), label=name)
    right.set(xlabel="step", ylabel="nat", title="patch-similarity entropy")
    right.legend()
    figure.savefig(path, dpi=120)


def main(path: str) -> None:
    """Run the example."""
    console = Console()
    began = time.perf_counter()

    def say(text: str) -> None:
        console.print(f"[dim]{time.perf_counter() - began:6.1f} s[/dim]  {text}", highlight=False)

    images, labels, test_images, test_labels = digits()
    say("training a small ViT on handwritten digits")
    model = train_vit(images, labels)
    # The normalization is all that is told: pixels from 0 to 1 became (pixel - mean) / std.
    std = 1 / float(images.max() - images.min())
    mean = -float(images.min()) * std

    say("dreaming 32 images")
    dreams = psaq_vit.synthesize(
        model, torch.zeros(1, 1, 8, 8), mean=[mean], std=[std],
        settings=psaq_vit.Synthesis(n_steps=250), progress=say,
    )  # fmt: skip
    draw(dreams, path)
    say(f"drawn to {path}")
    program = fxq.compress(model, torch.zeros(1, 1, 8, 8), w8a8.STATIC, data=dreams, progress=say)
    card = measure(model, program, [test_images], [test_labels], say=say)
    console.print(fxq.report(program, test_images).table())
    console.print(card.table())


if __name__ == "__main__":
    with torch.random.fork_rng():
        main(sys.argv[1] if len(sys.argv) > 1 else "dreams.png")
