"""The benchmark harness: the protocol, the fairness checks and the arithmetic. Nothing here judges a time."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import _harness as h
import _machine
import _synthetic
import latency
import matcher

MODULE = """
import torch
from _worker import Prepared

def prepare(case, contender):
    print("this must not break the protocol")
    if contender == "broken":
        raise ValueError("cannot do this")
    calls = []
    value = 2.0 if contender == "wrong" else 1.0
    return Prepared(lambda: torch.full((4,), value), lambda: calls.append(1), 2, work={"bytes": 8.0, "flops": 4.0})
"""
MACHINE = _machine.Machine("a cpu", 1, read=4.0, matmul={"fp32": 8.0}, foreign=0.0)


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "toy_bench.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(h, "SHORTEST", 0.001)
    monkeypatch.setattr(h, "MAX_FOREIGN", 1e9)
    monkeypatch.setattr(h, "MIN_CORES", 0.0)
    return "toy_bench"


def run(module: str, *contenders: str) -> h.Row:
    bench = h.Bench(module, contenders, rounds=2, machine=MACHINE, threads=1)
    with bench.processes() as running:
        return bench.row({"dtype": "fp32"}, running)


def test_contenders_that_agree_are_timed(toy: str):
    row = run(toy, "eager", "ours")
    assert row.agreed and row.clean and row.floor == 2.0
    assert all(len(t.rounds) == 2 and t.median > 0 and not t.error for t in row.timings.values())
    assert row.ratio("eager") > 0 and row.reached() > 0
    assert json.loads(json.dumps(row.to_dict()))["timings"]["ours"]["compile"] > 0


def test_a_wrong_result_and_a_failure_are_results(toy: str):
    row = run(toy, "eager", "wrong", "broken")
    assert not row.agreed and not row.clean
    assert row.timings["wrong"].difference == pytest.approx(1.0)
    assert row.timings["broken"].error == "ValueError: cannot do this" and not row.timings["broken"].rounds
    assert math.isnan(row.ratio("eager", "broken"))


def test_all_failing_is_a_row_too(toy: str):
    assert not run(toy, "broken").agreed
    assert "process ended" in run("no_such_module", "eager").timings["eager"].error


def test_a_noisy_batch_is_repeated_and_marked(toy: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(h, "MIN_CORES", 1e9)
    monkeypatch.setattr(h.time, "sleep", lambda s: None)
    timing = run(toy, "eager").timings["eager"]
    assert timing.retries == 4 and timing.dirty == 2 and len(timing.rounds) == 2


def test_workers_get_a_clean_thread_environment(monkeypatch: pytest.MonkeyPatch):
    for name in ("OMP_PROC_BIND", "KMP_AFFINITY", "GOMP_CPU_AFFINITY", "ASCEND_DYNAMO_LEVEL"):
        monkeypatch.setenv(name, "1")
    clean = h.clean_environment(2)
    assert clean["OMP_NUM_THREADS"] == "2" and clean["PATH"]
    assert not {"OMP_PROC_BIND", "KMP_AFFINITY", "GOMP_CPU_AFFINITY", "ASCEND_DYNAMO_LEVEL"} & set(clean)


def test_difference_is_relative_and_strict_about_nan_and_shape():
    truth = torch.tensor([3.0, 4.0])
    assert h.difference(truth * 1.1, truth) == pytest.approx(0.1)
    assert h.difference(torch.tensor([3.0, math.nan]), truth) == math.inf == h.difference(truth[:1], truth)


def test_result_line_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "out.json"
    h.result("toy", {"speed": 1.23456, "rows": "2/2"}, {"speed": 1.25}, path, machine=MACHINE)
    assert capsys.readouterr().out == "RESULT toy speed=1.23 rows=2/2 goal:speed=1.25\n"
    data = json.loads(path.read_text())
    assert data["machine"]["read"] == 4.0 and data["goals"] == {"speed": 1.25} and data["date"]


def test_table_and_means():
    assert h.table(("a", "bb"), [("x", "1"), ("yyy", "22")]) == "a    bb\nx     1\nyyy  22"
    assert h.geomean([2.0, 8.0]) == pytest.approx(4.0) and math.isnan(h.geomean([]))
    assert "read 0.0 GB/s" in h.describe(MACHINE) and "others" not in h.describe(MACHINE)
    assert "others used 1.5" in h.describe(_machine.Machine("a cpu", 1, 4.0, {"fp32": 8.0}, 1.5))


def test_latency_cases_have_names_and_floors():
    labels = [latency.label(c) for c in latency.CASES]
    assert len(set(labels)) == 14 and "bert-base encode 8x512 bf16" in labels
    assert "qwen3-0.6b decode at 128/256 fp32" in labels
    prepared = latency.prepare({**latency.QUICK[0], "layers": 1}, "eager")
    config = {"hidden": 768, "inter": 3072}
    linear = 4 * config["hidden"] ** 2 + 2 * config["hidden"] * config["inter"]
    assert prepared.work["bytes"] == 2 * (linear + config["hidden"] ** 2)  # the pooler, too
    assert prepared.reference is not None and prepared.run().shape == (1, 128, 768)


def test_decode_rewinds_to_the_prompt():
    prepared = latency.prepare({**latency.QUICK[1], "model": "tiny-qwen3", "layers": 1}, "eager")
    prepared.reset()
    first = prepared.run()
    second = prepared.run()
    prepared.reset()
    assert torch.equal(prepared.run(), first) and not torch.equal(first, second)


def test_every_matcher_finds_every_occurrence():
    original, occurrences = _synthetic.graph(200)
    found = {n: f()(matcher._copy(original)) for n, f in (("inductor", matcher._inductor), ("fx", matcher._fx))}
    assert found["fx"].sum() == occurrences > 0 and torch.equal(found["fx"], found["inductor"])


def test_our_matcher_finds_the_same(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_synthetic, "COUNT", 20)  # tracing all hundred takes seconds
    monkeypatch.setattr(_synthetic, "UNARY", _synthetic.UNARY[:5])
    original, occurrences = _synthetic.graph(200)
    assert matcher._ours()(matcher._copy(original)).sum() == occurrences > 0
