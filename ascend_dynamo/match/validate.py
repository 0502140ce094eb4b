"""Translation validation: before and after of one match, run on numbers at the site's own shapes, strides and dtypes.

The algebra is compared in float64, where erf and tanh, or 1e-5 and 1e-6, cannot hide behind rounding; then the result
at the site's dtype must be as near to the float64 value as eager's is, within a budget of a few units of rounding.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from ascend_dynamo import _torch_compat as compat
from ascend_dynamo.contracts import Match
from ascend_dynamo.errors import PatternError
from ascend_dynamo.ir.facts import PROLOGUE
from ascend_dynamo.match.agree import PLAIN, Budget, budget_of, differs_at_dtype, differs_in_algebra, liftable
from ascend_dynamo.match.evaluate import draw, run, seeded

SEEDS = (0x5EED, 0xA5CE)


@compat.no_dispatch_modes()  # while compiling, a fake mode is active, which refuses real tensors
def validate_rewrite(
    name: str, m: Match, results: Sequence[fx.Node], new: Sequence[fx.Node], prologue: fx.GraphModule
) -> None:
    """Compare the matched nodes with their replacement on seeded random inputs.

    Raises:
        PatternError: they differ; the message says at which output, by how much, and for which input shapes.
    """
    old = sorted(m.nodes)
    inputs, between = boundary(old, new, m.computed)
    for seed in SEEDS:
        with seeded(seed) as generator:
            limit = smallest_extent(inputs)
            env = {n: draw(n.meta["val"], generator, limit) for n in inputs}
        for lifted in (True, False):
            before = run([*between, *old], env, prologue, lifted)
            after = run([*between, *(n for n in new if n not in env)], env, prologue, lifted)
            if lifted:
                exact, budgets = before, [_budget(a, b, before, after) for a, b in zip(m.outputs, results, strict=True)]
            for i, (a, b) in enumerate(zip(m.outputs, results, strict=True)):
                was, now = before[a], after[b] if b in after else before[b]
                with compat.no_dispatch_modes():  # while compiling, a fake mode is active that refuses real tensors
                    if lifted:
                        fault = differs_in_algebra(was, now, liftable((*old, *new)))
                    else:
                        fault = differs_at_dtype(was, now, exact[a], budget=budgets[i])
                if fault:
                    where = "in float64" if lifted else f"at {was.dtype}"
                    shapes = ", ".join(f"%{n.name}{list(v.shape)}" for n, v in env.items())
                    raise PatternError(
                        f'pattern "{name}": validation of the match at %{m.anchor.name} failed {where}: output {i} '
                        f"{fault}, for inputs {shapes}"
                    )


def _budget(old: fx.Node, new: fx.Node, before: Mapping[fx.Node, Any], after: Mapping[fx.Node, Any]) -> Budget:
    """What the replacement declares; if that is no dialect operator, what the replaced one grants any kernel of it."""
    declared = budget_of(new, after)
    return budget_of(old, before) if declared is PLAIN else declared


_aten = torch.ops.aten
# A rewrite may read a value in front of these where the matched nodes read it behind: they are run, not drawn.
_SEEN_THROUGH = frozenset(
    {
        _aten.permute.default,
        _aten.reshape.default,
        _aten.expand.default,
        _aten.slice.Tensor,
        torch.ops.prims.convert_element_type.default,
        _aten.full.default,
        _aten.scalar_tensor.default,
    }
)


def boundary(
    old: Sequence[fx.Node], new: Sequence[fx.Node], computed: Collection[fx.Node] = ()
) -> tuple[list[fx.Node], list[fx.Node]]:
    """(tensors to draw, calls between them and the match), in program order.

    Prologue values and constants are computed, not drawn; so is what layout, casts and constructors make, and what the
    match names as ``computed``.
    """
    inside = {*old, *new}
    drawn: dict[fx.Node, None] = {}
    between: dict[fx.Node, None] = {}
    pending = [source for node in (*old, *new) for source in node.all_input_nodes if source not in inside]
    while pending:
        node = pending.pop()
        if node in drawn or node in between or node.op == "get_attr" or PROLOGUE in node.meta:
            continue
        if node.op == "call_function" and (node.target in _SEEN_THROUGH or node in computed):
            between[node] = None
            pending.extend(source for source in node.all_input_nodes if source not in inside)
        elif isinstance(node.meta.get("val"), torch.Tensor):
            drawn[node] = None
    for node in _owners(new):
        drawn[node] = None
    return sorted(drawn), sorted(between)


def _owners(new: Sequence[fx.Node]) -> list[fx.Node]:
    """The parameters behind the prologue values that the new nodes read."""
    names = {name for node in new for s in node.all_input_nodes if PROLOGUE in s.meta for name in s.meta[PROLOGUE][1]}
    if not names:
        return []
    return [n for n in new[0].graph.find_nodes(op="placeholder") if n.name in names]


def smallest_extent(inputs: Sequence[fx.Node]) -> int:
    """A bound for random integers such that they can index anything here."""
    sizes = [s for n in inputs for s in n.meta["val"].shape if isinstance(s, int) and s > 0]
    return min(sizes, default=2)
