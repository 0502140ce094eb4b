"""Capture: a Dynamo graph or a plain function ─► a functional ATen graph with composites kept whole.

AOTAutograd would decompose linear, matmul, attention and the norms before anyone could see them. A TorchFunctionMode
(public and thread-local; overriding decompositions would be private and process-wide) sends them to opaque twins in the
``ascend_capture`` namespace while the graph is traced; afterwards the twins become the ``aten`` ops they stand for.
A twin has no derivative, so graphs that need gradients never come here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ascend_dynamo import _torch_compat as compat
from ascend_dynamo.contracts import GraphUnit

_aten = torch.ops.aten
_library = torch.library.Library("ascend_capture", "DEF")

# twin name -> (schema, what it computes, the aten op that it becomes)
_TWINS: dict[str, tuple[str, Callable[..., Any], Any]] = {
    "linear": ("(Tensor x, Tensor w, Tensor? b=None) -> Tensor", F.linear, _aten.linear.default),
    "matmul": ("(Tensor a, Tensor b) -> Tensor", torch.matmul, _aten.matmul.default),
    "sdpa": (
        "(Tensor q, Tensor k, Tensor v, Tensor? attn_mask=None, float dropout_p=0.0, bool is_causal=False, *,"
        " float? scale=None, bool enable_gqa=False) -> Tensor",
        F.scaled_dot_product_attention,
        _aten.scaled_dot_product_attention.default,
    ),
    "rms_norm": (
        "(Tensor x, SymInt[] shape, Tensor? w=None, float? eps=None) -> Tensor",
        F.rms_norm,
        _aten.rms_norm.default,
    ),
    "layer_norm": (
        "(Tensor x, SymInt[] shape, Tensor? w=None, Tensor? b=None, float eps=1e-05) -> Tensor",
        F.layer_norm,
        _aten.layer_norm.default,
    ),
}
_BECOMES: dict[Any, Any] = {}
for _name, (_schema, _fn, _op) in _TWINS.items():
    _library.define(_name + _schema)
    _library.impl(_name, _fn, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ascend_capture::{_name}", _fn, lib=_library)
    _BECOMES[getattr(torch.ops.ascend_capture, _name).default] = _op
_twin = torch.ops.ascend_capture


def _linear(input: Any, weight: Any, bias: Any = None) -> Any:
    return _twin.linear, (input, weight, bias), {}


def _matmul(input: Any, other: Any) -> Any:
    if getattr(input, "ndim", 0) < 2 or getattr(other, "ndim", 0) < 2:
        return None
    return _twin.matmul, (input, other), {}


def _rmatmul(other: Any, input: Any) -> Any:
    return _matmul(input, other)


def _sdpa(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    if dropout_p != 0.0 or isinstance(scale, torch.SymFloat):
        return None
    return (
        _twin.sdpa,
        (query, key, value, attn_mask, 0.0, is_causal),
        {"scale": scale, "enable_gqa": enable_gqa},
    )


def _shape(normalized_shape: Any) -> list[Any]:
    return [normalized_shape] if isinstance(normalized_shape, int) else list(normalized_shape)


def _rms_norm(input: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> Any:
    return _twin.rms_norm, (input, _shape(normalized_shape), weight, eps), {}


def _layer_norm(
    input: Any,
    normalized_shape: Any,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Any:
    return _twin.layer_norm, (input, _shape(normalized_shape), weight, bias, eps), {}


_KEEP: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    torch._C._nn.linear: _linear,
    torch.matmul: _matmul,
    torch.Tensor.matmul: _matmul,
    torch.Tensor.__matmul__: _matmul,
    torch.Tensor.__rmatmul__: _rmatmul,
    F.scaled_dot_product_attention: _sdpa,
    F.rms_norm: _rms_norm,
    torch.rms_norm: _rms_norm,
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
}
# Eager autocast runs these in the lower precision; it leaves the norms to their decompositions.
_AUTOCAST = {_twin.linear, _twin.matmul, _twin.sdpa}


class KeepComposites(TorchFunctionMode):
    """While active, composites are traced as single calls."""

    def __init__(self) -> None:
        super().__init__()
        self._active = True

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Composites decompose as usual inside this block."""
        self._active = False
        try:
            with compat.function_mode_left(self):
                yield
        finally:
            self._active = True

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._active and func is F.multi_head_attention_forward and all(t is torch.Tensor for t in types):
            with self:
                return _multi_head_attention(*args, **kwargs)
        keep = _KEEP.get(func) if self._active else None
        if keep is None or "out" in kwargs:
            return func(*args, **kwargs)
        kept = keep(*args, **kwargs)
        if kept is None or not _plain(kept[1]):
            return func(*args, **kwargs)
        twin, twin_args, twin_kwargs = kept
        device = next(a.device.type for a in twin_args if isinstance(a, torch.Tensor))
        if not torch.is_autocast_enabled(device):
            return twin(*twin_args, **twin_kwargs)
        if twin not in _AUTOCAST:
            return func(*args, **kwargs)
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            return twin(*(_autocast(a, device, dtype) for a in twin_args), **twin_kwargs)


