"""What a user gives in another form than the model, the example or a weight had: computed as the
model computes it, or refused in one line."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

import fxq
from fxq import files
from fxq.account import account
from fxq.errors import FxqWarning, UnsupportedError
from fxq.numerics import sqnr_db


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(64, 64)

    def forward(
        self, x: Tensor, scale: tuple[float, ...] | None = (2.0,), k: int = 0, mask: Any = None
    ) -> Tensor:
        y = self.linear(x) * (1.0 if scale is None else scale[0])
        return y if k is False else y * 5


X = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"scale": None}, "expected no 'scale', as in the example, found None"),
        ({"k": False}, "expected the constant 0 of the example, found False"),
        ({"k": 0.0}, "expected the constant 0 of the example, found 0.0"),
        ({"mask": X}, r"expected the constant None of the example, found a tensor torch.float32"),
        ({"mask": [X, X]}, "expected 'mask' to be None, as in the example, found a list of 2"),
    ],
)  # fmt: skip
def test_arguments_that_are_others_are_refused(call: dict[str, Any], message: str) -> None:
    program = fxq.compress(Scaled().eval(), X, "float")
    assert sqnr_db(Scaled().eval()(X), program(X)) > 100
    with pytest.raises((ValueError, TypeError), match=message):
        program(X, **call)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (X.half(), r"RuntimeError: mat1 and mat2.*found x a tensor torch.float16 \[4, 64\]"),
        (X.long(), r"found x a tensor torch.int64 \[4, 64\]"),
        (X[:, :63], r"found x a tensor torch.float32 \[4, 63\]"),
        (X.numpy(), "TypeError"),
    ],
)
def test_an_example_that_the_model_cannot_take(example: Any, message: str) -> None:
    message = rf"example_inputs: the model itself cannot take them: .*{message}"
    with pytest.raises(ValueError, match=message):
        fxq.compress(Scaled().eval(), example, "w8a8_dynamic")


def test_entries_of_batches_that_the_model_does_not_know_are_left_out_and_told() -> None:
    batches = [{"x": X, "labels": torch.zeros(4)}]
    with pytest.warns(FxqWarning, match=r"data: entries of other names are left out: \['labels'\]"):
        program = fxq.compress(Scaled().eval(), X, "w8a8_static", batches)
    assert torch.equal(program(X), fxq.compress(Scaled().eval(), X, "w8a8_static", [X])(X))
    with pytest.raises(TypeError, match="no argument 'inputs'"):
        fxq.compress(Scaled().eval(), X, "w8a8_static", [{"inputs": X}])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fxq.compress(Scaled().eval(), X, "w8a8_static", 3), "data: expected batches"),
        (lambda: fxq.compress(Scaled().eval(), X, "float", strict="no"), "strict: expected True"),
        (lambda: fxq.record(Scaled().eval(), 3), "run: expected a function"),
    ],
)
def test_settings_of_the_wrong_type(call: Callable[[], object], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call()


def test_a_pickled_program_runs_and_says_what_it_lacks() -> None:
    program = fxq.compress(Scaled().eval(), X, "w8a8_dynamic")
    unpickled = pickle.loads(pickle.dumps(program))
    assert torch.equal(unpickled(X), program(X))
    for call in (fxq.report, lambda p: fxq.verify(p, X), lambda p: fxq.save(p, "never.fxq")):
        with pytest.raises(TypeError, match=r"found one from a pickle.*Use fxq.save and fxq.load"):
            call(unpickled)


@pytest.mark.parametrize("change", ["data", "vector", "twice"])
def test_a_weight_that_is_given_other_memory_is_seen(change: str) -> None:
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256)).eval()
    model.requires_grad_(False)
    compiled = torch.compile(model, backend="fxq", options={"recipe": "float"})
    x = torch.randn(8, 256)
    compiled(x)
    for _ in range(2 if change == "twice" else 1):
        if change == "vector":
            numbers = sum(p.numel() for p in model.parameters())
            nn.utils.vector_to_parameters(torch.randn(numbers), model.parameters())
        else:
            model[0].weight.data = torch.randn(256, 256)
    with pytest.warns(FxqWarning, match="changed in place: compiling again"):
        assert sqnr_db(model(x), compiled(x)) > 100


def vector(s: Scaled, x: Tensor) -> Tensor:
    return F.linear(x, s.linear.weight[0]) + s.linear(x).sum(-1)


def complex_linear(s: Scaled, x: Tensor) -> Tensor:
    weight = torch.complex(s.linear.weight, s.linear.weight.flip(0))
    return F.linear(torch.complex(x, -x), weight, torch.complex(*s.linear.bias.expand(2, 64))).real


def complex_matmul(s: Scaled, x: Tensor) -> Tensor:
    return (torch.complex(x, x) @ torch.complex(s.linear.weight, s.linear.weight)).imag + s.linear(
        x
    )


class Odd(Scaled):
    def __init__(self, function: Callable[[Scaled, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.function(self, x)


@pytest.mark.filterwarnings("ignore:recipe .* changed nothing")
@pytest.mark.parametrize("function", [vector, complex_linear, complex_matmul])
def test_a_product_with_a_weight_that_is_no_real_matrix_stays_float_and_is_listed(
    function: Callable[[Scaled, Tensor], Tensor],
) -> None:
    model, x = Odd(function).eval(), torch.randn(8, 64)
    with torch.no_grad():
        assert sqnr_db(model(x), fxq.compress(model, X, "float")(x)) > 100
    for recipe in ("w8a8_dynamic", "w8", "recommended_w8a8", "smoothquant_w8a8", "eda_dm_w8a8"):
        data = None if recipe in ("w8a8_dynamic", "w8") else [X, x]
        program = fxq.compress(model, X, recipe, data)
        (row,) = [r for r in account(program.graph_module) if r.kind == "matmul"]
        assert row.layer.skip is not None
        assert "in a form that is not a linear" in row.layer.skip.reason
        assert sqnr_db(model(x), program(x)) > 25


@pytest.mark.parametrize("example", [X * 255, {"input": X * 255}], ids=["position", "keyword"])
def test_hooks_of_the_model_itself_see_the_call_as_it_is_made(example: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU()).eval()
    seen = []

    def normalize(_: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        seen.append((len(args), [*kwargs]))
        return tuple(a / 255 for a in args), {name: a / 255 for name, a in kwargs.items()}

    model.register_forward_pre_hook(normalize, with_kwargs=True)
    model.register_forward_hook(lambda _, args, y: y + sum(a.mean() for a in args))
    program = fxq.compress(model, example, "float")

    forms = {(n, *names) for n, names in seen}
    assert forms == ({(0, "input")} if isinstance(example, dict) else {(1,)})
    x = torch.randn(7, 64) * 100
    given = {"input": x} if isinstance(example, dict) else (x,)
    expected = model(**given) if isinstance(example, dict) else model(*given)
    assert sqnr_db(expected, program(x)) > 80


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + torch.randn_like(x)


@pytest.mark.filterwarnings("error::fxq.FxqWarning")
def test_models_that_draw_numbers_are_scored_with_the_same_numbers() -> None:
    state = torch.get_rng_state()
    program = fxq.compress(Noisy().eval(), X, "smoothquant_w8a8", [X])
    torch.set_rng_state(state)

    judgement = fxq.verify(program, X, model=Noisy().eval()).against_model

    assert program.sqnr_db > 30
    assert judgement is not None
    assert judgement.sqnr_db == pytest.approx(program.sqnr_db, abs=0.1)
    assert not torch.equal(program(X), program(X))  # they are drawn anew at every call


def encoder(**kwargs: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    return nn.TransformerEncoder(layer, 1, **kwargs).eval()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_torchs_fast_path_of_encoders_is_named_where_it_computes_otherwise() -> None:
    def padded(samples: int) -> dict[str, Tensor]:
        mask = torch.arange(10)[None] >= torch.randint(3, 10, (samples, 1))
        return {"src": torch.randn(samples, 10, 64), "src_key_padding_mask": mask}

    with pytest.raises(UnsupportedError, match=r"fast path.*enable_nested_tensor=False"):
        fxq.compress(encoder(), padded(4), "w8a8_dynamic")
    assert torch.backends.mha.get_fastpath_enabled()

    model, other = encoder(enable_nested_tensor=False), padded(7)
    program = fxq.compress(model, padded(4), "w8a8_dynamic")
    with torch.no_grad():
        assert sqnr_db(model(**other), program(**other)) > 30


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_modules_that_are_not_to_be_compressed_are_named() -> None:
    part = nn.Sequential(nn.Linear(64, 64), nn.ReLU()).eval()
    scripted = torch.jit.trace(part, X)
    part[0].train()
    with pytest.raises(ValueError, match="found '0' in train mode"):
        fxq.compress(part, X, "float")
    with pytest.raises(TypeError, match="found TorchScript"):
        fxq.compress(scripted, X, "float")


@pytest.mark.parametrize("device", ["CPU", "nowhere", "meta"])
def test_a_device_that_is_not_there(device: str, tmp_path: Path) -> None:
    path = tmp_path / "program.safetensors"
    fxq.save(fxq.compress(Scaled().eval(), X, "float"), path)

    with pytest.raises(ValueError, match=f"device: expected cpu or cuda, found '{device}'"):
        fxq.load(path, device=device)


def test_a_disk_that_takes_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise SafetensorError("no space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OSError, match=r"p.safetensors: expected to write a file, found that no sp"):
        fxq.save(fxq.compress(Scaled().eval(), X, "float"), tmp_path / "p.safetensors")
    assert not list(tmp_path.iterdir())
