"""Weights that stay codes in memory: the op against products of dequantized weights in float64,
and whole models lowered with it."""

import os
import subprocess
import sys

import pytest
import torch
from poison import poisoned
from torch import Tensor, nn
from torch.library import opcheck
from transformers import LlamaConfig, LlamaForCausalLM

import fxq
from fxq.lowering import lower_weight_only
from fxq.lowering.cpu.native import native
from fxq.lowering.kernels import buffers
from fxq.lowering.lower import lower
from fxq.lowering.lower_weight_only import slower_than_float
from fxq.lowering.weight_only_linear import pack, reference, unpack
from fxq.numerics import sqnr_db
from fxq.passes import gptq, weight_only
from fxq.passes.common import Convert, InsertObservers
from fxq.pipeline import Recipe
from fxq.spec import LayerSpec, PerGroup, PerTensor, QuantSpec

CPU = torch.device("cpu")
needs_native = pytest.mark.skipif(
    isinstance(native("weight_only_linear"), str), reason=str(native("weight_only_linear"))
)
# N, K and groups along K. No panel of 16 and no step of 8 divides the first ones; 1000 input
# channels are summed in blocks, of which the last is short.
SHAPES = [(1, 1, 1), (3, 7, 1), (33, 65, 1), (16, 8, 1), (40, 1000, 1), (17, 96, 3), (48, 1024, 32)]
ROWS = (0, 1, 2, 3, 4, 7, 8, 9, 13, 100)  # streamed up to 8 or 2; tiles of 6 and a rest; 96 and 4
NUMBERS = {8: (-128, 127), 4: (-8, 7)}


def weight(n_out: int, n_in: int, groups: int, bits: int, affine: bool) -> tuple[Tensor, ...]:
    low, high = NUMBERS[bits]
    codes = torch.randint(low, high + 1, (n_out, n_in)).to(torch.int8)
    codes[0, 0] = low  # 8 bits are needed where 8 are meant
    scale = torch.rand(n_out, groups) + 0.1
    zero = torch.randint(low, high + 1, (n_out, groups), dtype=torch.int32) if affine else None
    return codes, scale, zero  # type: ignore[return-value]


