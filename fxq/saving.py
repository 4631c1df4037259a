"""A program as one safetensors file, and back, without pickle.

Tensors are the file's tensors; everything else is one JSON text in its metadata, under "fxq" (one
entry, because safetensors writes several in random order). Codes that fit fewer than 8 bits are
packed. Loading executes nothing that the file names: `fxq.graph_json` resolves operators,
`fxq.vetting` bounds what they compute, and `_resolve` finds the types of results. A checksum over
all of it finds damage; it is no signature, and who made a file is for its reader to know.
"""

import contextlib
import importlib
import json
import os
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule
from torch.utils import _pytree as pytree

from fxq.batches import checked_device
from fxq.conditions import Condition
from fxq.dialect import QUANTIZED
from fxq.errors import FxqWarning, UnsupportedError
from fxq.files import check_writable, write_tensors
from fxq.graph import val_of
from fxq.graph_json import decode, decode_graph, encode, encode_graph
from fxq.layer_json import adopt_tensors, tensors_of
from fxq.packing import check_seal, decode_tensors, encode_tensors, register, seal
from fxq.program import PLAIN, Config, Program, check_program
from fxq.rewriting import propagate
from fxq.signature import Leaf, Signature
from fxq.vetting import check_arithmetic, check_graph, check_values

VERSION = 4  # 1 had no checksum, 2 no records of layers, 3 no conditions on sizes
# Before the names of state and of records' tensors; no name in a graph has a colon.
STATE, LAYERS = "state:", "layer:"
# What a file may cause to be imported: the modules in which two libraries have the classes that
# their models return, and register them with torch's pytree.
RESULT_MODULES = frozenset(
    {
        "transformers.modeling_outputs",
        "diffusers.models.modeling_outputs",
        "diffusers.models.autoencoders.vae",
        "diffusers.models.controlnets.controlnet",
        "diffusers.models.unets.unet_1d",
        "diffusers.models.unets.unet_2d",
        "diffusers.models.unets.unet_2d_condition",
        "diffusers.models.unets.unet_3d_condition",
        "diffusers.models.unets.unet_motion_model",
        "diffusers.models.unets.unet_spatio_temporal_condition",
    }
)
NATIVE_TYPES = {"tuple": tuple, "list": list, "dict": dict, "OrderedDict": OrderedDict}


def save(program: Program, path: str | os.PathLike[str]) -> None:
    """Write `program` to one file. The same program gives the same bytes.

    Args:
        program: what `fxq.compress` or `fxq.load` returned.
        path: where to; an existing file is replaced once the new one is complete.
    Raises:
        TypeError: not a Program.
        FileNotFoundError, ValueError: no folder for the file, or a folder of its name.
        UnsupportedError: the graph or the call signature holds what a file cannot carry.
    """
    check_program(program, "save")
    path = Path(path)
    check_writable(path)
    gm = program.graph_module
    QUANTIZED.check(gm)
    tensors, table = encode_tensors(gm)
    tables = {}
    for prefix, holder in ((STATE, program.states), (LAYERS, tensors_of(gm))):
        more, tables[prefix] = encode_tensors(holder)
        tensors |= {f"{prefix}{name}": value for name, value in more.items()}
    attributes, config, dropped = _encode_attributes(program.attributes)
    content = {
        "version": VERSION,
        "torch": torch.__version__,
        "recipe": program.recipe,
        "notes": program.notes,
        "sqnr_db": encode(program.sqnr_db),
        "signature": _encode_signature(program.signature),
        "graph": encode_graph(gm),
        "tensors": table,
        "state": tables[STATE],
        "layers": tables[LAYERS],
        "attributes": attributes,
        "config": config,
        "dropped": dropped,
    }
    text = seal(content, tensors)
    try:
        write_tensors(path, tensors, {"fxq": text})
    except KeyError as error:
        raise UnsupportedError(f"expected tensors safetensors can hold, found {error}") from error


def load(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Program:
    """Return the program in a file that `save` wrote.

    Args:
        path: the file.
        device: where its tensors and constants go.
    Raises:
        FileNotFoundError: no such file.
        ValueError: no such device; not a file of fxq, of a newer fxq, damaged, or with a result
            type that is not known here; the message says which.
    """
    if Path(path).is_dir():
        raise ValueError(f"{path}: expected a file that fxq.save wrote, found a folder")
    device = checked_device(device, "device")
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            # Copies: what safetensors returns are views of the mapped file.
            stored = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path}: expected a complete safetensors file, found none ({error}); save it again"
        ) from error
    content = _content(path, metadata)
    check_seal(path, content, stored)
    try:
        return _decode_program(content, stored, device)
    except Exception as error:  # a damaged file can break anything, operators of torch among it
        reason = str(error) if isinstance(error, ValueError) else f"the file is damaged: {error!r}"
        raise ValueError(
            f"{path} cannot be loaded: {reason} (written with torch {content.get('torch')}, here "
            f"{torch.__version__})"
        ) from error


