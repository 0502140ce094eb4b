"""The closed list of operators, registered when this module is first imported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from ascend_dynamo.dialect import (
    activation,
    attention,
    distributed,
    fused_quant,
    kv_append,
    kv_functional,
    kv_pages,
    kv_reserve,
    mla,
    moe,
    norm,
    paged,
    quant,
    rotary,
)
from ascend_dynamo.dialect.library import define
from ascend_dynamo.dialect.spec import NAMESPACE, OpSpec

_FAMILIES = (
    norm,
    activation,
    rotary,
    attention,
    paged,
    kv_append,
    kv_functional,
    kv_pages,
    mla,
    moe,
    quant,
    fused_quant,
    distributed,
)

SPECS: Mapping[str, OpSpec] = MappingProxyType({spec.name: spec for family in _FAMILIES for spec in family.SPECS})
"""Every operator of the dialect by name; immutable."""

for _spec in SPECS.values():
    define(_spec)


HOST_OPS = (kv_reserve.OP,)
"""Bookkeeping on the host: registered like the others, but without a meaning in ATen, so every target runs it."""


def is_dialect_op(target: Any) -> bool:
    """True for ``torch.ops.ascend.<name>.default`` of a registered operator."""
    return getattr(target, "namespace", None) == NAMESPACE and target._opname in SPECS


def spec_of(target: Any) -> OpSpec:
    """The spec of an operator given as ``torch.ops.ascend.<name>.default`` or ``torch.ops.ascend.<name>``.

    Raises:
        KeyError: not an operator of the dialect; the message lists them.
    """
    namespace, _, rest = str(target).partition(".")
    name = rest.partition(".")[0]
    if namespace != NAMESPACE or name not in SPECS:
        raise KeyError(f"{target} is not an operator of the {NAMESPACE} dialect, which has {', '.join(SPECS)}")
    return SPECS[name]


def reference_of(target: Any) -> Callable[..., Any]:
    """The ATen callable that an operator means; takes the operator's arguments. Raises KeyError as ``spec_of``."""
    return spec_of(target).reference
