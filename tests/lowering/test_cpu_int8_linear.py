"""int8 on x86 is exact with every instruction set, for weights that would saturate too."""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.library import opcheck

import fxq
from fxq.lowering.cpu.int8_linear import split_pairs
from fxq.lowering.cpu.onednn import cpu_int8
from fxq.lowering.devices import x86
from fxq.lowering.devices.x86 import slower_than_float
from fxq.lowering.int8_linear import activate, reference
from fxq.lowering.lower import lower
from fxq.numerics import is_pair_safe, largest_sum, sqnr_db
from fxq.passes import w8a8
from fxq.passes.common import Convert, InsertObservers
from fxq.pipeline import Recipe
from fxq.spec import LayerSpec, PerToken, QuantSpec

needs_x86 = pytest.mark.skipif(not cpu_int8().available, reason="no oneDNN int8 on this CPU")
# Where oneDNN takes AVX2 in its place, the test has been run.
needs_avx512 = pytest.mark.skipif(not torch.cpu._is_avx512_supported(), reason="no AVX512")

PROBE = """
import json, torch
from fxq.lowering.cpu.onednn import cpu_int8
from fxq.lowering.cpu.int8_linear import launch, split_pairs
from fxq.lowering.int8_linear import accumulate
torch.manual_seed(0)
found = {"saturates": cpu_int8().saturates, "wrong": []}
one = torch.ones(1, 1)
shapes = [(1, 64, 32), (7, 65, 33), (63, 129, 129), (200, 256, 96), (16, 1024, 64), (5, 4100, 40)]
for m, k, n in shapes:
    worst = torch.where(torch.rand(n, k) < 0.5, -127, 127).to(torch.int8)
    random = torch.randint(-127, 128, (n, k)).to(torch.int8)
    above = random.abs()  # sums beyond 2^24 at 4100 channels
    cases = {"worst": worst, "random": random, "above": above, "safe above": split_pairs(above)[0]}
    for name, w in cases.items():
        for per_row in (False, True):
            zero = torch.randint(-128, 128, (m if per_row else 1, 1), dtype=torch.int32)
            x = torch.randint(-128, 128, (m, k)).to(torch.int8)
            x[0] = 127  # the largest unsigned code, 255
            exact = accumulate(x, zero, w).float()
            signed = launch(x, one, zero, w, one, None)
            unsigned = launch((x.int() + 128).to(torch.uint8), one, zero + 128, w, one, None)
            whole = torch.ops.fxq.int8_linear(x, one, zero, w, one, None, torch.int32)
            equal = torch.equal(signed, exact) and torch.equal(unsigned, exact)
            if not (equal and torch.equal(whole.double(), (x.double() - zero) @ w.double().T)):
                found["wrong"].append([name, m, k, n, per_row])
print(json.dumps(found))
"""


@functools.cache
def probe(isa: str) -> dict[str, object]:
    env = os.environ | ({"ONEDNN_MAX_CPU_ISA": isa} if isa != "native" else {})
    command = [sys.executable, "-W", "ignore", "-c", PROBE]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@needs_x86
@pytest.mark.parametrize("isa", ["native", "AVX2", pytest.param("AVX512_CORE", marks=needs_avx512)])
def test_accumulators_are_exact_with_every_instruction_set(isa: str) -> None:
    assert probe(isa)["wrong"] == []


@needs_x86
def test_the_probe_sees_that_avx2_saturates() -> None:
    assert probe("AVX2")["saturates"] is True


def affine_per_token(n_in: int) -> tuple[fxq.Program, torch.Tensor]:
    """A product of positive numbers, whose sums fp32 cannot hold at 4096 channels."""
    layer = LayerSpec(
        QuantSpec(symmetric=False, granularity=PerToken(), dynamic=True), w8a8.FULL_RANGE
    )
    recipe = Recipe("affine", (InsertObservers(layer), Convert()))
    model = nn.Sequential(nn.Linear(n_in, 48)).eval()
    model[0].weight.data.uniform_(0.5, 1.0)
    x = torch.rand(6, n_in) + 0.5
    return fxq.compress(model, x, recipe), x


