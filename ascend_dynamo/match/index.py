"""Which alternatives are worth trying at a node: each is filed under the rarest path of operators below its anchor.

A path is the anchor's operator, one of its operands' and one of that operand's operands', whatever the argument
positions, so it survives commuting. Looking a node up costs its two levels of operands, however many patterns exist.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import fx

from ascend_dynamo.match.terms import Alternative

DEPTH = 12  # of procedural patterns that do not say how far they read
Path = tuple[int, ...]  # ids of operators; overloads live as long as the process


class Entry:
    """One thing to try: a pattern with one of its alternatives (None: a procedural pattern); lower ``rank`` first.

    ``height`` is how far below its anchor a match can reach, ``ops`` the operators whose appearance can make a refused
    site match: those that it contains (None: any).
    """

    __slots__ = ("alternative", "height", "ops", "pattern", "rank")

    def __init__(self, rank: tuple[int, ...], pattern: Any, alternative: Alternative | None) -> None:
        self.rank = rank
        self.pattern = pattern
        self.alternative = alternative
        self.height: int
        self.ops: frozenset[int] | None
        if alternative is not None:
            self.height, self.ops = alternative.height, alternative.ops
        else:
            self.height = getattr(pattern, "depth", DEPTH)
            self.ops = frozenset(map(id, getattr(pattern, "reads", ()))) or None

    def may_see(self, distance: int, ops: frozenset[int]) -> bool:
        """Whether new calls of ``ops``, ``distance`` below a node, can make this match there."""
        return distance < self.height and (self.ops is None or not self.ops.isdisjoint(ops))


class Index:
    """``candidates(node)`` lists the entries to try at a node."""

    def __init__(self, entries: Iterable[Entry], counts: Counter[int]) -> None:
        self._flat: dict[int, list[Entry]] = {}
        self._two: dict[Path, list[Entry]] = {}
        self._three: dict[Path, list[Entry]] = {}
        self._deep: set[int] = set()
        self._entries: list[Entry] = []
        self.anchors: set[int] = set()  # ids of the operators at which something can end
        for entry in entries:
            self._entries.append(entry)
            if entry.alternative is None:
                for op in entry.pattern.anchors:
                    self.anchors.add(id(op))
                    self._flat.setdefault(id(op), []).append(entry)
                continue
            path = _rarest(entry.alternative.paths, counts)
            self.anchors.add(path[0])
            if len(path) == 1:
                self._flat.setdefault(path[0], []).append(entry)
            else:
                self._deep.add(path[0])
                table = self._two if len(path) == 2 else self._three
                table.setdefault(path, []).append(entry)

    def reach(self, ops: frozenset[int]) -> int:
        """How far above new calls of ``ops`` a site may be that they make match."""
        return max((e.height for e in self._entries if e.may_see(0, ops)), default=0)

    def candidates(self, node: fx.Node) -> list[Entry]:
        """Entries whose path the node has, each once, in no particular order."""
        op = id(node.target)
        found = self._flat.get(op)
        if op not in self._deep:
            return found or []
        out = list(found) if found else []
        two, three = self._two, self._three
        seen: set[Path] = set()
        for child in node.all_input_nodes:
            if child.op != "call_function":
                continue
            c = id(child.target)
            path: Path = (op, c)
            if path in two and path not in seen:
                seen.add(path)
                out.extend(two[path])
            if three:
                for grand in child.all_input_nodes:
                    path = (op, c, id(grand.target))
                    if path in three and path not in seen:
                        seen.add(path)
                        out.extend(three[path])
        return out


def count_ops(nodes: Iterable[fx.Node]) -> Counter[int]:
    """How often each operator occurs, by id."""
    return Counter(id(n.target) for n in nodes)


def _rarest(paths: tuple[Path, ...], counts: Counter[int]) -> Path:
    """The path whose rarest operator is rarest in the graph; of equals the longest, then the first."""
    return min(paths, key=lambda path: (min(counts[op] for op in path), -len(path)))
