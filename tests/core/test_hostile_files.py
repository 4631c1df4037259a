"""Loading: a file can neither run code nor exhaust the machine, and is refused with a reason."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from saved import batch, node_of, rewrite, two_outputs
from torch import Tensor

from fxq.graph_json import decode_target
from fxq.program import Program
from fxq.saving import load, save

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
        *(
            lambda c, part=part: next(
                n for n in c["graph"]["nodes"] if n["op"] == "get_attr"
            ).update(target=f"linear.{part}")
            for part in ('"', "\\", "a\nb", "class", "", CODE)
        ),
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
