"""A hundred synthetic patterns and graphs of any size that hold them, for three matchers.

Pattern ``i`` is ``root(a(b(x) * y), z)`` with ``a`` and ``b`` out of ten unary operators and one of five binary roots;
its replacement is one call, ``bench::fused(x, y, z, i)``. A graph is one tenth occurrences (drawn at random), one tenth
near misses that fail at their last node, and for the rest chains that use the same operators. No occurrence overlaps
another and each is written in the order of the pattern, so that a matcher without commutativity finds all of them too.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensorMode

aten = torch.ops.aten
NAMES = ("relu", "sigmoid", "tanh", "sin", "cos", "exp", "neg", "abs", "erf", "rsqrt")
UNARY = tuple(getattr(aten, n).default for n in NAMES)
ROOTS = (aten.add.Tensor, aten.sub.Tensor, aten.maximum.default, aten.minimum.default, aten.atan2.default)
COUNT = len(UNARY) ** 2

torch.library.define("bench::fused", "(Tensor x, Tensor y, Tensor z, int i) -> Tensor")
torch.library.register_fake("bench::fused", lambda x, y, z, i: torch.empty_like(x))
FUSED = torch.ops.bench.fused.default


def parts(i: int) -> tuple[Any, Any, Any]:
    """The operators (a, b, root) of pattern ``i``."""
    return UNARY[i // len(UNARY)], UNARY[i % len(UNARY)], ROOTS[i % len(ROOTS)]


def search(i: int) -> Callable[..., torch.Tensor]:
    """Pattern ``i`` as a function of (x, y, z)."""
    a, b, root = parts(i)
    return lambda x, y, z: root(a(b(x) * y), z)


def replacement(i: int) -> Callable[..., torch.Tensor]:
    return lambda x, y, z: FUSED(x, y, z, i)


def graph(calls: int, seed: int = 0) -> tuple[fx.GraphModule, int]:
    """A graph of about ``calls`` calls with fake values, and the number of occurrences in it."""
    rng = random.Random(seed)
    g = fx.Graph()
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(torch.empty(64))

        def add(target: Any, *args: fx.Node) -> fx.Node:
            node = g.call_function(target, args)
            node.meta["val"] = torch.empty_like(fake)
            return node

        recent = []
        for n in range(4):
            x = g.placeholder(f"x{n}")
            x.meta["val"] = torch.empty_like(fake)
            recent.append(add(aten.div.Tensor, x, x))
        made = occurrences = 0
        while made < calls:
            x, y, z = rng.sample(recent, 3)  # distinct: SubgraphMatcher misses an input that is used twice
            i = rng.randrange(COUNT)
            a, b, root = parts(i)
            dice = rng.random()
            if dice < 0.1 / 4 * _CALLS_PER_STEP:
                new, cost = add(root, add(a, add(aten.mul.Tensor, add(b, x), y)), z), 4
                occurrences += 1
            elif dice < 0.2 / 4 * _CALLS_PER_STEP:
                new, cost = add(root, add(a, add(aten.mul.Tensor, add(aten.div.Tensor, x, z), y)), z), 4
            elif dice < 0.6:
                new, cost = add(root, add(a, add(aten.div.Tensor, x, y)), z), 3
            else:
                new, cost = add(root, x, add(aten.div.Tensor, y, add(b, z))), 3
            made += cost
            recent.append(add(aten.div.Tensor, new, x))
            made += 1
            if len(recent) > 8:
                recent.pop(0)
        unused = [n for n in g.nodes if not n.users]
        g.output(tuple(unused))
    return fx.GraphModule(torch.nn.Module(), g), occurrences


_CALLS_PER_STEP = 4.4  # what one step of the loop adds on average, for the shares above


def counts(gm: fx.GraphModule) -> torch.Tensor:
    """How often each pattern was replaced: [COUNT]."""
    found = torch.zeros(COUNT)
    for node in gm.graph.find_nodes(op="call_function", target=FUSED):
        found[node.args[3]] += 1
    return found
