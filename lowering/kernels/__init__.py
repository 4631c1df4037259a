"""Triton kernels, one file each.

Letters: M rows of activations, N output channels, K input channels; tiles BM, BN, BK; `x`
activations, `w` weight, `acc` accumulator, `offs_` offsets, `mask_` masks, `_ptr` pointers.
"""
