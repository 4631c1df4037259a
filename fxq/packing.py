"""Tensors as a file holds them: shared ones once, in memory order, codes packed, all under a
checksum.

A code of a 4-bit weight is a byte in memory and half of one in a file. How many bits codes need is
read off their values, so that nothing else has to remember it and the round trip is exact for any.
"""

import hashlib
import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxq.errors import FxqWarning
from fxq.graph_json import decode, encode, is_path
from fxq.rewriting import register_tensor


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Return the low `bits` bits of every code, one after the other.

    Args:
        codes: any shape, int8 or uint8.
        bits: 2 to 8.
    Returns:
        bytes `[ceil(numel * bits / 8)]`, uint8; the first code is in the lowest bits of the first.
    """
    flat = codes.contiguous().view(torch.uint8).flatten()
    n_words = math.ceil(len(flat) / 8)
    eights = nn.functional.pad(flat, (0, 8 * n_words - len(flat))).view(n_words, 8)
    # 8 codes are `bits` bytes, which fit one 64-bit word.
    words = torch.zeros(n_words, dtype=torch.int64, device=codes.device)
    for i in range(8):
        words |= (eights[:, i].long() & (2**bits - 1)) << (i * bits)
    packed = words.view(torch.uint8).view(n_words, 8)[:, :bits].flatten()
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
    n_words = math.ceil(numel / 8)
    padded = nn.functional.pad(packed, (0, n_words * bits - len(packed))).view(n_words, bits)
    words = nn.functional.pad(padded, (0, 8 - bits)).view(torch.int64).flatten()
    each = [(words >> (i * bits) & (2**bits - 1)).to(torch.uint8) for i in range(8)]
    codes = torch.stack(each, dim=1).flatten()[:numel]
    if not signed:
        return codes
    return (codes << (8 - bits)).view(torch.int8) >> (8 - bits)  # the shift back repeats the sign


def width_of(codes: Tensor) -> tuple[int, bool]:
    """Return how many bits, 2 to 8, hold every code, and whether one is a sign."""
    if codes.numel() == 0:
        return 8, codes.dtype == torch.int8
    low, high = int(codes.min()), int(codes.max())
    signed = low < 0
    bits = max(high, -low - 1).bit_length() + signed  # two's complement reaches one further below
    return max(bits, 2), signed


def encode_tensors(gm: nn.Module) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Return what is stored, and per buffer what it takes to make it again, as JSON."""
    stored: dict[str, Tensor] = {}
    table: list[dict[str, Any]] = []
    first: dict[Tensor, str] = {}
    for name, value in gm.named_buffers(remove_duplicate=False):
        if value in first:
            table.append({"name": name, "same_as": first[value]})
            continue
        first[value] = name
        # Memory order is kept: a convolution may choose another algorithm for channels_last.
        strides = value.stride()
        order = sorted(range(value.ndim), key=strides.__getitem__, reverse=True)
        plain = value.detach().cpu().permute(order).contiguous()
        entry = {
            "name": name,
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
        table.append(entry)
    return stored, table


def seal(content: Mapping[str, Any], stored: Mapping[str, Tensor]) -> str:
    """Return `content` as JSON with the SHA-256 of itself and of the tensors."""
    return _text({**content, "sha256": _checksum(content, stored)})


def check_seal(
    path: str | os.PathLike[str], content: dict[str, Any], stored: Mapping[str, Tensor]
) -> None:
    """Take the checksum out of `content` and compare it with what the file holds.

    Raises:
        ValueError: they differ. A file of version 1 had none: that is a warning.
    """
    expected = content.pop("sha256", None)
    if expected is None and content["version"] == 1:
        warnings.warn(
            f"{path}: a file of format version 1 has no checksum, so damage to its numbers stays "
            "unseen; save it again",
            FxqWarning,
            stacklevel=3,
        )
        return
    found = _checksum(content, stored)
    if found != expected:
        raise ValueError(
            f"{path}: expected contents with the checksum {expected}, found {found}; the file is "
            "damaged: copy or save it again"
        )


def _text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, sort_keys=True, allow_nan=False, separators=(",", ":"))


def _checksum(content: Mapping[str, Any], stored: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(_text(content).encode())
    for name in sorted(stored):
        digest.update(name.encode())
        digest.update(stored[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def decode_tensors(
    table: Sequence[Mapping[str, Any]], stored: Mapping[str, Tensor], device: torch.device
) -> dict[str, Tensor]:
    """Return the buffers that `encode_tensors` was given, each with memory of its own.

    Raises:
        ValueError: a tensor is missing, too many, or of another shape or dtype than `table` says.
    """
    values: dict[str, Tensor] = {}
    own = {entry["name"] for entry in table if "same_as" not in entry}
    if own != stored.keys():
        raise ValueError(
            f"expected the tensors the file lists, found {sorted(own - stored.keys())[:5]} missing "
            f"and {sorted(stored.keys() - own)[:5]} too many; the file is damaged"
        )
    for entry in table:
        name = entry["name"]
        if "same_as" in entry:
            values[name] = values[entry["same_as"]]
            continue
        value, shape, dtype = stored[name], entry["shape"], decode(entry["dtype"], {}, device)
        if "bits" in entry:
            numel, bits = math.prod(shape), entry["bits"]
            if bits not in range(2, 8):
                raise ValueError(f"tensor {name!r}: expected codes of 2 to 7 bits, found {bits}")
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
    return values


def register(gm: GraphModule, name: str, value: Tensor) -> None:
    """Register a buffer under a dotted name; torch refuses one that hides an attribute."""
    if not is_path(name):
        raise ValueError(f"expected a dotted name for a tensor, found {name!r}")
    register_tensor(gm, name, value)
