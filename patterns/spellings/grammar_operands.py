"""Productions of the operands: how q, k and v are laid out, how key heads serve several queries, what is done first."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType

from .grammar_source import Writer

Production = Callable[[Writer], None]


def _given(w: Writer, q: str, k: str, v: str | None = None, kept: bool = False) -> None:
    """Three inputs with their axes; unless ``kept``, lines that bring them to [B, H, S, D]."""
    v = v or k.replace("d", "e")
    for name, axes in zip("qkv", (q, k, v), strict=True):
        w.input(name, axes)
        w.order[name] = axes.replace("H", "h").replace("K", "h")
        if not kept and len(axes) == 4:
            wanted = {"q": "bhsd", "k": "bhtd", "v": "bhte"}[name]
            if w.order[name] != wanted:
                w.set(name, w.in_order(name, wanted), wanted)
    w.sizes_from = {
        "b": f"q.shape[{q.index('b')}]",
        "s": f"q.shape[{q.index('s')}]",
        "t": f"k.shape[{k.index('t')}]",
    }


def bhsd(w: Writer) -> None:
    _given(w, "bHsd", "bKtd")


def bshd(w: Writer) -> None:
    _given(w, "bsHd", "btKd")


def bshd_kept(w: Writer) -> None:
    _given(w, "bsHd", "btKd", kept=True)


def sbhd(w: Writer) -> None:
    _given(w, "sbHd", "tbKd")


def sbhd_kept(w: Writer) -> None:
    _given(w, "sbHd", "tbKd", kept=True)


def keys_transposed(w: Writer) -> None:
    _given(w, "bHsd", "bKdt", "bKte", kept=True)


def three_axes(w: Writer) -> None:
    _given(w, "bsd", "btd", kept=True)


def hidden(w: Writer) -> None:
    """[B, S, H * D], as a projection gives it."""
    for name, heads, size, letter in (("q", w.Hq, w.D, "s"), ("k", w.Hk, w.D, "t"), ("v", w.Hk, w.Dv, "t")):
        w.input(name, f"b{letter}", f"torch.randn(SHAPE, {heads * size}, dtype=DTYPE)")
        axes = {"q": "bhsd", "k": "bhtd", "v": "bhte"}[name]
        w.set(name, f"{name}.view(b, {letter}, {heads}, {size}).transpose(1, 2)", axes)
    w.sizes_from = {"b": "q.shape[0]", "s": "q.shape[1]", "t": "k.shape[1]"}


def _packed(w: Writer) -> int:
    """x and the weight of one linear for q, k and v; the number of its outputs."""
    outputs = (w.Hq + w.Hk) * w.D + w.Hk * w.Dv
    w.input("x", "bs", "torch.randn(SHAPE, 16, dtype=DTYPE)")
    w.inputs["w_qkv"] = f"torch.randn({outputs}, 16, dtype={w.dtype}) / 4"
    w.sizes_from = {"b": "x.shape[0]", "s": "x.shape[1]", "t": "x.shape[1]"}
    return outputs


def packed_split(w: Writer) -> None:
    """Llama with merged projections, Phi-3."""
    _packed(w)
    w.add(f"q, k, v = F.linear(x, w_qkv).split(({w.Hq * w.D}, {w.Hk * w.D}, {w.Hk * w.Dv}), dim=-1)")
    w.set("q", f"q.view(b, s, {w.Hq}, {w.D}).transpose(1, 2)", "bhsd")
    w.set("k", f"k.view(b, s, {w.Hk}, {w.D}).transpose(1, 2)", "bhtd")
    w.set("v", f"v.view(b, s, {w.Hk}, {w.Dv}).transpose(1, 2)", "bhte")


def packed_slices(w: Writer) -> None:
    """Phi-3's own way: slices by position."""
    _packed(w)
    a, b = w.Hq * w.D, (w.Hq + w.Hk) * w.D
    w.add("qkv = F.linear(x, w_qkv)")
    w.set("q", f"qkv[..., :{a}].view(b, s, {w.Hq}, {w.D}).transpose(1, 2)", "bhsd")
    w.set("k", f"qkv[..., {a}:{b}].view(b, s, {w.Hk}, {w.D}).transpose(1, 2)", "bhtd")
    w.set("v", f"qkv[..., {b}:].view(b, s, {w.Hk}, {w.Dv}).transpose(1, 2)", "bhte")


