"""A small Llama that writes docstrings character by character, trained on those of the standard
library of Python: text that every machine has."""

import ast
import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
CONTEXT = 128  # characters
BATCH, PEAK_LR = 12, 4e-3


def docstrings(modules: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the characters to learn from and those of other modules to judge by, int64.

    Args:
        modules: how many modules of the library are read, in the order of their names; None for
            all. Every fifth judges.
    """
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:modules]
    train, judge = ([p for k, p in enumerate(paths) if (k % 5 == 4) == last] for last in (0, 1))
    return encoded("\n\n".join(map(_of, train))), encoded("\n\n".join(map(_of, judge)))


def _of(path: Path) -> str:
    kinds = ast.Module, ast.ClassDef, ast.FunctionDef
    tree = ast.parse(path.read_bytes())
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return "\n\n".join(filter(None, found))


def encoded(text: str) -> Tensor:
    """Return a text's characters `[T]`, without those that the model does not know."""
    numbers = {character: k for k, character in enumerate(CHARACTERS)}
    return torch.tensor([numbers[character] for character in text if character in numbers])


def decoded(ids: Tensor) -> str:
    """Return the text of characters `[T]`."""
    return "".join(CHARACTERS[k] for k in ids.tolist())


def windows(text: Tensor, count: int, seed: int) -> Tensor:
    """Return pieces of a text from random places `[count, CONTEXT]`."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(text) - CONTEXT, (count, 1), generator=generator)
    return text[starts + torch.arange(CONTEXT)]


def train(text: Tensor, width: int, depth: int, steps: int) -> LlamaForCausalLM:
    """Train a Llama with grouped-query attention and tied embeddings.

    Args:
        text: to learn from `[T]`.
        width: of the residual stream, a multiple of 32; heads are 32 wide.
        depth: blocks.
        steps: of training, at least 1.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(CHARACTERS), hidden_size=width, intermediate_size=2 * width,
        num_hidden_layers=depth, num_attention_heads=width // 32,
        num_key_value_heads=max(1, width // 64), max_position_embeddings=2 * CONTEXT,
        tie_word_embeddings=True, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=steps + 1)
    for step in range(steps):
        loss = character_losses(model, windows(text, BATCH, step)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval().requires_grad_(False)


def logits_of(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """Return what a model expects after each character but the last `[B, T - 1, len(CHARACTERS)]`,
    given `[B, T]`."""
    return model(input_ids=ids, use_cache=False).logits[:, :-1]


def character_losses(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """Return the negative log-likelihood of each character but the first `[B, T - 1]`, in nats."""
    return F.cross_entropy(logits_of(model, ids).mT, ids[:, 1:], reduction="none")
