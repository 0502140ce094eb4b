"""Productions of masks: which keys a query may see, how that is written, and how it gets onto the scores."""

from __future__ import annotations

from types import MappingProxyType

from .grammar_operands import Production
from .grammar_random_masks import random_blocks, random_bounds, random_formula
from .grammar_scores import add
from .grammar_source import Writer

# Every kind leaves a boolean ``keep`` (True: visible) and its axes in ``w.order``, or, for the float ones, ``mask``.


def _rows(w: Writer, axes: str) -> str:
    """Which rows have a key: all, unless this spelling is to have one without."""
    if w.choices["values"] == "empty_row":
        rows = {"s": f"torch.arange({w.Sq})[:, None] > 0", "b": f"torch.arange({w.B}).view(-1, 1, 1, 1) > 0"}
        return f" & ({rows['s' if 's' in axes else 'b']})"
    return f" | (torch.arange({w.Sk}) == 0)"


def _keep(axes: str) -> Production:
    def write(w: Writer) -> None:
        shape = ", ".join(str(w.size(a)) for a in axes)
        w.input("keep", axes, f"(torch.rand({shape}) < 0.7){_rows(w, axes)}")
        w.order["keep"] = axes

    return write


def _computed(expression: str, axes: str = "st") -> Production:
    def write(w: Writer) -> None:
        w.set("keep", expression, axes)

    return write


def _padding_input(w: Writer) -> None:
    """[B, T], 1 where there is a token; the first has one, or the first sequence has none."""
    some = (
        f"& (torch.arange({w.B})[:, None] > 0)"
        if w.choices["values"] == "empty_row"
        else f"| (torch.arange({w.Sk}) == 0)"
    )
    w.input("padding", "bt", f"((torch.rand(SHAPE) < 0.7) {some}).long()")


def padding(w: Writer) -> None:
    _padding_input(w)
    w.set("keep", "padding[:, None, None, :].bool()", "b11t")


def lengths(w: Writer) -> None:
    w.input("length", "b", f"torch.randint(1, {w.Sk + 1}, (SHAPE,))")
    w.set("keep", "(torch.arange(t)[None, :] < length[:, None])[:, None, None, :]", "b11t")


def causal_padding(w: Writer) -> None:
    _padding_input(w)
    w.add("causal = torch.arange(t)[None, :] <= torch.arange(s)[:, None] + (t - s)")
    w.set("keep", "causal[None, None] & padding[:, None, None, :].bool()", "b1st")


def buffer(w: Writer) -> None:
    """GPT-2: a triangle of all positions, kept as a buffer."""
    n = w.Sk + 3
    w.inputs["triangle"] = f"torch.tril(torch.ones({n}, {n}, dtype=torch.bool)).view(1, 1, {n}, {n})"
    w.set("keep", "triangle[:, :, t - s : t, :t]", "11st")


def positions(w: Writer) -> None:
    """Static caches: the position of each query is an input."""
    w.inputs["position"] = f"torch.arange({w.Sk - w.Sq}, {w.Sk})"
    if "s" in {"sequence": "st", "all": "bst"}.get(w.choices["dynamic"], ""):
        w.dynamic["position"] = (0,)
    w.set("keep", "torch.arange(t)[None, :] <= position[:, None]", "st")


def documents(w: Writer) -> None:
    """Packed sequences: a query sees its own document."""
    w.input("ids", "bt", "torch.randint(0, 2, (SHAPE,)).sort().values")
    w.set("keep", "(ids[:, :, None] == ids[:, None, :])[:, None, -s:]", "b1st")


def cumsum_padding(w: Writer) -> None:
    """Positions of the tokens that are there; a query sees keys up to its own position."""
    _padding_input(w)
    w.add("position = padding.cumsum(-1) - 1")
    w.set("keep", "((position[:, None, :] <= position[:, :, None]) & padding[:, None, :].bool())[:, None, -s:]", "b1st")


def vmapped(w: Writer) -> None:
    """transformers' mask utilities: one rule for (query, key), vmapped over both."""
    w.add("def rule(i, j):", "    return j <= i + (t - s)", "")
    w.set("keep", "torch.vmap(torch.vmap(rule, (None, 0)), (0, None))(torch.arange(s), torch.arange(t))", "st")


def vmapped_padding(w: Writer) -> None:
    """The same with padding: vmapped over batches, heads, queries and keys."""
    _padding_input(w)
    w.add("present = padding.bool()", "", "def rule(n, h, i, j):", "    return (j <= i + (t - s)) & present[n, j]", "")
    w.add("for dims in ((None, None, None, 0), (None, None, 0, None), (None, 0, None, None), (0, None, None, None)):")
    w.add("    rule = torch.vmap(rule, in_dims=dims, out_dims=0)")
    w.set("keep", "rule(torch.arange(b), torch.arange(1), torch.arange(s), torch.arange(t))", "b1st")


