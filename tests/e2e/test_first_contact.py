"""What people do first with a model, a program and the backend."""

import re
from typing import Any

import pytest
import torch
import torch._inductor.config
import transformers
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.fx import GraphModule

import fxq
from fxq.backend import Options
from fxq.errors import FxqWarning, UnsupportedError
from fxq.numerics import sqnr_db
from fxq.pipeline import FLOAT


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.register_buffer("table", torch.randn(5, 16))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x + self.table)).chunk(3, -1)
        return x + self.out(nn.functional.scaled_dot_product_attention(q, k, v))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Attention() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_freezing_is_no_obstacle(built: list[GraphModule]) -> None:
    model, x = Model().eval(), torch.randn(3, 5, 16)
    program = fxq.compress(model, x, "w8a8_dynamic")

    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        fast = torch.compile(model, backend="fxq", options={"recipe": FLOAT})
        torch.testing.assert_close(fast(x), model(x))
        with pytest.warns(FxqWarning, match="no kernel here"):
            found = torch.compile(program, backend="fxq")(x)

    assert sqnr_db(program(x), found) > 60
    names = {str(node.target) for node in built[0].graph.nodes if node.op == "get_attr"}
    assert {"blocks.0.qkv.weight", "blocks.1.out.bias", "blocks.1.table"} <= names


def test_a_weight_changed_in_place_is_seen_under_freezing() -> None:
    model, x = nn.Linear(8, 8).eval(), torch.randn(3, 8)
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        fast = torch.compile(model, backend="fxq", options={"recipe": FLOAT, "check": True})
        fast(x)
        model.weight.mul_(2)
        with pytest.warns(FxqWarning, match="weights have changed in place"):
            torch.testing.assert_close(fast(x), model(x))


def test_a_data_loader_with_labels_calibrates_and_says_what_it_leaves_out() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8)).eval(), torch.randn(6, 8)
    labels = torch.zeros(6, dtype=torch.int64)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, labels), batch_size=3)

    with pytest.warns(FxqWarning, match=r"takes 'input' alone; .*left out: \[\[3\]\]") as told:
        program = fxq.compress(model, x[:3], "w8a8_static", data=loader)

    assert len([w for w in told if "left out" in str(w.message)]) == 1
    assert torch.equal(program(x), fxq.compress(model, x[:3], "w8a8_static", data=[x])(x))


def test_labels_are_no_mask_that_the_example_left_out() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor, mask: Tensor | None = None, times: int = 1) -> Tensor:
            y = self.layer(x) * times
            return y if mask is None else y * mask

    model, x = Masked().eval(), torch.randn(6, 8)
    with pytest.warns(FxqWarning, match=r"takes 'x' alone; .*left out"):
        program = fxq.compress(model, x, "w8a8_static", data=[(x, torch.zeros(6))])

    assert torch.equal(program(x), fxq.compress(model, x, "w8a8_static", data=[x])(x))


