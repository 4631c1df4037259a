"""PSAQ-ViT: quantize a vision transformer without data (arXiv:2203.02250), and its second version.

`synthesize` dreams images out of the float model; any recipe takes them as calibration data.
`adversarial_refine` lets such images and the quantized model improve each other.
"""

from fxq.passes.psaq_vit.game import Game, GameTrace, Refinement, adversarial_refine
from fxq.passes.psaq_vit.images import SyntheticImages, Trace
from fxq.passes.psaq_vit.prior import Prior
from fxq.passes.psaq_vit.recipes import (
    PUBLISHED_W4A8,
    PUBLISHED_W8A8,
    W4A8,
    W4A8_MSE,
    W6A6,
    W8A8,
    W8A8_PERCENTILE,
    everywhere,
)
from fxq.passes.psaq_vit.synthesis import IMAGENET_MEAN, IMAGENET_STD, Synthesis, synthesize
from fxq.passes.psaq_vit.taps import Tap, Taps, find_taps

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "PUBLISHED_W4A8",
    "PUBLISHED_W8A8",
    "W4A8",
    "W4A8_MSE",
    "W6A6",
    "W8A8",
    "W8A8_PERCENTILE",
    "Game",
    "GameTrace",
    "Prior",
    "Refinement",
    "Synthesis",
    "SyntheticImages",
    "Tap",
    "Taps",
    "Trace",
    "adversarial_refine",
    "everywhere",
    "find_taps",
    "synthesize",
]
