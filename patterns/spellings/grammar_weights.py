"""Productions behind the scores: softmax, sinks, what happens to the weights, the product with v, the output."""

from __future__ import annotations

from types import MappingProxyType

from .grammar_operands import Production
from .grammar_scores import nothing
from .grammar_source import Writer

# ---- sinks: one more column, dropped behind the softmax


def _sinks(w: Writer) -> str:
    w.inputs["sinks"] = f"torch.randn({w.Hq}, dtype={w.dtype})"
    if w.order["scores"] == "bhgst":
        return f"sinks.view(1, {w.Hk}, {w.G}, 1, 1).expand(b, -1, -1, s, 1)"
    if w.order["scores"] == "bsht":
        return "sinks.view(1, 1, -1, 1).expand(b, s, -1, 1)"
    return "sinks.reshape(1, -1, 1, 1).expand(b, -1, s, 1)"


def sinks_last(w: Writer) -> None:
    w.set("scores", f"torch.cat([scores, {_sinks(w)}], dim=-1)")


def sinks_minus_max(w: Writer) -> None:
    """GPT-OSS: the largest logit is taken off before the softmax."""
    sinks_last(w)
    w.set("scores", "scores - scores.max(dim=-1, keepdim=True).values")


def sinks_first(w: Writer) -> None:
    w.set("scores", f"torch.cat([{_sinks(w)}, scores], dim=-1)")


SINKS: MappingProxyType[str, Production] = MappingProxyType(
    {"none": nothing} | {f.__name__: f for f in (sinks_last, sinks_minus_max, sinks_first)}
)


# ---- softmax


def _called(form: str) -> Production:
    """A softmax function; ``DTYPE`` is where its dtype argument goes."""

    def write(w: Writer) -> None:
        dtype = ", dtype=torch.float32" if w.choices["precision"] == "dtype" else ""
        if w.choices["precision"] == "float" or (dtype and "DTYPE" not in form):
            w.set("scores", "scores.float()")
        w.set("p", form.replace("LAST", str(len(w.order["scores"]) - 1)).replace("DTYPE", dtype), w.order["scores"])

    return write


def _spelled(*lines: str) -> Production:
    """A softmax by hand; ``x`` are the scores."""

    def write(w: Writer) -> None:
        if w.choices["precision"] in ("dtype", "float"):
            w.set("scores", "scores.float()")
        w.add(*lines)
        w.order["p"] = w.order["scores"]

    return write


SOFTMAXES: MappingProxyType[str, Production] = MappingProxyType(
    {
        "torch": _called("torch.softmax(scores, dim=-1DTYPE)"),
        "functional": _called("F.softmax(scores, dim=-1DTYPE)"),
        "method": _called("scores.softmax(-1DTYPE)"),
        "positive_dim": _called("scores.softmax(dim=LASTDTYPE)"),
        "module": _called("torch.nn.Softmax(dim=-1)(scores)"),
        "log_softmax": _called("torch.log_softmax(scores, dim=-1DTYPE).exp()"),
        "safe": _called("torch.ops.aten._safe_softmax.default(scores, -1DTYPE)"),
        "amax": _spelled(
            "e = torch.exp(scores - scores.amax(dim=-1, keepdim=True))", "p = e / e.sum(dim=-1, keepdim=True)"
        ),
        "max_values": _spelled(
            "top, _ = scores.max(dim=-1, keepdim=True)",
            "e = (scores - top).exp()",
            "p = e / torch.sum(e, -1, True)",
        ),
        "unsqueezed": _spelled(
            "e = torch.exp(scores - scores.amax(-1).unsqueeze(-1))", "p = e / e.sum(-1).unsqueeze(-1)"
        ),
        "reciprocal": _spelled(
            "e = torch.exp(scores - scores.amax(dim=-1, keepdim=True))",
            "p = e * e.sum(dim=-1, keepdim=True).reciprocal()",
        ),
        "one_over": _spelled(
            "e = torch.exp(scores - scores.amax(dim=-1, keepdim=True))", "p = e * (1.0 / e.sum(dim=-1, keepdim=True))"
        ),
        "detached": _spelled(
            "e = torch.exp(scores - scores.max(dim=-1, keepdim=True).values.detach())",
            "p = e.div(e.sum(dim=-1, keepdim=True))",
        ),
        "logsumexp": _spelled("p = torch.exp(scores - torch.logsumexp(scores, dim=-1, keepdim=True))"),
        "deferred": lambda w: deferred(w),
    }
)


def deferred(w: Writer) -> None:
    """Flash attention's own order: the division behind the product with v."""
    if w.choices["precision"] in ("dtype", "float"):
        w.set("scores", "scores.float()")
    w.add("p = torch.exp(scores - scores.amax(dim=-1, keepdim=True))", "total = p.sum(dim=-1, keepdim=True)")
    w.order["p"] = w.order["scores"]
    w.total = "total"


# ---- the weights


def cast(w: Writer) -> None:
    """Back to the dtype of v, as named by the dimension ``cast``; "none" is possible only where it is v's already."""
    narrow = w.choices["dtype"] != "float32" and w.choices["upcast"] != "all"
    wide = w.choices["precision"] != "none" or w.choices["upcast"] == "qk"
    form = w.choices["cast"]
    if form == "none" and not (narrow and wide):
        return
    if form == "to_q" and w.choices["upcast"] == "qk":
        form = "type_as"
    forms = {"to_q": "p.to(q.dtype)", "type_as": "p.type_as(v)", "named": f"p.to({w.dtype})", "none": "p.to(v.dtype)"}
    if w.choices["upcast"] == "all" and form == "named":
        form = "type_as"
    w.set("p", forms[form])


