"""Running graphs and pieces of graphs on numbers: at their own dtypes, or with every float lifted to float64."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from ascend_dynamo import _torch_compat as compat
from ascend_dynamo.contracts import GraphUnit
from ascend_dynamo.ir.facts import PROLOGUE

_FLOATS = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})


def concrete(value: Any) -> Any:
    """A size as an int: symbolic ones by their hint."""
    return compat.size_hint(value) if isinstance(value, torch.SymInt) else value


def draw(value: torch.Tensor, generator: torch.Generator, limit: int = 2) -> torch.Tensor:
    """Random numbers with the dtype, shape and strides of a fake value; integers are in ``[0, limit)``."""
    shape = [concrete(s) for s in value.shape]
    if value.dtype.is_floating_point or value.dtype.is_complex:
        kind = value.dtype if value.dtype.is_complex else torch.float32
        numbers = torch.randn(shape, generator=generator, dtype=kind).to(value.dtype)
    elif value.dtype == torch.bool:
        numbers = torch.rand(shape, generator=generator) < 0.7
    else:
        numbers = torch.randint(0, max(limit, 1), shape, generator=generator).to(value.dtype)
    if value.layout != torch.strided:
        return numbers
    strides = [concrete(s) for s in value.stride()]
    span = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if numbers.numel() else 0
    if span < numbers.numel():  # expanded: several elements share memory
        return numbers
    return torch.empty(span, dtype=value.dtype).as_strided(shape, strides).copy_(numbers)


def lift(value: Any) -> Any:
    """Floating-point tensors and dtypes become float64, in lists too; anything else stays."""
    if isinstance(value, torch.Tensor):
        return value.double() if value.dtype in _FLOATS else value
    if isinstance(value, torch.dtype):
        return torch.float64 if value in _FLOATS else value
    if isinstance(value, (list, tuple)):
        return type(value)(lift(v) for v in value)
    return value


_LOWER = frozenset({5, 6, 15})  # float16, float32, bfloat16 as schemas number them


@lru_cache(maxsize=1024)
def _dtype_arguments(target: Any) -> tuple[tuple[str, Any], ...]:
    """Name and default of the keyword arguments of an operator that are dtypes; schemas give these as numbers."""
    schema = getattr(target, "_schema", None)
    arguments = schema.arguments if schema is not None else ()
    return tuple((a.name, a.default_value) for a in arguments if a.kwarg_only and str(a.real_type) == "ScalarType")


def _lifted_call(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The same call in float64, whatever its arguments, defaults and the rules for its defaults say."""
    lifted = {k: lift(a) for k, a in kwargs.items()}
    for name, default in _dtype_arguments(node.target):
        if lifted.get(name, default) in _LOWER:
            lifted[name] = torch.float64
    if node.target is torch.ops.aten.rms_norm.default and (len(args) < 4 or args[3] is None):
        # Without eps it takes that of the dtype that it computes in, which must not become that of float64.
        dtype = torch.promote_types(node.args[0].meta["val"].dtype, torch.float32)  # type: ignore[union-attr]
        args = (*args[:2], args[2] if len(args) > 2 else None, torch.finfo(dtype).eps)
    return tuple(lift(a) for a in args), lifted


def run(
    nodes: Iterable[fx.Node], env: Mapping[fx.Node, Any], prologue: fx.GraphModule | None = None, lifted: bool = False
) -> dict[fx.Node, Any]:
    """Values of ``nodes`` (in program order) given ``env``; with ``lifted`` all algebra is in float64."""
    values: dict[fx.Node, Any] = {k: lift(v) for k, v in env.items()} if lifted else dict(env)

    def argument(n: fx.Node) -> Any:
        if n not in values:
            outside = _outside(n, values, prologue)
            values[n] = lift(outside) if lifted else outside
        return values[n]

    with compat.no_dispatch_modes(), torch.no_grad():
        for node in nodes:
            if node.op != "call_function":
                argument(node)
                continue
            args = fx.node.map_arg(node.args, argument)
            kwargs = fx.node.map_arg(node.kwargs, argument)
            if lifted:
                args, kwargs = _lifted_call(node, args, kwargs)
            values[node] = _DEFINED.get(node.target, node.target)(*args, **kwargs)  # type: ignore[operator]
    return values


def _grouped_mm(rows: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor | None = None, *more: Any) -> torch.Tensor:
    """``aten._grouped_mm`` of rows [S, K] and weights [E, K, N]: in float64 too, and rows behind the last group are 0,
    where the operator leaves whatever was in memory."""
    if rows.dim() != 2 or weight.dim() != 3 or offs is None or any(m is not None for m in more):
        return torch.ops.aten._grouped_mm.default(rows, weight, offs, *more)
    out = rows.new_zeros(rows.shape[0], weight.shape[2])
    start = 0
    for expert, end in enumerate(offs.tolist()):
        out[start:end] = rows[start:end] @ weight[expert]
        start = end
    return out


# Instead of operators whose results are partly what happens to be in memory.
_DEFINED: Mapping[Any, Any] = MappingProxyType(
    {
        torch.ops.aten._grouped_mm.default: _grouped_mm,
        torch.ops.aten.empty_like.default: torch.ops.aten.zeros_like.default,
    }
)


def run_unit(unit: GraphUnit, args: Sequence[Any], lifted: bool = False) -> list[Any]:
    """The outputs of a whole graph on copies of ``args`` (one per placeholder that the prologue does not fill)."""
    graph = unit.gm.graph
    given = [n for n in graph.find_nodes(op="placeholder") if PROLOGUE not in n.meta]
    env = dict(zip(given, (a.clone() if isinstance(a, torch.Tensor) else a for a in args), strict=True))
    (output,) = graph.find_nodes(op="output")
    values = run([n for n in graph.nodes if n.op == "call_function"], env, unit.prologue, lifted)
    if lifted:
        values = {**{n: lift(v) for n, v in env.items()}, **values}
    with compat.no_dispatch_modes():
        results = [values[o] if isinstance(o, fx.Node) else o for o in output.args[0]]  # type: ignore[union-attr]
        return [r.clone() if isinstance(r, torch.Tensor) else r for r in results]


def _outside(node: fx.Node, values: dict[fx.Node, Any], prologue: fx.GraphModule | None) -> Any:
    """A node that the pieces read but nobody drew: a constant, a symbolic size, or a value of the prologue."""
    if node.op == "get_attr":
        found: Any = node.graph.owning_module
        for part in str(node.target).split("."):
            found = getattr(found, part)
        return found
    if PROLOGUE in node.meta and prologue is not None:
        holders = [n for n in node.graph.find_nodes(op="placeholder") if PROLOGUE in n.meta]
        (output,) = prologue.graph.find_nodes(op="output")
        by_name = {n.target: v for n, v in values.items() if n.op == "placeholder"}
        return _transformed(output.args[0][holders.index(node)], by_name)  # type: ignore[index]
    return concrete(node.meta.get("val"))


def _transformed(node: Any, by_name: Mapping[Any, Any]) -> Any:
    if node.op == "placeholder":
        return by_name[node.target]
    return node.target(*(_transformed(a, by_name) for a in node.args))


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[torch.Generator]:
    """A generator of our own, outside of any dispatch mode; the global state of torch is not touched."""
    with compat.no_dispatch_modes():
        yield torch.Generator().manual_seed(seed)
