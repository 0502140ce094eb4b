"""The router of a mixture of experts -> ``ascend.moe_gate``.

Before (``logits: T[*B, E]``; the steps in brackets are optional)::

    scores = _softmax(convert(logits, float32), -1)          # or sigmoid
    [choice = scores + bias                                   # DeepSeek-V3's correction]
    [choice = masked_fill(choice, ~(best groups), -inf)]
    ids = topk(choice, k).indices
    weights = gather(scores, -1, ids)                        # or topk's values
    [weights = weights / (sum(weights, [-1], True) + eps)]
    [weights = weights * scale]

or top-k of the logits with a softmax over what it chose (GPT-OSS). After::

    weights, ids32 = ascend.moe_gate(logits, bias, top_k=k, scoring=..., n_group=..., normalize=..., scale=..., eps=...)
    ids = convert(ids32, int64)

Scores must be computed in float32 (rounded scores have ties, which would choose other experts), the bias may not enter
the weights, and groups must be ranked by the very scores that they restrict.
"""

from __future__ import annotations

import operator
import random
from typing import Any

import torch
from torch import fx

from ascend_dynamo.contracts import Builder, Domain, Facts, Match, NoMatch
from ascend_dynamo.match import ProceduralPattern

from ._calls import arg, arguments, ascend, aten, convert, dtype, is_call, leaks, lossless, number, rank, refuse
from ._router import Scores, last, read_choice, read_scores, top
from .spellings.router import SPELLINGS, fuzz_inputs

EXPERTS = 1024  # more are no experts: sampling also takes the top of a softmax


class MoeGate(ProceduralPattern):
    name = "moe_gate"
    level = 2
    benefit = 8
    anchors = (aten.topk.default,)
    domain = Domain(shapes={"logits": ("*B", "E"), "bias": ("E",)})
    users = "duplicate"  # zeros are shared between layers; `leaks` guards the rest
    eager = SPELLINGS
    emits = frozenset({"ascend.moe_gate"})

    def match(self, anchor: fx.Node, facts: Facts) -> Match | NoMatch:
        call = arguments(anchor)
        chosen: fx.Node = call["self"]
        experts = facts.val(chosen).shape[-1] if rank(facts, chosen) else 0
        results = {arg(u, 1): u for u in anchor.users if is_call(u, operator.getitem)}
        if 1 not in results:
            return refuse(facts, "op", anchor, "a top-k whose indices are used", "only its values are")
        if top(facts, anchor) is None:
            found = f"k={call['k']}, dim={call['dim']}, largest={call['largest']}"
            return refuse(facts, "arg", anchor, "the k largest along the last axis", found, 0.2)
        if not isinstance(experts, int) or not 2 <= experts <= EXPERTS:
            return refuse(facts, "unproven", anchor, f"2 to {EXPERTS} experts", f"{experts}", 0.1)
        choice = read_choice(facts, chosen, call["k"])
        if isinstance(choice, NoMatch):
            return choice
        scores = read_scores(facts, choice.scores)
        if isinstance(scores, NoMatch):
            return scores
        down = _weights(facts, results, choice.scores, values_are_scores=choice.bias is None)
        if down is None:
            return refuse(facts, "op", anchor, "scores of the chosen experts as their weights", "no use of them", 0.6)
        weights, inner = down
        scoring = scores.scoring
        if not scoring:
            soft = _softmax_below(facts, weights, scores)
            if soft is None or choice.bias is not None or choice.groups > 1:
                return refuse(facts, "op", anchor, "a top-k of softmax or sigmoid scores", f"{chosen.target}", 0.3)
            weights, more = soft
            inner, scoring = (*inner, *more), "topk_softmax"
        options: dict[str, Any] = {"top_k": call["k"], "scoring": scoring, "normalize": False}
        weights, tail = _normalised(facts, weights, options)
        if choice.groups > 1:
            options |= {"n_group": choice.groups, "topk_group": choice.kept}
        if not call["sorted"]:
            options["sorted"] = False
        nodes = frozenset((anchor, *results.values(), *choice.nodes, *scores.nodes, *inner, *tail))
        outputs = (weights, results[1])
        refusal = leaks(facts, (n for n in nodes if not is_call(n, aten.zeros.default)), outputs, 0.9)
        if refusal is not None:
            return refusal
        inputs = {"logits": scores.logits, "bias": choice.bias, "options": options}
        return Match(self.name, anchor, nodes, inputs, outputs)

    def rewrite(self, b: Builder, m: Match) -> tuple[fx.Node, ...]:
        logits, bias = m.inputs["logits"], m.inputs["bias"]
        shape = list(logits.meta["val"].shape)
        flat = logits
        if len(shape) != 2:
            rows = 1
            for size in shape[:-1]:
                rows = rows * size
            flat = b.op(aten.reshape.default, logits, [rows, shape[-1]])
        gate = b.op(ascend.moe_gate.default, flat, bias, **m.inputs["options"])
        results = []
        for i, old in enumerate(m.outputs):
            n = b.op(operator.getitem, gate, i)
            value = old.meta["val"]
            if len(shape) != 2:
                n = b.op(aten.reshape.default, n, list(value.shape))
            results.append(n if n.meta["val"].dtype == value.dtype else b.op(convert, n, value.dtype))
        return tuple(results)

    def fuzz_inputs(self, rng: random.Random, dtype: torch.dtype, spelling: int) -> tuple[Any, ...]:
        return fuzz_inputs(rng, dtype, spelling)


