"""What `pip install .` installs: one package, its licence, its metadata."""

import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The text files of the wheel, by name."""
    builders = pytest.importorskip("hatchling.builders.wheel")
    folder = tmp_path_factory.mktemp("wheel")
    (path,) = builders.WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name).decode() for name in archive.namelist()}


def test_the_wheel_has_one_package_and_its_metadata(wheel: dict[str, str]) -> None:
    tops = {name.partition("/")[0] for name in wheel}
    (info,) = tops - {"fxq"}
    assert info.endswith(".dist-info")
    assert {"fxq/py.typed", "fxq/passes/w8a8.py", "fxq/lowering/rule.py"} <= wheel.keys()
    assert wheel[f"{info}/licenses/LICENSE"] == (ROOT / "LICENSE").read_text()


def test_the_metadata_names_licence_authors_and_subject(wheel: dict[str, str]) -> None:
    (text,) = [text for name, text in wheel.items() if name.endswith("/METADATA")]
    metadata = Parser().parsestr(text)

    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["License-File"] == "LICENSE"
    assert metadata["Author"] == "fxq contributors"
    assert {"pytorch", "quantization"} <= set(metadata["Keywords"].split(","))
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    assert "Project-URL" not in metadata
    assert "# fxq" in metadata.get_payload()
    (entry_points,) = [text for name, text in wheel.items() if name.endswith("entry_points.txt")]
    assert "[torch_dynamo_backends]\nfxq = fxq.backend:fxq" in entry_points
