"""``scaled_dot_product_attention`` in all its forms, as productions."""

from __future__ import annotations

from .grammar_masks import FLOATS, KINDS, additive, second
from .grammar_scores import BIASES
from .grammar_source import Writer

CALLS = ("keyword", "positional", "no_dropout", "contiguous")
NEAR_CALLS = ("mask_as_float", "dropout_all", "scale_zero", "scale_negative")  # something else, or nearly so


def sdpa(w: Writer) -> None:
    """One call; masks and biases become its ``attn_mask``."""
    axes = {"bsd": "bse", "hsd": "hse"}.get(w.order["q"], "bhse")
    w.order["scores"] = axes.replace("e", "t")
    q, k, v = (w.in_order(n, o) if len(axes) == 4 else n for n, o in (("q", "bhsd"), ("k", "bhtd"), ("v", "bhte")))
    if w.choices["call"] == "contiguous":
        q, k, v = (f"{x}.contiguous()" for x in (q, k, v))
    mask = _mask(w)
    if w.choices["call"] == "mask_as_float":
        mask = f"{mask}.to({w.dtype})"
    if w.choices["upcast"] == "all" and _adds(w):
        mask = f"{mask}.float()"
    scale = {"mul": ", scale=0.3", "math_sqrt": f", scale=1.0 / math.sqrt({w.D})"}.get(w.choices["scale"], "")
    scale = {"scale_zero": ", scale=0.0", "scale_negative": ", scale=-0.5"}.get(w.choices["call"], scale)
    gqa = ", enable_gqa=True" if w.choices["gqa"] == "enable_gqa" else ""
    causal = w.choices["mask"] == "is_causal"
    if w.choices["call"] == "positional":
        options = f", {mask}, 0.0, {causal}"
    else:
        options = ("" if mask == "None" else f", attn_mask={mask}") + (", is_causal=True" if causal else "")
        options += {"no_dropout": ", dropout_p=0.0", "dropout_all": ", dropout_p=1.0"}.get(w.choices["call"], "")
    w.set("y", f"F.scaled_dot_product_attention({q}, {k}, {v}{options}{scale}{gqa})", axes)


def multi_head(w: Writer) -> None:
    """torch.nn.MultiheadAttention's function, [S, B, E], which spells attention out where weights are asked for."""
    size = w.Hq * w.D
    w.inputs.clear()
    w.dynamic.clear()
    w.lines.clear()
    w.input("x", "sb", f"torch.randn(SHAPE, {size}, dtype=DTYPE)")
    key = "x"
    if w.Sq != w.Sk:
        key = w.input("context", "tb", f"torch.randn(SHAPE, {size}, dtype=DTYPE)")
    for name, shape in (("w_in", (3 * size, size)), ("b_in", (3 * size,)), ("w_out", (size, size)), ("b_out", (size,))):
        w.inputs[name] = f"torch.randn({', '.join(map(str, shape))}, dtype={w.dtype}) / 4"
    w.sizes_from = {"s": "x.shape[0]", "t": f"{key}.shape[0]"}
    w.order["scores"] = "bhst"
    mask = _mask(w)
    if mask != "None" and w.choices["mask"] not in FLOATS:
        mask = f"~{mask}"  # here True hides
    w.add(
        f"y, _ = F.multi_head_attention_forward(x, {key}, {key}, {size}, {w.Hq}, w_in, b_in, None, None, False, 0.0,"
        f" w_out, b_out, training=False, need_weights=True, attn_mask={mask})"
    )
    w.returned = ["y"]


def _mask(w: Writer) -> str:
    """The expression of ``attn_mask``."""
    kind = w.choices["mask"]
    KINDS[kind](w)
    mask = "None"
    if kind in FLOATS:
        mask = w.fitted("mask", w.order["mask"])
    elif kind not in ("none", "is_causal"):
        mask = w.fitted("keep", w.order["keep"])
        if w.choices["second_mask"] == "and":
            second(w)
            mask = f"{mask} & {w.fitted('present[:, None, None, :]', 'b11t')}"
        if _adds(w):
            w.add(f"keep = {mask}")
            additive(w, "keep")
            mask = "added"
    if w.choices["bias"] == "none":
        return mask
    w.begun = mask != "None"
    if w.begun:
        w.add(f"scores = {mask}")
    BIASES[w.choices["bias"]](w)
    return "scores"


def _adds(w: Writer) -> bool:
    """True if the mask of the call is a float one, which is added."""
    kind = w.choices["mask"]
    boolean = kind not in (*FLOATS, "none", "is_causal") and not w.choices["mask_form"].startswith("additive")
    return w.choices["bias"] != "none" or not (boolean or kind in ("none", "is_causal"))


__all__ = ["CALLS", "sdpa"]
