"""The grammar of attention: every way that we know of to write it, and near-attention that must not be taken for it.

A spelling is written from its inputs to its output: operands, product, scale, soft cap, biases and masks, sinks,
softmax, weights, product with v, output; or in place of most of this one call of ``scaled_dot_product_attention``.
Productions are only ever added: ``grammar_productions.txt`` beside the tests holds all names.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

from ascend_dynamo.match.grammar import Grammar, Program

from .grammar_dimensions import DIMENSIONS, NEAR, NEEDS
from .grammar_masks import FLOATS, mask
from .grammar_operands import CACHES, GROUPS, LAYOUTS, NORMS, ROTARIES, UPCASTS, no_groups
from .grammar_scores import BIASES, PRODUCTS, SCALES, SCALES_AFTER, SCALES_BEFORE, SOFTCAPS
from .grammar_sdpa import multi_head, sdpa
from .grammar_source import Writer
from .grammar_weights import DROPOUTS, HEAD_MASKS, SINKS, SOFTMAXES, VALUES, cast, output
from .near_attention import twist


def write(choices: Mapping[str, str], rng: random.Random) -> Program:
    """The program of some choices, which go together."""
    w = Writer(choices, rng)
    LAYOUTS[choices["layout"]](w)
    _values(w)
    NORMS[choices["qk_norm"]](w)
    ROTARIES[choices["rotary"]](w)
    CACHES[choices["cache"]](w)
    GROUPS[choices["gqa"]](w)
    UPCASTS[choices["upcast"]](w)
    twist(w, "operands")
    SCALES_BEFORE.get(choices["scale"], no_groups)(w)
    if choices["core"] == "multi_head":
        multi_head(w)
        return w.program()
    if choices["core"] == "sdpa":
        sdpa(w)
    else:
        _scores(w)
        _weights(w)
    output(w)
    twist(w, "output")
    if choices["dtype"] == "float16" and choices["fill"] == "min" and _adds(choices):
        w.why_near = "the lowest float16 is not so low that adding to it changes nothing"
    return w.program()


def _adds(choices: Mapping[str, str]) -> bool:
    """True if something is added to scores that a mask may fill too."""
    float_mask = choices["mask"] in FLOATS or choices["mask_form"].startswith("additive")
    biased = choices["bias"] != "none" or choices["product"] == "baddbmm_bias"
    return biased or (float_mask and choices["second_mask"] == "after")


def _values(w: Writer) -> None:
    """Numbers that are not ordinary, in the first input or in k."""
    form = w.choices["values"]
    name = "k" if form == "nan_key" else next(iter(w.inputs))
    if form in ("nan_query", "inf_query", "nan_key"):
        last = w.B - 1 if w.order.get(name, "b").startswith("b") else 0
        value = "math.inf" if form == "inf_query" else "math.nan"
        w.inputs[name] += f".index_fill(0, torch.tensor([{last}]), {value})"
    elif form == "large":
        w.inputs[name] += " * 16.0"


def _scores(w: Writer) -> None:
    choices = w.choices
    PRODUCTS[choices["product"]](w)
    if choices["precision"] == "early":
        w.set("scores", "scores.float()")
    twist(w, "product")
    SCALES.get(choices["scale"], no_groups)(w)
    SOFTCAPS[choices["softcap"]](w)
    if choices["order"] == "combined":
        w.add("products = scores")
        w.begun = False
    if choices["order"] == "mask_first":
        mask(w)
        BIASES[choices["bias"]](w)
    else:
        BIASES[choices["bias"]](w)
        mask(w)
    if choices["order"] == "combined":
        w.set("scores", "products + scores")
    SCALES_AFTER.get(choices["scale"], no_groups)(w)
    twist(w, "scores")


def _weights(w: Writer) -> None:
    choices = w.choices
    SINKS[choices["sinks"]](w)
    if choices["weighted"] == "flat":
        w.set("scores", f"scores.reshape(b * {w.Hq}, s, t)", "xst")
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


ATTENTION = Grammar("attention", "flash_attention", DIMENSIONS, write, NEEDS, NEAR, frozenset({"dynamic", "values"}))
