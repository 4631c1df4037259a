"""Sparsity Induction: dense weights made ready to be pruned (arXiv:2602.21652).

What is where:

    equations   the paper's equations, and what a consistent reading of them needs
    learning    the factors of sites, learned from cached second moments
    induce      the pass
    here        recipes: a pruner and a pattern each

The paper's equations contradict each other, and no code is published. Departures:

- Exact scaling changes no choice of Wanda's or SparseGPT's: the factor in the weight cancels
  against that in the input. The factor of eq. (11) is read as one of importance, and the mask is
  what is learned, straight-through: for a fixed mask the error of eq. (4) has no gradient.
- The shift is the mean of the input, the best one for any mask, and goes into the bias of the layer
  that is pruned. Layers without a bias get one, which the paper does not count.
- Eq. (8) falls with any common factor and underflows. Here norms are over the Frobenius norm;
  `SpectralNorm(normalized=False)` is as printed.
- Eq. (5) has the channels of the layer's output where eq. (3) needs those of its input, and gives 0
  for symmetric ones. Read for the input, and made positive, it is the start "spread_as_printed".
- Factors have a product of 1 and are bounded; the best step is kept, the pruner's own choice among
  them, by the output error of a site's layers in place of that of the model.
- Query-key sites are left out: their factor multiplies whole rows, whose weights a row's or group's
  choice does not compare with others.

`AS_PRINTED` has the start and the loss of the equations as they are.
"""

from fxq.passes.pruning import Group, Magnitude, SparseGPT, Unstructured, Wanda
from fxq.passes.pruning.prune import Pruner
from fxq.passes.sparsity_induction.induce import InduceSparsity
from fxq.passes.sparsity_induction.learning import Learning, SpectralNorm
from fxq.pipeline import Recipe

__all__ = ["AS_PRINTED", "InduceSparsity", "Learning", "SpectralNorm"]

AS_PRINTED = Learning(
    starts=("spread_as_printed",), spectral=SpectralNorm(weight=1e-2, alpha=0.1, normalized=False)
)

_LAYER = Unstructured(0.5, "layer")
_MANY, _FEW = Learning(), Learning(steps=20)  # each step of SparseGPT is a sweep over columns


def _recipe(name: str, pruner: Pruner, how: Learning = _MANY) -> Recipe:
    return Recipe(f"sparsity_induction_{name}", (InduceSparsity(pruner, how),))


MAGNITUDE_50 = _recipe("magnitude_50", Magnitude(_LAYER))
MAGNITUDE_2_4 = _recipe("magnitude_2_4", Magnitude(Group(2, 4)))
MAGNITUDE_4_8 = _recipe("magnitude_4_8", Magnitude(Group(4, 8)))
WANDA_50 = _recipe("wanda_50", Wanda())
WANDA_2_4 = _recipe("wanda_2_4", Wanda(Group(2, 4)))
WANDA_4_8 = _recipe("wanda_4_8", Wanda(Group(4, 8)))
SPARSEGPT_50 = _recipe("sparsegpt_50", SparseGPT(_LAYER), _FEW)
SPARSEGPT_2_4 = _recipe("sparsegpt_2_4", SparseGPT(Group(2, 4)), _FEW)
SPARSEGPT_4_8 = _recipe("sparsegpt_4_8", SparseGPT(Group(4, 8)), _FEW)
