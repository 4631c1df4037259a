"""The backend: compiled equals simulated, weights are never stale, nothing is silent."""

import gc
import subprocess
import sys
import weakref
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from models import Block, Computed
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.fx.passes.infra.pass_base import PassResult
from written_again import W4A8, Decisions, by_hand

import fxq
from fxq.dialect import ATEN, Dialect
from fxq.errors import FxqWarning
from fxq.lowering.cpu.onednn import CpuInt8
from fxq.lowering.devices import x86
from fxq.numerics import sqnr_db
from fxq.passes import w8a8
from fxq.passes.common import FIRST, Convert, InsertObservers
from fxq.pipeline import Pass, Recipe


def two_layers() -> nn.Module:
    """The least that has a norm, two layers and something to fuse between them."""
    layers = nn.LayerNorm(64), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)
    return nn.Sequential(*layers).eval()


def data(*shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(*shape, generator=generator) for _ in range(3)]


@pytest.mark.parametrize(
    "recipe", [w8a8.STATIC, w8a8.STATIC_PER_TOKEN, w8a8.DYNAMIC], ids=lambda r: r.name
)
@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str
)
def test_compiled_program_equals_the_simulated_one(
    recipe: Recipe, dtype: torch.dtype, decisions: Decisions
) -> None:
    model = Block().to(dtype).eval()
    batches = [batch.to(dtype) for batch in data(4, 5, 64)]
    program = fxq.compress(model, batches[0], recipe, batches)

    compiled = torch.compile(program, backend="fxq", fullgraph=True)
    result = compiled(batches[1])

    assert len(decisions[0]) == 6
    kernels = {decision.kernel for decision in decisions[0].values()}
    assert kernels in ({"int8_linear (oneDNN)"}, {"int8_linear (AVX2)"})
    verification = fxq.verify(program, batches[1])
    assert verification.ok, str(verification)
    assert len(verification.checks) == 6
    # End to end rounding flips codes, so only the distance to the float model is comparable: 0.5
    # dB.
    expected = model(batches[1]).detach()
    gap = sqnr_db(expected, program(batches[1])) - sqnr_db(expected, result)
    assert abs(gap) <= 0.5


def test_sizes_do_not_recompile_one_by_one(decisions: Decisions) -> None:
    program = fxq.compress(two_layers(), torch.randn(2, 5, 64), w8a8.DYNAMIC)
    compiled = torch.compile(program, backend="fxq", fullgraph=True)

    for batch in (2, 3, 5, 8, 13):
        assert compiled(torch.randn(batch, 5, 64)).shape == (batch, 5, 64)

    assert len(decisions) == 2  # the first size, then one graph for all


def test_a_float_model_is_quantized_dynamically_by_default(decisions: Decisions) -> None:
    model, (x, *_) = Block().eval(), data(4, 5, 64)

    with torch.no_grad():
        result = torch.compile(model, backend="fxq", fullgraph=True)(x)

    program = fxq.compress(model, x, w8a8.DYNAMIC)
    assert len(decisions[0]) == 6
    # The same codes; only what Inductor fuses around them rounds differently.
    assert sqnr_db(program(x), result) > 30.0
    assert sqnr_db(model(x), result) > 30.0


def test_computed_weights_are_quantized_like_any_other(decisions: Decisions) -> None:
    torch.manual_seed(0)
    model, (x, y, _) = Computed().eval(), data(4, 7, 64)

    with torch.no_grad():
        compiled = torch.compile(model, backend="fxq")
        compiled(x)
        expected, found = model(y), compiled(y)

    assert len(decisions[0]) == 3
    assert sqnr_db(expected, found) > 35.0


class LiteralMask(nn.Module):
    """Attention by hand, with a mask that is written out where it is added."""

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.tensor([[0.0, -1e9], [0.0, 0.0]]) * 2
        return torch.softmax(x @ x.transpose(-1, -2) + mask, -1) @ x


def test_tensors_written_in_the_code_have_values_under_dynamo() -> None:
    model, x = LiteralMask().eval(), torch.randn(3, 2, 8)

    with torch.no_grad(), pytest.warns(FxqWarning):
        found = torch.compile(model, backend="fxq")(x)

    torch.testing.assert_close(found, model(x))