CASTS = ("to_q", "type_as", "named", "none")

DROPOUTS: MappingProxyType[str, Production] = MappingProxyType(
    {
        "none": nothing,
        "eval": lambda w: w.add("p = F.dropout(p, p=0.1, training=False)"),
        "zero": lambda w: w.add("p = F.dropout(p, p=0.0, training=True)"),
        "module": lambda w: w.add("p = torch.nn.Dropout(0.1).eval()(p)"),
    }
)


def _head_mask(axes: str, view: str) -> Production:
    def write(w: Writer) -> None:
        w.input("head_mask", axes)
        w.add(f"p = p * {w.fitted(view, '1H11')}")

    return write


HEAD_MASKS: MappingProxyType[str, Production] = MappingProxyType(
    {
        "none": nothing,
        "four_axes": _head_mask("1H11", "head_mask"),
        "vector": _head_mask("H", "head_mask.view(1, -1, 1, 1)"),
        "per_batch": _head_mask("bH", "head_mask[:, :, None, None]"),
    }
)


# ---- times v


def _values(w: Writer) -> tuple[str, str]:
    """v as matmul takes it, and the axes of the product."""
    if w.order["p"] in ("bst", "hst"):
        return "v", w.order["p"].replace("t", "e")
    if w.order["p"] == "bhgst":
        return f"{w.in_order('v', 'bhte')}.unsqueeze(2)", "bhgse"
    return w.in_order("v", "bhte"), "bhse"


def matmul(w: Writer) -> None:
    v, axes = _values(w)
    w.set("y", f"torch.matmul(p, {v})", axes)


def operator(w: Writer) -> None:
    v, axes = _values(w)
    w.set("y", f"p @ {v}", axes)


def bmm(w: Writer) -> None:
    if w.order["p"] in ("bst", "hst"):
        w.set("y", "torch.bmm(p, v)", w.order["p"].replace("t", "e"))
        return
    v = w.in_order("v", "bhte")
    flat = f"torch.bmm(p.reshape(b * {w.Hq}, s, t), {v}.reshape(b * {w.Hq}, t, {w.Dv}))"
    w.set("y", f"{flat}.view(b, {w.Hq}, s, {w.Dv})", "bhse")


def _one_key(w: Writer) -> None:
    if w.Sk == 1:
        w.why_near = "einsum multiplies elements where it adds up one"


def einsum(w: Writer) -> None:
    out = w.order["p"].replace("t", "e")
    _one_key(w)
    w.set("y", f'torch.einsum("{w.order["p"]},{w.order["v"]}->{out}", p, v)', out)


def einsum_merged(w: Writer) -> None:
    """Straight to [B, S, H, D]."""
    out = w.order["p"].replace("t", "e").replace("s", "").replace("b", "bs")
    _one_key(w)
    w.set("y", f'torch.einsum("{w.order["p"]},{w.order["v"]}->{out}", p, v)', out)


def flat(w: Writer) -> None:
    """OPT: the softmax on [B*H, S, T], for which the scores were viewed."""
    v = w.in_order("v", "bhte")
    w.set("y", f"torch.bmm(p, {v}.reshape(b * {w.Hq}, t, {w.Dv})).view(b, {w.Hq}, s, {w.Dv})", "bhse")


VALUES: MappingProxyType[str, Production] = MappingProxyType(
    {f.__name__: f for f in (matmul, operator, bmm, einsum, einsum_merged, flat)}
)


# ---- the output


def output(w: Writer) -> None:
    """What is returned: y as it is, or with its heads merged."""
    form = w.choices["output"]
    if w.total:
        w.add(f"y = y / {w.total}")
    if w.choices["upcast"] == "all" or w.total:
        w.add(f"y = y.to({w.dtype})")
    order = w.order["y"]
    if form in ("plain", "cloned") or order == "bse":
        w.returned = ["y.contiguous()" if form == "cloned" else "y"]
        return
    if order == "hse":
        w.returned = [f"y.transpose(0, 1).reshape(s, {w.Hq * w.Dv})"]
        return
    if "g" in order:
        merged = "bsHe" if order == "bshge" else "bHse"
        shape = ", ".join(a if a in "bs" else str(w.size(a)) for a in merged)
        w.set("y", f"y.reshape({shape})", merged.lower())
    if form == "sbh":
        w.returned = [f"{w.in_order('y', 'sbhe')}.reshape(s, b, {w.Hq * w.Dv})"]
        return
    y = w.in_order("y", "bshe")
    merged = f"{y}.reshape(b, s, {w.Hq * w.Dv})"
    if form == "linear":
        w.inputs["w_out"] = f"torch.randn(5, {w.Hq * w.Dv}, dtype={w.dtype}) / 4"
        merged = f"F.linear({merged}, w_out)"
    forms = {"transposed": y, "contiguous": f"{y}.contiguous().view(b, s, {w.Hq * w.Dv})",
             "flatten": f"{y}.flatten(2)"}  # fmt: skip
    w.returned = [forms.get(form, merged)]


OUTPUTS = ("merged", "plain", "cloned", "transposed", "contiguous", "flatten", "linear", "sbh")
