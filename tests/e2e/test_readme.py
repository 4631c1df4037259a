"""The code in the documentation works as it is printed, and its links and lists are complete."""

import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pipelines import dit_pipeline
from small_models import ZOO, seeded
from torch import Tensor, nn
from trials import table

import fxq
from fxq.lowering.lower import lower
from fxq.lowering.rule import Device
from fxq.numerics import sqnr_db
from fxq.passes import w8a8
from fxq.passes.common import Convert, InsertObservers
from fxq.pipeline import Recipe

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = {page.relative_to(ROOT).as_posix(): page.read_text() for page in PAGES}


def block(containing: str, page: str | None = None) -> str:
    """Return the only block of code, on one page or on all, with these words in it."""
    pages = TEXT.values() if page is None else [TEXT[page]]
    blocks = [b for text in pages for b in re.findall(r"```python\n(.*?)```", text, re.DOTALL)]
    (found,) = [b for b in blocks if containing in b]
    return found


def module_of(containing: str, name: str, page: str | None = None) -> ModuleType:
    """Return a module with a block of code as its source."""
    module = ModuleType(name)
    sys.modules[name] = module  # dataclasses look their module up
    exec(block(containing, page), module.__dict__)
    return module


def test_the_pass_of_the_documentation_runs_in_front_of_a_recipe() -> None:
    module = module_of("class ReluToIdentity", "readme_pass")
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU()).eval(), torch.randn(4, 8)

    recipe = Recipe("mine", (module.ReluToIdentity(), *w8a8.DYNAMIC.passes))
    program = fxq.compress(model, x, recipe)

    assert bool((program(x) < 0).any())


def test_the_recipe_variant_of_the_documentation_keeps_its_layers_float() -> None:
    scope: dict[str, object] = {"w8a8": w8a8}
    exec(block("overrides=((FIRST"), scope)
    model = nn.Sequential()
    model.add_module("stem", nn.Linear(8, 8))
    model.add_module("body", nn.Linear(8, 8))
    model.add_module("head", nn.Linear(8, 8))
    x = torch.randn(4, 8)

    program = fxq.compress(model.eval(), x, scope["mine"], [x])  # type: ignore[arg-type]

    rows = {r.row.module: r.row.format for r in fxq.report(program).rows}
    assert rows == {"stem": None, "body": "int8 x int8", "head": None}


def test_the_scaling_method_of_the_documentation_runs() -> None:
    module = module_of("class Halve", "readme_method")
    model, x = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)).eval(), torch.randn(64, 8)

    program = fxq.compress(model, x, module.HALVED, [x])

    (row,) = fxq.report(program).rows
    assert "Halve" in row.reason


def test_the_sites_of_the_documentation_are_found() -> None:
    model, example = seeded(ZOO["llama"])
    scope: dict[str, object] = {"fxq": fxq, "model": model, "example_inputs": example}

    exec(block("scale_sites(fxq.capture"), scope)

    printed = re.search(r"Llama: (\{.*?\})", TEXT["docs/scaling.md"])
    assert printed is not None
    assert eval(printed[1]) == scope["found"].count()  # type: ignore[attr-defined]


def test_the_sparse_attention_of_the_documentation_is_accepted() -> None:
    model, _ = seeded(ZOO["wan"])
    scope: dict[str, Any] = {"torch": torch, "pipe": SimpleNamespace(transformer=model)}

    exec(block("ReplaceAttention(density=(0.2, 1.0)"), scope)

    assert scope["sparse"].densities == (0.2, 1.0)
    assert callable(scope["pipe"].transformer)


