"""Calibration of whatever runs: ranges against hooks on the eager model, and static programs."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import dit_pipeline
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from transformers import LlamaConfig, LlamaForCausalLM

import fxq
from fxq.errors import FxqWarning, SkippedError, UnsupportedError
from fxq.lowering.devices import x86
from fxq.numerics import sqnr_db
from fxq.observing import Observed
from fxq.passes import w8a8
from fxq.passes.common import FIRST, Calibrate, Convert, InsertObservers, ObserveActivations
from fxq.passes.smoothquant import SmoothQuant
from fxq.pipeline import Recipe
from fxq.rows import ByStep, ByTimestep
from fxq.spec import LayerSpec, PerChannel, PerTensor, PerToken, QuantSpec

ACTIVATION = QuantSpec(symmetric=False, granularity=PerTensor())
LAYER = LayerSpec(ACTIVATION, QuantSpec(granularity=PerChannel(0)))
STATIC = Recipe("static", (InsertObservers(LAYER), Calibrate(), Convert()))


@pytest.fixture
def every_layer_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(x86, "WITH_VNNI", x86.Thresholds(0, 0))
    monkeypatch.setattr(x86, "WITHOUT_VNNI", x86.Thresholds(0, 0))


@contextmanager
def hooked(model: nn.Module) -> Iterator[dict[str, tuple[float, float]]]:
    """Smallest and largest input of every linear while the eager model runs."""
    found: dict[str, tuple[float, float]] = {}

    def hook(name: str) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[Tensor]) -> None:
            low, high = found.get(name, (torch.inf, -torch.inf))
            found[name] = min(low, float(args[0].min())), max(high, float(args[0].max()))

        return see

    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    handles = [module.register_forward_pre_hook(hook(name)) for name, module in linears]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def ranges(seen: Observed) -> dict[str, tuple[float, float]]:
    return {
        layer.name: (float(layer.observer.low), float(layer.observer.high))
        for layer in seen.layers.values()
    }


class Block(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.up, self.down, self.scale = nn.Linear(16, 32), nn.Linear(32, 16), scale

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale
        torch._dynamo.graph_break()
        return x + self.down(torch.relu(self.up(x)))


class Blocks(nn.Module):
    """Blocks of one class that Dynamo compiles one by one, and a head that is left out at times."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(scale) for scale in (1.0, 2.0, 3.0))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor, head: bool = True) -> Tensor:
        x = self.blocks[2](self.blocks[1](self.blocks[0](x)))
        return self.head(x) if head else x


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


class TwoHeads(nn.Module):
    """A head that is called only when asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(16, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor, head: bool = True) -> Tensor:
        x = torch.relu(self.body(x))
        return self.head(x) if head else x


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
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 61, "max_position_embeddings": 32,
}  # fmt: skip


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


def generate(model: LlamaForCausalLM, cache: str, prompt: Tensor) -> tuple[Tensor, Tensor]:
    kwargs = {} if cache == "dynamic" else {"cache_implementation": cache}
    result = model.generate(
        prompt, do_sample=False, max_new_tokens=6, min_new_tokens=6, pad_token_id=0,
        return_dict_in_generate=True, output_logits=True, **kwargs,
    )  # fmt: skip
    return result.sequences, torch.stack(result.logits, 1)


@pytest.mark.parametrize("cache", [pytest.param("dynamic", marks=pytest.mark.slow), "static"])
def test_prefill_and_decode_of_a_llama_quantize_statically(
    cache: str, every_layer_pays: None
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
        found = generate(model, cache, prompt)[1]
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


def test_nothing_observed_is_an_error() -> None:
    nothing = pytest.raises(ValueError, match="found none that reached a layer")
    with nothing, fxq.observe(Blocks().eval(), STATIC):
        pass


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


class Cross(nn.Module):
    """Attends to itself or to something else, as the same layers do in some models."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor, other: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.query(x), self.key(x if other is None else other)


@pytest.mark.parametrize("itself_first", [True, False])
def test_layers_that_read_the_same_in_one_graph_only_keep_apart(
    itself_first: bool, every_layer_pays: None
) -> None:
    model, x, small = Cross().eval(), torch.randn(2, 9, 32), torch.randn(2, 9, 32) * 0.01
    calls = [(x,), (small, x)]
    with torch.no_grad(), fxq.observe(model, STATIC) as seen:
        for call in calls if itself_first else calls[::-1]:
            model(*call)

    with torch.no_grad(), hooked(model) as expected:
        for call in calls:
            model(*call)

    for name, range_ in ranges(seen).items():
        torch.testing.assert_close(torch.tensor(range_), torch.tensor(expected[name]))
    fast = torch.compile(model, backend="fxq", options={"recipe": seen.recipe, "strict": True})
    with torch.no_grad():
        for call in calls:
            assert min(map(sqnr_db, model(*call), fast(*call))) > (30 if call[0] is x else 5)


