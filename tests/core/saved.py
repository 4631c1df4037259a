"""Programs to save, and how to change what a saved file says."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from fxq.passes import w8a8, weight_only
from fxq.pipeline import compress
from fxq.program import Program

RECIPES = {"static": w8a8.STATIC, "dynamic": w8a8.DYNAMIC, "w8": weight_only.W8}


def batch(n: int) -> Tensor:
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(n))


def rewrite(
    path: Path,
    edit: Callable[[dict[str, Any]], Any] = lambda content: None,
    edit_tensors: Callable[[dict[str, Tensor]], Any] = lambda tensors: None,
) -> None:
    """Change what a saved file says, in place."""
    with safetensors.safe_open(path, "pt") as file:
        content = json.loads(file.metadata()["fxq"])
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    edit(content)
    edit_tensors(tensors)
    if "sha256" in content:  # who means harm makes the checksum fit
        del content["sha256"]
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        raw = [name.encode() + tensors[name].numpy().tobytes() for name in sorted(tensors)]
        content["sha256"] = hashlib.sha256(text.encode() + b"".join(raw)).hexdigest()
    safetensors.torch.save_file(tensors, path, {"fxq": json.dumps(content)})


def node_of(content: dict[str, Any], target: str) -> dict[str, Any]:
    return next(n for n in content["graph"]["nodes"] if n.get("target") == target)


class TwoOutputs(nn.Module):
    """A linear whose result goes through `wrap`, and a buffer in channels_last."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.conv = nn.Conv2d(3, 8, 2).to(memory_format=torch.channels_last)
        self.wrap = wrap
        self.config: Any = None
        self.levels: Any = (1, 2.5, "a")

    def forward(self, x: dict[str, Tensor], scale: float = 2.0) -> Any:
        return self.wrap(self.fc(self.conv(x["image"]).mean((2, 3))) * scale)


def two_outputs(wrap: Callable[[Tensor], Any], config: Any = None) -> tuple[Program, Any]:
    torch.manual_seed(0)
    model = TwoOutputs(wrap).eval()
    model.config = config
    call = {"x": {"image": torch.randn(2, 3, 5, 5)}}
    return compress(model, call, weight_only.W8), call