@needs_x86
def test_sums_beyond_fp32_are_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(x86, "WITH_VNNI", x86.Thresholds(0, 0))
    monkeypatch.setattr(x86, "WITHOUT_VNNI", x86.Thresholds(0, 0))
    monkeypatch.setattr(x86, "HUGE_WEIGHT", 0)
    program, x = affine_per_token(4096)
    tensors = dict(program.graph_module.named_buffers())
    codes, w_scale = tensors["0.weight_codes"].double(), tensors["0.weight_scale"]
    scale, zero = torch.ops.fxq.choose_qparams(x, [1, -1], -128, 127, False)
    centred = torch.ops.fxq.quantize(x, scale, zero, -128, 127).double() - zero
    sums = centred @ codes.mT
    expected = sums.float() * (scale * w_scale.mT) + tensors["0.bias"]

    lowered, decisions = lower(program.graph_module, torch.device("cpu"))

    assert sums.abs().max() > 2**24
    assert [d.kernel is None for d in decisions.values()] == [False]
    assert torch.equal(lowered(x)[0], expected)
    assert fxq.verify(program, x).ok


def test_sums_that_may_exceed_int32_are_declined() -> None:
    program, x = affine_per_token(100_000)  # 256 * 100,000 codes of 64 to 127

    _, decisions = lower(program.graph_module, torch.device("cpu"))

    (decision,) = decisions.values()
    assert decision.kernel is None
    assert "100000 input channels of such codes may exceed int32" in decision.reason
    (row,) = fxq.report(program, x).rows
    assert row.status == "simulated"


@pytest.mark.parametrize(("signs", "bound"), [((1, 1), 127 + 3), ((1, -1), 127), ((-1, -1), 130)])
def test_largest_sum_counts_each_sign_for_itself(signs: tuple[int, int], bound: int) -> None:
    codes = torch.tensor([[127 * signs[0], 3 * signs[1]], [1, 0]], dtype=torch.int8)

    assert largest_sum(codes) == 256 * bound


def test_split_pairs_is_exact_and_safe() -> None:
    weight = torch.tensor([[127, 127, -100, -100, 3, 127], [64, 64, 65, 64, -127, 0]]).to(
        torch.int8
    )

    safe, excess = split_pairs(weight)

    assert torch.equal(safe + excess, weight)
    assert is_pair_safe(safe)
    # Excess over 128: 254 by 126, -200 by -72, 130 by 2 and 129 by 1, on the larger of the pair.
    assert excess.tolist() == [[126, 0, -72, 0, 0, 2], [0, 0, 1, 0, 0, 0]]


SAMPLES = {
    "plain": {},
    "gelu": {"activation": "gelu"},
    "tanh gelu, residual": {"activation": "gelu_tanh", "residual": torch.ones(2, 5, 7)},
    "silu, requantize": {
        "activation": "silu",
        "out_scale": torch.tensor([0.1]),
        "out_zero_point": torch.tensor([3], dtype=torch.int32),
    },
}


def sample(per_token: bool, dtype: torch.dtype) -> tuple[object, ...]:
    low, high = (0, 256) if dtype == torch.uint8 else (-128, 128)
    shape = (2, 5, 1) if per_token else (1, 1, 1)
    return (
        torch.randint(low, high, (2, 5, 6)).to(dtype),
        torch.rand(shape) + 0.5,
        torch.randint(low, high, shape, dtype=torch.int32),
        torch.randint(-60, 60, (7, 6)).to(torch.int8),
        torch.rand(7, 1),
        torch.randn(7),
        torch.float32,
    )


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8], ids=str)
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("epilogue", SAMPLES)
def test_op_equals_reference_and_passes_opcheck(
    epilogue: str, per_token: bool, dtype: torch.dtype
) -> None:
    args, kwargs = sample(per_token, dtype), SAMPLES[epilogue]

    found = torch.ops.fxq.int8_linear(*args, **kwargs)

    expected = reference(*args, **kwargs)  # type: ignore[arg-type]
    assert found.dtype == expected.dtype
    assert sqnr_db(expected, found) >= 120.0
    opcheck(torch.ops.fxq.int8_linear, args, kwargs)