def in_float64(x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """The product, written again."""
    width = codes.shape[1] // scale.shape[1]
    values = codes.double()
    if zero is not None:
        values = values - zero.double().repeat_interleave(width, 1)
    return x.double() @ (values * scale.double().repeat_interleave(width, 1)).T


@needs_native
@pytest.mark.parametrize("affine", [False, True], ids=["symmetric", "affine"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_and_reference_give_the_product(
    shape: tuple[int, int, int], bits: int, affine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buffers, "allocate", poisoned)
    codes, scale, zero = weight(*shape, bits, affine)
    packed, bias = pack(codes, scale, zero), torch.randn(shape[0])

    for n_rows in ROWS:
        x = torch.randn(n_rows, shape[1])
        expected = in_float64(x, codes, scale, zero) + bias
        for compute in (torch.ops.fxq.weight_only_linear, reference):
            found = compute(x, *packed, bias, shape[0])

            assert found.shape == expected.shape
            assert sqnr_db(expected, found) > 120, (n_rows, compute)


@pytest.mark.parametrize("bits", [8, 4])
def test_packed_codes_are_a_byte_or_half_of_one(bits: int) -> None:
    codes, scale, zero = weight(32, 64, 1, bits, affine=False)

    packed = pack(codes, scale, zero)

    assert packed.codes.numel() == 32 * 64 * bits // 8
    assert torch.equal(unpack(packed.codes, 32, 64), codes)


@needs_native
def test_unsigned_codes_are_the_same_values() -> None:
    codes = torch.randint(0, 256, (20, 30)).to(torch.uint8)
    scale, zero = torch.rand(20, 1), torch.full((20, 1), 7, dtype=torch.int32)
    x = torch.randn(3, 30)

    found = torch.ops.fxq.weight_only_linear(x, *pack(codes, scale, zero), None, 20)

    assert sqnr_db(in_float64(x, codes, scale, zero), found) > 120


@needs_native
def test_one_scale_for_a_whole_weight() -> None:
    codes, x = torch.randint(-8, 8, (20, 30)).to(torch.int8), torch.randn(3, 30)

    found = torch.ops.fxq.weight_only_linear(
        x, *pack(codes, torch.full((1, 1), 0.5), None), None, 20
    )

    assert sqnr_db(x.double() @ codes.double().T * 0.5, found) > 120


@needs_native
@pytest.mark.parametrize("n_rows", [1, 5, 20])
def test_strided_and_misaligned_activations(n_rows: int) -> None:
    codes, scale, zero = weight(40, 65, 1, 4, affine=True)
    packed = pack(codes, scale, zero)
    memory = torch.randn(n_rows * 65 * 2 + 1)
    misaligned = memory[1 : 1 + n_rows * 65].view(n_rows, 65)
    strided = memory[: n_rows * 65 * 2].view(n_rows, 65, 2)[..., 1]
    transposed = torch.randn(65, n_rows).T

    for x in (misaligned, strided, transposed):
        found = torch.ops.fxq.weight_only_linear(x, *packed, None, 40)

        assert sqnr_db(in_float64(x, codes, scale, zero), found) > 120


@needs_native
def test_a_vector_and_further_axes() -> None:
    codes, scale, zero = weight(40, 24, 1, 8, affine=False)
    packed = pack(codes, scale, zero)

    for shape in ((24,), (2, 0, 24), (2, 3, 24)):
        x = torch.randn(shape)
        found = torch.ops.fxq.weight_only_linear(x, *packed, None, 40)

        assert found.shape == (*shape[:-1], 40)
        assert found.numel() == 0 or sqnr_db(in_float64(x, codes, scale, zero), found) > 120


@needs_native
@pytest.mark.parametrize("n_rows", [1, 4, 30])
def test_what_is_not_finite_stays_in_its_row(n_rows: int) -> None:
    codes, scale, zero = weight(40, 64, 1, 8, affine=False)
    x = torch.randn(n_rows, 64)
    x[0, 3], x[0, 5] = float("nan"), float("inf")

    found = torch.ops.fxq.weight_only_linear(x, *pack(codes, scale, zero), None, 40)

    assert found[0].isnan().all()
    assert found[1:].isfinite().all()


@needs_native
@pytest.mark.parametrize("threads", [1, 2, 7])  # more than there are cores too
def test_any_number_of_threads_gives_the_same_bits(threads: int) -> None:
    codes, scale, zero = weight(200, 300, 1, 4, affine=True)
    packed, x, before = pack(codes, scale, zero), torch.randn(30, 300), torch.get_num_threads()
    expected = torch.ops.fxq.weight_only_linear(x, *packed, None, 200)

    torch.set_num_threads(threads)
    try:
        found = torch.ops.fxq.weight_only_linear(x, *packed, None, 200)
    finally:
        torch.set_num_threads(before)

    assert torch.equal(found, expected)


def test_reference_by_hand() -> None:
    codes = torch.tensor([[1, -2, 3, 4, 0, 0, 0, 0, 5, -6, 7, -8, 0, 0, 0, 1]], dtype=torch.int8)
    scale, zero = torch.tensor([[0.5, 2.0]]), torch.tensor([[1, 0]], dtype=torch.int32)
    x = torch.ones(1, 16)
    x[0, 0] = 3

    y = reference(x, *pack(codes, scale, zero), torch.tensor([10.0]), 1)

    # Codes less 1: 0, -3, 2, 3 and four times -1 sum to -2, times 0.5; 5 - 6 + 7 - 8 + 1, times 2.
    assert y.tolist() == [[10.0 - 1.0 - 2.0]]


@needs_native
@pytest.mark.parametrize("bits", [8, 4])
def test_opcheck(bits: int) -> None:
    codes, scale, zero = weight(24, 32, 2, bits, affine=True)

    args = (torch.randn(2, 3, 32), *pack(codes, scale, zero), torch.randn(24), 24)

    opcheck(torch.ops.fxq.weight_only_linear, args)


@pytest.fixture
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small weights are lowered too."""
    monkeypatch.setattr(lower_weight_only, "MIN_WEIGHT", 0)


def kernels(program: fxq.Program) -> list[tuple[str | None, str]]:
    _, decisions = lower(program.graph_module, CPU)
    return [(decision.kernel, decision.reason) for decision in decisions.values()]


def tiny_llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=64, intermediate_size=176, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=100, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


class Logits(nn.Module):
    """A language model, from tokens to logits."""

    def __init__(self) -> None:
        super().__init__()
        self.model = tiny_llama()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens).logits


@needs_native
def test_a_compiled_llama_is_the_simulated_one_for_any_number_of_rows(any_size: None) -> None:
    model, tokens = Logits().eval(), torch.randint(100, (2, 3))
    program = fxq.compress(model, tokens, weight_only.W8)

    found = {row.kernel for row in fxq.report(program, tokens).rows if row.status == "lowered"}
    compiled = torch.compile(program, backend="fxq")

    assert found == {"weight_only_linear (AVX2, int8)"}
    assert fxq.verify(program, tokens, model=model).ok
    with torch.no_grad():
        for sample in (tokens, torch.randint(100, (7, 3))):
            assert sqnr_db(program(sample), compiled(sample)) > 110


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64), nn.Linear(64, 8)).eval()


@needs_native
def test_gptq_w4_is_lowered_in_four_bits(any_size: None) -> None:
    model, x = mlp(), torch.randn(5, 64)
    program = fxq.compress(model, x, gptq.W4, data=[torch.randn(32, 64)])

    assert [kernel for kernel, _ in kernels(program)] == ["weight_only_linear (AVX2, int4)"] * 2
    assert fxq.verify(program, x).ok


@needs_native
def test_a_weight_of_two_layers_is_packed_once(any_size: None) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x).relu())

    program = fxq.compress(Twice().eval(), torch.randn(3, 32), weight_only.W8)

    lowered, _ = lower(program.graph_module, CPU)

    names = [name for name, _ in lowered.named_buffers() if name.endswith("_packed")]
    assert len(names) == 1
    assert fxq.verify(program, torch.randn(3, 32)).ok


def spec(**options: object) -> Recipe:
    layer = LayerSpec(None, QuantSpec(**options))  # type: ignore[arg-type]
    return Recipe("weights", (InsertObservers(layer), Convert()))


@needs_native
@pytest.mark.parametrize(
    ("recipe", "dtype", "reason"),
    [
        (spec(granularity=PerGroup(4)), torch.float32, "groups of 4 input channels"),
        (weight_only.W8, torch.bfloat16, "multiplies float32 activations"),
    ],
    ids=["groups", "bfloat16"],
)
def test_what_the_kernel_does_not_take_is_declined(
    recipe: Recipe, dtype: torch.dtype, reason: str, any_size: None
) -> None:
    program = fxq.compress(mlp().to(dtype), torch.randn(3, 64, dtype=dtype), recipe)

    for kernel, why in kernels(program):
        assert kernel is None
        assert reason in why
        assert "dequantized once when compiled" in why


@needs_native
def test_one_scale_per_tensor_is_lowered(any_size: None) -> None:
    program = fxq.compress(mlp(), torch.randn(3, 64), spec(granularity=PerTensor()))

    assert {kernel for kernel, _ in kernels(program)} == {"weight_only_linear (AVX2, int8)"}
    assert fxq.verify(program, torch.randn(3, 64)).ok


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((1, 256, 256), "too small"),
        ((1, 512, 512), None),
        ((512, 512, 512), "so many rows"),
        ((256, 2048, 2048), None),
        ((512, 2048, 2048), "so many rows"),
    ],
)
def test_where_codes_gain_nothing_the_layer_stays_float(
    shape: tuple[int, int, int], reason: str | None
) -> None:
    why = slower_than_float(*shape)

    assert (why is None) if reason is None else reason in str(why)


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        pytest.param(
            {"ATEN_CPU_CAPABILITY": "default"},
            "need AVX2",
            id="no AVX2",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"CXX": "/nowhere/g++", "TORCHINDUCTOR_CACHE_DIR": "{fresh}"},
            "could not be built",
            id="no compiler",
        ),
    ],
)
def test_a_machine_that_cannot_build_declines_and_computes_all_the_same(
    variables: dict[str, str], reason: str, tmp_path: object
) -> None:
    code = (
        "import torch, fxq\n"
        "from fxq.lowering import lower_weight_only\n"
        "lower_weight_only.MIN_WEIGHT = 0\n"
        "x = torch.randn(2, 8)\n"
        "program = fxq.compress(torch.nn.Linear(8, 4).eval(), x, 'w8')\n"
        "(row,) = fxq.report(program, x).rows\n"
        "print(row.status, row.reason)\n"
        "from fxq.lowering.weight_only_linear import pack\n"
        "packed = pack(torch.full((4, 8), 2, dtype=torch.int8), torch.ones(4, 1), None)\n"
        "y = torch.ops.fxq.weight_only_linear(torch.ones(1, 8), *packed, None, 4)\n"
        "assert y.tolist() == [[16.0] * 4]\n"
    )
    env = os.environ | {k: v.format(fresh=tmp_path) for k, v in variables.items()}

    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=env, capture_output=True, text=True
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("simulated")
    assert reason in done.stdout
