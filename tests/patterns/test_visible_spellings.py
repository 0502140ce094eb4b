"""How people write causal, sliding and padding masks: what becomes a flag, what stays an operand, and what is near."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_visible import Proven
from torch import Tensor
from torch.nn import functional as F

from ascend_dynamo.patterns.attention.moderate import moderate

LOW = torch.finfo(torch.float32).min


def lines(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.arange(x.shape[0])[:, None], torch.arange(x.shape[1])


def tril(x: Tensor) -> Tensor:
    return torch.tril(torch.ones(x.shape[0], x.shape[1], dtype=torch.bool))


def tril_of_floats(x: Tensor) -> Tensor:
    return torch.tril(torch.ones(x.shape[0], x.shape[1])) == 1


def triu_of_minus_infinity(x: Tensor) -> Tensor:
    return torch.triu(torch.full((x.shape[0], x.shape[1]), -math.inf), 1)


def triu_hides(x: Tensor) -> Tensor:
    return torch.zeros(x.shape).masked_fill(torch.triu(torch.ones(x.shape, dtype=torch.bool), diagonal=1), LOW)


def compared(x: Tensor) -> Tensor:
    i, j = lines(x)
    return torch.where(j <= i, 0.0, LOW)


def filled(x: Tensor) -> Tensor:
    i, j = lines(x)
    return torch.zeros(x.shape).masked_fill(j > i, -math.inf)


def one_minus(x: Tensor) -> Tensor:
    return (1.0 - torch.tril(torch.ones(x.shape))) * LOW


def cumulated(x: Tensor) -> Tensor:
    i, j = torch.ones(x.shape[0]).long().cumsum(0), torch.ones(x.shape[1]).long().cumsum(0)
    return j[None, :] <= i[:, None]


def by_difference(x: Tensor) -> Tensor:
    i, j = lines(x)
    return ~((i - j) < 0)


def flipped(x: Tensor) -> Tensor:
    i, j = lines(x)
    return i >= j


def anded_with_ones(x: Tensor) -> Tensor:
    i, j = lines(x)
    return x.new_ones((), dtype=torch.bool) & (j <= i) & torch.ones(x.shape, dtype=torch.bool)


def int32(x: Tensor) -> Tensor:
    i, j = (t.int() for t in lines(x))
    return j < i + 1


TOP_LEFT = (tril, tril_of_floats, triu_of_minus_infinity, triu_hides, compared, filled, one_minus, cumulated,
            by_difference, flipped, anded_with_ones, int32)  # fmt: skip


@pytest.mark.parametrize("symbolic", [False, True], ids=["static", "symbolic"])
@pytest.mark.parametrize("sizes", [(5, 5), (12, 12), (9, 14), (14, 9)], ids=str)
@pytest.mark.parametrize("fn", TOP_LEFT, ids=lambda f: f.__name__)
def test_causal(fn, sizes, symbolic):
    p = Proven(fn, (torch.zeros(sizes),), symbolic)
    assert (p.seen.causal, p.seen.window, p.seen.masks, p.seen.biases) == ("top_left", -1, (), ())
    assert p.seen.moot and not p.seen.why
    p.check((torch.zeros(sizes),))


def shifted_rows(x: Tensor) -> Tensor:
    past = x.shape[1] - x.shape[0]
    return torch.arange(x.shape[1])[None, :] <= torch.arange(past, x.shape[1])[:, None]


def added_past(x: Tensor) -> Tensor:
    i, j = lines(x)
    return torch.where(j <= i + (x.shape[1] - x.shape[0]), 0.0, LOW)


def cached(x: Tensor) -> Tensor:
    sq, sk = x.shape
    c = torch.arange(sq)
    new = torch.full((sq, sq), LOW).masked_fill(c < (c + 1).view(sq, 1), 0.0)
    return torch.cat([torch.zeros(sq, sk - sq), new], dim=-1)


def tril_of_past(x: Tensor) -> Tensor:
    return torch.tril(torch.ones(x.shape, dtype=torch.bool), diagonal=x.shape[1] - x.shape[0])


def last_rows(x: Tensor) -> Tensor:
    sq, sk = x.shape
    return torch.tril(torch.ones(sk, sk, dtype=torch.bool))[sk - sq :, :]


@pytest.mark.parametrize("symbolic", [False, True], ids=["static", "symbolic"])
@pytest.mark.parametrize("sizes", [(3, 5), (9, 14)], ids=str)
@pytest.mark.parametrize("fn", [shifted_rows, added_past, cached, tril_of_past, last_rows], ids=lambda f: f.__name__)
def test_causal_behind_a_cache(fn, sizes, symbolic):
    p = Proven(fn, (torch.zeros(sizes),), symbolic)
    if p.seen.causal == "none" and symbolic:  # Sq <= Sk is not known: rows may be empty, which a finite fill makes mean
        assert fn in (added_past,) and p.seen.biases
        return
    assert (p.seen.causal, p.seen.window, p.seen.masks, p.seen.biases) == ("bottom_right", -1, (), ())
    p.check((torch.zeros(sizes),))


def padded_left(x: Tensor) -> Tensor:
    sq, sk = x.shape
    return F.pad(torch.tril(torch.ones(sq, sq, dtype=torch.bool)), (sk - sq, 0), value=True)


def test_a_padded_triangle():
    p = Proven(padded_left, (torch.zeros(9, 14),))
    assert p.seen.causal == "bottom_right" and not p.seen.masks


def window(x: Tensor) -> Tensor:
    i, j = lines(x)
    return (j <= i) & (j > i - 4)


def window_by_triangles(x: Tensor) -> Tensor:
    ones = torch.ones(x.shape)
    return (torch.tril(ones) * torch.triu(ones, diagonal=-3)) != 0


def window_hidden(x: Tensor) -> Tensor:
    i, j = lines(x)
    return torch.zeros(x.shape).masked_fill((j > i) | (i - j >= 4), -math.inf)


def window_in_two_steps(x: Tensor) -> Tensor:
    i, j = lines(x)
    return torch.zeros(x.shape).masked_fill(j > i, LOW).masked_fill(j <= i - 4, LOW)


@pytest.mark.parametrize("sizes", [(7, 7), (12, 12)], ids=str)
@pytest.mark.parametrize(
    "fn", [window, window_by_triangles, window_hidden, window_in_two_steps], ids=lambda f: f.__name__
)
def test_sliding_windows(fn, sizes):
    p = Proven(fn, (torch.zeros(sizes),))
    assert (p.seen.causal, p.seen.window, p.seen.masks, p.seen.biases) == ("top_left", 4, (), ())
    p.check((torch.zeros(sizes),))
    seen = Proven(fn, (torch.zeros(4, 4),)).seen  # a window that no query reaches
    assert (seen.causal, seen.window) == ("top_left", -1)


def test_one_query_sees_every_key_of_its_cache():
    seen = Proven(added_past, (torch.zeros(1, 40),)).seen
    assert (seen.causal, seen.masks, seen.biases) == ("none", (), ())


def test_the_window_of_one_query():
    def fn(x: Tensor) -> Tensor:
        j = torch.arange(x.shape[1])
        last = x.shape[1] - 1
        return ((j <= last) & (j > last - 8))[None, :]

    p = Proven(fn, (torch.zeros(1, 40),))
    assert (p.seen.causal, p.seen.window, p.seen.masks) == ("bottom_right", 8, ())
    p.check((torch.zeros(1, 40),))


def chunks(x: Tensor) -> Tensor:
    i, j = lines(x)
    return (j // 16 == i // 16) & (j <= i)


def test_chunks_are_causal_as_long_as_there_is_one():
    assert (Proven(chunks, (torch.zeros(16, 16),)).seen.causal, Proven(chunks, (torch.zeros(9, 9),)).seen.masks) == (
        "top_left",
        (),
    )
    seen = Proven(chunks, (torch.zeros(17, 17),)).seen
    assert seen.causal == "top_left" and len(seen.masks) == 1 and "chunks of 16" in seen.why[0]


def padding(x: Tensor, given: Tensor) -> Tensor:
    i, j = lines(x)
    return (j <= i) & given.bool()[:, None, None, :]


def gathered_padding(x: Tensor, given: Tensor) -> Tensor:
    i, j = lines(x)
    keep = given.bool()[torch.arange(given.shape[0])[:, None, None, None], j[None, None, None, :]]
    return torch.where((j <= i) & keep, 0.0, LOW)


@pytest.mark.parametrize("symbolic", [False, True], ids=["static", "symbolic"])
@pytest.mark.parametrize("fn", [padding, gathered_padding], ids=lambda f: f.__name__)
def test_padding_stays_and_is_small(fn, symbolic):
    args = (torch.zeros(12, 12), torch.tensor([[0] * 4 + [1] * 8, [1] * 12]))
    p = Proven(fn, args, symbolic)
    assert p.seen.causal == "top_left" and p.seen.biases == () and "the values of %" in p.seen.why[0]
    (mask,) = p.seen.masks
    assert p.facts.val(mask.node).shape[-2] == 1 and p.facts.val(mask.node).dtype == torch.bool
    assert p.seen.empty_row == ("nan" if fn is padding else "uniform")
    p.check(args)


def test_a_cache_of_a_length_held_in_a_tensor():
    def fn(x: Tensor, n: Tensor) -> Tensor:
        i, j = lines(x)
        return j <= i + n

    for rows in (1, 3):
        seen = Proven(fn, (torch.zeros(rows, 40), torch.tensor(7))).seen
        assert seen.causal == "none" and len(seen.masks) == 1
        (length,) = seen.lengths
        assert length.node.op == "placeholder" and length.offset == 0


def packed(x: Tensor, position: Tensor) -> Tensor:
    first = torch.diff(position, prepend=position[:, :1] - 1, dim=-1) != 1
    sequence = first.cumsum(-1)
    i, j = lines(x)
    return (sequence[:, None, :, None] == sequence[:, None, None, :]) & (j <= i)


def test_packed_sequences_stay_and_plain_positions_do_not():
    args = (torch.zeros(12, 12), torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7]]))
    p = Proven(packed, args)
    assert p.seen.causal == "top_left" and len(p.seen.masks) == 1
    p.check(args)
    plain = Proven(lambda x: packed(x, torch.arange(x.shape[0])[None]), args[:1], True)
    assert plain.seen.causal == "top_left" and plain.seen.masks == ()


NEAR: dict[str, Callable[[Tensor], Tensor]] = {
    "strictly below": lambda x: lines(x)[1] < lines(x)[0],
    "one above": lambda x: lines(x)[1] <= lines(x)[0] + 1,
    "the wrong diagonal": lambda x: torch.tril(torch.ones(x.shape, dtype=torch.bool), 1),
    "a flipped triangle": lambda x: torch.tril(torch.ones(x.shape, dtype=torch.bool)).flip(0),
    "rows that end too early": lambda x: torch.triu(torch.full(x.shape, -math.inf), 0),
    "twice a triangle": lambda x: torch.tril(torch.ones(x.shape)) * 2,
    "a triangle of ones": lambda x: torch.tril(torch.ones(x.shape)),
    "half of the mask": lambda x: torch.where(lines(x)[1] <= lines(x)[0], 0.0, -1e4),
    "rows with a stride": lambda x: lines(x)[1] <= lines(x)[0] * 2,
    "every second key": lambda x: (lines(x)[1] <= lines(x)[0]) & (lines(x)[1] % 2 == 0),
    "or the first key": lambda x: (lines(x)[1] <= lines(x)[0]) | (lines(x)[1] == lines(x)[1].amax()),
    "not quite": lambda x: (lines(x)[1] <= lines(x)[0]) ^ (lines(x)[1] == 3),
    "rows modulo": lambda x: lines(x)[1] <= lines(x)[0] % 4,
    "rows are cut off": lambda x: lines(x)[1] <= torch.minimum(lines(x)[0], torch.tensor(4)),
    "a hole": lambda x: (lines(x)[1] <= lines(x)[0]) & (lines(x)[1] != 2),
}


@pytest.mark.parametrize("sizes", [(6, 6), (12, 12), (9, 12)], ids=str)
@pytest.mark.parametrize("name", NEAR)
def test_near_causal_masks_stay(name, sizes):
    p = Proven(NEAR[name], (torch.zeros(sizes),))
    assert p.seen.masks or p.seen.biases, p.seen
    assert p.seen.why, "a mask that stays says why"
    p.check((torch.zeros(sizes),))


UPPER = {
    "from the diagonal on": lambda x: lines(x)[0] <= lines(x)[1],
    "a transposed triangle": lambda x: torch.tril(torch.ones(x.shape[1], x.shape[0], dtype=torch.bool)).mT,
}


@pytest.mark.parametrize("sizes", [(6, 6), (12, 12), (9, 12)], ids=str)
@pytest.mark.parametrize("name", UPPER)
def test_the_upper_triangle_is_a_window_that_looks_ahead(name, sizes):
    p = Proven(UPPER[name], (torch.zeros(sizes),))
    assert (p.seen.causal, p.seen.window, p.seen.masks) == ("none", 1, ())
    p.check((torch.zeros(sizes),))


@pytest.mark.parametrize("off", [-1, 1])
def test_windows_one_off_are_other_windows(off):
    def fn(x: Tensor) -> Tensor:
        i, j = lines(x)
        return (j <= i) & (j > i - 4 + off)

    assert Proven(fn, (torch.zeros(12, 12),)).seen.window == 4 - off


def test_a_triangle_over_other_axes():
    def fn(x: Tensor) -> Tensor:  # batch and keys
        return torch.tril(torch.ones(x.shape[0], x.shape[1], dtype=torch.bool))[:, None, None, :].expand(-1, 1, 6, -1)

    p = Proven(fn, (torch.zeros(6, 6),))
    assert p.seen.causal == "none" and len(p.seen.masks) == 1
    p.check((torch.zeros(6, 6),))


def several(x: Tensor, given: Tensor) -> Tensor:
    i, j = lines(x)
    return torch.where(j <= i, 0.0, LOW) + torch.where(given.bool()[:, None, None, :], 0.0, LOW)


def test_two_finite_masks_may_hide_a_key_twice():
    args: Any = (torch.zeros(12, 12), torch.tensor([[0] * 4 + [1] * 8]))
    p = Proven(several, args)
    assert p.seen.causal == "none" and len(p.seen.biases) == 1
    p.check(args)


def test_a_buffer_may_be_a_mask_and_an_embedding_is_none():
    def embedded(table: Tensor, x: Tensor) -> Tensor:
        i, j = lines(x)
        return F.embedding((j - i).abs(), table).permute(2, 0, 1)[None]

    p = Proven(embedded, (torch.randn(16, 3), torch.zeros(12, 12)))
    p.facts.params = frozenset((p.unit.gm.graph.find_nodes(op="placeholder")[0].name,))
    assert moderate(p.facts, p.out)
    p = Proven(lambda buffer: buffer[:12, :12] * 1.0, (torch.full((16, 16), -math.inf),))
    p.facts.params = frozenset(n.name for n in p.unit.gm.graph.find_nodes(op="placeholder"))
    assert not moderate(p.facts, p.out)
