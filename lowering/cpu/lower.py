"""The CPU target: our kernels where they win, Inductor for everything else.

Most of the dialect decomposes again, because Inductor fuses small things well. What it cannot do is read a weight
without repacking it on every call, or run attention near the processor's rate: those are ours (``kernels.py``), and an
activation behind a linear rides along as its epilogue.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ascend_dynamo import _torch_compat as compat
from ascend_dynamo.contracts import Builder, CacheKey, CompiledArtifact, Facts, GraphUnit, NoMatch
from ascend_dynamo.dialect import SPECS
from ascend_dynamo.errors import LoweringError
from ascend_dynamo.ir.facts import PROLOGUE
from ascend_dynamo.lowering.cpu import kernels, moe, paged
from ascend_dynamo.lowering.cpu.cost import attention_gain, linear_gain
from ascend_dynamo.lowering.retrace import retrace
from ascend_dynamo.memory.predict import of_inductor
from ascend_dynamo.runtime.prologue import Artifact

_aten = torch.ops.aten
_ascend = torch.ops.ascend
_DTYPES = (torch.bfloat16, torch.float32)
_TWINS = (_ascend.kv_write_functional.default, _ascend.mla_kv_write_functional.default)
_WHOLE = (*_TWINS, _ascend.kv_append.default)  # a growing cache is memory, not a concatenation


@dataclass(frozen=True)
class _Kernel:
    """How one op is lowered: when it can be, what it gains in seconds, and the call that replaces it."""

    supports: Callable[[fx.Node, Facts], NoMatch | None]
    gain: Callable[[fx.Node, str], float]
    lower: Callable[[fx.Node, Builder], fx.Node]
    dtypes: tuple[torch.dtype, ...] = _DTYPES
    anywhere: bool = False  # worth having without vectors too


class CpuLowering:
    """``Lowering`` for the CPU. Kernels are compiled at the first graph that has a use for them."""

    target = "cpu"
    version = "1"

    def __init__(self) -> None:
        self._kernels: dict[Any, _Kernel] = {
            _aten.linear.default: _Kernel(_linear_supported, _linear_gain, _lower_linear),
            _ascend.flash_attention.default: _Kernel(
                _attention_supported, _attention_gain, _lower_attention, (*_DTYPES, torch.float16), anywhere=True
            ),
            _ascend.moe_gate.default: _Kernel(
                moe.gate_supported, moe.gate_gain, moe.lower_gate, (torch.float32,), anywhere=True
            ),
            _ascend.moe_experts.default: _Kernel(
                moe.experts_supported, moe.experts_gain, moe.lower_experts, (*_DTYPES, torch.float16), anywhere=True
            ),
            **{
                op: _Kernel(paged.attention_supported, paged.attention_gain, paged.lower, paged.DTYPES, anywhere=True)
                for op in (_ascend.paged_attention.default, _ascend.mla_attention.default)
            },
            **{
                op: _Kernel(paged.write_supported, paged.write_gain, paged.lower, paged.CACHES, anywhere=True)
                for op in (_ascend.kv_write.default, _ascend.mla_kv_write.default)
            },
            **{op: _Kernel(_epilogue_supported, _no_round_trip, _lower_epilogue) for op in _EPILOGUES},
        }
        self.ops: frozenset[Any] = frozenset(self._kernels)
        self._isa = ""

    @property
    def isa(self) -> str:
        """``kernels.isa()``, asked once: under a fake mode the question costs more than the rest of the lowering."""
        self._isa = self._isa or kernels.isa()
        return self._isa

    def supports(self, op: Any, n: fx.Node, facts: Facts) -> NoMatch | None:
        kernel = self._kernels[op]
        wrong = _wrong_kind(n, kernel.dtypes, facts) or kernel.supports(n, facts)
        if wrong is not None:
            return wrong
        try:
            isa = self.isa
        except LoweringError as error:
            return NoMatch("op", n, "compiled CPU kernels", str(error), src=facts.src(n))
        if isa == "portable" and not kernel.anywhere:
            return NoMatch("op", n, "a processor with AVX-512-BF16", "one without", src=facts.src(n))
        return None

    def cost(self, op: Any, n: fx.Node, facts: Facts) -> float:
        return -self._kernels[op].gain(n, self.isa)

    def lower(self, n: fx.Node, b: Builder) -> tuple[fx.Node, ...]:
        return (self._kernels[n.target].lower(n, b),)

    def compile(self, g: GraphUnit, key: CacheKey | None = None) -> CompiledArtifact:
        # The functional twins of cache writes stay whole: their references write into clones, and Inductor, which takes
        # its graphs to be functional, merges clones of equal values.
        references = {spec.overload: spec.reference for spec in SPECS.values() if spec.overload not in _WHOLE}
        gm = retrace(g, {**compat.inductor_decompositions(), **references})
        values = [n.meta["val"] for n in gm.graph.find_nodes(op="placeholder")]
        inputs = g.gm.graph.find_nodes(op="placeholder")
        static = [i for i, n in enumerate(inputs) if n.name in g.params or PROLOGUE in n.meta]
        compiled = compat.inductor_compile(gm, values, static)
        return Artifact(compiled, g, lambda: of_inductor(compiled, gm), host_memory=True)


def _wrong_kind(n: fx.Node, dtypes: tuple[torch.dtype, ...], facts: Facts) -> NoMatch | None:
    value = facts.val(n)
    if value is None:  # a write into a cache, the third argument
        value = facts.val(n.args[2])  # type: ignore[arg-type]
    value = value[0] if isinstance(value, (tuple, list)) else value
    if value.device.type != "cpu":
        return NoMatch("op", n, "a tensor on the CPU", f"one on {value.device}", src=facts.src(n))
    if value.dtype not in dtypes:
        expected, found = (" or ".join(str(d).removeprefix("torch.") for d in ds) for ds in (dtypes, (value.dtype,)))
        return NoMatch("dtype", n, expected, found, src=facts.src(n))
    return None


def _all_of(n: fx.Node, args: Iterable[Any], facts: Facts) -> NoMatch | None:
    """A refusal unless the given arguments have the dtype of the result."""
    dtype = facts.val(n).dtype
    other = next((a for a in args if facts.val(a).dtype is not dtype), None)
    if other is None:
        return None
    return NoMatch("dtype", n, f"operands of {dtype}", f"%{other.name} of {facts.val(other).dtype}", src=facts.src(n))


def _linear_supported(n: fx.Node, facts: Facts) -> NoMatch | None:
    weight = facts.val(n.args[1])  # type: ignore[arg-type]
    if weight.ndim != 2:
        return NoMatch("shape", n, "a weight [N, K]", f"one of {weight.ndim} axes", src=facts.src(n))
    return _all_of(n, n.all_input_nodes, facts)


def _linear_gain(n: fx.Node, isa: str) -> float:
    x, weight = n.args[0].meta["val"], n.args[1].meta["val"]  # type: ignore[union-attr]
    rows = 1
    for size in x.shape[:-1]:
        rows *= compat.size_hint(size)
    width, depth = map(compat.size_hint, weight.shape)
    return linear_gain(rows, width, depth, x.dtype, isa=isa, threads=torch.get_num_threads())


def _lower_linear(n: fx.Node, b: Builder) -> fx.Node:
    return b.op(torch.ops.ascend_cpu.linear.default, *n.args)


def _attention_supported(n: fx.Node, facts: Facts) -> NoMatch | None:
    return _all_of(n, n.args, facts)


def _attention_gain(n: fx.Node, isa: str) -> float:
    q, k, v = (a.meta["val"] for a in n.args[:3])  # type: ignore[union-attr]
    batch, heads, queries, dim = map(compat.size_hint, q.shape)
    keys, threads = compat.size_hint(k.shape[2]), torch.get_num_threads()
    # What ATen's flash attention does not do, the reference writes out.
    plain = n.kwargs.get("softcap", 0.0) or n.kwargs.get("sinks") is not None or compat.size_hint(v.shape[3]) != dim
    causal = n.kwargs.get("causal", "none") != "none"
    return attention_gain(
        batch, heads, queries, keys, dim, q.dtype, causal=causal, isa=isa, threads=threads, fused=not plain
    )


def _lower_attention(n: fx.Node, b: Builder) -> fx.Node:
    near = {name: _keys_side_by_side(n.kwargs[name], b) for name in ("bias", "mask") if n.kwargs.get(name) is not None}
    return b.op(torch.ops.ascend_cpu.flash_attention.default, *n.args, **{**n.kwargs, **near})


def _keys_side_by_side(mask: Any, b: Builder) -> fx.Node:
    """A mask whose neighbouring keys lie apart (T5's [1, H, Sq, Sk] is a permuted [Sq, Sk, H]), as the kernel reads it.

    Whatever computes it then writes it so, once for all layers, instead of the kernel at each call.
    """
    value = mask.meta["val"]
    if value.dim() == 0 or compat.size_hint(value.stride(-1)) in (0, 1) or compat.size_hint(value.shape[-1]) == 1:
        return mask
    ready = next((u for u in mask.users if u.target is _aten.clone.default), None)
    return ready or b.op(_aten.clone.default, mask, memory_format=torch.contiguous_format)


def _gelu(n: fx.Node) -> str:
    approximate = n.kwargs.get("approximate", n.args[1] if len(n.args) > 1 else "none")
    return "gelu_tanh" if approximate == "tanh" else "gelu"


_EPILOGUES: dict[Any, Callable[[fx.Node], str]] = {
    _aten.gelu.default: _gelu,
    _aten.silu.default: lambda n: "silu",
    _aten.relu.default: lambda n: "relu",
    _ascend.swiglu.default: lambda n: "swiglu",
}


def _epilogue_supported(n: fx.Node, facts: Facts) -> NoMatch | None:
    producer = n.args[0]
    assert isinstance(producer, fx.Node)
    plain = producer.op == "call_function" and str(producer.target) == "ascend_cpu.linear.default"
    if not plain or len(producer.args) > 3:
        return NoMatch("op", n, "the result of a linear kernel", "another value", src=facts.src(n))
    if len(producer.users) > 1:
        return NoMatch("users", n, "a linear used only here", "one used elsewhere too", src=facts.src(n))
    if facts.region(n) != facts.region(producer):
        return NoMatch("region", n, "the linear in the same region", "a border between them", src=facts.src(n))
    return None


def _no_round_trip(n: fx.Node, isa: str) -> float:
    """Writing and reading the linear's result once, at about 10 GB/s."""
    size = 1
    for s in n.args[0].meta["val"].shape:  # type: ignore[union-attr]
        size *= compat.size_hint(s)
    return 2 * size * 2 / 10e9


def _lower_epilogue(n: fx.Node, b: Builder) -> fx.Node:
    producer = n.args[0]
    assert isinstance(producer, fx.Node)
    args = (*producer.args, None)[:3]
    return b.op(torch.ops.ascend_cpu.linear.default, *args, _EPILOGUES[n.target](n))