def _content(path: str | os.PathLike[str], metadata: Mapping[str, str]) -> dict[str, Any]:
    if "fxq" not in metadata:
        raise ValueError(
            f"{path}: expected a file written by fxq.save, found safetensors with the metadata "
            f"{sorted(metadata)}; weights alone are no program: compress the model they belong to"
        )
    try:
        content: dict[str, Any] = json.loads(metadata["fxq"])
        version = int(content["version"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path}: damaged metadata ({error!r}); save the file again") from error
    if version > VERSION:
        raise ValueError(
            f"{path}: expected format version {VERSION} or older, found {version}; upgrade fxq"
        )
    return content


def _decode_program(
    content: Mapping[str, Any], stored: Mapping[str, Tensor], device: torch.device
) -> Program:
    gm = GraphModule(nn.Module(), Graph())
    parts: dict[str, dict[str, Tensor]] = {"": {}, STATE: {}, LAYERS: {}}
    for name, value in stored.items():
        prefix = next((p for p in (STATE, LAYERS) if name.startswith(p)), "")
        parts[prefix][name[len(prefix) :]] = value
    for name, value in decode_tensors(content["tensors"], parts[""], device).items():
        register(gm, name, value)
    graph = decode_graph(content["graph"], device)
    graph.lint()
    check_graph(graph, dict(gm.named_buffers(remove_duplicate=False)))
    gm.graph = graph
    propagate(gm, before=check_arithmetic)
    check_values(graph)
    QUANTIZED.check(gm)
    adopt_tensors(gm, decode_tensors(content.get("layers", []), parts[LAYERS], device))
    signature = _decode_signature(content["signature"], device)
    _check_counts(gm, signature)
    attributes = decode(content["attributes"], {}, device)
    if content["config"] is not None:
        attributes["config"] = Config(**decode(content["config"], {}, device))
    sqnr_db = decode(content.get("sqnr_db"), {}, device)
    sqnr_db = None if sqnr_db is None else float(sqnr_db)
    state = decode_tensors(content.get("state", []), parts[STATE], device)
    initial = {name: state[f"initial.{name}"] for name in signature.state}
    _check_state(gm, initial)
    notes = tuple(content["notes"])
    program = Program(gm, signature, content["recipe"], notes, attributes, sqnr_db, initial)
    for name, value in program.state.items():
        value.copy_(state[f"current.{name}"])
    return program


def _check_counts(gm: GraphModule, signature: Signature) -> None:
    inputs = gm.graph.find_nodes(op="placeholder")
    results = gm.graph.output_node().args[0]
    n_inputs = len(signature.tensors) + len(signature.state)
    n_results = signature.out_spec.num_leaves + len(signature.writes)
    found = (n_inputs, len(signature.leaves), n_results)
    expected = (len(inputs), signature.in_spec.num_leaves, len(results))  # type: ignore[arg-type]
    if found != expected:
        raise ValueError(
            f"expected a signature of {expected} tensors, arguments and results, as the graph has, "
            f"found {found}"
        )
    indices = (*signature.writes, *signature.returned, *signature.returned.values())
    if not all(type(i) is int and 0 <= i < max(n_inputs, n_results) for i in indices):
        raise ValueError(f"expected writes to inputs of the graph, found {indices}")


def _check_state(gm: GraphModule, state: Mapping[str, Tensor]) -> None:
    inputs = gm.graph.find_nodes(op="placeholder")[-len(state) or None :]
    for node, (name, value) in zip(inputs, state.items(), strict=False):
        if (value.shape, value.dtype) != (val_of(node).shape, val_of(node).dtype):
            raise ValueError(
                f"state {name!r}: expected {val_of(node).dtype} {list(val_of(node).shape)}, as the "
                f"graph has, found {value.dtype} {list(value.shape)}"
            )


def _encode_signature(signature: Signature) -> dict[str, Any]:
    return {
        "names": signature.names,
        "known": signature.known,
        "given": signature.given,
        "defaults": encode(dict(signature.defaults)),
        "in_spec": encode_spec(signature.in_spec),
        "leaves": [_encode_leaf(leaf) for leaf in signature.leaves],
        "out_spec": encode_spec(signature.out_spec),
        "ranges": encode(dict(signature.ranges)),
        "example_sizes": encode(dict(signature.example_sizes)),
        "conditions": [condition.text for condition in signature.conditions],
        "state": signature.state,
        "writes": signature.writes,
        "returned": encode(dict(signature.returned)),
    }


def _decode_signature(data: Mapping[str, Any], device: torch.device) -> Signature:
    return Signature(
        tuple(data["names"]),
        tuple(data["known"]),
        tuple(data["given"]),
        decode(data["defaults"], {}, device),
        decode_spec(data["in_spec"]),
        tuple(_decode_leaf(leaf, device) for leaf in data["leaves"]),
        decode_spec(data["out_spec"]),
        decode(data["ranges"], {}, device),
        decode(data["example_sizes"], {}, device),
        _decode_conditions(data, device),
        tuple(data.get("state", ())),
        tuple(data.get("writes", ())),
        decode(data.get("returned", {"dict": []}), {}, device),
    )


def _decode_conditions(data: Mapping[str, Any], device: torch.device) -> tuple[Condition, ...]:
    excluded = decode(data.get("excluded", {"dict": []}), {}, device)  # what older files have
    texts = [f"{name} != {value}" for name, values in excluded.items() for value in values]
    return tuple(Condition(text) for text in (*texts, *data.get("conditions", ())))


def _encode_leaf(leaf: Any) -> dict[str, Any]:
    if isinstance(leaf, Leaf):
        return {"input": leaf.name, "shape": leaf.shape, "dtype": encode(leaf.dtype)}
    try:
        return {"constant": encode(leaf)}
    except UnsupportedError as error:
        raise UnsupportedError(f"a constant argument of the example: {error}") from error


def _decode_leaf(data: Mapping[str, Any], device: torch.device) -> Any:
    if "input" in data:
        return Leaf(data["input"], tuple(data["shape"]), decode(data["dtype"], {}, device))
    return decode(data["constant"], {}, device)


def encode_spec(spec: pytree.TreeSpec) -> dict[str, Any] | None:
    """Return the structure of a call or result as JSON; a leaf is None."""
    if spec.is_leaf():
        return None
    return {
        "type": _type_name(spec.type),
        "context": encode(spec.context),  # keys of a dict, fields of a dataclass
        "children": [encode_spec(child) for child in spec.children()],
    }


def decode_spec(data: Mapping[str, Any] | None) -> pytree.TreeSpec:
    """Return what `encode_spec` was given."""
    if data is None:
        return pytree.treespec_leaf()
    children = [decode_spec(child) for child in data["children"]]
    context = decode(data["context"], {}, torch.device("cpu"))
    return pytree.TreeSpec(_resolve(data["type"]), context, children)


def _type_name(kind: type) -> str:
    if kind in NATIVE_TYPES.values():
        return kind.__name__
    registered = pytree.SUPPORTED_SERIALIZED_TYPES.get(kind)
    name = registered.serialized_type_name if registered else None
    if pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE.get(name or "") is not kind:
        raise UnsupportedError(
            f"expected tuples, lists, dicts and registered dataclasses in calls and results, found "
            f"{kind.__name__}; register it with torch.export.register_dataclass and give it a "
            "serialized_type_name"
        )
    return str(name)


def _resolve(name: str) -> type:
    """Return the registered pytree type called `name`.

    Raises:
        ValueError: no such type, though its module was imported where a file may ask for that.
    """
    if name in NATIVE_TYPES:
        return NATIVE_TYPES[name]
    known = pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE
    module = name.rpartition(".")[0]
    if name not in known and module in RESULT_MODULES:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    if name not in known:
        raise ValueError(
            f"expected the result type {name!r} to be registered with torch's pytree, found it is "
            f"not; import {module or name} before fxq.load"
        )
    return known[name]


def _encode_attributes(attributes: Mapping[str, Any]) -> tuple[Any, Any, list[str]]:
    """Return plain attributes, the entries of `config`, and the names of what could not be kept."""
    kept, lost = _keep_plain({k: v for k, v in attributes.items() if k != "config"})
    if plain := [name for name in lost if isinstance(attributes[name], (*PLAIN, tuple, list))]:
        warnings.warn(
            f"attributes {plain} of the program are of a type a file cannot hold and are left out; "
            "make them plain numbers or strings",
            FxqWarning,
            stacklevel=3,
        )
    if attributes.get("config") is None:
        return encode(kept), None, lost
    entries, lost_entries = _keep_plain(_config_entries(attributes["config"]))
    return encode(kept), encode(entries), lost + [f"config.{name}" for name in lost_entries]


def _config_entries(config: Any) -> dict[str, Any]:
    if hasattr(config, "to_dict"):  # transformers
        return dict(config.to_dict())
    return dict(config if isinstance(config, Mapping) else getattr(config, "__dict__", {}))


def _keep_plain(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    kept, lost = {}, []
    for name, value in values.items():
        try:
            encode(value)
        except UnsupportedError:
            lost.append(name)
        else:
            kept[name] = value
    return kept, lost
