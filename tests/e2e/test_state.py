"""What a model keeps and writes, under torch.compile: eager code is the judge, state included."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from stateful_models import Assigned, Cache, Masked, Swap, calls, run, seeded
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.fx import GraphModule
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import fxq
from fxq import backend, bound_graph
from fxq.errors import FxqWarning, PassError, UnsupportedError
from fxq.numerics import sqnr_db
from fxq.pipeline import FLOAT

OPTIONS = {"recipe": FLOAT, "check": True}


# Ways to copy a square, of which Inductor takes some for no work.
COPIES: dict[str, Callable[[Tensor], Tensor]] = {
    "clone": Tensor.clone,
    "clone of a view": lambda t: t.t().clone().t(),
    "cast": lambda t: t.double().float(),
    "sum with zero": lambda t: t + torch.zeros(3, 3),
    "concatenation": lambda t: torch.cat([t]),
    "relu": Tensor.relu,
}


@pytest.mark.parametrize("build", [Cache, Swap, Assigned, Masked])
@pytest.mark.parametrize("through", ["model", "program"])
def test_compiled_code_writes_what_the_model_writes(
    build: Callable[[], nn.Module], through: str
) -> None:
    inputs = calls(build)
    model, judge = (seeded() if build is Cache else build().eval() for _ in range(2))
    given = fxq.compress(model, inputs[0], FLOAT) if through == "program" else model
    compiled = torch.compile(given, backend="fxq", options=OPTIONS)

    found, expected = run(compiled, inputs), run(judge, inputs)

    torch.testing.assert_close(found, expected)
    state = given.state if isinstance(given, fxq.Program) else dict(model.named_buffers())
    torch.testing.assert_close(state, dict(judge.named_buffers()))


@pytest.mark.parametrize("taken", COPIES)
def test_what_is_read_before_a_write_is_what_was_there_before(taken: str) -> None:
    def swap(a: Tensor, b: Tensor) -> None:
        old = COPIES[taken](a)
        a.copy_(b)
        b.copy_(old)

    a, b = torch.arange(9.0).view(3, 3), torch.ones(3, 3)
    expected = COPIES[taken](a), b.clone()

    torch.compile(swap, backend="fxq", options={"recipe": FLOAT})(a, b)

    torch.testing.assert_close((b, a), expected)


def test_caches_on_disk_know_the_definitions_they_were_made_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tags, compile_fx = [], backend.compile_fx

    def spy(*args: Any, **kwargs: Any) -> Any:
        tags.append(torch.compiler.config.cache_key_tag)
        return compile_fx(*args, **kwargs)

    monkeypatch.setattr(backend, "compile_fx", spy)
    for path in (backend.numerics.__file__, __file__):  # definitions, and others
        monkeypatch.setattr(backend.numerics, "__file__", path)
        torch._dynamo.reset()
        torch.compile(torch.sin, backend="fxq", options=OPTIONS)(torch.ones(2))

    assert len({torch.compiler.config.cache_key_tag, *tags}) == 3


def test_results_that_are_views_of_what_was_written_stay_views() -> None:
    def write(c: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        c.add_(x)
        return c, c[:, :1], c.chunk(2)[1], c.t().reshape(2, 3, 2), c.clone(), x.view(-1)

    c, x = torch.zeros(4, 3), torch.ones(4, 3)
    whole, part, half, turned, copied, other = torch.compile(write, backend="fxq", options=OPTIONS)(
        c, x
    )
    c.add_(5)

    assert whole is c
    assert [value.flatten()[0].item() for value in (part, half, copied)] == [6.0, 6.0, 1.0]
    expected = write(torch.full((4, 3), 5.0), x)[3]
    assert turned.shape == expected.shape
    assert other.data_ptr() == x.data_ptr()


def test_a_layer_whose_weight_the_graph_writes_stays_right() -> None:
    class Decays(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("weight", torch.randn(64, 64))

        def forward(self, x: Tensor) -> Tensor:
            self.weight *= 0.5
            return nn.functional.linear(x, self.weight)

    torch.manual_seed(0)
    model, x = Decays().eval(), torch.randn(8, 64)
    first = x @ model.weight.T * 0.5
    compiled = torch.compile(model, backend="fxq", options={"recipe": FLOAT})

    torch.testing.assert_close(compiled(x), first)
    torch.testing.assert_close(compiled(x), first * 0.5)


def test_batch_norm_in_train_mode_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))

    with pytest.raises(BackendCompilerFailed, match=r"expected eval mode, found aten\.batch_norm"):
        torch.compile(model, backend="fxq")(torch.randn(3, 4))

    assert not model[1].running_mean.any()


def test_arguments_that_share_written_memory_are_refused() -> None:
    def write(a: Tensor, b: Tensor) -> Tensor:
        a.add_(1)
        return a + b

    compiled, memory = torch.compile(write, backend="fxq", options=OPTIONS), torch.zeros(6)

    compiled(torch.zeros(4), torch.zeros(4))
    with pytest.raises(UnsupportedError, match=r"'a', which the model writes to.*with 'b'"):
        compiled(memory[:4], memory[2:])


def test_an_operator_that_turns_its_argument_turns_it() -> None:
    def turn(x: Tensor) -> Tensor:
        x.t_()
        return x * 2

    x = torch.arange(6.0).view(2, 3)
    expected = x.T * 2

    assert torch.equal(torch.compile(turn, backend="fxq", options=OPTIONS)(x), expected)
    assert x.shape == (3, 2)


def test_a_cache_in_a_plain_attribute_works_under_torch_compile() -> None:
    class Past(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.past: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            h = self.layer(x)
            self.past = h if self.past is None else torch.cat([self.past, h])
            return self.past.sum(0)

    torch.manual_seed(0)
    model, x = Past().eval(), torch.randn(2, 4)
    with torch.no_grad():
        expected = [model(x), model(x), model(x)]
        model.past = None
        compiled = torch.compile(model, backend="fxq", options=OPTIONS)
        torch.testing.assert_close([compiled(x), compiled(x), compiled(x)], expected)


def test_vmap_is_traced_through_on_both_paths() -> None:
    class Mapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            y = torch.vmap(lambda row: row.sin() * row.sum())(self.layer(x))
            return y + torch.arange(4.0) * self.count

    model, judge = Mapped().eval(), Mapped().eval()
    judge.load_state_dict(model.state_dict())
    inputs = [(torch.randn(3, 4),), (torch.randn(3, 4),)]
    program = fxq.compress(model, inputs[0], FLOAT)

    expected = run(judge, inputs)
    torch.testing.assert_close(run(program, inputs), expected)
    torch.testing.assert_close(
        run(torch.compile(model, backend="fxq", options=OPTIONS), inputs), expected
    )


def test_a_graph_that_calls_others_is_left_to_inductor() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            return torch.cond(x.sum() > 0, lambda y: self.layer(y), lambda y: y * 2, (x,))

    model, judge = Branches().eval(), Branches().eval()
    judge.load_state_dict(model.state_dict())
    inputs = [(torch.ones(2, 4),), (-torch.ones(2, 4),)]

    with pytest.warns(FxqWarning, match="Inductor compiles a graph as it is: .* found cond"):
        found = run(torch.compile(model, backend="fxq"), inputs)
    torch.testing.assert_close(found, run(judge, inputs))
    assert model.count == 2
    torch._dynamo.reset()
    with pytest.raises(BackendCompilerFailed, match="found cond"):
        torch.compile(model, backend="fxq", options={"strict": True})(*inputs[0])


def broken(gm: GraphModule) -> GraphModule:
    """Make sums of the products in a graph."""
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor):
        node.target = torch.ops.aten.add.Tensor
    gm.recompile()
    return gm


@pytest.mark.parametrize("step", ["capture", "lowering"])
@pytest.mark.parametrize("recipe", ["float", "w8a8_dynamic"])
def test_check_raises_where_compiled_code_departs_from_eager(
    step: str, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    canonicalize, apply = bound_graph.canonicalize, backend.apply_where_it_pays
    if step == "capture":
        monkeypatch.setattr(bound_graph, "canonicalize", lambda gm: broken(canonicalize(gm)))
    else:

        def apply_and_break(*args: Any) -> Any:
            applied = apply(*args)
            broken(applied.lowered)
            return applied

        monkeypatch.setattr(backend, "apply_where_it_pays", apply_and_break)
    layer = nn.Linear(512, 512)

    def scale(x: Tensor) -> Tensor:
        return layer(x) * 3

    x = torch.randn(256, 512)  # enough for int8 to pay on every x86
    with torch.no_grad():
        checked = torch.compile(scale, backend="fxq", options={"recipe": recipe, "check": True})
        with pytest.raises(PassError, match="found that result 0 is another"):
            checked(x)


def test_check_accepts_what_quantization_costs() -> None:
    layer, x = nn.Linear(512, 512), torch.randn(256, 512)
    with torch.no_grad():
        checked = torch.compile(layer, backend="fxq", options={"check": True})
        assert 20 < sqnr_db(layer(x), checked(x)) < 60


SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 61, "max_position_embeddings": 64,
    "pad_token_id": 0, "eos_token_id": None, "bos_token_id": 1,
}  # fmt: skip
CACHES: dict[str, tuple[Any, Callable[..., Any]]] = {
    "dynamic": (LlamaForCausalLM, partial(LlamaConfig, **SIZES)),
    "static": (LlamaForCausalLM, partial(LlamaConfig, **SIZES)),
    "static, sliding window": (
        MistralForCausalLM, partial(MistralConfig, **SIZES, sliding_window=6),
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("cache", "n_layers"),
    [("static", 1), *(pytest.param(cache, 2, marks=pytest.mark.slow) for cache in CACHES)],
)
def test_generate_agrees_with_eager_token_by_token(cache: str, n_layers: int) -> None:
    kind, build = CACHES[cache]
    config = build(num_hidden_layers=n_layers)
    torch.manual_seed(0)
    model = kind(config).eval()
    ids = torch.randint(1, 61, (2, 5))

    def generate() -> Tensor:
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=6,
            do_sample=False,
            cache_implementation=cache.partition(",")[0],
        )

    expected = generate()
    model.forward = torch.compile(model.forward, backend="fxq", options={"recipe": FLOAT})

    assert torch.equal(generate(), expected)