# Dynamo records this Python function as one call, and inside a handler the mode is off. Without the lines that hand the
# call to the mode, it can be run under the mode, and its linears and its attention are seen.
_multi_head_attention = FunctionType(
    F.multi_head_attention_forward.__code__,
    {**F.multi_head_attention_forward.__globals__, "has_torch_function": lambda tensors: False},
    argdefs=F.multi_head_attention_forward.__defaults__,
)


def _plain(args: Sequence[Any]) -> bool:
    """True if every tensor is dense; sparse, quantised and nested tensors keep their own implementations."""
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    return bool(tensors) and all(t.layout == torch.strided and not t.is_quantized for t in tensors)


def _autocast(a: Any, device: str, dtype: torch.dtype) -> Any:
    eligible = isinstance(a, torch.Tensor) and a.is_floating_point() and a.dtype != torch.float64
    return a.to(dtype) if eligible and a.device.type == device else a


def make_unit(gm: fx.GraphModule, params: Sequence[str] = ()) -> GraphUnit:
    """A captured ATen graph as a ``GraphUnit``: twins become aten ops, output strides and written inputs are noted."""
    for node in gm.graph.nodes:
        if node.op == "call_function":
            node.target = _BECOMES.get(node.target, node.target)
            node.meta.setdefault("val", None)  # AOTAutograd leaves it out where a call returns nothing
    _inputs_first(gm.graph)
    gm.recompile()
    placeholders = gm.graph.find_nodes(op="placeholder")
    index = {node: i for i, node in enumerate(placeholders)}
    mutated = frozenset(
        index[node.args[0]]
        for node in gm.graph.find_nodes(op="call_function", target=_aten.copy_.default)
        if node.args[0] in index
    )
    (output,) = gm.graph.find_nodes(op="output")
    strides = tuple(_strides(leaf) for leaf in pytree.tree_leaves(output.args))
    empty = fx.Graph()
    empty.output(())
    return GraphUnit(gm, fx.GraphModule({}, empty), tuple(params), mutated, strides)


def _inputs_first(graph: fx.Graph) -> None:
    """Put every placeholder in front of the first call: AOTAutograd makes effect tokens before the inputs."""
    first_call: fx.Node | None = None
    for node in list(graph.nodes):
        if node.op != "placeholder":
            first_call = first_call or node
        elif first_call is not None:
            first_call.prepend(node)


def _strides(leaf: Any) -> Any:
    value = leaf.meta.get("val") if isinstance(leaf, fx.Node) else None
    if isinstance(value, torch.Tensor) and value.layout == torch.strided:
        return tuple(value.stride())
    return None


def trace(fn: Callable[..., Any], args: Sequence[Any], *, fake_mode: Any = None) -> GraphUnit:
    """Capture ``fn(*args)`` as models are captured: composites whole, functional, nothing else decomposed.

    ``args`` are tensors (real or fake; a meta copy is used, values are never read) or other values, which are closed
    over. Shapes stay as they are: fake tensors with symbolic sizes give a graph with symbolic sizes.
    """
    from torch._subclasses import FakeTensorMode
    from torch.func import functionalize

    mode = fake_mode or compat.detect_fake_mode(args) or FakeTensorMode(allow_non_fake_inputs=True)
    tensors = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor)]

    def positional(*given: torch.Tensor) -> Any:
        full = list(args)
        for i, value in zip(tensors, given, strict=True):
            full[i] = value
        with KeepComposites():
            out = fn(*full)
        return tuple(out) if isinstance(out, (tuple, list)) else (out,)

    fakes = [args[i] if compat.is_fake(args[i]) else mode.from_tensor(args[i], static_shapes=True) for i in tensors]
    gm = compat.trace_functional(functionalize(positional), fakes, mode)
    return make_unit(gm)
