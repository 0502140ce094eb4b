"""benchmarks/attention.py: its arithmetic, its guard against running out of memory, its cases. No time is judged."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import _attention
import _attention_forms
import _harness as h
import _memory
import attention


def test_the_exponent_is_the_worse_of_the_fit_and_the_end():
    assert attention.slope([(x, 3 * x**2) for x in (1, 2, 4)]) == pytest.approx(2.0)
    flat_then_steep = [(1.0, 10.0), (2.0, 10.0), (4.0, 20.0)]
    assert attention.exponent(flat_then_steep) == pytest.approx(1.0)
    steep_then_flat = [(1.0, 1.0), (2.0, 4.0), (4.0, 4.0)]
    assert attention.exponent(steep_then_flat) == pytest.approx(1.0)
    assert attention.exponent([(1.0, 1.0)]) != attention.exponent([(1.0, 1.0)])  # nan: nothing to fit


class Bench:
    """Notes who was run; every contender needs a byte per pair of tokens."""

    def __init__(self) -> None:
        self.ran: list[list[str]] = []

    def row(self, case, running, *, in_turn):
        self.ran.append(list(running))
        return h.Row(case, {c: h.Timing(rounds=[1.0], peak=float(case["seq"]) ** 2) for c in running})


def test_what_would_not_fit_is_reported_and_not_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_memory, "available", lambda: 1e9)
    bench, peaks = Bench(), attention.Peaks()
    running = dict.fromkeys(attention.CONTENDERS)
    for length in (8192, 16384, 32768):
        row = attention.measure(bench, {"model": "layer", "dtype": "bf16", "seq": length}, running, peaks)
    assert [len(r) for r in bench.ran] == [5, 5, 0]
    assert all(t.error == "OOM guard: needs 1 GB" for t in row.timings.values())
    line = attention._line(row)
    assert line[1] == "needs 1 GB" and line[-1] == "yes" and "nan" in line[-2]
    values, goals = attention.summary([row], [], {"layer": peaks})
    assert values["exponent"] == pytest.approx(2.0) and goals["exponent"] == "<=1.1"


def test_the_peak_of_a_call_is_seen():
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peak memory is only known on Linux")
    result, peak = _memory.peak_of(lambda: float(torch.ones(16 << 20).sum()))
    assert result == 16 << 20 and 64e6 < peak < 90e6


def test_rows_have_names_and_all_lengths():
    labels = [attention.label(c) for c in attention.CASES]
    assert len(labels) == len(set(labels)) == 18 + len(_attention_forms.FORMS)
    assert {"layer 512 bf16", "bert-long 16384 fp32", "T5 bias, fp32"} <= set(labels)


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(_attention_forms.FORMS))
def test_every_form_is_what_it_says(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_attention_forms, "LENGTH", 48)
    monkeypatch.setattr(_attention_forms, "CACHED", 40)
    prepared = _attention.prepare({"form": name, "dtype": _attention_forms.FORMS[name].dtype}, "eager")
    assert prepared.reference is not None
    got, exact = prepared.run().float(), prepared.reference()
    assert h.difference(got, exact) < (0.05 if _attention_forms.FORMS[name].dtype == "bf16" else 0.005)
    (hq, _), (_, dv) = _attention_forms.FORMS[name].heads, _attention_forms.FORMS[name].dims
    assert got.shape == (1, hq, 1 if "decode" in name else 48, dv)


@torch.no_grad()
def test_both_spellings_of_a_model_agree():
    case = {"model": "layer", "dtype": "bf16", "seq": 40}
    eager, sdpa = (_attention.prepare(case, c) for c in ("eager", "inductor-sdpa"))
    assert eager.reference is not None
    assert h.difference(eager.run().float(), eager.reference()) < 0.03
    assert sdpa.work == eager.work and eager.work["flops"] > 2 * 40 * 1024 * 4096
