"""Fakes are exact (dtype, shape, strides, symbolic sizes), add no guard, and allocate each output once."""

from __future__ import annotations

import torch
from dialect_cases import clone, every_spec, run, samples
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ascend_dynamo._torch_compat import guard_count, size_hint
from ascend_dynamo.dialect.equal import bitwise

# The axes that vary from call to call, per argument: what a compiler makes symbolic. Widths and head counts are static.
LEAD = "all but the last"
DYNAMIC = {
    "rms_norm": {0: (0,)},
    "add_rms_norm": {0: LEAD, 1: LEAD},
    "add_layer_norm": {0: LEAD, 1: LEAD},
    "gelu_add": {0: LEAD, 1: LEAD},
    "bias_gelu": {0: LEAD, 1: LEAD},
    "gelu_mul": {0: LEAD, 1: LEAD},
    "swiglu": {0: LEAD},
    "rotary": {0: (0, 2), 1: LEAD, 2: LEAD},
    "flash_attention": {0: (0, 2), 1: (0, 2), 2: (0, 2), "mask": (0, 2, 3), "bias": (-4, -2, -1)},
    "kv_write": {0: (0,), 1: (0,), 2: (0,), 3: (0,), 4: (0,), "k_scale": (0,), "v_scale": (0,)},
    "paged_attention": {0: (0,), 1: (0,), 2: (0,), 3: (0, 1), 4: (0,), 5: (0,), "mask": (0, 1)},
    "kv_gather": {0: (0,), 1: (0, 1), "scale": (0,)},
    "kv_append": {0: (0, 2), 1: (0, 2)},
    "kv_write_functional": {0: (0,), 1: (0,), 2: (0,), 3: (0,), 4: (0,)},
    "mla_kv_write_functional": {0: (0,), 1: (0,), 2: (0,), 3: (0,), 4: (0,)},
    "mla_kv_write": {0: (0,), 1: (0,), 2: (0,), 3: (0,), 4: (0,)},
    "mla_attention": {0: (0,), 1: (0,), 2: (0,), 3: (0,), 4: (0, 1), 5: (0,), 6: (0,), "mask": (0, 1)},
    "moe_gate": {0: (0,)},
    "moe_experts": {0: (0,), 1: (0,), 2: (0,)},
    "dynamic_quant": {0: LEAD},
    "quant_linear": {0: LEAD, "x_scale": (0, 1)},
    "add_rms_norm_quant": {0: LEAD, 1: LEAD},
    "add_rms_norm_dynamic_quant": {0: LEAD, 1: LEAD},
    "swiglu_quant": {0: LEAD},
    "matmul_all_reduce": {0: LEAD},
}


def fakes(sample, axes=None):
    """The sample's tensors as fakes of one mode, the given axes (None: all) symbolic."""
    mode = FakeTensorMode(shape_env=ShapeEnv())

    def fake(key, value):
        if not isinstance(value, torch.Tensor):
            return value
        rank = value.dim()
        chosen = range(rank) if axes is None else axes.get(key, ())
        chosen = range(rank - 1) if chosen is LEAD else {i % rank for i in chosen if rank}
        # DUCK: equal sizes share a symbol, as they do in a graph whose eager ops required them to be equal
        sizes = [DimDynamic.DUCK if i in chosen else DimDynamic.STATIC for i in range(value.dim())]
        return mode.from_tensor(value, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))

    args = tuple(fake(i, a) for i, a in enumerate(sample.args))
    return mode, args, {k: fake(k, v) for k, v in sample.kwargs.items()}


def described(tree):
    """dtype, shape and significant strides of every output, symbolic sizes by their hints."""
    found = []
    for t in pytree.tree_leaves(tree):
        if t is None:
            continue
        shape = tuple(size_hint(s) for s in t.shape)
        strides = [size_hint(s) for n, s in zip(shape, t.stride(), strict=True) if n > 1]
        found.append((t.dtype, shape, tuple(strides) if 0 not in shape else (), t.device))
    return found


@every_spec
def test_fake_is_exact_and_adds_no_guard(spec):
    for sample in samples(spec, torch.bfloat16):
        args, kwargs = clone((sample.args, dict(sample.kwargs)))
        real = described(spec.overload(*args, **kwargs))
        assert real == described(spec.reference(*args, **kwargs)), sample.note
        for axes in ({}, None):  # static, and every axis symbolic
            mode, args, kwargs = fakes(sample, axes)
            with mode, torch.no_grad():
                assert described(spec.overload(*args, **kwargs)) == real, sample.note
            assert guard_count(mode) == 0


@every_spec
def test_reference_traces_symbolically_like_its_fake(spec):
    """Decomposing a graph calls the reference on fakes: same metadata, no data-dependent shape, no guard."""
    slow = spec.name in ("paged_attention", "mla_attention")  # hundreds of symbolic operations each
    for sample in samples(spec, torch.bfloat16)[: 2 if slow else None]:
        mode, args, kwargs = fakes(sample, DYNAMIC[spec.name])
        with mode, torch.no_grad():
            assert described(spec.reference(*args, **kwargs)) == described(spec.overload(*args, **kwargs)), sample.note
        assert guard_count(mode) == 0, (sample.note, [guard.expr for guard in mode.shape_env.guards])


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


@every_spec
def test_fake_is_one_allocation_per_output(spec):
    mode, args, kwargs = fakes(samples(spec)[0])
    with mode, torch.no_grad(), Calls() as calls:
        outputs = pytree.tree_leaves(spec.fake(*args, **kwargs))
    outputs = [o for o in outputs if o is not None]
    assert len(calls.seen) == len(outputs), calls.seen


@every_spec
def test_traces_whole_and_decomposes_to_the_same_values(spec):
    """make_fx through the operator keeps it whole; through the reference it gives a graph of aten calls."""
    sample = samples(spec)[0]
    leaves, tree = pytree.tree_flatten((sample.args, dict(sample.kwargs)))

    def traced(fn):
        def call(*flat):
            args, kwargs = pytree.tree_unflatten(flat, tree)
            result = fn(*args, **kwargs)
            return args if result is None else result

        return make_fx(call)(*clone(leaves))

    with torch.no_grad():
        whole, parts = traced(spec.overload), traced(spec.reference)
        assert spec.overload in {n.target for n in whole.graph.nodes}
        assert all(getattr(n.target, "namespace", "aten") != "ascend" for n in parts.graph.nodes)
        found = pytree.tree_leaves(parts(*clone(leaves)))
        assert bitwise(tuple(found), tuple(pytree.tree_leaves(run(spec.reference, sample)))) is None
