"""Sparse attention through `torch.compile`: one graph over a denoising loop, models as they are."""

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_models import ZOO, seeded
from sparse_models import JointAttention, additive, below_length, joint_inputs
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.utils._pytree import tree_leaves

import fxq
from fxq import backend, set_step
from fxq.errors import FxqWarning
from fxq.lowering import apply_where_it_pays
from fxq.lowering.devices import x86
from fxq.lowering.rule import Decision
from fxq.passes import w8a8
from fxq.passes.rectified_spaattn import TOPK_20, ReplaceAttention, set_densities
from fxq.pipeline import Recipe
from fxq.rows import ByStep, ByTimestep

NOISE = (1000.0, 750.0, 500.0, 250.0, 1.0)
SMALL = ReplaceAttention(
    density=(0.3, 1.0), rows=ByTimestep((600.0,)), block_size=4, min_tokens=8, keep_neighbours=False
)


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was handed to Inductor."""
    made: list[Any] = []
    compile_fx = backend.compile_fx

    def recording(gm: Any, *args: Any, **kwargs: Any) -> Any:
        made.append(gm)
        return compile_fx(gm, *args, **kwargs)

    monkeypatch.setattr(backend, "compile_fx", recording)
    return made


def compiled(model: Any, *passes: Any, strict: bool = False) -> Any:
    options = {"recipe": Recipe("test", passes), "strict": strict}
    return torch.compile(model, backend="fxq", fullgraph=True, options=options)


def outputs(model: Any, example: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return tree_leaves(model(**example))[0]


def check_loop(model: Any, example: dict[str, Any], attention: ReplaceAttention) -> None:
    """Denoise with the compiled model: dense at high noise, as simulated below."""
    program = fxq.compress(model, example, Recipe("test", (attention,)))
    fast = compiled(model, attention)
    rows = attention.rows
    assert isinstance(rows, ByTimestep)
    for noise in NOISE:
        scale = rows.levels[0] / 600
        step = torch.full_like(example["timestep"], 1) * (noise * scale)
        example["timestep"] = step.to(example["timestep"].dtype)

        found, simulated = outputs(fast, example), outputs(program, example)

        torch.testing.assert_close(found, simulated, atol=5e-6, rtol=1e-4)
        dense = torch.allclose(found, outputs(model, example), atol=5e-6, rtol=1e-4)
        assert dense == (noise > 600)


def test_one_graph_serves_a_loop_from_dense_to_sparse(compilations: list[Any]) -> None:
    model = JointAttention("last", below_length).eval()

    check_loop(model, joint_inputs() | {"timestep": torch.zeros(2)}, SMALL)

    assert len(compilations) == 1


@pytest.mark.slow
@pytest.mark.parametrize("family", ["wan", "hunyuan_video", "flux", "cogvideox"])
def test_unmodified_families_denoise_in_one_graph(family: str, compilations: list[Any]) -> None:
    model, example = seeded(ZOO[family])
    level = 0.6 if family == "flux" else 600.0  # its pipeline divides time-steps by 1000
    attention = replace(SMALL, density=(0.3, 1.0), rows=ByTimestep((level,)))

    check_loop(model, example, attention)

    assert len(compilations) == 1


def test_a_step_counter_and_new_densities_do_not_compile_again(compilations: list[Any]) -> None:
    model, example = JointAttention().eval(), joint_inputs()
    recipe = Recipe("test", (replace(SMALL, density=(1.0, 0.3), rows=ByStep(2)),))
    program = fxq.compress(model, example, recipe)
    fast = torch.compile(program, backend="fxq", fullgraph=True)
    expected = outputs(model, example)

    errors = []
    for step in (0, 1, 2):
        set_step(fast, step)
        errors.append(float((outputs(fast, example) - expected).abs().max()))
    set_densities(fast, [[1.0], [1.0]])
    errors.append(float((outputs(fast, example) - expected).abs().max()))

    assert [error < 5e-6 for error in errors] == [True, False, False, True]
    assert len(compilations) == 1


def test_levels_that_no_step_reaches_are_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "compile_fx", lambda gm, *args, **kwargs: gm)
    model, example = JointAttention().eval(), joint_inputs()
    fast = compiled(model, SMALL)

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", FxqWarning)
        for noise in (1.0, 0.75, 0.5, 0.25) * 2:  # where levels are of 1000 to 0
            outputs(fast, example | {"timestep": torch.full((2,), noise)})

    (text,) = [str(w.message) for w in told if w.category is FxqWarning]
    assert "found 0.25 to 1 in a run of 4 steps, and none above 600;" in text


def test_quantized_linears_and_sparse_attention_compile_together(
    compilations: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(x86, "WITH_VNNI", x86.Thresholds(0, 0))
    monkeypatch.setattr(x86, "WITHOUT_VNNI", x86.Thresholds(0, 0))
    model, example = JointAttention(head_dim=32).eval(), joint_inputs()
    attention = replace(SMALL, density=0.3, rows=None)
    recipe = Recipe("both", (*w8a8.DYNAMIC.passes, attention))

    program = fxq.compress(model, example, recipe, strict=True)

    expected = outputs(program, example)
    for fast in (
        torch.compile(program, backend="fxq", fullgraph=True),
        compiled(model, *recipe.passes),
    ):
        found = outputs(fast, example)
        # Rounding between codes: what Inductor fuses rounds differently.
        assert float((found - expected).norm() / expected.norm()) < 2e-2
    verification = fxq.verify(program, example)
    assert verification.ok, str(verification)
    assert len(compilations) == 2


class Blocks(nn.Module):
    """Two blocks, each of which has an attention and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        attentions = (nn.ModuleDict({"attn1": JointAttention("none")}) for _ in range(2))
        self.blocks = nn.ModuleList(attentions)

    def forward(self, video: Tensor, text: Tensor, valid: Tensor) -> Tensor:
        first, second = (block["attn1"](video, text, valid) for block in self.blocks)
        return first + second


