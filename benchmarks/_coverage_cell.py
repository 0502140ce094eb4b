"""One cell of ``coverage.py``: a family, an attention implementation and a dtype, in a process of its own.

    python _coverage_cell.py FAMILY IMPLEMENTATION DTYPE TARGET STEPS

prints one JSON object. Prefill and decode are one compiled model with a DynamicCache, as users have it: the first call
reads the prompt, the next ones a token each. ``generate`` decodes greedily with a StaticCache, twice. Every result is
judged against a float64 copy of the model and against eager, by the one definition of equality that everything uses.
"""

from __future__ import annotations

import ast
import copy
import json
import re
import sys
import traceback
from collections import Counter
from functools import cache
from typing import Any

import _families
import _models
import torch
from torch import Tensor

from ascend_dynamo import hf
from ascend_dynamo.backend import Backend
from ascend_dynamo.dialect.equal import agree
from ascend_dynamo.errors import AscendDynamoError
from ascend_dynamo.report.records import CompileRecord

BATCH, PROMPT, NEW = 2, 72, 12  # the prompt is longer than the sliding windows (64)
OPS = {
    "attention": ("ascend.flash_attention", "ascend.mla_attention"),
    "norms": ("ascend.rms_norm", "ascend.add_rms_norm", "aten.layer_norm", "ascend.add_layer_norm"),
    "residual": ("ascend.add_rms_norm", "ascend.add_layer_norm"),
    "rotary": ("ascend.rotary",),
    "gated": ("ascend.swiglu", "ascend.gelu_mul"),
    "gate": ("ascend.moe_gate",),
    "experts": ("ascend.moe_experts",),
}
NEAR = {
    "attention": ("eager_attention", "sdpa"),
    "norms": ("rms_norm", "layer_norm"),
    "residual": ("add_rms_norm", "add_layer_norm"),
    "rotary": ("rotary", "rotary_halves", "rotary_complex", "rotary_partial"),
    "gated": ("swiglu", "gelu_mul"),
    "qkv": ("merge_linears",),
    "gate": ("moe_gate",),
    "experts": ("moe_experts",),
}


def fused(records: list[CompileRecord]) -> dict[str, int]:
    """How often each kind is in the graphs: by the operators that they hold, and by what merged for linears."""
    ops: Counter[str] = Counter()
    for record in records:
        ops.update(re.findall(r" = ([a-z_]+\.[a-z_]+)[.(]", record.after))
        ops.update(op.removesuffix(".default") for op in (x.op for x in record.lowered if x.path == "kernel"))
    found = {kind: sum(ops[name] for name in names) for kind, names in OPS.items()}
    merges = [f for r in records for f in r.fired if f.pattern == "merge_linears"]
    found["qkv"] = sum(f.replaced for f in merges if "tt" in owner(f.src))
    return found


@cache
def _classes(file: str) -> list[tuple[int, int, str]]:
    with open(file) as source:
        tree = ast.parse(source.read())
    return [(n.lineno, n.end_lineno or 0, n.name) for n in ast.walk(tree) if isinstance(n, ast.ClassDef)]


def owner(src: tuple[str, int] | None) -> str:
    """The class around a line of the model's source: what a merged linear belongs to."""
    if src is None:
        return ""
    return next((name for first, last, name in _classes(src[0]) if first <= src[1] <= last), "")


def near_misses(records: list[CompileRecord], kinds: list[str]) -> dict[str, list[str]]:
    """The nearest misses of the patterns of some kinds, most frequent first."""
    found: dict[str, list[str]] = {}
    for kind in kinds:
        misses = [m for r in records for m in r.missed if m.pattern.startswith(NEAR[kind]) and m.progress > 0.15]
        counted = Counter(f"{m.pattern}: {re.sub(r' at %.*', '', m.reason)} [{_where(m.src)}] p={m.progress:.1f}"
                          for m in sorted(misses, key=lambda m: -m.progress))  # fmt: skip
        found[kind] = [f"{n}x {text}" for text, n in counted.most_common(3)]
    return found


def _where(src: tuple[str, int] | None) -> str:
    return f"{src[0].rsplit('/', 1)[-1]}:{src[1]}" if src else "?"


