"""The state of long work in a file, so that it can go on after an interruption."""

import json
import time
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

SAVE_EVERY_S = 60.0


class Checkpoint:
    """A safetensors file that is written now and then; without a path, nothing.

    Args:
        path: where; the folder must exist.
        kind: of the work.
        fingerprint: of everything that decides the result.
    """

    def __init__(self, path: str | Path | None, kind: str, fingerprint: str) -> None:
        self.path = None if path is None else Path(path)
        self.kind, self.fingerprint = kind, fingerprint
        self.last = time.perf_counter()

    def load(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """Return what `save` was given last, None where there is no file.

        Raises:
            ValueError: the file belongs to other work.
        """
        if self.path is None or not self.path.exists():
            return None
        with safe_open(self.path, "pt") as file:
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
