"""The fuzzer is itself tested: right patterns pass; every planted wrong rewrite and every dropped guard is caught."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from match_support import SAME, ops
from torch import fx

from ascend_dynamo.contracts import Builder, Domain, Facts, Match, NoMatch
from ascend_dynamo.match import ProceduralPattern, declare
from ascend_dynamo.match.canonical import canonical
from ascend_dynamo.match.fuzz import fuzz

aten = torch.ops.aten
ROWS = Domain(shapes={"x": ("*B", "H"), "w": ("H",)})
EPS = {"eps": (1e-6, 1e-2)}


def caught(pattern: Any, budget: int = 4) -> list[str]:
    return [f.check for f in fuzz(pattern, budget, enough=2)]


# ---- patterns that are right


def norm(x, w, eps):
    h = x.float()
    return w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def norm_by_sum(x, w, eps):
    h = x.float()
    return w * (h * torch.rsqrt(h.pow(2).sum(-1, keepdim=True) * (1.0 / x.shape[-1]) + eps)).to(x.dtype)


def rotate(x, cos, sin):
    h = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., h:], x[..., :h]), -1) * sin


ROPE = Domain(shapes={"x": ("B", "N", "S", "2*H"), "cos": ("B", "1", "S", "2*H"), "sin": ("B", "1", "S", "2*H")})
HALF = (torch.float32, torch.bfloat16, torch.float16)


NORMS = Domain(dtypes=HALF, dims={"H": (1, None)}, shapes=ROWS.shapes)


def test_right_patterns_pass():
    right = (
        declare("right_norm", eager=norm, replace=norm_by_sum, domain=NORMS, scalars=EPS),
        declare("right_relu", eager=lambda x, y: torch.relu(x + y), replace=lambda x, y: ops.fused(x, y), domain=SAME),
        declare(
            "right_gelu",
            eager=lambda x, y, approximate: F.gelu(x, approximate=approximate) + y,
            replace=lambda x, y, approximate: torch.ops.ascend.gelu_add(x, y, approximate=approximate),
            domain=SAME,
            choices={"approximate": ("none", "tanh")},
        ),
    )
    for pattern in right:
        assert fuzz(pattern, 16) == [], pattern.name


# ---- declarative plants


@pytest.mark.parametrize(
    "name, eager, replace, domain, scalars",
    [
        ("eps_ten_times", norm, lambda x, w, eps: norm_by_sum(x, w, eps * 10), ROWS, EPS),
        ("eps_squared", norm, lambda x, w, eps: norm_by_sum(x, w, eps * eps), ROWS, EPS),
        ("erf_for_tanh", lambda x, y: F.gelu(x, approximate="tanh") + y, lambda x, y: F.gelu(x) + y, SAME, {}),
        (
            "softmax_other_dim",
            lambda x, y: torch.softmax(x, -1) * y,
            lambda x, y: torch.exp(x) / torch.exp(x).sum(-2, keepdim=True) * y,
            Domain(shapes={"x": ("B", "S", "H"), "y": ("B", "S", "H")}),
            {},
        ),
        (
            "alpha_two",
            lambda x, y: torch.relu(torch.add(x, y, alpha=2)),
            lambda x, y: ops.fused(x, y),
            SAME,
            {},
        ),
        (
            "swapped_halves",
            rotate,
            lambda x, cos, sin: (
                x * cos + torch.cat((x[..., x.shape[-1] // 2 :], -x[..., : x.shape[-1] // 2]), -1) * sin
            ),
            ROPE,
            {},
        ),
    ],
)
def test_planted_declarative_faults(name, eager, replace, domain, scalars):
    assert caught(declare(name, eager=eager, replace=replace, domain=domain, scalars=scalars))


# ---- procedural plants: each forgets one thing


class Careless(ProceduralPattern):
    """relu(x + y) * c -> fused, with one check of ``forget`` left out."""

    anchors = (aten.relu.default,)
    domain = SAME
    eager = (lambda x, y: torch.relu(x + y),)

    def __init__(self, forget: str = "") -> None:
        self.name = f"careless_{forget or 'about_nothing'}"
        self.forget = forget

    def match(self, anchor: fx.Node, facts: Facts) -> Match | NoMatch:
        add = anchor.args[0]
        if not isinstance(add, fx.Node) or add.target not in (aten.add.Tensor, aten.sub.Tensor):
            return NoMatch("op", anchor, "an add", "another")
        if add.target is aten.sub.Tensor and self.forget != "op":
            return NoMatch("op", anchor, "an add", "a sub")
        x, y, alpha = canonical(add)
        if not isinstance(x, fx.Node) or not isinstance(y, fx.Node):
            return NoMatch("arg", add, "two tensors", "a number")
        if alpha != 1 and self.forget != "alpha":
            return NoMatch("arg", add, "alpha 1", str(alpha))
        if facts.val(x).shape != facts.val(y).shape:
            return NoMatch("shape", add, "equal shapes", "a broadcast")
        if facts.val(x).dtype != facts.val(y).dtype:
            return NoMatch("dtype", add, "equal dtypes", "others")
        inputs = {"x": x, "y": x if self.forget == "second" else y}
        return Match(self.name, anchor, frozenset((anchor, add)), inputs, (anchor,))

    def rewrite(self, b: Builder, m: Match) -> tuple[fx.Node, ...]:
        return (b.op(ops.fused.default, m.inputs["x"], m.inputs["y"]),)

    def fuzz_inputs(self, rng: random.Random, dtype: torch.dtype, spelling: int) -> tuple[Any, ...]:
        return torch.randn(3, 4, dtype=dtype), torch.randn(3, 4, dtype=dtype)


@pytest.mark.parametrize("forget", ["alpha", "op", "second"])
def test_planted_procedural_faults(forget):
    assert fuzz(Careless(), 6) == []
    assert caught(Careless(forget))


class SoftmaxAnyDim(ProceduralPattern):
    """softmax(x, last) -> exp/sum, matched whatever the dim."""

    name = "softmax_any_dim"
    anchors = (aten._softmax.default,)
    domain = Domain(shapes={"x": ("*B", "H")})
    eager = (lambda x: torch.softmax(x, -1),)

    def match(self, anchor: fx.Node, facts: Facts) -> Match | NoMatch:
        return Match(self.name, anchor, frozenset((anchor,)), {"x": anchor.args[0]}, (anchor,))

    def rewrite(self, b: Builder, m: Match) -> tuple[fx.Node, ...]:
        e = b.op(aten.exp.default, m.inputs["x"])
        return (b.op(aten.div.Tensor, e, b.op(aten.sum.dim_IntList, e, [-1], True)),)

    def fuzz_inputs(self, rng: random.Random, dtype: torch.dtype, spelling: int) -> tuple[Any, ...]:
        return (torch.randn(4, 4, dtype=dtype),)


def test_an_ignored_dim_is_caught():
    assert "hostile" in caught(SoftmaxAnyDim())


def windowed(q, k, v, window):
    s, t = q.shape[-2], k.shape[-2]
    i, j = torch.arange(s)[:, None], torch.arange(t)[None, :]
    keep = (j <= i) & (j > i - window)
    scores = (q @ k.transpose(-1, -2)).masked_fill(~keep, float("-inf"))
    return torch.softmax(scores, -1) @ v


def test_a_mask_that_is_off_by_one_is_caught():
    shapes = {"q": ("B", "S", "D"), "k": ("B", "S", "D"), "v": ("B", "S", "D")}
    domain = Domain(dtypes=(torch.float32,), dims={"S": (2, None)}, shapes=shapes)
    for wrong in (0, 1):
        assert bool(caught(_window(wrong, domain))) == bool(wrong)


def _window(wrong: int, domain: Domain) -> Any:
    def spelled(q, k, v):
        return windowed(q, k, v, 2)

    def replace(q, k, v):
        s, t = q.shape[-2], k.shape[-2]
        i, j = torch.arange(s)[:, None], torch.arange(t)[None, :]
        hide = (j > i) | (j <= i - 2 - wrong)
        scores = q @ k.transpose(-1, -2) + torch.zeros(s, t).masked_fill(hide, float("-inf"))
        return torch.softmax(scores, -1) @ v

    return declare(f"window_{wrong}", eager=spelled, replace=replace, domain=domain)


# ---- guards of domain.requires: with them the pattern is right, without any one of them it is caught


class Guarded(ProceduralPattern):
    """relu(x - y) * s, right only for what the guards let through."""

    anchors = (aten.mul.Tensor,)
    domain = Domain(shapes={"x": ("S", "H"), "y": ("S", "H")})
    eager = (lambda x, y: torch.relu(x - y) * 0.5, lambda x, y: torch.relu(x - y) * 3.0)

    def __init__(self, guards: tuple[str, ...]) -> None:
        self.name = "guarded_" + "_".join(guards)
        self.guards = guards

    def match(self, anchor: fx.Node, facts: Facts) -> Match | NoMatch:
        relu, s = anchor.args
        if not isinstance(relu, fx.Node) or relu.target is not aten.relu.default or not isinstance(s, float):
            return NoMatch("op", anchor, "relu(...) * s", "another")
        sub = relu.args[0]
        if not isinstance(sub, fx.Node) or sub.target is not aten.sub.Tensor:
            return NoMatch("op", relu, "a sub", "another")
        x, y, alpha = canonical(sub)
        if not isinstance(x, fx.Node) or not isinstance(y, fx.Node):
            return NoMatch("arg", sub, "two tensors", "a number")
        if "alpha" in self.guards and alpha != 1:
            return NoMatch("arg", sub, "alpha 1", str(alpha))
        if "sign" in self.guards and s < 0:
            return NoMatch("arg", anchor, "a positive scale", str(s))
        if "shape" in self.guards and facts.val(x).shape != facts.val(y).shape:
            return NoMatch("shape", sub, "equal shapes", "a broadcast")
        if "users" in self.guards and any(len(n.users) > 1 for n in (relu, sub)):
            return NoMatch("users", sub, "no other users", "some")
        return Match(self.name, anchor, frozenset((anchor, relu, sub)), {"x": x, "y": y, "s": s}, (anchor,))

    def rewrite(self, b: Builder, m: Match) -> tuple[fx.Node, ...]:
        d = b.op(aten.sub.Tensor, m.inputs["x"], m.inputs["y"])
        return (b.op(aten.relu.default, b.op(aten.mul.Tensor, d, m.inputs["s"])),)

    def fuzz_inputs(self, rng: random.Random, dtype: torch.dtype, spelling: int) -> tuple[Any, ...]:
        return torch.randn(4, 4, dtype=dtype), torch.randn(4, 4, dtype=dtype)


def test_dropping_a_guard_of_a_recogniser_is_caught():
    everything = ("alpha", "sign", "shape", "users")
    assert fuzz(Guarded(everything), 6) == []
    for guard in ("alpha", "sign"):
        assert caught(Guarded(tuple(g for g in everything if g != guard))), guard


def clamp(x, y, s):
    return torch.relu(x + y) * s


def _small_scale(m: Match, facts: Facts) -> NoMatch | None:
    return None if m.inputs["s"] <= 1.0 else NoMatch("arg", m.anchor, "s <= 1", str(m.inputs["s"]))


def _even(m: Match, facts: Facts) -> NoMatch | None:
    size = facts.val(m.inputs["x"]).shape[-1]
    return None if facts.known(size % 2 == 0) else NoMatch("shape", m.anchor, "an even size", str(size))


def _distinct(m: Match, facts: Facts) -> NoMatch | None:
    same = m.inputs["x"] is m.inputs["y"]
    return NoMatch("alias", m.anchor, "two tensors", "one") if same else None


library = torch.library.Library("match_fuzz", "DEF")
library.define("picky(Tensor x, Tensor y, float s) -> Tensor")


def picky(x: torch.Tensor, y: torch.Tensor, s: float) -> torch.Tensor:
    """A kernel that is only right for an even last size, s <= 1, and two different tensors."""
    out = torch.relu(x + y) * min(s, 1.0)
    if x.shape[-1] % 2:
        out[..., -1:] = 0
    return out * 2 if x.data_ptr() == y.data_ptr() and x.numel() else out


library.impl("picky", picky, "CompositeExplicitAutograd")
torch.library.register_fake("match_fuzz::picky", lambda x, y, s: torch.empty_like(x), lib=library)
GUARDS = (_small_scale, _even, _distinct)


def with_guards(*guards: Any) -> Any:
    def requires(m: Match, facts: Facts) -> NoMatch | None:
        return next((no for g in guards if (no := g(m, facts)) is not None), None)

    return declare(
        "picky",
        eager=clamp,
        replace=lambda x, y, s: torch.ops.match_fuzz.picky(x, y, s),
        domain=Domain(shapes=SAME.shapes, requires=requires),
        scalars={"s": (0.2, 3.0)},
    )


def test_deleting_any_single_guard_is_caught():
    assert fuzz(with_guards(*GUARDS), 16) == []
    for guard in GUARDS:
        assert caught(with_guards(*(g for g in GUARDS if g is not guard)), 24), guard.__name__


def test_a_spelling_that_is_not_found_is_a_finding():
    class Blind(Careless):
        def match(self, anchor: fx.Node, facts: Facts) -> Match | NoMatch:
            return NoMatch("op", anchor, "something else", "this")

    assert caught(Blind()) == ["silent"] * len(caught(Blind()))
    assert caught(Blind())


def test_a_rewrite_that_raises_is_a_finding():
    class Broken(Careless):
        def rewrite(self, b: Builder, m: Match) -> tuple[fx.Node, ...]:
            raise RuntimeError("no such kernel")

    assert "crash" in caught(Broken())


def test_the_same_seed_draws_the_same_cases():
    wrong = declare(
        "same_seed", eager=norm, replace=lambda x, w, eps: norm_by_sum(x, w, eps * 2), domain=ROWS, scalars=EPS
    )
    assert fuzz(wrong, 3, seed=1) == fuzz(wrong, 3, seed=1) != fuzz(wrong, 3, seed=2)
