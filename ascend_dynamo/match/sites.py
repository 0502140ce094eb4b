"""Whether a match may be replaced where it stands, and where its replacement goes: users, writes, streams, regions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import fx

from ascend_dynamo.contracts import Facts, Match, NoMatch, ReasonCode, Users
from ascend_dynamo.ir import effects
from ascend_dynamo.regions import forced, innermost


def allowed_in(region: str) -> bool:
    """Whether patterns may fire in the region; a ``fuse`` region forces those that it names and permits the others."""
    return not region or innermost(region) != "no_fuse"


def stream(node: fx.Node) -> Any:
    return (node.meta.get("custom") or {}).get("stream")


def _input_nodes(m: Match) -> list[fx.Node]:
    found: dict[fx.Node, None] = {}
    for value in m.inputs.values():
        for v in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(v, fx.Node) and v not in m.nodes:  # a recogniser may note its own nodes there
                found[v] = None
    for node in m.nodes:  # what a match reads beside its named inputs: sizes, constants
        for v in node.all_input_nodes:
            if v not in m.nodes:
                found[v] = None
    return list(found)


def place(m: Match, users: Users, facts: Facts, pure: bool = False) -> fx.Node | NoMatch:
    """The node in front of which the replacement goes, or why the match must be left alone.

    Every user of an output outside of the match must come later, every input earlier; no write to what the match
    reads may lie between; all nodes must be in one stream and one region, which allows the pattern.
    ``pure`` says that nothing in the graph writes or acts, which saves looking.
    """
    nodes, outputs = m.nodes, frozenset(m.outputs)
    refusal = _borders(m, facts)
    if refusal is not None:
        return refusal
    point = last = max(nodes)
    for node in nodes:
        for user in node.users:
            if user in nodes:
                continue
            if node in outputs:
                point = min(point, user)
            elif users != "duplicate":
                what = "returned" if user.op == "output" else f"also used by %{user.name}"
                fix = "do not return or reuse this intermediate, or declare the pattern with users='duplicate'"
                return _no(facts, "users", node, "an intermediate that only the fusion uses", what, fix)
    inputs = _input_nodes(m)
    for node in inputs:
        if not node < point:
            found = f"%{node.name} is computed after %{point.name} needs the result"
            return _no(facts, "unproven", node, "every input before the first use of a result", found)
    if pure:
        return point
    first = min(nodes)
    for effect in facts.effects_between(first, last):
        for target in effects.written(effect) or effect.all_input_nodes:
            read = next((n for n in (*inputs, *nodes) if facts.may_alias(n, target)), None)
            if read is not None:
                expected = f"%{read.name} unchanged between %{first.name} and %{last.name}"
                return _no(facts, "mutation", effect, expected, f"a write by {effect.target}")
    return point


def _borders(m: Match, facts: Facts) -> NoMatch | None:
    region, where = facts.region(m.anchor), stream(m.anchor)
    if not allowed_in(region):
        return _no(facts, "region", m.anchor, "a place where patterns may fire", f'the region "{region}"')
    for node in m.nodes:
        if facts.region(node) != region:
            found = f'"{facts.region(node)}" and "{region}"'
            return _no(facts, "region", node, "all nodes in one fuse region", found)
        if stream(node) != where:
            return _no(facts, "stream", node, f"all nodes on stream {where}", f"stream {stream(node)}")
    return None


def _no(facts: Facts, code: ReasonCode, node: fx.Node, expected: str, found: str, fix: str = "") -> NoMatch:
    return NoMatch(code, node, expected, found, 1.0, facts.src(node), fix)


def forced_regions(nodes: Iterable[fx.Node], facts: Facts) -> dict[str, tuple[str, ...]]:
    """Every region that forces patterns, with their names, in program order."""
    found: dict[str, tuple[str, ...]] = {}
    for node in nodes:
        region = facts.region(node) if "custom" in node.meta else ""
        if region and region not in found and (names := forced(region)):
            found[region] = names
    return found
