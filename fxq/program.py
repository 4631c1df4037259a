"""Program: a compressed graph that takes the place of the model it came from."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from types import FunctionType, SimpleNamespace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from fxq.capturing import Captured
from fxq.graph import mark_for_dynamo, show_to_dynamo
from fxq.rewriting import copy_graph, register_tensor
from fxq.signature import Signature
from fxq.timesteps_seen import timesteps_to_see
from fxq.writes import check_apart

PLAIN = (bool, int, float, str, type(None), torch.dtype)


def _blank(kind: type[nn.Module]) -> nn.Module:
    return kind.__new__(kind)


class Program(nn.Module):
    """A graph in the QUANTIZED dialect with the original's call signature.

    Runs anywhere on reference implementations; `torch.compile(program, backend="fxq")` runs it on
    integer kernels. It has a copy of every tensor it needs. Plain attributes of the original
    (`config`, `num_classes`, ...) are kept.

    Attributes:
        graph_module: the graph. `program.graph_module.print_readable()` shows it.
        signature: how a call becomes the graph's inputs.
        recipe: `repr` of the recipe that made it.
        notes: what a person should know about how it was captured.
        sqnr_db: of its outputs on the example against the float graph's; None where not known.

    A model that writes to its buffers (a cache, a counter) gives a program with that state: each
    call reads and writes it, `state` shows it, `reset` sets it back to what it was when the model
    was captured.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Return a program of a class of its own, as a GraphModule is, which differs in the code
        object of `forward` alone: Dynamo counts what it compiled by code objects, and after eight
        programs with the same one it would leave the next one uncompiled."""
        forward = cls.forward
        own = FunctionType(
            forward.__code__.replace(), forward.__globals__, forward.__name__,
            forward.__defaults__, forward.__closure__,
        )  # fmt: skip
        own.__kwdefaults__ = forward.__kwdefaults__
        own.__doc__, own.__annotations__ = forward.__doc__, forward.__annotations__
        space = {"forward": own, "__doc__": cls.__doc__, "__module__": cls.__module__}
        return super().__new__(type(cls.__name__, (cls,), space))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and copy as an instance of the class that has a name."""
        return _blank, (type(self).__base__,), self.__dict__

    def __init__(
        self,
        graph_module: GraphModule,
        signature: Signature,
        recipe: str,
        notes: tuple[str, ...] = (),
        attributes: Mapping[str, Any] | None = None,
        sqnr_db: float | None = None,
        state: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.states = nn.Module()
        for name, value in (state or {}).items():
            register_tensor(self.states, f"initial.{name}", value)
            register_tensor(self.states, f"current.{name}", value.clone())
        self.graph_module = graph_module
        self.timesteps_seen = timesteps_to_see(graph_module)
        self.signature = signature
        self.recipe = recipe
        self.notes = notes
        self.sqnr_db = sqnr_db
        self.attributes = dict(attributes or {})
        self.requires_grad_(False)
        super().train(False)
        mark_for_dynamo(graph_module)  # torch.compile finds it whatever it is called and stands in

    @classmethod
    def from_captured(
        cls, captured: Captured, gm: GraphModule, recipe: str, model: nn.Module | ExportedProgram
    ) -> "Program":
        """Make a program of a transformed graph, with its own copy of what is still shared with the
        model."""
        gm = copy_graph(gm)
        copies: dict[Tensor, Tensor] = {}
        for module in gm.modules():
            for store in (module._parameters, module._buffers):
                for name, value in list(store.items()):
                    if value is None:
                        continue
                    if value not in copies:
                        copies[value] = value.detach().clone()
                    del store[name]
                    module._buffers[name] = copies[value]
        attributes = plain_attributes(model)
        return cls(gm, captured.signature, recipe, captured.notes, attributes, state=captured.state)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the graph as the original model would be called."""
        # Models of transformers and diffusers return a dataclass, or with return_dict=False the
        # tuple of its values; some take this argument without naming it.
        as_tuple = kwargs.get("return_dict") is False
        if "return_dict" in kwargs and self.signature.constant("return_dict") is not False:
            kwargs = {name: value for name, value in kwargs.items() if name != "return_dict"}
        inputs = self.inputs(args, kwargs)
        if not torch.compiler.is_compiling():
            show_to_dynamo(self.graph_module)
            for seen in self.timesteps_seen:
                seen(inputs)
        leaves = list(self.graph_module(*inputs))
        for place, index in enumerate(self.signature.writes, self.signature.out_spec.num_leaves):
            leaves[place] = inputs[index].copy_(leaves[place])
        for place, index in self.signature.returned.items():
            leaves[place] = inputs[index]
        del leaves[self.signature.out_spec.num_leaves :]
        result = pytree.tree_unflatten(leaves, self.signature.out_spec)
        return result.to_tuple() if as_tuple and hasattr(result, "to_tuple") else result

    def inputs(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], where: str = "call"
    ) -> list[Tensor]:
        """Return the graph's inputs for a call: its tensors, then the state as it is now.

        Raises:
            TypeError, ValueError: as `Signature.flatten`.
            UnsupportedError: an argument that the model writes to shares memory with another.
        """
        tensors = self.signature.flatten(args, kwargs, where, self.device)
        inputs = [*tensors, *self.state.values()]
        if self.signature.writes and not torch.compiler.is_compiling():
            names = [*(leaf.name for leaf in self.signature.tensors), *self.signature.state]
            check_apart(list(zip(names, inputs, strict=True)), self.signature.writes, where)
        return inputs

    @property
    def state(self) -> dict[str, Tensor]:
        """The buffers that calls write to, by their names in the model."""
        return {name: self.states.get_buffer(f"current.{name}") for name in self.signature.state}

    def reset(self) -> None:
        """Set the state back to what it was when the model was captured."""
        for name, value in self.state.items():
            value.copy_(self.states.get_buffer(f"initial.{name}"))

    def __getattr__(self, name: str) -> Any:
        attributes = self.__dict__.get("attributes", {})
        if name in attributes:
            return attributes[name]
        return super().__getattr__(name)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickle. FX keeps no meta of nodes in a pickle: `fxq.save` is the way to keep it all."""
        super().__setstate__(state)
        mark_for_dynamo(self.graph_module)

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype of the model: that of its first floating input, else of its
        tensors."""
        for leaf in self.signature.tensors:
            if leaf.dtype.is_floating_point:
                return leaf.dtype
        floating = (b.dtype for b in self.buffers() if b.is_floating_point())
        return next(floating, torch.get_default_dtype())

    @property
    def device(self) -> torch.device:
        """Where the tensors are; the CPU where there are none."""
        return next((b.device for b in self.buffers()), torch.device("cpu"))

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the graph's tensors, which do not train: those in the model's dtype first, so that
        the first one answers for dtype and device, then other floating ones, then codes."""
        prefix = f"{prefix}.graph_module".removeprefix(".")
        found = list(self.graph_module.named_buffers(prefix, recurse, remove_duplicate))
        dtype = self.dtype
        found.sort(key=lambda item: (item[1].dtype != dtype, not item[1].is_floating_point()))
        for name, value in found:
            yield name, nn.Parameter(value, requires_grad=False)

    def train(self, mode: bool = True) -> "Program":
        """Accept eval mode only.

        Raises:
            ValueError: `mode` is True.
        """
        if mode:
            raise ValueError(
                "a Program has no train mode; train the original model and compress it again"
            )
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> "Program":
        """Move to a device. Constants of the graph that name a device move along. Converting to the
        dtype that the program has changes nothing: scales keep theirs.

        Raises:
            ValueError: a change of dtype, which would change the scales.
        """
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        if probe.dtype != self.dtype:
            raise ValueError(
                f"expected a device, found the dtype {probe.dtype}: a Program's dtype is fixed "
                f"when it is made, at {self.dtype}; convert the model before compressing it"
            )
        other = torch.float32 if self.dtype != torch.float32 else torch.bfloat16
        converts = fn(torch.empty(0, dtype=other, device=self.device)).dtype != other
        super()._apply((lambda t: t.to(probe.device)) if converts else fn, recurse)
        for node in self.graph_module.graph.nodes:
            if isinstance(node.kwargs.get("device"), torch.device):
                node.update_kwarg("device", probe.device)
        self.graph_module.recompile()
        return self

    @contextlib.contextmanager
    def cache_context(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Do nothing: diffusers' pipelines enter this context to name a cache and a step, and a
        graph has none."""
        yield

    def extra_repr(self) -> str:
        """Show the recipe."""
        return f"recipe={self.recipe}"


def plain_attributes(model: nn.Module | ExportedProgram) -> dict[str, Any]:
    """Return the public attributes of `model` that are plain values, and its `config`."""
    found = {
        name: value
        for name, value in vars(model).items()
        if not name.startswith("_") and name != "training" and _is_plain(value)
    }
    config = getattr(model, "config", None)
    if config is not None:
        found["config"] = config
    return found


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return isinstance(value, PLAIN)


def check_program(value: Any, what: str) -> None:
    """Raise TypeError where `what` was given something else than a whole `Program`."""
    if not isinstance(value, Program):
        compiled = hasattr(value, "_orig_mod")
        raise TypeError(
            f"{what}: expected a Program, found {type(value).__name__}; "
            + ("give the program itself, before torch.compile" if compiled else "")
            + ("" if compiled else "fxq.compress(model, example_inputs, recipe) makes one")
        )
    if not all("val" in n.meta for n in value.graph_module.graph.find_nodes(op="placeholder")):
        raise TypeError(
            f"{what}: expected a program as fxq.compress or fxq.load gives it, found one from a "
            "pickle (torch.save, copying between processes), which keeps no shapes; it still runs. "
            "Use fxq.save and fxq.load"
        )


class Config(SimpleNamespace):
    """A saved model's `config`: attributes and items, read only in spirit."""

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)

    def __contains__(self, name: str) -> bool:
        return hasattr(self, name)

    def get(self, name: str, default: Any = None) -> Any:
        """Return an entry, or `default`."""
        return getattr(self, name, default)
