"""What every method shares: where to quantize, calibration, conversion, and the proof that a pass
kept the float function. Equivalent scaling is a package of its own, `scaling`."""

from fxq.passes.common.calibrate import Calibrate
from fxq.passes.common.convert import Convert
from fxq.passes.common.correct_bias import CorrectBias
from fxq.passes.common.decompose_attention import DecomposeAttention
from fxq.passes.common.fake_quantize import fake_quantize
from fxq.passes.common.float_function import check_float_function, float_difference
from fxq.passes.common.fold_batch_norm import FoldBatchNorm
from fxq.passes.common.group_positions import GroupPositions
from fxq.passes.common.held_out_margin import HeldOutMargin
from fxq.passes.common.insert_observers import InsertObservers
from fxq.passes.common.layer_choice import DEPTHWISE, FIRST, LAST, first_of
from fxq.passes.common.leave_float import LeaveFloat
from fxq.passes.common.observe_activations import ObserveActivations
from fxq.passes.common.quantize_cache import QuantizeCache
from fxq.passes.common.quantize_residuals import QuantizeResiduals
from fxq.passes.common.separate_outliers import SeparateOutliers
from fxq.passes.common.split_concatenations import SplitConcatenations
from fxq.passes.common.student import (
    activation_scales,
    adopt,
    student_of,
    without_observers,
)
from fxq.passes.common.timestep_rows import TimestepRows
from fxq.passes.common.widen_ranges import WidenRanges

__all__ = [
    "DEPTHWISE",
    "FIRST",
    "LAST",
    "Calibrate",
    "Convert",
    "CorrectBias",
    "DecomposeAttention",
    "FoldBatchNorm",
    "GroupPositions",
    "HeldOutMargin",
    "InsertObservers",
    "LeaveFloat",
    "ObserveActivations",
    "QuantizeCache",
    "QuantizeResiduals",
    "SeparateOutliers",
    "SplitConcatenations",
    "TimestepRows",
    "WidenRanges",
    "activation_scales",
    "adopt",
    "check_float_function",
    "fake_quantize",
    "first_of",
    "float_difference",
    "student_of",
    "without_observers",
]
