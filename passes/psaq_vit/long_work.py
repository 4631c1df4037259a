"""What long work needs: to say how far it has come, and a file from which it can go on after an
interruption."""

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.fx import GraphModule

from fxq.pipeline import Progress

SAVE_EVERY_S = 60.0
SAY_EVERY_S = 5.0


class Clock:
    """Say how far work has come and how long it will take.

    Args:
        progress: called with a line of text every few seconds.
        total: units of work.
        done: of them, earlier.
    """

    def __init__(self, progress: Progress | None, total: int, done: int = 0) -> None:
        self.progress, self.began, self.last = progress, time.perf_counter(), time.perf_counter()
        self.left, self.done = total - done, 0

    def due(self, units: int) -> bool:
        """Count `units` as done, and tell whether to say something."""
        self.left, self.done = self.left - units, self.done + units
        return self.progress is not None and time.perf_counter() - self.last > SAY_EVERY_S

    def say(self, text: str) -> None:
        """Pass on `text` and the time left."""
        self.last = time.perf_counter()
        seconds = (self.last - self.began) / self.done * self.left
        if self.progress:
            self.progress(f"{text}; about {seconds:.0f} s left")


class Checkpoint:
    """A safetensors file that is written now and then; without a path, nothing.

    Args:
        path: where.
        kind: of the work.
        fingerprint: of everything that decides the result.
    Raises:
        ValueError: the folder does not exist.
    """

    def __init__(self, path: str | Path | None, kind: str, fingerprint: str) -> None:
        self.path = None if path is None else Path(path)
        if self.path is not None and not self.path.parent.is_dir():
            raise ValueError(
                f"checkpoint: expected a file in a folder that exists, found {self.path}; make the "
                "folder first"
            )
        self.kind, self.fingerprint = kind, fingerprint
        self.last = time.perf_counter()

    def load(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """Return what `save` was given last, None where there is no file.

        Raises:
            ValueError: the file belongs to other work.
        """
        if self.path is None or not self.path.exists():
            return None
        try:
            opened = safe_open(self.path, "pt")
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"checkpoint: expected a file that this work wrote, found {self.path}: {error}; "
                "choose another"
            ) from error
        with opened as file:
            text = (file.metadata() or {}).get(self.kind)
            about = json.loads(text) if text else {}
            if about.get("fingerprint") != self.fingerprint:
                raise ValueError(
                    "checkpoint: expected one of this model, these settings and this seed, found "
                    f"another in {self.path}; remove it or choose another file"
                )
            return about, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    @property
    def due(self) -> bool:
        """Whether the last time is long enough ago."""
        return self.path is not None and time.perf_counter() - self.last > SAVE_EVERY_S

    def save(self, about: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Write the file, whole or not at all."""
        if self.path is None:
            return
        self.last = time.perf_counter()
        tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        text = json.dumps({"fingerprint": self.fingerprint, **about})
        partial = self.path.with_name(self.path.name + ".partial")
        save_file(tensors, partial, {self.kind: text})
        partial.replace(self.path)

    def remove(self) -> None:
        """Delete the file: the work is done."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def fingerprint(gm: GraphModule, settings: str, *tensors: Tensor) -> str:
    """Return a hash of what decides the result: weights, graph, settings, and other tensors."""
    digest = hashlib.sha256(settings.encode() + gm.code.encode())
    for tensor in (*gm.parameters(), *gm.buffers(), *tensors):
        digest.update(
            tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()[:16]


def moments(adam: torch.optim.Adam, tensors: Sequence[Tensor], name: str) -> dict[str, Tensor]:
    """Return an optimizer's state under names that start with `name`."""
    return {
        f"{name}.{index}.{key}": value
        for index, tensor in enumerate(tensors)
        for key, value in adam.state[tensor].items()
    }


def restore(
    adam: torch.optim.Adam, tensors: Sequence[Tensor], kept: dict[str, Tensor], name: str
) -> None:
    """Put back what `moments` returned."""
    for index, tensor in enumerate(tensors):
        adam.state[tensor] = {
            key: kept[f"{name}.{index}.{key}"].to(tensor.device if key != "step" else "cpu")
            for key in ("step", "exp_avg", "exp_avg_sq")
        }
