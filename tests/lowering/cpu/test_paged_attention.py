"""ascend_cpu.paged_attention and mla_attention against plain softmax over dense keys in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cpu_support import ops
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_support import build, examples

PATHS = ("", "_portable")
SIZES = st.sampled_from([1, 2, 3, 5, 8, 16, 32, 100, 128, 256])
HEADS = st.sampled_from([(1, 1), (4, 4), (4, 2), (8, 1), (6, 2), (12, 1)])
DIMS = st.sampled_from([(64, 64), (80, 80), (128, 128), (192, 128), (256, 256), (7, 5), (33, 40)])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
CACHES = st.sampled_from([None, None, torch.int8, torch.float32, torch.bfloat16, torch.float16])
QUERIES = st.one_of(st.integers(0, 3), st.sampled_from([1, 1, 1, 17, 60]))
KEYS = st.one_of(st.integers(0, 40), st.sampled_from([127, 128, 129, 513, 700]))


@st.composite
def sequences(draw: st.DrawFn) -> list[tuple[int, int]]:
    """Prompts, chunks of prompts, single steps, and sequences without queries or keys."""
    found = []
    for _ in range(draw(st.integers(1, 4))):
        queries, keys = draw(QUERIES), draw(KEYS)
        found.append((queries, max(queries, keys) if draw(st.integers(0, 9)) else keys))
    return found


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=examples(35))
@given(
    sequences(),
    SIZES,
    HEADS,
    DIMS,
    DTYPES,
    CACHES,
    st.fixed_dictionaries(
        {},
        optional={
            "causal": st.just(False),
            "window": st.sampled_from([0, 1, 5, 100]),
            "softcap": st.just(5.0),
            "sinks": st.just(True),
            "masked": st.just(True),
            "holes": st.just(True),
            "shared": st.just(True),
            "padding": st.integers(1, 3),
        },
    ),
    st.integers(0, 1000),
)
def test_any_batch(path, lengths, size, heads, dims, dtype, cache_dtype, options, seed):
    case = build(seed, lengths, size=size, heads=heads, dims=dims, dtype=dtype, cache_dtype=cache_dtype, **options)
    case.check(getattr(ops, f"paged_attention{path}"))


@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=examples(15))
@given(
    sequences(),
    SIZES,
    st.sampled_from([1, 3, 16, 60]),
    st.sampled_from([(512, 64), (40, 16), (24, 7)]),
    DTYPES,
    st.sampled_from([None, None, torch.float16, torch.bfloat16]),
    st.fixed_dictionaries(
        {},
        optional={
            "causal": st.just(False),
            "masked": st.just(True),
            "holes": st.just(True),
            "shared": st.just(True),
            "padding": st.integers(1, 3),
        },
    ),
    st.integers(0, 1000),
)
def test_any_batch_on_latents(path, lengths, size, heads, dims, dtype, cache_dtype, options, seed):
    kinds = {"heads": (heads, 1), "dims": dims, "dtype": dtype, "cache_dtype": cache_dtype, "latent": True}
    build(seed, lengths, size=size, **kinds, **options).check(getattr(ops, f"mla_attention{path}"))


@pytest.mark.parametrize("size", [1, 256])
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
def test_long_decode_steps_and_a_prompt(size: int, cache_dtype: torch.dtype) -> None:
    dtype = torch.bfloat16 if cache_dtype is torch.int8 else cache_dtype
    kinds = {"heads": (8, 2), "dims": (128, 128), "dtype": dtype, "cache_dtype": cache_dtype}
    build(0, [(1, 2100), (150, 150), (1, 513), (40, 700), (0, 5)], size=size, padding=2, **kinds).check()


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        ({"window": 20}, {"window": 21}),
        ({"window": 20}, {"window": -1}),
        ({}, {"causal": False}),
        ({"masked": True}, {"mask": None}),
        ({"sinks": True}, {"sinks": None}),
        ({"softcap": 2.0}, {"softcap": 0.0}),
        ({}, {"scale": 0.126}),
        ({"holes": True}, {}),
        ({"cache_dtype": torch.int8}, {"v_scale": torch.tensor(0.02)}),
    ],
)
def test_the_budget_tells_what_is_nearly_right(options, wrong) -> None:  # type: ignore[no-untyped-def]
    case = build(10, [(30, 90), (1, 70)], size=8, dtype=torch.float32, **options)
    case.check()

    def near(*args: torch.Tensor, **given: Any) -> torch.Tensor:
        if "holes" in options:  # zeros of a page are keys too: not hidden
            seen = (args[3] >= 0).repeat_interleave(8, 1)
            given["mask"] = seen[(torch.arange(31) >= 30).int()]
        given |= {k: v.expand_as(given[k]) if isinstance(v, torch.Tensor) else v for k, v in wrong.items()}
        return ops.paged_attention(*args, **given)

    with pytest.raises(AssertionError, match="elements; worst"):
        case.check(near)


def threads(run):  # type: ignore[no-untyped-def]
    before, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(run())
    finally:
        torch.set_num_threads(before)
    return found


@pytest.mark.parametrize("latent", [False, True])
@pytest.mark.parametrize("cache_dtype", [None, torch.int8])
def test_same_bits_for_any_number_of_threads(cache_dtype: torch.dtype | None, latent: bool) -> None:
    kinds = {"heads": (16, 1), "dims": (64, 16)} if latent else {"cache_dtype": cache_dtype}
    case = build(1, [(1, 1500), (90, 200), (3, 700)], size=16, latent=latent, masked=True, **kinds)
    alone, *others = threads(case)
    assert all(torch.equal(alone, other) for other in others)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("queries", [1, 2, 70])
def test_one_sequence_has_the_bits_of_contiguous_attention(queries: int, dtype: torch.dtype) -> None:
    case = build(2, [(queries, 1100)], size=16, dims=(128, 128), dtype=dtype)
    k, v = (cache[case.table[0, :69]].flatten(0, 1)[:1100].transpose(0, 1).unsqueeze(0) for cache in case.caches)
    q = case.q.transpose(0, 1).unsqueeze(0)
    wanted = ops.flash_attention(q, k, v, scale=case.options["scale"], causal="bottom_right", empty_row="zero")
    assert torch.equal(case(), wanted[0].transpose(0, 1))


@pytest.mark.parametrize("queries", [1, 30])
@pytest.mark.parametrize("size", [1, 16, 64])
def test_pages_before_the_window_may_be_gone(queries: int, size: int) -> None:
    """Their entries may be stale or no block at all, and what they hold must not matter."""
    case = build(3, [(queries, 600), (queries, 90)], size=size, window=50)
    clean = case.check()
    for b, keys in enumerate((600, 90)):
        first = max(0, keys - queries + 1 - 50)
        case.table[b, : first // size] = 2**31 - 1
        if first > 0:
            for cache in case.caches:
                cache[int(case.table[b, first // size]), : first % size] = math.nan
    for path in PATHS:
        got = case(getattr(ops, f"paged_attention{path}"))
        torch.testing.assert_close(got, clean, rtol=2e-2, atol=2e-2)
    assert torch.equal(case(), clean)


@pytest.mark.parametrize("queries", [1, 30])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_any_strides_give_the_same_bits(queries: int, dtype: torch.dtype) -> None:
    """StaticCache's [B, Hk, S, D] seen as pages, slices of a stack of layers, pages with gaps."""
    case = build(4, [(queries, 200), (1, 70)], size=8, dtype=dtype)
    expected, caches = case(), case.caches

    def layouts(x: torch.Tensor) -> list[torch.Tensor]:
        padded = torch.full((x.shape[0] + 1, x.shape[1] + 2, x.shape[2], x.shape[3] + 5), math.nan, dtype=x.dtype)
        padded[1:, 2:, :, 3:-2] = x
        return [
            x.transpose(1, 2).contiguous().transpose(1, 2),
            torch.stack((x.new_full((), math.nan).expand_as(x), x))[1],
            padded[1:, 2:, :, 3:-2],
            x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
        ]

    for i, each in enumerate(zip(*map(layouts, caches), strict=True)):
        case.caches = each
        if i < 3:
            assert torch.equal(case(), expected), i
        else:
            case.check()
    case.caches, case.q = caches, case.q.transpose(0, 2).contiguous().transpose(0, 2)
    assert torch.equal(case(), expected)
    case.table, case.starts, case.lengths = case.table.long(), case.starts.long(), case.lengths.long()
    assert torch.equal(case(), expected)


