"""Rectified SpaAttn: block-sparse attention for video and image transformers, corrected against an
implicit full attention (arXiv:2511.19835).

The operator's definition is `fxq.rectified_attention`; here is everything around it: where in a
graph it can stand (`ReplaceAttention`), how dense each layer is at each step, and a measurement
that says how dense it should be (`calibrate_density`).

Departures from the published code: the first frame plays no special part, because the first blocks
of a space-filling curve do not hold it; text stays where it is, before or after the visual tokens,
instead of being moved; steps are chosen by a tensor in the graph, not by a counter in Python;
attention is found in graphs, not by replacing methods of model classes.
"""

from fxq.passes.rectified_spaattn.attention import rectified_attention
from fxq.passes.rectified_spaattn.calibration import Calibration, Measurement, calibrate_density
from fxq.passes.rectified_spaattn.curve import block_adjacency, curve_order
from fxq.passes.rectified_spaattn.densities import set_densities
from fxq.passes.rectified_spaattn.recipes import ONLINE_20, TOPK_11, TOPK_20, W8A8_TOPK_20
from fxq.passes.rectified_spaattn.replace_attention import ReplaceAttention
from fxq.passes.rectified_spaattn.segments import TokenLayout

__all__ = [
    "ONLINE_20",
    "TOPK_11",
    "TOPK_20",
    "W8A8_TOPK_20",
    "Calibration",
    "Measurement",
    "ReplaceAttention",
    "TokenLayout",
    "block_adjacency",
    "calibrate_density",
    "curve_order",
    "rectified_attention",
    "set_densities",
]
