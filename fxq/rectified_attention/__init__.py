"""Rectified sparse attention: block-sparse attention corrected against an implicit full attention.

    O_i = R_n * sparse_attention_i + U_n          for every token i of query block n

Source: arXiv:2511.19835. The blocks that a query block does not visit are not forgotten: pooled
queries and keys tell how much probability they hold, `U` gives that back through their mean value,
and `R` shrinks what the visited keys got too much. Everything is defined here in fp32 and plain
torch; kernels are compared with it.

Tokens are visual or text. Visual tokens are pooled in blocks; text tokens never are: every query
sees all valid text, and text queries see everything. B batch, H heads, S tokens, T visual tokens,
N visual blocks, D head dim; a query block is `n`, a key block `m`.

Where this departs from the published code, and why:

-   Blocks count their true number of tokens: the last, shorter block of the published code is
    padded with zeros, after which a constant value no longer gives a constant output.
-   Softmax and selection are fp32, not the model's dtype, whose running sums make the number of
    blocks unstable.
-   `k` is the density times the visible blocks, rounded to nearest. The published code truncates a
    floating-point product, which gives 179 of 900 blocks at 0.2.
-   Text takes none of the k slots, because it is kept anyway: a density of 1 is dense attention. It
    does take its place in the top-p prefix.
-   Text without valid tokens, batches of different text lengths, causal attention, and grouped
    key-value heads are defined.
-   `mass="critical"` is the formula as the paper's figure has it: rows then sum to less than one
    where a block fails the gate. `mass="complement"` is the published code.
-   `mode="online"` is not in the paper: blocks left out enter the same softmax, token by token, as
    one pseudo-key each.
-   `center_keys` is not in the paper: softmax does not see a constant added to every key, but the
    gate does; subtracting the mean key first removes that.
"""
