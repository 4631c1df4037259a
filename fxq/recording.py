"""Real calls of a module inside a pipeline, as `data=` for any recipe.

    calls = fxq.record(pipe.transformer, lambda: pipe(prompt, num_inference_steps=20))
    program = fxq.compress(pipe.transformer, calls[0], recipe, data=calls)

Which calls are kept does not depend on what is in them. Each has a rank, made of the seed and its
number; kept are the lowest ranks for which there is room. That is a uniform sample of all calls,
however many come, and the same one whether they come in one run or in several.
"""

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, overload

import safetensors
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxq.batches import device_of
from fxq.errors import UnsupportedError
from fxq.files import write_tensors, write_text
from fxq.graph_json import decode, encode
from fxq.packing import check_seal, decode_tensors, encode_tensors, seal
from fxq.saving import VERSION, decode_spec, encode_spec

Call = tuple[Any, ...] | dict[str, Any]  # arguments by position, or all of them by name
Spread = Literal["random", "even"]


def record(
    module: nn.Module,
    run: Callable[[], object],
    *,
    max_calls: int = 64,
    max_bytes: int = 2**30,
    spread: Spread = "random",
    path: str | Path | None = None,
    seed: int = 0,
) -> "Recorded":
    """Call `run` and return the arguments with which it called `module`.

    Tensors are copied, on their device, so that nothing changes them later. The module is left as
    it was.

    Args:
        module: part of a pipeline, which calls it as `module(...)`.
        run: runs the pipeline.
        max_calls: how many to keep at most; of more, a sample.
        max_bytes: of their tensors together, likewise.
        spread: "random" for a uniform sample; "even" for every second call, every fourth, and so
            on, which may leave half of the room empty.
        path: a folder for the calls, which stay in memory otherwise; they are read to the module's
            device. One that has calls goes on: numbers continue, and the sample is one of all.
        seed: of the sample; the same one keeps the same calls.
    Raises:
        ValueError: no call was made, one alone exceeds `max_bytes`, or the folder belongs to
            another module or other settings.
        UnsupportedError: an argument that is no tensor, number, string, None, torch dtype or
            container of these that torch's pytree knows: a cache, a function.
    """
    if not callable(run):
        raise TypeError(
            f"run: expected a function that runs the pipeline, found {type(run).__name__}; give "
            "lambda: pipeline(...)"
        )
    sample = Sample(type(module).__qualname__, max_calls, max_bytes, spread, seed)
    calls: dict[int, Call] | Folder = {}
    if path is not None:
        calls = Folder(Path(path), device_of(module) or torch.device("cpu"))
        sample = calls.go_on_with(sample)
    before = sample.n_calls

    def keep_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = _as_data(module, args, kwargs)
        tensors = [x for x in pytree.tree_leaves(call) if isinstance(x, Tensor)]
        step, left_out = sample.offer(sum(x.numel() * x.element_size() for x in tensors))
        if step in sample.sizes:
            # Outside of inference mode: its tensors could not be used outside of it.
            with torch.inference_mode(False), torch.no_grad():
                calls[step] = pytree.tree_map_only(Tensor, lambda x: x.detach().clone(), call)
        if isinstance(calls, Folder):
            calls.note(sample)
        for other in left_out - {step}:
            del calls[other]

    # In front of other hooks: what they change in a call they change again when it is replayed.
    handle = module.register_forward_pre_hook(keep_call, with_kwargs=True, prepend=True)
    try:
        run()
    finally:
        handle.remove()
    if sample.n_calls == before:
        raise ValueError(
            f"run: expected calls of this {sample.module}, found none; give the very module that "
            "the pipeline calls, as module(...) and not module.forward(...), before torch.compile"
        )
    return Recorded(calls, sample.n_calls)


class Recorded(Sequence[Call]):
    """Calls that were kept, in the order in which they were made.

    Args:
        calls: by their number.
        n_calls: how many were made.
    """

    def __init__(self, calls: "Mapping[int, Call] | Folder", n_calls: int) -> None:
        self.calls, self.n_calls = calls, n_calls
        self.steps = tuple(sorted(calls))  # the number of each call, from 0

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> "Recorded":
        """Return the calls in a folder; each is read when it is wanted, to `device`.

        Raises:
            ValueError: it has none.
        """
        folder = Folder(Path(path), torch.empty(0, device=device).device)
        sample = folder.sample()
        if sample is None:
            raise ValueError(f"path: expected a folder that fxq.record wrote, found {path}")
        return cls(folder, sample.n_calls)

    def __len__(self) -> int:
        return len(self.steps)

    @overload
    def __getitem__(self, index: int) -> Call: ...
    @overload
    def __getitem__(self, index: slice) -> list[Call]: ...
    def __getitem__(self, index: int | slice) -> Call | list[Call]:
        if isinstance(index, slice):
            return [self.calls[step] for step in self.steps[index]]
        return self.calls[self.steps[index]]

    def __repr__(self) -> str:
        return f"<{len(self)} of {self.n_calls} calls>"


