"""Train a small timm ViT on real handwriting, compress it to 8 bits, compile it, and print what
that cost and brought.

    python examples/digits_vit.py          (or `make demo`)

Takes two to four minutes on two cores, most of it training. Expect at least 97 % accuracy before
and after. The 1,797 digits of 8 x 8 pixels ship inside scikit-learn; nothing is downloaded.
"""

import time

import torch
import torch.nn.functional as F
from rich.console import Console
from sklearn.datasets import load_digits
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import fxq
from fxq.passes import w8a8
from fxq.scorecard import measure

EPOCHS, BATCH, PEAK_LR = 40, 32, 3e-3


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return training images `[1437, 1, 8, 8]` (zero mean, unit variance), labels, and the same for
    testing."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(data.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:1437], order[1437:]
    images = (images - images[train].mean()) / images[train].std()
    return images[train], labels[train], images[test], labels[test]


def shifted(images: Tensor) -> Tensor:
    """Return all nine shifts of the images by up to one pixel `[9, N, 1, H, W]`; entry 4 is
    unshifted."""
    padded = F.pad(images, (1, 1, 1, 1), value=float(images.min()))
    h, w = images.shape[-2:]
    return torch.stack([padded[:, :, i : i + h, j : j + w] for i in range(3) for j in range(3)])


def train_vit(
    images: Tensor,
    labels: Tensor,
    width: int = 64,
    depth: int = 3,
    epochs: int = EPOCHS,
    patch: int = 2,
    class_token: bool = False,
) -> VisionTransformer:
    """Return a ViT trained on square patches, in eval mode."""
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=images.shape[-1], patch_size=patch, in_chans=1, num_classes=10, embed_dim=width,
        depth=depth, num_heads=width // 32, class_token=class_token,
        global_pool="token" if class_token else "avg",
    )  # fmt: skip
    views = shifted(images)
    steps = len(images) // BATCH * epochs
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_LR, total_steps=steps, pct_start=0.2
    )
    for _ in range(epochs):
        order = torch.randperm(len(images))
        for start in range(0, len(images) - BATCH + 1, BATCH):
            batch = order[start : start + BATCH]
            view = torch.where(torch.rand(BATCH) < 0.5, torch.randint(0, 9, (BATCH,)), 4)
            loss = F.cross_entropy(model(views[view, batch]), labels[batch], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return model.eval()


def main() -> None:
    """Run the demo."""
    console = Console()
    began = time.perf_counter()

    def say(text: str) -> None:
        console.print(f"[dim]{time.perf_counter() - began:6.1f} s[/dim]  {text}", highlight=False)

    images, labels, test_images, test_labels = digits()
    say(f"training a small ViT on {len(images)} handwritten digits")
    model = train_vit(images, labels)

    say("compressing it to W8A8, calibrated on 256 of the training images")
    program = fxq.compress(
        model, test_images[:1], w8a8.STATIC, data=list(images[:256].split(64)), progress=say
    )
    card = measure(model, program, [test_images], [test_labels], say=say)
    say("done")
    console.print(fxq.report(program, test_images).table())
    console.print(card.table())


if __name__ == "__main__":
    main()
