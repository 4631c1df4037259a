"""Synthetic images: what synthesis returns, keeps on disk and shows."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from fxq.files import write_tensors

TILE = 64  # pixels an image of a contact sheet is at least wide


@dataclass(frozen=True)
class Trace:
    """How synthesis went, mean over images.

    Args:
        taps: qualified names of the attentions.
        entropy: patch-similarity entropy per step and tap `[T, L]`, nat.
        total_variation: root mean square neighbour difference `[T]`, fraction of the pixel range.
        class_loss: cross-entropy with the images' classes `[T]`, nat; 0 without classes.
        learning_rate: of the pixels `[T]`.
    """

    taps: tuple[str, ...]
    entropy: Tensor
    total_variation: Tensor
    class_loss: Tensor
    learning_rate: Tensor


@dataclass(frozen=True, eq=False)
class SyntheticImages:
    """Images a model dreamed up. Iterating gives batches as the model takes them, so this can stand
    wherever calibration data is asked for.

    Args:
        pixels: `[n, C, H, W]`, fp32 in [0, 1].
        mean: per channel, of the model's normalization.
        std: likewise.
        labels: class of each image `[n]`, int64; None without classes.
        trace: how they came about.
        batch_size: images per batch.
        dtype: of the batches.
        fingerprint: a hash of model, settings and seed.
    """

    pixels: Tensor = field(repr=False)
    mean: tuple[float, ...]
    std: tuple[float, ...]
    labels: Tensor | None = field(repr=False)
    trace: Trace = field(repr=False)
    batch_size: int = 32
    dtype: torch.dtype = torch.float32
    fingerprint: str = ""

    @property
    def images(self) -> Tensor:
        """The images normalized as the model takes them `[n, C, H, W]`."""
        return normalize(self.pixels, self.mean, self.std).to(self.dtype)

    def __len__(self) -> int:
        return -(-len(self.pixels) // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.images.split(self.batch_size))

    def save_contact_sheet(self, path: str | Path, columns: int = 8) -> None:
        """Write the images side by side as a picture; the suffix decides the format.

        Args:
            path: where.
            columns: images per row.
        Raises:
            ValueError: images with neither one nor three channels.
            ImportError: Pillow is missing.
        """
        from PIL import Image

        array = contact_sheet(self.pixels, columns).mul(255).round().byte().cpu()
        Image.fromarray(array.permute(1, 2, 0).numpy()).save(path)

    def save(self, path: str | Path) -> None:
        """Write everything to a safetensors file."""
        tensors = {
            "pixels": self.pixels,
            "entropy": self.trace.entropy,
            "total_variation": self.trace.total_variation,
            "class_loss": self.trace.class_loss,
            "learning_rate": self.trace.learning_rate,
        }
        if self.labels is not None:
            tensors["labels"] = self.labels
        about = {
            "mean": self.mean,
            "std": self.std,
            "taps": self.trace.taps,
            "batch_size": self.batch_size,
            "dtype": str(self.dtype).removeprefix("torch."),
            "fingerprint": self.fingerprint,
        }
        tensors = {name: value.contiguous().cpu() for name, value in tensors.items()}
        write_tensors(Path(path), tensors, {"fxq_synthetic_images": json.dumps(about)})

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> "SyntheticImages":
        """Read what `save` wrote.

        Raises:
            ValueError: another kind of file.
        """
        with safe_open(path, "pt", device=str(device)) as file:
            text = (file.metadata() or {}).get("fxq_synthetic_images")
            if text is None:
                raise ValueError(f"expected a file of synthetic images, found another in {path}")
            t = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = json.loads(text)
        trace = Trace(
            tuple(about["taps"]),
            t["entropy"],
            t["total_variation"],
            t["class_loss"],
            t["learning_rate"],
        )
        return cls(
            t["pixels"],
            tuple(about["mean"]),
            tuple(about["std"]),
            t.get("labels"),
            trace,
            about["batch_size"],
            getattr(torch, about["dtype"]),
            about["fingerprint"],
        )


def normalize(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Return pixels `[B, C, H, W]` as the model takes them: minus mean, divided by std."""
    shape = (1, -1, 1, 1)
    return (pixels - pixels.new_tensor(mean).view(shape)) / pixels.new_tensor(std).view(shape)


def contact_sheet(pixels: Tensor, columns: int) -> Tensor:
    """Return images `[n, C, H, W]` side by side `[3, rows * h, columns * w]`, small ones enlarged.

    Raises:
        ValueError: neither one nor three channels.
    """
    n, channels, _, width = pixels.shape
    if channels not in (1, 3):
        raise ValueError(f"expected images of one or three channels to draw, found {channels}")
    columns = min(columns, n)
    scale = -(-TILE // width)
    tiles = pixels.repeat_interleave(scale, 2).repeat_interleave(scale, 3).expand(-1, 3, -1, -1)
    border = max(1, width * scale // 32)
    tiles = torch.nn.functional.pad(tiles, (0, border, 0, border), value=1.0)
    missing = -n % columns
    tiles = torch.cat([tiles, tiles.new_ones(missing, *tiles.shape[1:])])
    rows = tiles.split(columns)
    return torch.cat([torch.cat(list(row), 2) for row in rows], 1)
