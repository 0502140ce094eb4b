"""Adding nodes to a graph: values, provenance, prologue inputs, and traced rewrites."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from ascend_dynamo import _torch_compat as compat
from ascend_dynamo.contracts import GraphUnit
from ascend_dynamo.errors import PatternError
from ascend_dynamo.ir.facts import PROLOGUE, GraphFacts
from ascend_dynamo.ir.fakes import fake_mode_of
from ascend_dynamo.ir.provenance import copy_provenance
from ascend_dynamo.ir.transforms import transform as find_transform


@dataclass(frozen=True)
class _Template:
    """A traced and normalised rewrite: its graph's inputs, calls and outputs."""

    inputs: tuple[fx.Node, ...]
    calls: tuple[fx.Node, ...]
    outputs: tuple[Any, ...]
    module: fx.GraphModule


class GraphBuilder:
    """Adds nodes in front of ``before``; every new node gets a fake value and the provenance of ``origin``.

    ``new_nodes`` lists what was added, in program order, and ``erase`` takes all of it out again.
    """

    def __init__(self, unit: GraphUnit, facts: GraphFacts, before: fx.Node, origin: fx.Node | None = None) -> None:
        self.unit = unit
        self.facts = facts
        self.before = before
        self.origin = origin
        self.new_nodes: list[fx.Node] = []
        self._new_prologue: list[fx.Node] = []

    def op(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Add a call. SymInt arguments become nodes. Raises what the operator's fake kernel raises."""
        args = self._arguments(args)
        kwargs = self._arguments(kwargs)
        return self._call(target, args, kwargs, self.facts.fakes.run(target, args, kwargs))

    def call(
        self, target: Callable[..., Any], args: Any, kwargs: Any, shape: tuple[Any, ...], dtype: torch.dtype
    ) -> fx.Node:
        """``op`` for a caller who knows dtype and shape of the result: no fake kernel is run.

        At least one argument is a tensor, on whose device the result is.
        """
        args, kwargs = self._arguments(args), self._arguments(kwargs)
        values = [n.meta["val"] for n in pytree.tree_leaves((args, kwargs)) if isinstance(n, fx.Node)]
        like = next(v for v in pytree.tree_leaves(values) if isinstance(v, torch.Tensor))
        return self._call(target, args, kwargs, self.facts.fakes.tensor(shape, like, dtype))

    def prologue(self, transform: str, *params: fx.Node) -> fx.Node:
        """The placeholder that holds ``transform(*params)``, the same one for the same parameters.

        ``params`` are parameters, buffers, or results of an earlier ``prologue``.

        Raises:
            PatternError: an argument is not known before the model runs, or there is no such transform.
        """
        made = find_transform(transform)
        for p in params:
            if not self.facts.is_static(p):
                raise PatternError(
                    f"prologue({transform!r}): %{p.name} is not a parameter or buffer of the model; "
                    "check facts.is_param(n) before asking for a prologue value"
                )
        pro = self.unit.prologue.graph
        (output,) = pro.find_nodes(op="output")
        results = list(output.args[0])  # type: ignore[arg-type]
        inside = tuple(self._prologue_value(p, results) for p in params)
        holders = [n for n in self.unit.gm.graph.find_nodes(op="placeholder") if PROLOGUE in n.meta]
        for holder, result in zip(holders, results, strict=True):
            if result.target is made.fn and tuple(result.args) == inside:
                return holder
        with pro.inserting_before(output):
            result = pro.call_function(made.fn, inside)
        value = self.facts.fakes.run(made.fn, params, {})
        result.meta["val"] = value
        output.args = ((*results, result),)
        self.unit.prologue.recompile()
        holder = self._placeholder(f"prologue_{len(results)}")
        holder.meta["val"] = value
        owners = [p.meta[PROLOGUE][1] if PROLOGUE in p.meta else (p.name,) for p in params]
        holder.meta[PROLOGUE] = (transform, tuple(n for names in owners for n in names))
        self._new_prologue.append(holder)
        return holder

    def trace(self, fn: Callable[..., Any], *args: Any) -> tuple[fx.Node, ...]:
        """Add the calls that ``fn(*args)`` makes, in normal form; returns its outputs.

        ``args`` are nodes (of tensors or sizes) or literals. ``fn`` is traced once per metadata of its arguments.
        """
        key = (fn, self.facts.fakes.key(args))
        template = self.facts.templates.get(key)
        if template is None:
            self.facts.templates[key] = template = _make_template(fn, args, self.facts.fake_mode)
        given = [a for a in args if isinstance(a, fx.Node) and isinstance(a.meta["val"], torch.Tensor)]
        env: dict[fx.Node, Any] = dict(zip(template.inputs, given, strict=True))
        for call in template.calls:
            value = call.meta.get("val")
            if isinstance(value, (int, torch.SymInt)):
                env[call] = self.facts.sizes.emit(value, self.before)
            elif call.op == "get_attr":
                env[call] = self._constant(template.module, call)
            else:
                call_args = self._arguments(fx.node.map_arg(call.args, env.__getitem__))
                call_kwargs = self._arguments(fx.node.map_arg(call.kwargs, env.__getitem__))
                env[call] = self._call(call.target, call_args, call_kwargs, value)  # type: ignore[arg-type]
        return tuple(env[o] if isinstance(o, fx.Node) else o for o in template.outputs)

    def erase(self) -> None:
        """Take out everything that this builder added (nodes that others use by now must be freed first)."""
        for node in reversed(self.new_nodes):
            self.unit.gm.graph.erase_node(node)
        self.new_nodes.clear()
        for holder in reversed(self._new_prologue):
            self._drop_prologue(holder)
        self._new_prologue.clear()

    def _call(self, target: Callable[..., Any], args: Any, kwargs: Any, value: Any) -> fx.Node:
        graph = self.unit.gm.graph
        with graph.inserting_before(self.before):
            node = graph.call_function(target, args, kwargs)
        node.meta["val"] = value
        copy_provenance(self.origin, node)
        self.new_nodes.append(node)
        self.facts.added(node)
        return node

    def _arguments(self, args: Any) -> Any:
        """Replace SymInts by nodes."""
        if isinstance(args, torch.SymInt):
            return self.facts.sizes.emit(args, self.before)
        if isinstance(args, (tuple, list)):
            return type(args)(self._arguments(a) for a in args)
        if isinstance(args, dict):
            return {k: self._arguments(a) for k, a in args.items()}
        return args

    def _constant(self, module: fx.GraphModule, node: fx.Node) -> fx.Node:
        gm = self.unit.gm
        value = getattr(module, str(node.target))
        name, i = str(node.target), 0
        while hasattr(gm, name) and getattr(gm, name) is not value:
            name, i = f"_ascend_constant{i}", i + 1
        if not hasattr(gm, name):
            gm.register_buffer(name, value, persistent=False)
        with gm.graph.inserting_before(self.before):
            new = gm.graph.get_attr(name)
        new.meta["val"] = node.meta.get("val", value)
        self.new_nodes.append(new)
        return new

    def _prologue_value(self, param: fx.Node, results: list[Any]) -> fx.Node:
        graph = self.unit.gm.graph
        if PROLOGUE in param.meta:
            holders = [n for n in graph.find_nodes(op="placeholder") if PROLOGUE in n.meta]
            return results[holders.index(param)]
        pro = self.unit.prologue.graph
        placeholders = pro.find_nodes(op="placeholder")
        for p in placeholders:
            if p.target == param.target:
                return p
        where = pro.inserting_after(placeholders[-1]) if placeholders else pro.inserting_before(next(iter(pro.nodes)))
        with where:
            new = pro.placeholder(str(param.target))
        new.meta["val"] = param.meta["val"]
        return new

    def _placeholder(self, name: str) -> fx.Node:
        graph = self.unit.gm.graph
        placeholders = graph.find_nodes(op="placeholder")
        with graph.inserting_after(placeholders[-1]):
            return graph.placeholder(name)

    def _drop_prologue(self, holder: fx.Node) -> None:
        """Only the newest prologue value can go: later ones would lose their place."""
        pro = self.unit.prologue.graph
        (output,) = pro.find_nodes(op="output")
        *rest, result = output.args[0]  # type: ignore[misc]
        output.args = (tuple(rest),)
        pro.erase_node(result)
        for p in pro.find_nodes(op="placeholder"):
            if not p.users:
                pro.erase_node(p)
        self.unit.prologue.recompile()
        self.unit.gm.graph.erase_node(holder)


def _make_template(fn: Callable[..., Any], args: tuple[Any, ...], mode: Any) -> _Template:
    from ascend_dynamo.capture import trace
    from ascend_dynamo.normalize import normalize

    values = fx.node.map_arg(args, lambda n: n.meta["val"])
    with compat.no_new_guards(compat.shape_env_of(mode)):
        unit = trace(fn, values, fake_mode=mode)
        normalize(unit)
    graph = unit.gm.graph
    (output,) = graph.find_nodes(op="output")
    calls = tuple(n for n in graph.nodes if n.op in ("call_function", "get_attr"))
    assert mode is None or fake_mode_of(unit.gm) in (mode, None)
    return _Template(tuple(graph.find_nodes(op="placeholder")), calls, tuple(pytree.tree_leaves(output.args)), unit.gm)
