"""8-bit activations times weights of 4 and pair-safe ones of 8 bits on x86 without VNNI: bit-equal
to the definition, and integer sums to int64, also at the largest codes that there are."""

import itertools
from dataclasses import replace

import pytest
import torch
from poison import poisoned
from torch import Tensor, nn

import fxq
from fxq.lowering.cpu import avx2_linear
from fxq.lowering.cpu.native import native
from fxq.lowering.cpu.onednn import cpu_int8
from fxq.lowering.devices import x86
from fxq.lowering.int8_linear import reference
from fxq.lowering.kernels import buffers
from fxq.lowering.lower import lower
from fxq.numerics import pair_safe_amax, sqnr_db
from fxq.passes import eda_dm, gptq, psaq_vit
from fxq.passes.common import Convert, InsertObservers
from fxq.pipeline import Recipe
from fxq.spec import LayerSpec, PerGroup, PerToken, QuantSpec

CPU = torch.device("cpu")
needs_kernel = pytest.mark.skipif(
    not cpu_int8().saturates or isinstance(native("avx2_linear"), str),
    reason="needs AVX2 without VNNI, and a compiler",
)
INT4, INT8 = "int4_linear (AVX2)", "int8_linear (AVX2)"
SHAPES = [(1, 1), (33, 65), (16, 32), (17, 31), (40, 4100), (48, 1024)]  # N, K
ROWS = (0, 1, 2, 5, 6, 7, 13, 97, 200)  # tiles of 6 and a rest; pieces of 96
Pair = tuple[int, int]
# Weights of neighbouring input channels: the largest of 4 bits, and those whose products with 255
# come closest to what int16 holds.
PAIRS: dict[str, Pair | None] = {
    "any of 4 bits": None,
    **{str(pair): pair for pair in ((8, 8), (-8, -8), (64, 64), (1, 127), (-64, -64), (0, -128))},
    **{str(pair): pair for pair in ((32, 32), (-32, -32), (32, 33))},  # four of which just fit
    "opposite": (127, -127),
}


def weight(n_out: int, n_in: int, pair: Pair | None) -> Tensor:
    if pair is not None:
        return torch.tensor(pair, dtype=torch.int8).repeat(n_out, n_in // 2 + 1)[:, :n_in]
    return torch.randint(-8, 9, (n_out, n_in)).to(torch.int8)


def activations(n_rows: int, n_in: int, dtype: torch.dtype) -> Tensor:
    low, high = (0, 256) if dtype == torch.uint8 else (-128, 128)
    x = torch.randint(low, high, (n_rows, n_in)).to(dtype)
    x[::2] = high - 1  # 255 as the instruction has it
    return x


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8], ids=str)
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_are_those_of_int64(
    shape: tuple[int, int], pair: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buffers, "allocate", poisoned)
    (n_out, n_in), w = shape, weight(*shape, PAIRS[pair])
    one = torch.ones(1, 1)

    for n_rows in ROWS:
        x = activations(n_rows, n_in, dtype)
        for rows in (1, n_rows):  # of zero-points
            zero = torch.randint(-128, 256, (rows, 1), dtype=torch.int32)
            expected = ((x.double() - zero) @ w.double().T).long()

            found = torch.ops.fxq.int8_linear(x, one, zero, w, one, None, torch.int32)

            assert found.shape == (n_rows, n_out)
            assert torch.equal(found.long(), expected), (n_rows, rows)


@needs_kernel
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scaled_results_are_bit_equal_to_the_definition(
    shape: tuple[int, int], per_row: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buffers, "allocate", poisoned)
    w, w_scale, bias = weight(*shape, None), torch.rand(shape[0], 1), torch.randn(shape[0])

    for n_rows in ROWS:
        rows = n_rows if per_row else 1
        x, x_scale = activations(n_rows, shape[1], torch.uint8), torch.rand(rows, 1)
        zero = torch.randint(0, 256, (rows, 1), dtype=torch.int32)
        for tail in ((w_scale, bias), (w_scale, None), (torch.full((1, 1), 0.3), bias)):
            args = (x, x_scale, zero, w, *tail, torch.float32)

            assert torch.equal(torch.ops.fxq.int8_linear(*args), reference(*args)), n_rows


