"""The solver finds the expression behind numbers that vary, and only what holds in every sample."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ascend_dynamo.match.canonical import canonical, same_literal, split
from ascend_dynamo.match.solve import solve_int, solve_scalar, solve_sizes

aten = torch.ops.aten
ENVS = [
    {"B": 5, "S": 11, "H": 7, "D": 17},
    {"B": 17, "S": 13, "H": 29, "D": 19},
    {"B": 19, "S": 41, "H": 23, "D": 59},
]
TEXTS = [
    "H", "H + 3", "H - 2", "2 * H", "3 * H + 1", "H // 2", "H - H // 2", "B * S", "B * S * H", "B * S // D",
    "(H + 2 * S) * D", "B + S", "H - S", "2 * H * D", "(S + H) * D", "B * S * H * D",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_every_form_of_the_grammar_is_found(text):
    values = [eval(text, {}, env) for env in ENVS]
    found = solve_int(values, ENVS)
    assert found is not None
    fresh = {"B": 3, "S": 4, "H": 6, "D": 8}
    assert found(fresh) == eval(text, {}, fresh)


@given(st.lists(st.integers(0, 10**6), min_size=3, max_size=3))
def test_what_is_found_holds_in_every_sample(values):
    found = solve_int(values, ENVS)
    assert found is None or [found(env) for env in ENVS] == values


def test_nonsense_is_not_explained():
    assert solve_int([1, 5, 2], ENVS) is None
    assert solve_int([4, 4, 4], ENVS).text == "4"


def test_runs_of_axes():
    envs = [
        {"*B": (5,), "len_B": 1, "numel_B": 5, "H": 11},
        {"*B": (7, 13), "len_B": 2, "numel_B": 91, "H": 17},
    ]
    assert str(solve_sizes([[5, 11], [7, 13, 17]], envs)) == "(*B, H)"
    assert str(solve_sizes([[1, 5, 22], [1, 7, 13, 34]], envs)) == "(1, *B, 2 * H)"
    assert str(solve_sizes([[5, 11], [91, 17]], envs)) == "(numel_B, H)"
    assert str(solve_sizes([[0, 2, 1], [0, 1, 3, 2]], envs)) == "(range(*B), len_B + 1, len_B)"
    assert solve_sizes([[3, 11], [7, 13, 17]], envs) is None


@pytest.mark.parametrize(
    "form, text",
    [
        (lambda s: s, "s"),
        (lambda s: 1 / s, "1/s"),
        (lambda s: -s, "-s"),
        (lambda s: s * s, "s**2"),
        (math.sqrt, "sqrt(s)"),
        (lambda s: 1 / math.sqrt(s), "1/sqrt(s)"),
    ],
)
def test_scalars_and_what_derives_from_them(form, text):
    samples = [{"s": 0.37}, {"s": 1.93}]
    found = solve_scalar([form(x["s"]) for x in samples], samples, ENVS[:2])
    assert found is not None and found.text == text
    assert math.isclose(found.inverse(form(0.71)), 0.71)


def test_floats_that_follow_a_size():
    found = solve_scalar([env["D"] ** -0.5 for env in ENVS], [{}] * 3, ENVS)
    assert found is not None and found.text == "D ** -0.5"


def test_literals_are_compared_strictly():
    assert same_literal(2, 2.0) and same_literal((1, 2), [1, 2]) and same_literal(float("nan"), float("nan"))
    for a, b in ((True, 1), (0.0, -0.0), (1, None), ("a", "b"), (torch.float32, torch.float16), ((1,), (1, 2))):
        assert not same_literal(a, b)


def test_canonical_arguments_round_trip():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    for args, kwargs in (((x, x), {}), ((x, x), {"alpha": 2}), ((x, 1.5), {})):
        node = graph.call_function(aten.add.Tensor, args, kwargs)
        full = canonical(node)
        assert len(full) == 3 and full[2] == kwargs.get("alpha", 1)
        assert split(aten.add.Tensor, full) == (args, kwargs)
    node = graph.call_function(aten.mean.dim, (x, [-1]), {"keepdim": True})
    assert canonical(node) == (x, [-1], True, None)
    assert split(aten.mean.dim, canonical(node)) == ((x, [-1], True), {})
