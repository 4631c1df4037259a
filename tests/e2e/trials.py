"""What is known to run, from start to end: the trials of `test_trials.py`, and their table.

`python tests/e2e/trials.py` prints the table that stands in docs/getting-started.md.
"""

from dataclasses import dataclass

RUNS = "runs"


@dataclass(frozen=True)
class Trial:
    """A row of the table.

    Args:
        library: whose code runs unmodified.
        what: the pipeline or loop.
        part: what is compressed or compiled.
        compressed: `RUNS`, or why a program does not take the part's place.
        compiled: `RUNS`, or why `torch.compile(part, backend="fxq")` is not in the list.
    """

    library: str
    what: str
    part: str
    compressed: str = RUNS
    compiled: str = RUNS


TRIALS = (
    Trial("diffusers", "Wan", "`pipe.transformer`"),
    Trial("diffusers", "HunyuanVideo", "`pipe.transformer`"),
    Trial("diffusers", "Flux", "`pipe.transformer`"),
    Trial("diffusers", "CogVideoX", "`pipe.transformer`"),
    Trial("diffusers", "LTX-Video", "`pipe.transformer`"),
    Trial("diffusers", "Stable Diffusion 3", "`pipe.transformer`"),
    Trial("diffusers", "Qwen-Image", "`pipe.transformer`"),
    Trial("diffusers", "PixArt", "`pipe.transformer`"),
    Trial("diffusers", "Mochi", "`pipe.transformer`"),
    Trial("diffusers", "Stable Diffusion (UNet)", "`pipe.unet`"),
    Trial("diffusers", "DiT", "`pipe.transformer`"),
    Trial("transformers", "`pipeline`, image classification, ViT", "`pipe.model`"),
    Trial(
        "transformers",
        "`generate`, Llama and Mistral, dynamic and static cache",
        "`model.forward`",
        compressed="no: a graph returns no cache",
    ),
    Trial("timm", "validation loop over (images, labels), ViT", "model"),
)


def table() -> str:
    """Return the trials as a table in Markdown."""
    lines = [
        "| library | what | part | `fxq.compress` | `torch.compile` |",
        "|---|---|---|---|---|",
    ]
    for trial in TRIALS:
        cells = (trial.library, trial.what, trial.part, trial.compressed, trial.compiled)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(), end="")
