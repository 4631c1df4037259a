"""The passes every method shares: where to quantize, calibration, and conversion."""

from fxq.passes.common.calibrate import Calibrate
from fxq.passes.common.convert import Convert
from fxq.passes.common.insert_observers import FIRST, LAST, InsertObservers

__all__ = ["FIRST", "LAST", "Calibrate", "Convert", "InsertObservers"]