def test_a_static_cache_is_one_page_a_sequence() -> None:
    g = torch.Generator().manual_seed(5)
    k, v = (torch.randn(3, 2, 50, 64, generator=g).bfloat16() for _ in range(2))
    q, lengths = torch.randn(3, 4, 1, 64, generator=g).bfloat16(), torch.tensor([7, 50, 1], dtype=torch.int32)
    pages = tuple(x.transpose(1, 2) for x in (k, v))
    table, starts = torch.arange(3, dtype=torch.int32).unsqueeze(1), torch.arange(4, dtype=torch.int32)
    got = ops.paged_attention(q.squeeze(2), *pages, table, starts, lengths, scale=0.125)
    for b, length in enumerate(lengths.tolist()):
        near = (q[b : b + 1], k[b : b + 1, :, :length], v[b : b + 1, :, :length])
        assert torch.equal(got[b], ops.flash_attention(*near, scale=0.125)[0, :, 0])


def test_a_poisoned_sequence_stays_alone() -> None:
    case = build(6, [(1, 70), (20, 90), (1, 40)], size=16)
    clean = case()
    case.caches[0][int(case.table[1, 0]), 3] = math.nan
    got = case()
    assert torch.equal(got[:1], clean[:1]) and torch.equal(got[21:], clean[21:]) and bool(got[1:21].isnan().all())


