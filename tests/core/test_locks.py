"""The two locks: exact versions from public indexes, within the bounds of pyproject.toml and as the
documentation says."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCKS = ("requirements.lock", "requirements-oldest.lock")


def pins(lock: str) -> list[Requirement]:
    """Return the lines of a lock."""
    lines = (ROOT / lock).read_text().splitlines()
    return [Requirement(line.split("#")[0]) for line in lines if not line.startswith("#")]


def pinned(lock: str, name: str) -> set[str]:
    """Return the versions of one package; there may be one per Python."""
    found = [pin for pin in pins(lock) if canonicalize_name(pin.name) == canonicalize_name(name)]
    return {next(iter(pin.specifier)).version for pin in found}


def direct() -> list[Requirement]:
    """Return what pyproject.toml asks for, but its own extras and what only makes the site."""
    project = PROJECT["project"]
    lines = [*project["dependencies"]]
    for name, extra in project["optional-dependencies"].items():
        lines += extra if name != "docs" else []
    return [found for line in lines if (found := Requirement(line)).name != project["name"]]


@pytest.mark.parametrize("lock", LOCKS)
def test_every_line_is_an_exact_version_from_an_index(lock: str) -> None:
    found = pins(lock)

    assert len(found) > 50
    for pin in found:
        (specifier,) = pin.specifier
        assert specifier.operator == "=="
        assert re.fullmatch(r"[\w.]+", specifier.version), pin  # no "*", no local "+cpu"
        assert pin.url is None


@pytest.mark.parametrize("lock", LOCKS)
@pytest.mark.parametrize("wanted", direct(), ids=str)
def test_what_the_project_asks_for_is_locked_within_its_bounds(
    wanted: Requirement, lock: str
) -> None:
    versions = pinned(lock, wanted.name)

    assert versions, f"{wanted} is not in {lock}: run `make lock`"
    assert all(version in wanted.specifier for version in versions)


@pytest.mark.parametrize("name", ["torch", "numpy", "timm", "diffusers", "transformers"])
def test_the_oldest_lock_has_the_lower_bounds(name: str) -> None:
    (wanted,) = [requirement for requirement in direct() if requirement.name == name]
    (lowest,) = [bound.version for bound in wanted.specifier if bound.operator == ">="]
    (version,) = pinned("requirements-oldest.lock", name)

    assert Version(version) == Version(lowest)


def test_the_build_needs_nothing_that_is_not_locked() -> None:
    wanted = [*PROJECT["build-system"]["requires"], "editables"]  # what an editable install adds

    assert all(pinned(lock, Requirement(line).name) for line in wanted for lock in LOCKS)


def test_what_makes_the_site_is_exact_without_a_lock() -> None:
    wanted = [Requirement(line) for line in PROJECT["project"]["optional-dependencies"]["docs"]]

    assert wanted
    assert all([s.operator for s in requirement.specifier] == ["=="] for requirement in wanted)


@pytest.mark.parametrize("lock", LOCKS)
def test_the_documentation_names_the_versions_of_the_locks(lock: str) -> None:
    page = (ROOT / "docs" / "getting-started.md").read_text()
    table = [row for row in page.splitlines() if row.startswith("|")]
    (header,) = [row for row in table if "torchvision" in row and "triton" in row]
    (row,) = [row for row in table if f"`{lock}`" in row]

    names, said = ([cell.strip() for cell in line.split("|")[2:-1]] for line in (header, row))

    assert "torch" in names
    for name, versions in zip(names, said, strict=True):
        assert set(versions.split(" or ")) == pinned(lock, name)