def main(family: str, implementation: str, dtype: str, target: str, steps: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    cell = Cell(family, implementation, getattr(torch, dtype), target)
    return cell.run(steps)


class Cell:
    def __init__(self, family: str, implementation: str, dtype: torch.dtype, target: str) -> None:
        self.family = _families.FAMILIES[family]
        self.model = _models.build(self.family.model, dtype=dtype, attention=implementation, check=False)
        self.exact = copy.deepcopy(self.model).double()
        self.target = target

    def run(self, steps: int) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for mode in ("forward", "generate"):
            try:
                if mode == "forward":
                    out.update(self.forward(steps))
                elif self.family.inputs in ("text", "seq2seq", "audio"):
                    out["generate"] = self.generate()
            except Exception as error:
                traceback.print_exc()
                out[mode] = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
        return out

    def inputs(self) -> dict[str, Any]:
        kind, config = self.family.inputs, self.model.config
        ids = _models.token_ids(512, BATCH, PROMPT)
        pixels = torch.randn(BATCH, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        if kind == "text":
            return {"input_ids": ids}
        if kind == "encoder":
            mask = torch.ones_like(ids)
            mask[0, PROMPT // 2 :] = 0
            return {"input_ids": ids, "attention_mask": mask}
        if kind == "seq2seq":
            return {"input_ids": ids, "decoder_input_ids": ids[:, :24]}
        if kind == "image":
            return {"pixel_values": pixels}
        if kind == "clip":
            return {"input_ids": ids, "pixel_values": pixels}
        if kind == "vlm":
            patches = (64 // 16) ** 2
            ids[:, 4 : 4 + patches] = config.image_token_index if hasattr(config, "image_token_index") else 15
            return {"input_ids": ids, "pixel_values": pixels}
        if kind == "audio":
            features = torch.randn(BATCH, 80, 128, generator=torch.Generator().manual_seed(0))
            return {"input_features": features, "decoder_input_ids": ids[:, :24]}
        raise AssertionError(kind)

    def typed(self, inputs: dict[str, Any], model: Any) -> dict[str, Any]:
        dtype = next(model.parameters()).dtype
        return {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}

    @torch.no_grad()
    def forward(self, steps: int) -> dict[str, Any]:
        torch._dynamo.reset()
        backend = Backend({"target": self.target}, texts=True)
        compiled = torch.compile(self.model, backend=backend)
        inputs = self.inputs()
        has_cache = self.family.inputs in ("text", "seq2seq", "audio", "vlm")
        more = {"use_cache": True} if has_cache else {}
        new = compiled(**self.typed(inputs, self.model), **more)
        eager = self.model(**self.typed(inputs, self.model), **more)
        exact = self.exact(**self.typed(inputs, self.exact), **more)
        out = {"prefill": self.report(list(backend.records), "prefill")}
        out["prefill"]["agree"] = self.judge(new, eager, exact)
        if not has_cache or not steps:
            return out
        first = len(backend.records)
        token = self.logits(eager)[:, -1:].argmax(-1)
        states = {"new": new, "eager": eager, "exact": exact}
        wrong = ""
        after_first = first
        for step in range(steps):
            results = {}
            for name, model in (("new", compiled), ("eager", self.model), ("exact", self.exact)):
                results[name] = model(**self.next(states[name], token), use_cache=True)
            states = {n: self.keep(r, states[n]) for n, r in results.items()}
            wrong = wrong or self.judge(results["new"], results["eager"], results["exact"])
            token = self.logits(results["eager"])[:, -1:].argmax(-1)
            if step == 0:
                after_first = len(backend.records)
        out["decode"] = self.report(backend.records[first:after_first], "decode")
        out["decode"]["agree"] = wrong
        out["decode"]["graphs"] = len(backend.records) - first
        return out

    def keep(self, result: Any, before: Any) -> Any:
        if getattr(result, "encoder_last_hidden_state", None) is None and hasattr(before, "encoder_last_hidden_state"):
            result.encoder_last_hidden_state = before.encoder_last_hidden_state
        return result

    def next(self, state: Any, token: Tensor) -> dict[str, Any]:
        key = "input_ids" if self.family.inputs in ("text", "vlm") else "decoder_input_ids"
        more: dict[str, Any] = {key: token, "past_key_values": state.past_key_values}
        if key != "input_ids":
            more["encoder_outputs"] = (state.encoder_last_hidden_state,)
        return more

    @staticmethod
    def logits(result: Any) -> Tensor:
        for name in ("logits", "last_hidden_state"):
            found = getattr(result, name, None)
            if found is not None:
                return found
        return torch.cat((result.text_embeds, result.image_embeds))

    def judge(self, new: Any, eager: Any, exact: Any) -> str:
        n, e, x = (self.logits(r) for r in (new, eager, exact))
        found = agree(n, e, x, c_ulp=16.0)
        return str(found or "")

    def report(self, records: list[CompileRecord], stage: str) -> dict[str, Any]:
        counts = fused(records)
        expected = dict(self.family.expected(self.model.config, stage).items())
        short = [k for k, v in expected.items() if v is not None and counts[k] != v]
        return {
            "expected": expected,
            "fused": counts,
            "graphs": len(records),
            "short": short,
            "near": near_misses(records, short),
            "quarantined": sorted({f"{q.pattern}: {q.error}" for r in records for q in r.quarantined}),
        }

    @torch.no_grad()
    def generate(self) -> dict[str, Any]:
        torch._dynamo.reset()
        inputs = self.typed(self.inputs(), self.model)
        inputs.pop("decoder_input_ids", None)
        settings = {"do_sample": False, "cache_implementation": "static", "max_new_tokens": NEW, "eos_token_id": None}
        self.model.generation_config.eos_token_id = None
        eager = self.model.generate(**inputs, **settings, disable_compile=True)
        config = hf.compile_config(backend=Backend({"target": self.target}, texts=True))
        first = self.model.generate(**inputs, **settings, compile_config=config)
        graphs = hf.compile_count(config)
        second = self.model.generate(**inputs, **settings, compile_config=config)
        out = self.report(config.backend.records, "decode")
        if not graphs:
            raise AscendDynamoError("generate() did not compile")
        out["agree"] = "" if torch.equal(first, eager) else f"tokens differ: {first.tolist()} {eager.tolist()}"
        out["second"] = "" if torch.equal(second, eager) else "tokens of the second call differ"
        out["graphs_second"] = hf.compile_count(config) - graphs
        return out


if __name__ == "__main__":
    result = main(*sys.argv[1:5], int(sys.argv[5]))
    sys.stdout.write(json.dumps(result) + "\n")
