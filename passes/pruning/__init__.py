"""Pruning: weights of linears that go, before anything is quantized.

    Magnitude   `|W|`; needs no data                                  arXiv:1506.02626
    Wanda       `|W| * ||X||`                                         arXiv:2306.11695
    RIA         shares of row and column, times the input's norm      arXiv:2402.04997
    SparseGPT   cost at the output; what stays makes up for it        arXiv:2301.00774

Biases, embeddings and output layers stay dense. The mask is in the layer's record: a later pass
that writes where it is False is refused. Zeros are multiplied like other numbers.
"""

from fxq.passes import w8a8
from fxq.passes.common import Calibrate, Convert, InsertObservers
from fxq.passes.gptq import GPTQ, OUTPUT, W4_LAYER
from fxq.passes.pruning.magnitude import Magnitude
from fxq.passes.pruning.patterns import Group, Pattern, Unstructured
from fxq.passes.pruning.prune import Prune
from fxq.passes.pruning.ria import RIA
from fxq.passes.pruning.sparsegpt import SparseGPT
from fxq.passes.pruning.wanda import Wanda
from fxq.pipeline import Recipe

__all__ = [
    "RIA",
    "Group",
    "Magnitude",
    "Pattern",
    "Prune",
    "SparseGPT",
    "Unstructured",
    "Wanda",
]

MAGNITUDE_50 = Recipe("magnitude_50", (Magnitude(Unstructured(0.5, "layer")),))
MAGNITUDE_2_4 = Recipe("magnitude_2_4", (Magnitude(Group(2, 4)),))
WANDA_50 = Recipe("wanda_50", (Wanda(),))
WANDA_2_4 = Recipe("wanda_2_4", (Wanda(Group(2, 4)),))
WANDA_4_8 = Recipe("wanda_4_8", (Wanda(Group(4, 8)),))
RIA_50 = Recipe("ria_50", (RIA(),))
RIA_2_4 = Recipe("ria_2_4", (RIA(Group(2, 4)),))
SPARSEGPT_50 = Recipe("sparsegpt_50", (SparseGPT(Unstructured(0.5, "layer")),))
SPARSEGPT_2_4 = Recipe("sparsegpt_2_4", (SparseGPT(Group(2, 4)),))
SPARSEGPT_4_8 = Recipe("sparsegpt_4_8", (SparseGPT(Group(4, 8)),))

_observe_w8a8 = InsertObservers(w8a8.STATIC_LAYER, overrides=OUTPUT)
_observe_w4 = InsertObservers(W4_LAYER, overrides=OUTPUT)
SPARSEGPT_2_4_W8A8 = Recipe(
    "sparsegpt_2_4_w8a8", (SparseGPT(Group(2, 4)), _observe_w8a8, Calibrate(), Convert())
)
SPARSEGPT_50_W4 = Recipe("sparsegpt_50_w4", (SparseGPT(), _observe_w4, GPTQ(), Convert()))
