"""Loops over experts become moe_experts; a loop that is anything else in one place is left alone."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from pattern_support import assert_same, fuse, snapshot
from torch import nn

from ascend_dynamo.backend import Backend
from ascend_dynamo.patterns.spellings import loops

T, E, H, I = 5, 3, 8, 4
OPTIONS = {"target": "reference", "validate": True, "strict": True}


def inputs(fn, dtype=torch.bfloat16):
    torch.manual_seed(0)
    return loops.fuzz_inputs(random.Random(3), dtype, loops.SPELLINGS.index(fn))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("fn", loops.SPELLINGS, ids=lambda f: f.__name__)
def test_every_spelling(fn, dtype):
    args = inputs(fn, dtype)
    result = fuse(fn, args, "moe_loop", params=range(2, len(args)))
    assert result.fired == ["moe_loop"] and result.ops("ascend.moe_experts") == 1
    assert result.ops("aten.linear") == result.ops("aten.matmul") == result.ops("aten.add.Tensor") == 0
    assert_same(fn, args, result)


@pytest.mark.parametrize("fn", loops.SPELLINGS, ids=lambda f: f.__name__)
def test_behind_its_router_and_before_everything_that_would_take_it_apart(fn):
    args = inputs(fn)
    result = fuse(fn, args, params=range(2, len(args)))
    assert set(result.fired) == {"moe_gate", "moe_loop"}
    assert_same(fn, args, result)


def test_snapshot():
    made = [fuse(f, a := inputs(f), "moe_loop", params=range(2, len(a))) for f in loops.SPELLINGS[:3]]
    snapshot("moe_loop", *made)


def test_batches_and_shared_experts_around_it():
    def fn(x, logits, up, down):
        weights, ids = torch.softmax(logits.float(), -1).topk(2)
        y = torch.zeros_like(x)
        for e in range(E):
            gate, up_ = F.linear(x, up[e]).chunk(2, -1)
            y += F.linear(F.silu(gate) * up_, down[e]) * (weights * (ids == e)).sum(-1, keepdim=True)
        return x + y

    args = torch.randn(2, T, H), torch.randn(2, T, E), torch.randn(E, 2 * I, H), torch.randn(E, H, I)
    result = fuse(fn, args, "moe_loop")
    assert result.fired == ["moe_loop"] and result.ops("aten.add.Tensor") == 1
    assert_same(fn, args, result)


def operands():
    torch.manual_seed(1)
    each = [torch.randn(*shape) / 2 for _ in range(E) for shape in ((I, H), (I, H), (H, I))]
    return torch.randn(T, H), torch.randn(T, E), *each


def template(x, logits, *own, order=range(E), index=lambda e: e, start=None, steps=None, act=None, share=None, **other):
    """``loops.masked_weights`` with one part exchanged; ``other`` maps an expert to what it takes instead of x,
    the weights or the ids."""
    weights, ids = torch.softmax(logits.float(), -1).topk(2)
    y = torch.zeros_like(x) if start is None else start(x)
    on_the_way = []
    for e in order:
        gate, up, down = own[3 * index(e) : 3 * index(e) + 3]
        source = other["source"](e, x) if "source" in other else x
        scale = other["weights"](e, weights) if "weights" in other else weights
        chosen = other["ids"](e, ids) if "ids" in other else ids
        g, u = F.linear(source, gate), F.linear(source, up)
        h = F.linear(act(e, g) * u if act else F.silu(g) * u, down)
        y = y + h * (share(e, scale, chosen) if share else (scale * (chosen == e)).sum(-1, keepdim=True))
        on_the_way.append(y)
    return (y, on_the_way[1]) if steps else y


def near(**parts):
    return lambda *args: template(*args, **parts)


NEAR = {
    "an expert is missing": (near(order=(0, 2)), "arg", "0, 1, ... once"),
    "an expert comes twice": (near(order=(0, 1, 2, 1)), "arg", "0, 1, ... once"),
    "two experts share weights": (near(index=lambda e: e % 2), "alias", "weights used by one expert"),
    "another x for one": (near(source=lambda e, x: x + 1 if e == 1 else x), "arg", "the same input"),
    "other weights for one": (near(weights=lambda e, w: w * 2 if e == 1 else w), "arg", "the same weights"),
    "other ids for one": (near(ids=lambda e, i: i + 1 if e == 1 else i), "arg", "the same ids"),
    "another activation for one": (
        near(act=lambda e, g: F.relu(g) if e == 1 else F.silu(g)),
        "arg",
        "the same activation",
    ),
    "an unknown activation": (near(act=lambda e, g: torch.tanh(g)), "op", "silu, gelu or relu"),
    "not from zeros": (near(start=torch.ones_like), "op", "starts from zeros"),
    "a sum on the way is returned": (near(steps=True), "users", "used only by the fusion"),
    "summed over tokens": (
        near(share=lambda e, w, i: (w * (i == e)).sum(0, keepdim=True)[:, :1]),
        "op",
        "weights of its tokens",
    ),
    "not the weights of this expert": (
        near(share=lambda e, w, i: (w * (i != e)).sum(-1, keepdim=True)),
        "op",
        "weights of its tokens",
    ),
    "the first slot alone": (
        near(share=lambda e, w, i: (w * (i == e))[:, :1].sum(-1, keepdim=True)),
        "op",
        "weights of its tokens",
    ),
    "a softmax instead of a choice": (
        near(share=lambda e, w, i: torch.softmax(w, -1)[:, e % 2, None]),
        "op",
        "weights of its tokens",
    ),
    "a ramp instead of zeros": (
        near(share=lambda e, w, i: torch.full((T, E), 0.5).scatter(1, i, w)[:, e, None]),
        "op",
        "weights of its tokens",
    ),
    "scattered along the tokens": (
        near(share=lambda e, w, i: torch.zeros(T, E).scatter(0, i, w)[:, e, None]),
        "op",
        "weights of its tokens",
    ),
    "scattered by ids that may repeat": (
        near(
            ids=lambda e, i: torch.div(i, 2, rounding_mode="floor"),
            share=lambda e, w, i: torch.zeros(T, E).scatter(1, i, w)[:, e, None],
        ),
        "unproven",
        "ids that differ",
    ),
}


def test_the_template_itself_is_recognised():
    args = operands()
    result = fuse(template, args, "moe_loop", params=range(2, len(args)))
    assert result.fired == ["moe_loop"]
    assert_same(template, args, result)


@pytest.mark.parametrize("name", NEAR)
def test_near_misses_say_what_stopped_them(name):
    fn, code, expected = NEAR[name]
    args = operands()
    result = fuse(fn, args, "moe_loop", params=range(2, len(args)))
    missed = result.missed("moe_loop")
    assert result.fired == [] and missed.code == code and expected in missed.reason, missed


def test_weights_that_are_computed_are_not_copied_together():
    args = operands()
    result = fuse(template, args, "moe_loop")
    assert result.fired == [] and "whose weights are parameters" in result.missed("moe_loop").reason


def batched(pick):
    def fn(x, logits, up, down):
        weights, ids = torch.softmax(logits.float(), -1).topk(2)
        y = torch.zeros_like(x)
        for e in range(E):
            gate, up_ = F.linear(x, up[pick(e)]).chunk(2, -1)
            y = y + F.linear(F.silu(gate) * up_, down[e]) * (weights * (ids == e)).sum(-1, keepdim=True)
        return y

    return fn


@pytest.mark.parametrize("experts, pick", [(E, lambda e: (e + 1) % E), (E, lambda e: 0), (E + 1, lambda e: e)])
def test_batched_weights_of_other_experts_are_refused(experts, pick):
    args = torch.randn(T, H), torch.randn(T, E), torch.randn(experts, 2 * I, H), torch.randn(experts, H, I)
    result = fuse(batched(pick), args, "moe_loop")
    assert result.fired == [] and result.missed("moe_loop").code in ("arg", "shape")


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(H, I, False), nn.Linear(H, I, False), nn.Linear(I, H, False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Dense(nn.Module):
    """Every expert on every token."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(H, E, False), nn.ModuleList(Expert() for _ in range(E))

    def forward(self, x):
        weights, ids = torch.softmax(self.router(x), -1).topk(2)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            y += expert(x) * (weights * (ids == e)).sum(-1, keepdim=True)
        return y


def check_module(model, fresh, **compile_options):
    """One graph with one moe_experts for inputs that route differently; eager's results, in place on the parameters."""
    torch.manual_seed(2)
    torch._dynamo.reset()
    backend = Backend(OPTIONS)
    compiled = torch.compile(model, backend=backend, fullgraph=True, **compile_options)
    with torch.no_grad():
        for _ in range(4):
            x = fresh()
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-6)
        assert len(backend.records) == 1 and backend.records[0].count("moe_loop") == 1
        model.experts[1].up.weight.mul_(2)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-6)
    return backend


@pytest.mark.parametrize("dynamic", [False, True])
def test_modules_are_merged_by_aliasing(dynamic):
    check_module(Dense(), lambda: torch.randn(T, H), dynamic=dynamic)
