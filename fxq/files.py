"""Files that are written whole or not at all."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file; one of that name is replaced once the new one is complete.

    Raises:
        KeyError: a dtype that safetensors cannot hold.
    """
    with _in_full(path) as partial:
        save_file(dict(tensors), partial, dict(metadata))


def write_text(path: Path, text: str) -> None:
    """Write a file of text; one of that name is replaced once the new one is complete."""
    with _in_full(path) as partial:
        partial.write_text(text)


@contextmanager
def _in_full(path: Path) -> Iterator[Path]:
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
