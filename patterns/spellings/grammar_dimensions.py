"""The dimensions of the grammar of attention, and which of their productions go together."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from ascend_dynamo.match.grammar import Needs

from .grammar_masks import FLOATS, FORMS, KINDS
from .grammar_operands import CACHES, GROUPS, LAYOUTS, NORMS, ROTARIES, UPCASTS
from .grammar_scores import BIASES, PRODUCTS, SCALES, SCALES_AFTER, SCALES_BEFORE, SOFTCAPS
from .grammar_sdpa import CALLS, NEAR_CALLS
from .grammar_weights import CASTS, DROPOUTS, HEAD_MASKS, OUTPUTS, SINKS, SOFTMAXES, VALUES
from .near_attention import TWISTS

DIMENSIONS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "core": ("eager", "sdpa", "multi_head"),
        "dtype": ("float32", "bfloat16", "float16"),
        "lengths": ("chunk", "self", "decode", "cross", "square", "one_key", "long"),
        "batch": ("several", "one"),
        "heads": ("several", "one"),
        "value_size": ("same", "other"),
        "dynamic": ("static", "batch", "sequence", "all"),
        "values": ("plain", "empty_row", "nan_query", "inf_query", "nan_key", "large"),
        "layout": tuple(LAYOUTS),
        "gqa": tuple(GROUPS),
        "qk_norm": tuple(NORMS),
        "rotary": tuple(ROTARIES),
        "cache": tuple(CACHES),
        "upcast": tuple(UPCASTS),
        "product": tuple(PRODUCTS),
        "scale": (*SCALES, *SCALES_BEFORE, *SCALES_AFTER),
        "softcap": tuple(SOFTCAPS),
        "bias": tuple(BIASES),
        "addition": ("plus", "commuted", "inplace", "torch_add"),
        "order": ("bias_first", "mask_first", "combined"),
        "mask": tuple(KINDS),
        "mask_form": FORMS,
        "fill": ("min", "inf", "small", "billion"),
        "second_mask": ("none", "and", "after"),
        "sinks": tuple(SINKS),
        "softmax": tuple(SOFTMAXES),
        "precision": ("dtype", "none", "float", "early"),
        "cast": CASTS,
        "dropout": tuple(DROPOUTS),
        "head_mask": tuple(HEAD_MASKS),
        "weighted": tuple(VALUES),
        "output": OUTPUTS,
        "call": (*CALLS, *NEAR_CALLS),
        "twist": ("none", *TWISTS),
    }
)


def _all_but(dimension: str, *productions: str) -> tuple[str, ...]:
    return tuple(p for p in DIMENSIONS[dimension] if p not in productions)


_FOUR = _all_but("layout", "three_axes", "unbatched")
_SPLIT = _all_but("layout", "three_axes", "unbatched", "bshd_kept", "sbhd_kept", "keys_transposed")
_CACHED = tuple(p for p in _SPLIT if p not in ("hidden", "projected_cross"))
_SELF = ("projected", *(p for p in LAYOUTS if p.startswith("packed")))
_BOOLEAN = tuple(p for p in KINDS if p not in (*FLOATS, "none", "is_causal"))
_INPUT_MASKS = (
    "keep",
    "keep_2d",
    "keep_heads",
    "padding",
    "causal_padding",
    "additive",
    "additive_2d",
    "additive_heads",
)
_OF_MULTI_HEAD = ("core", "mask", "lengths", "dtype", "heads", "batch")
_EAGER_ONLY = {
    "product": ("matmul",), "softcap": ("none",), "sinks": ("none",), "softmax": ("torch",), "precision": ("dtype",),
    "cast": ("to_q",), "dropout": ("none",), "head_mask": ("none",), "weighted": ("matmul",), "order": ("bias_first",),
    "twist": ("none",), "scale": ("mul", "none", "math_sqrt", *SCALES_BEFORE), "upcast": ("none", "all"),
    "gqa": _all_but("gqa", "broadcast", "grouped"), "second_mask": ("none", "and"),
    "addition": ("plus", "commuted", "torch_add"),
}  # fmt: skip

NEEDS = (
    Needs("core", ("sdpa",), _EAGER_ONLY),
    Needs("gqa", ("enable_gqa",), {"core": ("sdpa",)}),
    Needs("mask", ("is_causal",), {"core": ("sdpa",), "bias": ("none",)}),
    Needs("call", (*CALLS[1:], *NEAR_CALLS), {"core": ("sdpa",)}),
    Needs("call", ("mask_as_float",), {"mask": _BOOLEAN, "bias": ("none",), "mask_form": ("masked_fill",)}),
    Needs("call", ("dropout_all",), {"dynamic": ("static",)}),
    Needs("core", ("multi_head",),
          {d: (p[0],) for d, p in DIMENSIONS.items() if d not in _OF_MULTI_HEAD}),
    Needs("core", ("multi_head",),
          {"mask": ("none", "keep_2d", "tril", "arange_offset", "additive_2d", "triu_full")}),
    # layouts
    Needs("layout", ("three_axes",), {"heads": ("one",), "gqa": ("none",), "sinks": ("none",), "head_mask": ("none",),
                                      "mask": _all_but("mask", "keep_heads", "additive_heads"),
                                      "bias": _all_but("bias", "t5", "alibi", "alibi_relative")}),
    Needs("layout", ("unbatched",), {"batch": ("one",), "gqa": ("none",), "sinks": ("none",), "head_mask": ("none",),
                                     "dynamic": ("static", "sequence"),
                                     "weighted": ("matmul", "operator", "bmm", "einsum")}),
    Needs("layout", _SELF, {"lengths": ("self", "square", "long")}),
    Needs("layout", ("packed_unbind", "packed_by_head"), {"gqa": ("none",), "value_size": ("same",)}),
    Needs("layout", ("keys_transposed", "sbhd_kept"), {"gqa": ("none",)}),
    Needs("layout", ("bshd_kept",), {"gqa": ("none", "repeat_interleave", "grouped")}),
    Needs("rotary", ("halves", "pairs"), {"layout": _SPLIT}),
    Needs("cache", ("cat", "index_copy"), {"layout": _CACHED,
                                           "lengths": ("chunk", "self", "decode", "long"),
                                           "dynamic": ("static", "batch")}),
    # heads
    Needs("gqa", ("broadcast", "expand_one"), {"heads": ("one",)}),
    Needs("gqa", ("broadcast", "grouped"), {"product": _all_but("product", "bmm", "baddbmm", "baddbmm_bias",
                                                                "operator_permute"),
                                            "weighted": _all_but("weighted", "bmm", "flat")}),
    Needs("gqa", ("broadcast",), {"product": ("matmul", "matmul_positive", "operator_mt", "keys_first",
                                              "einsum_dots"),
                                  "weighted": ("matmul", "operator")}),
    Needs("gqa", ("grouped",), {"product": ("matmul", "matmul_positive", "operator_mt", "keys_first", "einsum",
                                            "einsum_keys_first", "einsum_letters")}),
    # products
    Needs("product", ("baddbmm", "baddbmm_bias", "einsum_dots", "operator_permute"), {"layout": _FOUR}),
    Needs("product", ("baddbmm", "baddbmm_bias"), {"upcast": ("none",), "dynamic": ("static",)}),
    Needs("product", ("einsum_heads_inside",), {"layout": _FOUR, "gqa": _all_but("gqa", "broadcast", "grouped"),
                                                "weighted": ("einsum",), "twist": ("none",),
                                                "bias": _all_but("bias", "two")}),
    Needs("weighted", ("flat",), {"layout": _FOUR, "head_mask": ("none",), "sinks": ("none",)}),
    Needs("softmax", ("deferred",), {"weighted": ("matmul", "operator", "bmm", "einsum"), "sinks": ("none",)}),
    Needs("weighted", ("einsum_merged",), {"layout": _FOUR}),
    # scale, bias, mask
    Needs("scale", ("after_mask",), {"softcap": ("none",)}),
    Needs("softcap", ("div_mul", "mul_mul", "commuted", "folded"), {"product": _all_but("product", "baddbmm_bias")}),
    Needs("second_mask", ("and",), {"mask": _BOOLEAN}),
    Needs("mask_form", FORMS[1:], {"mask": _BOOLEAN}),
    Needs("mask_form", ("additive_product",), {"fill": ("min", "billion")}),
    Needs("fill", ("inf", "small", "billion"), {"mask": (*_BOOLEAN, "additive", "additive_2d", "additive_heads")}),
    Needs("fill", ("small", "billion"), {"mask": _BOOLEAN}),
    Needs("fill", ("billion",), {"dtype": ("float32", "bfloat16")}),
    Needs("order", ("mask_first",), {"bias": _all_but("bias", "none"), "mask": _all_but("mask", "none", "is_causal")}),
    Needs("order", ("combined",), {"bias": _all_but("bias", "none"), "mask": FLOATS, "core": ("eager",),
                                   "addition": ("plus", "commuted", "torch_add")}),
    Needs("addition", ("commuted", "inplace", "torch_add"), {"bias": _all_but("bias", "none", "sub")}),
    Needs("values", ("empty_row",), {"mask": _INPUT_MASKS, "second_mask": ("none",)}),
    Needs("values", ("nan_key",), {"mask": ("none",), "second_mask": ("none",),
                                   "layout": ("bhsd", "bshd", "sbhd", "hidden")}),
    Needs("lengths", ("one_key",), {"values": ("plain", "nan_query", "large")}),
    Needs("mask", ("bart", "past_and_tril", "tril_rows", "cache_positions", "cache_positions_padding"),
          {"lengths": _all_but("lengths", "cross", "one_key")}),
    Needs("mask", ("vmapped", "vmapped_padding"), {"dynamic": ("static", "batch")}),
    Needs("mask", ("vmapped_padding", "cache_positions", "cache_positions_padding"),
          {"layout": _all_but("layout", "unbatched")}),
    Needs("mask", ("documents", "cumsum_padding"), {"lengths": _all_but("lengths", "cross", "one_key")}),
    Needs("mask", ("positions", "buffer"), {"lengths": _all_but("lengths", "cross", "one_key")}),
    Needs("mask", ("lengths", "padding", "causal_padding"), {"lengths": _all_but("lengths", "one_key")}),
    # weights
    Needs("sinks", tuple(SINKS)[1:], {"softmax": _all_but("softmax", "safe")}),
    # twists
    Needs("twist", ("value_transposed", "weights_transposed", "key_not_transposed"),
          {"lengths": ("square",), "cache": ("none",)}),
    Needs("twist", ("value_transposed", "value_flipped", "value_is_scores", "weights_transposed", "key_not_transposed",
                    "heads_mixed", "head_temperature", "key_is_value", "query_is_key"),
          {"layout": ("bhsd", "bshd", "sbhd", "hidden", "packed_split", "packed_slices"),
           "gqa": _all_but("gqa", "broadcast", "grouped"), "weighted": _all_but("weighted", "flat")}),
    Needs("twist", ("key_is_value", "value_transposed"), {"value_size": ("same",)}),
    Needs("twist", ("query_is_key",), {"lengths": ("self", "square", "long"), "cache": ("none",),
                                       "gqa": _all_but("gqa", "broadcast")}),
    Needs("twist", tuple(name for name in TWISTS if "written" in name), {"gqa": ("none",)}),
    Needs("twist", ("query_rounded", "value_rounded"), {"upcast": ("none",)}),
    Needs("twist", ("dropout_all",), {"dynamic": ("static",)}),
    Needs("qk_norm", ("rms",), {"layout": _all_but("layout", "keys_transposed")}),
    Needs("qk_norm", ("by_hand",), {"layout": _all_but("layout", "keys_transposed")}),
    Needs("output", ("sbh", "linear", "transposed", "contiguous", "flatten"), {"layout": _FOUR}),
)  # fmt: skip

NEAR = frozenset(
    {
        ("fill", "small"),
        ("fill", "billion"),
        *(("call", name) for name in NEAR_CALLS),
        *(("twist", name) for name in TWISTS),
    }
)
