"""Lowering from the QUANTIZED to the LOWERED dialect, per device. Imported as `fxq.lowering`."""

if __name__ != "fxq.lowering":
    raise ImportError(f"import this package as 'fxq.lowering', found {__name__!r} (loads once)")
