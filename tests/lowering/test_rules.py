"""Lowering as a list of rules: which one takes a node, what is said of those that decline, and that
a distribution adds a kernel and a device without a change to fxq. Judges: eager modules with whole
numbers for weights, which no order of summing changes."""

import importlib.metadata
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

import fxq
from fxq.errors import PassError
from fxq.graph import is_op
from fxq.lowering import devices, lower, lower_linear
from fxq.lowering.rule import Decision, Device, Lowering, Rule, close
from fxq.rewriting import insert_call

CPU = torch.device("cpu")

FOO = '''
"""A distribution of someone else: a product with 8-bit weights for any CPU, and a device."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fxq.graph import args_of, is_op
from fxq.rewriting import insert_call
from fxq.lowering.lower_linear import Int8Linear
from fxq.lowering.rule import Decision, Device, Rule

calls, error, plugged_in = [], 0.0, False


@torch.library.custom_op("fxq_foo::w8_linear", mutates_args=())
def w8_linear(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    calls.append("w8_linear")
    return (x @ codes.float().T) * scale.T + error


@w8_linear.register_fake
def _(x, codes, scale):
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


@torch.library.custom_op("fxq_foo::abacus", mutates_args=())
def abacus(x: Tensor, scale: Tensor, codes: Tensor, w_scale: Tensor) -> Tensor:
    calls.append("abacus")
    return (x.long() @ codes.long().T).float() * (scale * w_scale.T) + error


@abacus.register_fake
def _(x, scale, codes, w_scale):
    return x.new_empty((*x.shape[:-1], codes.shape[0]), dtype=torch.float32)


@dataclass(frozen=True)
class W8Linear(Rule):
    devices: ClassVar[tuple[str, ...]] = ("x86", "cpu")

    def is_for(self, node):
        dequantize = torch.ops.fxq.dequantize.default
        return is_op(node, torch.ops.aten.linear.default) and is_op(args_of(node)[1], dequantize)

    def apply(self, node, lowering):
        x, weight, *bias = args_of(node)
        if is_op(x, torch.ops.fxq.dequantize.default):
            return Decision(None, "foo multiplies float activations only")
        codes, scale, *_ = args_of(weight)
        op = torch.ops.fxq_foo.w8_linear.default
        self.replace(node, insert_call(op, (x, codes, scale), before=node))
        return Decision("foo w8_linear", "one thread")


class AbacusLinear(Int8Linear):
    def rewrite(self, layer, operands, lowering):
        o = operands
        if o.zero_point is not None or o.bias is not None:
            return Decision(None, "no bead for a zero-point or a bias")
        args = (o.codes, o.scale, o.weight, o.w_scale)
        self.replace(layer, insert_call(torch.ops.fxq_foo.abacus.default, args, before=layer))
        return Decision("abacus")

    def check(self, expected, found, kernel, value):
        return True, torch.equal(expected, found)


W8_LINEAR = W8Linear()
ABACUS = Device("abacus", lambda device: plugged_in, (AbacusLinear(),))
'''
POINTS = {"foo_linear": "fxq_foo:W8_LINEAR", "abacus": "fxq_foo:ABACUS"}


def distribute(folder: Path, name: str, source: str, points: dict[str, str]) -> None:
    """Write what `pip install` leaves of a distribution of one module."""
    (folder / f"{name}.py").write_text(source)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = ["[fxq.rules]", *(f"{key} = {value}" for key, value in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines))


