"""Key padding: from a mask in the graph to the number of valid text tokens.

Sparse attention knows one kind of mask: some text tokens at the end of the text are padding. A mask
`[B, 1, 1, S]` says so if it keeps every visual token and a prefix of the text. That is proved for
text after the visual tokens where `fxq.analysis.masks` finds how many keys it shows; for anything
else it takes the user's word. The count is a sum in the graph, so nothing waits for the device.
"""

import torch
from torch.fx import Node

from fxq.analysis.masks import Masks
from fxq.graph import args_of, dtype_of, shape_of
from fxq.layer import Skip
from fxq.passes.rectified_spaattn.segments import Segments
from fxq.rewriting import insert_call

aten = torch.ops.aten


def valid_text(
    mask: Node | None, masks: Masks, segments: Segments, word: bool, before: Node
) -> Node | Skip | None:
    """Insert the number of valid text tokens of each sample `[B]`, int32, or say why not.

    Args:
        mask: attention's mask.
        masks: answers about it.
        segments: of its sequence.
        word: the user vouches for every mask (`TokenLayout.prefix_masks`).
        before: the attention, in front of which to insert.
    Returns:
        None where nothing is masked.
    """
    if mask is None or masks.hides_nothing(mask):
        return None
    shape = shape_of(mask)
    batch = shape_of(args_of(before)[0])[0]
    is_bool = dtype_of(mask) == torch.bool
    if not is_bool or len(shape) != 4 or shape != (batch, 1, 1, segments.size):
        return Skip(
            f"its mask is not key padding: expected bool [{batch}, 1, 1, {segments.size}], found "
            f"{dtype_of(mask)} {list(shape)}"
            + ("; TokenLayout(prefix_masks=True) is about the former only" if word else ""),
            intended=False,
        )
    if not segments.text_size:
        return Skip("its mask hides visual tokens: there is no text to be padded", intended=False)
    if not word and not _is_prefix(mask, masks, segments):
        return Skip(
            "its mask [B, 1, 1, S] cannot be proved to keep all visual tokens and a prefix of the "
            "text; if it does, say so with TokenLayout(prefix_masks=True)",
            intended=False,
        )
    flat = insert_call(aten.select.int, (mask, 1, 0), before=before)
    flat = insert_call(aten.select.int, (flat, 1, 0), before=before)  # [B, S]
    start = segments.text_start
    text = insert_call(
        aten.slice.Tensor, (flat, 1, start, start + segments.text_size), before=before
    )
    return insert_call(aten.sum.dim_IntList, (text, [1]), {"dtype": torch.int32}, before=before)


def _is_prefix(mask: Node, masks: Masks, segments: Segments) -> bool:
    """Tell whether a mask provably keeps all visual tokens and a prefix of the text."""
    if segments.text_start == 0:
        return False  # a prefix of the whole sequence would hide visual tokens
    shown = masks.shows_at_least(mask)
    return shown is not None and shown >= segments.n_visual
