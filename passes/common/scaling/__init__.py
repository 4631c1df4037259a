"""Equivalent scaling: one finder and one fold for every method that moves a factor.

What is where:

    fxq.analysis          which channels can be scaled together: an analysis of the whole graph
    sites                 its result as `ScaleSite`s, and a reason for every layer without one
    fold                  scales and shifts into weights, exactly
    statistics            what a method knows of a site
    loss                  what quantization does to the layers of a site
    equivalent_scaling    the pass; a method adds the candidates
    undo                  scalings judged together in the whole graph
    planting              the inverse, for measuring methods
"""

from fxq.passes.common.scaling.equivalent_scaling import (
    EquivalentScaling,
    admissible,
    apply_scalings,
    wanted,
)
from fxq.passes.common.scaling.fold import Scaling, fold_scaling
from fxq.passes.common.scaling.loss import Candidate, Operands, operands
from fxq.passes.common.scaling.planting import plant_imbalance
from fxq.passes.common.scaling.sites import ScaleSite, ScaleSites, scale_sites
from fxq.passes.common.scaling.statistics import Consumer, Statistics

__all__ = [
    "Candidate",
    "Consumer",
    "EquivalentScaling",
    "Operands",
    "ScaleSite",
    "ScaleSites",
    "Scaling",
    "Statistics",
    "admissible",
    "apply_scalings",
    "fold_scaling",
    "operands",
    "plant_imbalance",
    "scale_sites",
    "wanted",
]
