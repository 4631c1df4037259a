"""The command line on a real pretrained ViT and real pictures, and its answers to mistakes."""

import importlib
import importlib.metadata
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import fxq
from fxq.cli import app, main, parse_argument
from fxq.scorecard import Scorecard

CIFAR_VIT = [
    "--model", "timm:vit_tiny_patch16_224",
    *[f"--model-arg={a}" for a in (
        "img_size=32", "patch_size=4", "embed_dim=128", "depth=4", "num_heads=4", "mlp_ratio=2",
        "num_classes=10",
    )],
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:no kernel here")  # so it is without VNNI
def test_compress_runs_on_a_pretrained_vit_and_a_folder_of_pictures(
    shared_data: Path, tmp_path: Path
) -> None:
    sys.path.insert(0, str(shared_data))
    zoo = importlib.import_module("zoo")
    from PIL import Image

    images, _ = zoo.cifar10("test", normalise=False)
    for index in range(96):
        pixels = (images[index].permute(1, 2, 0) * 255).round().byte().numpy()
        Image.fromarray(pixels).save(tmp_path / f"{index:03}.png")
    out = tmp_path / "vit.safetensors"

    result = CliRunner().invoke(
        app,
        [
            "compress", *CIFAR_VIT, "--data", str(tmp_path), "--out", str(out),
            "--checkpoint", str(shared_data / "vit_cifar10.safetensors"),
            "--calibration-images", "48", "--batch-size", "24",
        ],
    )  # fmt: skip

    assert result.exit_code == 0, result.output
    assert "agrees with float" in result.output
    assert "exact sums" in result.output
    assert "dB against float" in result.output
    assert out.stat().st_size < 1_000_000  # 0.55 M parameters
    assert fxq.load(out).num_classes == 10


@pytest.mark.slow
def test_w8a8_keeps_the_accuracy_of_a_pretrained_vit(shared_data: Path) -> None:
    sys.path.insert(0, str(shared_data))
    zoo = importlib.import_module("zoo")
    model = zoo.vit_cifar10()
    images, labels = zoo.cifar10("test")
    calibration, _ = zoo.cifar10("calib")

    program = fxq.compress(model, images[:2], "w8a8_static", data=list(calibration[:256].split(64)))

    def accuracy(f: object) -> float:
        hits = [(f(x).argmax(-1) == y).float().sum() for x, y in zip(  # type: ignore[operator]
            images[:1000].split(250), labels[:1000].split(250), strict=True)]  # fmt: skip
        return float(sum(hits)) / 1000

    assert accuracy(program) >= accuracy(model) - 0.01


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compress", "--model", "vit", "--data", "."], "expected timm:<name>, found 'vit'"),
        (["compress", "--model", "timm:vit_tny_patch16_224", "--data", "."], "did you mean"),
        (["report", "nowhere.safetensors"], "nowhere.safetensors"),
    ],
)
def test_a_mistake_ends_in_one_line(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["fxq", *arguments])

    with pytest.raises(SystemExit) as stop:
        main()

    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in " ".join(error.split())
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "broken"], "cannot read broken/b.png as a picture"),
        (["--data", "broken", "--device", "nowhere"], "--device: expected cpu or cuda, found"),
        (["--data", "broken", "--device", "meta"], "--device: expected cpu or cuda, found 'meta'"),
        (["--data", "broken", "--model", "timm:test_vti"], "did you mean 'test_vit"),
        (["--data", "broken", "--model", "timm:xyzzy"], "known names is near"),
        (["--data", "broken", "--checkpoint", "other.safetensors"], "expected weights of test_vit"),
        (["--data", "broken", "--checkpoint", "broken/b.png"], "found others in broken/b.png"),
        (["--data", "broken", "--checkpoint", "broken"], "is a directory"),
        (["--data", "other.safetensors"], "is a file"),
        (["--data", "broken", "--batch-size", "0"], "--batch-size"),
        (["--data", "broken", "--out", "broken"], "expected the name of a file, found a folder"),
        (["--data", "broken", "--out", "no/p.safetensors"], "make no first"),
    ],
)
def test_files_that_are_something_else_end_in_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "b.png").write_text("no picture")
    weights = timm.create_model("test_vit").state_dict()
    save_file(weights, tmp_path / "vit.safetensors")
    save_file({"other": torch.zeros(1)}, tmp_path / "other.safetensors")
    monkeypatch.chdir(tmp_path)
    given = ["--model", "timm:test_vit", "--checkpoint", "vit.safetensors", *arguments]
    monkeypatch.setattr(sys, "argv", ["fxq", "compress", *given])

    with pytest.raises(SystemExit) as stop:
        main()

    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in " ".join(error.replace("│", " ").split())
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "empty"], "expected pictures"),
        (["--data", "pictures", "--recipe", "w8a8_sttic"], "did you mean 'w8a8_static"),
    ],
)
def test_what_can_be_checked_is_before_a_model_is_built(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for folder in ("empty", "pictures"):
        (tmp_path / folder).mkdir()
    (tmp_path / "pictures" / "a.png").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(timm, "create_model", None)
    monkeypatch.setattr(sys, "argv", ["fxq", "compress", "--model", "timm:test_vit", *arguments])

    with pytest.raises(SystemExit):
        main()

    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("name", ["x[b]", "[b]x", "x[/b]", "[red]", ":smile:", "x\\[b]"])
def test_names_of_files_are_printed_as_they_are(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    (folder := tmp_path / name).mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(folder / "a.png")
    found = Scorecard("a", (1.0, 1.0, 1.0), (1.0, 1.0), (1.0, 1.0), (1, 1), 1.0, True, 1.0, 1)
    monkeypatch.setattr("fxq.scorecard.measure", lambda *args, **kwargs: found)
    monkeypatch.setattr("fxq.adapters.timm_images.load_model", lambda *args: Pooled())
    monkeypatch.setattr("fxq.cli.console.width", 500)
    monkeypatch.chdir(tmp_path)
    given = ["--model", "timm:test_vit", "--data", name, "--out", f"{name}.safetensors"]

    result = CliRunner().invoke(app, ["compress", *given, "--recipe", "w8a8_dynamic"])

    assert result.exit_code == 0, result.exception
    assert f"reading 1 pictures from {name}\n" in result.output
    assert f"saved {name}.safetensors (" in result.output


class Pooled(torch.nn.Linear):
    """Stands for a model of timm: of pictures, and small."""

    def __init__(self) -> None:
        super().__init__(32, 64)
        self.pretrained_cfg = {"input_size": (3, 32, 32), "mean": (0.5,) * 3, "std": (0.5,) * 3}
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.mean((1, 2)))


@pytest.mark.parametrize("name", ["x[b]", "x[/b]", ":smile:"])
def test_errors_are_printed_as_they_are(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["fxq", "report", name])

    with pytest.raises(SystemExit):
        main()

    assert name in capsys.readouterr().err


def test_recipes_of_other_packages_are_printed_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    point = importlib.metadata.EntryPoint("mine[/b]", "mine:RECIPE [extra]", "fxq.recipes")
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [point])

    assert "mine[/b]" in (output := CliRunner().invoke(app, ["recipes"]).output)
    assert "mine:RECIPE [extra]" in output


def test_recipes_are_listed() -> None:
    assert "w8a8_static " in CliRunner().invoke(app, ["recipes"]).output


def test_model_arguments_are_numbers_truth_values_or_strings() -> None:
    pairs = [parse_argument(text) for text in ("a=3", "b=0.5", "c=True", "d=avg")]

    assert pairs == [("a", 3), ("b", 0.5), ("c", True), ("d", "avg")]
    with pytest.raises(ValueError, match="expected name=value, found 'img_size'"):
        parse_argument("img_size")
