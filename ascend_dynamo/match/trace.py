"""Trace one function of a pattern on one sample: capture and normalise it as a model would be, then read the graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensorMode

from ascend_dynamo import capture
from ascend_dynamo.errors import PatternError
from ascend_dynamo.match.canonical import canonical
from ascend_dynamo.match.record import record
from ascend_dynamo.match.samples import Sample, Signature, deciding

aten = torch.ops.aten
SHAPED = frozenset({aten.reshape.default, aten.expand.default})  # their second argument only says the output shape


@dataclass(frozen=True)
class Ref:
    """An argument that is the result of call number ``index``."""

    index: int


@dataclass(frozen=True)
class Name:
    """An argument that is an input of the pattern."""

    name: str


@dataclass(frozen=True)
class Traced:
    """A traced function: calls as (op, canonical arguments, output shape), and what it returns."""

    calls: tuple[tuple[Any, tuple[Any, ...], tuple[int, ...] | None], ...]
    outputs: tuple[Any, ...]
    signature: tuple[tuple[Any, Any, Any], ...]  # (dtype, shape, stride) of each output as eager gives them
    results: tuple[tuple[torch.dtype, tuple[int, ...]] | None, ...] = ()  # of each call; None: not one dense tensor
    taken: tuple[bool, ...] = ()  # what each ``optional`` decided


def arguments(signature: Signature, sample: Sample, mode: FakeTensorMode, absent: frozenset[str]) -> list[Any]:
    """Arguments in parameter order, every tensor its own fake; names in ``absent`` are None."""
    out: list[Any] = []
    for name in signature.order:
        if name in absent:
            out.append(None)
        elif name in signature.shapes:
            dtype = signature.dtypes.get(name, sample.dtype)
            shape = sample.shape(signature.shapes[name])
            with mode:
                made = [torch.empty(shape, dtype=dtype) for _ in range(_copies(signature, sample, name))]
            out.extend(made)
        else:
            out.append(sample.scalars[name] if name in sample.scalars else sample.choices[name])
    return out


def _copies(signature: Signature, sample: Sample, name: str) -> int:
    return sample.count if name == signature.variadic else 1


def input_names(signature: Signature, sample: Sample, absent: frozenset[str] = frozenset()) -> tuple[str, ...]:
    """Names of the tensor inputs in order; a variadic ``xs`` becomes ``xs0``, ``xs1``, ..."""
    names: list[str] = []
    for name in signature.order:
        if name not in signature.shapes or name in absent:
            continue
        if name == signature.variadic:
            names.extend(f"{name}{i}" for i in range(sample.count))
        else:
            names.append(name)
    return tuple(names)


def trace(
    label: str,
    fn: Callable[..., Any],
    signature: Signature,
    sample: Sample,
    planned: Sequence[bool] = (),
    absent: frozenset[str] = frozenset(),
) -> Traced:
    """``fn`` on ``sample`` in normal form.

    Raises PatternError, naming ``label`` and the sample, if the function raises or returns anything but tensors.
    """
    from ascend_dynamo.normalize import normalize

    with FakeTensorMode() as mode:
        pass
    args = arguments(signature, sample, mode, absent)
    try:
        with torch.no_grad(), deciding(planned) as taken:
            unit = record(fn, args, mode) or capture.trace(fn, args, fake_mode=mode)
            before = tuple(_facts_of(leaf) for leaf in _leaves(unit.gm))
            normalize(unit)
    except Exception as error:
        raise PatternError(
            f"{label}: tracing failed with sizes {dict(sample.sizes)} and {sample.dtype}: "
            f"{type(error).__name__}: {error}"
        ) from error
    return _read(label, unit.gm, input_names(signature, sample, absent), before, tuple(taken))


def _leaves(gm: fx.GraphModule) -> tuple[Any, ...]:
    (output,) = gm.graph.find_nodes(op="output")
    value = output.args[0]
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _facts_of(leaf: Any) -> tuple[Any, Any, Any]:
    value = leaf.meta.get("val") if isinstance(leaf, fx.Node) else None
    if not isinstance(value, torch.Tensor):
        return (None, None, None)
    return (value.dtype, tuple(value.shape), tuple(value.stride()))


def _read(
    label: str, gm: fx.GraphModule, names: tuple[str, ...], signature: tuple[Any, ...], taken: tuple[bool, ...]
) -> Traced:
    where: dict[fx.Node, Ref | Name] = {}
    calls: list[tuple[Any, tuple[Any, ...], tuple[int, ...] | None]] = []
    results: list[tuple[torch.dtype, tuple[int, ...]] | None] = []
    remaining = iter(names)

    def item(a: Any) -> Any:
        if isinstance(a, fx.Node):
            return where[a]
        return tuple(item(x) for x in a) if isinstance(a, (list, tuple)) else a

    for node in gm.graph.nodes:
        if node.op == "placeholder":
            where[node] = Name(next(remaining))
        elif node.op == "call_function":
            shape = tuple(node.meta["val"].shape) if node.target in SHAPED else None
            where[node] = Ref(len(calls))
            value = node.meta["val"]
            dense = isinstance(value, torch.Tensor) and value.layout == torch.strided
            results.append((value.dtype, tuple(value.shape)) if dense else None)
            calls.append((node.target, tuple(item(a) for a in canonical(node)), shape))
        elif node.op == "get_attr":
            raise PatternError(f"{label}: the function holds a tensor ({node.target}); make it a parameter or a number")
    outputs = tuple(item(leaf) for leaf in _leaves(gm))
    if any(not isinstance(o, (Ref, Name)) for o in outputs):
        raise PatternError(f"{label}: returns something that is not a tensor")
    return Traced(tuple(calls), outputs, signature, tuple(results), taken)


def used_inputs(traced: Traced) -> frozenset[str]:
    """The names of the inputs that the traced calls or outputs use."""
    found: set[str] = set()

    def look(a: Any) -> None:
        if isinstance(a, Name):
            found.add(a.name)
        elif isinstance(a, tuple):
            for x in a:
                look(x)

    for _, args, _ in traced.calls:
        look(args)
    look(traced.outputs)
    return frozenset(found)


def structure(traced: Traced) -> tuple[Any, ...]:
    """What must be equal for two traces to be one alternative: everything but numbers, dtypes, devices and sizes."""

    def mask(a: Any) -> Any:
        if isinstance(a, (Ref, Name)) or a is None or isinstance(a, (bool, str)):
            return a
        if isinstance(a, int):
            return "int"
        if isinstance(a, float):
            return "float"
        if isinstance(a, (torch.dtype, torch.device)):
            return type(a).__name__
        if isinstance(a, tuple):
            return "ints" if all(type(x) is int for x in a) else tuple(map(mask, a))
        return repr(a)

    calls = tuple(
        (op, tuple("shape" if op in SHAPED and i == 1 else mask(a) for i, a in enumerate(args)))
        for op, args, _ in traced.calls
    )
    return calls, traced.outputs