def _float(axes: str) -> Production:
    """A mask that is added: 0 where visible."""

    def write(w: Writer) -> None:
        _keep(axes)(w)
        boolean = w.inputs.pop("keep")
        fill = "-math.inf" if w.choices["fill"] == "inf" else f"torch.finfo({w.dtype}).min"
        shape = ", ".join(str(w.size(a)) for a in axes)
        w.inputs["mask"] = f"torch.zeros({shape}, dtype={w.dtype}).masked_fill(~({boolean}), {fill})"
        w.dynamic["mask"] = w.dynamic.pop("keep")
        w.order["mask"] = axes

    return write


def triu_full(w: Writer) -> None:
    """Llama's original: the upper triangle of -inf."""
    w.set("mask", f"torch.triu(torch.full((s, t), -math.inf, dtype={w.dtype}), diagonal=t - s + 1)", "st")


def bart(w: Writer) -> None:
    """BART, Whisper: lowest everywhere, then 0 where a position is not behind; past keys are all visible."""
    w.add(f"mask = torch.full((s, s), torch.finfo({w.dtype}).min, dtype={w.dtype})", "place = torch.arange(s)")
    w.add("mask.masked_fill_(place < (place + 1).view(s, 1), 0)")
    w.set("mask", f"torch.cat([torch.zeros(s, t - s, dtype={w.dtype}), mask], dim=-1)", "st")


def _cache_positions(w: Writer) -> None:
    positions(w)
    w.lines.pop()
    w.add(f"mask = torch.full((s, t), torch.finfo({w.dtype}).min, dtype={w.dtype})")
    w.add("mask *= torch.arange(t) > position.reshape(-1, 1)")


def cache_positions(w: Writer) -> None:
    """transformers 4.40: lowest times a boolean."""
    _cache_positions(w)
    w.set("mask", "mask[None, None, :, :].expand(b, 1, -1, -1)", "b1st")


def cache_positions_padding(w: Writer) -> None:
    """The same with padding, which is visible nowhere else."""
    _cache_positions(w)
    _padding_input(w)
    w.add("mask = mask[None, None, :, :].expand(b, 1, -1, -1).clone()")
    w.add("gone = mask + padding[:, None, None, :].to(mask.dtype) == 0")
    w.set("mask", f"mask.masked_fill(gone, torch.finfo({w.dtype}).min)", "b1st")


def nothing(w: Writer) -> None:
    pass


KINDS: MappingProxyType[str, Production] = MappingProxyType(
    {
        "none": nothing,
        "keep": _keep("b1st"),
        "keep_2d": _keep("st"),
        "keep_heads": _keep("bHst"),
        "padding": padding,
        "lengths": lengths,
        "tril": _computed("torch.tril(torch.ones(s, t, dtype=torch.bool))"),
        "tril_offset": _computed("torch.ones(s, t, dtype=torch.bool).tril(diagonal=t - s)"),
        "triu_hidden": _computed("~torch.triu(torch.ones(s, t, dtype=torch.bool), diagonal=1)"),
        "triu_offset": _computed("torch.ones(s, t).triu(t - s + 1) == 0"),
        "buffer": buffer,
        "arange": _computed("torch.arange(t)[None, :] <= torch.arange(s)[:, None]"),
        "arange_offset": _computed("torch.arange(s).view(-1, 1) + (t - s) >= torch.arange(t)"),
        "arange_range": _computed("torch.arange(t - s, t)[:, None] >= torch.arange(t)[None, :]"),
        "positions": positions,
        "cumsum_ones": _computed("torch.ones(s, t).cumsum(-1) <= torch.ones(s, t).cumsum(-2) + (t - s)"),
        "cumsum_padding": cumsum_padding,
        "window": _computed(
            "((torch.arange(s)[:, None] + (t - s) - torch.arange(t)[None, :]).unsqueeze(0) >= 0)[0]"
            " & (torch.arange(s)[:, None] + (t - s) - torch.arange(t)[None, :] < 3)"
        ),
        "window_triangles": _computed(
            "torch.ones(s, t, dtype=torch.bool).tril(t - s) & ~torch.ones(s, t, dtype=torch.bool).tril(t - s - 3)"
        ),
        "window_both_sides": _computed("(torch.arange(s)[:, None] + (t - s) - torch.arange(t)[None, :]).abs() <= 2"),
        "chunked": _computed(
            "((torch.arange(s) + (t - s)) // 3)[:, None] == (torch.arange(t) // 3)[None, :]"
        ),
        "chunked_causal": _computed(
            "(((torch.arange(s) + (t - s)) // 3)[:, None] == (torch.arange(t) // 3)[None, :])"
            " & (torch.arange(t) <= (torch.arange(s) + (t - s))[:, None])"
        ),
        "past_and_tril": _computed(
            "torch.cat([torch.ones(s, t - s, dtype=torch.bool), torch.ones(s, s, dtype=torch.bool).tril()], dim=1)"
        ),
        "tril_rows": _computed("torch.tril(torch.ones(t, t, dtype=torch.bool))[t - s :, :]"),
        "not_or": _computed(
            "torch.logical_not(torch.logical_or(torch.arange(t)[None, :] > torch.arange(t - s, t)[:, None],"
            " torch.arange(t)[None, :] <= torch.arange(t - s, t)[:, None] - 4))"
        ),
        "difference": _computed(
            "(torch.arange(t - s, t).unsqueeze(1) - torch.arange(t).unsqueeze(0)).clamp(max=0) == 0"
        ),
        "prefix": _computed(
            "(torch.arange(t) < 2)[None, :] | (torch.arange(t)[None, :] <= torch.arange(s)[:, None] + (t - s))"
        ),
        "causal_padding": causal_padding,
        "documents": documents,
        "vmapped": vmapped,
        "vmapped_padding": vmapped_padding,
        "random_bounds": random_bounds,
        "random_blocks": random_blocks,
        "random_formula": random_formula,
        "additive": _float("b1st"),
        "additive_2d": _float("st"),
        "additive_heads": _float("1Hst"),
        "triu_full": triu_full,
        "bart": bart,
        "cache_positions": cache_positions,
        "cache_positions_padding": cache_positions_padding,
        "is_causal": nothing,
    }
)  # fmt: skip
FLOATS = ("additive", "additive_2d", "additive_heads", "triu_full", "bart", "cache_positions",
          "cache_positions_padding")  # fmt: skip


