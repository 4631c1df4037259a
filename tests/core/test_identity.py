"""One answer to "the same values?", and nobody who asks an address instead."""

import ast
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fxq.identity import TensorKey
from fxq.lowering.derived import Derived

ROOT = Path(__file__).parents[2]
ADDRESSES = {"data_ptr", "_cdata"}
MAY_ASK = {
    "fxq/identity.py",
    "lowering/kernels/hardware.py",  # whether a pointer is aligned, not whose it is
    "lowering/cpu/native.py",  # to hand it to a C function
}


def test_equal_views_of_one_memory_have_equal_keys() -> None:
    x = torch.randn(6, 4)

    assert TensorKey.of(x.t()) == TensorKey.of(x.permute(1, 0))
    assert len({TensorKey.of(x), TensorKey.of(x.reshape(6, 4)), TensorKey.of(x.detach())}) == 1


@pytest.mark.parametrize(
    "other",
    [
        lambda x: x.clone(),
        lambda x: x.t(),
        lambda x: x.view(torch.int32),
        lambda x: x[:3],
        lambda x: x.reshape(2, 8),
        lambda x: torch.complex(x, x).conj().imag,
    ],
)
def test_other_values_have_other_keys(other: object) -> None:
    x = torch.randn(4, 4)

    assert TensorKey.of(x) != TensorKey.of(other(x))  # type: ignore[operator]


def test_a_conjugate_and_a_slice_elsewhere_are_told_apart() -> None:
    z = torch.randn(4, dtype=torch.complex64)

    assert TensorKey.of(z) != TensorKey.of(z.conj())
    assert TensorKey.of(z.real[:2]) != TensorKey.of(z.real[2:])


def test_an_address_used_again_is_not_the_same_tensor() -> None:
    addresses, keys = set(), set()

    for _ in range(50):
        passing = torch.randn(257)
        addresses.add(passing.data_ptr())
        keys.add(TensorKey.of(passing))
        del passing

    assert len(addresses) < 50  # or this test would show nothing
    assert len(keys) == 50
    assert all(key.expired for key in keys)


def test_what_is_derived_of_a_weight_is_not_taken_for_its_transpose() -> None:
    weight, cache = torch.arange(9.0).reshape(3, 3), Derived()

    def sums(tensor: Tensor) -> Tensor:
        return cache.get(tensor, "row_sums", lambda w: w.sum(1))

    assert sums(weight).tolist() == [3.0, 12.0, 21.0]
    assert sums(weight.t()).tolist() == [9.0, 12.0, 15.0]


def test_what_is_derived_is_kept_until_the_weight_is_written_to() -> None:
    weight, cache, seen = torch.ones(2, 2), Derived(), []

    def total(tensor: Tensor) -> float:
        seen.append(1)
        return float(tensor.sum())

    assert [cache.get(weight, "total", total) for _ in range(2)] == [4.0, 4.0]
    weight.add_(1)
    assert cache.get(weight, "total", total) == 8.0
    assert len(seen) == 2


def test_what_is_derived_goes_with_the_weight() -> None:
    weight, cache = torch.ones(2, 2), Derived()
    packed = weakref.ref(cache.get(weight, "packed", lambda w: w.clone()))
    assert packed() is not None

    del weight
    cache.get(torch.ones(3), "packed", lambda w: w.clone())

    assert packed() is None


def asked(tree: ast.AST) -> Iterator[str]:
    """Yield the attributes of a file that are addresses."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ADDRESSES:
            yield node.attr


def test_nobody_else_asks_for_an_address() -> None:
    files = [f for folder in ("fxq", "passes", "lowering") for f in (ROOT / folder).rglob("*.py")]

    found = {
        f"{path}: {sorted(names)}"
        for file in files
        if (path := file.relative_to(ROOT).as_posix()) not in MAY_ASK
        and not path.startswith(("fxq/passes/", "fxq/lowering/"))  # two links to what is listed
        and (names := set(asked(ast.parse(file.read_text()))))
    }

    assert len(files) > 80  # all of them were read
    assert not found, "compare fxq.identity.TensorKey instead"
