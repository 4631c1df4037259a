"""CorrectBias: the mean error of a quantized layer, beyond chance, is gone on other data."""

import pytest
import torch
from torch import Tensor, nn

import fxq
from fxq.errors import FxqWarning
from fxq.layer import layer_of
from fxq.numerics import sqnr_db
from fxq.operators import LAYERS
from fxq.passes import recommended
from fxq.passes.common import Calibrate, Convert, CorrectBias, InsertObservers, correct_bias
from fxq.passes.common.correct_bias import correction
from fxq.pipeline import Recipe
from fxq.rows import EVERY, ByPosition
from fxq.spec import LayerSpec, PerChannel, QuantSpec

COARSE = LayerSpec(
    QuantSpec(8, symmetric=False), QuantSpec(3, granularity=PerChannel(0))
)  # whose errors are large beside fp32's


def test_correction_by_hand() -> None:
    # Errors (1, 3), (2, -2), (0, 0) of two samples: of the first, half of the mean's square is not
    # chance; the others have no mean.
    total, squares = torch.tensor([4.0, 0.0, 0.0]), torch.tensor([10.0, 8.0, 0.0])

    found = correction(total.double(), squares.double(), 2)

    # mean 2, variance of the mean (5 - 4) / 1 = 1: 2 * (1 - 1 / 4)
    assert found.tolist() == pytest.approx([1.5, 0.0, 0.0])
    assert correction(total.double(), squares.double(), 1).tolist() == [0.0, 0.0, 0.0]
    same = correction(torch.tensor([-6.0]), torch.tensor([12.0]), 3)  # three times -2
    assert same.tolist() == pytest.approx([-2.0])


