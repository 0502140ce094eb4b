"""Reading a router upwards from the top-k that chooses the experts: bias, group mask, scores, logits."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ascend_dynamo.contracts import Facts, NoMatch

from ._calls import arg, arguments, aten, convert, dtype, is_call, lossless, number, rank, refuse

_ZEROS = (aten.zeros_like.default, aten.zeros.default, aten.new_zeros.default)
_FILLS = (aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.where.self, aten.where.ScalarOther)


@dataclass(frozen=True)
class Choice:
    """What a top-k chooses by: ``scores`` (+ ``bias``), in the ``kept`` best of ``groups``.

    ``nodes`` is what lies between the scores (exclusive) and the top-k.
    """

    scores: fx.Node
    bias: fx.Node | None
    groups: int
    kept: int
    nodes: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Scores:
    """Logits, and what makes them scores: "softmax", "sigmoid", or "" for logits themselves."""

    logits: fx.Node
    scoring: str
    nodes: tuple[fx.Node, ...]


def last(facts: Facts, n: fx.Node, dim: Any) -> bool:
    """True if ``dim`` (a number or a list of one) is the last axis of ``n``."""
    dim = dim[0] if isinstance(dim, (list, tuple)) and len(dim) == 1 else dim
    return isinstance(dim, int) and dim in (-1, rank(facts, n) - 1)


def top(facts: Facts, n: Any) -> dict[str, Any] | None:
    """The arguments of a top-k of the largest along the last axis, k a number; else None."""
    if not is_call(n, aten.topk.default):
        return None
    call = arguments(n)
    good = last(facts, call["self"], call["dim"]) and call["largest"] is True and isinstance(call["k"], int)
    return call if good else None


def part(n: Any, target: Any, index: int) -> fx.Node | None:
    """The call of ``target`` of whose results ``n`` is the one at ``index``."""
    if is_call(n, operator.getitem) and arg(n, 1) == index and is_call(arg(n, 0), target):
        found: fx.Node = arg(n, 0)
        return found
    return None


def read_scores(facts: Facts, n: fx.Node) -> Scores | NoMatch:
    """Softmax or sigmoid in float32 or wider, and the logits below its lossless upcast."""
    if is_call(n, aten._softmax.default):
        call, scoring = arguments(n), "softmax"
        if not last(facts, call["self"], call["dim"]) or call["half_to_float"]:
            return refuse(facts, "arg", n, "softmax over the experts (the last axis)", f"dim={call['dim']}", 0.5)
    elif is_call(n, aten.sigmoid.default):
        scoring = "sigmoid"
    else:
        return Scores(n, "", ())
    source: fx.Node = arg(n, 0)
    if dtype(facts, n) not in (torch.float32, torch.float64):
        fix = "compute the scores in float32: softmax(logits, dim=-1, dtype=torch.float32)"
        return refuse(facts, "dtype", n, "scores of float32", f"{dtype(facts, n)}", 0.6, fix)
    upcast = source
    if is_call(source, convert) and dtype(facts, n) == torch.float32:
        narrow: fx.Node = arg(source, 0)
        if lossless(dtype(facts, narrow), torch.float32):
            return Scores(narrow, scoring, (upcast, n))
    return Scores(source, scoring, (n,))


def read_choice(facts: Facts, n: fx.Node, top_k: int) -> Choice | NoMatch:
    """What the top-k of ``n`` [..., E] chooses by."""
    experts = facts.val(n).shape[-1]
    flat = n
    if is_call(n, aten.reshape.default) and is_call(arg(n, 0), *_FILLS):
        flat = arg(n, 0)  # masked as [T, groups, E / groups]
    if not is_call(flat, *_FILLS):
        return _with_bias(facts, n, 1, 1, ())
    read = _masked(facts, flat)
    if read is None:
        return refuse(facts, "op", flat, "scores where a group mask keeps them", f"{flat.target}", 0.4)
    base, keep, fill, nodes = read
    groups = _groups(facts, keep, base)
    if isinstance(groups, NoMatch):
        return groups
    count, kept, summed, source, more = groups
    if is_call(base, aten.reshape.default) and rank(facts, base) == rank(facts, n) + 1:
        nodes, base = (*nodes, base), arg(base, 0)
    if base is not source or not facts.known(facts.val(base).shape[-1] == experts):
        return refuse(facts, "op", flat, "groups ranked by what the mask is laid over", f"%{source.name}", 0.6)
    inner = nodes if flat is n else (*nodes, n)
    choice = _with_bias(facts, base, count, kept, (*inner, *more))
    if isinstance(choice, NoMatch):
        return choice
    if summed != (choice.bias is not None) and count > 1:
        expected = "the sum of a group's two best with a bias, its best without"
        return refuse(facts, "arg", flat, expected, "the other one", 0.7)
    if fill != -math.inf and not (fill == 0 and choice.bias is None and is_call(choice.scores, *_POSITIVE)):
        fix = 'fill with float("-inf")'
        return refuse(facts, "unproven", flat, "a fill below every score", f"{fill}", 0.7, fix)
    if top_k > kept * (experts // count):
        return refuse(facts, "arg", flat, f"{top_k} experts in the groups kept", f"{kept * (experts // count)}", 0.7)
    return choice


_POSITIVE = (aten._softmax.default, aten.sigmoid.default)


def _with_bias(facts: Facts, n: fx.Node, groups: int, kept: int, nodes: tuple[fx.Node, ...]) -> Choice | NoMatch:
    if not is_call(n, aten.add.Tensor):
        return Choice(n, None, groups, kept, nodes)
    call = arguments(n)
    for scores, bias in ((call["self"], call["other"]), (call["other"], call["self"])):
        if not (isinstance(scores, fx.Node) and isinstance(bias, fx.Node) and is_call(scores, *_POSITIVE)):
            continue
        if rank(facts, bias) != 1 or not facts.known(facts.val(bias).shape[0] == facts.val(n).shape[-1]):
            return refuse(facts, "shape", n, "a bias per expert", f"{list(facts.val(bias).shape)}", 0.6)
        if call["alpha"] != 1:
            return refuse(facts, "arg", n, "scores + bias", f"alpha={call['alpha']}", 0.6)
        if dtype(facts, n) != dtype(facts, scores) or not lossless(dtype(facts, bias), dtype(facts, scores)):
            return refuse(facts, "dtype", n, "a bias that leaves the scores' dtype", f"{dtype(facts, bias)}", 0.6)
        return Choice(scores, bias, groups, kept, (*nodes, n))
    return refuse(facts, "op", n, "scores + a bias per expert", "another sum", 0.4)


def _masked(facts: Facts, n: fx.Node) -> tuple[fx.Node, fx.Node, float, tuple[fx.Node, ...]] | None:
    """(what is masked, where it is kept, the fill, nodes) of a masked_fill or where."""
    call = arguments(n)
    if is_call(n, aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        base, hide, value = call["self"], call["mask"], call["value"]
        inverse = is_call(hide, aten.logical_not.default) or (is_call(hide, aten.eq.Scalar) and arg(hide, 1) == 0)
        if not inverse and not (is_call(hide, aten.bitwise_not.default) and dtype(facts, hide) == torch.bool):
            return None
        keep = arg(hide, 0)
        nodes: tuple[fx.Node, ...] = (n, hide)
    else:
        base, keep, value = call["self"], call["condition"], call["other"]
        nodes = (n,)
    fill = number(value)
    if fill is None and isinstance(value, fx.Node):
        constant = facts.const(value)
        fill = float(constant) if constant is not None and constant.numel() == 1 else None
    if fill is None or not isinstance(base, fx.Node) or not isinstance(keep, fx.Node):
        return None
    return base, keep, fill, nodes


def _groups(
    facts: Facts, keep: fx.Node, base: fx.Node
) -> tuple[int, int, bool, fx.Node, tuple[fx.Node, ...]] | NoMatch:
    """(groups, kept groups, whether a group's worth is the sum of two, what they were ranked by, nodes)."""
    nodes = [keep]
    mask = keep
    if is_call(keep, convert) and dtype(facts, keep) == torch.bool:
        mask = arg(keep, 0)
    source, labels = facts.axes(mask)
    if not is_call(source, aten.scatter.value) or not _spread(facts, mask, source, labels):
        return refuse(facts, "op", keep, "a mask of whole groups, scattered", f"%{source.name}", 0.5)
    n = mask
    while n is not source:
        nodes.append(n)
        n = arg(n, 0)
    call = arguments(source)
    zeros, index = call["self"], call["index"]
    ranking = part(index, aten.topk.default, 1)
    best = top(facts, ranking)
    shape = facts.val(source).shape
    good = is_call(zeros, *_ZEROS) and last(facts, zeros, call["dim"]) and call["value"] not in (0, False)
    if ranking is None or best is None or not good or not isinstance(shape[-1], int):
        return refuse(facts, "op", source, "ones scattered to the best groups", "something else", 0.5)
    worth: fx.Node = best["self"]
    if rank(facts, worth) != len(shape) or not facts.known(facts.val(worth).shape[-1] == shape[-1]):
        return refuse(facts, "shape", source, "a mask of the groups' shape", f"{list(shape)}", 0.5)
    read = _worth(facts, worth)
    if read is None:
        return refuse(facts, "op", worth, "a group's best score, or the sum of its two best", f"{worth.target}", 0.5)
    grouped, summed, inner = read
    flat = grouped
    if grouped is not base:
        if not is_call(grouped, aten.reshape.default):
            return refuse(facts, "op", grouped, "scores in groups", f"{grouped.target}", 0.5)
        flat = arg(grouped, 0)
        inner = (*inner, grouped)
    else:
        flat = arg(base, 0) if is_call(base, aten.reshape.default) else base
    sizes, members = facts.val(grouped).shape, facts.val(flat).shape[-1]
    split = isinstance(sizes[-1], int) and isinstance(members, int) and sizes[-1] * shape[-1] == members
    if len(sizes) != len(shape) + 1 or not facts.known(sizes[-2] == shape[-1]) or not split:
        return refuse(facts, "shape", grouped, "neighbouring experts in groups", f"{list(sizes)}", 0.5)
    nodes += [source, zeros, index, ranking, worth, *inner]
    return shape[-1], best["k"], summed, flat, tuple(nodes)


def _spread(facts: Facts, mask: fx.Node, source: fx.Node, labels: tuple[str, ...]) -> bool:
    """True if ``mask`` is ``source`` [..., G] with each group repeated for its members: [..., E] or [..., G, 1]."""
    shape, before = facts.val(mask).shape, facts.val(source).shape
    lead = len(before) - 1
    one = [isinstance(s, int) and s == 1 for s in shape]
    if any(not one[i] and labels[i] != f"d{i}" for i in range(lead)):
        return False
    whole = f"d{lead}"
    if len(shape) == lead + 1:
        return labels[lead] in ("x0" if facts.known(before[-1] == 1) else f"{whole}*x0", whole)
    return len(shape) == lead + 2 and one[-1] and (one[lead] or labels[lead] == whole)


def _worth(facts: Facts, n: fx.Node) -> tuple[fx.Node, bool, tuple[fx.Node, ...]] | None:
    """(the scores in groups, True for the sum of two and False for the best, nodes)."""
    if is_call(n, aten.sum.dim_IntList):
        call = arguments(n)
        pair = part(call["self"], aten.topk.default, 0)
        two = top(facts, pair)
        if two is None or pair is None or two["k"] != 2 or not last(facts, call["self"], call["dim"]):
            return None
        if call["keepdim"] or call["dtype"] is not None:
            return None
        return two["self"], True, (call["self"], pair)
    if is_call(n, aten.amax.default):
        call = arguments(n)
        return (call["self"], False, ()) if last(facts, call["self"], call["dim"]) and not call["keepdim"] else None
    best = part(n, aten.max.dim, 0)
    if best is not None:
        call = arguments(best)
        return (
            (call["self"], False, (best,)) if last(facts, call["self"], call["dim"]) and not call["keepdim"] else None
        )
    return None