def test_the_first_steps_run() -> None:
    scope: dict[str, Any] = {}

    exec(block("nn.Sequential(nn.Linear(64, 256)"), scope)
    exec(block("print(fxq.report(program))", "docs/getting-started.md"), scope)

    assert scope["program"](torch.randn(5, 64)).shape == (5, 10)
    statuses = {row.status for row in fxq.report(scope["program"]).rows}
    assert statuses == {"simulated"}  # as the page says of such small layers


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::fxq.errors.FxqWarning")  # tiny layers have no kernel
def test_a_classifier_is_validated_as_the_page_says() -> None:
    model, _ = seeded(ZOO["vit"])
    images, labels = torch.randn(32, 3, 16, 16), torch.zeros(32, dtype=torch.int64)
    dataset = torch.utils.data.TensorDataset(images, labels)
    scope: dict[str, Any] = {"fxq": fxq, "torch": torch, "model": model}
    scope["loader"] = torch.utils.data.DataLoader(dataset, batch_size=16)

    exec(block("hits = sum("), scope)

    assert abs(scope["hits"] - int((model(images).argmax(-1) == labels).sum())) <= 2
    assert sqnr_db(model(images), scope["fast"](images)) > 25


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::fxq.errors.FxqWarning")
def test_tokens_are_generated_as_the_page_says() -> None:
    model, _ = seeded(ZOO["llama"])
    ids = torch.randint(1, 50, (2, 5))
    call = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(ids, **call)

    exec(block("model.generate(ids"), {"torch": torch, "model": model, "ids": ids})

    # Layers this small stay float here: so the tokens are the same.
    assert torch.equal(model.generate(ids, **call), expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::fxq.errors.FxqWarning")
def test_a_pipeline_draws_as_the_page_says() -> None:
    pipe = dit_pipeline()
    scope: dict[str, Any] = {"fxq": fxq, "torch": torch, "pipe": pipe, "prompt": [1]}

    exec(block("image = pipe(prompt"), scope)

    assert scope["image"].size == (8, 8)
    assert len(scope["calls"]) == 2


def test_the_table_of_what_runs_is_that_of_the_trials() -> None:
    assert table() in TEXT["docs/getting-started.md"]


def test_every_stage_of_a_recipe_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    x = torch.randn(4, 8)
    scope: dict[str, Any] = {"fxq": fxq, "w8a8": w8a8, "example_inputs": x, "batches": [x]}
    scope["model"] = nn.Sequential(nn.Linear(8, 8)).eval()

    exec(block("history=stages"), scope)

    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == ["capture", "InsertObservers", "Calibrate", "Convert"]


class Pipeline:
    """Calls its transformer three times, with other values each time."""

    def __init__(self) -> None:
        self.transformer = nn.Sequential(nn.Linear(8, 8)).eval()

    def __call__(self, prompt: str) -> None:
        for step in range(3):
            self.transformer(torch.full((2, 8), float(step)))


def test_calls_of_a_pipeline_calibrate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {"fxq": fxq, "w8a8": w8a8, "pipe": Pipeline(), "prompt": ""}

    exec(block("fxq.record(pipe.transformer", "docs/calibrating.md"), scope)

    assert len(scope["calls"]) == len(fxq.Recorded.load("calls")) == 3
    assert scope["program"](torch.ones(1, 8)).shape == (1, 8)


def test_what_was_observed_is_a_recipe() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8)).eval(), torch.randn(4, 8)
    scope: dict[str, Any] = {"fxq": fxq, "torch": torch, "w8a8": w8a8, "model": model}

    exec(block("fxq.observe(model"), scope | {"run": lambda: model(x)}, scope)

    observer = next(iter(scope["seen"].layers.values())).observer
    assert float(observer.low) == float(x.min())
    assert float(observer.high) == float(x.max())
    program = fxq.compress(model, x, scope["seen"].recipe)
    assert fxq.report(program).rows[0].row.format == "int8 x int8"


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.layer(x * (1 + timestep.reshape(-1, 1, 1)))


def test_a_range_per_noise_level_has_its_rows() -> None:
    scope: dict[str, Any] = {}
    exec(block("ByTimestep(levels=(200.0"), scope)
    batches = [(torch.randn(2, 3, 8), torch.full((2,), level)) for level in (100.0, 500.0, 900.0)]

    program = fxq.compress(Denoiser().eval(), batches[0], scope["recipe"], batches)

    (table,) = [b for name, b in program.named_buffers() if "table_of_scales" in name]
    low, middle, high = table.flatten().tolist()
    assert 2 * low < middle < high


def test_floating_point_weights_are_codes() -> None:
    scope: dict[str, Any] = {}
    exec(block('Float8("e4m3")'), scope)

    recipe = Recipe("fp8", (InsertObservers(scope["fp8"]), Convert()))
    program = fxq.compress(nn.Sequential(nn.Linear(8, 8)).eval(), torch.randn(2, 8), recipe)

    (row,) = fxq.report(program).rows
    assert (row.row.format, row.kernel) == ("float32 x fp8_e4m3", None)


def test_the_weight_method_chooses_the_codes() -> None:
    module = module_of("class RoundUp", "contributing_round_up")
    model, x = nn.Sequential(nn.Linear(8, 4)).eval(), torch.randn(3, 8)

    program = fxq.compress(model, x, module.ROUND_UP)

    layer = model[0]
    scale = layer.weight.abs().amax(1, keepdim=True) / 7
    expected = F.linear(x, torch.ceil(layer.weight / scale).clamp(-7, 7) * scale, layer.bias)
    torch.testing.assert_close(program(x), expected, rtol=1e-6, atol=1e-6)


