"""Operators whose outputs are in memory that Inductor plans.

Left to itself, Inductor has an operator that it does not know allocate its own output. What the
operator writes is then fresh memory, which the system gives page by page: outputs of megabytes, at
every call. With the variant that writes into a given `out` (`fxq.lowering.registering`) the output
is a buffer as those of Inductor's own kernels are, in the place of an earlier value that nobody
reads any more.
"""

from typing import Any

from torch._inductor import ir
from torch._inductor.lowering import (
    add_layout_constraint,
    add_needs_realized_inputs,
    lowerings,
    register_lowering,
    tag_to_layout_constraint,
)
from torch._inductor.virtualized import V
from torch._library.utils import get_layout_constraint_tag
from torch._ops import OpOverload

from fxq.lowering.registering import with_out


class Planned(ir.FallbackKernel):
    """A call of an operator's variant with `out`."""

    def should_allocate(self) -> bool:
        """Whether Inductor allocates the output; its C++ wrapper does not know how."""
        return not V.graph.cpp_wrapper

    def codegen(self, wrapper: Any) -> None:
        """Write the call."""
        if not self.should_allocate():
            return super().codegen(wrapper)
        self.codegen_comment(wrapper)
        given = [*self.codegen_args(), *self.codegen_kwargs(), f"out={self.get_name()}"]
        assert isinstance(self.op_overload, OpOverload)
        name = self.op_overload.name().replace("::", ".")
        wrapper.writeline(f"torch.ops.{name}.out({', '.join(given)})")


def plan_outputs() -> None:
    """Have Inductor plan the outputs of all operators that have the variant, from here on."""
    for op in with_out:
        if op not in lowerings:
            _plan(op)


def _plan(op: OpOverload) -> None:
    """Do what Inductor does with an operator that it does not know, but for the output."""

    def lowering(*args: Any, **kwargs: Any) -> Any:
        return ir.TensorBox.create(Planned.create(op, *args, **kwargs))

    add_needs_realized_inputs(op)
    constraint = tag_to_layout_constraint(get_layout_constraint_tag(op))
    if constraint is not None:
        add_layout_constraint(op, constraint)
    register_lowering(op, type_promotion_kind=None)(lowering)
