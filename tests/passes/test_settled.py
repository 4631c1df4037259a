"""Passes leave settled nodes alone, and the account shows them as they are."""

import torch
from models import Block
from torch.fx import GraphModule

import fxq
from fxq.account import account
from fxq.dialect import ATEN
from fxq.graph import SETTLED, is_op, mark_for_dynamo, settle_marked
from fxq.layer import Skip, treat
from fxq.passes import w8a8
from fxq.passes.common import FIRST, LAST, Convert, DecomposeAttention, InsertObservers
from fxq.passes.rectified_spaattn import ReplaceAttention

ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


def settled_program() -> GraphModule:
    """A quantized graph as `torch.compile` finds it in a model: marked, its meta lost but for what
    Dynamo copies."""
    gm = fxq.compress(Block().eval(), torch.randn(2, 8, 64), w8a8.DYNAMIC).graph_module
    (attention,) = [n for n in gm.graph.nodes if is_op(n, ATTENTION)]
    treat(attention, "test", Skip("the program's own reason", intended=True))
    mark_for_dynamo(gm)
    for node in gm.graph.nodes:
        node.meta = {k: v for k, v in node.meta.items() if not k.startswith("fxq_")}
    settle_marked(gm)
    return gm


def test_quantization_and_sparsity_change_nothing() -> None:
    gm = settled_program()
    ATEN.check(gm)
    ends = ((FIRST, w8a8.DYNAMIC_LAYER), (LAST, w8a8.DYNAMIC_LAYER))
    sparse = ReplaceAttention(min_tokens=1, block_size=2)
    before = str(gm.graph), account(gm)

    for step in (
        DecomposeAttention(),
        InsertObservers(w8a8.DYNAMIC_LAYER, overrides=ends),
        Convert(),
        sparse,
    ):
        assert not step.run(gm).modified

    assert (str(gm.graph), account(gm)) == before


def test_the_account_is_the_programs() -> None:
    rows = account(settled_program())

    assert [row.format for row in rows if row.kind == "linear"] == ["int8 x int8"] * 6
    (attention,) = [row for row in rows if row.kind == "attention"]
    assert attention.skip == Skip("the program's own reason", intended=True)


def test_a_mark_stays_beside_what_others_annotated() -> None:
    gm = fxq.capture(Block().eval(), torch.randn(2, 8, 64)).graph_module
    (node,) = [n for n in gm.graph.nodes if is_op(n, ATTENTION)]
    node.meta["custom"] = {"stage": 1}

    mark_for_dynamo(gm)
    settle_marked(gm)

    assert node.meta["custom"] == {"stage": 1}
    assert node.meta[SETTLED]
