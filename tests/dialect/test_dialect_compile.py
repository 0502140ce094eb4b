"""The operators under torch.compile, autocast and autograd, and torch's own checks of a custom operator."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from dialect_cases import clone, every_spec, samples
from torch.utils import _pytree as pytree

from ascend_dynamo.dialect import SPECS
from ascend_dynamo.dialect.library import autocast_dtype

ops = torch.ops.ascend


@every_spec
def test_opcheck(spec):
    for sample in samples(spec)[:2]:
        args, kwargs = clone((sample.args, dict(sample.kwargs)))
        torch.library.opcheck(spec.overload, args, kwargs)


GRADIENTS = ("rms_norm", "add_layer_norm", "bias_gelu", "swiglu", "rotary", "flash_attention", "moe_experts")


@pytest.mark.parametrize("name", GRADIENTS)
def test_opcheck_with_gradients(name):
    """Also compiles with every axis symbolic, head counts too."""
    spec = SPECS[name]
    sample = samples(spec)[0]
    ask = lambda t: t.clone().requires_grad_() if t.is_floating_point() else t  # noqa: E731
    args, kwargs = pytree.tree_map_only(torch.Tensor, ask, (sample.args, dict(sample.kwargs)))
    torch.library.opcheck(spec.overload, args, kwargs)


def graphs_of(fn, *args):
    """Compile with AOTAutograd; the forward graphs and the result."""
    graphs = []

    def backend(gm, inputs):
        from torch._dynamo.backends.common import aot_autograd

        def keep(graph, _):
            graphs.append(graph)
            return graph

        return aot_autograd(fw_compiler=keep)(gm, inputs)

    result = torch.compile(fn, backend=backend, fullgraph=True)(*args)
    return graphs, result


@pytest.mark.parametrize("name", ["kv_write", "mla_kv_write"])
def test_writes_functionalise_and_reach_the_cache(name):
    spec = SPECS[name]
    sample = samples(spec)[1]

    def step(k, v, k_cache, v_cache, slots):
        spec.packet(k, v, k_cache, v_cache, slots)
        return k_cache.sum() + v_cache.sum()

    eager, compiled, aot = clone(sample.args), clone(sample.args), clone(sample.args)
    with torch.no_grad():
        wanted = step(*eager)
        got = torch.compile(step, backend="aot_eager", fullgraph=True)(*compiled)
        graphs, _ = graphs_of(step, *aot)
    torch.testing.assert_close(got, wanted)
    for a, b, c in zip(eager, compiled, aot, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    assert any("auto_functionalized" in str(n.target) for n in graphs[0].graph.nodes)


def test_cache_written_as_a_view_of_a_stacked_buffer():
    stacked = torch.zeros(2, 3, 4, 2, 8)
    k, v = torch.randn(2, 2, 8), torch.randn(2, 2, 8)
    step = torch.compile(
        lambda buffer, k, v, slots: ops.kv_write(k, v, buffer[0], buffer[1], slots), backend="aot_eager", fullgraph=True
    )
    with torch.no_grad():
        step(stacked, k, v, torch.tensor([6, -1]))
    assert torch.equal(stacked[0, 1, 2], k[0]) and torch.equal(stacked[1, 1, 2], v[0])
    assert int((stacked != 0).any(-1).any(-1).sum()) == 2


def test_one_graph_serves_all_lengths():
    compiles = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    fn = torch.compile(
        lambda q, k, v: ops.flash_attention(q, k, v, scale=0.3, causal="bottom_right"), backend=compiles, dynamic=True
    )
    for sq, sk in ((5, 7), (6, 9), (3, 11)):
        q, k = torch.randn(2, 4, sq, 8), torch.randn(2, 2, sk, 8)
        torch.testing.assert_close(fn(q, k, k), ops.flash_attention(q, k, k, scale=0.3, causal="bottom_right"))
    assert compiles.frame_count == 1


def gradients(fn, *inputs):
    leaves = [x.clone().requires_grad_() for x in inputs]
    fn(*leaves).square().sum().backward()
    return [leaf.grad for leaf in leaves]


def test_gradients_are_the_references():
    x, w = torch.randn(3, 8), torch.randn(8)
    wanted = gradients(lambda x, w: F.rms_norm(x, (8,), w, 1e-6), x, w)
    norm = lambda x, w: ops.rms_norm(x, w, 1e-6)  # noqa: E731
    for fn in (norm, torch.compile(norm, backend="aot_eager")):
        for a, b in zip(gradients(fn, x, w), wanted, strict=True):
            torch.testing.assert_close(a, b)
    q, bias, sinks = torch.randn(1, 2, 4, 8), torch.randn(4, 4), torch.randn(2)
    found = gradients(lambda q, b, s: ops.flash_attention(q, q, q, bias=b, sinks=s, scale=0.3), q, bias, sinks)
    assert all(g is not None and float(g.abs().sum()) > 0 for g in found)  # keyword-only tensors too


def test_an_operator_without_gradient_says_so():
    x = torch.randn(2, 4, requires_grad=True)
    with pytest.raises(NotImplementedError, match="matmul_all_reduce has no gradient"):
        ops.matmul_all_reduce(x, x, None, "")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_attention_follows_autocast_as_sdpa_does(dtype):
    q, mask = torch.randn(1, 2, 4, 8), torch.randn(4, 4)
    call = lambda q: ops.flash_attention(q, q, q, bias=mask.to(q.dtype), scale=0.3, empty_row="zero")  # noqa: E731
    with torch.autocast("cpu", dtype=dtype):
        wanted = F.scaled_dot_product_attention(q, q, q, attn_mask=mask, scale=0.3)
        got = call(q)
        assert got.dtype == wanted.dtype == dtype
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)
        assert call(q.double()).dtype == F.scaled_dot_product_attention(q.double(), q.double(), q.double()).dtype
        assert torch.compile(call, backend="aot_eager")(q).dtype == dtype


def test_other_operators_ignore_autocast_like_aten_rms_norm_on_cpu():
    x, w = torch.randn(3, 8), torch.randn(8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.rms_norm(x, w, 1e-6).dtype == F.rms_norm(x, (8,), w, 1e-6).dtype == torch.float32
        assert ops.rms_norm(x.bfloat16(), w, 1e-6).dtype == torch.bfloat16
        ids, weights = torch.zeros(3, 1, dtype=torch.int32), torch.ones(3, 1)
        got = ops.moe_experts(x, weights, ids, torch.randn(2, 8, 8), torch.randn(2, 8, 4), activation="silu")
        assert got.dtype == torch.float32


def test_autocast_policies():
    assert autocast_dtype("keep", "cpu") is autocast_dtype("keep", "cuda") is autocast_dtype("cuda_fp32", "cpu") is None
    assert autocast_dtype("cuda_fp32", "cuda") is torch.float32  # as torch does for aten.rms_norm there
    with torch.autocast("cpu", dtype=torch.float16):
        assert autocast_dtype("lower", "cpu") is torch.float16
    for spec in SPECS.values():
        assert torch._C._dispatch_has_kernel_for_dispatch_key(spec.qualname, "AutocastPrivateUse1")


def test_all_reduce_in_a_process_group_of_one(tmp_path):
    x, w, bias = torch.randn(3, 8), torch.randn(4, 8), torch.randn(4)
    with pytest.raises(ValueError, match=r"'tp' is named, but torch\.distributed is not initialised"):
        ops.matmul_all_reduce(x, w, bias, "tp")
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.FileStore(str(tmp_path / "store"), 1))
    try:
        name = dist.group.WORLD.group_name
        for group in ("", name):
            torch.testing.assert_close(ops.matmul_all_reduce(x, w, bias, group), F.linear(x, w, bias))
        compiled = torch.compile(lambda x: ops.matmul_all_reduce(x, w, None, name), backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), F.linear(x, w))
    finally:
        dist.destroy_process_group()


def test_importing_twice_registers_once():
    import importlib

    import ascend_dynamo.dialect

    again = importlib.reload(ascend_dynamo.dialect)
    assert again.SPECS is SPECS
    assert set(SPECS) <= set(dir(torch.ops.ascend)) | {s.name for s in SPECS.values() if hasattr(ops, s.name)}


def test_one_gather_serves_all_lengths():
    from torch._dynamo.testing import CompileCounterWithBackend

    compiles = CompileCounterWithBackend("aot_eager")
    fn = torch.compile(lambda c, t, n: ops.kv_gather(c, t, n), backend=compiles, dynamic=True, fullgraph=True)
    cache, table = torch.randn(5, 4, 2, 8), torch.tensor([[3, 1], [-1, 0]], dtype=torch.int32)
    for length in (3, 8, 5):
        assert torch.equal(fn(cache, table, length), ops.kv_gather(cache, table, length))
    assert compiles.frame_count == 1