@dataclass
class Sample:
    """Which calls are kept.

    Args:
        module: the name of its class.
        max_calls: as for `record`, and so on.
        n_calls: how many were offered.
        limit: the lowest rank for which there was no room.
        sizes: of the calls kept, by their number, bytes.
    """

    module: str
    max_calls: int
    max_bytes: int
    spread: Spread
    seed: int
    n_calls: int = 0
    limit: int | None = None
    sizes: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.max_calls < 1 or self.spread not in ("random", "even"):
            raise ValueError(
                'record: expected max_calls of 1 or more, and spread="random" or "even", found '
                f"{self.max_calls} and {self.spread!r}"
            )

    def rank(self, step: int) -> int:
        """Return how late it is a call's turn to be kept. Of an even spread, numbers that the same
        power of two divides have one rank: these calls stay or go together."""
        if self.spread == "even":
            return -(step & -step) if step else -(2**63)
        digest = hashlib.sha256(f"{self.seed} {step}".encode()).digest()
        return int.from_bytes(digest[:8], "big")

    def offer(self, size: int) -> tuple[int, set[int]]:
        """Return the number of the next call, of `size` bytes, and which calls, it perhaps among
        them, are not kept from here on."""
        if size > self.max_bytes:
            raise ValueError(
                f"max_bytes: expected room for one call of {self.module}, which has {size} bytes, "
                f"found {self.max_bytes}"
            )
        step, before = self.n_calls, {*self.sizes, self.n_calls}
        self.n_calls += 1
        if self.limit is None or self.rank(step) < self.limit:
            self.sizes[step] = size
        while len(self.sizes) > self.max_calls or sum(self.sizes.values()) > self.max_bytes:
            self.limit = limit = max(map(self.rank, self.sizes))
            self.sizes = {s: size for s, size in self.sizes.items() if self.rank(s) < limit}
        return step, before - self.sizes.keys()


def _as_data(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Return a call in the form of `data=`; raise `UnsupportedError` where it cannot be kept."""
    positional = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = inspect.signature(module.forward).parameters.values()
    names = [parameter.name for parameter in parameters if parameter.kind in positional]
    named = dict(zip(names, args, strict=False)) | kwargs
    if kwargs and len(args) > len(names):
        raise UnsupportedError(
            f"record: expected arguments with names, found {len(args)} by position and "
            f"{sorted(kwargs)} by keyword at {type(module).__name__}; pass all by keyword"
        )
    for where, leaf in pytree.tree_leaves_with_path(args if len(args) > len(names) else named):
        try:
            if not isinstance(leaf, Tensor):
                encode(leaf)
        except UnsupportedError as error:
            raise UnsupportedError(
                f"record: {type(module).__name__} was called with {pytree.keystr(where)}, which "
                f"cannot be kept: {error}; run the pipeline without it, as with use_cache=False"
            ) from error
    return named if kwargs else args


class Folder:
    """Calls as safetensors files, and a list of them.

    Args:
        path: of the folder.
        device: where tensors go that are read.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        self.path, self.device, self.index = path, device, path / "calls.json"

    def sample(self) -> Sample | None:
        """Return what is known of the calls in the folder, None where there are none."""
        if not self.index.exists():
            return None
        known = json.loads(self.index.read_text())
        return Sample(**known | {"sizes": {int(k): size for k, size in known["sizes"].items()}})

    def go_on_with(self, new: Sample) -> Sample:
        """Return the folder's sample, or a new one where there is none; refuse another."""
        known = self.sample() or new
        if replace(known, n_calls=0, limit=None, sizes={}) != new:
            raise ValueError(
                f"path: expected a folder of {new}, found {known} in {self.path}; choose another, "
                "or the same settings"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        return known

    def note(self, sample: Sample) -> None:
        """Write down which calls are kept."""
        write_text(self.index, json.dumps(asdict(sample)))

    def __iter__(self) -> Iterator[int]:
        sample = self.sample()
        return iter(sample.sizes if sample else ())

    def __setitem__(self, step: int, call: Call) -> None:
        leaves, spec = pytree.tree_flatten(call)
        holder = nn.Module()
        for index, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                holder.register_buffer(f"leaf_{index}", leaf)
        stored, table = encode_tensors(holder)
        plain = [None if isinstance(leaf, Tensor) else encode(leaf) for leaf in leaves]
        content = {"version": VERSION, "leaves": plain, "tensors": table, "spec": encode_spec(spec)}
        write_tensors(self._file(step), stored, {"fxq_call": seal(content, stored)})

    def __getitem__(self, step: int) -> Call:
        path = self._file(step)
        with safetensors.safe_open(path, "pt") as file:
            content = json.loads(file.metadata()["fxq_call"])
            stored = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        check_seal(path, content, stored)
        tensors = decode_tensors(content["tensors"], stored, self.device)
        leaves = [
            tensors.get(f"leaf_{index}", decode(leaf, {}, self.device))
            for index, leaf in enumerate(content["leaves"])
        ]
        call: Call = pytree.tree_unflatten(leaves, decode_spec(content["spec"]))
        return call

    def __delitem__(self, step: int) -> None:
        self._file(step).unlink(missing_ok=True)

    def _file(self, step: int) -> Path:
        return self.path / f"{step:06}.safetensors"