def second(w: Writer) -> None:
    """Another mask, by padding."""
    w.input("present", "bt", f"(torch.rand(SHAPE) < 0.7) | (torch.arange({w.Sk}) == 0)")


# ---- from ``keep`` onto the scores


def fill_of(w: Writer, of: str) -> str:
    """The value at hidden keys; the lowest of ``of``, the expression of a dtype."""
    fills = {"inf": "-math.inf", "min": f"torch.finfo({of}).min", "small": "-5.0", "billion": "-1e9"}
    return fills[w.choices["fill"]]


def hide(w: Writer, keep: str) -> None:
    """Put the boolean expression ``keep`` onto the scores in the way of the dimension ``mask_form``."""
    form, fill = w.choices["mask_form"], fill_of(w, "scores.dtype")
    if form == "masked_fill":
        w.set("scores", f"scores.masked_fill(~({keep}), {fill})")
    elif form == "masked_fill_inplace":
        w.add(f"scores.masked_fill_(~({keep}), {fill})")
    elif form == "masked_fill_hidden":
        w.add(f"hidden = torch.logical_not({keep})")
        w.set("scores", f"scores.masked_fill(hidden, {fill})")
    elif form == "equal_zero":
        w.set("scores", f"scores.masked_fill(({keep}).int() == 0, {fill})")
    elif form == "where":
        w.set("scores", f"torch.where({keep}, scores, {fill})")
    elif form == "where_hidden":
        w.set("scores", f"torch.where(~({keep}), {fill}, scores)")
    elif form == "where_tensor":
        w.add(f"lowest = torch.full([], {fill}, dtype=scores.dtype)")
        w.set("scores", f"torch.where({keep}, scores, lowest)")
    elif form == "where_like":
        w.set("scores", f"torch.where({keep}, scores, torch.full_like(scores, {fill}))")
    else:
        add(w, w.fitted("added", additive(w, keep)))


def additive(w: Writer, keep: str, name: str = "added", fill: str = "") -> str:
    """Write ``added``, 0 where ``keep`` and low elsewhere; its axes are those of the mask."""
    fill = fill or fill_of(w, w.dtype)
    form = w.choices["mask_form"]
    if form == "additive_product":
        w.add(f"{name} = (1.0 - ({keep}).to({w.dtype})) * {fill}")
    elif form == "additive_where":
        w.add(f"{name} = torch.where({keep}, 0.0, {fill}).to({w.dtype})")
    else:
        w.add(f"{name} = torch.zeros_like({keep}, dtype={w.dtype}).masked_fill(~({keep}), {fill})")
    return w.order["keep"]


FORMS = ("masked_fill", "masked_fill_inplace", "masked_fill_hidden", "equal_zero", "where", "where_hidden",
         "where_tensor", "where_like", "additive_fill", "additive_where", "additive_product")  # fmt: skip


def mask(w: Writer) -> None:
    """The mask of this spelling, and a second one if it has two."""
    kind = w.choices["mask"]
    KINDS[kind](w)
    if kind in FLOATS:
        add(w, w.fitted("mask", w.order["mask"]))
    elif kind != "none":
        keep = w.fitted("keep", w.order["keep"])
        if w.choices["second_mask"] == "and":
            second(w)
            present = w.fitted("present[:, None, None, :]", "b11t")
            keep = f"{keep} & {present}"
        if keep != "keep" or "additive" in w.choices["mask_form"]:
            w.add(f"keep = {keep}")
        _hide_fitted(w)
    if w.choices["second_mask"] == "after":
        second(w)
        w.set(
            "scores",
            f"scores.masked_fill(~{w.fitted('present[:, None, None, :]', 'b11t')}, {fill_of(w, 'scores.dtype')})",
        )


def _hide_fitted(w: Writer) -> None:
    """``keep`` has the rank of the scores by now."""
    if w.choices["mask_form"].startswith("additive"):
        additive(w, "keep")
        add(w, "added")
    else:
        hide(w, "keep")