def test_a_model_of_two_inputs_is_not_told_what_its_labels_are() -> None:
    class Two(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a @ b

    a, b = torch.randn(2, 4, 4), torch.randn(2, 4, 4)
    with pytest.raises(TypeError, match="expected at most 2 positional arguments"):
        fxq.compress(Two().eval(), (a, b), "w8a8_static", data=[(a, b, torch.zeros(2))])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_of_a_program_answer_for_dtype_device_and_count(dtype: torch.dtype) -> None:
    model = (
        nn.Sequential(nn.Linear(8, 16, bias=False), nn.ReLU(), nn.Linear(16, 4)).eval().to(dtype)
    )
    program = fxq.compress(model, torch.randn(3, 8, dtype=dtype), "w8a8_dynamic")

    first = next(program.parameters())

    assert (first.dtype, first.device.type, first.requires_grad) == (dtype, "cpu", False)
    codes = [p for p in program.parameters() if p.dtype == torch.int8]
    assert sum(p.numel() for p in codes) == 8 * 16 + 16 * 4
    assert all(name.startswith("graph_module.") for name, _ in program.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_program_is_converted_to_its_own_dtype_only(dtype: torch.dtype) -> None:
    x = torch.randn(3, 8, dtype=dtype)
    program = fxq.compress(nn.Sequential(nn.Linear(8, 4)).eval().to(dtype), x, "w8a8_dynamic")
    before = {name: value.clone() for name, value in program.state_dict().items()}

    for same in (program.to(dtype), program.to("cpu", dtype)):
        after = same.state_dict()
        assert all(
            torch.equal(after[n], v) and after[n].dtype == v.dtype for n, v in before.items()
        )
    others = {torch.float32, torch.bfloat16, torch.float16} - {dtype}
    for other in others:
        with pytest.raises(ValueError, match=f"is fixed when it is made, at {dtype}; convert the"):
            program.to(other)


def test_a_pipeline_may_name_a_cache_and_a_step() -> None:
    program = fxq.compress(nn.Linear(8, 8).eval(), torch.randn(3, 8), "w8a8_dynamic")

    with program.cache_context("cond", step_index=3, sigma=0.5):
        pass


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(50, 16), nn.Linear(16, 50)

    def forward(self, ids: Tensor, extra: Any = None, scale: float = 1.0) -> Tensor:
        x = self.embedding(ids)
        if extra is not None:
            x = x + extra["bias"]
        return self.head(x) * scale


def test_only_the_free_sizes_need_a_name() -> None:
    model, ids = Tokens().eval(), torch.randint(0, 50, (2, 16))
    example = {"ids": ids, "extra": {"bias": torch.randn(2, 16, 16), "other": torch.zeros(3)}}
    shapes = {"ids": {1: "tokens"}, "extra": {"bias": {-2: "tokens"}}}

    program = fxq.compress(model, example, FLOAT, dynamic_shapes=shapes)

    other = {"ids": ids[:, :9], "extra": {"bias": torch.randn(2, 9, 16), "other": torch.zeros(3)}}
    torch.testing.assert_close(program(**other), model(**other))
    with pytest.raises(ValueError, match="'ids'"):
        program(**other | {"ids": ids[:1, :9]})


class Adds(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x.unflatten(1, (-1, 4)).sum() + y * (1 if y.shape[0] > 2 else -1)


@pytest.mark.parametrize(
    ("model", "shapes", "message"),
    [
        (nn.Bilinear(8, 8, 3), {"input1": {1: "c"}}, "'c' is always 8: leave it out"),
        (nn.Bilinear(8, 8, 3), {"input1": {0: "a"}}, "'a' is always 4: leave it out, or name"),
        (
            nn.Bilinear(8, 8, 3),
            {"input1": {0: "a"}, "input2": {0: "b"}},
            r"'(a|b)' is always '(a|b)': give both the same name",
        ),
        (
            Adds(),
            {"y": {0: "y"}},
            r"'y' cannot be any size \(.*min=3.*: give torch.export.Dim.AUTO",
        ),
        (Adds(), {"x": {1: "w"}}, r"'w' cannot be any size \(4\*_w\): give torch.export.Dim.AUTO"),
    ],
)
def test_a_size_that_the_model_fixes_is_told(model: nn.Module, shapes: Any, message: str) -> None:
    example = (torch.randn(4, 8), torch.randn(4, 8))

    with pytest.raises(ValueError, match=f"dynamic_shapes: expected sizes .*{message}"):
        fxq.compress(model.eval(), example, FLOAT, dynamic_shapes=shapes)


def test_bounds_that_the_model_sets_are_found() -> None:
    free = torch.export.Dim.AUTO
    x, y = torch.randn(4, 8), torch.randn(4, 8)
    program = fxq.compress(
        Adds().eval(), (x, y), FLOAT, dynamic_shapes={"x": {1: free}, "y": {0: free}}
    )

    other = torch.randn(4, 12), torch.randn(7, 8)
    torch.testing.assert_close(program(*other), Adds()(*other))
    with pytest.raises(ValueError, match="expected 3 to any in dimension 0 of 'y', found 2"):
        program(x, y[:2])


@pytest.mark.parametrize(
    ("shapes", "error", "message"),
    [
        ({"idz": {1: "t"}}, ValueError, "no argument 'idz' in the example; did you mean 'ids'"),
        ({"ids": {2: "t"}}, ValueError, r"expected dimensions of 'ids' \[2, 16\], found 2"),
        ({"ids": {1: "a b"}}, ValueError, "expected a Python name for 'ids', found 'a b'"),
        ({"ids": "tokens"}, TypeError, "expected {dimension: name} for 'ids', found 'tokens'"),
        ("batches", TypeError, 'expected "batch", None or'),
        ({"extra": {"bais": {0: "b"}}}, ValueError, "no key 'bais' in extra; did you mean 'bias'"),
        ({"extra": {"pair": {2: {0: "b"}}}}, ValueError, r"no entry 2 in extra\['pair'\]"),
        ({"extra": {"pair": [None] * 3}}, ValueError, "expected at most 2 entries for extra"),
        ({"extra": {"pair": "b"}}, TypeError, "expected a mapping or a sequence .* found 'b'"),
        ({"extra": "b"}, TypeError, "expected a mapping or a sequence for what extra holds"),
        ({"scale": "b"}, TypeError, "expected None for 'scale', which is no tensor"),
        ((None,) * 4, ValueError, "expected at most 3 entries for the example, found 4"),
        ({"ids": {0: "b", -2: "c"}}, ValueError, r"each dimension of 'ids' .* once, found -2"),
        ({"ids": {0: 5}}, TypeError, "expected the name of a free size.* found 5"),
        ({"ids": {True: "b"}}, ValueError, "expected dimensions of 'ids'.* found True"),
    ],
)
def test_a_wrong_name_of_a_size_is_told(shapes: Any, error: type[Exception], message: str) -> None:
    bias = torch.zeros(2, 16, 16)
    example = {"ids": bias[..., 0].long(), "extra": {"bias": bias, "pair": [bias, bias]}}
    with pytest.raises(error, match=message):
        fxq.compress(Tokens().eval(), example | {"scale": 2.0}, FLOAT, dynamic_shapes=shapes)


def a_program() -> fxq.Program:
    return fxq.compress(nn.Linear(8, 8).eval(), torch.randn(3, 8), "w8a8_dynamic")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: fxq.verify(nn.Linear(8, 8), torch.randn(3, 8)),
            TypeError,
            "verify: expected a Pr",
        ),
        (lambda: fxq.report(nn.Linear(8, 8)), TypeError, "report: expected a Program"),
        (
            lambda: fxq.report(torch.compile(a_program(), backend="fxq")),
            TypeError,
            "give the program itself, before torch.compile",
        ),
        (
            lambda: fxq.compress(a_program(), torch.randn(3, 8), "w8"),
            TypeError,
            "expected a float model, found a Program; compress the model it was made of",
        ),
        (
            lambda: fxq.compress(nn.Sequential(a_program()).eval(), torch.randn(3, 8), "w8"),
            TypeError,
            "found a Program in '0'",
        ),
        (lambda: fxq.save(a_program(), "/nowhere/p.fxq"), FileNotFoundError, "make /nowhere"),
        (lambda: fxq.save(a_program(), "/tmp"), ValueError, "name of a file, found a folder"),
        (
            lambda: fxq.compress(torch.compile(nn.ReLU()).eval(), torch.ones(3), "w8"),
            TypeError,
            "expected the model itself, found what torch.compile made of it",
        ),
        (
            lambda: fxq.load("/tmp"),
            ValueError,
            "expected a file that fxq.save wrote, found a folder",
        ),
    ],
)
def test_what_is_given_to_the_wrong_function_is_told(
    call: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call()


def test_options_of_the_wrong_type_are_told() -> None:
    fast = torch.compile(nn.Linear(8, 8).eval(), backend="fxq", options={"strict": "no"})

    with torch.no_grad(), pytest.raises(BackendCompilerFailed, match="expected True or False"):
        fast(torch.randn(3, 8))


@pytest.mark.parametrize("inductor", [3, "max-autotune", True])
def test_options_for_inductor_are_a_mapping(inductor: object) -> None:
    with pytest.raises(TypeError, match=r"option 'inductor': expected a mapping, found"):
        Options.parse({"inductor": inductor})


def test_a_batch_that_len_fixes_is_told_with_its_place() -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).reshape(len(x), 2, 4)

    length = Tensor.__len__

    program = fxq.compress(Rows().eval(), torch.randn(3, 8), "w8")

    (note,) = program.notes
    assert re.search(r"fixes its batch at 3: len\(\) .*test_first_contact.py:\d+; use .shape", note)
    assert Tensor.__len__ is length


