"""From a softmax up to the product of queries and keys, one step at a time.

The walk meets the operations in reverse order of evaluation. ``flash_attention`` evaluates scale, softcap, bias, mask;
so the walk may meet mask, bias, softcap, scale in this order and no other, unless a step can prove that two commute.
Each step is a function ``(node, scores, facts) -> next node | NoMatch | None``: None means "not mine", NoMatch "mine,
but not provably the same". Steps change ``scores`` only if they return a node.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ascend_dynamo.contracts import Facts, NoMatch

from .._calls import arg, arguments, aten, commuted, convert, dtype, is_call, lossless, refuse, same_shape
from .read import PRODUCTS, leads_to_product, masked, scaled_by


@dataclass
class Scores:
    """What stands between q k^T and the softmax, outermost first.

    ``stage`` says what has been met: 0 nothing that fixes the order, 1 masks or biases, 2 softcap or scale (after which
    an additive term would be scaled). ``fill`` is the value that masks write; ``nodes`` what the fusion replaces.
    """

    scale: float = 1.0
    softcap: float = 0.0
    biases: list[fx.Node] = field(default_factory=list)
    masks: list[tuple[fx.Node, bool]] = field(default_factory=list)  # (mask, True if True means keep)
    fill: float | None = None
    scaled: bool = False
    nodes: set[fx.Node] = field(default_factory=set)

    @property
    def progress(self) -> float:
        return min(0.9, 0.2 + 0.1 * len(self.nodes))


Step = Callable[[fx.Node, Scores, Facts], "fx.Node | NoMatch | None"]


def step_cast(n: fx.Node, s: Scores, facts: Facts) -> fx.Node | NoMatch | None:
    """An upcast of the scores is what flash attention does anyway; a downcast rounds and is refused."""
    if not is_call(n, convert):
        return None
    source = arg(n, 0)
    assert isinstance(source, fx.Node)
    if lossless(dtype(facts, source), dtype(facts, n)):
        return source
    found = f"a cast from {dtype(facts, source)} to {dtype(facts, n)}"
    return refuse(facts, "dtype", n, "scores that are only upcast", found, s.progress, "drop the cast of the scores")


def step_softcap(n: fx.Node, s: Scores, facts: Facts) -> fx.Node | NoMatch | None:
    """``tanh(x / c) * c``."""
    found = scaled_by(n)
    if found is None or not is_call(found[0], aten.tanh.default):
        return None
    tanh, cap = found
    inner = scaled_by(arg(tanh, 0))
    if s.scaled:
        return refuse(facts, "unproven", n, "the softcap as the last factor", "scores scaled after it", s.progress)
    if inner is None or not cap > 0 or not math.isclose(inner[1] * cap, 1.0, rel_tol=1e-12):
        by = "nothing" if inner is None else f"{inner[1]}"
        fix = "divide by the softcap, take tanh, multiply by the same softcap"
        return refuse(facts, "arg", n, f"tanh of scores times 1/{cap}", f"scores times {by}", s.progress, fix)
    s.softcap, s.scaled = cap, True
    s.nodes |= {tanh, arg(tanh, 0)}  # type: ignore[arg-type]
    return inner[0]


def step_scale(n: fx.Node, s: Scores, facts: Facts) -> fx.Node | NoMatch | None:
    """A product or quotient with a number."""
    found = scaled_by(n)
    if found is None:
        return None
    source, factor = found
    if not math.isfinite(factor):
        return refuse(facts, "arg", n, "a finite scale", f"{factor}", s.progress)
    s.scale *= factor
    s.scaled = True
    return source


def step_bias(n: fx.Node, s: Scores, facts: Facts) -> fx.Node | NoMatch | None:
    """``scores + bias``, either way round."""
    if not is_call(n, aten.add.Tensor, aten.sub.Tensor):
        return None
    if arguments(n)["alpha"] != 1:
        found = f"alpha={arguments(n)['alpha']}"
        return refuse(facts, "arg", n, "scores + bias with alpha=1", found, s.progress, "multiply the bias itself")
    if is_call(n, aten.sub.Tensor):
        return refuse(facts, "op", n, "scores + bias", "a difference", s.progress, "add the negated bias")
    ways = [(x, b) for x, b in commuted(n) if isinstance(x, fx.Node) and isinstance(b, fx.Node) and leads_to_product(x)]
    if len(ways) != 1:
        return refuse(facts, "op", n, "one summand that comes from q k^T", f"{len(ways)} of them", s.progress)
    source, bias = ways[0]
    if s.scaled:
        fix = "add the bias after the scores are scaled"
        return refuse(facts, "unproven", n, "a bias outside the scale", "a bias inside it", s.progress, fix)
    if s.masks and s.fill != -math.inf:
        # Under -inf masked means gone, as in flash attention; under a finite fill the bias still tells keys apart.
        found = f"a bias under a mask that fills with {s.fill}"
        return refuse(facts, "unproven", n, "a mask alone, or one of -inf", found, s.progress, "fill with -inf")
    if not same_shape(facts, source, n):
        found = f"{list(facts.val(n).shape)}"
        return refuse(facts, "shape", n, "a bias that broadcasts to the scores", found, s.progress)
    if not dtype(facts, bias).is_floating_point:
        return refuse(facts, "dtype", n, "a floating-point bias", f"{dtype(facts, bias)}", s.progress)
    s.biases.append(bias)
    return source


def step_mask(n: fx.Node, s: Scores, facts: Facts) -> fx.Node | NoMatch | None:
    """``masked_fill(scores, m, c)`` and ``where(m, scores, c)`` with ``c`` -inf or the dtype's lowest value."""
    read = masked(n, facts)
    if read is None:
        return None
    source, mask, keep, fill = read
    fix = "fill with -inf or torch.finfo(dtype).min"
    if fill is None or (fill != -math.inf and fill != torch.finfo(dtype(facts, n)).min):
        return refuse(facts, "unproven", n, "a fill that gives weight zero", f"{fill}", s.progress, fix)
    if s.scaled or s.biases:
        return refuse(facts, "unproven", n, "a mask as the last step before softmax", "more after it", s.progress, fix)
    if s.masks and s.fill != fill:
        return refuse(facts, "arg", n, f"one fill for all masks ({s.fill})", f"{fill}", s.progress, fix)
    if not same_shape(facts, source, n):
        return refuse(
            facts, "shape", n, "a mask that broadcasts to the scores", f"{list(facts.val(n).shape)}", s.progress
        )
    s.masks.append((mask, keep))
    s.fill = fill
    return source


STEPS: tuple[Step, ...] = (step_cast, step_softcap, step_scale, step_bias, step_mask)


def walk_scores(n: Any, facts: Facts, steps: tuple[Step, ...] = STEPS) -> tuple[fx.Node, Scores] | NoMatch:
    """The product q k^T above ``n`` and what stands in between, or why that is not known."""
    scores = Scores()
    while not is_call(n, *PRODUCTS):
        if not isinstance(n, fx.Node) or n.op != "call_function":
            raise AssertionError("leads_to_product was not asked")
        scores.nodes.add(n)
        for step in steps:
            found = step(n, scores, facts)
            if isinstance(found, NoMatch):
                return found
            if found is not None:
                n = found
                break
        else:
            return refuse(facts, "op", n, "scale, softcap, bias, mask or cast of q k^T", f"{n.target}", scores.progress)
    scores.nodes.add(n)
    return n, scores
