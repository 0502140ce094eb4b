"""Pages through the compiler on the CPU: kernels take the operators' places, and writes stay in place."""

from __future__ import annotations

import pytest
import torch
from torch.utils import _pytree as pytree

import ascend_dynamo
from ascend_dynamo.capture import trace
from ascend_dynamo.lowering.cpu import CpuLowering, kernels
from ascend_dynamo.normalize import normalize
from ascend_dynamo.options import Options
from ascend_dynamo.passes.pipeline import Lower
from ascend_dynamo.report.records import CompileRecord

ascend = torch.ops.ascend
HEADS, DIM = 2, 16


def arguments(dtype: torch.dtype, cache_dtype: torch.dtype | None = None, tokens: int = 3) -> tuple[torch.Tensor, ...]:
    """q, k, v, two caches, slots, table, q_start, kv_len and, for int8 caches, their scales: one sequence."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(tokens, 2 * HEADS, DIM, generator=g).to(dtype)
    k, v = (torch.randn(tokens, HEADS, DIM, generator=g).to(dtype) for _ in range(2))
    caches = [(torch.randn(4, 4, HEADS, DIM, generator=g) * 9).to(cache_dtype or dtype) for _ in range(2)]
    table = torch.tensor([[2, 0, 3, -1]], dtype=torch.int32)
    length = 5 + tokens
    slots = torch.tensor([int(table[0, j // 4]) * 4 + j % 4 for j in range(5, length)])
    ends = torch.tensor([0, tokens], dtype=torch.int32), torch.tensor([length], dtype=torch.int32)
    scales = [torch.rand(4, 4, HEADS, generator=g) * 0.01 for _ in range(2)] if cache_dtype is torch.int8 else []
    return (q, k, v, *caches, slots, table, *ends, *scales)


def step(q, k, v, k_cache, v_cache, slots, table, starts, lengths, *scales):  # type: ignore[no-untyped-def]
    named = dict(zip(("k_scale", "v_scale"), scales, strict=False))
    ascend.kv_write(k * 2, v + 1, k_cache, v_cache, slots, **named)
    return ascend.paged_attention(q, k_cache, v_cache, table, starts, lengths, scale=0.25, **named) * 3


def latent(q, k, v, k_cache, v_cache, slots, table, starts, lengths):  # type: ignore[no-untyped-def]
    latents, rope = k_cache[:, :, 0], v_cache[:, :, 0]
    ascend.mla_kv_write(k[:, 0] * 2, v[:, 0], latents, rope, slots)
    return ascend.mla_attention(q, q + 1, latents, rope, table, starts, lengths, scale=0.25) * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_attention_over_pages_becomes_a_kernel(dtype: torch.dtype) -> None:
    args = arguments(dtype)
    q, (k_cache, v_cache, _, table, starts, lengths) = args[0], args[3:]
    for call, name in (
        (lambda q: ascend.paged_attention(q, k_cache, v_cache, table, starts, lengths, scale=0.25), "paged_attention"),
        (
            lambda q: ascend.mla_attention(
                q, q, k_cache[:, :, 0], v_cache[:, :, 0], table, starts, lengths, scale=0.25
            ),
            "mla_attention",
        ),
    ):
        unit, record = trace(call, (q,)), CompileRecord()
        normalize(unit)
        Lower(CpuLowering(), record).run(unit, Options())
        assert [(e.op.split(".")[1], e.path) for e in record.lowered if "attention" in e.op] == [(name, "kernel")]
        unit.gm.recompile()
        torch.testing.assert_close(unit.gm(q)[0], call(q), rtol=2e-2, atol=2e-2)


def test_float64_keeps_the_reference() -> None:
    args = arguments(torch.float64)
    unit, record = (
        trace(lambda q: ascend.paged_attention(q, *args[3:5], *args[6:], scale=0.25), args[:1]),
        CompileRecord(),
    )
    normalize(unit)
    Lower(CpuLowering(), record).run(unit, Options())
    assert [(e.path, "float64" in e.reason) for e in record.lowered] == [("reference", True)]


def compiled(fn, args, **how):  # type: ignore[no-untyped-def]
    """The result and the arguments afterwards, compiled for the CPU, beside those of eager mode; the backend."""
    kernels.load()
    backend = ascend_dynamo.Backend({"target": "cpu"})
    run = torch.compile(fn, backend=backend, fullgraph=True, **how)
    eager, ours = (pytree.tree_map(torch.clone, args) for _ in range(2))
    with torch.no_grad():
        wanted, got = fn(*eager), run(*ours)
    return (wanted, eager), (got, ours), backend, run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fn", "dtype", "cache_dtype"),
    [(step, torch.bfloat16, None), (step, torch.float32, torch.int8), (latent, torch.float32, None)],
)
def test_a_step_writes_in_place_and_attends(fn, dtype, cache_dtype) -> None:  # type: ignore[no-untyped-def]
    args = arguments(dtype, cache_dtype)
    before = [t.data_ptr() for t in args]
    (wanted, eager), (got, ours), backend, _ = compiled(fn, args)
    torch.testing.assert_close(got, wanted, rtol=2e-2, atol=2e-2)
    for a, b in zip(eager, ours, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert before == [t.data_ptr() for t in args]
    (record,) = backend.records
    assert {e.op.split(".")[1]: e.path for e in record.lowered if "kv" in e.op or "attention" in e.op} == (
        {"kv_write": "kernel", "paged_attention": "kernel"}
        if fn is step
        else {"mla_kv_write": "kernel", "mla_attention": "kernel"}
    )
    assert not record.kv_copies, record.kv_copies


@pytest.mark.slow
def test_the_generated_code_clones_no_cache() -> None:
    from torch._inductor.utils import run_and_get_code

    args = arguments(torch.bfloat16)
    kernels.load()
    run = torch.compile(step, backend=ascend_dynamo.Backend({"target": "cpu"}), fullgraph=True)
    with torch.no_grad():
        _, sources = run_and_get_code(run, *args)
    code = "\n".join(sources)
    assert "ascend_cpu.kv_write" in code and "ascend_cpu.paged_attention" in code
    caches = [line for line in code.splitlines() if "(4, 4, 2, 16)" in line and "empty" in line]
    assert not caches, caches


@pytest.mark.slow
def test_one_graph_for_any_number_of_tokens() -> None:
    _, _, backend, run = compiled(step, arguments(torch.float32, tokens=3), dynamic=True)
    for tokens in (2, 5, 6):
        args = arguments(torch.float32, tokens=tokens)
        with torch.no_grad():
            torch.testing.assert_close(run(*pytree.tree_map(torch.clone, args)), step(*args), rtol=1e-5, atol=1e-4)
    assert len(backend.records) == 1


@pytest.mark.parametrize("computed", [False, True])
def test_pages_that_are_made_alike_do_not_become_one(computed: bool) -> None:
    """Four equal allocations of one call: Inductor merges equal copies, and must not see any here."""

    def fresh(k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> tuple[torch.Tensor, ...]:
        start = k[0, 0, 0]
        pages = [torch.zeros(4, 2, HEADS, DIM) + start if computed else torch.zeros(4, 2, HEADS, DIM) for _ in range(4)]
        ascend.kv_write(k, v, pages[0], pages[1], slots)
        ascend.kv_write(v + 1, k + 1, pages[2], pages[3], slots)
        return tuple(pages)

    _, k, v, *_ = arguments(torch.float32)
    slots = torch.tensor([5, 0, 3])
    compiled = torch.compile(fresh, backend=ascend_dynamo.Backend({"target": "cpu"}), fullgraph=True)
    found = compiled(k, v, slots)
    assert len({pages.data_ptr() for pages in found}) == 4
    for pages, expected in zip(found, fresh(k, v, slots), strict=True):
        assert torch.equal(pages, expected)
