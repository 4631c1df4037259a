"""Programs inside a model: they stay as they are, and the rest of the model is quantized."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from written_again import W4A8, Decisions, by_hand

import fxq
from fxq import backend
from fxq.numerics import sqnr_db
from fxq.passes import w8a8
from fxq.passes.common import Convert, InsertObservers
from fxq.pipeline import Recipe


class Around(nn.Module):
    """A program between two linears of its own."""

    def __init__(self, *inner: nn.Module) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 64), nn.Linear(64, 64)
        self.inner = nn.ModuleList(inner)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for module in self.inner:
            x = module(x)
        return self.last(x)


class Named(nn.Module):
    """An attribute called as a program's own is."""

    def __init__(self) -> None:
        super().__init__()
        self.graph_module = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.graph_module(x)


def test_an_attribute_named_graph_module_is_quantized(decisions: Decisions) -> None:
    model, (x, *_) = Named().eval(), [torch.randn(16, 64)]
    compiled = torch.compile(model, backend="fxq", options={"strict": True})

    with torch.no_grad():
        found = sqnr_db(model(x), compiled(x))

    assert len(decisions[0]) == 1
    assert 25 < found < 60  # 8 bits: neither float nor wrong


@pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_programs_inside_a_model_stay_and_the_rest_is_quantized(
    count: int, decisions: Decisions
) -> None:
    x, w4a8 = torch.randn(16, 64), Recipe("w4a8", (InsertObservers(W4A8), Convert()))
    inner = [nn.Linear(64, 64).eval() for _ in range(count)]
    programs = [fxq.compress(module, x, w4a8) for module in inner]
    model = Around(*programs).eval()
    compiled = torch.compile(model, backend="fxq", fullgraph=True, options={"strict": True})

    with torch.no_grad():
        found = compiled(x)

        # 8 bits outside, 4-bit weights inside, as defined.
        expected = by_hand(x, model.first)
        for module in inner:
            expected = by_hand(expected, module, bits=4)
        expected = by_hand(expected, model.last)
    # Measured 132 dB; 42 dB and less with any of the layers float or in other bits.
    assert sqnr_db(expected, found) > 60
    assert len(decisions[0]) == count + 2


def pickled(program: fxq.Program) -> fxq.Program:
    return pickle.loads(pickle.dumps(program))  # type: ignore[no-any-return]


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copied_program_is_known_too(copied: Any, decisions: Decisions) -> None:
    x = torch.randn(16, 64)
    program = copied(fxq.compress(nn.Linear(64, 64).eval(), x, w8a8.DYNAMIC))
    model = Around(program).eval()

    with torch.no_grad():
        found = torch.compile(model, backend="fxq", options={"strict": True})(x)
        expected = by_hand(program(by_hand(x, model.first)), model.last)

    assert sqnr_db(expected, found) > 60


def test_what_a_program_left_float_stays_float(decisions: Decisions) -> None:
    x, nothing = torch.randn(16, 64), Recipe("nothing", (InsertObservers(None), Convert()))
    program = fxq.compress(nn.Linear(64, 64).eval(), x, nothing)
    model = Around(program).eval()
    compiled = torch.compile(model, backend="fxq", options={"strict": True})

    with torch.no_grad():
        found = compiled(x)
        expected = by_hand(program(by_hand(x, model.first)), model.last)

    assert sqnr_db(expected, found) > 60
    assert len(decisions[0]) == 2


@pytest.fixture
def _uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of Inductor's code, the graph that it would get."""
    monkeypatch.setattr(backend, "compile_fx", lambda gm, inputs, **kwargs: gm)


@pytest.mark.filterwarnings("ignore:no kernel here")
@pytest.mark.usefixtures("_uncompiled")
@pytest.mark.parametrize("recipe", ["float", "w8a8_dynamic", "magnitude_50"])
@pytest.mark.parametrize("one_code", [False, True])
def test_after_a_refused_call_programs_stay_as_they_are(one_code: bool, recipe: str) -> None:
    x = torch.randn(48, 64)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)).eval()
    first, second = (fxq.compress(model, x, recipe) for _ in range(2))
    if one_code:  # Dynamo then leaves the second one's frame alone, too, and begins with its graph
        type(second).forward = type(first).forward  # type: ignore[method-assign]
    refused = torch.compile(first, backend="fxq")

    with pytest.raises(ValueError, match=r"expected torch.float32 .* found torch.float64"):
        refused(x.double())

    for program in (first, second):
        compiled = torch.compile(program, backend="fxq")
        with torch.no_grad():
            assert sqnr_db(program(x), compiled(x)) > 100


@pytest.mark.filterwarnings("ignore:no kernel here")
@pytest.mark.usefixtures("_uncompiled")
def test_any_number_of_programs_are_compiled_in_a_process() -> None:
    x = torch.randn(48, 64)
    programs = [fxq.compress(nn.Linear(64, 64).eval(), x, "w8a8_dynamic") for _ in range(10)]

    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True), torch.no_grad():
        for program in programs:
            compiled = torch.compile(program, backend="fxq")
            assert sqnr_db(program(x), compiled(x)) > 100


def test_a_program_is_a_program_however_it_is_copied() -> None:
    x = torch.randn(4, 64)
    program = fxq.compress(nn.Linear(64, 64).eval(), x, "w8a8_dynamic")
    copies = [copy.copy(program), copy.deepcopy(program), pickle.loads(pickle.dumps(program))]
    codes = {type(each).forward.__code__ for each in (program, *copies)}

    for each in (program, *copies):
        assert isinstance(each, fxq.Program)
        assert type(each).__base__ is fxq.Program
        assert type(each).__name__ == "Program"
        assert torch.equal(each(x), program(x))
    assert len({id(code) for code in codes}) == len(codes)


def test_a_class_of_ones_own_may_build_on_program() -> None:
    class Doubled(fxq.Program):
        def forward(self, x: Tensor, times: int = 2, *, plus: float = 0.5) -> Tensor:
            result: Tensor = super().forward(x)
            return times * result + plus

    x = torch.randn(4, 64)
    given = fxq.compress(nn.Linear(64, 64).eval(), x, "w8a8_dynamic")
    program = Doubled(given.graph_module, given.signature, given.recipe)

    assert torch.equal(program(x), 2 * given(x) + 0.5)
    assert torch.equal(copy.deepcopy(program)(x), program(x))
    assert type(copy.deepcopy(program)).__base__ is Doubled