def _weights(
    facts: Facts, results: dict[int, fx.Node], scores: fx.Node, *, values_are_scores: bool
) -> tuple[fx.Node, tuple[fx.Node, ...]] | None:
    """The chosen scores: gathered, or the values of the top-k."""
    for user in results[1].users:
        if is_call(user, aten.gather.default):
            call = arguments(user)
            if call["self"] is scores and call["index"] is results[1] and last(facts, scores, call["dim"]):
                return user, (user,)
    return (results[0], ()) if values_are_scores and 0 in results else None


def _only_user(n: fx.Node) -> fx.Node | None:
    users = list(n.users)
    return users[0] if len(users) == 1 else None


def _softmax_below(facts: Facts, values: fx.Node, scores: Scores) -> tuple[fx.Node, tuple[fx.Node, ...]] | None:
    """The softmax over the chosen logits, and the lossless upcast before it."""
    n, nodes = values, []
    user = _only_user(n)
    if user is not None and is_call(user, convert) and lossless(dtype(facts, n), dtype(facts, user)):
        nodes.append(n := user)
        user = _only_user(n)
    if user is None or not is_call(user, aten._softmax.default):
        return None
    call = arguments(user)
    if not last(facts, n, call["dim"]) or call["half_to_float"]:
        return None
    # the op computes in float64 only for float64 logits
    if dtype(facts, user) == torch.float64 and dtype(facts, scores.logits) != torch.float64:
        return None
    return user, (*nodes, user)


def _normalised(facts: Facts, w: fx.Node, options: dict[str, Any]) -> tuple[fx.Node, tuple[fx.Node, ...]]:
    """What follows the weights: division by their sum, multiplication by a number. Fills ``options``."""
    nodes: list[fx.Node] = [w]
    if dtype(facts, w) not in (torch.float32, torch.float64):
        return w, tuple(nodes)
    users = list(w.users)
    total = next((u for u in users if is_call(u, aten.sum.dim_IntList)), None)
    if total is not None and len(users) == 2:
        call = arguments(total)
        below, eps, between = total, 0.0, [total]
        user = _only_user(total)
        if user is not None and is_call(user, aten.add.Tensor) and arguments(user)["alpha"] == 1:
            found = number(arg(user, 1))
            if found is not None:
                below, eps, user = user, found, _only_user(user)
                between.append(below)
        right = last(facts, w, call["dim"]) and call["keepdim"] and call["dtype"] is None
        right = right and user is not None and user in users and is_call(user, aten.div.Tensor)
        if right and user is not None and arg(user, 0) is w and arg(user, 1) is below:
            options |= {"normalize": True, "eps": eps}
            nodes += [*between, user]
            w = user
    user = _only_user(w)
    if user is not None and is_call(user, aten.mul.Tensor):
        scale = next((number(c) for x, c in (user.args[:2], user.args[1::-1]) if x is w), None)  # type: ignore[misc]
        if scale is not None and dtype(facts, user) == dtype(facts, w):
            options["scale"] = scale
            nodes.append(user)
            w = user
    return w, tuple(nodes)


PATTERNS = (MoeGate(),)
