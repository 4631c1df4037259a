"""The command line: `fxq compress`, `fxq report`, `fxq recipes`.

What is printed is `rich.text.Text`, here and wherever fxq prints. Of a string rich takes `[b]` and
`:smile:` for markup, and either may be part of a path or a name.
"""

import importlib.metadata
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Quantize PyTorch models as graphs.",
    pretty_exceptions_enable=False,
)
console = Console()


def parse_model(text: str) -> str:
    """Return the model's name in timm of `timm:vit_tiny_patch16_224`."""
    library, colon, name = text.partition(":")
    if library != "timm" or not colon or not name:
        raise ValueError(f"--model: expected timm:<name>, found {text!r}")
    return name


def parse_argument(text: str) -> tuple[str, Any]:
    """Split `img_size=32` into a name and a number, a truth value or a string."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--model-arg: expected name=value, found {text!r}")
    if value in ("True", "False"):
        return name, value == "True"
    for kind in (int, float):
        try:
            return name, kind(value)
        except ValueError:
            continue
    return name, value


@app.command()
def compress(
    model: Annotated[str, typer.Option(help="timm:<name>")],
    data: Annotated[
        Path,
        typer.Option(
            help="folder of pictures, searched with its subfolders", exists=True, file_okay=False
        ),
    ],
    recipe: Annotated[str, typer.Option(help="see `fxq recipes`")] = "recommended_w8a8",
    out: Annotated[
        Path | None, typer.Option(help="where to save the program (.safetensors)")
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="safetensors weights; timm downloads its own unless given",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    model_arg: Annotated[
        list[str] | None,
        typer.Option(help="name=value for the model, e.g. img_size=32; repeatable"),
    ] = None,
    calibration_images: Annotated[int, typer.Option(help="pictures to calibrate on", min=1)] = 64,
    batch_size: Annotated[int, typer.Option(help="pictures per batch", min=1)] = 16,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
) -> None:
    """Compress a model on your own pictures, compile it, and print what that cost and brought.

    The first pictures calibrate, the next ones compare; with too few, the same do both.
    """
    import fxq
    from fxq.adapters.timm_images import check_name, find_pictures, image_batches, load_model
    from fxq.batches import checked_device
    from fxq.files import check_writable
    from fxq.pipeline import resolve_recipe
    from fxq.progress import reporting
    from fxq.scorecard import measure

    def say(text: str) -> None:
        console.print(Text.assemble(("·", "dim"), " ", text))

    name = parse_model(model)
    if out is not None:
        check_writable(out)
    arguments = dict(map(parse_argument, model_arg or []))
    place = str(checked_device(device, "--device"))
    resolve_recipe(recipe)
    check_name(name)
    pictures = find_pictures(data, 2 * calibration_images)
    say(f"loading {name}")
    module = load_model(name, checkpoint, arguments, place)
    folder = image_batches(module, arguments, pictures, batch_size)
    say(f"reading {len(pictures)} pictures from {data}")
    batches = [batch.to(place) for batch in folder]
    n_calibrate = max(1, len(batches) // 2)
    held_out = batches[n_calibrate:] or batches
    say(f"compressing with {recipe}")
    data_used = batches[:n_calibrate]
    with reporting(True, console) as report:
        program = fxq.compress(module, batches[0], recipe, data=data_used, progress=report)
    card = measure(module, program, held_out, say=say)
    console.print(fxq.report(program, held_out[0]).table())
    console.print(card.table())
    if out is not None:
        fxq.save(program, out)
        say(
            f"saved {out} ({out.stat().st_size / 1e6:.2f} MB); fxq.load reads it, torch is all it "
            "needs"
        )


@app.command()
def report(program: Annotated[Path, typer.Argument(help="a file that fxq saved")]) -> None:
    """Show where every floating-point operation of a saved program goes, and why."""
    import fxq

    console.print(fxq.report(fxq.load(program)).table())


@app.command()
def recipes() -> None:
    """List the recipes that are installed."""
    for point in sorted(importlib.metadata.entry_points(group="fxq.recipes"), key=lambda p: p.name):
        console.print(Text(f"{point.name:24} {point.value}"))


def main() -> None:
    """Run the command line; a user's mistake ends in one line, not in a traceback."""
    try:
        app()
    except (ValueError, TypeError, OSError, NotImplementedError) as error:
        message = Text.assemble(("fxq:", "bold red"), " ", str(error))
        Console(stderr=True).print(message)
        sys.exit(2)
