"""The worker of ``coverage.py``: one family, in all its attention implementations and dtypes.

    python _coverage_cell.py '{"family": ..., "cells": [{"attention": ..., "dtype": ...}], "target": ..., "steps": ...}'

prints one JSON object per cell. Prefill and decode are one compiled model with a DynamicCache, as users have it: the
first call reads the prompt, the next ones a token each, always eager's token. ``generate`` decodes greedily with a
StaticCache, twice. Results are judged against a float64 copy of the model and against eager, by the one definition of
equality that everything uses.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import _coverage_count as count
import _coverage_inputs as inputs
import _families
import _models
import torch
from torch import Tensor
from torch._dynamo.backends.registry import lookup_backend

from ascend_dynamo import hf
from ascend_dynamo.backend import Backend
from ascend_dynamo.dialect.equal import agree
from ascend_dynamo.report.records import CompileRecord

C_ULP = 16.0  # of the budget of a whole model: a few roundings in each of a few layers
NEW = 12  # tokens that generate() makes


class Cell:
    """A family's model in one attention implementation and dtype, beside its exact copy."""

    def __init__(self, family: str, attention: str, dtype: str, target: str) -> None:
        self.family = _families.FAMILIES[family]
        self.kind = self.family.inputs
        self.target = target
        self.model = _models.build(self.family.model, dtype=getattr(torch, dtype), attention=attention, check=False)
        if self.kind in inputs.CACHED:
            self.model.generation_config.eos_token_id = None  # a random model says any token, also "end"
        self.exact = copy.deepcopy(self.model).double()
        with torch.no_grad():  # at its first call transformers installs hooks, which cost a new module graph breaks
            self.model(**inputs.make(self.kind, self.model))
        if self.exact._can_set_experts_implementation():
            self.exact.set_experts_implementation("eager")  # there is no grouped matmul of float64

    def forward(self, steps: int) -> dict[str, Any]:
        """Prefill, then ``steps`` single tokens if the family generates."""
        torch._dynamo.reset()
        backend = Backend({"target": self.target}, texts=True)
        cached = {"use_cache": True} if self.kind in inputs.CACHED else {}
        models = {"new": torch.compile(self.model, backend=backend), "eager": self.model, "exact": self.exact}
        firsts = {n: m(**inputs.make(self.kind, self.exact if n == "exact" else self.model), **cached)
                  for n, m in models.items()}  # fmt: skip
        out = {"prefill": self.report(backend.records, "prefill", judge(*map(inputs.answer, firsts.values())))}
        if not cached or not steps:
            return out
        before = len(backend.records)
        first_step = before
        results = firsts
        said: dict[str, list[Tensor]] = {n: [] for n in models}
        for step in range(steps):
            token = inputs.answer(results["eager"])[:, -1:].argmax(-1)
            results = {
                n: m(**inputs.following(self.kind, results[n], firsts[n], token), use_cache=True)
                for n, m in models.items()
            }
            for n, result in results.items():
                said[n].append(inputs.answer(result))
            if step == 0:
                first_step = len(backend.records)
        wrong = judge(*(torch.cat(answers) for answers in said.values()))
        # Each later graph (of a growing cache: the one for all its sizes) is a whole step, as the first one is.
        whole = [backend.records[before:first_step]]
        if first_step == before + 1:
            whole += [[r] for r in backend.records[first_step:]]
        return {**out, "decode": self.poorest(whole, wrong, graphs=len(backend.records) - before)}

    def generate(self) -> dict[str, Any]:
        """Greedy tokens of a padded batch through ``hf.compile_config``, twice, with a fresh StaticCache each."""
        torch._dynamo.reset()
        eager = self._generate(disable_compile=True)
        config = hf.compile_config(backend=Backend({"target": self.target}, texts=True))
        with hf.assert_compiled(config):
            first = self._generate(compile_config=config)
        graphs = hf.compile_count(config)
        second = self._generate(compile_config=config)
        records = config.backend.records
        wrong = self._same(first, eager) or self._same(second, eager)
        # A sliding window that fills up makes a second graph of the same step.
        out = self.poorest([[r] for r in records[:graphs]], wrong, graphs=graphs)
        return {**out, "graphs_again": len(records) - graphs}

    def _generate(self, **more: Any) -> Tensor:
        given = inputs.padded(self.kind, inputs.make(self.kind, self.model))
        given.pop("decoder_input_ids", None)
        return self.model.generate(
            **given, do_sample=False, cache_implementation="static", max_new_tokens=NEW, eos_token_id=None, **more
        )

    def _same(self, new: Tensor, eager: Tensor) -> str:
        """ "" if the tokens are equal up to a choice whose float64 margin is under the budget."""
        if torch.equal(new, eager):
            return ""
        if new.shape != eager.shape:
            return f"{list(new.shape)} tokens, expected {list(eager.shape)}"
        key = "decoder_input_ids" if self.kind in inputs.DECODER else "input_ids"
        given = {**inputs.padded(self.kind, inputs.make(self.kind, self.model)), key: eager}
        given = inputs.grown(given, eager.shape[1])
        ours = inputs.answer(self.model(**given)).double()
        exact = inputs.answer(self.exact(**inputs.typed(given, self.exact)))
        for row in range(len(eager)):
            differ = (new[row] != eager[row]).nonzero()
            if not len(differ):
                continue
            at = int(differ[0]) - 1
            right, error = exact[row, at], (ours[row, at] - exact[row, at]).abs().max()
            eps = torch.finfo(next(self.model.parameters()).dtype).eps
            budget = 2 * max(2 * float(error), C_ULP * eps * float(right.abs().max()))
            margin = abs(float(right[eager[row, at + 1]] - right[new[row, at + 1]]))
            if margin > budget:
                return f"token {at + 1} of row {row} differs by a margin of {margin:.3g}, more than {budget:.3g}"
        return ""

    def poorest(self, steps: list[list[CompileRecord]], wrong: str, graphs: int) -> dict[str, Any]:
        """The report of the decode step in which most is missing."""
        reports = [self.report(records, "decode", wrong) for records in steps]
        worst = min(reports, key=lambda r: (-len(r["short"]), sum(r["fused"].values())))
        return {**worst, "graphs": graphs}

    def report(self, records: list[CompileRecord], stage: str, wrong: str) -> dict[str, Any]:
        if not records:
            raise RuntimeError(f"nothing was compiled: {stage} ran in eager")
        expected = self.family.expected(self.model.config, stage)
        counts = count.fused(records)
        missing = count.short(expected, counts)
        faults = sorted({f"{q.pattern}: {q.error}" for r in records for q in r.quarantined})
        return {
            "expected": dict(expected.items()),
            "fused": counts,
            "short": missing,
            "near": count.near_misses(records, missing),
            "graphs": len(records),
            "disagrees": wrong,
            "faults": faults,
        }