def packed_unbind(w: Writer) -> None:
    """Vision transformers: [B, S, 3, H, D] -> three of [B, H, S, D]."""
    _packed(w)
    w.add(f"q, k, v = F.linear(x, w_qkv).reshape(b, s, 3, {w.Hq}, {w.D}).permute(2, 0, 3, 1, 4).unbind(0)")
    w.order.update(q="bhsd", k="bhtd", v="bhte")


def packed_by_head(w: Writer) -> None:
    """GPT-NeoX: each head has its q, k and v side by side."""
    _packed(w)
    w.add(f"qkv = F.linear(x, w_qkv).view(b, s, {w.Hq}, {3 * w.D}).transpose(1, 2)")
    w.add("q, k, v = qkv.chunk(3, dim=-1)")
    w.order.update(q="bhsd", k="bhtd", v="bhte")


LAYOUTS: MappingProxyType[str, Production] = MappingProxyType(
    {f.__name__: f for f in (bhsd, bshd, sbhd, hidden, bshd_kept, sbhd_kept, keys_transposed, three_axes, packed_split,
                             packed_slices, packed_unbind, packed_by_head)}
)  # fmt: skip


# ---- grouped heads: every production ends with as many key heads as query heads, or with an axis g of the queries


def no_groups(w: Writer) -> None:
    pass


def _each(w: Writer, template: str) -> None:
    for name, letter, size in (("k", "t", w.D), ("v", "t", w.Dv)):
        h = w.axis(name, "h")
        w.set(name, template.format(x=name, t=letter, d=size, h=h, n=w.G, H=w.Hq, K=w.Hk))


def repeat_kv(w: Writer) -> None:
    """transformers' repeat_kv."""
    _each(w, "{x}[:, :, None, :, :].expand(b, {K}, {n}, {t}, {d}).reshape(b, {H}, {t}, {d})")


def repeat_interleave(w: Writer) -> None:
    _each(w, "{x}.repeat_interleave({n}, dim={h})")


def unsqueeze_expand_flatten(w: Writer) -> None:
    _each(w, "{x}.unsqueeze(2).expand(-1, -1, {n}, -1, -1).flatten(1, 2)")


def unsqueeze_repeat(w: Writer) -> None:
    """repeat copies; a view of what it gives."""
    _each(w, "{x}.unsqueeze(2).repeat(1, 1, {n}, 1, 1).view(b, {H}, {t}, {d})")


def index_heads(w: Writer) -> None:
    """Every query head picks its key head: stack of slices."""
    _each(w, "torch.stack([{x}] * {n}, dim=2).flatten(1, 2)")


def broadcast(w: Writer) -> None:
    """One key head, broadcast by the products (multi-query attention)."""


def expand_one(w: Writer) -> None:
    _each(w, "{x}.expand(b, {H}, {t}, {d})")


def grouped(w: Writer) -> None:
    """q as [B, K, G, S, D]; k and v stay."""
    if w.order["q"] == "bshd":
        w.set("q", f"q.view(b, s, {w.Hk}, {w.G}, {w.D})", "bshgd")
    else:
        w.set("q", f"q.reshape(b, {w.Hk}, {w.G}, s, {w.D})", "bhgsd")


def enable_gqa(w: Writer) -> None:
    """scaled_dot_product_attention repeats the heads itself."""


GROUPS: MappingProxyType[str, Production] = MappingProxyType(
    {"none": no_groups} | {f.__name__: f for f in (repeat_kv, repeat_interleave, unsqueeze_expand_flatten,
                                                   unsqueeze_repeat, index_heads, broadcast, expand_one, grouped,
                                                   enable_gqa)}
)  # fmt: skip


# ---- before the product


def qk_norm(w: Writer) -> None:
    for name in "qk":
        w.set(name, f"F.rms_norm({name}, ({w.D},), eps=1e-6)")


def upcast_qk(w: Writer) -> None:
    w.set("q", "q.float()")
    w.set("k", "k.float()")


def upcast_all(w: Writer) -> None:
    upcast_qk(w)
    w.set("v", "v.float()")


UPCASTS: MappingProxyType[str, Production] = MappingProxyType({"none": no_groups, "qk": upcast_qk, "all": upcast_all})
NORMS: MappingProxyType[str, Production] = MappingProxyType({"none": no_groups, "rms": qk_norm})
