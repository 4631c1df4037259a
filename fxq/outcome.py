"""What a recipe came to in a graph of `torch.compile`, told to the user: in the log of
`fxq.backend`, as warnings, and with `strict` as errors."""

import logging
import warnings
from collections.abc import Container
from dataclasses import dataclass

from torch.fx import GraphModule

from fxq.account import account, flops_of
from fxq.errors import FxqWarning, SkippedError
from fxq.graph import is_settled
from fxq.lowering.apply_where_it_pays import Applied, summary
from fxq.pipeline import Recipe

MAX_SLOW_SHARE = 0.02  # of a program's operations, in layers without a kernel: a classifier's head
logger = logging.getLogger("fxq.backend")


@dataclass(frozen=True)
class Outcome:
    """What a recipe and lowering made of a graph.

    Args:
        recipe: that the user chose.
        applied: what came out.
        is_program: the graph came from a `Program`; the recipe was not applied.
    """

    recipe: Recipe
    applied: Applied
    is_program: bool

    def tell_changes(self) -> None:
        """Log what the recipe did, a line for all layers of which it is the same."""
        changed: dict[str, list[str]] = {}
        for row in account(self.applied.quantized):
            if row.format is not None and not self.is_program:
                about = f" ({row.layer.remarks})" if row.layer.remarks else ""
                did = f"{row.kind} {row.format}{about}"
                changed.setdefault(did, []).append(row.module)
        for did, names in changed.items():
            modules = ", ".join(names)
            logger.info("recipe %r: %d of %s: %s", self.recipe.name, len(names), did, modules)

    def tell_skips(self, strict: bool) -> None:
        """Log what the recipe left as it was; raise, or warn, where it could not do what it is for,
        where no kernel would gain by it, or where it found nothing to do."""
        gm, declined = self.applied.quantized, self.applied.left
        settled = {n.name for n in gm.graph.nodes if is_settled(n)} - set(declined)
        rows = [row for row in account(gm) if row.node not in settled]
        left = {row.node: f"{row.module}: {row.skip.reason}" for row in rows if row.skip}
        for line in left.values():
            logger.info("recipe %r left as it was %s", self.recipe.name, line)
        meant = [left[row.node] for row in rows if row.skip and not row.skip.intended]
        if not self.recipe.passes:
            return
        others = [line for name, line in left.items() if name not in declined]
        n_changed = len(rows) - len(left)
        told = []
        if declined:
            nothing = "" if n_changed else "changed nothing and "
            share = f"{len(declined)} of {len(declined) + n_changed}"
            told.append(
                f"{nothing}left {share} layers as they were, because no kernel would gain by it "
                f"here: {summary(declined.values())}"
            )
        listing = "".join(f"\n  {line}" for line in dict.fromkeys(meant or others))
        if meant and strict:
            raise SkippedError(f"strict=True, and {self.recipe.name!r} left as it was{listing}")
        if meant:
            told.append(f"left as it was{listing}")
        elif listing and not n_changed and not declined:
            told.append(f"changed nothing, and left as it was{listing}")
        if told:
            text = f"recipe {self.recipe.name!r} " + "; ".join(told)
            warnings.warn(text, FxqWarning, stacklevel=2)

    def tell_missing_kernels(self, strict: bool, warn: bool) -> None:
        """Raise where `strict` and a layer has no kernel; warn, if asked to, where one that has
        none, of a program, computes what was simulated all the same."""
        applied, declined = self.applied, self.applied.declined
        for name, why in declined.items():
            logger.info("no kernel here for %s: %s", name, why)
        if strict and (missing := {**applied.left, **declined}):
            listing = "\n  ".join(f"{name}: {why}" for name, why in missing.items())
            raise SkippedError(f"strict=True, and no kernel here for\n  {listing}")
        share = _share_of(applied.quantized, declined)
        if share > MAX_SLOW_SHARE and warn:
            warnings.warn(
                f"no kernel here for {len(declined)} of {len(applied.decisions)} layers, "
                f"{share:.0%} of the operations, which compute what was simulated all the same: "
                "slower than in float, or no faster where weights alone are quantized: "
                f"{summary(declined.values())}",
                FxqWarning,
                stacklevel=2,
            )


def _share_of(gm: GraphModule, names: Container[str]) -> float:
    """Return which share of the operations of `gm` the named nodes have, 0 to 1."""
    flops = {node.name: flops_of(node) for node in gm.graph.nodes}
    part = sum(count for name, count in flops.items() if name in names)
    return part / max(sum(flops.values()), 1)
