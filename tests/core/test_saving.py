"""Saving: a program comes back bit for bit."""

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
from saved import RECIPES, batch, rewrite, two_outputs
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxq.saving
from fxq.account import account
from fxq.errors import FxqWarning, UnsupportedError
from fxq.packing import pack_codes, unpack_codes, width_of
from fxq.passes import w8a8
from fxq.pipeline import Recipe, compress
from fxq.program import Config, Program
from fxq.reporting import report
from fxq.saving import load, save


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


@pytest.mark.parametrize(
    "name",
    [
        "layer-1",
        "a b",
        "ü",
        "a/b:c@d~1,2+3",
        "0",
        "it's",
        "a\tb",
        "{0}",
        "class",
        "\N{LATIN SMALL LIGATURE FI}",
    ],
)
def test_any_name_that_a_module_may_have_comes_back(name: str, path: Path) -> None:
    model = nn.Sequential(OrderedDict([(name, nn.Linear(64, 64))])).eval()
    program = compress(model, torch.randn(2, 64), w8a8.DYNAMIC)

    save(program, path)

    x = torch.randn(3, 64)
    assert torch.equal(load(path)(x), program(x))
    assert [row.row.module for row in report(load(path)).rows] == [name]


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


@pytest.mark.parametrize(
    ("module", "kind", "field"),
    [
        ("transformers.modeling_outputs", "BaseModelOutput", "last_hidden_state"),
        ("diffusers.models.unets.unet_2d", "UNet2DOutput", "sample"),
        ("diffusers.models.unets.unet_2d_condition", "UNet2DConditionOutput", "sample"),
    ],
)
def test_results_of_libraries_come_back_in_a_fresh_process(
    path: Path, module: str, kind: str, field: str
) -> None:
    output = getattr(pytest.importorskip(module), kind)
    program, call = two_outputs(lambda y: output(**{field: y}))
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

    assert type(here) is output
    assert torch.equal(here[field], program(**call)[field])
    assert there.stdout.strip() == f"{module} {kind} ['{field}']"


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


@torch.library.custom_op("fxq_test::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return 2 * x


@twice.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_an_operator_that_a_file_cannot_carry_is_told_at_once(path: Path) -> None:
    class Custom(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(twice(twice(x)))

    model, x = Custom(8, 2).eval(), torch.randn(3, 8)

    with pytest.warns(FxqWarning, match="cannot be saved") as told:
        program = compress(model, x, w8a8.DYNAMIC)

    assert [str(w.message).count("fxq_test.twice") for w in told] == [1]
    with pytest.raises(UnsupportedError, match=r"found fxq_test.twice.default, which") as error:
        save(program, path)
    assert "%" not in str(error.value)


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
