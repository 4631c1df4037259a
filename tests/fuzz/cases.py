"""Hypothesis strategies for cases. Smaller is simpler: fewer steps, float32, normal values."""

from hypothesis import strategies as st
from modules import FAMILIES, OUTPUTS, VALUES, WEIGHTS, Case, Step

SIZES = (2, 3, 1, 7, 8, 16)
SHAPES = (
    (3, 8), (8,), (4, 6), (1, 8), (7, 3), (6, 1), (65, 8), (3, 64), (2, 3, 8), (3, 4, 4), (2, 7, 7),
    (4, 3, 65), (1,), (64,), (), (2, 2, 2, 2),
)  # fmt: skip
# How often a family is drawn: twice where rewrites look for it, seldom where much is refused.
WEIGHT = {"linear": 5, "einsum": 2, "attention": 3, "view": 4, "activation": 3, "norm": 2}


def steps() -> st.SearchStrategy[Step]:
    """Return a strategy for one step."""
    drawn = [name for name in FAMILIES for _ in range(WEIGHT.get(name, 1))]
    return st.sampled_from(drawn).flatmap(
        lambda name: st.builds(
            Step,
            st.just(name),
            st.sampled_from(sorted(FAMILIES[name].spellings)),
            st.sampled_from(SIZES),
        )
    )


def cases(max_steps: int = 7) -> st.SearchStrategy[Case]:
    """Return a strategy for whole cases. Half of them have no special values, dtype or output."""
    plain = {"steps": st.lists(steps(), min_size=1, max_size=max_steps).map(tuple)}
    plain |= {"shape": st.sampled_from(SHAPES), "seed": st.integers(0, 99)}
    plain |= {"batches": st.sampled_from([(2, 3), (1, 2), (3, 1), (5, 2), (1, 7), (7, 64)])}
    special = {
        "dtype": st.sampled_from(["float32", "bfloat16", "float16"]),
        "values": st.sampled_from(VALUES),
        "weights": st.sampled_from(WEIGHTS),
        "second_input": st.booleans(),
        "n": st.sampled_from([1, 2, 3]),
        "output": st.sampled_from(sorted(OUTPUTS, key=len)),
    }
    return st.one_of(st.builds(Case, **plain), st.builds(Case, **plain, **special))
