"""Records of layers as JSON, and back. Only the classes listed here are ever made."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxq import formats, rows, spec
from fxq.layer import (
    LAYER,
    Concentration,
    Induction,
    Layer,
    Skip,
    Treatment,
    WeightCodes,
    layer_of,
)
from fxq.rewriting import register_tensor

TYPES = {
    kind.__name__: kind
    for kind in (
        Layer, Treatment, Skip, Concentration, Induction, spec.LayerSpec, spec.QuantSpec,
        formats.Integer, formats.Float8,
        rows.ByTimestep, rows.ByStep, rows.ByPosition, rows.ByLength,
        spec.PerTensor, spec.PerChannel, spec.PerGroup, spec.PerToken, spec.PerAxes,
        spec.MinMax, spec.MovingAverage, spec.Percentile, spec.MeanSquaredError, spec.Entropy,
    )
}  # fmt: skip


def encode_layer(node: Node) -> Any:
    """Return the record of a node without its tensors, None where it has none."""
    if LAYER not in node.meta:
        return None
    return encode_value(replace(layer_of(node), weight=None, mask=None))


def decode_layer(node: Node, meta: Mapping[str, Any]) -> None:
    """Give a node the record that its entry in a file has, if any."""
    if "layer" in meta:
        node.meta[LAYER] = decode_value(meta["layer"])
    elif before := {key for key in meta if key.startswith("fxq_")}:
        node.meta[LAYER] = _of_version_2(node.name, {key: meta[key] for key in before})


def tensors_of(gm: GraphModule) -> nn.Module:
    """Return a module that holds the tensors of all records as buffers."""
    holder = nn.Module()
    for node in gm.graph.nodes:
        layer = layer_of(node)
        parts: dict[str, Tensor | None] = {"mask": layer.mask}
        if layer.weight is not None:
            parts |= vars(layer.weight)
        for name, value in parts.items():
            if value is not None:
                register_tensor(holder, f"{node.name}.{name}", value)
    return holder


def adopt_tensors(gm: GraphModule, values: Mapping[str, Tensor]) -> None:
    """Give the records of a loaded graph the tensors that `tensors_of` held."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in values.items():
        node, _, part = name.rpartition(".")
        parts.setdefault(node, {})[part] = value
    for node in gm.graph.nodes:
        if found := parts.pop(node.name, None):
            mask = found.pop("mask", None)
            weight = WeightCodes(**found) if found else None
            node.meta[LAYER] = replace(layer_of(node), mask=mask, weight=weight)
    if parts:
        raise ValueError(f"expected records of nodes of the graph, found {sorted(parts)}")


def encode_value(value: Any) -> Any:
    """Return a spec, or another value of the listed classes, as JSON."""
    if isinstance(value, tuple):
        return [encode_value(item) for item in value]
    if type(value) not in TYPES.values():
        return value
    kept = {f.name: encode_value(getattr(value, f.name)) for f in fields(value)}
    return {"type": type(value).__name__, **kept}


def decode_value(data: Any) -> Any:
    """Return what `encode_value` was given."""
    if isinstance(data, list):
        return tuple(map(decode_value, data))
    if not isinstance(data, dict):
        return data
    kept = {name: decode_value(value) for name, value in data.items() if name != "type"}
    return TYPES[data["type"]](**kept)


def _of_version_2(name: str, meta: Mapping[str, Any]) -> Layer:
    """Return the record of what files of format version 2 and before say of a node."""
    did = Skip(*meta["fxq_skip"]) if "fxq_skip" in meta else meta.get("fxq_format", "")
    return Layer(
        name,
        format=meta.get("fxq_format"),
        treatments=(Treatment("an earlier fxq", did, meta.get("fxq_note", "")),),
        scaled=tuple(meta.get("fxq_scaled", ())),
    )
