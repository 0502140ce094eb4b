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
        "b": f"q.shape[{q.find('b')}]",
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


def unbatched(w: Writer) -> None:
    _given(w, "Hsd", "Ktd", kept=True)


def hidden(w: Writer) -> None:
    """[B, S, H * D], as a projection gives it."""
    for name, heads, size, letter in (("q", w.Hq, w.D, "s"), ("k", w.Hk, w.D, "t"), ("v", w.Hk, w.Dv, "t")):
        w.input(name, f"b{letter}", f"torch.randn(SHAPE, {heads * size}, dtype=DTYPE)")
        axes = {"q": "bhsd", "k": "bhtd", "v": "bhte"}[name]
        w.set(name, f"{name}.view(b, {letter}, {heads}, {size}).transpose(1, 2)", axes)
    w.sizes_from = {"b": "q.shape[0]", "s": "q.shape[1]", "t": "k.shape[1]"}


def _projections(w: Writer, source: str, letter: str) -> None:
    for name, heads, size, rows in (("q", w.Hq, w.D, "s"), ("k", w.Hk, w.D, letter), ("v", w.Hk, w.Dv, letter)):
        w.inputs[f"w_{name}"] = f"torch.randn({heads * size}, 16, dtype={w.dtype}) / 4"
        w.inputs[f"b_{name}"] = f"torch.randn({heads * size}, dtype={w.dtype}) / 4"
        axes = {"q": "bhsd", "k": "bhtd", "v": "bhte"}[name]
        projected = f"F.linear({'x' if name == 'q' else source}, w_{name}, b_{name})"
        w.set(name, f"{projected}.view(b, {rows}, {heads}, {size}).transpose(1, 2)", axes)


def projected(w: Writer) -> None:
    """Three linears of one x."""
    w.input("x", "bs", "torch.randn(SHAPE, 16, dtype=DTYPE)")
    w.sizes_from = {"b": "x.shape[0]", "s": "x.shape[1]", "t": "x.shape[1]"}
    _projections(w, "x", "s")


def projected_cross(w: Writer) -> None:
    """Keys and values from somewhere else."""
    w.input("x", "bs", "torch.randn(SHAPE, 16, dtype=DTYPE)")
    w.input("context", "bt", "torch.randn(SHAPE, 16, dtype=DTYPE)")
    w.sizes_from = {"b": "x.shape[0]", "s": "x.shape[1]", "t": "context.shape[1]"}
    _projections(w, "context", "t")


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


_LAYOUTS = (bhsd, bshd, sbhd, hidden, projected, projected_cross, bshd_kept, sbhd_kept, keys_transposed, three_axes,
            unbatched, packed_split, packed_slices, packed_unbind, packed_by_head)  # fmt: skip
LAYOUTS: MappingProxyType[str, Production] = MappingProxyType({f.__name__: f for f in _LAYOUTS})


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


def tiled(w: Writer) -> None:
    """Query head h reads key head h % K: copies side by side, which is no grouped attention."""
    _each(w, "{x}.repeat(1, {n}, 1, 1)")


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


_GROUPS = (repeat_kv, repeat_interleave, unsqueeze_expand_flatten, unsqueeze_repeat, index_heads, tiled, broadcast,
           expand_one, grouped, enable_gqa)  # fmt: skip
GROUPS: MappingProxyType[str, Production] = MappingProxyType({"none": no_groups} | {f.__name__: f for f in _GROUPS})


# ---- before the product


def qk_norm(w: Writer) -> None:
    for name in "qk":
        w.set(name, f"F.rms_norm({name}, ({w.D},), eps=1e-6)")


def qk_norm_by_hand(w: Writer) -> None:
    for name in "qk":
        w.set(name, f"{name} * torch.rsqrt({name}.float().pow(2).mean(-1, keepdim=True) + 1e-6).to({name}.dtype)")


def _rotary(w: Writer, turned: str) -> None:
    for name, rows in (("q", "s"), ("k", "t")):
        w.input(f"cos_{name}", f"{rows}d")
        w.input(f"sin_{name}", f"{rows}d")
        w.set(name, f"{name} * cos_{name} + {turned.replace('x', name)} * sin_{name}")


def rotary_halves(w: Writer) -> None:
    half = w.D // 2
    _rotary(w, f"torch.cat((-x[..., {half}:], x[..., :{half}]), dim=-1)")


def rotary_pairs(w: Writer) -> None:
    _rotary(w, "torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)")


def _cached(w: Writer, form: str) -> None:
    """Two keys of the past in front of those of now."""
    axis = w.axis("k", "t")
    for name in "kv":
        axes = w.order[name].replace("h", "K").replace("t", "2")
        w.input(f"past_{name}", axes)
        w.add(form.replace("NAME", name).replace("AXIS", str(axis)))
    w.Sk += 2
    w.sizes_from["t"] += f" + past_k.shape[{axis}]"


def cache_cat(w: Writer) -> None:
    """DynamicCache."""
    _cached(w, "NAME = torch.cat([past_NAME, NAME], dim=AXIS)")


def cache_written(w: Writer) -> None:
    """A buffer of zeros into which past and present are written."""
    axis = w.axis("k", "t")
    w.add("places = torch.arange(k.shape[AXIS]) + 2".replace("AXIS", str(axis)))
    _cached(w, "NAME = F.pad(past_NAME, (0, 0, 0, NAME.shape[AXIS])).index_copy(AXIS, places, NAME)")


CACHES: MappingProxyType[str, Production] = MappingProxyType(
    {"none": no_groups, "cat": cache_cat, "index_copy": cache_written}
)
ROTARIES: MappingProxyType[str, Production] = MappingProxyType(
    {"none": no_groups, "halves": rotary_halves, "pairs": rotary_pairs}
)


def upcast_qk(w: Writer) -> None:
    w.set("q", "q.float()")
    w.set("k", "k.float()")


def upcast_all(w: Writer) -> None:
    upcast_qk(w)
    w.set("v", "v.float()")


UPCASTS: MappingProxyType[str, Production] = MappingProxyType({"none": no_groups, "qk": upcast_qk, "all": upcast_all})
NORMS: MappingProxyType[str, Production] = MappingProxyType(
    {"none": no_groups, "rms": qk_norm, "by_hand": qk_norm_by_hand}
)
