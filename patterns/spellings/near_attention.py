"""Near-attention: one step of a spelling done differently, so that it is something else, or attention with a catch.

It need not become ``flash_attention``; where it does, it must be right. Each twist acts at one stage: behind it, or
for ``softmax`` and ``weighted`` in its place.
"""

from __future__ import annotations

from types import MappingProxyType

from .grammar_source import Writer


def _at(stage: str, *lines: str, needs: str = "") -> tuple[str, tuple[str, ...], str]:
    """A twist made of lines; ``needs`` is an input to draw, as ``name:axes``."""
    return stage, lines, needs


TWISTS: MappingProxyType[str, tuple[str, tuple[str, ...], str]] = MappingProxyType(
    {
        # softmax of something else, or along something else
        "softmax_queries": _at("softmax", "p = torch.softmax(scores, dim=-2)"),
        "softmax_heads": _at("softmax", "p = torch.softmax(scores, dim=1)"),
        "softmax_batch": _at("softmax", "p = torch.softmax(scores, dim=0)"),
        "softmax_everything": _at("softmax", "p = torch.softmax(scores.flatten(-2), dim=-1).view_as(scores)"),
        "sigmoid": _at("softmax", "p = torch.sigmoid(scores)"),
        "softmin": _at("softmax", "p = F.softmin(scores, dim=-1)"),
        "exp2": _at(
            "softmax", "e = torch.exp2(scores - scores.amax(-1, keepdim=True))", "p = e / e.sum(-1, keepdim=True)"
        ),
        "minus_mean": _at(
            "softmax", "e = torch.exp(scores - scores.mean(-1, keepdim=True))", "p = e / e.sum(-1, keepdim=True)"
        ),
        "minus_max_of_all": _at("softmax", "e = torch.exp(scores - scores.max())", "p = e / e.sum(-1, keepdim=True)"),
        "no_max": _at("softmax", "e = torch.exp(scores)", "p = e / e.sum(-1, keepdim=True)"),
        "sum_of_queries": _at(
            "softmax", "e = torch.exp(scores - scores.amax(-1, keepdim=True))", "p = e / e.sum(-2, keepdim=True)"
        ),
        "max_of_queries": _at(
            "softmax", "e = torch.exp(scores - scores.amax(-2, keepdim=True))", "p = e / e.sum(-1, keepdim=True)"
        ),
        "sum_of_others": _at(
            "softmax",
            "e = torch.exp(scores - scores.amax(-1, keepdim=True))",
            "p = e / (e.sum(-1, keepdim=True) + 1.0)",
        ),
        "sum_with_eps": _at(
            "softmax",
            "e = torch.exp(scores - scores.amax(-1, keepdim=True))",
            "p = e / (e.sum(-1, keepdim=True) + 1e-6)",
        ),
        "sum_of_exp_unshifted": _at(
            "softmax",
            "e = torch.exp(scores - scores.amax(-1, keepdim=True))",
            "p = e / torch.exp(scores).sum(-1, keepdim=True)",
        ),
        "no_sum": _at("softmax", "p = torch.exp(scores - scores.amax(-1, keepdim=True))"),
        "log_weights": _at("softmax", "p = torch.log_softmax(scores, dim=-1).nan_to_num(0.0, 0.0, 0.0)"),
        "logsumexp_of_queries": _at("softmax", "p = torch.exp(scores - torch.logsumexp(scores, -2, keepdim=True))"),
        "sinks_of_zero": _at(
            "softmax",
            "p = torch.softmax(torch.cat([scores, torch.zeros_like(scores[..., :1])], -1), -1)[..., :-1]",
        ),
        "sinks_wrong_end": _at(
            "softmax",
            "p = torch.softmax(torch.cat([scores, torch.zeros_like(scores[..., :1])], -1), -1)[..., 1:]",
        ),
        "sinks_of_rows": _at(
            "softmax",
            "row = extra.expand(*scores.shape[:-1], 1)",
            "p = torch.softmax(torch.cat([scores, row], -1), -1)[..., :-1]",
            needs="extra:s1",
        ),
        "sinks_renormalised": _at(
            "softmax",
            "p = torch.softmax(torch.cat([scores, torch.zeros_like(scores[..., :1])], -1), -1)[..., :-1]",
            "p = p / p.sum(-1, keepdim=True)",
        ),
        # the scores
        "alpha_two": _at("scores", "scores = torch.add(scores, extra, alpha=2)", needs="extra:st"),
        "alpha_on_scores": _at("scores", "scores = torch.add(extra, scores, alpha=2)", needs="extra:st"),
        "mask_multiplied": _at("scores", "scores = scores * (extra > 0)", needs="extra:st"),
        "mask_times_and_plus": _at(
            "scores", "scores = scores * (extra > 0) - (extra <= 0).to(scores.dtype) * 10000.0", needs="extra:st"
        ),
        "mask_not_binary": _at("scores", "scores = scores + (1.0 - extra) * -3.0", needs="extra:st"),
        "scale_of_rows": _at("product", "scores = scores * extra", needs="extra:s1"),
        "scale_of_keys": _at("product", "scores = scores * extra", needs="extra:1t"),
        "scale_tensor": _at("product", "scores = scores * extra", needs="extra:1"),
        "scale_by_itself": _at("product", "scores = scores / scores.abs().amax()"),
        "scale_after_bias": _at("scores", "scores = (scores + extra) * 0.7", needs="extra:st"),
        "softcap_uneven": _at("product", "scores = torch.tanh(scores / 3.0) * 2.0"),
        "softcap_after_mask": _at("scores", "scores = torch.tanh(scores / 3.0) * 3.0"),
        "softcap_then_scale": _at("product", "scores = torch.tanh(scores / 3.0) * 3.0 * 0.5"),
        "softcap_negative": _at("product", "scores = torch.tanh(scores / -3.0) * -3.0"),
        "softcap_by_tensor": _at("product", "scores = torch.tanh(scores / extra) * extra", needs="extra:1"),
        "scale_negative": _at("product", "scores = scores * -0.5"),
        "scale_zero": _at("product", "scores = scores * 0.0"),
        "scale_infinite": _at("product", "scores = scores * math.inf"),
        "softcap_outside": _at("scores", "scores = torch.tanh(scores)"),
        "scores_twice": _at("product", "scores = scores + scores.relu()"),
        "scores_squared": _at("product", "scores = scores * scores"),
        "scores_clamped": _at("product", "scores = scores.clamp(-1.0, 1.0)"),
        "scores_negated": _at("product", "scores = -scores"),
        "scores_minus_row_max": _at("product", "scores = scores - scores.amax(-1, keepdim=True)"),
        "scores_minus_column_max": _at("product", "scores = scores - scores.amax(-2, keepdim=True)"),
        "scores_in_double": _at("product", "scores = (scores.double() * 0.5).to(q.dtype)"),
        "scores_half": _at("product", "scores = scores.to(torch.float16).to(q.dtype)"),
        "scores_bfloat16": _at("product", "scores = scores.to(torch.bfloat16).to(q.dtype)"),
        "scores_shifted": _at("product", "scores = scores.roll(1, -1)"),
        "scores_sorted": _at("product", "scores = scores.sort(-1).values"),
        "scores_normalised": _at("product", "scores = F.layer_norm(scores, scores.shape[-1:])"),
        "scores_topk": _at(
            "scores",
            "scores = torch.where(scores >= scores.topk(2, -1).values[..., -1:], scores, -math.inf)",
        ),
        "scores_hidden_twice": _at("scores", "scores = scores.masked_fill(scores < 0, -math.inf)"),
        "causal_off_by_one": _at(
            "scores",
            "scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(2), -math.inf)",
        ),
        "causal_strict": _at(
            "scores",
            "scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(0), -math.inf)",
        ),
        "causal_backwards": _at(
            "scores",
            "scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).tril(-1), -math.inf)",
        ),
        "causal_of_keys": _at(
            "scores",
            "i = torch.arange(scores.shape[-1])",
            "scores = scores.masked_fill((i[None] > i[:, None])[-scores.shape[-2] :], -math.inf)",
        ),
        "window_off_by_one": _at(
            "scores",
            "i, j = torch.arange(scores.shape[-2])[:, None], torch.arange(scores.shape[-1])[None]",
            "scores = scores.masked_fill((j > i) | (j < i - 2), -math.inf)",
        ),
        "window_backwards": _at(
            "scores",
            "i, j = torch.arange(scores.shape[-2])[:, None], torch.arange(scores.shape[-1])[None]",
            "scores = scores.masked_fill((j < i) | (j > i + 2), -math.inf)",
        ),
        # the weights
        "weights_scaled_by_row": _at("weights", "p = p * extra", needs="extra:s1"),
        "weights_in_double": _at("weights", "p = p.double().to(v.dtype)"),
        "weights_masked": _at("weights", "p = p * (extra > 0)", needs="extra:st"),
        "weights_filled": _at("weights", "p = p.masked_fill(extra > 0, 0.0)", needs="extra:st"),
        "weights_renormalised": _at(
            "weights", "p = p * (extra > 0)", "p = p / p.sum(-1, keepdim=True)", needs="extra:st"
        ),
        "weights_normalised_again": _at("weights", "p = p / p.sum(-1, keepdim=True)"),
        "weights_softmax_again": _at("weights", "p = torch.softmax(p, -1)"),
        "weights_squared": _at("weights", "p = p * p"),
        "weights_tanh": _at("weights", "p = torch.tanh(p)"),
        "weights_plus_bias": _at("weights", "p = p + extra", needs="extra:st"),
        "weights_scaled_by_key": _at("weights", "p = p * extra", needs="extra:1t"),
        "weights_scaled": _at("weights", "p = p * 0.5"),
        "weights_nan_to_num": _at("weights", "p = torch.nan_to_num(p)"),
        "weights_one_minus": _at("weights", "p = 1.0 - p"),
        "weights_rounded": _at("weights", "p = p.to(torch.bfloat16).to(v.dtype)"),
        "weights_half": _at("weights", "p = p.to(torch.float16).to(v.dtype)"),
        "weights_dropped": _at("weights", "p = torch.cat([p[..., :-1], torch.zeros_like(p[..., :1])], -1)"),
        "weights_detached_copy": _at("weights", "p = p.clone()"),
        "weights_rolled": _at("weights", "p = p.roll(1, -1)"),
        "weights_flipped": _at("weights", "p = p.flip(-1)"),
        "weights_of_mean_head": _at("weights", "p = p.mean(1, keepdim=True).expand_as(p)"),
        "dropout_all": _at("weights", "p = F.dropout(p, 1.0, True)"),
        "head_temperature": _at("product", "scores = scores * extra", needs="extra:H11"),
        # v
        "value_transposed": _at("weighted", "y = p @ v.transpose(-1, -2)"),
        "value_is_scores": _at("weighted", "y = p @ (v * 0.5 + v)"),
        "value_flipped": _at("weighted", "y = p @ v.flip(-2)"),
        "weights_transposed": _at("weighted", "y = p.transpose(-1, -2) @ v"),
        "key_not_transposed": _at("product", "scores = q @ k"),
        "heads_mixed": _at("weighted", "y = p @ v.roll(1, 1)"),
        "value_written": _at("weighted", "v[..., :1] = 0.0", "y = p @ v"),
        "sinks_not_dropped": _at(
            "weighted", "y = torch.cat([p, torch.ones_like(p[..., :1])], -1) @ torch.cat([v, v[..., :1, :]], -2)"
        ),
        "two_outputs_of_weights": _at("weighted", "y = p @ v + p @ v.flip(-2)"),
        # outputs
        "weights_returned": _at("output", "RETURN p"),
        "scores_returned": _at("output", "RETURN scores"),
        "scores_shared": _at("output", "RETURN torch.softmax(scores * 2, -1)"),
        "masked_scores_shared": _at("output", "RETURN torch.softmax(scores, -1).sum()"),
        "weights_summed": _at("output", "RETURN p.sum(-1)"),
        "query_returned": _at("output", "RETURN q + 1"),
        "output_added": _at("output", "RETURN y + 1"),
        # the operands
        "query_written": _at("operands", "q = q.clone()", "q.mul_(2.0)"),
        "query_written_later": _at("product", "q.mul_(2.0)"),
        "key_written_later": _at("product", "k.add_(1.0)"),
        "value_written_later": _at("weights", "v.mul_(0.5)"),
        "scores_written_partly": _at("product", "scores[..., :1] = 0.0"),
        "weights_written_partly": _at("weights", "p[..., :1] = 0.0"),
        "key_is_value": _at("operands", "v = k"),
        "query_is_key": _at("operands", "k = q"),
        "query_rounded": _at("operands", "q = q.to(torch.bfloat16).to(k.dtype)"),
        "value_rounded": _at("operands", "v = v.to(torch.bfloat16).to(k.dtype)"),
    }
)


def twist(w: Writer, stage: str) -> bool:
    """Write the twist of this spelling if it belongs to ``stage``; False if it does not."""
    where, lines, needs = TWISTS.get(w.choices["twist"], ("", (), ""))
    if where != stage:
        return False
    if needs:
        w.input(*needs.split(":"))
    w.add(*(line for line in lines if not line.startswith("RETURN ")))
    w.returned.extend(line.removeprefix("RETURN ") for line in lines if line.startswith("RETURN "))
    if stage == "softmax":
        w.order["p"] = w.order["scores"]
    if stage == "weighted":
        w.order["y"] = w.order["p"].replace("t", "e")
    return True
