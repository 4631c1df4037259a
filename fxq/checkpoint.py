"""Files from which interrupted work goes on, to the same bytes as if it had never stopped.

A checkpoint belongs to one piece of work: a fingerprint of everything that decides the result keeps
any other from going on from it.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.fx import GraphModule

from fxq.files import write_tensors

Batch = TypeVar("Batch", bound=Sequence[Any])
Tensors = dict[str, Tensor]

SAVE_EVERY_S = 60.0


class Checkpoint:
    """A safetensors file that is written now and then; without a path, nothing.

    Args:
        path: where.
        kind: of the work.
    Raises:
        ValueError: the folder does not exist.
    """

    def __init__(self, path: str | Path | None, kind: str) -> None:
        self.path = None if path is None else Path(path)
        if self.path is not None and not self.path.parent.is_dir():
            raise ValueError(
                f"checkpoint: expected a file in a folder that exists, found {self.path}; make the "
                "folder first"
            )
        self.kind, self.fingerprint = kind, ""
        self.last = time.perf_counter()

    def load(self, fingerprint: str) -> tuple[dict[str, Any], Tensors] | None:
        """Return what `save` was given last, None where there is no file.

        Args:
            fingerprint: of the work that is to go on.
        Raises:
            ValueError: the file belongs to other work.
        """
        self.fingerprint = fingerprint
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
            if about.get("fingerprint") != fingerprint:
                raise self.of_other_work("this model, these settings and this seed")
            # Copies: what safetensors returns are views of the mapped file.
            return about, {n: file.get_tensor(n).clone() for n in file.keys()}  # noqa: SIM118

    def of_other_work(self, work: str) -> ValueError:
        """Return the error that says that the file is not one of `work`."""
        return ValueError(
            f"checkpoint: expected one of {work}, found another in {self.path}; remove it or "
            "choose another file"
        )

    @property
    def due(self) -> bool:
        """Whether the last time is long enough ago."""
        return self.path is not None and time.perf_counter() - self.last > SAVE_EVERY_S

    def save(self, about: dict[str, Any], tensors: Tensors) -> None:
        """Write the file, whole or not at all."""
        if self.path is None:
            return
        self.last = time.perf_counter()
        tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        text = json.dumps({"fingerprint": self.fingerprint, **about})
        write_tensors(self.path, tensors, {self.kind: text})

    def remove(self) -> None:
        """Delete the file: the work is done."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def run_over(
    batches: Iterable[Batch],
    run: Callable[[Batch], object],
    checkpoint: Checkpoint | None,
    fingerprint: Callable[[], str],
    state: Callable[[], Tensors],
    restore: Callable[[Tensors], None],
) -> None:
    """Call `run` on every batch, after those that an earlier call with `checkpoint` has done.

    These are read again and compared, but not run. The file is written every minute, when an
    exception ends the work (the state is then that before the batch it struck), and at the end.

    Args:
        batches: read once.
        run: does the work of one batch.
        checkpoint: keeps its state.
        fingerprint: returns that of the work; called only if there is a file to keep.
        state: returns what `run` changes.
        restore: puts back what `state` returned.
    Raises:
        ValueError: the file belongs to other work, or the batches are not those it has seen.
    """
    if checkpoint is None or checkpoint.path is None:
        for batch in batches:
            run(batch)
        return
    earlier, digest = checkpoint.load(fingerprint()), hashlib.sha256()
    done, expected, count, last = 0, "", 0, None
    if earlier is not None:
        done, expected = earlier[0]["batches"], earlier[0]["sha256"]
        restore(earlier[1])
    try:
        for count, batch in enumerate(batches, 1):
            add_tensors(digest, (x for x in batch if isinstance(x, Tensor)))
            if count > done:
                run(batch)
                about = {"batches": count, "sha256": digest.hexdigest()}
                # One assignment: an interrupt finds both of the same batch.
                last = about, {name: value.clone() for name, value in state().items()}
                if checkpoint.due:
                    checkpoint.save(*last)
            elif count == done and digest.hexdigest() != expected:
                raise checkpoint.of_other_work("the same batches in the same order")
        if count < done:
            raise checkpoint.of_other_work(f"{count} batches")
    finally:
        if last is not None:
            checkpoint.save(*last)


def add_tensors(digest: "hashlib._Hash", tensors: Iterable[Tensor]) -> None:
    """Add the tensors' shapes, dtypes and bytes to a digest."""
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        values = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(values.numpy().data)


def fingerprint(gm: GraphModule, settings: str, *tensors: Tensor) -> str:
    """Return a hash of what decides the result: weights, graph, settings, and other tensors."""
    digest = hashlib.sha256(settings.encode() + gm.code.encode())
    add_tensors(digest, (*gm.parameters(), *gm.buffers(), *tensors))
    return digest.hexdigest()[:16]


def adam_state(adam: torch.optim.Adam, tensors: Sequence[Tensor], name: str) -> Tensors:
    """Return an optimizer's state under names that start with `name`."""
    return {
        f"{name}.{index}.{key}": value
        for index, tensor in enumerate(tensors)
        for key, value in adam.state[tensor].items()
    }


def restore_adam(
    adam: torch.optim.Adam, tensors: Sequence[Tensor], kept: Tensors, name: str
) -> None:
    """Put back what `adam_state` returned."""
    for index, tensor in enumerate(tensors):
        adam.state[tensor] = {
            key: kept[f"{name}.{index}.{key}"].to(tensor.device if key != "step" else "cpu")
            for key in ("step", "exp_avg", "exp_avg_sq")
        }
