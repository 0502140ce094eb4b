"""The built-in patterns, one fusion per file, found by entry point like any plugin's."""

from __future__ import annotations

from ascend_dynamo.match import Registry

from . import (
    add_layer_norm,
    add_rms_norm,
    aten_rms_norm,
    bias_gelu,
    gelu,
    gelu_add,
    gelu_mul,
    kv_append,
    layer_norm,
    merge_linears,
    mla_absorb,
    mla_paged,
    moe_experts,
    moe_gate,
    moe_loop,
    paged_attention,
    rms_norm,
    rotary,
    rotary_complex,
    rotary_halves,
    rotary_partial,
    silu,
    swiglu,
)
from .attention import eager, sdpa

# Read in this order: what raises ATen to the dialect, then what fuses inside the dialect.
_FILES = (
    sdpa,
    eager,
    rms_norm,
    aten_rms_norm,
    layer_norm,
    gelu,
    silu,
    rotary,
    rotary_halves,
    rotary_complex,
    rotary_partial,
    merge_linears,
    paged_attention,
    mla_paged,
    mla_absorb,
    kv_append,
    moe_gate,
    moe_experts,
    moe_loop,
    swiglu,
    add_rms_norm,
    add_layer_norm,
    gelu_add,
    gelu_mul,
    bias_gelu,
)


def registry() -> Registry:
    """All built-in patterns. A value: combine with ``+``, ``.without(names)``, ``.only(names)``."""
    return Registry([pattern for file in _FILES for pattern in file.PATTERNS])