def test_a_weight_changed_in_place_is_seen(decisions: Decisions) -> None:
    model, (x, *_) = nn.Sequential(nn.Linear(64, 32)).eval(), data(16, 64)
    with torch.no_grad():
        compiled = torch.compile(model, backend="fxq")
        before = compiled(x)

        model[0].weight.mul_(2.0)
        model[0].bias.mul_(2.0)
        with pytest.warns(FxqWarning, match="changed in place: compiling again"):
            after = compiled(x)

    torch.testing.assert_close(after, before * 2)


def test_a_program_changed_in_place_is_seen(decisions: Decisions) -> None:
    x = torch.randn(16, 64)
    program = fxq.compress(nn.Linear(64, 32, bias=False).eval(), x, w8a8.DYNAMIC)
    compiled = torch.compile(program, backend="fxq")
    before = compiled(x)

    (scale,) = [b for name, b in program.named_buffers() if name.endswith("weight_scale")]
    scale.mul_(2.0)

    with pytest.warns(FxqWarning, match="changed in place"):
        torch.testing.assert_close(compiled(x), before * 2)


@pytest.mark.parametrize("nested", [False, True])
def test_a_program_with_nothing_quantized_stays_as_it_is(
    nested: bool, decisions: Decisions
) -> None:
    x = torch.randn(16, 64)
    nothing = Recipe("nothing", (InsertObservers(None), Convert()))
    program = fxq.compress(nn.Linear(64, 32).eval(), x, nothing)

    compiled = torch.compile(
        nn.Sequential(program, nn.ReLU()) if nested else program, backend="fxq"
    )

    expected = program(x).relu() if nested else program(x)
    torch.testing.assert_close(compiled(x), expected)
    assert decisions == [{}]


def test_one_graph_serves_modules_with_different_weights(decisions: Decisions) -> None:
    blocks = [nn.Linear(64, 64).eval() for _ in range(3)]
    x = torch.randn(16, 64)
    for block in blocks:
        block.compile(backend="fxq")

    with torch.no_grad():
        for block in blocks:
            expected = nn.functional.linear(x, block.weight, block.bias)
            assert sqnr_db(expected, block(x)) > 30.0


def test_the_users_model_is_left_as_it_was(decisions: Decisions) -> None:
    model, x = two_layers(), torch.randn(2, 5, 64)
    before = {
        name: (p.clone(), p._version, p.requires_grad) for name, p in model.named_parameters()
    }

    with torch.no_grad():
        torch.compile(model, backend="fxq")(x)

    for name, p in model.named_parameters():
        value, version, requires_grad = before[name]
        assert torch.equal(p, value)
        assert (p._version, p.requires_grad) == (version, requires_grad)


def test_outputs_without_a_gradient_are_warned_of(decisions: Decisions) -> None:
    with pytest.warns(FxqWarning, match="outputs carry no gradient"):
        torch.compile(nn.Linear(8, 8).eval(), backend="fxq")(torch.randn(2, 8))


def test_an_input_that_requires_grad_is_refused() -> None:
    compiled = torch.compile(nn.Linear(8, 8).eval(), backend="fxq")

    with pytest.raises(BackendCompilerFailed, match="found an input that requires grad"):
        compiled(torch.randn(2, 8, requires_grad=True))


def test_train_mode_is_refused() -> None:
    compiled = torch.compile(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)), backend="fxq")

    with pytest.raises(BackendCompilerFailed, match=r"model\.eval\(\)"), torch.no_grad():
        compiled(torch.randn(2, 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recpie": "w8"}, r"no option 'recpie'; did you mean 'recipe'"),
        ({"recipe": "w8a8_dynamc"}, r"unknown recipe 'w8a8_dynamc'; did you mean 'w8a8_dynamic'"),
        ({"recipe": "w8a8_static"}, r"needs calibration data, which torch.compile cannot give"),
        ({"recipe": 8}, r"expected an fxq Recipe or the name of one, found int"),
    ],
)
def test_wrong_options_are_refused_with_what_to_do(
    options: dict[str, object], message: str
) -> None:
    compiled = torch.compile(nn.Linear(8, 8).eval(), backend="fxq", options=options)

    with pytest.raises(BackendCompilerFailed, match=message), torch.no_grad():
        compiled(torch.randn(2, 8))


