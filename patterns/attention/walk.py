"""From a softmax up to the product of queries and keys, one step at a time.

The walk meets the operations in reverse order of evaluation. Each step is a function ``(node, scores, facts) -> next
node | NoMatch | None``: None means "not mine", NoMatch "mine, but not provably the same". Steps change ``scores`` only
if they return a node. ``flash_attention`` evaluates scale, softcap, bias, mask; what the walk meets in another order is
brought into that one where algebra allows: an outer factor multiplies the terms inside it (``Term.factor``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ascend_dynamo.contracts import Facts, NoMatch

from .._calls import LAYOUT, arg, arguments, aten, commuted, convert, dtype, is_call, lossless, refuse, same_shape
from .frame import Axes, Frame, layout_chain
from .read import is_product, leads_to_product, masked, scaled_by
from .terms import Term, fits


@dataclass
class Scores:
    """What stands between q k^T and the softmax.

    ``terms`` are the biases and masks, outermost first, ``factor`` is what multiplies the present node later on (in the
    end the scale) and ``axes`` are its axes. ``working`` is the dtype of v: scores may be
    rounded to it. ``rounded`` is the narrowest dtype that the present node is rounded to later on.
    """

    frame: Frame
    axes: Axes
    working: torch.dtype
    factor: float = 1.0
    softcap: float = 0.0
    rounded: torch.dtype | None = None
    terms: list[Term] = field(default_factory=list)
    nodes: set[fx.Node] = field(default_factory=set)

    @property
    def progress(self) -> float:
        return min(0.9, 0.2 + 0.1 * len(self.nodes))


Step = Callable[[fx.Node, Scores, Facts], "fx.Node | NoMatch | None"]


def step_cast(n: fx.Node, s: Scores, facts: Facts) -> fx.Node | NoMatch | None:
    """An upcast is what flash attention does anyway; a cast to the dtype of v rounds as q k^T in that dtype would."""
    if not is_call(n, convert):
        return None
    source = arg(n, 0)
    if lossless(dtype(facts, source), dtype(facts, n)):
        return source
    if dtype(facts, source).is_floating_point and lossless(s.working, dtype(facts, n)):
        s.rounded = dtype(facts, n)
        return source
    found = f"a cast from {dtype(facts, source)} to {dtype(facts, n)}"
    return refuse(facts, "dtype", n, "scores that are only upcast", found, s.progress, "drop the cast of the scores")


def step_layout(n: fx.Node, s: Scores, facts: Facts) -> fx.Node | NoMatch | None:
    """Scores are reshaped and permuted as long as their axes can be followed."""
    if not is_call(n, *LAYOUT):
        return None
    found = s.frame.above(n, s.axes)
    if found is None:
        return refuse(facts, "unproven", n, "scores whose axes can be followed", f"{n.target}", s.progress)
    source, s.axes = found
    s.nodes.update(layout_chain(n, source))
    return source


def step_softcap(n: fx.Node, s: Scores, facts: Facts) -> fx.Node | NoMatch | None:
    """``tanh(x / c) * c``, and with any other factors: ``f tanh(x) = f tanh((f x) / f)`` is a softcap of f."""
    if not is_call(n, aten.tanh.default):
        return None
    if s.softcap:
        return refuse(facts, "op", n, "one softcap", "tanh of tanh", s.progress)
    s.softcap = s.factor
    return arg(n, 0)


def step_scale(n: fx.Node, s: Scores, facts: Facts) -> fx.Node | NoMatch | None:
    """A product or quotient with a number."""
    found = scaled_by(n, facts)
    if found is None:
        return None
    source, factor = found
    if not math.isfinite(factor) or not factor > 0:
        return refuse(facts, "arg", n, "a finite, positive scale", f"{factor}", s.progress)
    s.factor *= factor
    return source


def step_bias(n: fx.Node, s: Scores, facts: Facts) -> fx.Node | NoMatch | None:
    """``scores + bias``, either way round, and ``scores - bias``."""
    if not is_call(n, aten.add.Tensor, aten.sub.Tensor):
        return None
    if arguments(n)["alpha"] != 1:
        found = f"alpha={arguments(n)['alpha']}"
        return refuse(facts, "arg", n, "scores + bias with alpha=1", found, s.progress, "multiply the bias itself")
    minus = is_call(n, aten.sub.Tensor)
    ways = [(x, b) for x, b in commuted(n) if isinstance(x, fx.Node) and leads_to_product(x, facts)]
    ways = [w for w in ways if same_shape(facts, w[0], n)] if len(ways) == 2 else ways
    if len(ways) != 1 or arg(n, 0) is arg(n, 1):
        return refuse(facts, "op", n, "one summand that comes from q k^T", f"{len(ways)} of them", s.progress)
    ((source, bias),) = ways
    if minus and source is not arg(n, 0):
        return refuse(facts, "op", n, "scores + bias", "a bias less the scores", s.progress, "negate q")
    return _add(n, source, bias, -s.factor if minus else s.factor, s, facts)


def step_mask(n: fx.Node, s: Scores, facts: Facts) -> fx.Node | NoMatch | None:
    """``masked_fill(scores, m, c)`` and ``where(m, scores, c)`` with ``c`` -inf or the dtype's lowest value.

    Another fill is no mask: the masked keys keep weights that flash attention cannot give them, for it would have to
    know that no score of a row is as low.
    """
    read = masked(n, facts)
    if read is None:
        return None
    source, mask, keep, fill, extra = read
    fix = "fill with -inf or torch.finfo(dtype).min"
    lowest = {torch.finfo(kind).min for kind in (dtype(facts, n), torch.bfloat16)}
    if fill is None or (fill != -math.inf and fill not in lowest):
        return refuse(facts, "unproven", n, "a fill that gives weight zero", f"{fill}", s.progress, fix)
    narrow = torch.finfo(s.rounded or dtype(facts, n)).min
    if fill != -math.inf and (s.factor > 1 or fill < narrow):
        found = f"{fill}, which may overflow to -inf later"
        return refuse(facts, "unproven", n, "a fill that stays finite or is -inf", found, s.progress, fix)
    if s.softcap:
        return refuse(facts, "unproven", n, "a mask outside the softcap", "a mask inside it", s.progress, fix)
    axes = _aligned(n, source, mask, s, facts, "mask")
    if isinstance(axes, NoMatch):
        return axes
    s.terms.append(Term(mask, axes, (tuple(facts.val(n).shape), s.axes), s.factor, keep, fill))
    s.nodes |= extra
    return source


def added_product(n: fx.Node, s: Scores, facts: Facts) -> fx.Node | NoMatch:
    """``baddbmm(bias, q, k^T, alpha=, beta=)``: a bias and a scale around the product that ends the walk."""
    call = arguments(n)
    alpha, beta = call["alpha"], call["beta"]
    if not all(isinstance(x, (int, float)) and math.isfinite(x) for x in (alpha, beta)) or not alpha > 0:
        return refuse(facts, "arg", n, "a positive alpha and a finite beta", f"alpha={alpha}, beta={beta}", s.progress)
    if beta != 0:
        refusal = _add(n, n, call["self"], s.factor * beta, s, facts)
        if isinstance(refusal, NoMatch):
            return refusal
    s.factor *= alpha
    return n


def _add(n: fx.Node, source: fx.Node, bias: Any, factor: float, s: Scores, facts: Facts) -> fx.Node | NoMatch:
    if s.softcap:
        fix = "add the bias after the softcap"
        return refuse(facts, "unproven", n, "a bias outside the softcap", "a bias inside it", s.progress, fix)
    if not isinstance(bias, fx.Node):
        return refuse(
            facts, "op", n, "scores + bias", f"scores + {bias}", s.progress, "drop the number: it has no effect"
        )
    if not dtype(facts, bias).is_floating_point:
        return refuse(facts, "dtype", n, "a floating-point bias", f"{dtype(facts, bias)}", s.progress)
    axes = _aligned(n, source, bias, s, facts, "bias")
    if isinstance(axes, NoMatch):
        return axes
    if s.rounded is not None and not fits(facts, bias, s.rounded):
        fix = f"compute the mask in {s.rounded}"
        found = f"a bias in {dtype(facts, bias)} rounded to {s.rounded}, where it may overflow"
        return refuse(facts, "unproven", n, "a bias that the scores' dtype holds", found, s.progress, fix)
    s.terms.append(Term(bias, axes, (tuple(facts.val(n).shape), s.axes), factor))
    return source


def _aligned(n: fx.Node, source: fx.Node, term: fx.Node, s: Scores, facts: Facts, what: str) -> Axes | NoMatch:
    level = facts.val(n).shape
    axes = s.frame.aligned(facts.val(term).shape, s.axes, level)
    if axes is None or not same_shape(facts, source, n):
        return refuse(facts, "shape", n, f"a {what} that broadcasts to the scores", f"{list(level)}", s.progress)
    return axes


STEPS: tuple[Step, ...] = (step_cast, step_layout, step_softcap, step_scale, step_bias, step_mask)


def walk_scores(n: fx.Node, s: Scores, facts: Facts, steps: tuple[Step, ...] = STEPS) -> fx.Node | NoMatch:
    """The product q k^T above ``n``, with ``s`` what stands in between; or why that is not known."""
    while not is_product(n, facts):
        s.nodes.add(n)
        for step in steps:
            found = step(n, s, facts)
            if isinstance(found, NoMatch):
                return found
            if found is not None:
                n = found
                break
        else:
            return refuse(facts, "op", n, "scale, softcap, bias, mask or cast of q k^T", f"{n.target}", s.progress)
    s.nodes.add(n)
    return added_product(n, s, facts) if is_call(n, aten.baddbmm.default) else n