def judge(new: Tensor, eager: Tensor, exact: Tensor) -> str:
    """ "" if the new logits are as right as eager's, else why not.

    All rows of a run share one budget: which row a model's rounding hits hardest is chance.
    """
    return str(agree(*(t.flatten() for t in (new, eager, exact)), c_ulp=C_ULP) or "")


class Counting:
    """``aot_eager``, counting its graphs."""

    def __init__(self) -> None:
        self.graphs = 0
        self._inner: Callable[..., Any] = lookup_backend("aot_eager")

    def __call__(self, gm: Any, example_inputs: Any, **kwargs: Any) -> Any:
        self.graphs += 1
        return self._inner(gm, example_inputs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Counting:
        return self


def peer_graphs(cell: Cell, steps: int) -> dict[str, int]:
    """How many graphs ``aot_eager`` makes of the same calls."""
    torch._dynamo.reset()
    backend = Counting()
    model = torch.compile(cell.model, backend=backend)
    cached = {"use_cache": True} if cell.kind in inputs.CACHED else {}
    result = first = model(**inputs.make(cell.kind, cell.model), **cached)
    out = {"prefill": backend.graphs}
    if cached:
        for _ in range(steps):
            token = inputs.answer(result)[:, -1:].argmax(-1)
            result = model(**inputs.following(cell.kind, result, first, token), use_cache=True)
        out["decode"] = backend.graphs - out["prefill"]
        torch._dynamo.reset()
        backend.graphs = 0
        cell._generate(compile_config=hf.compile_config(backend=backend))
        out["generate"] = backend.graphs
    return out


def run(family: str, attention: str, dtype: str, target: str, steps: int, peer: bool) -> dict[str, Any]:
    """One cell; a part that fails says so and leaves the others alone."""
    start = time.perf_counter()
    cell = Cell(family, attention, dtype, target)
    out: dict[str, Any] = {"attention": attention, "dtype": dtype, "modes": {}, "errors": {}}
    parts: dict[str, Callable[[], Any]] = {"forward": lambda: out["modes"].update(cell.forward(steps))}
    if cell.kind in inputs.CACHED:
        parts["generate"] = lambda: out["modes"].update(generate=cell.generate())
    if peer:
        parts["aot_eager"] = lambda: out.update(peer=peer_graphs(cell, steps))
    for name, part in parts.items():
        try:
            with torch.no_grad():
                part()
        except Exception as error:  # it is the finding; the driver shows it
            traceback.print_exc()
            out["errors"][name] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
    return {**out, "seconds": time.perf_counter() - start}


def main(request: dict[str, Any], answers: Any) -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    logging.getLogger("transformers").setLevel(logging.ERROR)
    for cell in request["cells"]:
        answers.write(json.dumps(run(request["family"], target=request["target"], **cell)) + "\n")
        answers.flush()


if __name__ == "__main__":
    protocol = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    main(json.loads(sys.argv[1]), protocol)
