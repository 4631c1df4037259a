"""The operator `fxq::rectified_attention` of the QUANTIZED dialect.

Its body is `fxq.rectified_attention.reference`, and so is its signature: it is written there and
nowhere else. A graph that holds it runs on any device. Density is a tensor: one graph serves every
step, and a density of 1 is dense attention.
"""

import inspect
from typing import Any

import torch
from torch import Tensor

from fxq.rectified_attention import reference
from fxq.rectified_attention.layout import check_choices, empty_output

SIGNATURE = inspect.signature(reference.rectified_attention)
SCHEMA: str = torch.library.infer_schema(reference.rectified_attention, mutates_args=())


def fake_results(*args: Any) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp without values. Arguments: those of `SIGNATURE`."""
    given = SIGNATURE.bind(*args).arguments
    check_choices(given["mode"], given["mass"])
    query: Tensor = given["query"]
    out = empty_output(query, given["value"].shape[-1])
    return out, query.new_empty(query.shape[:-1], dtype=torch.float32)


rectified_attention = torch.library.custom_op(
    "fxq::rectified_attention", reference.rectified_attention, mutates_args=(), schema=SCHEMA
)
rectified_attention.register_fake(fake_results)
