"""Bring a graph to canonical form, so that passes need to know one form of each operator.

A rewrite says "this equals that, provided ..." and leaves alone what it cannot prove. `REWRITES` is
the whole list, in order. How often each applied is in `gm.meta["fxq_canonicalized"]`.
"""

from collections import Counter
from collections.abc import Callable

from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import GraphModule

from fxq.canonicalize.activation import gelu_erf, gelu_tanh, silu
from fxq.canonicalize.attention import scaled_dot_product_attention
from fxq.canonicalize.cleanup import drop_no_ops
from fxq.canonicalize.linear import (
    linear_of_addmm,
    linear_of_matmul,
    linear_of_rows,
    linear_with_bias,
    matmul_of_linear,
)
from fxq.canonicalize.materialize_constants import materialize_constants
from fxq.canonicalize.matmul_of_einsum import matmul_of_einsum, permute_of_einsum
from fxq.canonicalize.norm import batch_norm_of_native, rms_norm
from fxq.canonicalize.products import bmm_of_baddbmm
from fxq.canonicalize.views import reshape_of_view, transpose_of_property
from fxq.graph import name_lenders
from fxq.rewriting import erase_dead

REWRITES: tuple[Callable[[GraphModule], int], ...] = (
    reshape_of_view,
    transpose_of_property,
    drop_no_ops,
    materialize_constants,
    permute_of_einsum,
    matmul_of_einsum,
    bmm_of_baddbmm,
    matmul_of_linear,
    linear_of_addmm,
    linear_of_matmul,
    linear_with_bias,
    linear_of_rows,
    batch_norm_of_native,
    rms_norm,
    gelu_erf,
    gelu_tanh,
    silu,
    scaled_dot_product_attention,
    materialize_constants,  # once more: weights that an einsum joined the axes of
)


@unset_fake_temporarily()  # constants have values, also while Dynamo traces fake ones
def canonicalize(gm: GraphModule) -> GraphModule:
    """Rewrite `gm` in place and return it."""
    counts: Counter[str] = Counter()
    for rewrite in REWRITES:
        counts[rewrite.__name__] += rewrite(gm)
        gm.graph.eliminate_dead_code()
    erase_dead(gm)
    name_lenders(gm)
    gm.meta["fxq_canonicalized"] = {name: count for name, count in counts.items() if count}
    return gm