@needs_kernel
@pytest.mark.parametrize("groups", [2, 5, 20])  # of 320, 128 and 32 input channels
def test_groups_have_scales_of_their_own(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "allocate", poisoned)
    w, bias = weight(40, 640, None), torch.randn(40)
    w_scale, one = torch.rand(40, groups) + 0.1, torch.ones(1, 1)
    values = w.double() * w_scale.double().repeat_interleave(640 // groups, 1)

    for n_rows in ROWS:
        x, x_scale = activations(n_rows, 640, torch.uint8), torch.rand(n_rows, 1) + 0.1
        zero = torch.randint(0, 256, (n_rows, 1), dtype=torch.int32)
        expected = (x.double() - zero) @ values.T * x_scale.double() + bias
        args = (x, x_scale, zero, w, w_scale, bias, torch.float32)
        for compute in (torch.ops.fxq.int8_linear, reference):
            assert sqnr_db(expected, compute(*args)) > 130, (n_rows, compute)
        whole = torch.ops.fxq.int8_linear(x, one, zero, w, w_scale, None, torch.int32)
        assert torch.equal(whole.long(), (x.long() - zero) @ w.long().T)


@needs_kernel
def test_strided_misaligned_and_more_axes() -> None:
    w, scale = weight(24, 33, None), torch.rand(24, 1)
    memory = torch.randint(0, 256, (2 * 3 * 33 * 2 + 1,)).to(torch.uint8)
    misaligned = memory[1 : 1 + 2 * 3 * 33].view(2, 3, 33)
    strided = memory[: 2 * 3 * 33 * 2].view(2, 3, 33, 2)[..., 1]
    transposed = memory[: 2 * 3 * 33].view(2, 33, 3).mT

    for x in (misaligned, strided, transposed, misaligned[:, :0], misaligned[0, 0]):
        rows = torch.rand(*x.shape[:-1], 1) + 0.5
        args = (x, rows, None, w, scale, None, torch.float32)

        found = torch.ops.fxq.int8_linear(*args)

        assert found.shape == (*x.shape[:-1], 24)
        assert torch.equal(found, reference(*args))


@needs_kernel
def test_a_scale_that_is_not_finite_stays_in_its_row() -> None:
    x, scale = activations(8, 64, torch.uint8), torch.ones(8, 1)
    scale[3] = float("nan")

    found = torch.ops.fxq.int8_linear(
        x, scale, None, weight(20, 64, None), torch.ones(1, 1), None, torch.float32
    )

    assert found[3].isnan().all()
    assert found[[0, 1, 2, 4, 5, 6, 7]].isfinite().all()


def any_pair_safe(n_out: int, n_in: int) -> Tensor:
    weight = torch.randn(n_out, n_in)
    return (weight / pair_safe_amax(weight)[:, None] * 127).round().to(torch.int8)


@needs_kernel
@pytest.mark.parametrize("n_groups", [1, 2])
@pytest.mark.parametrize("shape", [(40, 192), (150, 4096)], ids=str)  # the second in many blocks
def test_each_panel_has_an_order_of_its_own(
    shape: tuple[int, int], n_groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buffers, "allocate", poisoned)
    w = any_pair_safe(*shape)
    packed = avx2_linear.packed(w, n_groups)
    assert packed is not None
    assert packed.places is not None
    assert len(packed.places.flatten(1).unique(dim=0)) == len(packed.places)

    for n_rows in (1, 7, 97, 200):
        x = activations(n_rows, shape[1], torch.uint8)
        args = (x, torch.ones(1, 1), None, w, torch.ones(1, n_groups), None, torch.int32)
        found = torch.ops.fxq.int8_linear(*args)

        assert torch.equal(found.double(), x.double() @ w.double().T), n_rows


@needs_kernel
@pytest.mark.parametrize("n_in", [32, 192, 1024])
def test_matched_steps_fit_int16(n_in: int) -> None:
    codes = any_pair_safe(48, n_in)
    steps = codes.reshape(3, 16, 2, -1, 4).permute(0, 2, 3, 1, 4).contiguous()  # 2 groups

    order, matched = avx2_linear.match_steps(steps)

    assert torch.equal(order.sort(-1).values[0, 0], torch.arange(n_in // 8, dtype=torch.int32))
    assert (matched % 8 == 0).all()
    found = 0
    for panel, group in itertools.product(range(3), range(2)):
        for two in order[panel, group, : matched[panel, group]].view(-1, 2):
            four = steps[panel, group, two].int().unflatten(2, (2, 2))  # [2, 16, 2, 2]
            for sign in (1, -1):
                assert ((four * sign).clamp(min=0).sum((0, 3)) * 255 < 2**15).all()
            found += 2
    assert (found > 0.9 * order.numel()) == (n_in == 1024)


@needs_kernel
def test_steps_with_large_codes_are_matched_first() -> None:
    steps = torch.zeros(1, 1, 8, 16, 4, dtype=torch.int8)
    steps[..., ::2] = torch.tensor([20, 100]).repeat(4)[:, None, None]  # 120 fit, 200 do not

    order, matched = avx2_linear.match_steps(steps)

    assert matched.item() == 8
    assert sorted(map(sorted, order.view(-1, 2).tolist())) == [[0, 1], [2, 3], [4, 5], [6, 7]]


@needs_kernel
def test_the_kernel_is_for_pair_safe_codes() -> None:
    w = weight(20, 64, None)
    beyond, unsafe = w.clone(), w.clone()
    beyond[3, 5] = -9
    unsafe[3, 4:6] = torch.tensor([64, 65])

    for codes, is_narrow in ((w, True), (beyond, False)):
        packed = avx2_linear.packed(codes, 1)
        assert packed is not None
        assert packed.is_narrow == is_narrow
    assert avx2_linear.packed(unsafe, 1) is None
    assert avx2_linear.packed(w.to(torch.uint8), 1) is None


@pytest.fixture
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small products are lowered too."""
    monkeypatch.setattr(x86, "WITHOUT_VNNI", x86.Thresholds(0, 0))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 40), nn.Linear(40, 8)).eval()


def in_groups(size: int) -> Recipe:
    activation = QuantSpec(symmetric=True, granularity=PerToken(), dynamic=True)
    layer = LayerSpec(activation, QuantSpec(4, granularity=PerGroup(size)))
    return Recipe("groups", (InsertObservers(layer), Convert()))


@needs_kernel
def test_groups_of_32_are_lowered_and_smaller_ones_are_not(any_size: None) -> None:
    model, x = nn.Sequential(nn.Linear(64, 96)).eval(), torch.randn(5, 64)
    programs = [fxq.compress(model, x, in_groups(size)) for size in (32, 16)]

    found = [next(iter(lower(p.graph_module, CPU)[1].values())) for p in programs]

    assert found[0].kernel == INT4
    assert found[1].kernel is None
    assert "per-group weight scale" in found[1].reason
    assert fxq.verify(programs[0], x).ok


RECIPES = {
    "psaq_w4a8": (psaq_vit.W4A8, 3),
    "gptq_w4a8": (gptq.W4A8, 2),  # leaves the last layer float
    "eda_dm_nearest_w4a8": (eda_dm.NEAREST_W4A8, 1),  # has 8 bits in the first layer and the last
}


@needs_kernel
@pytest.mark.parametrize("name", RECIPES)
def test_recipes_with_4_bit_weights_reach_the_kernel(name: str, any_size: None) -> None:
    (recipe, expected), x = RECIPES[name], torch.randn(5, 64)
    program = fxq.compress(mlp(), x, recipe, data=[torch.randn(32, 64)])

    _, decisions = lower(program.graph_module, CPU)

    kernels = [decision.kernel for decision in decisions.values()]
    assert kernels.count(INT4) == expected
    found = fxq.verify(program, x)
    assert found.ok
    assert all(check.accumulators_equal for check in found.checks)


@needs_kernel
def test_a_compiled_model_is_the_simulated_one(any_size: None) -> None:
    torch.manual_seed(0)
    model, x = mlp(), torch.randn(6, 64)
    program = fxq.compress(model, x, gptq.W4A8, data=[torch.randn(32, 64)])

    with torch.no_grad():
        found = torch.compile(program, backend="fxq")(x)

        # Rounding may send a value next to the middle of two codes to the other one.
        assert sqnr_db(program(x), found) > 60


@needs_kernel
def test_small_products_stay_float_and_say_so() -> None:
    program = fxq.compress(mlp(), torch.randn(5, 64), gptq.W4A8, data=[torch.randn(32, 64)])

    _, decisions = lower(program.graph_module, CPU)

    for decision in decisions.values():
        assert decision.kernel is None
        assert "too small for int8 to pay" in decision.reason


def test_with_vnni_the_kernel_is_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = replace(cpu_int8(), saturates=False)
    monkeypatch.setattr(avx2_linear, "cpu_int8", lambda: exact)

    assert not avx2_linear.fits(weight(20, 64, None))
