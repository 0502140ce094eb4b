"""Random masks: expression trees over indices that hypothesis draws, and what they mean in torch.

A tree is a nested tuple; ``build`` evaluates it for inputs ``Inputs``. Whole numbers are tensors that broadcast to
[B, 1, Sq, Sk]. Most trees are no mask that anybody writes: what is proven of them must be true all the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

FILLS = (-math.inf, torch.finfo(torch.float32).min, torch.finfo(torch.bfloat16).min, -1e4)


@dataclass
class Inputs:
    """``scores`` [B, 1, Sq, Sk] gives the sizes; ``pad`` [B, Sk] int64 of 0 and 1; ``length`` [] int64; ``flags``
    [B, 1, Sq, Sk] bool; ``slope`` [1, 1, 1, Sk] float32."""

    scores: Tensor
    pad: Tensor
    length: Tensor
    flags: Tensor
    slope: Tensor

    @property
    def sizes(self) -> tuple[Any, Any, Any]:
        b, _, sq, sk = self.scores.shape
        return b, sq, sk

    def tensors(self) -> tuple[Tensor, ...]:
        return self.scores, self.pad, self.length, self.flags, self.slope


small = st.integers(-6, 6)
_ROWS = st.tuples(st.just("rows"), st.sampled_from(["arange", "aligned", "cumsum", "int32", "float", "gathered"]))
_COLUMNS = st.tuples(st.just("columns"), st.sampled_from(["arange", "cumsum", "int32", "float", "gathered", "flipped"]))
_LENGTH = st.just(("length",))


def _more_numbers(inner: Any) -> Any:
    return st.one_of(
        st.tuples(st.just("shift"), inner, small),
        st.tuples(st.just("times"), inner, st.sampled_from([-1, 0, 1, 2])),
        st.tuples(st.just("floor"), inner, st.sampled_from([1, 2, 3, 64])),
        st.tuples(st.just("mod"), inner, st.sampled_from([1, 2, 64])),
        st.tuples(st.just("abs"), inner),
        st.tuples(st.sampled_from(["plus", "minus", "smaller", "larger"]), inner, inner),
    )


numbers = st.recursive(st.one_of(_ROWS, _COLUMNS, _ROWS, _COLUMNS, _LENGTH), _more_numbers, max_leaves=3)
_COMPARED = st.tuples(st.sampled_from(["le", "lt", "ge", "gt", "eq", "ne"]), numbers, numbers)
_CAUSAL = st.tuples(st.sampled_from(["le", "lt"]), st.tuples(st.just("shift"), _COLUMNS, small), _ROWS)
_RECENT = st.tuples(st.sampled_from(["ge", "gt"]), _COLUMNS, st.tuples(st.just("shift"), _ROWS, small))
_TRIANGLE = st.tuples(
    st.sampled_from(["tril", "triu"]), st.sampled_from(["bool", "float", "int"]), st.integers(-2, 4), st.booleans()
)
_GIVEN = st.sampled_from([("pad",), ("flags",), ("true",), ("false",)])


def _more_masks(inner: Any) -> Any:
    return st.one_of(
        st.tuples(st.sampled_from(["and", "and", "or", "xor"]), inner, inner),
        st.tuples(st.just("not"), inner),
        st.tuples(st.just("choose"), inner, inner, inner),
        st.tuples(st.sampled_from(["cat_keys", "cat_queries", "padded", "sliced", "transposed", "twice"]), inner),
        st.tuples(st.just("number"), inner, st.sampled_from(["ne", "gt", "eq"]), st.sampled_from([0, 0.5, 1])),
    )


masks = st.recursive(st.one_of(_CAUSAL, _RECENT, _TRIANGLE, _COMPARED, _GIVEN), _more_masks, max_leaves=4)
fills = st.sampled_from(FILLS)
additive = st.recursive(
    st.one_of(
        st.tuples(st.just("where"), masks, fills),
        st.tuples(st.just("biased"), masks, fills),
        st.tuples(st.just("filled"), masks, fills),
        st.tuples(st.just("scaled"), masks, st.sampled_from(FILLS[1:])),
        st.tuples(st.just("triangle"), st.integers(-2, 3), fills),
        st.just(("slope",)),
        st.just(("zeros",)),
    ),
    lambda inner: st.one_of(
        st.tuples(st.just("sum"), inner, inner),
        st.tuples(st.just("refilled"), inner, masks, fills),
        st.tuples(st.just("half"), inner),
    ),
    max_leaves=2,
)


def build(tree: Any, i: Inputs) -> Tensor:
    """The tensor that a tree means."""
    kind, *args = tree
    b, sq, sk = i.sizes
    if kind in ("rows", "columns"):
        return _indices(kind, args[0], b, sq, sk)
    if kind in _BOOL or kind in _NUMBER:
        return (_BOOL | _NUMBER)[kind](*(build(a, i) if isinstance(a, tuple) else a for a in args))
    if kind in ("tril", "triu"):
        dtype, diagonal, bottom = args
        ones = torch.ones(sq, sk, dtype={"bool": torch.bool, "float": torch.float32, "int": torch.int64}[dtype])
        return getattr(torch, kind)(ones, diagonal + (sk - sq if bottom else 0)) != 0
    return _special(kind, args, i)


def _indices(kind: str, how: str, b: Any, sq: Any, sk: Any) -> Tensor:
    rows = kind == "rows"
    n = sq if rows else sk
    shape = (1, 1, n, 1) if rows else (1, 1, 1, n)
    if how == "aligned":
        return torch.arange(sk - sq, sk).reshape(shape)
    if how == "flipped":
        return torch.arange(n).flip(0).reshape(shape)
    if how == "cumsum":
        position = torch.ones(b, n, dtype=torch.int64).cumsum(-1) - 1
        return position[:, None, :, None] if rows else position[:, None, None, :]
    if how == "gathered":
        position = torch.arange(n).unsqueeze(0).expand(b, n)
        return position[torch.arange(b)[:, None, None, None], torch.arange(n).reshape(shape)]
    dtype = {"int32": torch.int32, "float": torch.float32}.get(how, torch.int64)
    return torch.arange(n, dtype=dtype).reshape(shape)


_NUMBER: dict[str, Any] = {
    "shift": lambda a, c: a + c,
    "times": lambda a, c: a * c,
    "floor": lambda a, c: a // c,
    "mod": lambda a, c: a % c,
    "abs": torch.abs,
    "plus": torch.add,
    "minus": torch.sub,
    "smaller": torch.minimum,
    "larger": torch.maximum,
}
_BOOL: dict[str, Any] = {
    "le": torch.le,
    "lt": torch.lt,
    "ge": torch.ge,
    "gt": torch.gt,
    "eq": torch.eq,
    "ne": torch.ne,
    "and": torch.logical_and,
    "or": torch.bitwise_or,
    "xor": torch.bitwise_xor,
    "not": torch.logical_not,
    "choose": torch.where,
}


def _special(kind: str, args: list[Any], i: Inputs) -> Tensor:
    b, sq, sk = i.sizes
    if kind == "length":
        return i.length
    if kind == "pad":
        return i.pad[:, None, None, :].bool()
    if kind == "flags":
        return i.flags
    if kind in ("true", "false"):
        return torch.full((1, 1, sq, sk), kind == "true")
    if kind == "slope":
        return i.slope
    if kind == "zeros":
        return torch.zeros(sq, sk)
    if kind == "triangle":
        return torch.triu(torch.full((sq, sk), args[1]), args[0])
    if kind == "sum":
        return build(args[0], i) + build(args[1], i)
    if kind == "half":
        return build(args[0], i) * 0.5
    if kind == "refilled":
        return build(args[0], i).masked_fill(build(args[1], i), args[2])
    m = build(args[0], i)
    if kind == "where":
        return torch.where(m, 0.0, args[1])
    if kind == "biased":
        return torch.where(m, i.slope, args[1])
    if kind == "filled":
        return torch.zeros(1, 1, 1, 1).expand(m.shape if m.dim() == 4 else (1, 1, sq, sk)).masked_fill(~m, args[1])
    if kind == "scaled":
        return (1.0 - m.float()) * args[1]
    if kind == "number":
        return getattr(torch, args[1])(m.float(), args[2])
    return _moved(kind, m.expand(b, 1, sq, sk), sq, sk)


def _moved(kind: str, m: Tensor, sq: Any, sk: Any) -> Tensor:
    """Masks put together from parts of others, [B, 1, Sq, Sk] each."""
    if kind == "cat_keys":
        return torch.cat([torch.ones_like(m[..., :1]), m], -1)[..., :-1]
    if kind == "cat_queries":
        return torch.cat([m[:, :, 1:], m[:, :, :1]], 2)
    if kind == "padded":
        return F.pad(m.float(), (0, 1), value=1.0)[..., 1:] > 0
    if kind == "sliced":
        return torch.cat([m, m], -1)[..., :sk]
    if kind == "twice":
        return m.float() * 2 > 1.5
    assert kind == "transposed"
    n = min(sq, sk) if isinstance(sq, int) and isinstance(sk, int) else None
    if n is None or sq != sk:
        return m
    return m.transpose(-1, -2)
