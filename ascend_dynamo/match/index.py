"""Which alternatives are worth trying at a node: each is filed under the rarest path of operators below its anchor.

A path is the anchor's operator, one of its operands' and one of that operand's operands', whatever the argument
positions, so it survives commuting. Looking a node up costs its two levels of operands, however many patterns exist.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from ascend_dynamo.match.terms import Alternative, Call

DEPTH = 12  # of procedural patterns that do not say
Path = tuple[int, ...]  # ids of operators; overloads live as long as the process


@dataclass(frozen=True, eq=False)
class Entry:
    """One thing to try: a pattern with one of its alternatives (None: a procedural pattern); lower ``rank`` first."""

    rank: tuple[int, ...]
    pattern: Any
    alternative: Alternative | None
    height: int = 1  # how far below its anchor a match can reach
    ops: frozenset[int] | None = None  # operators that it contains; None: unknown

    @classmethod
    def of(cls, rank: tuple[int, ...], pattern: Any, alternative: Alternative | None) -> Entry:
        """An entry with what can be read off the alternative."""
        if alternative is None:
            return cls(rank, pattern, None, getattr(pattern, "depth", DEPTH))
        ops = frozenset(id(c.op) for c in alternative.calls)
        return cls(rank, pattern, alternative, max(map(height, alternative.roots)), ops)

    def may_see(self, distance: int, ops: frozenset[int]) -> bool:
        """Whether new calls of ``ops``, ``distance`` below a node, can make this match there."""
        return distance < self.height and (self.ops is None or not self.ops.isdisjoint(ops))


class Index:
    """``candidates(node)`` lists the entries to try at a node; ``depth`` is the greatest height of an entry."""

    def __init__(self, entries: Iterable[Entry], counts: Counter[int]) -> None:
        self._flat: dict[int, list[Entry]] = {}
        self._two: dict[Path, list[Entry]] = {}
        self._three: dict[Path, list[Entry]] = {}
        self._deep: set[int] = set()
        self.anchors: set[int] = set()  # ids of the operators at which something can end
        self.depth = 1
        for entry in entries:
            self.depth = max(self.depth, entry.height)
            if entry.alternative is None:
                for op in entry.pattern.anchors:
                    self.anchors.add(id(op))
                    self._flat.setdefault(id(op), []).append(entry)
                continue
            path = _rarest(entry.alternative.roots[0], counts)
            self.anchors.add(path[0])
            if len(path) == 1:
                self._flat.setdefault(path[0], []).append(entry)
            else:
                self._deep.add(path[0])
                table = self._two if len(path) == 2 else self._three
                table.setdefault(path, []).append(entry)

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


def height(call: Call) -> int:
    """The number of calls on the longest way down from ``call``."""
    return 1 + max((height(c) for c in call.children()), default=0)


def _paths(root: Call) -> Iterator[Path]:
    op = id(root.op)
    yield (op,)
    for child in root.children():
        c = id(child.op)
        yield (op, c)
        for grand in child.children():
            yield (op, c, id(grand.op))


def _rarest(root: Call, counts: Counter[int]) -> Path:
    """The path whose rarest operator is rarest in the graph; of equals the longest, then the first."""
    return min(_paths(root), key=lambda path: (min(counts[op] for op in path), -len(path)))
