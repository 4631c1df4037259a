"""Recipes: the paper's two densities, a mode that is closer to dense, and 8-bit linears too.

Densities are shares of visual key blocks. What a layer really visits is a little more, by the
blocks next to each other and by `top_p`: 88.95 % sparsity in the paper is a density of 0.1.
"""

from fxq.passes import w8a8
from fxq.passes.rectified_spaattn.replace_attention import ReplaceAttention
from fxq.pipeline import Recipe

TOPK_20 = Recipe("rectified_spaattn_20", (ReplaceAttention(density=0.2),))
TOPK_11 = Recipe("rectified_spaattn_11", (ReplaceAttention(density=0.11),))
ONLINE_20 = Recipe("rectified_spaattn_online_20", (ReplaceAttention(density=0.2, mode="online"),))
W8A8_TOPK_20 = Recipe(
    "rectified_spaattn_w8a8_20", (*w8a8.DYNAMIC.passes, ReplaceAttention(density=0.2))
)
