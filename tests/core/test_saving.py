"""Saving: a program comes back bit for bit, and a file can neither run code nor fail obscurely."""

import hashlib
import json
import os
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from families import family
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxq.saving
from fxq.account import account
from fxq.errors import FxqWarning, UnsupportedError
from fxq.graph_json import decode_target
from fxq.packing import pack_codes, unpack_codes, width_of
from fxq.passes import w8a8, weight_only
from fxq.pipeline import Recipe, compress
from fxq.program import Config, Program
from fxq.reporting import report
from fxq.saving import load, save

RECIPES = {"static": w8a8.STATIC, "dynamic": w8a8.DYNAMIC, "w8": weight_only.W8}


def batch(n: int) -> Tensor:
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(n))


@pytest.fixture(scope="module")
def programs() -> dict[str, Program]:
    timm = pytest.importorskip("timm.models.vision_transformer")
    torch.manual_seed(0)
    model = timm.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=32, depth=1, num_heads=2, num_classes=5
    ).eval()
    return {n: compress(model, batch(2), r, [batch(2), batch(3)]) for n, r in RECIPES.items()}


@pytest.fixture
def program(programs: dict[str, Program]) -> Program:
    return programs["dynamic"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "program.fxq"


def rewrite(
    path: Path,
    edit: Callable[[dict[str, Any]], Any] = lambda content: None,
    edit_tensors: Callable[[dict[str, Tensor]], Any] = lambda tensors: None,
) -> None:
    """Change what a saved file says, in place."""
    with safetensors.safe_open(path, "pt") as file:
        content = json.loads(file.metadata()["fxq"])
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    edit(content)
    edit_tensors(tensors)
    if "sha256" in content:  # who means harm makes the checksum fit
        del content["sha256"]
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        raw = [name.encode() + tensors[name].numpy().tobytes() for name in sorted(tensors)]
        content["sha256"] = hashlib.sha256(text.encode() + b"".join(raw)).hexdigest()
    safetensors.torch.save_file(tensors, path, {"fxq": json.dumps(content)})


def node_of(content: dict[str, Any], target: str) -> dict[str, Any]:
    return next(n for n in content["graph"]["nodes"] if n.get("target") == target)


@pytest.mark.parametrize("name", RECIPES)
def test_loaded_program_is_the_saved_one(
    programs: dict[str, Program], name: str, path: Path
) -> None:
    program = programs[name]

    save(program, path)
    loaded = load(path)

    for size in (2, 1, 3):  # the batch is free
        assert torch.equal(program(batch(size)), loaded(batch(size)))
    saved_buffers, buffers = dict(program.named_buffers()), dict(loaded.named_buffers())
    assert list(saved_buffers) == list(buffers)
    for key, value in saved_buffers.items():
        assert torch.equal(value, buffers[key])
        assert (value.dtype, value.stride()) == (buffers[key].dtype, buffers[key].stride())
    assert account(loaded.graph_module) == account(program.graph_module)
    assert str(report(loaded)) == str(report(program))
    assert loaded.signature == program.signature
    assert (loaded.recipe, loaded.notes) == (program.recipe, program.notes)
    assert loaded.num_classes == 5


def test_same_program_gives_same_bytes(program: Program, path: Path) -> None:
    save(program, path)
    again = path.with_name("again.fxq")

    save(load(path), again)

    assert path.read_bytes() == again.read_bytes()
    assert {p.name for p in path.parent.iterdir()} == {path.name, again.name}


def test_free_sizes_stay_free_where_a_kernel_would_fix_them(path: Path) -> None:
    # Swin pads: the C++ kernel of aten::pad reads the batch as a number, which fixes it for good.
    pytest.importorskip("timm")
    program = family("swin").compress(w8a8.DYNAMIC)
    save(program, path)

    loaded = load(path)

    save(loaded, path.with_name("again.fxq"))
    assert path.read_bytes() == path.with_name("again.fxq").read_bytes()
    assert report(loaded).rows == report(program).rows


def test_file_is_the_tensors_and_a_header(program: Program, path: Path) -> None:
    save(program, path)

    tensors = sum(b.nbytes for b in program.buffers())
    with safetensors.safe_open(path, "pt") as file:
        text = len(file.metadata()["fxq"])
    # JSON in JSON escapes its quotes; safetensors spends about 100 bytes per tensor.
    assert path.stat().st_size < tensors + 1.5 * text + 120 * len(list(program.buffers()))


def test_fresh_process_computes_the_same_bytes(program: Program, path: Path) -> None:
    save(program, path)
    inputs = batch(3)
    torch.save(inputs, path.with_name("x.pt"))
    code = (
        "import hashlib, sys, torch\n"
        "from fxq.saving import load\n"
        "torch.set_num_threads(1)\n"
        "y = load(sys.argv[1])(torch.load(sys.argv[2]))\n"
        "print(hashlib.sha256(y.numpy().tobytes()).hexdigest())\n"
    )

    done = subprocess.run(
        [sys.executable, "-c", code, path, path.with_name("x.pt")],
        capture_output=True, text=True, check=True, cwd=Path(fxq.saving.__file__).parents[1],
    )  # fmt: skip

    assert done.stdout.strip() == hashlib.sha256(program(inputs).numpy().tobytes()).hexdigest()


class TwoOutputs(nn.Module):
    """A linear whose result goes through `wrap`, and a buffer in channels_last."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.conv = nn.Conv2d(3, 8, 2).to(memory_format=torch.channels_last)
        self.wrap = wrap
        self.config: Any = None
        self.levels: Any = (1, 2.5, "a")

    def forward(self, x: dict[str, Tensor], scale: float = 2.0) -> Any:
        return self.wrap(self.fc(self.conv(x["image"]).mean((2, 3))) * scale)


def two_outputs(wrap: Callable[[Tensor], Any], config: Any = None) -> tuple[Program, Any]:
    torch.manual_seed(0)
    model = TwoOutputs(wrap).eval()
    model.config = config
    call = {"x": {"image": torch.randn(2, 3, 5, 5)}}
    return compress(model, call, weight_only.W8), call


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y: {"a": y, "b": [y + 1, None]},
        lambda y: OrderedDict(z=y, a=(y * 2, 3)),
        lambda y: (y, {"only": y.sum()}),
    ],
)
def test_native_containers_come_back(wrap: Callable[[Tensor], Any], path: Path) -> None:
    program, call = two_outputs(wrap)

    save(program, path)
    loaded = load(path)

    expected, found = pytree.tree_flatten(program(**call)), pytree.tree_flatten(loaded(**call))
    assert expected[1] == found[1]
    assert all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b
        for a, b in zip(expected[0], found[0], strict=True)
    )
    strides = {n: b.stride() for n, b in program.named_buffers()}
    assert {n: b.stride() for n, b in loaded.named_buffers()} == strides
    with pytest.raises(ValueError, match=r"expected the constant 2\.0"):
        loaded(**call, scale=3.0)


def test_model_output_of_transformers_comes_back_in_a_fresh_process(path: Path) -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")
    program, call = two_outputs(lambda y: outputs.BaseModelOutput(last_hidden_state=y))
    save(program, path)
    code = (
        "import sys, torch\n"
        "from fxq.saving import load\n"
        "y = load(sys.argv[1])(x={'image': torch.zeros(2, 3, 5, 5)})\n"
        "print(type(y).__module__, type(y).__name__, list(y))\n"
    )

    here = load(path)(**call)
    there = subprocess.run(
        [sys.executable, "-c", code, path],
        capture_output=True, text=True, check=True, cwd=Path(fxq.saving.__file__).parents[1],
    )  # fmt: skip

    assert type(here) is outputs.BaseModelOutput
    assert torch.equal(here.last_hidden_state, program(**call).last_hidden_state)
    expected = "transformers.modeling_outputs BaseModelOutput ['last_hidden_state']"
    assert there.stdout.strip() == expected


def test_config_and_attributes_come_back_without_what_json_cannot_hold(path: Path) -> None:
    config = SimpleNamespace(hidden=8, id2label={0: "cat"}, sizes=(1, float("inf")), act=nn.GELU())
    program, _ = two_outputs(lambda y: y, config)

    save(program, path)
    loaded = load(path)

    assert loaded.levels == (1, 2.5, "a")
    assert isinstance(loaded.config, Config)
    assert vars(loaded.config) == {
        "hidden": 8, "id2label": {0: "cat"}, "sizes": (1, float("inf"))
    }  # fmt: skip
    with safetensors.safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["fxq"])["dropped"] == ["config.act"]


def test_plain_looking_attribute_that_cannot_be_kept_warns(program: Program, path: Path) -> None:
    class Level(str):
        pass

    copy = Program(
        program.graph_module, program.signature, program.recipe, (), {"level": Level("high")}
    )

    with pytest.warns(FxqWarning, match="'level'"):
        save(copy, path)

    assert "level" not in load(path).attributes


def test_shared_and_narrow_tensors_come_back_shared_and_packed(path: Path) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 64)
    program = compress(
        nn.Sequential(linear, nn.GELU(), linear).eval(), torch.randn(2, 64), Recipe("none", ())
    )
    gm = program.graph_module
    gm.register_buffer("codes", torch.randint(-8, 8, (63, 129), dtype=torch.int8))
    gm.register_buffer("same_codes", gm.codes)

    save(program, path)
    loaded = load(path).graph_module

    assert torch.equal(loaded.codes, gm.codes)
    assert loaded.codes.dtype == torch.int8
    assert loaded.codes is loaded.same_codes
    with safetensors.safe_open(path, "pt") as file:
        assert file.get_tensor("codes").nbytes == (63 * 129 * 4 + 7) // 8
        assert "same_codes" not in file.keys()  # noqa: SIM118


def test_width_counts_the_sign_once() -> None:
    cases = {(-8, 7): 4, (-8, -8): 4, (-9, 0): 5, (0, 15): 4, (0, 0): 2, (-128, 0): 8, (0, 127): 7}

    found = {ends: width_of(torch.tensor(ends, dtype=torch.int8))[0] for ends in cases}

    assert found == cases


@settings(max_examples=100, deadline=None)
@given(bits=st.integers(2, 8), signed=st.booleans(), data=st.data())
def test_packing_is_exact(bits: int, signed: bool, data: st.DataObject) -> None:
    low = -(2 ** (bits - 1)) if signed else 0
    values = data.draw(st.lists(st.integers(low, low + 2**bits - 1), max_size=40))
    codes = torch.tensor(values, dtype=torch.int8 if signed else torch.uint8)

    packed = pack_codes(codes, bits)
    found = unpack_codes(packed, bits, len(values), signed=signed)

    assert packed.dtype == torch.uint8
    assert packed.shape == ((len(values) * bits + 7) // 8,)
    assert found.dtype == codes.dtype
    assert torch.equal(found, codes)
    if values:
        width, has_sign = width_of(codes)
        assert width <= bits
        again = unpack_codes(pack_codes(codes, width), width, len(values), signed=has_sign)
        assert again.tolist() == values


EVIL = [
    "aten.save.default",
    "os.system", "builtins.eval", "aten.__class__", "aten.__class__.__init__", "aten.add.__call__",
    "aten.linear", "aten.linear.default.redispatch", "fxq.os.system", "torch.load", "math.__doc__",
    "aten.from_file.default", "aten.add.default\nimport os", "operator.attrgetter",
]  # fmt: skip


@pytest.mark.parametrize("target", EVIL)
def test_target_outside_the_operators_is_refused(program: Program, path: Path, target: str) -> None:
    save(program, path)
    rewrite(path, lambda c: node_of(c, "aten.linear.default").update(target=target))

    with pytest.raises(ValueError, match="expected an operator of aten, prims or fxq"):
        load(path)


@pytest.mark.parametrize("target", ["aten.add.Tensor", "operator.getitem", "fxq.quantize.default"])
def test_target_of_the_dialect_is_resolved(target: str) -> None:
    assert callable(decode_target(target))


CODE = "x=__import__('os').mkdir('pwned')"


@pytest.mark.parametrize(
    "edit",
    [
        lambda c: c["graph"]["nodes"][-2].update(name=CODE),
        lambda c: next(n for n in c["graph"]["nodes"] if n["op"] == "placeholder").update(
            name=CODE
        ),
        lambda c: next(n for n in c["graph"]["nodes"] if n["op"] == "get_attr").update(target=CODE),
        lambda c: node_of(c, "aten.linear.default").update(kwargs={CODE: 1}),
        lambda c: node_of(c, "aten.linear.default").update(op="call_module"),
        lambda c: c["tensors"].append({"name": CODE, "same_as": c["tensors"][0]["name"]}),
        lambda c: c["tensors"].append({"name": "forward", "same_as": c["tensors"][0]["name"]}),
        lambda c: c["graph"]["symbols"].update({CODE: {"hint": 2, "low": 2, "high": None}}),
        lambda c: c["graph"]["symbols"].update({"s0": {"hint": CODE, "low": 2, "high": None}}),
    ],
)
def test_names_that_are_code_are_refused(
    program: Program, path: Path, edit: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(path.parent)
    save(program, path)
    rewrite(path, edit)

    with pytest.raises(ValueError, match="cannot be loaded"):
        load(path)

    assert not Path("pwned").exists()


@pytest.mark.parametrize("name", [
    "antigravity.Fly", "os.system", "transformers.nonesuch.Output",
    "transformers.models.xglm.modeling_xglm.Output",
])  # fmt: skip
def test_unknown_result_type_is_named_and_not_imported(
    program: Program, path: Path, name: str
) -> None:
    save(program, path)
    spec = {"type": name, "context": ["a"], "children": [None]}
    rewrite(path, lambda c: c["signature"].update(out_spec=spec))

    with pytest.raises(ValueError, match=rf"result type '{name}'.*import \S+ before fxq.load"):
        load(path)

    assert name.rpartition(".")[0] not in set(sys.modules) - {"os"}


def break_dtype(tensors: dict[str, Tensor]) -> None:
    name = next(n for n, t in tensors.items() if t.dtype == torch.float32)
    tensors[name] = tensors[name].double()


@pytest.mark.parametrize(
    ("edit", "edit_tensors", "message"),
    [
        (lambda c: c.update(version=5), None, "format version 4 or older, found 5; upgrade fxq"),
        (lambda c: c.pop("version"), None, "damaged metadata"),
        (lambda c: c.pop("graph"), None, "damaged: KeyError"),
        (lambda c: c["graph"]["nodes"].pop(0), None, "damaged|expected"),
        (lambda c: c["graph"]["nodes"].pop(), None, "damaged"),
        (lambda c: c["signature"]["leaves"].clear(), None, "as the graph has"),
        (
            lambda c: node_of(c, "aten.linear.default").update(target="aten.nonesuch.default"),
            None,
            "'aten.nonesuch.default'",
        ),
        (None, lambda t: t.popitem(), "missing"),
        (None, lambda t: t.update(more=torch.zeros(1)), "'more'.*too many"),
        (None, lambda t: t.update({k: v[None] for k, v in t.items()}), "expected .*, found"),
        (None, break_dtype, "expected torch.float32"),
    ],
)
def test_damaged_file_says_what_is_wrong(
    program: Program, path: Path, edit: Any, edit_tensors: Any, message: str
) -> None:
    save(program, path)
    rewrite(path, edit or (lambda c: None), edit_tensors or (lambda t: None))

    with pytest.raises(ValueError, match=message) as caught:
        load(path)

    assert str(path) in str(caught.value)


def insert_before_output(content: dict[str, Any], *nodes: dict[str, Any]) -> None:
    content["graph"]["nodes"][-1:-1] = [{"op": "call_function", "kwargs": {}} | n for n in nodes]


def call(name: str, target: str, *args: Any) -> dict[str, Any]:
    return {"name": name, "target": target, "args": list(args)}


SIZE = call("size", "aten.sym_size.int", {"node": "input_1"}, 0)
SQUARES = [
    call(f"p{i + 1}", "operator.mul", *[{"node": f"p{i}" if i else "size"}] * 2) for i in range(60)
]


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([call("p", "operator.pow", 10, 200_000_000)], "at most 16 sizes multiplied"),
        ([SIZE, call("p", "operator.pow", 2, {"node": "size"})], "at most 16 sizes multiplied"),
        ([SIZE, *SQUARES], "at most 16 sizes multiplied"),
        ([call("p", "operator.mod", "%9999999999d", 1)], "numbers below 2.63, found '%9999"),
        ([call("p", "operator.mul", [0], 10**12)], r"numbers below 2.63, found \[0\]"),
        ([call("p", "operator.add", 10**30, 1)], "numbers below 2.63, found 1000"),
        (
            [
                call("halves", "aten.split.Tensor", {"node": "input_1"}, 1),
                call("p", "operator.mul", {"node": "halves"}, 10**12),
            ],
            "expected sizes and numbers, found (list|tuple), int",
        ),
        ([call("p", "operator.mul", {"node": "input_1"}, 2)], "numbers, found FakeTensor, int"),
        ([call("p", "operator.getitem", {"node": "input_1"}, 0)], "found FakeTensor, int"),
        ([call("p", "operator.getitem", "text", {"slice": [0, 1, 1]})], "found str, slice"),
        ([call("p", "aten.zeros.default", [10**12])], r"most 274877906944 bytes, found one of 4"),
        ([call("p", "aten.repeat.default", {"node": "input_1"}, [10**9, 1, 1, 1])], "bytes, found"),
    ],
)
def test_a_graph_that_would_exhaust_the_machine_is_refused(
    program: Program, path: Path, nodes: list[dict[str, Any]], message: str
) -> None:
    save(program, path)
    name = program.graph_module.graph.find_nodes(op="placeholder")[0].name
    text = json.dumps(nodes).replace("input_1", name)
    rewrite(path, lambda c: insert_before_output(c, *json.loads(text)))

    with pytest.raises(ValueError, match=message):
        load(path)


def test_arithmetic_of_sizes_is_welcome(program: Program, path: Path) -> None:
    save(program, path)
    name = program.graph_module.graph.find_nodes(op="placeholder")[0].name
    nodes = [
        call("size", "aten.sym_size.int", {"node": name}, 0),
        call("p", "operator.pow", {"node": "size"}, 3),
        call("q", "operator.mul", {"node": "p"}, {"node": "size"}),
        call("wide", "aten.expand.default", {"node": name}, [10**9, -1, -1, -1, -1]),
    ]
    rewrite(path, lambda c: insert_before_output(c, *nodes))

    assert torch.equal(load(path)(batch(3)), program(batch(3)))


@pytest.mark.parametrize("target", ["forward", "training", "_buffers", "_parameters"])
def test_a_graph_reads_buffers_and_nothing_else(program: Program, path: Path, target: str) -> None:
    save(program, path)
    node = {"name": "p", "op": "get_attr", "target": target}
    rewrite(path, lambda c: c["graph"]["nodes"].insert(0, node))

    with pytest.raises(ValueError, match=f"expected a buffer of the file, found '{target}'"):
        load(path)


def test_an_operator_without_a_fake_version_does_not_run_for_real(
    program: Program, path: Path
) -> None:
    ran = []
    library = torch.library.Library("aten", "FRAGMENT")  # whose operators torch would run on zeros
    library.define("no_fake(Tensor x) -> Tensor")
    library.impl("no_fake", lambda x: ran.append(x) or x.clone(), "CPU")
    save(program, path)
    name = program.graph_module.graph.find_nodes(op="get_attr")[0].name  # no free size stops it
    node = call("p", "aten.no_fake.default", {"node": name})
    rewrite(path, lambda c: insert_before_output(c, node))

    with pytest.raises(ValueError, match="no_fake"):
        load(path)

    assert not ran


def test_bits_of_codes_are_bounded(path: Path) -> None:
    program, _ = two_outputs(lambda y: y)
    program.graph_module.register_buffer("codes", torch.randint(-8, 8, (8,), dtype=torch.int8))
    save(program, path)

    def widen(content: dict[str, Any]) -> None:
        entry = next(e for e in content["tensors"] if e["name"] == "codes")
        entry |= {"bits": 0, "shape": [10**13]}

    rewrite(path, widen, lambda tensors: tensors.update(codes=torch.zeros(0, dtype=torch.uint8)))

    with pytest.raises(ValueError, match="expected codes of 2 to 7 bits, found 0"):
        load(path)


@pytest.mark.parametrize("place", ["tensors", "text"])
def test_one_flipped_bit_is_found(program: Program, path: Path, place: str) -> None:
    save(program, path)
    data = bytearray(path.read_bytes())
    index = len(data) - 5 if place == "tensors" else data.index(b"w8a8_dynamic")
    data[index] ^= 1
    path.write_bytes(data)

    with pytest.raises(ValueError, match="expected contents with the checksum"):
        load(path)


def test_files_of_version_1_load_with_a_warning(program: Program, path: Path) -> None:
    save(program, path)

    def older(content: dict[str, Any]) -> None:
        content["version"] = 1
        del content["sha256"]

    rewrite(path, older)

    with pytest.warns(FxqWarning, match="version 1 has no checksum"):
        loaded = load(path)

    assert torch.equal(loaded(batch(2)), program(batch(2)))
    rewrite(path, lambda content: content.update(version=2))
    with pytest.raises(ValueError, match="the checksum None"):
        load(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"hello, I am no safetensors", "expected a complete safetensors file"),
        (b"", "expected a complete safetensors file"),
        (None, "expected a complete safetensors file"),  # truncated
        (safetensors.torch.save({"w": torch.zeros(2)}), "expected a file written by fxq.save"),
        (safetensors.torch.save({}, {"fxq": "{not json"}), "damaged metadata"),
        (safetensors.torch.save({}, {"fxq": "[" * 100_000}), "damaged metadata"),
    ],
)
def test_foreign_file_says_what_it_is_not(
    program: Program, path: Path, text: bytes | None, message: str
) -> None:
    save(program, path)
    path.write_bytes(path.read_bytes()[:-9] if text is None else text)

    with pytest.raises(ValueError, match=message):
        load(path)


def test_missing_file_is_file_not_found(path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=path.name):
        load(path)


def test_saving_anything_else_is_a_type_error(program: Program, path: Path) -> None:
    with pytest.raises(TypeError, match=r"expected a Program, found Linear"):
        save(nn.Linear(2, 2), path)  # type: ignore[arg-type]
    assert not path.exists()


def test_failed_save_leaves_the_old_file(program: Program, path: Path) -> None:
    path.write_bytes(b"old")
    wide = Program(program.graph_module, program.signature, program.recipe)
    wide.graph_module.register_buffer("wide", torch.zeros(2, dtype=torch.complex128))

    try:
        with pytest.raises(UnsupportedError, match="complex128"):
            save(wide, path)
    finally:
        del wide.graph_module._buffers["wide"]

    assert path.read_bytes() == b"old"
    assert os.listdir(path.parent) == [path.name]
