"""What depends on parameters only becomes one constant: which, under which name, and what not."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.nn.utils.parametrizations import weight_norm
from torch.utils._python_dispatch import TorchDispatchMode

from fxq.canonicalize import canonicalize
from fxq.capturing import capture
from fxq.constants import Constants, constant_value
from fxq.graph import is_constant

ATEN = torch.ops.aten


class Part(nn.Module):
    """A module whose function computes with its parameters `w` `[8, 8]`, `b` `[4]`, `h` half."""

    def __init__(self, function: Callable[["Part", Tensor], Tensor]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.function = function
        self.w = nn.Parameter(torch.randn(8, 8, generator=generator))
        self.b = nn.Parameter(torch.randn(4, generator=generator))
        self.h = nn.Parameter(torch.randn(8, 8, generator=generator).half())
        self.normed = weight_norm(nn.Linear(8, 8))
        self.register_buffer("table", torch.randn(9, generator=generator))
        self.register_buffer("index", torch.randint(0, 9, (8,), generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


class Model(nn.Module):
    """A part under a name."""

    def __init__(self, function: Callable[[Part, Tensor], Tensor]) -> None:
        super().__init__()
        self.part = Part(function)

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x)


def captured(function: Callable[[Part, Tensor], Tensor]) -> tuple[GraphModule, Model]:
    """Capture a model with a free batch, and compare both on other data."""
    model = Model(function).eval()
    gm = capture(model, torch.randn(3, 8)).graph_module
    x = torch.randn(5, 8)
    with torch.no_grad():
        assert torch.equal(gm(x)[0], model(x))
    return gm, model


def constants(gm: GraphModule) -> list[str]:
    return [str(n.target) for n in gm.graph.nodes if "_constant" in str(n.target)]


MADE = {
    "bias of parts": (
        lambda m, x: F.linear(x, m.w, torch.cat([m.b, torch.zeros_like(m.b)])),
        "part.b_constant",
    ),
    "one plus weight": (lambda m, x: x * (1.0 + m.w[0]), "part.w_constant"),
    "buffer and weight": (lambda m, x: x + m.table[1:] * m.w[0], "part.w_constant"),
    "weight norm": (lambda m, x: m.normed(x), "part.normed.weight_constant"),
    "cast": (lambda m, x: F.linear(x, m.h.float()), "part.h_constant"),
    "part of a weight": (lambda m, x: F.linear(x, m.w.chunk(2)[1]), "part.w_constant"),
    "product of weights": (lambda m, x: F.linear(x, m.w @ m.w), "part.w_constant"),
    "view of what is computed": (lambda m, x: F.linear(x, (m.w + 1).t()), "part.w_constant"),
    "reshape that copies": (
        lambda m, x: F.linear(x, m.w.t().reshape(2, 4, 8).flatten(0, 1)),
        "part.w_constant",
    ),
    "einsum": (
        lambda m, x: torch.einsum("bc,hcd->bhd", x, m.w.reshape(2, 8, 4)),
        "part.w_constant",
    ),
}


@pytest.mark.parametrize("name", MADE)
def test_what_is_made_of_parameters_becomes_a_named_parameter(name: str) -> None:
    function, constant = MADE[name]

    gm, _ = captured(function)

    assert constants(gm) == [constant]
    assert constant in dict(gm.named_parameters())
    left = {"linear", "mul", "add", "reshape", "sym_size"}
    operators = [n.target._opname for n in gm.graph.nodes if n.op == "call_function"]
    assert set(operators) <= left
    assert sum(name in ("linear", "mul", "add") for name in operators) == 1


def test_what_is_made_of_buffers_becomes_a_buffer() -> None:
    gm, _ = captured(lambda m, x: x + m.table[m.index])

    assert constants(gm) == ["part.table_constant"]
    assert "part.table_constant" in dict(gm.named_buffers())


@pytest.mark.parametrize(
    ("function", "made"),
    [
        (lambda m, x: m.normed(m.normed(x)), 1),
        (lambda m, x: F.linear(F.linear(x, m.w + 1), m.w + 1), 1),
        (lambda m, x: (lambda w: F.linear(F.linear(x, w), w * w))(m.w + 1), 2),
    ],
    ids=["a module called twice", "written twice", "part of another"],
)
def test_what_is_shared_is_made_once(function: Callable[[Part, Tensor], Tensor], made: int) -> None:
    gm, _ = captured(function)

    first, second = gm.graph.find_nodes(op="call_function", target=ATEN.linear.default)
    assert len({str(n.args[1].target) for n in (first, second)}) == made
    assert len(constants(gm)) == made
    assert not gm.graph.find_nodes(op="call_function", target=ATEN.add.Tensor)


def test_numbers_of_different_types_make_different_constants() -> None:
    def function(m: Part, x: Tensor) -> Tensor:
        return x + (m.index + 1) / 3 + (m.index + 1.0) / 3 + (m.w[0] / 0.0).sign() + (m.w / -0.0)[0]

    gm, _ = captured(function)

    assert len(constants(gm)) == 4


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: F.linear(x, m.w.t()),
        lambda m, x: F.linear(x, m.w.reshape(4, 2, 8).reshape(8, 8)),
        lambda m, x: F.linear(x, m.w.permute(1, 0)),
        lambda m, x: F.linear(x, m.w[2:5]),
    ],
    ids=["t", "reshape", "permute", "slice"],
)
def test_views_share_the_models_memory(function: Callable[[Part, Tensor], Tensor]) -> None:
    gm, model = captured(function)

    with torch.no_grad():
        model.part.w.mul_(2)

    x = torch.randn(4, 8)
    with torch.no_grad():
        assert torch.equal(gm(x)[0], model(x))


def test_plain_views_stay_in_the_graph() -> None:
    gm, _ = captured(lambda m, x: F.linear(x, m.w.reshape(4, 2, 8).reshape(8, 8).t()))

    assert not constants(gm)


@pytest.mark.parametrize(
    ("function", "left"),
    [
        (lambda m, x: x[:, :1] + (m.table[:, None] * m.table).flatten(), ATEN.mul.Tensor),
        (lambda m, x: x + torch.arange(8.0) * 2, ATEN.arange.default),
        (lambda m, x: torch.cat([x, torch.zeros(0, 8)]), ATEN.zeros.default),
        (lambda m, x: F.pad(m.b, (0, 72)) + x[:, :1], ATEN.pad.default),
    ],
    ids=["outer product", "no parameter", "no element", "padding"],
)
def test_what_is_large_or_made_of_nothing_stays(
    function: Callable[[Part, Tensor], Tensor], left: object
) -> None:
    gm, _ = captured(function)

    assert gm.graph.find_nodes(op="call_function", target=left)
    assert all(tensor.numel() <= 9 for tensor in gm.state_dict().values())


@pytest.mark.parametrize(
    "random",
    [torch.rand_like, torch.bernoulli, lambda w: F.dropout(w, 0.5, training=True)],
    ids=["rand_like", "bernoulli", "dropout"],
)
def test_what_is_random_is_drawn_at_each_call(random: Callable[[Tensor], Tensor]) -> None:
    model = Model(lambda m, x: F.linear(x, random(m.w.abs().clamp(0, 1)))).eval()
    exported = torch.export.export(model, (torch.randn(3, 8),)).module(check_guards=False)

    gm = canonicalize(GraphModule(exported, exported.graph))

    x = torch.randn(3, 8)
    assert not torch.equal(gm(x), gm(x))


def test_what_the_caller_gets_is_made_anew() -> None:
    model = Model(lambda m, x: (m.w + 1).t() if x.ndim else x).eval()
    gm = capture(model, torch.randn(3, 8)).graph_module

    gm(torch.randn(3, 8))[0].zero_()

    (result,) = gm(torch.randn(3, 8))
    assert torch.equal(result, model(torch.randn(3, 8)))


def by_hand(write: bool, name: str) -> GraphModule:
    """Return a graph of `x * (counter + 1)`, that may count."""
    root, graph = nn.Module(), Graph()
    owner, _, leaf = name.rpartition(".")
    holder = root
    if owner:
        holder = nn.Module()
        root.add_module(owner, holder)
    holder.register_buffer(leaf, torch.ones(4))
    x = graph.placeholder("x")
    counter = graph.get_attr(name)
    if write:
        view = graph.call_function(ATEN.view.default, (counter, [2, 2]))
        graph.call_function(ATEN.add_.Tensor, (view, 1))
    again = graph.get_attr(name)
    factor = graph.call_function(ATEN.add.Tensor, (again, 1))
    graph.output(graph.call_function(ATEN.mul.Tensor, (x, factor)))
    for node in graph.nodes:
        node.meta["val"] = torch.empty(2, 2) if node.target is ATEN.view.default else torch.empty(4)
    return GraphModule(root, graph)


@pytest.mark.parametrize(
    ("write", "name", "made"),
    [(False, "counter", 1), (True, "counter", 0), (False, "runtime_state.counter", 0)],
)
def test_what_changes_between_calls_is_no_constant(write: bool, name: str, made: int) -> None:
    gm = canonicalize(by_hand(write, name))

    assert gm.meta["fxq_canonicalized"].get("materialize_constants", 0) == made
    if write:
        assert [gm(torch.ones(4)).tolist()[0] for _ in range(2)] == [3.0, 4.0]


def test_what_is_written_to_after_it_is_computed_is_no_constant() -> None:
    root, graph = nn.Module(), Graph()
    root.register_buffer("w", torch.ones(4))
    x = graph.placeholder("x")
    total = graph.call_function(ATEN.add.Tensor, (graph.get_attr("w"), 1))
    graph.call_function(ATEN.add_.Tensor, (total, x))
    graph.output(graph.call_function(ATEN.mul.Tensor, (x, total)))
    for node in graph.nodes:
        node.meta["val"] = torch.empty(4)

    gm = canonicalize(GraphModule(root, graph))

    assert [gm(torch.ones(4)).tolist()[0] for _ in range(2)] == [3.0, 3.0]


def test_a_runtime_state_has_no_constant_value() -> None:
    gm = by_hand(False, "runtime_state.counter")

    assert all(constant_value(node) is None for node in gm.graph.nodes)
    assert not any(map(is_constant, gm.graph.nodes))
    assert any(map(is_constant, by_hand(False, "counter").graph.nodes))


class Additions(TorchDispatchMode):
    """Counts them."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func is ATEN.add.Tensor
        return func(*args, **(kwargs or {}))


