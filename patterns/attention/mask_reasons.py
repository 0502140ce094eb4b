"""Why a mask is not proven, in words."""

from __future__ import annotations

from typing import Any

from torch import fx

from ascend_dynamo.contracts import Facts

from .index_algebra import Element, Quotient

FEW = 3


def reason(facts: Facts, unknown: Any) -> str:
    """One sentence about a value that the evaluator does not know."""
    if isinstance(unknown, Quotient):
        return f"it compares quotients of indices (chunks of {unknown.by})"
    if not isinstance(unknown, Element):
        return "it adds numbers that depend on the position"
    n = unknown.node
    sources = _inputs(n)
    if sources:
        names = ", ".join(f"%{s.name}" for s in sources[:FEW]) + (", ..." if len(sources) > FEW else "")
        return f"it depends on the values of {names}"
    if n.op == "get_attr":
        return f"%{n.name} is a constant that is no function of its indices"
    return f"no rule says what %{n.name} ({n.target}) is"


def _inputs(n: fx.Node) -> list[fx.Node]:
    """The placeholders of tensors that ``n`` is computed from, in the order in which they are met."""
    found: dict[fx.Node, None] = {}
    seen = {n}
    todo = [n]
    while todo and len(seen) < 200:
        m = todo.pop()
        if m.op == "placeholder" and hasattr(m.meta.get("val"), "dtype"):
            found[m] = None
        for i in m.all_input_nodes:
            if i not in seen:
                seen.add(i)
                todo.append(i)
    return list(found)
