"""The grammar of attention: every way that we know of to write it, and near-attention that must not be taken for it.

A spelling is written from its inputs to its output: operands, product, scale, soft cap, biases and masks, sinks,
softmax, weights, product with v, output; or in place of most of this one call of ``scaled_dot_product_attention``.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from types import MappingProxyType

from ascend_dynamo.match.grammar import Grammar, Needs, Program

from .grammar_masks import FLOATS, FORMS, KINDS, mask
from .grammar_operands import GROUPS, LAYOUTS, NORMS, UPCASTS
from .grammar_scores import BIASES, PRODUCTS, SCALES, SCALES_AFTER, SCALES_BEFORE, SOFTCAPS
from .grammar_sdpa import CALLS, sdpa
from .grammar_source import Writer
from .grammar_weights import CASTS, DROPOUTS, HEAD_MASKS, OUTPUTS, SINKS, SOFTMAXES, VALUES, cast, output
from .near_attention import TWISTS, twist

DIMENSIONS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "core": ("eager", "sdpa"),
        "dtype": ("float32", "bfloat16"),
        "lengths": ("chunk", "self", "decode", "cross", "square", "one_key", "long"),
        "batch": ("several", "one"),
        "heads": ("several", "one"),
        "value_size": ("same", "other"),
        "dynamic": ("static", "batch", "sequence", "all"),
        "values": ("plain", "empty_row", "nan_query"),
        "layout": tuple(LAYOUTS),
        "gqa": tuple(GROUPS),
        "qk_norm": tuple(NORMS),
        "upcast": tuple(UPCASTS),
        "product": tuple(PRODUCTS),
        "scale": (*SCALES, *SCALES_BEFORE, *SCALES_AFTER),
        "softcap": tuple(SOFTCAPS),
        "bias": tuple(BIASES),
        "addition": ("plus", "commuted", "inplace", "torch_add"),
        "order": ("bias_first", "mask_first"),
        "mask": tuple(KINDS),
        "mask_form": FORMS,
        "fill": ("min", "inf", "small", "billion"),
        "second_mask": ("none", "and", "after"),
        "sinks": tuple(SINKS),
        "softmax": tuple(SOFTMAXES),
        "precision": ("dtype", "none", "float"),
        "cast": CASTS,
        "dropout": tuple(DROPOUTS),
        "head_mask": tuple(HEAD_MASKS),
        "weighted": tuple(VALUES),
        "output": OUTPUTS,
        "call": CALLS,
        "twist": ("none", *TWISTS),
    }
)


def _all_but(dimension: str, *productions: str) -> tuple[str, ...]:
    return tuple(p for p in DIMENSIONS[dimension] if p not in productions)


_FOUR = _all_but("layout", "three_axes")
_KEPT = ("bshd_kept", "sbhd_kept", "keys_transposed", "three_axes")
_PACKED = tuple(p for p in LAYOUTS if p.startswith("packed"))
_REPEATED = (
    "repeat_kv",
    "repeat_interleave",
    "unsqueeze_expand_flatten",
    "unsqueeze_repeat",
    "index_heads",
    "expand_one",
)
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
    Needs("mask", ("is_causal",), {"core": ("sdpa",)}),
    Needs("call", CALLS[1:], {"core": ("sdpa",)}),
    # layouts
    Needs("layout", ("three_axes",), {"heads": ("one",), "gqa": ("none",), "sinks": ("none",), "head_mask": ("none",),
                                      "mask": _all_but("mask", "keep_heads", "additive_heads"),
                                      "bias": _all_but("bias", "t5", "alibi", "alibi_relative")}),
    Needs("layout", _PACKED, {"lengths": ("self", "square", "long")}),
    Needs("layout", ("packed_unbind", "packed_by_head"), {"gqa": ("none",), "value_size": ("same",)}),
    Needs("layout", ("keys_transposed", "sbhd_kept"), {"gqa": ("none",)}),
    Needs("layout", ("bshd_kept",), {"gqa": ("none", "repeat_interleave", "grouped")}),
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
    Needs("product", ("baddbmm", "baddbmm_bias"), {"upcast": ("none",)}),
    Needs("weighted", ("flat",), {"layout": _FOUR, "head_mask": ("none",), "sinks": ("none",)}),
    Needs("weighted", ("einsum_merged",), {"layout": _FOUR}),
    # scale, bias, mask
    Needs("scale", ("after_mask",), {"softcap": ("none",)}),
    Needs("softcap", ("div_mul", "mul_mul", "commuted"), {"product": _all_but("product", "baddbmm_bias")}),
    Needs("second_mask", ("and",), {"mask": _BOOLEAN}),
    Needs("mask_form", FORMS[1:], {"mask": _BOOLEAN}),
    Needs("mask_form", ("additive_product",), {"fill": ("min", "billion")}),
    Needs("fill", ("inf", "small", "billion"), {"mask": (*_BOOLEAN, "additive", "additive_2d", "additive_heads")}),
    Needs("fill", ("small", "billion"), {"mask": _BOOLEAN}),
    Needs("order", ("mask_first",), {"bias": _all_but("bias", "none"), "mask": _all_but("mask", "none", "is_causal")}),
    Needs("addition", ("commuted", "inplace", "torch_add"), {"bias": _all_but("bias", "none", "sub")}),
    Needs("values", ("empty_row",), {"mask": _INPUT_MASKS, "second_mask": ("none",)}),
    Needs("lengths", ("one_key",), {"values": ("plain", "nan_query")}),
    Needs("mask", ("documents", "cumsum_padding"), {"lengths": _all_but("lengths", "cross", "one_key")}),
    Needs("mask", ("positions", "buffer"), {"lengths": _all_but("lengths", "cross", "one_key")}),
    Needs("mask", ("lengths", "padding", "causal_padding"), {"lengths": _all_but("lengths", "one_key")}),
    # weights
    Needs("sinks", tuple(SINKS)[1:], {"softmax": _all_but("softmax", "safe")}),
    # twists
    Needs("twist", ("value_transposed", "weights_transposed", "key_not_transposed"), {"lengths": ("square",)}),
    Needs("twist", ("value_transposed", "value_flipped", "value_is_scores", "weights_transposed", "key_not_transposed",
                    "heads_mixed", "head_temperature", "key_is_value", "query_is_key"),
          {"layout": ("bhsd", "bshd", "sbhd", "hidden", "packed_split", "packed_slices"),
           "gqa": _all_but("gqa", "broadcast", "grouped"), "weighted": _all_but("weighted", "flat")}),
    Needs("twist", ("key_is_value", "value_transposed"), {"value_size": ("same",)}),
    Needs("twist", ("query_is_key",), {"lengths": ("self", "square", "long"), "gqa": _all_but("gqa", "broadcast")}),
    Needs("twist", tuple(name for name in TWISTS if "written" in name), {"gqa": ("none",)}),
    Needs("twist", ("query_rounded", "value_rounded"), {"upcast": ("none",)}),
    Needs("twist", ("dropout_all",), {"dynamic": ("static",)}),
    Needs("qk_norm", ("rms",), {"layout": _all_but("layout", "keys_transposed")}),
    Needs("output", ("sbh", "linear", "transposed", "contiguous", "flatten"), {"layout": _FOUR}),
)  # fmt: skip

NEAR = frozenset({("fill", "small"), ("fill", "billion"), *(("twist", name) for name in TWISTS)})


def write(choices: Mapping[str, str], rng: random.Random) -> Program:
    """The program of some choices, which go together."""
    w = Writer(choices, rng)
    LAYOUTS[choices["layout"]](w)
    if choices["values"] == "nan_query":
        name = next(iter(w.inputs))
        w.inputs[name] += (
            f".index_fill(0, torch.tensor([{w.B - 1 if w.order.get(name, 'b')[0] == 'b' else 0}]), math.nan)"
        )
    NORMS[choices["qk_norm"]](w)
    GROUPS[choices["gqa"]](w)
    UPCASTS[choices["upcast"]](w)
    twist(w, "operands")
    SCALES_BEFORE.get(choices["scale"], _nothing)(w)
    if choices["core"] == "sdpa":
        sdpa(w)
    else:
        _eager(w)
    output(w)
    twist(w, "output")
    return w.program()


def _nothing(w: Writer) -> None:
    pass


def _eager(w: Writer) -> None:
    choices = w.choices
    PRODUCTS[choices["product"]](w)
    twist(w, "product")
    SCALES.get(choices["scale"], _nothing)(w)
    SOFTCAPS[choices["softcap"]](w)
    if choices["order"] == "mask_first":
        mask(w)
        BIASES[choices["bias"]](w)
    else:
        BIASES[choices["bias"]](w)
        mask(w)
    SCALES_AFTER.get(choices["scale"], _nothing)(w)
    twist(w, "scores")
    SINKS[choices["sinks"]](w)
    if choices["weighted"] == "flat":
        w.set("scores", f"scores.view(b * {w.Hq}, s, t)", "xst")
    if not twist(w, "softmax"):
        SOFTMAXES[choices["softmax"]](w)
    if choices["sinks"] != "none":
        w.add("p = p[..., 1:]" if choices["sinks"] == "sinks_first" else "p = p[..., :-1]")
    cast(w)
    DROPOUTS[choices["dropout"]](w)
    HEAD_MASKS[choices["head_mask"]](w)
    twist(w, "weights")
    if not twist(w, "weighted"):
        VALUES[choices["weighted"]](w)


ATTENTION = Grammar("attention", "flash_attention", DIMENSIONS, write, NEEDS, NEAR, frozenset({"dynamic"}))