def test_a_value_is_computed_once_however_many_read_it() -> None:
    graph = Graph()
    value = graph.get_attr("w")
    for _ in range(12):
        same = graph.call_function(ATEN.clone.default, (value,))
        value = graph.call_function(ATEN.add.Tensor, (value, same))
    root = nn.Module()
    root.register_buffer("w", torch.ones(2))
    GraphModule(root, graph)

    with Additions() as counted:
        result = constant_value(value)

    assert result is not None
    assert result.tolist() == [2.0**12, 2.0**12]
    assert counted.count == 12


def doubled_twice() -> tuple[GraphModule, Node]:
    """Return a graph whose result is a constant: (w + w) * 2."""
    graph = Graph()
    w = graph.get_attr("w")
    twice = graph.call_function(ATEN.add.Tensor, (w, w))
    value = graph.call_function(ATEN.mul.Tensor, (twice, 2))
    graph.output(value)
    root = nn.Module()
    root.register_buffer("w", torch.ones(2))
    return GraphModule(root, graph), value


def test_values_of_one_walk_are_computed_once() -> None:
    _, value = doubled_twice()
    constants = Constants()

    with Additions() as counted:
        results = [constants.value(value) for _ in range(18)]
        results.append(constants.value(value.all_input_nodes[0]))

    assert counted.count == 1
    assert [result.tolist()[0] for result in results if result is not None] == [4.0] * 18 + [2.0]


