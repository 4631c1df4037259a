"""Calibration of whatever runs: ranges against hooks on the eager model, and static programs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from observed import ACTIVATION, LAYER, STATIC, Blocks, TwoHeads, hooked, ranges
from pipelines import dit_pipeline
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from transformers import LlamaConfig, LlamaForCausalLM

import fxq
from fxq.errors import FxqWarning, UnsupportedError
from fxq.numerics import sqnr_db
from fxq.observing import Observed
from fxq.passes import w8a8
from fxq.passes.common import FIRST, Calibrate, Convert, InsertObservers, ObserveActivations
from fxq.passes.smoothquant import SmoothQuant
from fxq.pipeline import Recipe
from fxq.rows import ByStep, ByTimestep
from fxq.spec import LayerSpec, Percentile, PerChannel, PerToken, QuantSpec


def test_every_block_has_its_own_ranges_across_graph_breaks_and_lengths() -> None:
    model = Blocks().eval()
    batches = [torch.randn(n, t, 16) for n, t in ((2, 5), (1, 9), (4, 3))]

    with torch.no_grad(), fxq.observe(model, STATIC) as seen:
        found = [model(x) for x in batches]

    with torch.no_grad(), hooked(model) as expected:
        eager = [model(x) for x in batches]
    for a, b in zip(found, eager, strict=True):
        torch.testing.assert_close(a, b)
    assert ranges(seen).keys() == expected.keys()
    for name, range_ in ranges(seen).items():
        torch.testing.assert_close(torch.tensor(range_), torch.tensor(expected[name]))
    assert seen.missed == ()


def test_layers_that_no_run_reached_are_listed_and_stay_float(every_layer_pays: None) -> None:
    model, x = TwoHeads().eval(), torch.randn(2, 5, 16)
    with torch.no_grad(), fxq.observe(model, STATIC) as seen:
        model(x, head=False)

    assert seen.missed == ("head",)
    assert "in no graph: head" in str(seen)
    fast = torch.compile(model, backend="fxq", options={"recipe": seen.recipe})
    with torch.no_grad(), pytest.warns(FxqWarning, match="head: no graph reached it"):
        found = fast(x)
    assert sqnr_db(model(x), found) > 30


def test_observed_equals_compressed_bit_for_bit(every_layer_pays: None) -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8)).eval()
    batches = [torch.randn(n, 5, 16) for n in (2, 3, 4)]
    with torch.no_grad(), fxq.observe(model, STATIC) as seen:
        for batch in batches:
            model(batch)

    observed = fxq.compress(model, batches[0], seen.recipe)
    calibrated = fxq.compress(model, batches[0], STATIC, data=batches)

    a, b = (dict(p.graph_module.named_buffers()) for p in (observed, calibrated))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    other = torch.randn(7, 5, 16)
    assert torch.equal(observed(other), calibrated(other))
    fast = torch.compile(model, backend="fxq", options={"recipe": seen.recipe, "strict": True})
    program = torch.compile(calibrated, backend="fxq", options={"strict": True})
    with torch.no_grad():
        assert torch.equal(fast(other), program(other))


SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 61, "max_position_embeddings": 32,
}  # fmt: skip


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


def generate(
    model: LlamaForCausalLM, cache: str, prompt: Tensor, tokens: int = 6
) -> tuple[Tensor, Tensor]:
    kwargs = {} if cache == "dynamic" else {"cache_implementation": cache}
    result = model.generate(
        prompt, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=0,
        return_dict_in_generate=True, output_logits=True, **kwargs,
    )  # fmt: skip
    return result.sequences, torch.stack(result.logits, 1)


@pytest.mark.parametrize(
    ("cache", "compiled"),  # tokens of compiled code: one of each graph, or several
    [("static", 2), *(pytest.param(c, 6, marks=pytest.mark.slow) for c in ("static", "dynamic"))],
)
def test_prefill_and_decode_of_a_llama_quantize_statically(
    cache: str, compiled: int, every_layer_pays: None
) -> None:
    model, prompt = llama(), torch.randint(1, 61, (2, 7))
    with hooked(model) as expected:
        tokens, logits = generate(model, cache, prompt)

    with fxq.observe(model, STATIC) as seen:
        observed_tokens, _ = generate(model, cache, prompt)

    assert torch.equal(observed_tokens, tokens)
    assert seen.missed == ()
    assert ranges(seen).keys() == expected.keys()
    for name, range_ in ranges(seen).items():
        torch.testing.assert_close(torch.tensor(range_), torch.tensor(expected[name]))
    with torch.no_grad():
        model.forward = torch.compile(
            model.forward, backend="fxq", options={"recipe": seen.recipe, "strict": True}
        )
        found = generate(model, cache, prompt, compiled)[1]
    # Of the first token after the prompt, before tokens may differ; measured 27 dB and more.
    assert sqnr_db(logits[:, 0], found[:, 0]) > 24


def test_what_was_seen_can_be_saved(tmp_path: Path) -> None:
    model = Blocks().eval()
    x = torch.randn(2, 5, 16)
    with torch.no_grad(), fxq.observe(model, STATIC) as seen:
        model(x, head=False)

    seen.save(tmp_path / "seen.safetensors")
    loaded = Observed.load(tmp_path / "seen.safetensors", STATIC)

    assert ranges(loaded) == ranges(seen)
    assert loaded.missed == ("head",)
    assert loaded.layers.keys() == seen.layers.keys()
    first, second = (fxq.compress(model.blocks[0].up, x, s.recipe) for s in (seen, loaded))
    assert torch.equal(first(x), second(x))
    with pytest.raises(ValueError, match="give the recipe that was observed"):
        Observed.load(tmp_path / "seen.safetensors", w8a8.STATIC)
    (tmp_path / "other").write_text("something else")
    with pytest.raises(ValueError, match=r"expected a file that Observed\.save wrote"):
        Observed.load(tmp_path / "other", STATIC)


def test_a_model_called_twice_in_a_graph_has_a_range_for_each_call() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(10 * self.layer(x))

    model, x = Twice().eval(), torch.randn(3, 8)
    with torch.no_grad(), fxq.observe(model, STATIC) as seen:
        model(x)

    observed = fxq.compress(model, x, seen.recipe)

    assert [(layer.name, layer.call) for layer in seen.layers.values()] == [
        ("layer", 0),
        ("layer", 1),
    ]
    assert torch.equal(observed(x), fxq.compress(model, x, STATIC, data=[x])(x))


def test_the_model_is_left_as_it_was_also_where_the_run_raises() -> None:
    model = Blocks().eval()
    before = dict(vars(model))

    with pytest.raises(RuntimeError, match="mine"), fxq.observe(model, STATIC):
        raise RuntimeError("mine")

    assert vars(model) == before


def test_a_recipe_observed_on_another_model_is_told() -> None:
    model, other = Blocks().eval(), Blocks().eval()
    x = torch.randn(2, 5, 16)
    with torch.no_grad(), fxq.observe(model, STATIC) as seen:
        model(x)

    with torch.no_grad(), pytest.raises(BackendCompilerFailed, match="observe this model"):
        torch.compile(other, backend="fxq", options={"recipe": seen.recipe})(x)


def test_a_layer_whose_scale_has_another_shape_in_another_graph_is_told() -> None:
    per_token = LayerSpec(QuantSpec(granularity=PerToken()), LAYER.weight)
    recipe = Recipe("tokens", (InsertObservers(per_token), Calibrate(), Convert()))
    model = nn.Sequential(nn.Linear(16, 8)).eval()

    def run() -> None:
        with torch.no_grad(), fxq.observe(model, recipe):
            for t in (5, 6):
                model(torch.randn(2, t, 16))

    with pytest.raises(ValueError, match="use PerTensor"):
        run()


@pytest.mark.parametrize(
    ("recipe", "error", "message"),
    [
        ("w8a8_dynamic", ValueError, "expected one that calibrates"),
        (
            Recipe("smooth", (SmoothQuant(), *STATIC.passes)),
            UnsupportedError,
            "SmoothQuant changes a graph by what flows through it",
        ),
        (
            Recipe(
                "edges",
                (InsertObservers(LAYER), ObserveActivations(ACTIVATION), *STATIC.passes[1:]),
            ),
            UnsupportedError,
            "ObserveActivations observes more than inputs of layers",
        ),
        (
            Recipe(
                "first", (InsertObservers(LAYER, overrides=((FIRST, None),)), *STATIC.passes[1:])
            ),
            UnsupportedError,
            "override '<first>' is of a whole graph",
        ),
        (
            Recipe(
                "steps",
                (
                    InsertObservers(LayerSpec(QuantSpec(rows=ByStep(2)), LAYER.weight)),
                    *STATIC.passes[1:],
                ),
            ),
            UnsupportedError,
            "it goes by a step that is set on a program",
        ),
    ],
)
def test_recipes_that_cannot_be_observed_say_why(
    recipe: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message), fxq.observe(Blocks().eval(), recipe):
        pass


@pytest.mark.parametrize("part", ["", "blocks.1"])
def test_what_the_user_compiled_inside_the_block_stays(part: str) -> None:
    model, x, calls = Blocks().eval(), torch.randn(2, 16), []

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        calls.append(gm)
        return gm.forward

    told = pytest.warns(FxqWarning, match=r"compiled inside the block .*; compile after the block")
    with torch.no_grad(), told, fxq.observe(model, STATIC):
        model(x)
        model.get_submodule(part).compile(backend=backend)

    assert not calls
    model(x)
    assert calls


def test_parametrized_layers_are_not_listed_as_missed() -> None:
    normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(8, 16))
    model = nn.Sequential(normed, nn.ReLU(), nn.Linear(16, 4), nn.ReLU()).eval()

    with torch.no_grad(), fxq.observe(model, STATIC) as seen:
        model(torch.randn(2, 8))

    assert len(seen.layers) == 2
    assert not seen.missed


def test_nothing_observed_is_an_error() -> None:
    nothing = pytest.raises(ValueError, match="found none that reached a layer")
    with nothing, fxq.observe(Blocks().eval(), STATIC):
        pass


@pytest.mark.slow
def test_a_pipeline_with_guidance_quantizes_statically(every_layer_pays: None) -> None:
    pipe = dit_pipeline()
    transformer = pipe.transformer

    def draw() -> Tensor:
        noise = torch.Generator().manual_seed(0)
        drawn = pipe(
            [1], guidance_scale=4.0, num_inference_steps=3, generator=noise, output_type="np"
        )
        return torch.from_numpy(drawn.images)

    with hooked(transformer) as expected:
        eager = draw()
    with fxq.observe(transformer, STATIC) as seen:
        torch.testing.assert_close(draw(), eager)

    assert ranges(seen).keys() == expected.keys() - set(seen.missed)
    for name, range_ in ranges(seen).items():
        torch.testing.assert_close(torch.tensor(range_), torch.tensor(expected[name]))
    transformer.compile(backend="fxq", options={"recipe": seen.recipe, "strict": True})
    # Measured 28.4 dB: three steps, each of which takes in the error of those before.
    assert sqnr_db(eager, draw()) > 25


def test_a_pipeline_has_a_range_for_each_of_its_time_steps(every_layer_pays: None) -> None:
    pipe = dit_pipeline()
    transformer = pipe.transformer
    pipe.scheduler.set_timesteps(4)
    timesteps = sorted(pipe.scheduler.timesteps.tolist())
    rows = QuantSpec(symmetric=False, rows=ByTimestep.nearest(timesteps))
    layers = InsertObservers(LayerSpec(rows, LAYER.weight))
    recipe = Recipe("rows", (layers, Calibrate(), Convert()))

    def draw() -> Tensor:
        noise = torch.Generator().manual_seed(0)
        drawn = pipe([1], num_inference_steps=4, generator=noise, output_type="np")
        return torch.from_numpy(drawn.images)

    lows: dict[int, float] = {}
    now: list[int] = []
    block = transformer.transformer_blocks[0].attn1.to_q
    handles = [
        transformer.register_forward_pre_hook(
            lambda _, args, kwargs: now.append(int(kwargs["timestep"][0])), with_kwargs=True
        ),
        block.register_forward_pre_hook(
            lambda _, args: lows.update({now[-1]: float(args[0].min())})
        ),
    ]
    eager = draw()
    for handle in handles:
        handle.remove()

    with fxq.observe(transformer, recipe) as seen:
        draw()

    query = "transformer_blocks.0.attn1.to_q"
    (observer,) = (x.observer for x in seen.layers.values() if x.name == query)
    expected = torch.tensor([lows[t] for t in timesteps])
    torch.testing.assert_close(observer.low.flatten(), expected)
    transformer.compile(backend="fxq", options={"recipe": seen.recipe, "strict": True})
    # Measured 31 dB; one range for all time-steps: 28.
    assert sqnr_db(eager, draw()) > 27


class Ranks(nn.Module):
    """Linears whose callers give rows `[B, C]` and sequences `[B, T, C]`."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x).relu())


