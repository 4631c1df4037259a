"""Thin, optional bridges to model libraries. Nothing in fxq imports them but the command line."""
