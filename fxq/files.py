"""Files of tensors, written whole or not at all."""

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file; one of that name is replaced once the new one is complete.

    Raises:
        KeyError: a dtype that safetensors cannot hold.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save_file(dict(tensors), partial, dict(metadata))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
