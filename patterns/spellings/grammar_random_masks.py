"""Random masks: formulas over the positions of queries and keys, from bounds that can be read to anything at all.

What a proof may get wrong is an offset by one, a strict comparison, a window on the wrong side, a row without a key.
"""

from __future__ import annotations

import random

from .grammar_source import Writer

_QUERIES = (
    "torch.arange(s)[:, None]",
    "torch.arange(s).view(-1, 1)",
    "torch.arange(t - s, t)[:, None]",
    "(torch.arange(s) + (t - s)).unsqueeze(-1)",
)
_KEYS = ("torch.arange(t)[None, :]", "torch.arange(t)", "torch.arange(t).unsqueeze(0)", "torch.arange(0, t, 1)")
_ORDERS = ("<", "<=", ">", ">=")
_METHODS = {"<": "lt", "<=": "le", ">": "gt", ">=": "ge", "==": "eq", "!=": "ne"}


def random_bounds(w: Writer) -> None:
    """One to three bounds of key by query, all of which hold."""
    w.set("keep", " & ".join(_bound(w.rng) for _ in range(w.rng.choice([1, 1, 2, 2, 3]))), "st")


def random_blocks(w: Writer) -> None:
    """Blocks of positions, alone or with a bound."""
    terms = [_block(w.rng), *(_bound(w.rng) for _ in range(w.rng.choice([0, 1, 1])))]
    w.rng.shuffle(terms)
    w.set("keep", " & ".join(terms), "st")


def random_formula(w: Writer) -> None:
    """Bounds, blocks and single axes under and, or, xor, not."""
    w.set("keep", f"torch.broadcast_to({_formula(w.rng, 2)}, (s, t))", "st")


def _bound(rng: random.Random) -> str:
    i, j, c = rng.choice(_QUERIES), rng.choice(_KEYS), rng.choice([-2, -1, 0, 0, 1, 2, 3])
    order = rng.choice(_ORDERS)
    ones = "torch.ones(s, t, dtype=torch.bool)"
    return rng.choice(
        (
            f"({j} {order} {i} + {c})",
            f"({i} - {c} {order} {j})",
            f"({i} - {j} {order} {c})",
            f"({j} - {i}).{_METHODS[order]}({c})",
            f"torch.{_METHODS[order]}({j} + {abs(c)}, {i})",
            f"(({i} - {j}).abs() {order} {abs(c)})",
            f"(-{j} {order} {c} - {i})",
            f"(2 * {i} {order} 2 * {j} + {c})",
            f"({i} - {j}).clamp(min={c}).{_METHODS[order]}({abs(c)})",
            f"{ones}.tril({c})",
            f"{ones}.triu({c})",
            f"~{ones}.tril(t - s + {c})",
            f"torch.triu({ones}, diagonal=t - s + {c})",
            f"({ones}.int().triu({c}) == 0)",
            f"(torch.ones(s, t).cumsum(-1) {order} torch.ones(s, t).cumsum(0) + {c})",
        )
    )


def _block(rng: random.Random) -> str:
    i, j, n = rng.choice(_QUERIES), rng.choice(_KEYS), rng.choice([2, 3])
    order = rng.choice(("==", "<=", ">=", "!=", "<"))
    return rng.choice(
        (
            f"({i} // {n} {order} {j} // {n})",
            f"(torch.div({j}, {n}, rounding_mode='floor') {order} torch.div({i}, {n}, rounding_mode='floor'))",
            f"(({i} - {j}) % {n} {order} 1)",
            f"({i} % {n} {order} {j} % {n})",
        )
    )


def _formula(rng: random.Random, depth: int) -> str:
    if depth == 0 or rng.random() < 0.2:
        c, n = rng.randrange(4), rng.choice([2, 3])
        single = (
            f"({rng.choice(_KEYS)} < {c})",
            f"({rng.choice(_QUERIES)} % {n} != 0)",
            f"({rng.choice(_KEYS)} != {c})",
        )
        return rng.choice([_bound, _bound, _block, lambda r: r.choice(single)])(rng)
    a, b = _formula(rng, depth - 1), _formula(rng, depth - 1)
    return rng.choice(
        (
            f"({a} & {b})",
            f"({a} | {b})",
            f"({a} ^ {b})",
            f"torch.logical_and({a}, {b})",
            f"torch.logical_not({a})",
            f"(~{a} | {b})",
            f"torch.where({a}, {b}, {_formula(rng, 0)})",
            f"({a} == {b})",
        )
    )