@pytest.mark.parametrize("options", [{}, {"check": True}, {"inductor": {"freezing": True}}])
def test_functions_of_numbers_and_of_nothing_compile(options: dict[str, Any]) -> None:
    table = torch.arange(6.0).reshape(2, 3)
    functions: dict[Any, Any] = {
        lambda: torch.ones(3) * 2: [()],
        lambda: table.sin(): [()],
        lambda n: torch.arange(n) * 2: [(3,), (4,), (7,)],
        lambda n: torch.zeros(3) + n: [(3,), (4,), (2.5,), (3.5,)],
        lambda n: n + 1: [(3,), (4,)],
    }
    for function, calls in functions.items():
        torch._dynamo.reset()
        fast = torch.compile(function, backend="fxq", options=options)
        for call in calls:
            torch.testing.assert_close(fast(*call), function(*call))


def test_modules_without_tensor_inputs_compress() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.table = nn.Linear(4, 4), nn.Parameter(torch.randn(3, 4))

        def forward(self, times: int = 2) -> Tensor:
            return self.layer(self.table) * times

    model = Table().eval()

    for example in ((), (2,), {"times": 2}):
        for data in ([example], [example, example]):
            program = fxq.compress(model, example, "w8a8_static", data=data)
            assert sqnr_db(model(), program()) > 30