class Functional(nn.Module):
    """Two weights of one module, on both sides of a graph break, and one of the model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.randn(16, 16) / 4) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.nn.functional.linear(x * 0.01, self.first)
        torch._dynamo.graph_break()
        return torch.nn.functional.linear(x * 1e4, self.second)


@pytest.mark.parametrize("nested", [True, False])
def test_weights_of_one_module_have_states_of_their_own(nested: bool) -> None:
    model = (nn.Sequential(Functional()) if nested else Functional()).eval()
    x = torch.randn(64, 16)
    with torch.no_grad(), fxq.observe(model, STATIC) as seen:
        model(x)

    prefix = "0." if nested else ""
    assert [x.name for x in seen.layers.values()] == [f"{prefix}first", f"{prefix}second"]
    program = fxq.compress(model, x, seen.recipe)
    assert sqnr_db(model(x), program(x)) > 30


def test_observing_often_leaves_nothing_to_eager(every_layer_pays: None) -> None:
    model, x = nn.Sequential(nn.Linear(16, 16)).eval(), torch.randn(8, 16)
    with torch.no_grad():
        for _ in range(10):  # Dynamo makes eight graphs of a function, and then leaves it alone
            with fxq.observe(model, STATIC) as seen:
                model(x)
        fast = torch.compile(model, backend="fxq", options={"recipe": seen.recipe, "strict": True})
        assert 25 < sqnr_db(model(x), fast(x)) < 80


def test_tied_weights_and_modules_of_two_names_are_found(every_layer_pays: None) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
            self.b.weight = self.a.weight
            self.alias = self.a

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x)) * 10) + self.alias(x * 0.1)

    model, x = Tied().eval(), torch.randn(64, 16)
    with torch.no_grad(), fxq.observe(model, STATIC) as seen:
        model(x)

    assert seen.missed == ()
    program = fxq.compress(model, x, seen.recipe, strict=True)
    assert torch.equal(program(x), fxq.compress(model, x, STATIC, data=[x])(x))
    fast = torch.compile(model, backend="fxq", options={"recipe": seen.recipe, "strict": True})
    with torch.no_grad():
        assert sqnr_db(program(x), fast(x)) > 60


def test_an_exact_name_goes_before_the_end_of_one(every_layer_pays: None) -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.block = nn.Linear(16, 16), Inner()
            nn.init.zeros_(self.fc.weight)
            nn.init.zeros_(self.block.fc.weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.fc(x) + 100)

    model, x = Outer().eval(), torch.randn(4, 16)
    with torch.no_grad(), fxq.observe(model, STATIC) as seen:
        model(x)

    observed = fxq.compress(model, x, seen.recipe, strict=True)

    assert torch.equal(observed(x), fxq.compress(model, x, STATIC, data=[x])(x))


def test_records_of_what_was_seen_differ_where_it_does() -> None:
    model = nn.Sequential(nn.Linear(16, 16)).eval()
    recipes = []
    for scale in (1.0, 2.0, 1.0):
        x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0)) * scale
        with torch.no_grad(), fxq.observe(model, STATIC) as seen:
            model(x)
        recipes.append(repr(seen.recipe))

    assert recipes[0] == recipes[2] != recipes[1]


def test_a_compiled_model_is_refused() -> None:
    refused = pytest.raises(TypeError, match=r"before torch\.compile")
    with refused, fxq.observe(torch.compile(Blocks().eval()), STATIC):
        pass


class Parts(nn.Module):
    """Of which only the first part knows the time-step."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        x = self.first(x * timestep.reshape(-1, 1, 1))
        torch._dynamo.graph_break()
        return self.second(torch.relu(x))


def test_a_part_without_the_time_step_stays_as_it_is_and_is_told(every_layer_pays: None) -> None:
    rows = QuantSpec(symmetric=False, rows=ByTimestep((0.5,)))
    layers = InsertObservers(LayerSpec(rows, LAYER.weight))
    recipe = Recipe("rows", (layers, Calibrate(), Convert()))
    model, x, timestep = Parts().eval(), torch.randn(2, 5, 16), torch.tensor([0.1, 1.0])

    with torch.no_grad(), fxq.observe(model, recipe) as seen:
        model(x, timestep)

    assert [layer.name for layer in seen.layers.values()] == ["first"]
    assert seen.missed == ("second",)
    assert "no input 'timestep'" in str(seen)
    fast = torch.compile(model, backend="fxq", options={"recipe": seen.recipe})
    with torch.no_grad(), pytest.warns(FxqWarning, match="as it is: .*no input 'timestep'"):
        assert 25 < sqnr_db(model(x, timestep), fast(x, timestep)) < 80


def test_an_override_need_not_match_in_every_part(every_layer_pays: None) -> None:
    keep = InsertObservers(LAYER, overrides=(("blocks.1.down", None),))
    recipe = Recipe("keep", (keep, *STATIC.passes[1:]))
    model, x = Blocks().eval(), torch.randn(2, 5, 16)
    with torch.no_grad(), fxq.observe(model, recipe) as seen:
        model(x)

    names = {layer.name for layer in seen.layers.values()}
    assert names == {f"blocks.{i}.{part}" for i in range(3) for part in ("up", "down")} - {
        "blocks.1.down"
    } | {"head"}
    fast = torch.compile(model, backend="fxq", options={"recipe": seen.recipe})
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the name of the layer is not the same in its part
        assert sqnr_db(model(x), fast(x)) > 25


def test_a_layer_without_data_stays_float() -> None:
    model, x = TwoHeads().eval(), torch.randn(2, 5, 16)
    with torch.no_grad(), fxq.observe(model, STATIC) as seen:
        model(x, head=False)
        model(x[:0])

    with pytest.raises(SkippedError, match="head: it had no data while it was observed"):
        fxq.compress(model, x, seen.recipe, strict=True)


def test_rows_that_no_call_reached_are_told() -> None:
    rows = QuantSpec(symmetric=False, rows=ByTimestep((0.5, 5.0)))
    recipe = Recipe("rows", (InsertObservers(LayerSpec(rows, LAYER.weight)), *STATIC.passes[1:]))
    model, x = Parts().eval(), torch.randn(2, 5, 16)

    told = pytest.warns(FxqWarning, match="reached no value in rows 1")
    with told, torch.no_grad(), fxq.observe(model, recipe):
        model(x, torch.tensor([0.1, 9.0]))
