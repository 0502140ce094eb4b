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

from .._calls import arg, arguments, aten, commuted, convert, dtype, is_call, lossless, number, refuse, same_shape


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
    found = _scaled_by(n)
    if found is None or not is_call(found[0], aten.tanh.default):
        return None
    tanh, cap = found
    inner = _scaled_by(arg(tanh, 0))
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
    found = _scaled_by(n)
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
    read = _masked(n, facts)
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
PRODUCTS = (aten.matmul.default, aten.bmm.default)


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


_TRANSPARENT = (
    convert,
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.tanh.default,
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
    aten.where.self,
    aten.where.ScalarOther,
    aten.where.ScalarSelf,
    aten.reshape.default,
    aten.permute.default,
    aten.clamp.default,
    aten.relu.default,
    aten.sigmoid.default,
    aten.neg.default,
    aten.exp.default,
)


def leads_to_product(n: Any, depth: int = 12) -> bool:
    """True if a matmul is found above ``n`` through elementwise and layout calls only: cheap, before the real walk."""
    if not isinstance(n, fx.Node) or depth == 0:
        return False
    if is_call(n, *PRODUCTS):
        return True
    return is_call(n, *_TRANSPARENT) and any(leads_to_product(a, depth - 1) for a in n.all_input_nodes)


def _scaled_by(n: Any) -> tuple[fx.Node, float] | None:
    """(x, c) if ``n`` is ``x * c`` or ``x / (1/c)`` with a number."""
    if is_call(n, aten.mul.Tensor):
        for x, c in commuted(n):
            if isinstance(x, fx.Node) and number(c) is not None:
                return x, float(c)
    if is_call(n, aten.div.Tensor) and isinstance(arg(n, 0), fx.Node):
        c = number(arg(n, 1))
        if c and arguments(n).get("rounding_mode") is None:
            return arg(n, 0), 1.0 / c
    return None


def _masked(n: fx.Node, facts: Facts) -> tuple[fx.Node, fx.Node, bool, float | None] | None:
    """(scores, mask, True if True keeps, fill) of a masking call; fill None if it is not a constant."""
    if is_call(n, aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        call = arguments(n)
        return call["self"], call["mask"], False, _constant(call["value"], facts)
    if is_call(n, aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf):
        call = arguments(n)
        a, b, condition = call["self"], call["other"], call["condition"]
        if isinstance(a, fx.Node) and leads_to_product(a):
            return a, condition, True, _constant(b, facts)
        if isinstance(b, fx.Node) and leads_to_product(b):
            return b, condition, False, _constant(a, facts)
    return None


def _constant(x: Any, facts: Facts) -> float | None:
    """The value of a number or of a constant tensor of equal elements."""
    if not isinstance(x, fx.Node):
        return number(x)
    while is_call(x, aten.expand.default, aten.reshape.default, convert):
        x = arg(x, 0)
    value = facts.const(x)
    if value is None or value.numel() == 0:
        return None
    first = value.flatten()[0]
    if not bool((value == first).all()):
        return None
    # A finite number that overflows the dtype is an infinity by accident: what was meant is anybody's guess.
    written = next((a for a in reversed(x.args) if number(a) is not None), None)
    overflowed = written is not None and math.isfinite(float(written)) and not bool(torch.isfinite(first))  # type: ignore[arg-type]
    return None if overflowed else float(first)
