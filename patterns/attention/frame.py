"""The axes of one attention, whatever shapes its scores pass through.

Scores are reshaped and permuted on their way: [B*H, Sq, Sk], [B, Hk, G, Sq, Sk], [B, Sq, H, Sk], ... A ``Frame``
names the pieces of their axes once ("atoms"), and says of every tensor on the way which atoms each of its axes is made
of, outer to inner. An atom is split as soon as some shape tells its pieces apart. Axes of size one hold no atom.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import fx

from ascend_dynamo.contracts import Builder, Facts

from .._calls import LAYOUT, aten, is_call

Atoms = tuple[int, ...]
Axes = tuple[Atoms, ...]


class Frame:
    """The atoms of one attention. Atoms are numbers; ``leaves`` resolves those that have been split since."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self._sizes: list[Any] = []
        self._pieces: dict[int, Atoms] = {}

    def fresh(self, shape: Iterable[Any]) -> Axes:
        """New atoms for the axes of a tensor of ``shape``."""
        axes: list[Atoms] = []
        for size in shape:
            self._sizes.append(size)
            axes.append(() if self.one(size) else (len(self._sizes) - 1,))
        return tuple(axes)

    def one(self, size: Any) -> bool:
        return self.facts.known(size == 1)

    def leaves(self, atoms: Iterable[int]) -> Atoms:
        found: list[int] = []
        for atom in atoms:
            found.extend(self.leaves(self._pieces[atom]) if atom in self._pieces else (atom,))
        return tuple(found)

    def size(self, atoms: Iterable[int]) -> Any:
        """The size of an axis that is made of ``atoms``."""
        total: Any = 1
        for atom in self.leaves(atoms):
            total = self._sizes[atom] if isinstance(total, int) and total == 1 else total * self._sizes[atom]
        return total

    def split(self, atoms: Atoms, sizes: Sequence[Any]) -> list[Atoms] | None:
        """An axis made of ``atoms`` as axes of ``sizes``, outer to inner; None if that is not known to be possible."""
        wanted = [None if self.one(size) else size for size in sizes]
        rest = list(self.leaves(atoms))
        real = [size for size in wanted if size is not None]
        if len(rest) == 1 and len(real) > 1 and self.facts.known(_product(real) == self._sizes[rest[0]]):
            rest = self._divide(rest[0], real)
        found: list[Atoms] = []
        for size in wanted:
            taken: list[int] = []
            have: Any = 1
            while size is not None and not (taken and self.facts.known(have == size)):
                if not rest:
                    return None
                atom = rest.pop(0)
                own = self._sizes[atom]
                if isinstance(own, int) and isinstance(size, int) and isinstance(have, int) and have * own > size:
                    if size % have or own % (size // have):
                        return None
                    atom, inner = self._divide(atom, [size // have, own // (size // have)])
                    rest.insert(0, inner)
                    own = self._sizes[atom]
                taken.append(atom)
                have = have * own
            found.append(tuple(taken))
        return None if rest else found

    def _divide(self, atom: int, sizes: Sequence[Any]) -> list[int]:
        first = len(self._sizes)
        self._sizes.extend(sizes)
        pieces = list(range(first, first + len(sizes)))
        self._pieces[atom] = tuple(pieces)
        return pieces

    def above(self, n: fx.Node, axes: Axes) -> tuple[fx.Node, Axes] | None:
        """The source behind the layout calls that end in ``n``, whose axes are known, and the axes of the source."""
        source, labels = self.facts.axes(n)
        if source is n:
            return None
        found: dict[str, Atoms] = {}
        shape = self.facts.val(source).shape
        for atoms, label, whole in zip(axes, labels, self.facts.val(n).shape, strict=True):
            parts = [] if label == "1" else label.split("*")
            sizes = [self._part(part, shape, whole, len(parts)) for part in parts]
            pieces = None if None in sizes else self.split(atoms, sizes)
            if pieces is None:
                return None
            found.update(zip(parts, pieces, strict=True))
        return source, tuple(self.whole(found, i) for i in range(len(shape)))

    def _part(self, part: str, shape: Sequence[Any], whole: Any, parts: int) -> Any:
        """The size of one factor of an axis of size ``whole``; None if that is unknown or it repeats data."""
        if part.startswith("x"):
            return None
        if "." not in part:
            return shape[int(part[1:])]
        return whole if parts == 1 else None

    def below(self, source: fx.Node, axes: Axes, n: fx.Node) -> Axes | None:
        """The axes of ``n``, which only layout calls separate from ``source``."""
        if n is source:
            return axes
        found, labels = self.facts.axes(n)
        if found is not source:
            return None
        shape = self.facts.val(n).shape
        pieces: dict[str, Atoms] = {}
        for i, atoms in enumerate(axes):
            parts = sorted({p for label in labels for p in label.split("*") if p.startswith(f"d{i}.")}, key=_piece)
            sizes = [next((s for s, label in zip(shape, labels, strict=True) if label == part), None) for part in parts]
            cut = [atoms] if not parts else None if None in sizes else self.split(atoms, sizes)
            if cut is None:
                return None
            pieces.update(zip(parts or [f"d{i}"], cut, strict=True))
        result: list[Atoms] = []
        for label in labels:
            parts = [] if label == "1" else label.split("*")
            if any(part not in pieces for part in parts):
                return None
            result.append(tuple(atom for part in parts for atom in pieces[part]))
        return tuple(result)

    @staticmethod
    def whole(found: Mapping[str, Atoms], i: int) -> Atoms:
        """Axis ``i`` of a source, from the labelled pieces of it that were found."""
        if f"d{i}" in found:
            return found[f"d{i}"]
        parts = sorted((part for part in found if part.startswith(f"d{i}.")), key=_piece)
        return tuple(atom for part in parts for atom in found[part])

    def aligned(self, shape: Sequence[Any], axes: Axes, level: Sequence[Any]) -> Axes | None:
        """The axes of a tensor of ``shape`` that broadcasts to scores of shape ``level``, whose axes are ``axes``."""
        if len(shape) > len(level):
            return None
        found: list[Atoms] = []
        for own, full, atoms in zip(
            shape, level[len(level) - len(shape) :], axes[len(axes) - len(shape) :], strict=True
        ):
            if self.one(own):
                found.append(())
            elif self.facts.known(own == full):
                found.append(atoms)
            else:
                return None
        return tuple(found)

    def ungrouped(self, n: fx.Node, axes: Axes) -> tuple[fx.Node, Axes]:
        """The tensor in front of the ``expand`` that repeats the heads of ``n`` (or ``n``), and its axes."""
        source, labels = self.facts.axes(n)
        if not any(part.startswith("x") for label in labels for part in label.split("*")):
            return n, axes
        expand = n
        while not is_call(expand, aten.expand.default):
            expand = expand.args[0]  # type: ignore[assignment]
        inner: Any = expand.args[0]
        origin, names = self.facts.axes(inner)
        before, after = self.facts.val(inner).shape, self.facts.val(expand).shape
        copies = [b for a, b in zip(before, after[len(after) - len(before) :], strict=True) if not self._same(a, b)]
        copies += list(after[: len(after) - len(before)])
        if origin is not source or len(copies) != 1 or any("x" in name for name in names):
            return n, axes
        found: dict[int, Atoms] = {}
        for atoms, label in zip(axes, labels, strict=True):
            parts = [] if label == "1" else label.split("*")
            if any(p not in names and not p.startswith("x") for p in parts):
                return n, axes
            pieces = self.split(atoms, [copies[0] if p.startswith("x") else before[names.index(p)] for p in parts])
            if pieces is None:
                return n, axes
            found.update({names.index(p): a for p, a in zip(parts, pieces, strict=True) if not p.startswith("x")})
        return inner, tuple(found.get(i, ()) for i in range(len(before)))

    def _same(self, a: Any, b: Any) -> bool:
        return self.facts.known(a == b)

    def emit(self, b: Builder, n: fx.Node, axes: Axes, groups: Sequence[Iterable[int]], fill: bool = False) -> fx.Node:
        """``n``, whose axes are ``axes``, with one axis per group of atoms.

        Where ``n`` does not vary along an axis, that has size one; with ``fill`` it is expanded. Without ``fill``
        leading axes may be missing if ``n`` does not have them.
        """
        have = [self.leaves(a) for a in axes]
        want = [self.leaves(g) for g in groups]
        if len(have) <= len(want):
            tail = want[len(want) - len(have) :]
            if all(h == w or (not h and not fill) for h, w in zip(have, tail, strict=True)) and (
                len(have) == len(want) or (not fill)
            ):
                return n
        flat = [atom for atoms in have for atom in atoms]
        order = [atom for atoms in want for atom in atoms if atom in flat]
        n = _reshaped(b, self.facts, n, [self.size((atom,)) for atom in flat])
        if flat != order:
            n = b.op(aten.permute.default, n, [flat.index(atom) for atom in order])
        full = [fill or any(atom in flat for atom in atoms) for atoms in want]
        needed = [atom for atoms, whole in zip(want, full, strict=True) if whole for atom in atoms]
        if any(atom not in flat for atom in needed):
            n = _reshaped(b, self.facts, n, [self.size((atom,)) if atom in flat else 1 for atom in needed])
            n = b.op(aten.expand.default, n, [self.size((atom,)) for atom in needed])
        return _reshaped(b, self.facts, n, [self.size(a) if whole else 1 for a, whole in zip(want, full, strict=True)])


def layout_chain(n: fx.Node, source: fx.Node) -> list[fx.Node]:
    """The layout calls from ``n`` up to ``source``, which is not one of them."""
    found: list[fx.Node] = []
    while n is not source and is_call(n, *LAYOUT):
        found.append(n)
        n = n.args[0]  # type: ignore[assignment]
    return found


def _reshaped(b: Builder, facts: Facts, n: fx.Node, shape: list[Any]) -> fx.Node:
    have = n.meta["val"].shape
    same = len(have) == len(shape) and all(facts.known(x == y) for x, y in zip(have, shape, strict=True))
    return n if same else b.op(aten.reshape.default, n, shape)


def _product(sizes: Iterable[Any]) -> Any:
    total: Any = 1
    for size in sizes:
        total = total * size
    return total


def _piece(part: str) -> int:
    return int(part.partition(".")[2])
