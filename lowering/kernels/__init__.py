"""Triton kernels, one file each.

Letters of products: M rows of activations, N output channels, K input channels; tiles BM, BN, BK;
`x` activations, `w` weight, `acc` accumulator, `offs_` offsets, `mask_` masks, `_ptr` pointers. Of
attention: B batch, H heads, S tokens, T visual tokens, N visual blocks, D head dim, `n` a query
block.
"""
