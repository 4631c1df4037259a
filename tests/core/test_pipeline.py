"""Recipes: order and records."""

import pytest

from fxq.passes import w8a8
from fxq.pipeline import Recipe


def test_a_recipe_in_the_wrong_order_is_refused() -> None:
    observe, calibrate, convert = w8a8.STATIC.passes

    with pytest.raises(ValueError, match="Calibrate reads OBSERVED, but Convert before it writes"):
        Recipe("wrong", (observe, convert, calibrate))


def test_equal_recipes_have_equal_fingerprints() -> None:
    assert w8a8.STATIC.fingerprint == Recipe("w8a8_static", w8a8.STATIC.passes).fingerprint
    assert w8a8.STATIC.fingerprint != w8a8.DYNAMIC.fingerprint
