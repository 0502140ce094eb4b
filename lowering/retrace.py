"""Back from value semantics to exact strides, and from the dialect to what a target compiler knows.

``retrace`` runs a graph in normal form through an interpreter that gives opaque ops and graph outputs the strides that
the captured graph had, under a decomposition table (a target's, and the references of the dialect ops that it leaves
alone). The result has exact fake values again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils import _pytree as pytree

from ascend_dynamo import _torch_compat as compat
from ascend_dynamo.contracts import GraphUnit
from ascend_dynamo.ir.sym import expr

_aten = torch.ops.aten


class _RestoreStrides(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, out_strides: Sequence[Any]) -> None:
        super().__init__(gm)
        self.out_strides = out_strides

    def run_node(self, n: fx.Node) -> Any:
        with torch.fx.traceback.set_current_meta(n):
            promised = n.meta.get("promised_strides")
            if promised is None or n.op != "call_function":
                return super().run_node(n)
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            leaves, spec = pytree.tree_flatten((args, kwargs))
            tensors = iter(promised)
            leaves = [
                restride(leaf, next(tensors, None)) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves
            ]
            args, kwargs = pytree.tree_unflatten(leaves, spec)
            return self.call_function(n.target, args, kwargs)

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A constant of the graph enters the traced one by the op that capture would use for it."""
        value = super().get_attr(target, args, kwargs)
        return _aten.lift_fresh_copy.default(value) if isinstance(value, torch.Tensor) else value

    def output(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        leaves, spec = pytree.tree_flatten(args[0])
        promised = self.out_strides or (None,) * len(leaves)
        leaves = [restride(v, s) for v, s in zip(leaves, promised, strict=True)]
        return pytree.tree_unflatten(leaves, spec)


def restride(x: Any, strides: Sequence[Any] | None) -> Any:
    """``x`` with the promised strides, copied only if they differ on an axis where a stride means something.

    Sizes are compared as expressions: under a tracer, arithmetic on SymInts would itself be traced.
    """
    if strides is None or not isinstance(x, torch.Tensor) or x.layout != torch.strided:
        return x
    sizes, actual, wanted = (list(map(expr, given)) for given in (x.shape, x.stride(), strides))
    env = compat.shape_env_of(compat.detect_fake_mode([x]))
    matters = [d for d in range(x.ndim) if not _equal(sizes[d], 1, env)]
    if any(_equal(n, 0, env) for n in sizes) or all(_equal(actual[d], wanted[d], env) for d in matters):
        return x
    order = sorted(matters, key=lambda d: (-compat.size_hint(strides[d]), d))
    order = [d for d in range(x.ndim) if d not in matters] + order
    dense, expected = True, 1
    for d in reversed(order):
        if d in matters:
            dense = dense and _equal(wanted[d], expected, env)
            expected = expected * sizes[d]
    if dense:
        inverse = [order.index(d) for d in range(x.ndim)]
        return x.permute(order).clone(memory_format=torch.contiguous_format).permute(inverse)
    span = 1 + sum((x.shape[d] - 1) * strides[d] for d in range(x.ndim))
    base = torch.zeros([span], dtype=x.dtype, device=x.device)
    return torch.as_strided_scatter(base, x, x.shape, strides, 0).as_strided(x.shape, strides, 0)


def _equal(a: Any, b: Any, env: Any) -> bool:
    """True if two sizes (ints or sympy expressions) are statically known to be equal."""
    return bool(a == b) or (not (isinstance(a, int) and isinstance(b, int)) and compat.known_sympy(sympy.Eq(a, b), env))


def retrace(unit: GraphUnit, decompositions: Mapping[Any, Any]) -> fx.GraphModule:
    """Trace ``unit.gm`` again with ``decompositions`` (op ─► function of the same arguments) applied."""
    values = [n.meta["val"] for n in unit.gm.graph.find_nodes(op="placeholder")]
    strides = _promised(unit)
    return compat.retrace(unit.gm, lambda gm: _RestoreStrides(gm, strides), values, dict(decompositions))


def _promised(unit: GraphUnit) -> Sequence[Any]:
    """The strides promised for the outputs; none for a growing cache, which lies in its buffer as its operator says."""
    (output,) = unit.gm.graph.find_nodes(op="output")
    promised = list(unit.out_strides)
    for i, leaf in enumerate(pytree.tree_leaves(output.args) if promised else ()):
        while isinstance(leaf, fx.Node) and leaf.target is _aten.slice.Tensor:
            leaf = leaf.args[0]
        if isinstance(leaf, fx.Node) and leaf.target is torch.ops.ascend.kv_append.default:
            promised[i] = None
    return promised