def test_a_recipe_can_be_chosen_by_value(decisions: Decisions) -> None:
    model, x = nn.Linear(64, 32).eval(), torch.randn(4, 64)
    recipe = Recipe("w4a8", (InsertObservers(W4A8), Convert()))
    compiled = torch.compile(model, backend="fxq", options={"recipe": recipe})

    with torch.no_grad():
        assert sqnr_db(by_hand(x, model, bits=4), compiled(x)) > 60.0


@pytest.mark.parametrize("name", ['a"b', "a\nb", "a\\b", "class"])
def test_a_name_that_cannot_be_in_code_is_compiled(name: str) -> None:
    model, x = nn.Sequential(), torch.randn(256, 512)
    model.add_module(name, nn.Linear(512, 512))
    compiled = torch.compile(model.eval(), backend="fxq")

    with torch.no_grad():
        assert 30 < sqnr_db(model(x), compiled(x)) < 60  # in 8 bits


def test_strict_raises_where_there_is_no_kernel() -> None:
    program = fxq.compress(nn.Linear(8, 8).eval(), torch.randn(2, 8), w8a8.DYNAMIC)
    compiled = torch.compile(program, backend="fxq", options={"strict": True})

    with pytest.raises(BackendCompilerFailed, match=r"no kernel here for[\s\S]*too small"):
        compiled(torch.randn(2, 8))


def test_a_layer_that_would_not_gain_stays_float(
    decisions: Decisions, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = x86.Thresholds(16 * 64 * 128, 1 << 30)  # multiply-adds of the second layer
    monkeypatch.setattr(x86, "WITH_VNNI", limits)
    monkeypatch.setattr(x86, "WITHOUT_VNNI", limits)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 128), nn.Linear(128, 32)).eval()
    x = torch.randn(16, 64)

    told = r"'w8a8_dynamic' left 2 of 3 layers as they were.*too small for int8 to pay"
    with pytest.warns(FxqWarning, match=told), torch.no_grad():
        found = torch.compile(model, backend="fxq")(x)

    with torch.no_grad():
        expected = model[2](by_hand(model[0](x), model[1]))
    assert sqnr_db(expected, found) > 60  # measured 130 dB; 38 dB with the others quantized too


@pytest.fixture
def without_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor for which there are no kernels, as ARM's are."""
    nothing = CpuInt8(available=False, convolves=False, saturates=False)
    monkeypatch.setattr(x86, "cpu_int8", lambda: nothing)


@pytest.mark.parametrize("recipe", ["w8a8_dynamic", "w8"])
def test_where_nothing_gains_a_model_stays_float(recipe: str, without_int8: None) -> None:
    model, x = two_layers(), torch.randn(2, 5, 64)
    compiled = torch.compile(model, backend="fxq", options={"recipe": recipe})

    why = "weight-only" if recipe == "w8" else "no int8 kernel for cpu"
    told = rf"'{recipe}' changed nothing and left 2 of 2 layers .*: {why}.* \(2\)$"
    with pytest.warns(FxqWarning, match=told) as warned, torch.no_grad():
        found = compiled(x)

    assert len([w for w in warned if w.category is FxqWarning]) == 1
    torch.testing.assert_close(found, model(x), rtol=1e-5, atol=1e-5)


def test_an_override_may_name_layers_that_stay_float(without_int8: None) -> None:
    model, x = Block().eval(), torch.randn(2, 5, 64)
    overrides = (("up", W4A8), (FIRST, None))
    recipe = Recipe("named", (InsertObservers(W4A8, overrides=overrides), Convert()))

    with pytest.warns(FxqWarning, match="changed nothing and left 3 of 3 layers"), torch.no_grad():
        found = torch.compile(model, backend="fxq", options={"recipe": recipe})(x)

    torch.testing.assert_close(found, model(x), rtol=1e-5, atol=1e-5)


def test_strict_raises_where_a_layer_of_a_model_would_stay_float(without_int8: None) -> None:
    compiled = torch.compile(nn.Linear(64, 64).eval(), backend="fxq", options={"strict": True})

    refused = pytest.raises(BackendCompilerFailed, match=r"no kernel here for\n.*no int8")
    with refused, torch.no_grad():
        compiled(torch.randn(2, 64))


