"""Productions of the scores: the product of queries and keys, scale, soft capping, additive biases."""

from __future__ import annotations

from types import MappingProxyType

from .grammar_operands import Production
from .grammar_source import Writer


def nothing(w: Writer) -> None:
    pass


# ---- q k^T


def _operands(w: Writer) -> tuple[str, str, str]:
    """q and k as matmul takes them (k not transposed), and the axes of the product."""
    if len(w.order["q"]) == 3:
        return "q", "k", w.scores_axes()
    if "g" in w.order["q"]:
        return w.in_order("q", "bhgsd"), f"{w.in_order('k', 'bhtd')}.unsqueeze(2)", "bhgst"
    return w.in_order("q", "bhsd"), w.in_order("k", "bhtd"), "bhst"


def matmul(w: Writer) -> None:
    q, k, axes = _operands(w)
    w.set("scores", f"torch.matmul({q}, {k}.transpose(-1, -2))", axes)


def matmul_positive(w: Writer) -> None:
    q, k, axes = _operands(w)
    n = len(axes)
    w.set("scores", f"{q}.matmul({k}.transpose({n - 2}, {n - 1}))", axes)


def operator_mt(w: Writer) -> None:
    q, k, axes = _operands(w)
    w.set("scores", f"{q} @ {k}.mT", axes)


def operator_permute(w: Writer) -> None:
    """k from where it is to [B, H, D, S] in one step."""
    w.set("scores", f"{w.in_order('q', 'bhsd')} @ {w.in_order('k', 'bhdt')}", "bhst")


def keys_first(w: Writer) -> None:
    """(k q^T)^T."""
    q, k, axes = _operands(w)
    w.set("scores", f"torch.matmul({k}, {q}.transpose(-1, -2)).transpose(-1, -2)", axes)


def _flat(w: Writer) -> tuple[str, str]:
    """q [B*H, S, D] and k [B*H, D, S]."""
    q, k = w.in_order("q", "bhsd"), w.in_order("k", "bhtd")
    return f"{q}.reshape(b * {w.Hq}, s, {w.D})", f"{k}.reshape(b * {w.Hq}, t, {w.D}).transpose(1, 2)"


def bmm(w: Writer) -> None:
    if len(w.order["q"]) == 3:
        w.set("scores", "torch.bmm(q, k.transpose(1, 2))", w.scores_axes())
        return
    q, k = _flat(w)
    w.set("scores", f"torch.bmm({q}, {k}).view(b, {w.Hq}, s, t)", "bhst")


def baddbmm(w: Writer) -> None:
    """Megatron: the scale as alpha, an unused addend."""
    q, k = _flat(w)
    zeros = f"torch.empty(b * {w.Hq}, s, t, dtype=q.dtype)"
    w.set("scores", f"torch.baddbmm({zeros}, {q}, {k}, beta=0.0, alpha=0.25).view(b, {w.Hq}, s, t)", "bhst")


def baddbmm_bias(w: Writer) -> None:
    """Bloom: ALiBi as the addend, the scale as alpha."""
    q, k = _flat(w)
    w.input("alibi", "bHt")
    addend = f"alibi.reshape(b * {w.Hq}, 1, t)"
    w.set("scores", f"{addend}.baddbmm(batch1={q}, batch2={k}, beta=1.0, alpha=0.25).view(b, {w.Hq}, s, t)", "bhst")


def einsum(w: Writer) -> None:
    out = w.scores_axes()
    w.set("scores", f'torch.einsum("{w.order["q"]},{w.order["k"]}->{out}", q, k)', out)


def einsum_keys_first(w: Writer) -> None:
    out = w.scores_axes()
    w.set("scores", f'torch.einsum("{w.order["k"]}, {w.order["q"]} -> {out}", k, q)', out)


def einsum_letters(w: Writer) -> None:
    """Other letters, head axis before the batch axis in none of them."""
    table = str.maketrans("bhgstd", "nkrijc")
    q, k = (w.order[name].translate(table) for name in "qk")
    out = w.scores_axes()
    w.set("scores", f'torch.einsum("{q},{k}->{out.translate(table)}", (q, k))', out)


def einsum_heads_inside(w: Writer) -> None:
    """Scores as [B, S, H, T]."""
    w.set("scores", f'torch.einsum("{w.order["q"]},{w.order["k"]}->bsht", q, k)', "bsht")


def einsum_dots(w: Writer) -> None:
    w.set("scores", f'torch.einsum("...id,...jd->...ij", {w.in_order("q", "bhsd")}, {w.in_order("k", "bhtd")})', "bhst")


_PRODUCTS = (matmul, matmul_positive, operator_mt, operator_permute, keys_first, bmm, baddbmm, baddbmm_bias, einsum,
             einsum_keys_first, einsum_letters, einsum_heads_inside, einsum_dots)  # fmt: skip
PRODUCTS: MappingProxyType[str, Production] = MappingProxyType({f.__name__: f for f in _PRODUCTS})


# ---- scale: before the product, or on the scores, or behind the mask


def _on(name: str, expression: str) -> Production:
    return lambda w: void(w.set(name, expression.replace("D", str(w.D)).replace("TYPE", w.dtype)))


def void(_: object) -> None:
    pass


def _both(expression: str) -> Production:
    def write(w: Writer) -> None:
        for name in "qk":
            w.set(name, expression.replace("x", name))

    return write


