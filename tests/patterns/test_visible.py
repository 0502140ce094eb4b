"""Masks: what is proven holds of every element, sizes stay symbolic, and near-causal masks are no causal ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from mask_grammar import Inputs, additive, build, masks
from torch import Tensor, fx

from ascend_dynamo import _torch_compat as compat
from ascend_dynamo import capture
from ascend_dynamo.ir.facts import GraphFacts
from ascend_dynamo.normalize import normalize
from ascend_dynamo.patterns.attention.mask_proof import Level
from ascend_dynamo.patterns.attention.visible import Added, Mask, Visible, visibility

LOW = torch.finfo(torch.float32).min


class Values(fx.Interpreter):
    """Runs a graph and keeps the value of every node."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)

    def of(self, *args: Any) -> dict[fx.Node, Any]:
        with torch.no_grad():
            self.run(*args)
        return self.env


class Proven:
    """A function that makes a mask [.., Sq, Sk], traced, and what is proven of it."""

    def __init__(self, fn: Callable[..., Tensor], args: tuple[Tensor, ...], symbolic: Any = None) -> None:
        with torch.no_grad():
            mode, fakes = compat.symbolic_fakes(args) if symbolic else (None, args)
            self.unit = capture.trace(fn, fakes)
        normalize(self.unit)
        self.facts = GraphFacts(self.unit.gm)
        self.out: fx.Node = next(n for n in self.unit.gm.graph.nodes if n.op == "output").args[0][0]
        shape = self.facts.val(self.out).shape
        level = Level.of(self.facts, [*([2, 3, 5][: 4 - len(shape)]), *shape])
        guards = compat.guard_count(mode)
        scores = self.unit.gm.graph.find_nodes(op="placeholder")[0]
        # some calls fix sizes while they are traced (F.pad does)
        self.grows = not any(isinstance(self.facts.size(s), int) for s in self.facts.val(scores).shape[-2:])
        boolean = self.facts.val(self.out).dtype == torch.bool
        masks, biases = ([Mask(self.out, level)], []) if boolean else ([], [Added(self.out, level)])
        self.seen = visibility(self.facts, masks, biases, shape[-2:])
        assert compat.guard_count(mode) == guards

    def check(self, args: tuple[Tensor, ...]) -> None:
        """What is proven holds for these inputs."""
        if self.seen is None:
            return
        values = Values(self.unit.gm).of(*args)
        was = values[self.out]
        keep = visible(self.seen, values, was.shape)
        if was.dtype == torch.bool:
            torch.testing.assert_close(keep, was)
            return
        bias = torch.zeros_like(was)
        for b in self.seen.biases:
            bias = bias + values[b.node]
        torch.testing.assert_close(torch.where(keep, was, 0.0), torch.where(keep, bias, 0.0), equal_nan=True)
        hidden = was[~keep]
        assert bool((hidden < -1e37).all()), "a key is hidden that the mask shows"
        rows = keep.any(-1)
        assert not self.seen.moot or bool(rows.all())
        if bool(rows.all()) or bool(keep.all()):
            return
        assert self.seen.empty_row == ("nan" if bool((was[~rows] == -math.inf).all()) else "uniform")
        assert bool((was[~rows] == was[~rows].flatten()[0]).all()), "an empty row is hidden by several values"


def visible(seen: Visible, values: dict[fx.Node, Any], shape: Any) -> Tensor:
    """The keys that flags and operands show, [.., Sq, Sk]."""
    sq, sk = shape[-2:]
    i, j = torch.arange(sq)[:, None], torch.arange(sk)
    i = i + (sk - sq if seen.causal == "bottom_right" else 0)
    keep = torch.ones(shape, dtype=torch.bool)
    if seen.causal != "none":
        keep = keep & (j <= i)
    if seen.window >= 0:
        keep = keep & (j > i - seen.window)
    for m in seen.masks:
        keep = keep & (values[m.node] if m.keep else ~values[m.node])
    return keep


def inputs(b: int, sq: int, sk: int) -> Inputs:
    pad = torch.ones(b, sk, dtype=torch.int64)
    pad[0, : sk // 2] = 0
    flags = torch.rand(b, 1, sq, sk) < 0.5
    return Inputs(torch.zeros(b, 1, sq, sk), pad, torch.tensor(2), flags, torch.rand(1, 1, 1, sk))


def function(tree: Any) -> Callable[..., Tensor]:
    def fn(*args: Tensor) -> Tensor:
        i = Inputs(*args)
        b, sq, sk = i.sizes
        return build(tree, i).expand(b, 1, sq, sk)

    return fn


def same_everywhere(tree: Any, sizes: tuple[int, int, int], symbolic: bool) -> None:
    args = inputs(*sizes).tensors()
    try:
        function(tree)(*args)
    except RuntimeError:  # no tensor: shapes that do not fit
        return
    p = Proven(function(tree), args, symbolic)
    note(f"{p.seen}")
    p.check(args)
    if symbolic and p.grows:
        b, sq, sk = sizes
        p.check(inputs(b, sq + 3, sk + 3).tensors())


SIZES = st.sampled_from([(2, 5, 5), (2, 5, 8), (1, 1, 7), (2, 7, 4), (2, 3, 3), (2, 9, 12)])
SOUND = settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@SOUND
@given(masks, SIZES)
def test_a_proof_of_a_boolean_mask_is_true(tree, sizes):
    same_everywhere(tree, sizes, symbolic=False)


@SOUND
@given(additive, SIZES)
def test_a_proof_of_an_additive_mask_is_true(tree, sizes):
    same_everywhere(tree, sizes, symbolic=False)


@settings(SOUND, max_examples=12, phases=[Phase.generate])  # tracing with symbols is slow: no shrinking
@given(st.one_of(masks, additive), st.sampled_from([(2, 5, 5), (2, 5, 8), (2, 7, 4)]))
def test_a_proof_with_symbolic_sizes_is_true_for_other_sizes(tree, sizes):
    same_everywhere(tree, sizes, symbolic=True)
