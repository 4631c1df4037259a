"""Exact int8 on CPUs."""