def test_nothing_to_do() -> None:
    for lengths in ([], [(0, 0)], [(0, 30), (2, 0)]):
        case = build(7, lengths, size=4, padding=2)
        for path in PATHS:
            assert not case(getattr(ops, f"paged_attention{path}")).any()
    case = build(7, [(1, 3)], size=4)
    assert case(lambda q, *rest, **kw: ops.paged_attention(q[:0], *rest[:3], rest[3] * 0, rest[4], **kw)).shape[0] == 0


@pytest.mark.parametrize("name", ["paged_attention", "mla_attention"])
@pytest.mark.parametrize("path", PATHS)
def test_mistakes_are_named(name: str, path: str) -> None:
    latent = name == "mla_attention"
    kinds = {"heads": (4, 1), "dims": (32, 8), "latent": True} if latent else {}
    case = build(8, [(3, 3), (1, 9)], size=4, **kinds)
    op, table, blocks = getattr(ops, name + path), case.table.clone(), case.caches[0].shape[0]
    case.table[1, 2] = blocks
    with pytest.raises(IndexError, match=rf"block_table\[1, 2\] is {blocks}, but the cache has {blocks} blocks"):
        case(op)
    case.table = table
    for field, value, message in (
        ("starts", case.starts.flip(0), "q_start .* must ascend within"),
        ("starts", case.starts + 1, "q_start .* must ascend within"),
        ("starts", case.starts[1:], "one entry more than sequences"),
        ("lengths", case.lengths + 90, r"kv_len\[0\] is 93, but the block table holds 20 keys"),
        ("lengths", case.lengths - 4, r"kv_len\[0\] is -1"),
        ("options", {**case.options, "mask": torch.ones(4, 8, dtype=torch.bool)}, "mask has 8 keys"),
        ("options", {**case.options, "mask": torch.ones(4, 9)}, "mask must be bool"),
        ("q", case.q[..., :-1], "must be"),
        ("table", table[0], "block_table must be"),
    ):
        before = getattr(case, field)
        setattr(case, field, value)
        with pytest.raises(ValueError, match=message):
            case(op)
        setattr(case, field, before)
    if not latent:
        with pytest.raises(ValueError, match="BFloat16 with scales"):
            ops.paged_attention(case.q, *case.caches, table, case.starts, case.lengths, scale=1.0, k_scale=table)
        int8 = [cache.to(torch.int8) for cache in case.caches]
        with pytest.raises(ValueError, match="Char with no scales"):
            ops.paged_attention(case.q, *int8, table, case.starts, case.lengths, scale=1.0)


def test_schema_and_fake() -> None:
    int8 = {"dtype": torch.float16, "cache_dtype": torch.int8}
    for kinds in ({}, {"masked": True, "sinks": True}, int8, {"latent": True, "heads": (4, 1), "dims": (32, 8)}):
        case = build(9, [(3, 5), (1, 9)], size=4, **kinds)
        args = (*case.queries, *case.caches, case.table, case.starts, case.lengths)
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(getattr(ops, case.name).default, args, case.options, test_utils=checks)