def test_overrides_name_layers_as_in_the_model(compilations: list[Any]) -> None:
    model, example = Blocks().eval(), joint_inputs()
    attention = replace(SMALL, density=0.3, rows=None, overrides=(("blocks.0.attn1", None),))
    with pytest.raises(BackendCompilerFailed, match=r"or 'blocks\.0\.attn1'"):
        outputs(compiled(model, replace(attention, overrides=(("blocks.7", None),))), example)

    own = replace(attention, overrides=(("blocks.0.attn1", 0.6),))
    expected = outputs(fxq.compress(model, example, Recipe("own", (own,))), example)
    found = outputs(compiled(model, own), example)

    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert len(compilations) == 1


def test_sparse_attention_without_a_kernel_stays_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    lower = apply_where_it_pays.lower

    def declining(*args: Any) -> Any:
        lowered, decisions = lower(*args)
        return lowered, {name: Decision(None, "the reference: too odd") for name in decisions}

    monkeypatch.setattr(apply_where_it_pays, "lower", declining)
    model, example = JointAttention().eval(), joint_inputs()
    attention = replace(SMALL, density=0.3, rows=None)
    with pytest.warns(FxqWarning, match=r"changed nothing and left 1 of 1 layers.* too odd \(1\)"):
        found = outputs(compiled(model, attention), example)

    torch.testing.assert_close(found, outputs(model, example), atol=5e-6, rtol=1e-4)
    sparse = outputs(fxq.compress(model, example, Recipe("sparse", (attention,))), example)
    assert float((found - sparse).abs().max()) > 1e-3


def test_what_the_recipe_could_not_do_is_a_warning_or_an_error() -> None:
    model, example = JointAttention("last", additive).eval(), joint_inputs()

    with pytest.warns(FxqWarning, match="left as it was\n.*not key padding"):
        outputs(compiled(model, SMALL), example)
    torch._dynamo.reset()
    with pytest.raises(BackendCompilerFailed, match=r"strict=True, and 'test' left as it was"):
        outputs(compiled(model, SMALL, strict=True), example)


def test_short_sequences_stay_dense_with_the_papers_recipe(compilations: list[Any]) -> None:
    model, example = JointAttention().eval(), joint_inputs()
    fast = torch.compile(model, backend="fxq", options={"recipe": TOPK_20}, fullgraph=True)

    with pytest.warns(FxqWarning, match=r"changed nothing[\s\S]*dense is faster below 4096"):
        found = outputs(fast, example)

    torch.testing.assert_close(found, outputs(model, example), atol=5e-6, rtol=1e-4)
    assert len(compilations) == 1


def test_a_counter_of_steps_needs_a_program() -> None:
    recipe = Recipe("counted", (replace(SMALL, density=(1.0, 0.2), rows=ByStep(2)),))
    fast = torch.compile(JointAttention().eval(), backend="fxq", options={"recipe": recipe})

    with pytest.raises(BackendCompilerFailed, match=r"call fxq\.compress"):
        outputs(fast, joint_inputs())