class Small(nn.Module):
    """A layer, an MLP and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(32, 32), nn.Linear(32, 4)
        self.mlp = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mlp(self.first(x).relu()))


def test_weights_are_pruned_and_rounded_by_data_as_the_page_says(
    capsys: pytest.CaptureFixture[str],
) -> None:
    scope: dict[str, Any] = {}
    exec(block("Wanda(Group(2, 4)", "docs/quantization.md"), scope)
    exec(block("InduceSparsity(Magnitude", "docs/quantization.md"), scope)
    model, data = Small().eval(), [torch.randn(16, 32) for _ in range(4)]

    found = {}
    for name in ("chosen", "induced"):
        program = fxq.compress(model, data[0], scope[name], data)
        found[name] = {row.row.module: row for row in fxq.report(program).rows}

    # 60 % of 32 are 19, of 64 are 38
    shares = {name: row.sparsity for name, row in found["chosen"].items()}
    assert shares == {"first": 0.5, "mlp.0": 19 / 32, "mlp.2": 38 / 64, "head": None}
    formats = {name: row.row.format for name, row in found["chosen"].items()}
    assert formats.pop("head") is None
    assert set(formats.values()) == {"float32 x int4"}
    assert {row.sparsity for row in found["induced"].values()} <= {0.5, None}
    assert found["induced"]["first"].sparsity == 0.5
    exec(block("row.induction", "docs/quantization.md"), {"fxq": fxq, "program": program})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[::2]] == [
        [name, "0.5"] for name in ("first", "mlp.0", "mlp.2")
    ]


def test_samples_are_chosen_as_the_page_on_generators_says() -> None:
    model = nn.Sequential()
    model.add_module("blocks", nn.Sequential(*(nn.Linear(8, 8) for _ in range(12))))
    labels = [k % 2 for k in range(256)]
    samples = [torch.randn(1, 5, 8) for _ in labels]
    scope: dict[str, Any] = {
        "model": model.eval(), "samples": samples, "labels": labels, "example": samples[0],
    }  # fmt: skip

    exec(block("pooled_features", "docs/generators.md"), scope)

    chosen = scope["chosen"]
    assert len(set(chosen)) == 128
    assert sum(labels[k] for k in chosen) == 64
    assert isinstance(scope["program"], fxq.Program)


def test_the_rule_takes_the_weight_only_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    module = module_of("class W8Linear", "documented_rule")
    device = Device("foo", lambda device: True, (module.FOO_LINEAR,))
    monkeypatch.setattr("fxq.lowering.devices.installed", lambda: (device,))
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 4)).eval()
    program = fxq.compress(model, torch.randn(2, 8), "w8")

    _, decisions = lower(program.graph_module, torch.device("cpu"))

    assert [decision.kernel for decision in decisions.values()] == ["foo w8_linear", None]
    assert fxq.verify(program, torch.randn(2, 8)).ok


@pytest.mark.parametrize("page", TEXT)
def test_every_link_leads_to_a_page_and_a_heading(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXT[page]):
        path, _, anchor = target.partition("#")
        found = (ROOT / page).parent / path if path else ROOT / page

        assert found.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", found.read_text(), re.MULTILINE)
            words = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
            assert anchor in [heading.replace(" ", "-") for heading in words]


def test_every_page_is_in_the_menu() -> None:
    menu = (ROOT / "mkdocs.yml").read_text()

    assert all(f"- {page.name}\n" in menu for page in (ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("name", fxq.__all__)
def test_every_public_name_is_listed(name: str) -> None:
    assert re.search(rf"`fxq\.{name}\b", TEXT["docs/api.md"])


def test_every_installed_recipe_is_listed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    missing = [
        name
        for name in project["entry-points"]["fxq.recipes"]
        if f"`{name}`" not in TEXT["docs/quantization.md"]
    ]
    assert not missing


def test_a_cache_is_kept_as_the_page_says() -> None:
    model, _ = seeded(ZOO["llama"])
    sequences = torch.randint(1, 50, (8, 13))
    prompt = sequences[:2, :5]
    scope: dict[str, Any] = {"fxq": fxq, "model": model, "sequences": sequences, "prompt": prompt}

    exec(block("QuantizeCache()", "docs/generators.md"), scope)

    expected = model.generate(prompt, max_new_tokens=8, do_sample=False)[:, 5:]
    assert (scope["tokens"] == expected).float().mean() > 0.8
    assert {value.dtype for value in scope["program"].state.values()} == {torch.int8}
