"""In how many transformers of diffusers is self-attention replaced without a word from the user?

    git clone https://github.com/huggingface/diffusers
    python benchmarks/sparse_families.py diffusers [name ...]

Takes the small configurations of diffusers' own tests (`tests/models/transformers`, of a checkout
whose version is near the installed one), has Dynamo capture each in one graph, applies
`ReplaceAttention` at a density of 1, and compares the result with the graph as it was. Prints one
line of a table each: what was replaced, or the reason why not. Nothing is compiled.

Candidates are models with dense attention of several tokens to themselves. One that has none -
causal, of one token, only cross-attention (linear attention is no softmax) - is counted apart, with
the reasons of all its attentions.
"""

import importlib
import inspect
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from fxq.account import account
from fxq.bound_graph import BoundGraph
from fxq.operators import SPARSE_ATTENTION
from fxq.passes.rectified_spaattn import ReplaceAttention, eligibility
from fxq.pipeline import Recipe

SPARSE = Recipe("sparse", (ReplaceAttention(density=1.0, block_size=4, min_tokens=2),))
SECONDS = 120
TOLERANCE = 1e-3
# Reasons of attentions that are not dense self-attention of several tokens.
NO_CANDIDATE = ("causal attention", "cross-attention", "1 tokens")


class Judged(BoundGraph):
    """A graph of Dynamo's that runs as it is, beside the one in which attention was replaced."""

    error = float("nan")

    def make(self, bound: GraphModule, inputs: Sequence[Any], args: Sequence[Any]) -> Any:
        self.sparse = SPARSE.apply(bound)

        def run(args: Sequence[Any]) -> Any:
            expected = self.dynamo_graph(*args)
            found = self.sparse(*(args[i] for i in self.live))
            pairs = zip(tree_leaves(expected), tree_leaves(found), strict=False)
            self.error = max(float((a - b).abs().max() / a.abs().max().clamp(min=1e-6))
                             for a, b in pairs if a.is_floating_point())  # fmt: skip
            return expected

        return run


class _Stub(ModuleType):
    """Stands for diffusers' testing utilities: the configurations need a device and a dtype."""

    torch_device = "cpu"
    __path__: Sequence[str] = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name[0].isupper():
            return type(name, (), {"torch_dtype": torch.float32})
        return lambda *args, **kwargs: args[0] if args and callable(args[0]) else _same


def _same(function: Any) -> Any:
    return function


def configurations(folder: Path, wanted: Sequence[str]) -> Iterator[tuple[str, type]]:
    """Yield the first configuration of every model class in diffusers' tests."""
    sys.path.insert(0, str(folder))
    for name in ("tests.testing_utils", "tests.models.testing_utils", "parameterized"):
        sys.modules[name] = _Stub(name)
    for name in ("tests.models.test_modeling_common", "tests.models.testing_utils.common"):
        sys.modules[name] = _Stub(name)
    seen = set()
    for file in sorted((folder / "tests" / "models" / "transformers").glob("test_*.py")):
        try:
            module = importlib.import_module(f"tests.models.transformers.{file.stem}")
        except Exception as error:
            print(f"<!-- {file.stem}: {type(error).__name__}: {str(error).splitlines()[0]} -->")
            continue
        for name, config in inspect.getmembers(module, inspect.isclass):
            is_own = name.endswith("TesterConfig") and config.__module__ == module.__name__
            if not is_own or not hasattr(config, "get_init_dict"):
                continue
            model = config().model_class.__name__
            if model not in seen and (not wanted or model in wanted):
                seen.add(model)
                yield model, config


def judge(config: type) -> tuple[str, str]:
    """Return "yes", "no", "not a candidate" or "" (no single graph) for a model, and what to say of
    it."""
    torch.manual_seed(0)
    of = config()
    graphs: list[GraphModule] = []
    judged: list[Judged] = []

    def backend(gm: GraphModule, inputs: Sequence[Any]) -> Any:
        graphs.append(gm)
        judged.append(Judged(gm))
        return judged[-1]

    model = of.model_class(**of.get_init_dict()).eval()
    inputs = of.get_dummy_inputs()
    with torch.no_grad():
        try:
            torch.compile(model, backend=backend, fullgraph=True)(**inputs)
        except Exception as error:
            lines = str(error).replace("backend='backend' raised:", "").strip().splitlines()
            return "no" if graphs else "", lines[0]
    return verdict(judged[-1])


def verdict(graph: Judged) -> tuple[str, str]:
    """Return "yes", "no" or "not a candidate", and what was replaced or why not."""
    rows = [row for row in account(graph.sparse) if row.kind == "attention"]
    sparse = [row for row in rows if row.format is not None]
    meant = {row.skip.reason for row in rows if row.skip and not row.skip.intended}
    others = {row.skip.reason for row in rows if row.skip and row.skip.intended}
    calls = sum(node.target == SPARSE_ATTENTION for node in graph.sparse.graph.nodes)
    assert calls == len(sparse)
    if sparse and not meant and graph.error < TOLERANCE:
        notes = sorted({row.layer.remarks for row in sparse})
        return "yes", f"{len(sparse)} of {len(rows)}: {'; '.join(notes)}"
    if not graph.error < TOLERANCE:
        return "no", f"error {graph.error:.2g}"
    reasons = sorted(meant | others)
    if all(reason.startswith(NO_CANDIDATE) for reason in reasons):
        return "not a candidate", "; ".join(reasons) or "no attention"
    return "no", "; ".join(sorted(meant or others))


def main() -> None:
    warnings.simplefilter("ignore")
    eligibility.ALIGNED = 1  # heads of the small configurations have 2 to 16 channels
    counts = {"yes": 0, "no": 0, "not a candidate": 0, "": 0}
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError("too slow")))
    print("| model | replaced | what, or why not |\n|---|---|---|")
    for name, config in configurations(Path(sys.argv[1]), sys.argv[2:]):
        signal.alarm(SECONDS)
        try:
            result, why = judge(config)
        except Exception as error:
            result, why = "", f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"
        finally:
            signal.alarm(0)
        counts[result] += 1
        print(f"| {name} | {result or 'no graph'} | {why[:160].replace('|', '/')} |", flush=True)
        torch._dynamo.reset()
    candidates = counts["yes"] + counts["no"]
    one_graph = candidates + counts["not a candidate"]
    print(
        f"\n{counts['yes']} of {candidates} candidates; {counts['yes']} of {one_graph} in one "
        f"graph; {counts['']} without one"
    )


if __name__ == "__main__":
    main()
