"""Files that are written whole or not at all."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file; one of that name is replaced once the new one is complete.

    Raises:
        KeyError: a dtype that safetensors cannot hold.
        OSError: the disk does not take it.
    """
    with _in_full(path) as partial:
        try:
            save_file(dict(tensors), partial, dict(metadata))
        except SafetensorError as error:
            raise OSError(f"{path}: expected to write a file, found that {error}") from error


def write_text(path: Path, text: str) -> None:
    """Write a file of text; one of that name is replaced once the new one is complete."""
    with _in_full(path) as partial:
        partial.write_text(text)


def check_writable(path: Path) -> None:
    """Raise where no file of that name can be written: its folder is absent, or it is one."""
    if path.is_dir():
        raise ValueError(
            f"{path}: expected the name of a file, found a folder; give one in it, such as "
            f"{path / 'model.safetensors'}"
        )
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: expected a folder that exists; make {path.parent} first")


@contextmanager
def _in_full(path: Path) -> Iterator[Path]:
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
