"""Cache writes that AOTAutograd made functional become the value-semantics twins of the dialect.

``kv_write`` and ``mla_kv_write`` of whole caches are ``kv_write_functional`` and ``mla_kv_write_functional``: functions
of their arguments, which patterns can read. Everything else (a part of a stacked buffer, two caches in one, other
mutating operators) stays the opaque call that it was; ``passes/reinplace.py`` reads that too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from ascend_dynamo.ir.functionalized import read_functionalized
from ascend_dynamo.normalize.layout import Rule
from ascend_dynamo.normalize.work import Value, Work

_ascend = torch.ops.ascend
TWINS: Mapping[Any, Any] = {
    _ascend.kv_write.default: _ascend.kv_write_functional.default,
    _ascend.mla_kv_write.default: _ascend.mla_kv_write_functional.default,
}


def _twin(w: Work, n: fx.Node) -> Value | None:
    """The call is renamed, and its results are renumbered: what was behind the operator's own (none) comes first."""
    call = read_functionalized(n)
    twin = None if call is None else TWINS.get(call.op)
    if call is None or twin is None:
        return None
    views = [v for v in call.views.values() if v is not None]
    bases = [v.base for v in views]
    if any(v.kind != "whole" for v in views) or len(set(bases)) < len(bases):
        return None
    given = {**call.plain, **{name: call.bases[v.base] for name, v in call.views.items() if v is not None}}
    if any(n not in given for n in (a.name for a in twin._schema.arguments if not a.has_default_value())):
        return None
    for user in list(n.users):
        index: Any = user.args[1]
        if index >= call.first:
            user.args = (n, bases.index(index - call.first))
    values = n.meta["val"]
    n.meta["val"] = [values[call.first + b] for b in bases]
    n.meta.pop("promised_strides", None)
    n.target = twin
    arguments = twin._schema.arguments
    n.args = tuple(given[a.name] for a in arguments if not a.kwarg_only)
    n.kwargs = {a.name: given[a.name] for a in arguments if a.kwarg_only and given.get(a.name) is not None}
    w.changed += 1
    return None


RULES: Mapping[Any, Rule] = {
    torch.ops.higher_order.auto_functionalized: _twin,
    torch.ops.higher_order.auto_functionalized_v2: _twin,
}
