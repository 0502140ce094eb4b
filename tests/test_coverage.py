"""What the coverage benchmark expects follows from configs, its counts are in the graphs, and whole families fuse."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import _coverage_cell as cell
import _coverage_count as count
import _coverage_inputs as inputs
import _families
import _models

from ascend_dynamo.report.records import CompileRecord, Fired, Lowered, Missed

# By its path: under pytest-cov the module named coverage is the library that measures the tests.
_spec = importlib.util.spec_from_file_location("bench_coverage", Path(_families.__file__).with_name("coverage.py"))
assert _spec is not None and _spec.loader is not None
coverage = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(coverage)

NORMS = {"RMSNorm", "LayerNorm"}
WHOLE = {  # complete families, one for each way in which they differ; how many tokens to decode
    ("gpt-j", "eager"): 0,  # interleaved partial rotary, attention and MLP side by side
    ("glm-4", "sdpa"): 2,  # norms on both sides, merged gate and up; the second token's graph serves all sizes
    ("falcon", "sdpa"): 0,  # one head of keys, one norm
    ("opt", "eager"): 0,  # sums that are reshaped before their norms
    ("whisper", "eager"): 0,  # keys without a bias, cross attention
}


def config(name: str) -> Any:
    spec = _models.SPECS[_families.FAMILIES[name].model]
    return transformers.AutoConfig.for_model(spec.model_type, **spec.config)


def modules(name: str) -> list[tuple[str, torch.nn.Module]]:
    with torch.device("meta"):
        spec = _models.SPECS[_families.FAMILIES[name].model]
        return list(getattr(transformers, spec.factory).from_config(config(name)).named_modules())


@pytest.mark.parametrize("name", [n for n, f in _families.FAMILIES.items() if f.required])
def test_as_many_norms_and_attentions_are_expected_as_the_model_has_modules(name: str):
    """The formulas against the module trees, which know nothing of them: each module runs once in a prefill."""
    expected = _families.FAMILIES[name].expected(config(name), "prefill")
    tree = modules(name)
    norms = [m for n, m in tree if any(k in type(m).__name__ for k in NORMS)]
    attentions = [n for n, m in tree if type(m).__name__.endswith(("Attention", "Attention2")) and not _inner(n, tree)]
    assert expected.norms == len(norms)
    assert expected.attention == len(attentions)


def _inner(name: str, tree: list[tuple[str, torch.nn.Module]]) -> bool:
    """True if the module holds another one that is the attention itself."""
    return any(n.startswith(name + ".") and type(m).__name__.endswith("Attention") for n, m in tree)


def test_every_family_of_the_issue_has_a_model_and_a_formula():
    assert len([f for f in _families.FAMILIES.values() if f.required]) == 28
    assert {f.model for f in _families.FAMILIES.values()} <= set(_models.SPECS)
    assert sum(bool(f.exempt) for f in _families.FAMILIES.values()) <= coverage.MAX_EXEMPT


def test_decode_runs_the_decoder_alone():
    c = config("t5")
    prefill, decode = (_families.t5(c, stage) for stage in ("prefill", "decode"))
    assert (prefill.attention, decode.attention) == (6, 4)
    assert prefill.qkv == decode.qkv + 3 * c.num_layers + 2 * c.num_decoder_layers


def test_a_latent_of_the_queries_has_its_own_norm():
    c = SimpleNamespace(num_hidden_layers=3, first_k_dense_replace=1, q_lora_rank=None)
    assert _families.deepseek(c, "prefill").norms == 2 * 3 + 1 + 3
    assert _families.deepseek(c, "prefill").experts == 2


def record() -> CompileRecord:
    here = (__file__, 1)
    after = "%0: f32[2] = ascend.rms_norm(%x0, %w0, 1e-6)\n%1: f32[2] = aten.layer_norm(%0)\n%2 = ascend.rotary(%1)"
    return CompileRecord(
        after=after,
        fired=[Fired("merge_linears", "n", here, 3)],
        lowered=[
            Lowered("ascend.flash_attention.default", "a", "kernel"),
            Lowered("ascend.rms_norm.default", "b", "reference"),
        ],
        missed=[
            Missed("rotary", "n", "op", "op: expected a, found %b at %c (f:1)", 0.5, here),
            Missed("rotary", "m", "op", "op: expected a, found %d at %c (f:1)", 0.5, here),
            Missed("sdpa", "m", "op", "op: another", 0.9, here),
        ],
    )


class Attention:
    """The owner of the line below."""

    LINE = "this one"


def test_counts_come_from_the_graph_the_kernels_and_the_merges(monkeypatch: pytest.MonkeyPatch):
    found = count.fused([record(), record()])
    assert found["attention"] == 2 and found["norms"] == 4 and found["rotary"] == 2 and found["qkv"] == 0
    monkeypatch.setattr(count, "owner", lambda src: "SelfAttention")
    assert count.fused([record()])["qkv"] == 3


def test_a_line_belongs_to_its_class():
    line = next(i for i, text in enumerate(Path(__file__).read_text().splitlines(), 1) if "LINE = " in text)
    assert count.owner((__file__, line)) == "Attention" and count.owner((__file__, 1)) == count.owner(None) == ""


def test_missing_and_surplus_are_both_short():
    expected = _families.Counts(attention=2, norms=3, residual=1, rotary=None)
    counts = dict.fromkeys(_families.KINDS, 0)
    assert count.short(expected, {**counts, "attention": 2, "norms": 3, "residual": 2, "rotary": 9}) == []
    assert count.short(expected, {**counts, "attention": 3, "norms": 2, "gated": 1}) == [
        "attention",
        "norms",
        "residual",
        "gated",
    ]


def test_near_misses_are_counted_by_reason():
    (reason,) = count.near_misses([record()], ["rotary"])["rotary"]
    assert reason == "2 x rotary: op: expected a, found a value (test_coverage.py:1)"


def test_logits_are_judged_by_the_budget_and_a_wrong_one_is_named():
    exact = torch.randn(2, 3, 8, dtype=torch.float64)
    eager = exact.float()
    assert cell.judge(eager, eager, exact) == ""
    assert "expected" in cell.judge(eager + 1e-3, eager, exact)


def options(**changes: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"attention": "eager,sdpa", "dtype": "float32,bfloat16", "quick": False, **changes})


def test_one_cell_decodes_long_and_each_implementation_asks_aot_eager_once():
    found = coverage.cells(_families.FAMILIES["llama"], options())
    assert [c["steps"] for c in found] == [64, 3, 3, 3] and [c["peer"] for c in found] == [True, False, True, False]
    assert len(coverage.cells(_families.FAMILIES["gpt-j"], options())) == 2  # transformers has no sdpa of it
    assert coverage.cells(_families.FAMILIES["llama"], options(quick=True))[0]["steps"] == 3


def test_a_finished_family_is_not_run_again_and_its_gaps_are_listed(tmp_path: Path):
    counts = {k: 0 for k in _families.KINDS}
    report = {"expected": {**counts, "attention": 2}, "fused": {**counts, "attention": 1}, "short": ["attention"],
              "near": {"attention": ["1 x sdpa: why"]}, "graphs": 3, "disagrees": "", "faults": []}  # fmt: skip
    kept = [{"attention": "eager", "dtype": "float32", "modes": {"decode": report}, "errors": {}, "seconds": 1.0}]
    (tmp_path / "llama.json").write_text(json.dumps(kept))
    results = coverage.run("llama", options(), tmp_path)
    assert list(coverage.problems("llama", results)) == [
        "llama eager float32 decode: attention 1/2",
        "    1 x sdpa: why",
    ]
    assert not coverage.complete(results) and coverage.agrees(results) and not coverage.few_graphs(results)
    values, _ = coverage.summary({"llama": results})
    assert values["attention"] == "1/2" and values["graphs_ok"] == "0/1" and values["compiled"] == 3


@pytest.mark.slow
@pytest.mark.parametrize(("name", "attention"), WHOLE)
def test_whole_families_are_fused_and_agree(name: str, attention: str):
    steps = WHOLE[name, attention]
    with torch.no_grad():
        reports = cell.Cell(name, attention, "float32", "reference").forward(steps)
    assert list(reports) == (["prefill", "decode"] if steps else ["prefill"])
    for report in reports.values():
        assert report["graphs"] in (1, steps) and not report["faults"] and not report["disagrees"]
        assert report["short"] == [] and report["fused"]["attention"] == report["expected"]["attention"] > 0


def test_inputs_are_longer_than_the_windows():
    assert all(
        s.config["sliding_window"] < inputs.PROMPT
        for n, s in _models.SPECS.items()
        if n.startswith("tiny") and s.config.get("sliding_window")
    )