def test_a_mean_that_is_chance_is_left_alone() -> None:
    noise = torch.randn(32, 1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    kept = correction(noise.sum(0), noise.square().sum(0), 32)

    assert float(kept.square().mean()) < 0.6 * float(noise.mean(0).square().mean())
    shifted = noise + 10
    assert correction(shifted.sum(0), shifted.square().sum(0), 32).allclose(
        shifted.mean(0), rtol=1e-3
    )


class Network(nn.Module):
    """Inputs that are positive in the mean; layers with and without bias, of every kind."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(8, 16, 3, padding=1, bias=False)
        self.grouped = nn.Conv2d(16, 16, 3, groups=4)
        self.line = nn.Conv1d(16, 16, 3)
        self.last = nn.Linear(16, 12, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(self.first(x).relu()).relu().flatten(2)
        return self.last(self.line(x).relu().mT)


def batches(seed: int, n: int = 4, size: int = 8) -> list[tuple[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.rand(size, 8, 9, 9, generator=generator),) for _ in range(n)]


def recipe(*steps: CorrectBias, layer: LayerSpec = COARSE) -> Recipe:
    observe = InsertObservers(layer, targets=("linear", "conv"))
    return Recipe("test", (observe, Calibrate(), *steps, Convert()))


def test_the_program_comes_closer_on_other_data_and_worst_samples_too() -> None:
    model, data = Network().eval(), batches(1)
    plain = fxq.compress(model, data[0], recipe(), data)
    corrected = fxq.compress(model, data[0], recipe(CorrectBias()), data)
    (x,) = batches(2, 1, 64)[0]

    with torch.no_grad():
        exact = model(x)
        results = [program(x) for program in (plain, corrected)]

    pooled = [sqnr_db(exact, found) for found in results]
    worst = [min(sqnr_db(a, b) for a, b in zip(exact, found, strict=True)) for found in results]
    assert pooled[1] > pooled[0] + 3
    assert worst[1] > worst[0] + 2
    bias = [float((found - exact).mean((0, 1)).square().mean()) for found in results]
    assert bias[1] < 0.2 * bias[0]
    treated = [layer_of(n) for n in corrected.graph_module.graph.nodes if n.target in LAYERS]
    assert ["CorrectBias" in {t.by for t in layer.treatments} for layer in treated] == [True] * 4


def test_a_bias_is_what_the_definition_says() -> None:
    torch.manual_seed(0)
    model, data = nn.Linear(8, 6).eval(), [(torch.rand(5, 3, 8),), (torch.rand(7, 3, 8),)]
    weights_only = LayerSpec(None, QuantSpec(3, granularity=PerChannel(0)))
    program = fxq.compress(model, data[0], recipe(CorrectBias(), layer=weights_only), data)

    scale = model.weight.abs().amax(1, keepdim=True) / 3  # of codes from -4 to 3
    rounded = (model.weight / scale).round().clamp(-4, 3) * scale
    x = torch.cat([batch for (batch,) in data]).double()
    error = (x @ (model.weight - rounded).double().T).mean(1)  # [12, 6], of samples
    mean, by_chance = error.mean(0), error.var(0) / 12
    expected = model.bias + mean * (1 - by_chance / mean.square()).clamp(min=0)

    (bias,) = (v for name, v in program.graph_module.named_buffers() if name.endswith("bias"))
    assert bias.tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    assert not torch.equal(bias, model.bias)


def test_layers_that_share_a_module_are_corrected_one_by_one() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.linear(x).relu())

    model, data = Twice().eval(), [(torch.rand(16, 8),)]
    program = fxq.compress(model, data[0], recipe(CorrectBias()), data)

    graph = program.graph_module.graph
    biases = {n.args[2] for n in graph.nodes if n.target in LAYERS}
    assert len(biases) == 2


def test_what_cannot_be_corrected_stays_and_says_why() -> None:
    class Modulated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))
            self.plain = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.plain(nn.functional.linear(x, self.weight, x.mean((0, 1))))

    model, data = Modulated().eval(), [(torch.rand(4, 3, 8),)]
    rows = LayerSpec(
        QuantSpec(8, symmetric=False, rows=ByPosition(EVERY)),
        QuantSpec(8, granularity=PerChannel(0)),
    )

    def reasons(layer: LayerSpec) -> list[str]:
        program = fxq.compress(model, data[0], recipe(CorrectBias(), layer=layer), data)
        nodes = [n for n in program.graph_module.graph.nodes if n.target in LAYERS]
        assert all(layer_of(n).skip is None for n in nodes)  # it is quantized all the same
        return [str(layer_of(n).treatments) for n in nodes]

    computed, plain = reasons(COARSE)
    assert "its bias is computed at run time" in computed
    assert "of the bias corrected" in plain
    assert "its mean error is another in each row of its scale" in reasons(rows)[1]


def test_a_model_in_half_precision_comes_closer_too() -> None:
    model = Network().eval().bfloat16()
    (x,), (other,) = (batches(seed)[0] for seed in (1, 2))
    data = [(x.bfloat16(),)]
    plain, corrected = (fxq.compress(model, data[0], recipe(*steps), data)
                        for steps in ((), (CorrectBias(),)))  # fmt: skip

    with torch.no_grad():
        exact = model(other.bfloat16())
        results = [program(other.bfloat16()) for program in (plain, corrected)]

    assert results[1].dtype == torch.bfloat16
    assert sqnr_db(exact, results[1]) > sqnr_db(exact, results[0]) + 2


def test_one_sample_changes_nothing() -> None:
    model, x = nn.Linear(8, 6).eval(), torch.rand(1, 8)

    with pytest.warns(FxqWarning, match="found one sample"):
        program = fxq.compress(model, x, recipe(CorrectBias()), [x])

    (bias,) = (v for name, v in program.graph_module.named_buffers() if name.endswith("bias"))
    assert torch.equal(bias, model.bias)


def test_processes_correct_together(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = Network().eval(), batches(1)
    twice = fxq.compress(model, data[0], recipe(CorrectBias()), [*data, *data])
    monkeypatch.setattr(correct_bias, "n_processes", lambda: 2)
    monkeypatch.setattr(correct_bias, "all_reduce", lambda found, _: 2 * found)

    both = fxq.compress(model, data[0], recipe(CorrectBias()), data)

    biases = [{name: v for name, v in p.graph_module.named_buffers() if name.endswith("bias")}
              for p in (twice, both)]  # fmt: skip
    assert biases[0]
    for name, bias in biases[0].items():
        torch.testing.assert_close(biases[1][name], bias)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"CorrectBias.n_samples: expected a positive number"):
        CorrectBias(n_samples=0)


def test_the_recommended_recipe_for_convolutions_has_it() -> None:
    passes = [type(step) for step in recommended.W8A8_CONV.passes]

    assert passes[-2:] == [CorrectBias, Convert]
