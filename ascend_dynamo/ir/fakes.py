"""Fake values of calls, computed once per (target, argument metadata): identical layers repeat the same calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ascend_dynamo import _torch_compat as compat
from ascend_dynamo.ir.sym import expr, known, numel

_aten = torch.ops.aten


def fake_mode_of(gm: fx.GraphModule) -> Any:
    """The fake mode that the values of the graph live in, or None if the graph has no fake value."""
    values = (n.meta.get("val") for n in gm.graph.nodes)
    return compat.detect_fake_mode([next(filter(compat.is_fake, values), None)])


class FakeCache:
    """Runs calls on fake values and remembers the results. Shared by all rewrites of one graph.

    Results are shared between nodes: an inner value promises dtype and shape, not identity.
    """

    def __init__(self, mode: Any) -> None:
        self.mode = mode
        self._results: dict[Any, Any] = {}
        self._keys: dict[int, tuple[Any, Any]] = {}  # id of a value -> (the value, kept alive; its key)

    def run(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The value of ``target(*args, **kwargs)``, where nodes stand for their values."""
        key = (target, self.key(args), self.key(kwargs) if kwargs else ())
        if key in self._results:
            return self._results[key]
        result = self._compute(target, args, kwargs)
        self._results[key] = result
        return result

    def tensor(self, shape: tuple[Any, ...], like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A contiguous fake tensor of the given shape on the device of ``like``; no operator is run twice for it."""
        dtype = like.dtype if dtype is None else dtype
        key = (tuple(expr(s) for s in shape), dtype, like.device)
        found = self._results.get(key)
        if found is None:
            with self.quiet():
                found = torch.empty(shape, dtype=dtype, device=like.device)
            self._results[key] = found
        return found

    def key(self, value: Any) -> Any:
        """A hashable description of an argument: metadata of tensors, expressions of sizes, literals themselves."""
        if isinstance(value, fx.Node):
            value = value.meta["val"]
        if isinstance(value, torch.Tensor):
            known = self._keys.get(id(value))
            if known is None:
                described = (value.dtype, tuple(map(expr, value.shape)), self._strides(value), value.device)
                self._keys[id(value)] = known = (value, described)
            return known[1]
        if isinstance(value, (list, tuple)):
            return tuple(self.key(v) for v in value)
        if isinstance(value, dict):
            return tuple((k, self.key(v)) for k, v in sorted(value.items()))
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return compat.sym_expr(value)
        # 1, 1.0 and True are equal but not the same argument.
        return (type(value), repr(value) if isinstance(value, float) else value)

    @staticmethod
    def _strides(value: torch.Tensor) -> Any:
        return tuple(map(expr, value.stride())) if value.layout == torch.strided else value.layout

    def _compute(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        shape = None if kwargs else _layout_shape(target, args)
        if shape is not None:
            return self.tensor(shape, args[0].meta["val"])
        real_args, real_kwargs = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        with self.quiet():
            return target(*real_args, **real_kwargs)

    def quiet(self) -> _Quiet:
        return _Quiet(self.mode)


def _layout_shape(target: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The shape of a layout call in normal form, without asking how its argument lies in memory; else None."""
    if target is _aten.permute.default:
        shape = args[0].meta["val"].shape
        return tuple(shape[d] for d in args[1])
    if target is _aten.reshape.default or target is _aten.expand.default:
        sizes = tuple(a.meta["val"] if isinstance(a, fx.Node) else a for a in args[1])
        x = args[0].meta["val"]
        count = numel(sizes) == numel(x.shape) if target is _aten.reshape.default else len(sizes) == x.dim()
        return sizes if count and all(known(s >= 0) for s in sizes) else None
    return None


class _Quiet:
    """The fake mode, without gradients, in which adding a guard is an error."""

    def __init__(self, mode: Any) -> None:
        self._contexts = [torch.no_grad(), compat.no_new_guards(compat.shape_env_of(mode))]
        if mode is not None:
            self._contexts.append(mode)

    def __enter__(self) -> None:
        for context in self._contexts:
            context.__enter__()

    def __exit__(self, *exc: Any) -> None:
        for context in reversed(self._contexts):
            context.__exit__(*exc)