SCALES_BEFORE: MappingProxyType[str, Production] = MappingProxyType(
    {
        "q_mul": _on("q", "q * 0.3"),
        "q_div": _on("q", "q / math.sqrt(q.shape[-1])"),
        "k_mul": _on("k", "k * 0.3"),
        "both_mul": _both("x * 0.55"),
        "both_power": _both("x * q.shape[-1] ** -0.25"),
        "both_div": _both("x / math.sqrt(math.sqrt(D))".replace("D", "q.shape[-1]")),
    }
)
SCALES: MappingProxyType[str, Production] = MappingProxyType(
    {
        "mul": _on("scores", "scores * 0.3"),
        "none": nothing,
        "commuted": _on("scores", "0.3 * scores"),
        "div": _on("scores", "scores / 2.5"),
        "math_sqrt": _on("scores", "scores / math.sqrt(q.shape[-1])"),
        "power": _on("scores", "scores * q.shape[-1] ** -0.5"),
        "torch_mul": _on("scores", "torch.mul(scores, 1.0 / math.sqrt(D))"),
        "tensor_sqrt": _on("scores", "scores / torch.sqrt(torch.tensor(D, dtype=TYPE))"),
        "tensor_full": _on("scores", "scores / torch.full([], D**0.5, dtype=scores.dtype)"),
        "inplace": _on("scores", "scores.mul_(0.3)"),
        "size": _on("scores", "scores / (q.size(-1) ** 0.5)"),
        "tensor_rsqrt": _on("scores", "scores * torch.rsqrt(torch.tensor(float(D), dtype=TYPE))"),
        "tensor_number": _on("scores", "scores * torch.tensor(0.3)"),
        "twice": _on("scores", "scores / math.sqrt(D) / 2.0"),
    }
)
SCALES_AFTER: MappingProxyType[str, Production] = MappingProxyType({"after_mask": _on("scores", "scores * 0.3")})

SOFTCAPS: MappingProxyType[str, Production] = MappingProxyType(
    {
        "none": nothing,
        "div_mul": _on("scores", "torch.tanh(scores / 3.0) * 3.0"),
        "mul_mul": _on("scores", "(scores * (1.0 / 3.0)).tanh() * 3.0"),
        "commuted": _on("scores", "3.0 * torch.tanh(scores / 3.0)"),
        "folded": _on("scores", "torch.tanh(scores * 0.1) * 3.0"),
    }
)


# ---- additive terms


def add(w: Writer, term: str) -> None:
    """``scores + term`` in the way of the dimension ``addition``."""
    way = w.choices["addition"]
    if not w.begun:
        w.begun = True
        w.add(f"scores = {term}")
    elif way == "inplace":
        w.add(f"scores += {term}")
    else:
        forms = {"plus": f"scores + {term}", "commuted": f"{term} + scores", "torch_add": f"torch.add(scores, {term})"}
        w.set("scores", forms[way])


def _bias(axes: str) -> Production:
    def write(w: Writer) -> None:
        w.input("bias", axes)
        add(w, w.fitted("bias", axes))

    return write


def bias_heads3(w: Writer) -> None:
    """[H, S, T], whose head axis is added by hand."""
    w.input("bias", "Hst")
    add(w, w.fitted("bias.unsqueeze(0)", "1Hst"))


def bias_sub(w: Writer) -> None:
    w.input("bias", "1Hst")
    begun, w.begun = w.begun, True
    w.set("scores", f"{'scores' if begun else ''} - {w.fitted('bias', '1Hst')}".strip())


def t5(w: Writer) -> None:
    """An embedding of bucketed distances."""
    w.inputs["table"] = f"torch.randn(7, {w.Hq}, dtype={w.dtype})"
    w.input("buckets", "st", "torch.randint(0, 7, (SHAPE))")
    add(w, w.fitted("F.embedding(buckets, table).permute(2, 0, 1).unsqueeze(0)", "1Hst"))


def alibi(w: Writer) -> None:
    """A slope per head times the position of the key."""
    w.inputs["slopes"] = f"torch.rand({w.Hq}, dtype={w.dtype})"
    w.set("bias", "slopes.view(1, -1, 1, 1) * torch.arange(t).view(1, 1, 1, -1)")
    add(w, w.fitted("bias", "1H1t"))


def alibi_relative(w: Writer) -> None:
    """A slope per head times the distance from key to query."""
    w.inputs["slopes"] = f"torch.rand({w.Hq}, dtype={w.dtype})"
    w.add("distance = torch.arange(t)[None, :] - torch.arange(s)[:, None]")
    w.set("bias", "(slopes[:, None, None] * distance)[None]")
    add(w, w.fitted("bias", "1Hst"))


def two_biases(w: Writer) -> None:
    w.input("bias", "1Hst")
    w.input("other", "b1st")
    add(w, w.fitted("bias", "1Hst"))
    add(w, w.fitted("other", "b1st"))


BIASES: MappingProxyType[str, Production] = MappingProxyType(
    {
        "none": nothing,
        "heads": _bias("1Hst"),
        "heads3": bias_heads3,
        "keys": _bias("1H1t"),
        "per_batch": _bias("b1st"),
        "full": _bias("bHst"),
        "sub": bias_sub,
        "t5": t5,
        "alibi": alibi,
        "alibi_relative": alibi_relative,
        "two": two_biases,
    }
)