@pytest.fixture(scope="module")
def distribution(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    distribute(folder, "fxq_foo", FOO, POINTS)
    return folder


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process that has lowered nothing yet."""
    devices.installed.cache_clear()
    yield
    monkeypatch.undo()
    devices.installed.cache_clear()


@pytest.fixture
def foo(distribution: Path, fresh: None, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(distribution))
    module = importlib.import_module("fxq_foo")
    module.calls.clear()
    return module


def whole_numbers() -> tuple[nn.Module, Tensor]:
    """A linear and inputs that 8 bits hold as they are: all scales are 1."""
    layer = nn.Linear(64, 16, bias=False).eval()
    layer.weight.data = torch.randint(-60, 61, (16, 64)).float()
    layer.weight.data[:, :2] = torch.tensor([127.0, 0.0])
    x = torch.randint(-127, 128, (5, 64)).float()
    x[:, :2] = torch.tensor([127.0, -127.0])
    return layer, x


@dataclass(frozen=True)
class Takes(Rule):
    """Puts `name` in the place of every linear, or declines with `why`."""

    name: str
    why: str = ""
    operator: Any = torch.ops.aten.linear.default

    def is_for(self, node: Node) -> bool:
        return is_op(node, self.operator)

    def apply(self, node: Node, lowering: Lowering) -> Decision:
        if self.why:
            return Decision(None, self.why)
        self.replace(node, insert_call(node.target, node.args, before=node))
        return Decision(self.name)


def decisions_with(*rules: Rule, monkeypatch: pytest.MonkeyPatch) -> list[Decision]:
    """Return what is decided on a linear with 8-bit weights by a device with these rules."""
    monkeypatch.setattr(lower, "device_at", lambda _: Device("mine", lambda _: True, rules))
    layer, x = whole_numbers()
    _, decisions = lower.lower(fxq.compress(layer, x, "w8").graph_module, CPU)
    return list(decisions.values())


def test_the_first_rule_for_an_operator_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    other = Takes("gelu", operator=torch.ops.aten.gelu.default)

    found = decisions_with(other, Takes("first"), Takes("second"), monkeypatch=monkeypatch)

    assert found == [Decision("first")]


def test_what_a_rule_declines_the_next_one_takes_and_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rules = (Takes("a", why="too odd"), Takes("b", why="too odd"), Takes("c"), Takes("d"))

    assert decisions_with(*rules, monkeypatch=monkeypatch) == [Decision("c", "too odd")]


def test_where_all_decline_all_reasons_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = (Takes("a", why="too odd"), Takes("b", why="too small"))

    found = decisions_with(*rules, monkeypatch=monkeypatch)

    assert found == [Decision(None, "too odd; too small")]


def test_an_operator_without_a_rule_is_declined_with_a_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (decision,) = decisions_with(monkeypatch=monkeypatch)

    assert decision.kernel is None
    assert "weight-only" in decision.reason


@dataclass(frozen=True)
class Returns(Takes):
    """Replaces nothing, and returns what it is given."""

    returned: Any = None

    def apply(self, node: Node, lowering: Lowering) -> Decision:
        return self.returned  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (None, TypeError, "expected apply.. to return a Decision for linear, found None"),
        ("kernel", TypeError, "found 'kernel'"),
        (Decision("ghost"), PassError, "expected the kernel 'ghost' in the place of linear"),
    ],
)
def test_a_rule_that_does_not_do_what_it_says_is_named(
    returned: Any, error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = Returns("returns", returned=returned)

    with pytest.raises(error, match=rf"rule \S+\.Returns: .*{message}"):
        decisions_with(rule, monkeypatch=monkeypatch)


def test_a_distribution_adds_a_kernel_to_the_cpu(foo: ModuleType) -> None:
    layer, x = whole_numbers()
    program = fxq.compress(layer, x, "w8")

    with torch.no_grad():
        found = torch.compile(layer, backend="fxq", options={"recipe": "w8"})(x)

    assert foo.calls == ["w8_linear"]
    assert torch.equal(found, layer(x))
    (row,) = fxq.report(program).rows
    assert (row.status, row.kernel, row.reason) == ("lowered", "foo w8_linear", "one thread")


def test_what_a_rule_of_others_declines_is_ours_to_decide(foo: ModuleType) -> None:
    layer, x = whole_numbers()

    (row,) = fxq.report(fxq.compress(layer, x, "w8a8_dynamic")).rows

    assert row.kernel is None
    assert row.reason.startswith("foo multiplies float activations only; ")


@pytest.mark.parametrize(("recipe", "kernel"), [("w8", "w8_linear"), ("w8a8_dynamic", "abacus")])
def test_a_kernel_of_others_is_verified(
    recipe: str, kernel: str, foo: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(foo, "plugged_in", kernel == "abacus")
    layer, x = whole_numbers()
    program = fxq.compress(layer, x, recipe)

    right = fxq.verify(program, x)
    monkeypatch.setattr(foo, "error", 0.5)  # outputs are in the thousands
    wrong = fxq.verify(program, x)

    assert [(check.kernel, check.ok) for check in right.checks] == [(f"fxq_foo.{kernel}", True)]
    assert [(check.kernel, check.ok) for check in wrong.checks] == [(f"fxq_foo.{kernel}", False)]


def test_a_distribution_adds_a_device(foo: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foo, "plugged_in", True)
    layer, x = whole_numbers()

    with torch.no_grad():
        found = torch.compile(layer, backend="fxq")(x)

    assert foo.calls == ["abacus"]
    assert torch.equal(found, layer(x))


def test_entry_points_are_read_at_the_first_lowering_and_once(
    fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, entry_points = [], importlib.metadata.entry_points
    layer, x = whole_numbers()

    def counting(**params: Any) -> Any:
        read.append(params["group"])
        return entry_points(**params)

    monkeypatch.setattr(importlib.metadata, "entry_points", counting)
    program = fxq.compress(layer, x, "w8a8_dynamic")
    before = read.count("fxq.rules")
    for _ in range(2):
        lower.lower(program.graph_module, CPU)

    assert (before, read.count("fxq.rules")) == (0, 1)


BAR = """
from fxq.lowering.lower_linear import Int8Linear
class Astray(Int8Linear):
    devices = ("x68",)
class AtHome(Int8Linear):
    devices = ("other",)
NOWHERE, ASTRAY, ONE, TWO = Int8Linear(), Astray(), AtHome(), AtHome()
"""


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("fxq.lowering.rule:Rule", TypeError, "expected an instance of .*Rule or Device, found"),
        ("nonexistent:RULE", ImportError, "of distribution 'bar'.*No module named 'nonexistent'"),
        ("bar:ELSEWHERE", ImportError, "has no attribute 'ELSEWHERE'"),
        ("bar:NOWHERE", ValueError, r"expected .*'cuda'.*'x86'.* found \(\)"),
        ("bar:ASTRAY", ValueError, r"expected .*'cuda'.*'x86'.* found \('x68',\)"),
    ],
)
def test_an_entry_point_that_is_no_rule_is_named(
    value: str, error: type[Exception], message: str, fresh: None,
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    distribute(tmp_path, "bar", BAR, {"odd": value})
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "bar", raising=False)

    with pytest.raises(error, match=rf"entry point 'odd' \({value}\).*{message}"):
        devices.device_at(CPU)


def test_rules_of_others_go_by_device_and_by_name_of_the_entry_point(
    fresh: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    distribute(tmp_path, "bar", BAR, {"b": "bar:TWO", "a": "bar:ONE"})
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "bar", raising=False)

    found = {device.name: device.rules for device in devices.installed()}

    bar = importlib.import_module("bar")
    assert found["other"][0] is bar.ONE
    assert found["other"][1] is bar.TWO
    assert not any(isinstance(rule, bar.AtHome) for rule in found["cuda"])


@pytest.mark.parametrize(
    ("found", "same"),
    [
        (torch.full((4, 3), 1 + 1e-7), True),
        (torch.full((4, 3), 1.001), False),
        (torch.ones(3), False),
    ],
    ids=["rounding", "error", "shape"],
)
def test_results_that_differ_by_more_than_rounding_are_told(found: Tensor, same: bool) -> None:
    assert close(torch.ones(4, 3), found) is same


@pytest.mark.parametrize(
    ("off", "accumulator_off", "verdict"),
    [(0.0, 0, (True, True)), (1.0, 0, (True, False)), (0.0, 1, (False, False))],
    ids=["right", "wrong outputs", "wrong accumulators"],
)
def test_int8_needs_equal_accumulators_and_outputs(
    off: float, accumulator_off: int, verdict: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    codes, weight = torch.tensor([[10, 20]]).to(torch.int8), torch.tensor([[1, 2]]).to(torch.int8)
    graph, unit, y = torch.fx.Graph(), torch.ones(1, 1), torch.tensor([[50.0]])  # 10 + 40
    inputs = dict(zip(map(graph.placeholder, "cwu"), (codes, weight, unit), strict=True))
    c, w, u = inputs
    kernel = graph.call_function(
        torch.ops.fxq.int8_linear.default, (c, u, None, w, u, None, torch.float32)
    )
    exact = lower_linear.accumulate
    monkeypatch.setattr(lower_linear, "accumulate", lambda *args: exact(*args) + accumulator_off)

    assert lower_linear.Int8Linear().check(y, y + off, kernel, inputs.__getitem__) == verdict
