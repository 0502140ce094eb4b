"""Key and value caches of an attention: what is written and what is read, recognised as one unit.

An operand of ``ascend.flash_attention`` is followed up through layout to the call that puts new tokens beside old ones
(``cache_writes.py`` reads these calls), and from there to the graph's input that holds the old ones::

    dynamic   cat([past, new], tokens)                            and the graph returns it
    static    index_copy / index_put / slice_scatter(past, new)   and copy_(past, ...) at the end, or written in place
    sliding   the window moves on: slice(cat([past, new])) is stored, or new is put behind roll(past, -1)

A unit is returned only with proof: nobody else writes the memory of the old tokens, nobody else reads them (a rewrite
may then write in place), the result is stored, and what the attention reads contains what was written. Everything else
is a ``NoMatch`` that says what is missing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import fx

from ascend_dynamo.contracts import Facts, NoMatch

from .._calls import arg, arguments, aten, is_call, refuse
from .._mla_parts import Labels, through
from .cache_writers import readers_of, stores_of, writers_of
from .cache_writes import Write, read_write

NEAR = 0.4  # how much of a cache must have been recognised for its refusal to be told
Kind = Literal["dynamic", "static", "sliding"]


@dataclass(frozen=True)
class KVUnit:
    """One cache of one attention.

    ``base`` is the input that holds the old tokens, ``new`` what is written, ``position`` where in the result: the
    first position (an int or a size) or the node of an index tensor. ``write`` is the call whose result holds old and
    new tokens, ``store`` the call that keeps it (``copy_``, or the graph's output), ``read`` the operand of the
    attention, which sees ``length`` tokens. ``axes`` says which axes of ``base`` are batch, head, token and feature
    (labels of ``Facts.axes``).
    """

    kind: Kind
    base: fx.Node
    new: fx.Node
    position: Any
    write: fx.Node
    store: fx.Node
    read: fx.Node
    axes: Labels
    length: Any

    def __str__(self) -> str:
        return f"{self.kind} cache %{self.base.name}"


def find_units(facts: Facts, attention: fx.Node) -> dict[str, KVUnit | NoMatch]:
    """The caches behind the keys ("k") and values ("v") of an attention; "k.0", "k.1" where keys are joined of two."""
    call = arguments(attention)
    found: dict[str, KVUnit | NoMatch] = {}
    for name in ("k", "v"):
        source, labels = facts.axes(call[name])
        if is_call(source, aten.cat.default) and labels[3] == f"d{arg(source, 1)}":
            for i, piece in enumerate(arg(source, 0)):
                inner = through(labels, facts.axes(piece)[1])
                found[f"{name}.{i}"] = _no_axes(facts, piece) if inner is None else find_unit(facts, piece, inner)
        else:
            found[name] = find_unit(facts, call[name], labels)
    return found


def describe_units(units: dict[str, KVUnit | NoMatch]) -> tuple[str, ...]:
    """One sentence for an attention all of whose operands are caches, for ``Match.assumes``; else none."""
    proven = [u for u in units.values() if isinstance(u, KVUnit)]
    if not proven or len(proven) < len(units):
        return ()
    kinds = "/".join(dict.fromkeys(u.kind for u in proven))
    return (f"kv cache ({kinds}): old tokens are read and written only here",)


def cache_notes(facts: Facts, *operands: tuple[fx.Node, int]) -> tuple[str, ...]:
    """``describe_units`` for operands that are not raised yet: nodes, and which of their axes counts tokens.

    What looks like a cache and is not proven to be one is said too, with what stopped it.
    """
    labels = [(n, facts.axes(n)[1][tokens]) for n, tokens in operands]
    units = {n.name: find_unit(facts, n, ("1", "1", token, "1")) for n, token in labels}
    near = [u for u in units.values() if isinstance(u, NoMatch) and u.progress >= NEAR]
    return describe_units(units) or tuple(f"no kv cache: {why}" for why in near[:1])


def find_unit(facts: Facts, operand: fx.Node, labels: Labels) -> KVUnit | NoMatch:
    """The cache behind one operand, whose axes B, H, S, D have ``labels`` in ``facts.axes(operand)[0]``."""
    above = _up(facts, operand, labels)
    if isinstance(above, NoMatch):
        return above
    source, labels, window = above
    write = read_write(facts, source, labels)
    if isinstance(write, NoMatch):
        return write
    if not write.covered(facts, window):
        found = f"tokens {window[0]} to {window[1]}"
        return refuse(facts, "unproven", operand, "a read that contains the new tokens", found, 0.7)
    stored = _stored(facts, write)
    if isinstance(stored, NoMatch):
        return stored
    kind, store = stored
    refusal = _alone(facts, write, store)
    if refusal is not None:
        return refusal
    start, end = window
    length = (facts.val(source).shape[write.axis] if end is None else end) - start
    return KVUnit(kind, write.base, write.new, write.position, write.result, store, operand, write.axes, length)


def _up(facts: Facts, n: fx.Node, labels: Labels) -> tuple[fx.Node, Labels, tuple[Any, Any]] | NoMatch:
    """The call above layout and slices of tokens, the labels of B, H, S, D in it, and which of its tokens are read."""
    start: Any = 0
    end: Any = None
    source = facts.axes(n)[0]
    while is_call(source, aten.slice.Tensor) and labels[2] == f"d{arg(source, 1)}" and arg(source, 4) == 1:
        first, last = (facts.val(a) if isinstance(a, fx.Node) else a for a in (arg(source, 2), arg(source, 3)))
        end = first + (end if end is not None else last - first)
        start = first + start
        source, outer = facts.axes(arg(source, 0))
        followed = labels if outer == tuple(f"d{i}" for i in range(len(outer))) else through(labels, outer)
        if followed is None:
            return _no_axes(facts, source)
        labels = followed
    return source, labels, (start, end)


def _no_axes(facts: Facts, n: fx.Node) -> NoMatch:
    return refuse(facts, "shape", n, "axes that can be followed to the cache", "a reshape of them", 0.2)


def _stored(facts: Facts, write: Write) -> tuple[Kind, fx.Node] | NoMatch:
    """How the cache moves on, and the call that keeps it."""
    if write.in_place:
        return write.kind, write.result
    stores = stores_of(facts, write.result, write.axis)
    if not stores:
        other = next(iter(writers_of(facts, write.base)), None)
        if other is not None:
            found = f"another by %{other.name}"
            return refuse(facts, "mutation", other, f"one write of %{write.base.name}", found, 0.7)
        expected = "a cache that is returned or written back"
        return refuse(facts, "op", write.result, expected, "one that is forgotten", 0.6)
    back = next((s for s in stores if is_call(s.node, aten.copy_.default) and arg(s.node, 0) is write.base), None)
    if write.kind == "static":
        if back is None or not back.whole:
            expected = f"the whole result copied to %{write.base.name}"
            return refuse(facts, "mutation", write.result, expected, "one that is kept elsewhere, or in part", 0.7)
        return "static", back.node
    store = back or max(stores, key=lambda s: s.whole)
    return write.kind if store.whole and back is None else "sliding", store.node


def _alone(facts: Facts, write: Write, store: fx.Node) -> NoMatch | None:
    """A refusal unless the write is the only one of the base's memory, and the only reader of what it held."""
    for writer in writers_of(facts, write.base):
        if writer is not store and writer is not write.result:
            found = f"another by %{writer.name}"
            return refuse(facts, "mutation", writer, f"one write of %{write.base.name}", found, 0.8)
    others = [n for n in readers_of(write.base) if n not in write.nodes and n is not store]
    if write.in_place:  # what comes later reads old and new tokens
        others = [n for n in others if n < write.result]
    if others:
        found = f"%{others[0].name} reads it too"
        return refuse(facts, "alias", others[0], f"%{write.base.name} read only to be written", found, 0.8)
    return None