def test_a_language_model_that_makes_a_cache_says_what_to_do() -> None:
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=31, max_position_embeddings=16,
    )  # fmt: skip
    model, ids = transformers.LlamaForCausalLM(config).eval(), torch.randint(1, 31, (2, 5))

    with pytest.raises(UnsupportedError, match=r"returns a DynamicCache, .* use_cache=False\.$"):
        fxq.compress(model, {"input_ids": ids}, "w8")
    program = fxq.compress(model, {"input_ids": ids, "use_cache": False}, "w8")

    assert sqnr_db(model(ids, use_cache=False).logits, program(ids, use_cache=False).logits) > 35


def test_a_model_may_take_arguments_that_its_signature_does_not_name() -> None:
    """transformers' decorators take `return_dict`, and refuse `use_cache` by position."""
    config = transformers.BertConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=31,
    )  # fmt: skip
    model, ids = transformers.BertModel(config).eval(), torch.randint(1, 31, (2, 5))
    example = {"input_ids": ids, "return_dict": True}

    program = fxq.compress(model, example, "w8a8_static", data=[example, example])

    expected = model(ids).last_hidden_state
    assert sqnr_db(expected, program(ids).last_hidden_state) > 30
    assert torch.equal(program(ids, return_dict=False)[0], program(**example).last_hidden_state)


def test_another_dtype_is_refused_with_what_helps() -> None:
    words, numbers = torch.randint(9, (4, 3)), torch.randn(4, 8)
    table = fxq.compress(nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8)).eval(), words, "float")
    linear = fxq.compress(nn.Linear(8, 8).eval(), numbers, "float")

    with pytest.raises(ValueError, match=r"found torch.int32; convert it$"):
        table(words.int())
    with pytest.raises(ValueError, match=r"convert it, or compress the model in torch.float64$"):
        linear(numbers.double())
    with pytest.raises(ValueError, match=r"or compress the model for calls with it in"):
        table(words.float())
