"""A program takes the model's place: in pipelines, loops and other people's code."""

from types import SimpleNamespace

import pytest
import torch
from models import Block
from pipelines import dit_pipeline
from small_models import seeded, vit
from torch import nn

import fxq
from fxq.errors import SkippedError
from fxq.passes import w8a8
from fxq.passes.common import Convert, InsertObservers
from fxq.pipeline import Recipe
from fxq.spec import LayerSpec, PerGroup, QuantSpec


def test_dit_pipeline_runs_with_a_program_for_its_transformer() -> None:
    pipe = dit_pipeline()
    transformer = pipe.transformer

    def draw() -> torch.Tensor:
        noise = torch.Generator().manual_seed(0)
        return torch.from_numpy(
            pipe([1], num_inference_steps=2, generator=noise, output_type="np").images
        )

    expected = draw()
    example = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([3, 3]),
        "class_labels": torch.tensor([1, 1000]),
    }
    pipe.transformer = fxq.compress(transformer, example, w8a8.DYNAMIC)

    found = draw()

    assert pipe.transformer.config.sample_size == 8
    assert 0 < float((found - expected).abs().max()) < 0.05


def test_output_classes_and_return_dict_are_the_models() -> None:
    transformers = pytest.importorskip("transformers")
    from small_models import llama

    model, example = seeded(llama)
    program = fxq.compress(model, example, w8a8.DYNAMIC)

    output = program(**example)
    as_tuple = program(example["input_ids"], return_dict=False)

    assert isinstance(output, transformers.modeling_outputs.CausalLMOutputWithPast)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], output.logits)
    assert program.config is model.config


def test_plain_attributes_dtype_and_device_are_kept() -> None:
    model, example = seeded(vit)

    program = fxq.compress(model.bfloat16(), example.bfloat16(), w8a8.DYNAMIC)

    assert program.num_classes == model.num_classes
    assert program.dtype == torch.bfloat16
    assert program.device == torch.device("cpu")
    assert not program.training
    assert not any(p.requires_grad for p in program.parameters())


def test_a_program_keeps_no_tensor_of_the_model() -> None:
    model, x = Block().eval(), torch.randn(2, 5, 64)
    program = fxq.compress(model, x, w8a8.DYNAMIC)
    before = program(x)

    with torch.no_grad():
        for p in model.parameters():
            p.zero_()

    assert torch.equal(program(x), before)


def test_a_model_without_tensors_is_a_program_too() -> None:
    program = fxq.compress(nn.ReLU().eval(), torch.randn(2, 8), w8a8.DYNAMIC)

    assert bool((program(torch.randn(3, 8)) >= 0).all())
    assert program.dtype == torch.float32
    assert fxq.report(program).flops == 0


def test_eval_is_accepted_and_train_refused() -> None:
    program = fxq.compress(nn.Linear(8, 8).eval(), torch.randn(2, 8), w8a8.DYNAMIC)

    assert program.eval() is program
    with pytest.raises(ValueError, match="no train mode"):
        program.train()


def test_changing_the_dtype_is_refused() -> None:
    program = fxq.compress(nn.Linear(8, 8).eval(), torch.randn(2, 8), w8a8.DYNAMIC)

    with pytest.raises(ValueError, match=r"convert the model before compressing"):
        program.half()


def test_a_bfloat16_program_is_not_made_float_in_silence() -> None:
    x = torch.randn(2, 8).bfloat16()
    program = fxq.compress(nn.Linear(8, 8).bfloat16().eval(), x, "w8")

    with pytest.raises(ValueError, match=r"found the dtype torch\.float32"):
        program.float()


def linear() -> SimpleNamespace:
    return SimpleNamespace(model=nn.Linear(8, 8).eval(), x=torch.randn(2, 8))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, r"calibrates \(Calibrate\) and needs data=, found none"),
        ([], r"expected at least one batch, found no data"),
        ([torch.full((2, 8), torch.inf)], r"data batch 0, input 'input': .*found 16 NaN or Inf"),
        ([torch.randn(2, 9)], r"batch 0: expected shape \['any', 8\] for 'input', found \[2, 9\]"),
        ([torch.randn(2, 8).double()], r"batch 0: expected torch.float32 for 'input', found .*64"),
        ([torch.randn(2, 8, device="meta")], r"batch 0: expected 'input' on cpu, found meta"),
    ],
)  # fmt: skip
def test_bad_calibration_data_is_refused_with_what_to_do(data: object, message: str) -> None:
    case = linear()

    with pytest.raises(ValueError, match=message):
        fxq.compress(case.model, case.x, w8a8.STATIC, data)  # type: ignore[arg-type]


def test_an_unknown_recipe_names_its_neighbour() -> None:
    case = linear()

    with pytest.raises(
        ValueError, match="unknown recipe 'w8a8_statik'; did you mean 'w8a8_static'"
    ):
        fxq.compress(case.model, case.x, "w8a8_statik")


@pytest.mark.filterwarnings("ignore:recipe .* changed nothing")
def test_strict_raises_what_a_pass_had_to_skip() -> None:
    case = linear()
    layer = LayerSpec(None, QuantSpec(granularity=PerGroup(3)))
    recipe = Recipe("groups", (InsertObservers(layer), Convert()))

    assert fxq.report(fxq.compress(case.model, case.x, recipe)).share("float") == 1.0
    with pytest.raises(SkippedError, match="divisible by 3, found 8"):
        fxq.compress(case.model, case.x, recipe, strict=True)


def test_passes_in_the_wrong_order_are_refused() -> None:
    with pytest.raises(ValueError, match="Convert reads OBSERVED"):
        Recipe("upside down", (Convert(), Convert()))


def test_report_accounts_for_every_operation() -> None:
    model, example = seeded(vit)
    program = fxq.compress(model, example, w8a8.DYNAMIC)

    report = fxq.report(program, torch.randn(4096, 3, 16, 16))

    shares = [report.share(status) for status in ("lowered", "simulated", "float")]
    assert sum(shares) == pytest.approx(1.0)
    assert min(shares[0], shares[2]) > 0.0
    assert all(row.kernel or row.reason for row in report.rows)
    # By hand, per image: patches 16 * 32 * 48, then per block 17 tokens * 32 * (96 + 32 + 128 +
    # 128) and attention 2 * 17 * 17 * 32, two blocks, head 32 * 5; a multiply-add counts as two.
    per_image = 16 * 32 * 48 + 2 * (17 * 32 * 384 + 2 * 17 * 17 * 32) + 32 * 5
    assert report.flops == 2 * 4096 * per_image
