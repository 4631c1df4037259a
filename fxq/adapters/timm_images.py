"""timm models by name, and a folder of pictures as their calibration batches."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxq.errors import did_you_mean

IMAGES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp"})


def check_name(name: str) -> None:
    """Raise ValueError where timm knows no model of this name."""
    import timm

    base = name.partition(".")[0]
    if not timm.is_model(base):
        known = did_you_mean(base, timm.list_models())
        raise ValueError(f"--model: timm has no model {name!r} (timm.list_models()); {known}")


def load_model(
    name: str, checkpoint: Path | None, arguments: Mapping[str, Any], device: str = "cpu"
) -> nn.Module:
    """Return a timm model in eval mode.

    Args:
        name: a timm model name, e.g. `vit_tiny_patch16_224`.
        checkpoint: a safetensors file of its weights; None for timm's pretrained ones, which timm
            downloads.
        arguments: keyword arguments of the model, e.g. `{"img_size": 32}`.
        device: where to put it.
    Raises:
        ValueError: timm knows no such model, or the checkpoint is of another.
    """
    import timm

    check_name(name)
    model: nn.Module = timm.create_model(name, pretrained=checkpoint is None, **arguments)
    if checkpoint is not None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            model.load_state_dict(load_file(checkpoint))
        except (RuntimeError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"--checkpoint: expected weights of {name} with these --model-arg, found others in "
                f"{checkpoint}: {reason}"
            ) from error
    return model.eval().to(device)


@dataclass(frozen=True)
class ImageFolder:
    """The pictures under a folder, as a model wants them, in batches; can be iterated again.

    Args:
        paths: the files, in order.
        config: timm's data configuration: size, mean, std, interpolation.
        batch_size: pictures per batch.
    """

    paths: tuple[Path, ...]
    config: Mapping[str, Any]
    batch_size: int

    def __iter__(self) -> Iterator[Tensor]:
        from PIL import Image
        from timm.data import create_transform

        transform = create_transform(**self.config, is_training=False)
        for start in range(0, len(self.paths), self.batch_size):
            images = []
            for path in self.paths[start : start + self.batch_size]:
                try:
                    with Image.open(path) as image:
                        images.append(transform(image.convert("RGB")))
                except OSError as error:
                    raise ValueError(f"--data: cannot read {path} as a picture: {error}") from error
            yield torch.stack(images)  # [B, 3, H, W]


def find_pictures(folder: Path, limit: int) -> tuple[Path, ...]:
    """Return up to `limit` pictures under `folder` and its subfolders, sorted by path.

    Raises:
        ValueError: the folder is absent or has no picture.
    """
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGES)[:limit]
    if not paths:
        raise ValueError(
            f"--data: expected pictures ({', '.join(sorted(IMAGES))}) under {folder}, found none"
        )
    return tuple(paths)


def image_batches(
    model: nn.Module, arguments: Mapping[str, Any], paths: tuple[Path, ...], batch_size: int
) -> ImageFolder:
    """Return pictures preprocessed for `model`.

    Args:
        model: as `load_model` returned it.
        arguments: what it was built with; an `img_size` among them overrides the model's usual one.
        paths: the files.
        batch_size: pictures per batch.
    """
    from timm.data import resolve_data_config

    size = {k: v for k, v in arguments.items() if k == "img_size"}
    config = resolve_data_config(size, model=model, use_test_size=True)
    keys = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    return ImageFolder(paths, {k: config[k] for k in keys if k in config}, batch_size)