def test_a_program_without_kernels_computes_what_was_simulated_and_says_so(
    without_int8: None,
) -> None:
    model, x = two_layers(), torch.randn(2, 5, 64)
    program = fxq.compress(model, x, w8a8.DYNAMIC)
    compiled = torch.compile(program, backend="fxq")

    with pytest.warns(FxqWarning, match=r"no kernel here for 2 of 2 layers.* slower than in float"):
        found = compiled(x)

    assert sqnr_db(program(x), found) > sqnr_db(model(x), found) + 3  # rounding may flip codes
    assert "no kernel on cpu for 2 layers" in " ".join(str(fxq.report(program)).split())
    program.get_buffer("graph_module.0.weight").mul_(1.0)
    with pytest.warns(FxqWarning) as again:
        compiled(x)
    assert ["changed in place" in str(w.message) for w in again] == [True]  # told once


FRESH = """
import torch
from torch import nn
torch.manual_seed(0)
model = nn.Linear(64, 64).eval()
x = torch.randn(16384, 64)
with torch.no_grad():
    y = torch.compile(model, backend="fxq")(x)
    z = model(x)
assert 25 < 10 * torch.log10(z.square().sum() / (z - y).square().sum()) < 60
print("ok")
"""


def test_the_backend_is_found_in_a_fresh_process_without_import_fxq() -> None:
    command = [sys.executable, "-W", "ignore", "-c", FRESH]
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert done.stdout.strip() == "ok", done.stderr[-2000:]


def test_import_fxq_loads_neither_triton_nor_inductor() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import fxq; "
        "print(sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "['fxq']"


def test_a_recipe_that_finds_nothing_to_do_warns_and_logs_why(
    caplog: pytest.LogCaptureFixture,
) -> None:
    compiled = torch.compile(nn.Conv1d(4, 4, 3).eval(), backend="fxq")
    caplog.set_level("INFO", "fxq.backend")

    told = pytest.warns(FxqWarning, match=r"changed nothing[\s\S]*quantizes linear only")
    with told, torch.no_grad():
        compiled(torch.randn(2, 4, 16))

    assert any("quantizes linear only" in record.message for record in caplog.records)


@dataclass(frozen=True)
class Stateful(Pass):
    """A pass whose state is to be set between calls."""

    reads: ClassVar[Dialect] = ATEN
    writes: ClassVar[Dialect] = ATEN

    @property
    def needs_program(self) -> bool:
        return True

    def run(self, gm: torch.fx.GraphModule) -> PassResult:
        return PassResult(gm, modified=False)


def test_a_recipe_with_state_needs_a_program(decisions: Decisions) -> None:
    recipe = Recipe("stateful", (Stateful(), *w8a8.DYNAMIC.passes))
    model, x = nn.Linear(64, 64).eval(), torch.randn(4, 64)
    with pytest.raises(BackendCompilerFailed, match=r"call fxq\.compress"), torch.no_grad():
        torch.compile(model, backend="fxq", options={"recipe": recipe})(x)

    program = fxq.compress(model, x, recipe)

    assert torch.compile(program, backend="fxq")(x).shape == (4, 64)


def test_compiled_code_goes_with_the_weights_it_was_compiled_for() -> None:
    seen = []
    for _ in range(2):
        model = two_layers().requires_grad_(False)
        torch.compile(model, backend="fxq", options={"recipe": "float"})(torch.randn(2, 5, 64))
        seen.append(weakref.ref(next(model.parameters())))
        del model
    gc.collect()

    assert [reference() for reference in seen] == [None, None]


def test_a_sum_of_free_sizes_is_arithmetic_on_sizes() -> None:
    def count(x: Tensor) -> Tensor:
        return torch.arange(torch.sym_sum([len(x), x.shape[1], 1])) * x[0, 0]

    compiled = torch.compile(count, backend="fxq", dynamic=True, options={"recipe": "float"})

    for rows in (2, 3):
        x = torch.full((rows, 5), 2.0)
        assert torch.equal(compiled(x), count(x))
