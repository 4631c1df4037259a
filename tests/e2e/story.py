"""A real small language model: perplexity, and text that it still writes."""

import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fxq
from fxq.pipeline import Recipe

TOKENS = 128


class Story:
    """The story model, batches to calibrate with, and its perplexity on other stories."""

    def __init__(self, folder: Path) -> None:
        sys.path.insert(0, str(folder))
        import zoo

        tokenizer = zoo.StoriesTokenizer()
        encoded = [tokenizer.encode(story[:800]) for story in zoo.tinystories()]
        rows = torch.tensor([ids[:TOKENS] for ids in encoded if len(ids) >= TOKENS])
        self.model = zoo.stories260k()
        self.data = [{"input_ids": part, "use_cache": False} for part in rows[:240].split(8)]
        self.held_out = rows[-96:]

    @torch.no_grad()
    def loss(self, model: nn.Module) -> float:
        losses = []
        for ids in self.held_out.split(32):
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
            losses.append(nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))
        return float(torch.stack(losses).mean())

    def perplexity(self, model: nn.Module) -> float:
        return math.exp(self.loss(model))

    def compressed(self, *passes: Any) -> fxq.Program:
        return fxq.compress(
            self.model,
            self.data[0],
            Recipe("story", passes),
            self.data,
            dynamic_shapes={"input_ids": {0: "batch", 1: "tokens"}},
        )


def assert_writes(model: Any, program: fxq.Program) -> None:
    """Check that transformers' `generate` writes with a program what greedy search over its logits
    does."""
    forward, prompt = model.forward, torch.tensor([[1, 403, 407, 261]])

    def run(input_ids: Tensor, **_: Any) -> Any:
        return program(input_ids=input_ids, use_cache=False)

    expected = prompt
    for _ in range(12):
        best = program(input_ids=expected, use_cache=False).logits[:, -1].argmax(-1)
        expected = torch.cat([expected, best[:, None]], 1)
    model.forward = run
    try:
        written = model.generate(prompt, max_new_tokens=12, do_sample=False, use_cache=False)
    finally:
        model.forward = forward
    assert torch.equal(written, expected[:, : written.shape[1]])
    assert written.shape[1] > prompt.shape[1] + 4
