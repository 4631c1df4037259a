"""A language model of transformers with its static cache as buffers, so that a program keeps it.

    decoder = StaticDecoder(model, batch_size=1, max_length=256)
    program = fxq.compress(
        decoder, calls(ids[:1], 16)[0], recipe, data=..., dynamic_shapes=FREE_TOKENS
    )
    fast = torch.compile(program, backend="fxq")

One program serves prompt and single tokens: they share weights, tables and cache. It is captured
with several tokens and their number free; `torch.compile` makes one graph for the prompt and one
for a token.
"""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer

FREE_TOKENS = {"input_ids": {1: "tokens"}, "cache_position": {0: "tokens"}}


class StaticDecoder(nn.Module):
    """A causal language model that adds tokens to a cache of fixed size.

    The model runs once, on one token, to say what shapes its keys and values have.

    Args:
        model: in eval mode; its layers attend to all tokens before.
        batch_size: sequences at once, B.
        max_length: tokens that the cache holds.
    Raises:
        ValueError: the model has layers of another cache, such as a sliding window, or of none.
    """

    def __init__(self, model: PreTrainedModel, batch_size: int, max_length: int) -> None:
        super().__init__()
        self.model = model
        config = model.config.get_text_config()
        cache = StaticCache(config=config, max_cache_len=max_length)
        if others := {type(each).__name__ for each in cache.layers} - {StaticLayer.__name__}:
            raise ValueError(
                f"model: expected layers that attend to all tokens, found a cache of {others}; "
                "compile model.forward instead"
            )
        known = inspect.signature(model.forward).parameters
        self.cache_name = "cache" if "cache" in known else "past_key_values"
        self.takes_positions = "position_ids" in known
        self.eval()
        self._allocate(cache, batch_size)
        self.cache = cache

    def _allocate(self, cache: StaticCache, batch_size: int) -> None:
        """Make buffers of the shapes in which the model hands keys and values to its cache, which
        one token tells: heads may share them, and keys be wider than values."""
        token = torch.zeros(batch_size, 1, dtype=torch.int64, device=self.model.device)
        with torch.inference_mode(False), torch.no_grad():
            self.model(token, **{self.cache_name: cache}, use_cache=True)
        for index, layer in enumerate(cache.layers):
            if not layer.is_initialized:
                raise ValueError(
                    f"model: expected keys and values from each of {len(cache.layers)} layers, "
                    f"found none from layer {index}; compile model.forward instead"
                )
            self.register_buffer(f"keys_{index}", layer.keys.zero_())
            self.register_buffer(f"values_{index}", layer.values.zero_())
            layer.keys = layer.values = None

    def forward(self, input_ids: Tensor, cache_position: Tensor) -> Tensor:
        """Return the logits `[B, T, vocabulary]` of the tokens after each of these.

        Args:
            input_ids: int64 `[B, T]`.
            cache_position: int64 `[T]`, neighbouring places in the sequence, the first 0.
        Raises:
            RuntimeError: a negative place.
        """
        # Compiled, negative indices count from the end, where the kernel's own bounds do not help.
        torch._assert_async(cache_position[0] >= 0, "cache_position: expected places from 0 on")
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        for index, layer in enumerate(cache.layers):
            layer.keys, layer.values = (self.get_buffer(f"{n}_{index}") for n in ("keys", "values"))
            layer.cumulative_length = cache_position[0].clone()
        arguments: dict[str, Any] = {self.cache_name: cache}
        if self.takes_positions:  # some count them by tensors whose sizes are the cache's content
            arguments["position_ids"] = cache_position.expand_as(input_ids)
        logits: Tensor = self.model(input_ids, **arguments, use_cache=True).logits
        return logits


def calls(ids: Tensor, n_prompt: int) -> list[dict[str, Tensor]]:
    """Return the calls that take sequences through a decoder: a prompt, then each token by itself.

    Args:
        ids: int64 `[B, T]`.
        n_prompt: tokens of the prompt.
    """
    place = torch.arange(ids.shape[1], device=ids.device)
    parts = [slice(0, n_prompt), *(slice(t, t + 1) for t in range(n_prompt, ids.shape[1]))]
    return [{"input_ids": ids[:, part], "cache_position": place[part]} for part in parts]


def greedy(step: Callable[..., Any], prompt: Tensor, n_tokens: int) -> Tensor:
    """Return the tokens `[B, n_tokens]` that a decoder finds likeliest after a prompt.

    Args:
        step: a `StaticDecoder`, a program of one, or what `torch.compile` made of it.
        prompt: int64 `[B, T]`.
        n_tokens: how many to write.
    """
    found: list[Tensor] = []
    given, first = prompt, 0
    with torch.no_grad():
        for _ in range(n_tokens):
            place = torch.arange(first, first + given.shape[1], device=prompt.device)
            logits = step(input_ids=given, cache_position=place)
            first += given.shape[1]
            given = logits[:, -1].argmax(-1)[:, None]
            found.append(given)
    return torch.cat(found, 1)
