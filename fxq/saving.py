"""A program as one safetensors file, and back, without pickle.

Tensors are the file's tensors; everything else is one JSON text in its metadata, under "fxq" (one
entry, because safetensors writes several in random order). Codes that fit fewer than 8 bits are
packed. Loading executes nothing that the file names: `fxq.graph_json` resolves operators, and
`_resolve` the types of results.
"""

import importlib
import json
import math
import os
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule
from torch.utils import _pytree as pytree

from fxq.capturing import Leaf, Signature
from fxq.dialect import QUANTIZED
from fxq.errors import FxqWarning, UnsupportedError
from fxq.graph import propagate
from fxq.graph_json import PATH, decode, decode_graph, encode, encode_graph
from fxq.program import PLAIN, Config, Program

VERSION = 1
# Whose result types a file may cause to be imported: the two libraries whose models return a class
# of their own, which is registered with torch's pytree as its module is imported.
RESULT_PACKAGES = frozenset({"transformers", "diffusers"})
NATIVE_TYPES = {"tuple": tuple, "list": list, "dict": dict, "OrderedDict": OrderedDict}


def save(program: Program, path: str | os.PathLike[str]) -> None:
    """Write `program` to one file. The same program gives the same bytes.

    Args:
        program: what `fxq.compress` or `fxq.load` returned.
        path: where to; an existing file is replaced once the new one is complete.
    Raises:
        TypeError: not a Program.
        UnsupportedError: the graph or the call signature holds what a file cannot carry.
    """
    if not isinstance(program, Program):
        raise TypeError(
            f"program: expected a Program (what fxq.compress returns), found "
            f"{type(program).__name__}; save the program itself, before torch.compile"
        )
    gm = program.graph_module
    QUANTIZED.check(gm)
    tensors, table = _encode_tensors(gm)
    attributes, config, dropped = _encode_attributes(program.attributes)
    content = {
        "version": VERSION,
        "torch": torch.__version__,
        "recipe": program.recipe,
        "notes": program.notes,
        "signature": _encode_signature(program.signature),
        "graph": encode_graph(gm),
        "tensors": table,
        "attributes": attributes,
        "config": config,
        "dropped": dropped,
    }
    text = json.dumps(content, sort_keys=True, allow_nan=False, separators=(",", ":"))
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        safetensors.torch.save_file(tensors, partial, {"fxq": text})
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Program:
    """Return the program in a file that `save` wrote.

    Args:
        path: the file.
        device: where its tensors and constants go.
    Raises:
        FileNotFoundError: no such file.
        ValueError: not a file of fxq, of a newer fxq, damaged, or with a result type that is not
            known here; the message says which.
    """
    device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0", as tensors say it
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
    try:
        return _decode_program(content, stored, device)
    except Exception as error:  # a damaged file can break anything, operators of torch among it
        raise ValueError(
            f"{path} cannot be loaded (written with torch {content.get('torch')}, here "
            f"{torch.__version__}): {type(error).__name__}: {error}"
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
    for name, value in _decode_tensors(content["tensors"], stored, device).items():
        _register(gm, name, value)
    graph = decode_graph(content["graph"], device)
    graph.lint()
    gm.graph = graph
    propagate(gm)
    QUANTIZED.check(gm)
    signature = _decode_signature(content["signature"], device)
    _check_counts(gm, signature)
    attributes = decode(content["attributes"], {}, device)
    if content["config"] is not None:
        attributes["config"] = Config(**decode(content["config"], {}, device))
    return Program(gm, signature, content["recipe"], tuple(content["notes"]), attributes)


def _check_counts(gm: GraphModule, signature: Signature) -> None:
    inputs = [n for n in gm.graph.nodes if n.op == "placeholder"]
    results = gm.graph.output_node().args[0]
    found = (len(signature.tensors), len(signature.leaves), signature.out_spec.num_leaves)
    expected = (len(inputs), signature.in_spec.num_leaves, len(results))  # type: ignore[arg-type]
    if found != expected:
        raise ValueError(
            f"expected a signature of {expected} tensors, arguments and results, as the graph has, "
            f"found {found}"
        )


# Tensors


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Return the low `bits` bits of every code, one behind the other.

    Args:
        codes: any shape, int8 or uint8.
        bits: 2 to 8.
    Returns:
        bytes `[ceil(numel * bits / 8)]`, uint8; the first code is in the lowest bits of the first.
    """
    flat = codes.contiguous().view(torch.uint8).flatten()
    eights = nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8)  # [numel / 8, 8]
    words = torch.zeros(len(eights), dtype=torch.int64)  # 8 codes are `bits` bytes: one word
    for i in range(8):
        words |= (eights[:, i].long() & (2**bits - 1)) << (i * bits)
    packed = words.view(torch.uint8).view(-1, 8)[:, :bits].flatten()
    return packed[: math.ceil(len(flat) * bits / 8)].clone()


def unpack_codes(packed: Tensor, bits: int, numel: int, *, signed: bool) -> Tensor:
    """Return what `pack_codes` was given, flat.

    Args:
        packed: bytes `[ceil(numel * bits / 8)]`, uint8.
        bits: 2 to 8.
        numel: how many codes.
        signed: whether the top bit of a code is its sign.
    Returns:
        codes `[numel]`, int8 where `signed`, else uint8.
    """
    padded = nn.functional.pad(packed, (0, -len(packed) % bits)).view(-1, bits)
    words = nn.functional.pad(padded, (0, 8 - bits)).view(torch.int64).flatten()
    eights = torch.stack([(words >> (i * bits)) & (2**bits - 1) for i in range(8)], dim=1)
    codes = eights.flatten()[:numel]
    if not signed:
        return codes.to(torch.uint8)
    return torch.where(codes >= 2 ** (bits - 1), codes - 2**bits, codes).to(torch.int8)


def width_of(codes: Tensor) -> tuple[int, bool]:
    """Return how many bits, 2 to 8, hold every code, and whether one is a sign."""
    if codes.numel() == 0:
        return 8, codes.dtype == torch.int8
    low, high = int(codes.min()), int(codes.max())
    signed = low < 0
    bits = max(high.bit_length(), (-low - 1).bit_length() if signed else 0) + signed
    return max(bits, 2), signed


def _encode_tensors(gm: GraphModule) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what is stored, and per buffer what it takes to make it again."""
    stored: dict[str, Tensor] = {}
    table: dict[str, Any] = {}
    first: dict[Tensor, str] = {}
    for name, value in gm.named_buffers(remove_duplicate=False):
        if value in first:
            table[name] = {"same_as": first[value]}
            continue
        first[value] = name
        # Memory order is kept: a convolution may choose another algorithm for channels_last.
        order = sorted(range(value.ndim), key=lambda dim: -value.stride(dim))  # noqa: B023
        plain = value.detach().cpu().permute(order).contiguous()
        table[name] = entry = {
            "shape": list(plain.shape),
            "dtype": encode(value.dtype),
            "order": order,
        }
        if value.dtype in (torch.int8, torch.uint8):
            bits, signed = width_of(plain)
            if bits < 8:
                entry |= {"bits": bits, "signed": signed}
                plain = pack_codes(plain, bits)
        stored[name] = plain
    return stored, table


def _decode_tensors(
    table: Mapping[str, Any], stored: Mapping[str, Tensor], device: torch.device
) -> dict[str, Tensor]:
    values: dict[str, Tensor] = {}
    own = {name for name, entry in table.items() if "same_as" not in entry}
    if own != stored.keys():
        raise ValueError(f"expected the tensors {sorted(own)[:9]}, found {sorted(stored)[:9]}")
    for name in own:
        entry, value = table[name], stored[name]
        shape, dtype = entry["shape"], decode(entry["dtype"], {}, device)
        if "bits" in entry:
            numel, bits = math.prod(shape), entry["bits"]
            if value.shape != (math.ceil(numel * bits / 8),) or value.dtype != torch.uint8:
                raise ValueError(
                    f"tensor {name!r}: expected {numel} codes of {bits} bits, found "
                    f"{value.dtype} {list(value.shape)}"
                )
            value = unpack_codes(value, bits, numel, signed=entry["signed"]).to(dtype).view(shape)
        if list(value.shape) != shape or value.dtype != dtype:
            raise ValueError(
                f"tensor {name!r}: expected {dtype} {shape}, found {value.dtype} "
                f"{list(value.shape)}"
            )
        order = entry["order"]
        values[name] = value.permute([order.index(dim) for dim in range(len(order))]).to(device)
    return {name: values[entry.get("same_as", name)] for name, entry in table.items()}


def _register(gm: GraphModule, name: str, value: Tensor) -> None:
    """Register a buffer under a dotted name; torch refuses one that hides an attribute."""
    if not PATH.fullmatch(name):
        raise ValueError(f"expected a dotted name for a tensor, found {name!r}")
    *path, leaf = name.split(".")
    owner: nn.Module = gm
    for part in path:
        if part not in owner._modules:
            owner.add_module(part, nn.Module())
        owner = owner._modules[part]  # type: ignore[assignment]
    owner.register_buffer(leaf, value)