PER_CHANNEL = LayerSpec(replace(ACTIVATION, granularity=PerChannel(-1)), LAYER.weight)
HISTOGRAM = LayerSpec(replace(ACTIVATION, observer=Percentile(99.0)), LAYER.weight)


@pytest.mark.parametrize("spec", [LAYER, PER_CHANNEL, HISTOGRAM], ids=("tensor", "channel", "hist"))
@pytest.mark.parametrize("first", [2, 3])
def test_a_layer_called_with_rows_and_with_sequences_has_one_range(
    spec: LayerSpec, first: int
) -> None:
    model = Ranks().eval()
    batches = [torch.randn(2, 16), 3 * torch.randn(2, 7, 16)][:: 5 - 2 * first]
    recipe = Recipe("ranks", (InsertObservers(spec), Calibrate(), Convert()))

    with torch.no_grad(), fxq.observe(model, recipe) as seen:
        for batch in batches:
            model(batch)

    rows = torch.cat([batch.reshape(-1, 16) for batch in batches])
    expected = fxq.compress(model, rows, recipe, [rows])
    for x in (torch.randn(4, 16), torch.randn(4, 3, 16)):
        of_rows = expected(x.reshape(-1, 16)).reshape(*x.shape[:-1], 8)
        assert torch.equal(fxq.compress(model, x, seen.recipe)(x), of_rows)


def test_one_range_of_rows_and_of_sequences_compiles(every_layer_pays: None) -> None:
    model = Ranks().eval()
    with torch.no_grad(), fxq.observe(model, STATIC) as seen:
        for shape in ((2, 16), (2, 7, 16)):
            model(torch.randn(shape))

    fast = torch.compile(model, backend="fxq", options={"recipe": seen.recipe, "strict": True})

    for x in (torch.randn(4, 16), torch.randn(4, 3, 16)):
        with torch.no_grad():
            torch.testing.assert_close(fast(x), fxq.compress(model, x, seen.recipe)(x))
