"""Why a pattern did not match: the matcher's refusals, of which the one that got furthest is kept."""

from __future__ import annotations

from typing import Any

from torch import fx

from ascend_dynamo.contracts import Facts, NoMatch, ReasonCode


class Why:
    """Collects refusals; cheap to make. ``best`` turns the one with the most progress into a ``NoMatch``."""

    __slots__ = ("_best",)

    def __init__(self) -> None:
        self._best: tuple[float, ReasonCode, Any, Any, Any, str] | None = None

    def note(self, progress: float, code: ReasonCode, node: Any, expected: Any, found: Any, fix: str = "") -> None:
        """Remember a refusal at ``node`` if it got further than those before."""
        if self._best is None or progress > self._best[0]:
            self._best = (progress, code, node, expected, found, fix)

    def refusal(self, refused: NoMatch) -> None:
        self.note(refused.progress or 1.0, refused.code, refused.node, refused.expected, refused.found, refused.fix)

    def best(self, anchor: fx.Node, facts: Facts) -> NoMatch:
        """The nearest miss at ``anchor`` with the user's source line."""
        if self._best is None:
            return NoMatch("op", anchor, "an operator that the pattern ends with", str(anchor.target))
        progress, code, node, expected, found, fix = self._best
        at = node if isinstance(node, fx.Node) else anchor
        return NoMatch(code, at, str(expected), str(found), progress, facts.src(at) or facts.src(anchor), fix)
