"""The frontier: what is known between two blocks, for every batch, in float and in quantized form.

Blocks run one after the other over all batches, the float model's on what its own blocks gave, the
quantized one's likewise. Only values that a later block reads are kept, so memory is that of one
block's inputs and outputs (and of what skips over it), and each block runs once in each form.
"""

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from fxq.files import write_tensors
from fxq.graph import is_state, tensor_of
from fxq.passes.common.reconstruction.blocks import Block
from fxq.samples import batch_size

Chain = Literal["exact", "found"]  # of the float model, of the quantized one
Place = Literal["device", "cpu", "disk"]


class Frontier:
    """Values that later blocks read.

    Args:
        gm: the whole graph.
        batches: its inputs; read once.
        blocks: in order.
        place: where values are kept: on their device, in the memory of the CPU, or on disk.
    """

    def __init__(
        self,
        gm: GraphModule,
        batches: Iterable[Sequence[Any]],
        blocks: Sequence[Block],
        place: Place,
    ) -> None:
        self.shelf = _Shelf(place)
        self.last_reader = {name: k for k, block in enumerate(blocks) for name in block.inputs}
        names = [node.name for node in gm.graph.find_nodes(op="placeholder")]
        state = [node for node in gm.graph.nodes if is_state(node)]
        self.exact: list[dict[str, Any]] = []
        self.rows: list[int] = []  # samples of each batch
        for batch in batches:  # a counter of steps has its value for the batch now
            values = dict(zip(names, batch, strict=True))
            self.rows.append(max(1, batch_size(batch)))
            if place == "device":  # elsewhere they are copied anyway; the caller may reuse these
                values = pytree.tree_map_only(Tensor, Tensor.clone, values)
            values |= {node.name: tensor_of(gm, node).clone() for node in state}
            self.exact.append({n: self.shelf.put(v) for n, v in values.items()})
        self.found = [dict(values) for values in self.exact]

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self.exact)

    def read(self, chain: Chain, batch: int, names: Sequence[str]) -> list[Any]:
        """Return values of a batch."""
        kept = getattr(self, chain)[batch]
        return [self.shelf.get(kept[name]) for name in names]

    def is_shared(self, batch: int, name: str) -> bool:
        """Tell whether both chains have one value."""
        return self.exact[batch][name] is self.found[batch][name]

    @torch.no_grad()
    def run(self, chain: Chain, block: Block, gm: GraphModule) -> None:
        """Run a block over all batches and keep what it gives."""
        for batch in range(len(self)):
            results = gm(*self.read(chain, batch, block.inputs))
            kept = zip(block.outputs, map(self.shelf.put, results), strict=True)
            getattr(self, chain)[batch].update(kept)

    def forget(self, done: int) -> None:
        """Drop what no block after number `done` reads."""
        for values in (*self.exact, *self.found):
            for name in [n for n in values if self.last_reader.get(n, -1) <= done]:
                del values[name]


class _Stored:
    """A tensor in a file, which goes with it."""

    def __init__(self, path: Path, device: torch.device) -> None:
        self.path, self.device = path, device

    def __del__(self) -> None:
        self.path.unlink(missing_ok=True)


@dataclass(frozen=True, eq=False)
class _Moved:
    """A tensor in the memory of the CPU."""

    value: Tensor
    device: torch.device


class _Shelf:
    """Where values are kept."""

    def __init__(self, place: Place) -> None:
        self.place, self.count = place, 0
        self.folder = tempfile.TemporaryDirectory(prefix="fxq_") if place == "disk" else None

    def put(self, value: Any) -> Any:
        """Return what stands for a value; what is no tensor, nor has any, stands for itself."""
        return pytree.tree_map_only(Tensor, self._put, value)

    def _put(self, value: Tensor) -> Any:
        if self.place == "device":
            return value
        if self.folder is None:
            return _Moved(value.to("cpu"), value.device)
        self.count += 1
        path = Path(self.folder.name) / f"{self.count}.safetensors"
        write_tensors(path, {"value": value.contiguous().cpu()}, {})
        return _Stored(path, value.device)

    def get(self, kept: Any) -> Any:
        """Return the value that something stands for."""
        return pytree.tree_map_only((_Stored, _Moved), self._get, kept)

    def _get(self, kept: _Stored | _Moved) -> Tensor:
        if isinstance(kept, _Moved):
            return kept.value.to(kept.device)
        value: Tensor = load_file(kept.path, device=str(kept.device))["value"]
        return value
