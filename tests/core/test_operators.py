"""The table of operators: what it says of each is true of torch's own results."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.utils._pytree import tree_leaves

from fxq.canonicalize import canonicalize
from fxq.operators import (
    CANONICAL,
    SPATIAL_AXES,
    TABLE,
    Movement,
    multiplied,
    of,
    operand,
    set_operand,
)

ATEN = torch.ops.aten
X = torch.arange(1.0, 25.0).reshape(1, 4, 6).clone()  # no view: `detach_` takes none
IMAGE, MATRIX = X.reshape(1, 4, 2, 3), X.reshape(4, 6)
# What operators that move elements are called with where `(X,)` will not do.
CALLS: dict[Any, tuple[Any, ...]] = {
    ATEN.reshape.default: (X, [6, 4]), ATEN.view.default: (X, [6, 4]),
    ATEN._unsafe_view.default: (X, [6, 4]), ATEN.flatten.using_ints: (X, 1, 2),
    ATEN.unflatten.int: (X, 2, [2, 3]), ATEN.squeeze.dim: (X, 0), ATEN.squeeze.dims: (X, [0]),
    ATEN.unsqueeze.default: (X, 1), ATEN.permute.default: (X, [2, 0, 1]),
    ATEN.transpose.int: (X, 1, 2), ATEN.t.default: (MATRIX,), ATEN.numpy_T.default: (MATRIX,),
    ATEN.matrix_H.default: (MATRIX,), ATEN.expand.default: (X, [3, 4, 6]),
    ATEN.movedim.int: (X, 0, 2), ATEN.select.int: (X, 1, 2), ATEN.slice.Tensor: (X, 2, 1, 5, 2),
    ATEN.narrow.default: (X, 2, 1, 3), ATEN.cat.default: ([X, X], 1),
    ATEN.stack.default: ([X, X], 1), ATEN.repeat.default: (X, [2, 1, 1]),
    ATEN.repeat_interleave.self_int: (X, 2, 1), ATEN.roll.default: (X, [2], [1]),
    ATEN.flip.default: (X, [1]), ATEN.pixel_shuffle.default: (IMAGE, 2),
    ATEN.pixel_unshuffle.default: (IMAGE.reshape(1, 1, 4, 6), 2), ATEN.split.Tensor: (X, 2, 1),
    ATEN.split_with_sizes.default: (X, [1, 3], 1), ATEN.chunk.default: (X, 2, 1),
    ATEN.unbind.int: (X, 1), ATEN.slice_scatter.default: (X, X[:, :2], 1, 0, 2),
    ATEN.select_scatter.default: (X, X[:, 0], 1, 2), ATEN.to.dtype: (X, torch.float64),
    ATEN.to.device: (X, "cpu", torch.float32), ATEN.to.dtype_layout: (X,),
    ATEN.type_as.default: (X, X.double()), ATEN.dropout.default: (X, 0.5, False),
    ATEN.feature_dropout.default: (X, 0.5, False),
}  # fmt: skip
IN_ORDER = (Movement.VIEW, Movement.RESHAPE, Movement.COPY, Movement.DROPOUT)
ONE_TO_ONE = (*IN_ORDER, Movement.TRANSPOSE, Movement.ADJOINT, Movement.SPLIT)
MOVES = (*ONE_TO_ONE, Movement.EXPAND, Movement.REARRANGE, Movement.SCATTER)


def test_an_operator_is_in_the_table_once() -> None:
    listed = [target for movement in Movement for target in movement.value]

    assert len(listed) == len(set(listed)) == len(TABLE)
    assert len({movement.name for movement in Movement}) == len(Movement.__members__)


@pytest.mark.parametrize("target", sorted(of(*MOVES), key=str), ids=str)
def test_elements_of_the_result_are_an_operands(target: Any) -> None:
    movement = TABLE[target]
    args = CALLS.get(target, (X,))

    result = torch.cat([part.flatten() for part in tree_leaves(target(*args))])

    assert set(result.tolist()) <= set(X.flatten().tolist())
    if movement in ONE_TO_ONE:
        assert sorted(result.tolist()) == X.flatten().tolist()
    if movement in IN_ORDER:
        assert result.tolist() == X.flatten().tolist()


@pytest.mark.parametrize("target", sorted(of(Movement.RELU), key=str), ids=str)
def test_a_positive_factor_comes_out_of_relu(target: Any) -> None:
    x = torch.linspace(-3, 3, 7)

    assert torch.equal(target(4 * x), 4 * target(x))


@pytest.mark.parametrize("target", sorted(of(*SPATIAL_AXES), key=str), ids=str)
def test_spatial_operators_work_over_as_many_axes_as_the_table_says(target: Any) -> None:
    axes = SPATIAL_AXES[TABLE[target]]
    x = torch.randn(2, 3, *[4] * axes)
    size = [2] * axes
    if "upsample" in str(target):
        args: tuple[Any, ...] = (x, size, *[False] * ("bilinear" in str(target)), None)
    else:
        args = (x, size)

    result = target(*args)

    assert result.shape == (2, 3, *size)
    each = torch.stack([target(x[:, c : c + 1], *args[1:])[:, 0] for c in range(3)], 1)
    assert torch.equal(result, each)


def node_of(target: Any, *args: Any, **kwargs: Any) -> Node:
    graph = Graph()
    x = graph.placeholder("x")
    return graph.call_function(target, (x, *args), kwargs)


def test_an_operand_is_found_wherever_it_was_given() -> None:
    attention = ATEN.scaled_dot_product_attention.default
    positional = node_of(attention, 1, 2, 3, 0.5, scale=4.0)
    keyword = node_of(attention, 1, 2, attn_mask=3, dropout_p=0.5)
    left_out = node_of(attention, 1, 2)

    found = [
        [operand(node, name) for name in ("attn_mask", "dropout_p", "is_causal", "scale")]
        for node in (positional, keyword, left_out)
    ]

    assert found == [[3, 0.5, False, 4.0], [3, 0.5, False, None], [None, 0.0, False, None]]
    assert operand(node_of(ATEN.conv2d.default, 1), "stride") == [1, 1]


def test_an_operand_that_the_operator_lacks_has_the_default_given_or_raises() -> None:
    node = node_of(ATEN.rms_norm.default, [8])

    assert operand(node, "bias", None) is None
    with pytest.raises(KeyError, match=r"expected an operand 'bias' of aten\.rms_norm"):
        operand(node, "bias")


def test_an_operand_is_set_by_name() -> None:
    norm = node_of(ATEN.layer_norm.default, [8])
    keyword = node_of(ATEN.linear.default, 1, bias=2)

    set_operand(norm, "bias", 3)
    set_operand(keyword, "bias", 4)
    set_operand(keyword, "weight", 5)

    assert norm.args[1:] == ([8], None, 3)
    assert (keyword.args[1:], keyword.kwargs) == ((5, 4), {})


def test_what_is_multiplied_does_not_include_what_is_added() -> None:
    assert multiplied(node_of(ATEN.addmm.default, 1, 2)) == (1, 2)
    assert multiplied(node_of(ATEN.bmm.default, 1))[1] == 1
    assert multiplied(node_of(ATEN.linear.default, 1, 2))[1] == 1


@pytest.mark.parametrize("target", sorted(CANONICAL, key=str), ids=str)
def test_canonicalisation_keeps_the_promise_of_the_table(target: Any) -> None:
    graph = Graph()
    x = graph.placeholder("x")
    y = graph.call_function(target, (x, *CALLS.get(target, (X,))[1:]))
    total = graph.call_function(ATEN.relu.default, (x if CANONICAL[target] == "nothing" else y,))
    graph.output(total)
    value: Tensor = CALLS.get(target, (X,))[0]
    for node, fake in zip(graph.nodes, (value, target(*CALLS.get(target, (X,)))), strict=False):
        node.meta["val"] = fake
    total.meta["val"] = torch.relu(x.meta["val"] if y.meta["val"] is None else y.meta["val"])
    expected = total.meta["val"]

    gm = canonicalize(GraphModule(nn.Module(), graph))

    names = [node.target._opname for node in gm.graph.nodes if node.op == "call_function"]
    kept = [] if CANONICAL[target] in ("its input", "nothing") else [CANONICAL[target]]
    assert names == [*kept, "relu"]
    assert torch.equal(gm(value), expected)
