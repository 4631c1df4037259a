"""Triton's interpreter, refusing what only some of its versions compute right."""

from typing import Any

from triton.runtime.interpreter import InterpreterBuilder


def strict() -> None:
    """Refuse the broadcast of a scalar condition from here on.

    A compiler keeps `tile & (n < N)` boolean; the interpreter of Triton 3.9 makes it int32, which
    is no mask. A kernel puts the scalar into the bound instead: `tile < tl.where(n < N, D, 0)`.
    """
    splat = InterpreterBuilder.create_splat

    def create_splat(self: InterpreterBuilder, shape: Any, value: Any) -> Any:
        if value.data.dtype == bool:
            raise TypeError(
                "expected a tile as a condition, found a scalar one that meets a tile; put it into "
                "the bound that the tile is compared with"
            )
        return splat(self, shape, value)

    InterpreterBuilder.create_splat = create_splat