def replace_buffer(gm: GraphModule, value: Node) -> None:
    gm.w = torch.full((2,), 3.0)


def replace_data(gm: GraphModule, value: Node) -> None:
    gm.w.data = torch.full((2,), 3.0)


def write(gm: GraphModule, value: Node) -> None:
    gm.w.mul_(3)


def write_to_a_view(gm: GraphModule, value: Node) -> None:
    gm.w[:1].mul_(3)


def change_an_argument(gm: GraphModule, value: Node) -> None:
    value.update_arg(1, 6)


def change_a_node_in_front(gm: GraphModule, value: Node) -> None:
    value.all_input_nodes[0].target = ATEN.mul.Tensor


def put_a_node_between(gm: GraphModule, value: Node) -> None:
    source = value.all_input_nodes[0]
    with gm.graph.inserting_before(value):
        value.replace_input_with(source, gm.graph.call_function(ATEN.mul.Tensor, (source, 3)))


def depend_on_an_input(gm: GraphModule, value: Node) -> None:
    w = next(iter(gm.graph.nodes))
    with gm.graph.inserting_before(w):
        w.replace_all_uses_with(gm.graph.placeholder("x"))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (replace_buffer, 12.0),
        (replace_data, 12.0),
        (write, 12.0),
        (write_to_a_view, 12.0),
        (change_an_argument, 12.0),
        (change_a_node_in_front, 2.0),
        (put_a_node_between, 12.0),
        (depend_on_an_input, None),
    ],
)
def test_a_value_does_not_outlive_what_it_was_made_of(
    change: Callable[[GraphModule, Node], None], expected: float | None
) -> None:
    gm, value = doubled_twice()
    constants = Constants()
    assert constants.value(value) is not None

    change(gm, value)

    result = constants.value(value)
    assert (None if result is None else result.tolist()[0]) == expected


def test_a_write_to_an_inference_tensor_is_seen() -> None:
    gm, value = doubled_twice()
    constants = Constants()
    with torch.inference_mode():
        gm.w = torch.ones(2)
        constants.value(value)
        gm.w.mul_(3)
        result = constants.value(value)

    assert result is not None
    assert result.tolist() == [12.0, 12.0]
