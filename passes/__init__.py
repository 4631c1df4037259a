"""Graph passes: one method, one readable place. Imported as `fxq.passes`."""

if __name__ != "fxq.passes":
    raise ImportError(f"import this package as 'fxq.passes', found {__name__!r} (loads once)")