def test_reference_by_hand() -> None:
    x = torch.tensor([[10, 20]], dtype=torch.int8)
    weight = torch.tensor([[1, 2], [-3, 4]], dtype=torch.int8)
    zero = torch.tensor([[5]], dtype=torch.int32)

    y = reference(
        x, torch.tensor([[0.5]]), zero, weight, torch.tensor([[2.0], [1.0]]),
        torch.tensor([1.0, 0.0]), torch.float32,
    )  # fmt: skip

    # (5, 15) . (1, 2) = 35, times 0.5 * 2, plus 1; (5, 15) . (-3, 4) = 45, times 0.5.
    assert y.tolist() == [[36.0, 22.5]]


def test_unknown_activation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected one of .*found 'tanh'"):
        activate(torch.zeros(1), "tanh")


@needs_x86
def test_a_weight_written_in_place_is_seen() -> None:
    x = torch.full((4, 8), 2, dtype=torch.uint8)
    weight = torch.ones(3, 8, dtype=torch.int8)
    scale = torch.ones(1, 1)
    before = torch.ops.fxq.int8_linear(x, scale, None, weight, scale, None, torch.float32)

    weight.mul_(3)
    after = torch.ops.fxq.int8_linear(x, scale, None, weight, scale, None, torch.float32)

    assert torch.equal(after, before * 3)


@pytest.mark.parametrize(
    ("shape", "exact", "reason"),
    [
        ((8, 64, 64), True, "too small"),
        ((394, 768, 768), True, None),
        ((1, 3072, 768), True, None),
        ((394, 768, 768), False, "avoids them"),
        ((394, 3072, 768), False, None),
        ((1576, 3072, 768), False, "sparse excess costs more"),
        ((1576, 4096, 4096), False, None),
    ],
)
def test_small_products_stay_float_and_say_so(
    shape: tuple[int, int, int], exact: bool, reason: str | None
) -> None:
    why = slower_than_float(*shape, exact=exact)

    assert (why is None) if reason is None else reason in str(why)


@pytest.mark.parametrize("compute", [reference, torch.ops.fxq.int8_linear])
def test_a_vector_is_one_row(compute: Callable[..., Tensor]) -> None:
    x = torch.randint(-128, 128, (65,)).to(torch.int8)
    weight = torch.randint(-127, 128, (33, 65)).to(torch.int8)
    zero = torch.tensor([[7]], dtype=torch.int32)  # as what is lowered has it
    expected = (x.double() - 7) @ weight.double().T

    for scale in (torch.full((1,), 0.5), torch.full((1, 1), 0.5)):
        for w_scale in (torch.full((33, 1), 0.25), torch.full((1, 1), 0.25)):
            found = compute(x, scale, zero, weight, w_scale, None, torch.float32)

            torch.testing.assert_close(found, (expected / 8).float(), rtol=0, atol=0)


@needs_x86
def test_a_model_of_one_vector_is_lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(x86, "WITH_VNNI", x86.Thresholds(0, 0))
    monkeypatch.setattr(x86, "WITHOUT_VNNI", x86.Thresholds(0, 0))
    layer, x = nn.Linear(65, 33).eval(), torch.randn(65)
    program = fxq.compress(layer, x, w8a8.DYNAMIC, dynamic_shapes=None)

    lowered, decisions = lower(program.graph_module, torch.device("cpu"))
    (result,) = lowered(x)

    (decision,) = decisions.values()
    assert decision.kernel in ("int8_linear (oneDNN)", "int8_linear (AVX2)")
    assert result.shape == (33,)
    assert sqnr_db(layer(x), result) > 30.0
